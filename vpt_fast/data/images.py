"""Lists of images with labels, however the images are stored, and how lists are split."""

from __future__ import annotations

import json
import os
import stat
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
from PIL import EpsImagePlugin, Image

from vpt_fast.counting import counted
from vpt_fast.files import parse_json

MOST_CLASSES = 1_000_000
"""All classes up to the highest number in a data set are held in memory; higher ones are damage or malice."""
_NAMES_SHOWN = 10


class DataError(ValueError):
    """The data cannot be used; the message names the path, what was found and what was wanted."""


@runtime_checkable
class StoredImage(Protocol):
    """An image that is not a file of its own: a member of an archive, or a row of a data set.

    Its `str()` is its name in digests and messages, and must be the same in every session. Worker processes
    receive it pickled or by fork.
    """

    def open(self) -> Image.Image:
        """As `PIL.Image.open`: it may decode lazily, and raise only then."""
        ...


ImageItem = Path | StoredImage

_BY_OTHER_PROGRAMS = ("EPS",)
"""Formats that Pillow has another program decode: Ghostscript, which would run what is in a data set. What a
file holds decides about its format, not its name."""


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """As `PIL.Image.open`, of all formats that Pillow decodes itself."""
    Image.init()  # lists all formats
    return Image.open(file, formats=[each for each in Image.ID if each not in _BY_OTHER_PROGRAMS])


def run_no_other_program() -> None:
    """From now on, Pillow runs no Ghostscript in this process: for images that other libraries open. What is
    Pillow's only switch for all of them stays as it is set here, since threads decode at the same time."""
    EpsImagePlugin.gs_binary = False


