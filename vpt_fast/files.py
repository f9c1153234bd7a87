"""Writing files so that a crash or a full disk leaves the last good one."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of an empty temporary file beside `path` that takes its place when the block ends well.

    When the block raises, `path` is as it was and the temporary file is gone. The file is flushed to disk
    before it is renamed: a rename that outlives its contents would be an empty file after a power cut.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:  # that names what was asked for, and not the temporary file
        raise type(error)(error.errno, error.strerror, str(path)) from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private; these are the user's to share
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """The temporary files of `replacing` beside `path`: of a process that writes it now, or was killed."""
    path = Path(path)
    name, suffix = glob.escape(path.name), glob.escape(path.suffix)
    return sorted(path.parent.glob(f".{name}.{'?' * 8}{suffix}"))
