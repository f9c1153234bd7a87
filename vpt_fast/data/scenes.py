"""Images with a label for every pixel, in ADE20k's layout: listing, checking and reading them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vpt_fast.counting import counted

from .decode import (
    GREY_STEPS,
    DecodeError,
    SkippedImage,
    decode_image,
    decoding,
    map_threads,
    transposition_of,
)
from .folder import IMAGE_EXTENSIONS, SCENE_FOLDERS
from .images import (
    DataError,
    open_image,
    read_class_names,
    read_text,
    refuse_pipe,
    require_utf8,
    some_names,
)

IGNORED = 255
"""In a mask of class indices, a pixel without a class."""

MOST_ELONGATED = 50
"""The most that an image's long side may be of its short one, which is resized to a window's: 150 classes'
logits in windows of 512 pixels then take 8 GB."""

ADE_CLASSES = 150
ADE_NAMES = "objectInfo150.txt"
CLASS_NAMES = "classnames.txt"
LAYOUT = (
    "wanted images/training/NAME.jpg with annotations/training/NAME.png, and the same below "
    "images/validation/ and annotations/validation/"
)


@dataclass(frozen=True)
class SceneList:
    """Images and their masks.

    Attributes:
        images: files.
        masks: for each image, a PNG file of the same size with a label for every pixel.
        classes: the class names.
        ignores_zero: whether label 0 means no class and label 1 is the first class. Label 255 always means
            no class.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    ignores_zero: bool

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class SceneSplits:
    """What `open_scenes` found; the layout has no test images."""

    train: SceneList
    val: SceneList
    test: None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


@dataclass(frozen=True)
class CheckedScenes:
    """Scenes that `check_scenes` accepted; none is ever skipped."""

    images: SceneList
    skipped: tuple[SkippedImage, ...] = ()


def open_scenes(data: str | Path, *, ignore_zero: bool | None = None) -> SceneSplits:
    """Lists images and masks of a folder in ADE20k's layout (its scene-parsing release); opens none.

    `images/training/` and `images/validation/` hold the images, `annotations/training/` and
    `annotations/validation/` a PNG file of the same name for each. Class names come from `objectInfo150.txt`
    (ADE20k's own), else from `classnames.txt`, one name per line in the order of the labels.

    Args:
        data: the folder.
        ignore_zero: whether label 0 means no class; None: only with 150 classes, as in ADE20k.

    Raises:
        DataError: a folder, a mask or the class names are missing, or there are more names than labels; the
            message names the path.
    """
    root = Path(data).expanduser()
    if not str(data) or not root.is_dir():  # pathlib takes "" to be the working directory
        raise DataError(f"{data or repr(data)}: there is no such folder; {LAYOUT}")
    classes = _class_names(root)
    no_zero = ignores_zero(len(classes), ignore_zero)
    if no_zero and len(classes) >= IGNORED:
        raise DataError(
            f"{root / CLASS_NAMES}: {counted(len(classes), 'name')}; wanted at most {IGNORED - 1} where "
            f"label 0 is no class, as {IGNORED} is none either"
        )
    train, val = (_list_scenes(root, split, classes, no_zero) for split in ("training", "validation"))
    return SceneSplits(train, val)


def ignores_zero(num_classes: int, ignore_zero: bool | None) -> bool:
    """Resolves `ignore_zero` of `open_scenes` for this number of classes."""
    return num_classes == ADE_CLASSES if ignore_zero is None else ignore_zero


def _class_names(root: Path) -> tuple[str, ...]:
    if (root / ADE_NAMES).is_file():
        lines = read_text(root / ADE_NAMES).splitlines()[1:]  # the first is a header
        names = tuple(line.split("\t")[-1].strip() for line in lines if line.strip())
        if len(names) != ADE_CLASSES or len(set(names)) != ADE_CLASSES:
            raise DataError(f"{root / ADE_NAMES}: {len(set(names))} class names; wanted {ADE_CLASSES}")
        return names
    names = read_class_names(root / CLASS_NAMES, 2)
    if names is None:
        raise DataError(
            f"{root}: has neither {ADE_NAMES} nor {CLASS_NAMES}; wanted the names of the classes, one a line "
            "in the order of the labels"
        )
    if len(names) > IGNORED:
        raise DataError(f"{root / CLASS_NAMES}: {len(names)} names; wanted at most {IGNORED}")
    return names