@dataclass(frozen=True)
class ImageList:
    """Images and their labels.

    Attributes:
        items: files, or images stored in another way.
        labels: for each item, the index of its class in `classes`.
        classes: the class names.
    """

    items: tuple[ImageItem, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.items) != len(self.labels):
            raise ValueError(
                f"labels: {len(self.labels)} given for {len(self.items)} items, wanted one for each"
            )
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.classes):
            raise ValueError(
                f"labels: from {min(self.labels)} to {max(self.labels)}, wanted 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.items)

    def select(self, indices: list[int]) -> ImageList:
        """The images at `indices`, in that order, with the same classes."""
        return ImageList(
            tuple(self.items[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes
        )

    def __add__(self, other: ImageList) -> ImageList:
        if self.classes != other.classes:
            raise ValueError("classes: two lists with other classes cannot be joined")
        return ImageList(self.items + other.items, self.labels + other.labels, self.classes)


@dataclass(frozen=True)
class Splits:
    """What `open_splits` found. All lists share `classes`; None where there is no such split.

    val_is_drawn: whether val was held out of the training images by a seed.
    """

    train: ImageList
    val: ImageList | None
    test: ImageList | None
    val_is_drawn: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def hold_out(
    images: ImageList, fraction: float | None, seed: int, *, where: object
) -> tuple[ImageList, ImageList | None]:
    """(rest, held out): of a class's n images, round(`fraction` · n) are held out, at least 1, at most n - 1.
    A `fraction` of None holds out nothing.

    The choice for a class depends only on `seed`, its name and the order of its images, not on other
    classes.

    Raises:
        DataError: a class has only one image; the message names it and `where`.
    """
    if fraction is None:
        return images, None
    members = _by_class(images)
    single = [name for name, indices in members.items() if len(indices) == 1]
    if single:
        raise DataError(
            f"{where}: found one image in {some_names(single)}; wanted two or more in each class, "
            "at least one to train on and one for validation"
        )
    held_out = _drawn(members, (seed,), lambda n: min(max(round(fraction * n), 1), n - 1))
    chosen = set(held_out)
    rest = [i for indices in members.values() for i in indices if i not in chosen]
    return images.select(rest), images.select(held_out)


def take_fraction(images: ImageList, fraction: float, seed: int) -> ImageList:
    """round(`fraction` · n) of a class's n images, at least 1, in the list's order (the paper's Fig. 3).

    With the same seed, a smaller fraction is a subset of a larger one.
    """
    return _chosen(images, seed, lambda n: max(round(fraction * n), 1))


def take_shots(images: ImageList, shots: int, seed: int) -> ImageList:
    """`shots` images of each class, all of a class that has fewer, in the list's order.

    With the same seed, a smaller number is a subset of a larger one.
    """
    return _chosen(images, seed, lambda n: shots)


def _chosen(images: ImageList, seed: int, count: Callable[[int], int]) -> ImageList:
    # Not hold_out's random stream, which may have chosen these very images.
    return images.select(sorted(_drawn(_by_class(images), (seed, 1), count)))


def _by_class(images: ImageList) -> dict[str, list[int]]:
    """Class name -> indices of its images; classes with none are left out."""
    members: dict[str, list[int]] = {name: [] for name in images.classes}
    for i, label in enumerate(images.labels):
        members[images.classes[label]].append(i)
    return {name: indices for name, indices in members.items() if indices}


def _drawn(members: dict[str, list[int]], seed: tuple[int, ...], count: Callable[[int], int]) -> list[int]:
    """`count(n)` of each class's n indices, class by class, sorted in each."""
    drawn: list[int] = []
    for name, indices in members.items():
        # Seeded by the class name too, so that adding or removing a class does not change this one's draw.
        # crc32 with surrogateescape is that of the folder name's bytes on disk.
        generator = np.random.default_rng(
            [seed[0], zlib.crc32(name.encode(errors="surrogateescape")), *seed[1:]]
        )
        order = generator.permutation(len(indices))[: count(len(indices))]
        drawn.extend(indices[i] for i in sorted(order))
    return drawn


def class_number(text: str) -> int | None:
    """The class number, below `MOST_CLASSES`, that is written in `text`; None if there is none."""
    if not text.isdecimal() or len(text.lstrip("0")) > len(str(MOST_CLASSES)):
        return None  # before int, which refuses thousands of digits in a message of its own
    number = int(text.lstrip("0") or "0")
    return number if number < MOST_CLASSES else None


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file, without the byte order mark that Windows editors write.

    Raises:
        DataError: it is missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text") from None


def read_class_names(path: Path, at_least: int) -> tuple[str, ...] | None:
    """Reads one name per line, in the order of the labels; None if there is no such file. Blank lines at the
    end are ignored.

    Raises:
        DataError: there are fewer than `at_least` names, or duplicates; a line among them is blank; the file
            is not text.
    """
    if not path.exists():
        return None
    lines = tuple(read_text(path).rstrip("\r\n").splitlines())
    first: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name.strip():
            raise DataError(f"{path}, line {number}: is blank; wanted a class's name")
        if name in first:
            raise DataError(
                f"{path}, line {number}: {name!r} again, as in line {first[name]}; wanted other names"
            )
        first[name] = number
    if len(lines) < at_least:
        raise DataError(
            f"{path}: {counted(len(lines), 'class name')}; wanted {at_least} or more, one for each class"
        )
    return lines


def read_json_file(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: it is missing, not UTF-8, or not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: is not JSON: {error.msg}") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None


def require_utf8(path: str | Path) -> None:
    """Raises DataError for a name that is not UTF-8, since the files of run folders and outputs are."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()  # by an old locale, in which the name may be UTF-8 after all
        how = "rename it" if encoding == "utf-8" else f"Python reads names as {encoding}, want PYTHONUTF8=1"
        raise DataError(f"{ascii(str(path))}: found a name that is not UTF-8; {how}") from None


def refuse_pipe(path: str | Path) -> None:
    """Raises DataError for a pipe, a socket or a device: it would be waited for, perhaps for ever. A link
    that leads nowhere passes: that such an image cannot be read is said where images are decoded."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path}: is a pipe, a socket or a device, wanted an image file; remove it")


def some_names(found: list[str], ending: str = "/") -> str:
    """The first few of `found`, for an error message."""
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    return ", ".join(f"{name}{ending}" for name in found[:_NAMES_SHOWN]) + more
