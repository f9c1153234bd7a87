"""What can end a training early. Commands report these in one line, and so import them before torch."""

from __future__ import annotations

from typing import TypeVar

Cause = TypeVar("Cause", bound=BaseException)


class TrainingDiverged(RuntimeError):
    """The loss or a parameter stopped being a finite number."""


class OutOfMemory(RuntimeError):
    """The device has too little memory for a training step."""


class SavingFailed(OSError):
    """The run folder could not be written; it holds the last good state."""


def find_cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """The first of this kind among the error and those that it was raised from or hides."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__ or cause.__context__
    return cause
