"""Folders of class folders: their images, labels, and train/val/test splits; and images named one by one."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vpt_fast.counting import counted

from .images import DataError, ImageList, Splits, hold_out, refuse_pipe, require_utf8, some_names

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""File name extensions of images, in any case: torchvision's list and GIF."""

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder name, in any case -> the split that it holds."""

SCENE_FOLDERS = ("images", "annotations")
"""Folders of scenes with masks (`scenes`), each with a `training` folder in it."""

LAYOUTS = "wanted train/ and val/ folders of class folders, or one folder of class folders"


def open_folder(root: Path, *, val_fraction: float | None, seed: int) -> Splits:
    """Lists the images under the folder `root`.

    Three layouts are understood:

    - `root/train/<class>/...` and `root/val/<class>/...` (or `valid`, `validation`), and possibly
      `root/test/<class>/...`: used as they are.
    - `root/train/<class>/...` with no val folder: `train` is split.
    - `root/<class>/...`: all of it is split.

    `hold_out` puts `val_fraction` of each class into val (None: nothing). The split depends only on `seed`,
    the class names and the file names.

    Images are all files below a class folder with one of `IMAGE_EXTENSIONS`; other files, and hidden files
    and folders (whose names start with a dot), are ignored. No file is opened.

    Raises:
        DataError: there are no images or only one class; a class has no images in train or in val, or too few
            to be split; val or test has a class that train lacks; a link leads back to a folder that it lies
            in; a pipe, socket or device has an image's name; it is a data set of scenes, of which images and
            masks would be the classes.
    """
    if holds_scenes(root):
        raise DataError(f"{root}: holds images with masks, for task segmentation; {LAYOUTS}")
    folders = _split_folders(root)
    if not folders:
        train, val = hold_out(_list_images(root), val_fraction, seed, where=root)
        return Splits(train, val, None, val_is_drawn=True)
    if "train" not in folders:
        raise DataError(f"{root}: found {some_names(_visible_folders(root))} but no train folder; {LAYOUTS}")

    listed = {split: _list_images(folder) for split, folder in folders.items()}
    _require_same_classes(folders, listed)
    found = {split: _relabel(images, listed["train"].classes) for split, images in listed.items()}
    train, val = found["train"], found.get("val")
    if is_drawn := val is None:
        train, val = hold_out(train, val_fraction, seed, where=folders["train"])
    return Splits(train, val, found.get("test"), is_drawn)


def holds_scenes(root: Path) -> bool:
    """Whether the folder is a data set of scenes: has training images and their annotations."""
    return all((root / name / "training").is_dir() for name in SCENE_FOLDERS)


def _split_folders(root: Path) -> dict[str, Path]:
    """split -> folder; empty if `root` is a folder of class folders."""
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
    # A class may be called "train" (the vehicle) or "test"; its folder then holds images, not folders.
    if len(found) == len(names) or {"train", "val"} <= found.keys() or holds_folders.get("train"):
        return found
    for split, folder in found.items():
        if holds_folders[split]:
            others = some_names([name for name in names if name != folder.name])
            raise DataError(f"{root}: found {folder.name}/ (a folder of folders) beside {others}; {LAYOUTS}")
    return {}


def _list_images(folder: Path) -> ImageList:
    """The images of a folder of class folders.

    Raises:
        DataError: no class folders, no images, one class, or a class folder with no images.
    """
    names = _visible_folders(folder)
    if not names:
        loose = sum(1 for entry in os.scandir(folder) if _is_image(entry.name) and entry.name[0] != ".")
        there = f"{counted(loose, 'image')} and no class folders" if loose else "no class folders"
        raise DataError(f"{folder}: found {there}; wanted one folder a class, with that class's images in it")

    for name in names:
        require_utf8(folder / name)
    found = {name: sorted(images_below(folder / name)) for name in names}
    if not any(found.values()):
        raise DataError(f"{folder}: found no images in {some_names(names)}{_other_files(folder)}")
    if empty := [name for name in names if not found[name]]:
        raise DataError(
            f"{folder}: found no images in {some_names(empty)}{_other_files(folder / empty[0])}; "
            "add images or remove the folder"
        )
    if len(names) == 1:
        inner = _visible_folders(folder / names[0])
        hint = f" (did you mean {folder / names[0]}?)" if len(inner) > 1 else ""
        raise DataError(f"{folder}: found one class, {names[0]!r}; wanted two or more class folders{hint}")
    items = [
        (Path(parent, image), label) for label, name in enumerate(names) for parent, image in found[name]
    ]
    return ImageList(tuple(path for path, _ in items), tuple(label for _, label in items), tuple(names))


def images_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(folder, name) of the visible images in and below `folder`, in no particular order; links to folders
    are followed.

    `above`: the real paths of the folders on the way here.

    Raises:
        DataError: a link back to one of these, since following it would list the same images repeatedly, and
            two such links would never end; a pipe, socket or device with an image's name.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: found a link back to {real}, which it lies in; remove it")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from images_below(folder / entry.name, above | {real})
        elif _is_image(entry.name):
            require_utf8(entry.path)
            if not entry.is_file(follow_symlinks=False):
                refuse_pipe(entry.path)
            yield str(folder), entry.name


def _require_same_classes(folders: dict[str, Path], listed: dict[str, ImageList]) -> None:
    train = set(listed["train"].classes)
    for split in ("val", "test"):
        if split not in listed:
            continue
        classes = set(listed[split].classes)
        if unknown := sorted(classes - train):
            raise DataError(
                f"{folders[split]}: found {some_names(unknown)}, not among the classes of {folders['train']}"
            )
        # A test set may lack classes: nothing is trained or chosen on it.
        if split == "val" and (missing := sorted(train - classes)):
            raise DataError(f"{folders[split]}: found no {some_names(missing)}, which {folders['train']} has")


def _relabel(images: ImageList, classes: tuple[str, ...]) -> ImageList:
    index = {name: i for i, name in enumerate(classes)}
    return ImageList(images.items, tuple(index[images.classes[label]] for label in images.labels), classes)


def _visible_folders(folder: Path) -> list[str]:
    # Apple's archiver leaves a folder __MACOSX beside the real ones.
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and entry.name != "__MACOSX" and _is_folder(entry)
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also a link to one. Only a link is looked up: of the rest the listing tells, and to ask a network file
    system about each of a million images takes minutes."""
    # Not entry.is_dir() for a link: it raises for one to itself.
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _other_files(folder: Path) -> str:
    """What a folder holds instead of images, for an error message."""
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


def expand_images(arguments: Sequence[str]) -> list[Path]:
    """Files as they are, folders as the visible images below them, patterns as their matches.

    Links to folders are followed, as for training; dangling links with an image's name are included, and so
    are files that are not there: see `missing_files`.

    Raises ValueError if an argument yields no images, and as `images_below` does.
    """
    found: list[Path] = []
    for argument in arguments:
        if not argument:  # pathlib takes "" to be the working directory
            raise ValueError("images is ''; it must be a file, a folder or a pattern")
        path = Path(argument)
        if path.is_dir():
            images = sorted(Path(folder, name) for folder, name in images_below(path))
        elif path.exists() or not glob.has_magic(argument):
            images = [path]
        else:
            images = [
                Path(match) for match in sorted(glob.glob(argument, recursive=True)) if Path(match).is_file()
            ]
        if not images:
            raise ValueError(f"images is {argument!r}, where there are no images")
        for image in images:
            require_utf8(image)
        found += images
    return found


def missing_files(paths: Sequence[Path]) -> dict[str, str]:
    """The paths at which no file can be reached, and why."""
    missing = {}
    for path in paths:
        try:
            path.stat()
        except OSError as error:
            missing[str(path)] = error.strerror or str(error)
    return missing
