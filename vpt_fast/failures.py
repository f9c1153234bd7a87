"""What can end a training early. Commands report these in one line, and so import them before torch."""

from __future__ import annotations


class TrainingDiverged(RuntimeError):
    """The loss or a parameter stopped being a finite number."""


class SavingFailed(OSError):
    """The run folder could not be written; it holds the last good state."""
