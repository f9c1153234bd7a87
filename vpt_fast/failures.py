"""What can end a training early. Commands report these in one line, and so import them before torch."""

from __future__ import annotations

import errno
from typing import TypeVar

Cause = TypeVar("Cause", bound=BaseException)


class TrainingDiverged(RuntimeError):
    """The loss or a parameter stopped being a finite number."""


class OutOfMemory(RuntimeError):
    """The device has too little memory for a training step."""


class SavingFailed(OSError):
    """The run folder could not be written; it holds the last good state."""


# Of torch's CUDA and CPU allocators, and of CUDA itself. The types are torch's, or plain RuntimeErrors.
_LACKS_MEMORY = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that this machine or its GPU has too little memory, which is no fault of what
    was asked for."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torchs = isinstance(error, RuntimeError) and any(each in str(error) for each in _LACKS_MEMORY)
    return is_torchs or isinstance(error, MemoryError)


def said_of_memory(error: BaseException) -> str:
    """The first line of an error that is out of memory; those after it are about torch's settings."""
    return str(error).partition("\n")[0] or "no more can be allocated"


def find_cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """The first of this kind among the error and those that it was raised from or hides."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again may be among those that it was raised from
    while cause is not None and not isinstance(cause, kind):
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
        if id(cause) in seen:
            return None
    return cause