def _list_scenes(root: Path, split: str, classes: tuple[str, ...], no_zero: bool) -> SceneList:
    folders = [root / name / split for name in SCENE_FOLDERS]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder; {LAYOUT}")
    images = sorted(
        path
        for path in folders[0].iterdir()
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )
    if not images:
        raise DataError(f"{folders[0]}: found no images; {LAYOUT}")
    for path in images:
        require_utf8(path)
        refuse_pipe(path)
    by_stem: dict[str, Path] = {}
    for path in images:
        if (first := by_stem.setdefault(path.stem, path)) != path:
            raise DataError(
                f"{folders[0]}: {first.name} and {path.name} would share the mask {path.stem}.png; wanted "
                "one image for each mask"
            )
    masks = [folders[1] / f"{path.stem}.png" for path in images]
    if missing := [mask.name for mask in masks if not mask.is_file()]:
        raise DataError(
            f"{folders[1]}: found no {some_names(missing, '')}; wanted a mask for each of "
            f"{counted(len(images), 'image')}"
        )
    return SceneList(tuple(images), tuple(masks), classes, no_zero)


def read_mask(path: Path, num_classes: int, no_zero: bool) -> np.ndarray:
    """The mask in a file as class indices (h, w) uint8, `IGNORED` where there is no class.

    Args:
        no_zero: whether label 0 means no class and label 1 is the first.

    Raises:
        DecodeError: the file cannot be read, is no PNG, has an EXIF orientation, does not hold one label per
            pixel, or holds an invalid label.
    """
    with decoding(path), open_image(path) as file:
        scaled = any(tile[3] in GREY_STEPS for tile in getattr(file, "tile", ()))
        labels = np.asarray(file)
    if file.format != "PNG":  # a JPEG's labels, say, are not those that were saved
        raise DecodeError(path, f"a {file.format} file; wanted a PNG file")
    if transposition_of(file) is not None:
        raise DecodeError(path, "its EXIF orientation turns it; wanted a mask stored as its image is shown")
    if scaled or labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise DecodeError(
            path, "wanted one whole-number label a pixel: a palette PNG, or a greyscale one of 8 or 16 bits"
        )
    first = 1 if no_zero else 0
    is_class = (labels >= first) & (labels < first + num_classes)
    is_known = is_class | (labels == IGNORED)
    if no_zero:
        is_known |= labels == 0
    if not is_known.all():
        raise DecodeError(
            path,
            f"label {labels[~is_known][0]}; wanted {first} to {first + num_classes - 1} of {num_classes} "
            f"classes, or {'0 or ' if no_zero else ''}{IGNORED} for no class",
        )
    return np.where(is_class, labels.astype(np.int64) - first, IGNORED).astype(np.uint8)


def decode_scene(path: Path) -> Image.Image:
    """`decode_image` of a scene. Raises DecodeError too if it is more elongated than `MOST_ELONGATED`."""
    image = decode_image(path)
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise DecodeError(
            path,
            f"{image.width}×{image.height} pixels is too thin, as the short side is resized to a window's; "
            f"wanted a long side of at most {MOST_ELONGATED} times the short one",
        )
    return image


def read_scene(scenes: SceneList, index: int) -> tuple[Image.Image, np.ndarray]:
    """An RGB image, and its mask (h, w) uint8 of class indices.

    Raises:
        DecodeError: one of the files cannot be used, or their sizes differ.
    """
    image = decode_scene(scenes.images[index])
    mask = read_mask(scenes.masks[index], len(scenes.classes), scenes.ignores_zero)
    if mask.shape != (image.height, image.width):
        raise DecodeError(
            scenes.masks[index],
            f"{mask.shape[1]}×{mask.shape[0]} pixels; its image {scenes.images[index]} has "
            f"{image.width}×{image.height}",
        )
    return image, mask


def _require_one_way_up(scenes: SceneList, index: int, upright: Image.Image) -> None:
    """Raises DecodeError for an image that its EXIF orientation turns without changing its size: some tools
    draw masks on the image as it is stored, others on the upright one, and here the size does not tell."""
    with open_image(scenes.images[index]) as stored:
        if transposition_of(stored) is not None and stored.size == upright.size:
            raise DecodeError(
                scenes.images[index],
                "its EXIF orientation turns it, and its mask may be of the image as stored or as turned; "
                f"store the image as its mask {scenes.masks[index]} shows it, without an orientation",
            )


def check_scenes(
    scenes: SceneList, *, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> CheckedScenes:
    """Decodes every image and mask in full. None is left out, so that scores are over all of them.

    Args:
        workers: decoding threads; 0 decodes in the calling thread, None is `default_workers()`.
        progress: called with 1 after each image.

    Raises:
        DecodeError: for the first that cannot be used, also because it does not show which way up its mask
            is.
        DataError: no pixel of any mask has a class.
    """

    def has_classes(index: int) -> bool:
        image, mask = read_scene(scenes, index)
        _require_one_way_up(scenes, index, image)
        return bool((mask != IGNORED).any())

    has_any = False
    for found in map_threads(has_classes, range(len(scenes)), workers):
        has_any |= found
        if progress is not None:
            progress(1)
    if not has_any:
        raise DataError(f"{scenes.masks[0].parent}: no pixel of any mask has a class")
    return CheckedScenes(scenes)
