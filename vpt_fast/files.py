"""Writing files so that a crash or a full disk leaves the previous version intact."""

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
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private; these get the usual permissions
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(path: str | os.PathLike[str]) -> list[Path]:
    """The temporary files of `replacing` for `path`, left by a killed process or being written now."""
    path = Path(path)
    name, suffix = glob.escape(path.name), glob.escape(path.suffix)
    return sorted(path.parent.glob(f".{name}.{'?' * 8}{suffix}"))
