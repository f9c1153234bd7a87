"""Writing files so that a crash or a full disk leaves the previous version intact."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of an empty temporary file beside `path`, which replaces `path` if the block succeeds.

    If the block raises, `path` is unchanged and the temporary file is deleted. The file is flushed to disk
    before it is renamed: if only the rename reached the disk before a power cut, `path` would be empty.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:  # raised again with the caller's path instead of the temporary file's
        raise type(error)(error.errno, error.strerror, str(path)) from None
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells `remove_unfinished` that it is being written
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private; these get the usual permissions
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """The temporary files of `replacing` for `path`, left by a killed process or being written now."""
    path = Path(path)
    name, suffix = glob.escape(path.name), glob.escape(path.suffix)
    return sorted(path.parent.glob(f".{name}.{'?' * 8}{suffix}"))


def remove_unfinished(*paths: str | os.PathLike[str]) -> None:
    """Removes the temporary files for `paths` that a killed process left; those being written now stay."""
    for path in paths:
        for left in unfinished(path):
            with contextlib.suppress(OSError), open(left, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)
