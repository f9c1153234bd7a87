"""Folders of class folders: which images there are, their labels, and the train/val/test split."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
"""File name endings, in any case, that are taken for images: torchvision's list and GIF."""

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder name, in any case -> the split that it holds."""

_LAYOUTS = "wanted train/ and val/ folders of class folders, or one folder of class folders"
_NAMES_SHOWN = 10


class DataError(ValueError):
    """The images given cannot be used; the text names the path, what was found and what was wanted."""


@dataclass(frozen=True)
class ImageList:
    """Image files and their labels.

    Attributes:
        paths: the files.
        labels: for each file, the index of its class in `classes`.
        classes: the class names, sorted.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels):
            raise ValueError(
                f"labels: {len(self.labels)} given for {len(self.paths)} paths, wanted one for each"
            )
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.classes):
            raise ValueError(
                f"labels: from {min(self.labels)} to {max(self.labels)}, wanted 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: list[int]) -> ImageList:
        """The images at `indices`, in that order, with the same classes."""
        return ImageList(
            tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes
        )


@dataclass(frozen=True)
class Splits:
    """What `open_splits` found. All lists share `classes`; `test` is None where there is no test folder."""

    train: ImageList
    val: ImageList
    test: ImageList | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def open_splits(root: str | os.PathLike[str], *, val_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Lists the images under `root`.

    Three layouts are understood:

    - `root/train/<class>/...` and `root/val/<class>/...` (or `valid`, `validation`), and possibly
      `root/test/<class>/...`: taken as they are.
    - `root/train/<class>/...` with no val folder: `train` is split.
    - `root/<class>/...`: all of it is split.

    A split puts round(`val_fraction` · n) of a class's n images, at least 1 and at most n - 1, into val. It
    depends on `seed`, the class names and the file names alone, and for each class on that class alone.

    Images are the files anywhere below a class folder whose names end in one of `IMAGE_EXTENSIONS`; other
    files and whatever is hidden (its name starts with a dot) are left out. No file is opened.

    Raises:
        DataError: `root` is missing or not a folder; there are no images or only one class; a class has no
            images in train or in val, or too few to be split; val or test has a class that train has not.
        ValueError: `val_fraction` is not between 0 and 1, or `seed` is negative.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction: {val_fraction}, wanted a number above 0 and below 1")
    if seed < 0:
        raise ValueError(f"seed: {seed}, wanted 0 or more")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"{root}: there is no such folder; {_LAYOUTS}")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, not a folder; {_LAYOUTS}")

    folders = _split_folders(root)
    if not folders:
        train, val = _split(root, _list_images(root), val_fraction, seed)
        return Splits(train, val, None)
    if "train" not in folders:
        raise DataError(f"{root}: found {_names(_visible_folders(root))} but no train folder; {_LAYOUTS}")

    listed = {split: _list_images(folder) for split, folder in folders.items()}
    _require_same_classes(folders, listed)
    classes = listed["train"].classes
    train = listed["train"]
    if "val" in listed:
        val = _relabel(listed["val"], classes)
    else:
        train, val = _split(folders["train"], train, val_fraction, seed)
    return Splits(train, val, _relabel(listed["test"], classes) if "test" in listed else None)


def _split_folders(root: Path) -> dict[str, Path]:
    """split -> folder, or nothing where `root` is a folder of class folders."""
    names = _visible_folders(root)
    found: dict[str, Path] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split is None:
            continue
        if split in found:
            raise DataError(f"{root}: found both {found[split].name}/ and {name}/, wanted one {split} folder")
        found[split] = root / name
    holds_folders = {split: bool(_visible_folders(folder)) for split, folder in found.items()}
    # A class may be called "train" (a vehicle) or "test": it then holds images and no folders.
    if len(found) == len(names) or {"train", "val"} <= found.keys() or holds_folders.get("train"):
        return found
    for split, folder in found.items():
        if holds_folders[split]:
            others = _names([name for name in names if name != folder.name])
            raise DataError(f"{root}: found {folder.name}/ (a folder of folders) beside {others}; {_LAYOUTS}")
    return {}


def _list_images(folder: Path) -> ImageList:
    """The images of a folder of class folders.

    Raises:
        DataError: no class folders, no images, one class, or a class folder with no images.
    """
    names = _visible_folders(folder)
    if not names:
        loose = sum(1 for entry in os.scandir(folder) if _is_image(entry.name) and entry.name[0] != ".")
        found = f"{loose} images and no class folders" if loose else "no class folders"
        raise DataError(f"{folder}: found {found}; wanted one folder a class, with that class's images in it")

    def wanted(path: str) -> bool:
        return _is_image(path) and os.sep + "." not in path[len(str(folder)) :]

    class_to_index = {name: index for index, name in enumerate(names)}
    samples = make_dataset(folder, class_to_index, is_valid_file=wanted, allow_empty=True)
    if not samples:
        raise DataError(f"{folder}: found no images in {_names(names)}{_other_files(folder)}")
    labels = tuple(label for _, label in samples)
    filled = set(labels)
    empty = [name for name in names if class_to_index[name] not in filled]
    if empty:
        raise DataError(
            f"{folder}: found no images in {_names(empty)}{_other_files(folder / empty[0])}; "
            "add images or remove the folder"
        )
    if len(names) == 1:
        inner = _visible_folders(folder / names[0])
        hint = f" (did you mean {folder / names[0]}?)" if len(inner) > 1 else ""
        raise DataError(f"{folder}: found one class, {names[0]!r}; wanted two or more class folders{hint}")
    return ImageList(tuple(Path(path) for path, _ in samples), labels, tuple(names))


def _require_same_classes(folders: dict[str, Path], listed: dict[str, ImageList]) -> None:
    train = set(listed["train"].classes)
    for split in ("val", "test"):
        if split not in listed:
            continue
        classes = set(listed[split].classes)
        if unknown := sorted(classes - train):
            raise DataError(
                f"{folders[split]}: found {_names(unknown)}, not among the classes of {folders['train']}"
            )
        # A test set may lack classes: nothing is trained or chosen on it.
        if split == "val" and (missing := sorted(train - classes)):
            raise DataError(f"{folders[split]}: found no {_names(missing)}, which {folders['train']} has")


def _relabel(images: ImageList, classes: tuple[str, ...]) -> ImageList:
    index = {name: i for i, name in enumerate(classes)}
    return ImageList(images.paths, tuple(index[images.classes[label]] for label in images.labels), classes)


def _split(root: Path, images: ImageList, val_fraction: float, seed: int) -> tuple[ImageList, ImageList]:
    by_class: list[list[int]] = [[] for _ in images.classes]
    for i, label in enumerate(images.labels):
        by_class[label].append(i)
    single = [name for name, members in zip(images.classes, by_class, strict=True) if len(members) == 1]
    if single:
        raise DataError(
            f"{root}: found one image in {_names(single)}; wanted two or more in each class, "
            "at least one to train on and one for validation"
        )
    train: list[int] = []
    val: list[int] = []
    for name, members in zip(images.classes, by_class, strict=True):
        num_val = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        # Seeded by the class name too, so that another class more or less leaves this one's split alone.
        order = np.random.default_rng([seed, zlib.crc32(os.fsencode(name))]).permutation(len(members))
        val.extend(members[i] for i in sorted(order[:num_val]))
        train.extend(members[i] for i in sorted(order[num_val:]))
    return images.select(train), images.select(val)


def _visible_folders(folder: Path) -> list[str]:
    # __MACOSX is what Apple's archiver leaves beside the real folders.
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(f"{name}/" for name in names[:_NAMES_SHOWN]) + more


def _other_files(folder: Path) -> str:
    """What there is instead of images, for an error's text."""
    endings = Counter(
        os.path.splitext(name)[1].lower() or "no ending"
        for _, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )
    if not endings:
        return " (no files at all)"
    found = ", ".join(f"{count} × {ending}" for ending, count in endings.most_common(5))
    return f" (files: {found}; images end in {', '.join(IMAGE_EXTENSIONS)})"
