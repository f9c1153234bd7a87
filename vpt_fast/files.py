"""Writing files so that a crash or a full disk leaves the previous version intact, and JSON files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows, where models are saved without locks, and the commands do not run
    fcntl = None  # type: ignore[assignment]

# The name that mkstemp gives a file in `replacing`, without its suffix.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)


def parse_json(text: str) -> Any:
    """The value that JSON text holds. Raises ValueError if it is none; json itself raises RecursionError for
    thousands of brackets."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too many values lie within each other") from None


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping in a JSON file; ValueError, which names the file, if it cannot be read or lacks any of
    `keys`."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping")
    require_keys(path, values, *keys)
    return values


def require_keys(path: Path, values: dict[str, Any], *keys: str) -> None:
    """Raises ValueError if the mapping in a file lacks any of `keys`."""
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")


def lock_file(file: IO[Any] | int, *, wait: bool = True) -> bool:
    """Locks an open file against other processes, until it is closed.

    Returns:
        Whether its file system has locks; some clusters mount theirs without.

    Raises:
        BlockingIOError: another process has locked it, and this one is not to `wait`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


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
        if fcntl is None:
            os.close(descriptor)  # Windows neither renames nor deletes an open file
        else:
            lock_file(descriptor)  # tells `remove_unfinished` that it is being written
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private; these get the usual permissions
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """Replaces `path` atomically; raises OSError, for example for a full disk."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def as_json(values: Any, *, indent: int = 2) -> bytes:
    """The contents of a JSON file with these values: UTF-8, so that names can be read in any script."""
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    # Bytes of a path that are not UTF-8 are surrogates in its text; this escapes them as JSON does.
    return text.encode(errors="backslashreplace")


def write_json(path: Path, values: Any, *, indent: int = 2) -> None:
    """Replaces `path` as `write` does, by these values as JSON."""
    write(path, as_json(values, indent=indent))


def holds(path: Path, data: bytes) -> bool:
    """Whether the file is there and contains this. To read it takes microseconds, to replace it waits for the
    disk."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def unfinished(*paths: str | os.PathLike[str]) -> list[Path]:
    """The temporary files of `replacing` for `paths`, left by a killed process or being written now.

    Each folder is listed once, however many of the paths are in it.
    """
    names: dict[Path, set[str]] = {}
    for path in map(Path, paths):
        names.setdefault(path.parent, set()).add(path.name)
    found = []
    for folder, wanted in names.items():
        suffixes = {Path(name).suffix for name in wanted}
        with contextlib.suppress(OSError):  # there may be no such folder
            for entry in os.listdir(folder):
                for suffix in suffixes:
                    match = entry.endswith(suffix) and _TEMPORARY.fullmatch(entry.removesuffix(suffix))
                    if match and match[1] in wanted and Path(match[1]).suffix == suffix:
                        found.append(folder / entry)
    return sorted(found)


def remove_unfinished(*paths: str | os.PathLike[str]) -> None:
    """Removes the temporary files for `paths` that a killed process left; those being written now stay. On
    Windows nothing tells these apart, and all stay."""
    if fcntl is None:
        return
    for left in unfinished(*paths):
        with contextlib.suppress(OSError), open(left, "rb+") as file:
            if lock_file(file, wait=False):
                left.unlink(missing_ok=True)
