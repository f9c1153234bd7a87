"""Decodes image files to RGB, and finds those that cannot be decoded before training."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from vpt_fast import control_groups

from .images import DataError, ImageItem, ImageList, open_image, some_names
from .preprocessing import Preprocessing
from .resident import ResidentBuilder, ResidentImages

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that makes the image upright."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Greyscale that Pillow scales to 8 bits as it loads it: its name for so few bits -> the step between two of
their levels."""
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class DecodeError(DataError):
    """An image cannot be decoded, for `reason`; `path` is its name if it is not a file of its own."""

    def __init__(self, path: str | ImageItem, reason: object) -> None:
        super().__init__(str(path), str(reason))  # pickle passes these to __init__ in another process
        self.path = Path(str(path))
        self.reason = str(reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class SkippedImage:
    """An image that was left out, and why; `path` is its name if it is not a file of its own."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CheckedImages:
    """What `check_images` found.

    Attributes:
        images: the images that can be decoded.
        skipped: the others.
        resident: the decoded and resized pixels of `images`; None if they were not to be kept or did not
            fit.
    """

    images: ImageList
    skipped: tuple[SkippedImage, ...]
    resident: ResidentImages | None


def default_workers() -> int:
    """Cores that this process may use, in a container too, divided among the processes that torchrun started
    on this machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(own, control_groups.cores() or own) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decode_image(path: str | ImageItem) -> Image.Image:
    """Decodes an image to RGB with 8 bits a channel, upright.

    - EXIF orientation is applied; colour profiles are not. An animation yields its first frame.
    - Transparent pixels (an alpha channel, or a palette entry or colour marked transparent) are composited
      over white: the colour stored under full transparency never shows.
    - 16-bit greyscale is scaled, 65535 becoming 255, not clipped.
    - 32-bit integers are taken to be 16-bit values, as other programs store them; floats to be in [0, 1] or,
      if any is above 1, in [0, 255].
    - CMYK, palette, 1-bit, YCbCr: Pillow's conversion.

    Of an image with more pixels than `Image.MAX_IMAGE_PIXELS` a DecompressionBombWarning gives the name,
    which Pillow's own does not.

    Raises:
        DecodeError: the file is missing, unreadable, truncated or not an image; it has more than twice
            `Image.MAX_IMAGE_PIXELS`; or its pixels are outside the ranges above.
    """
    with decoding(path), open_image(path) if isinstance(path, str | os.PathLike) else path.open() as file:
        if Image.MAX_IMAGE_PIXELS is not None and file.width * file.height > Image.MAX_IMAGE_PIXELS:
            warnings.warn(
                f"{path}: all its {file.width}×{file.height} pixels are decoded whenever it is read; "
                "a smaller copy takes less time",
                Image.DecompressionBombWarning,
                stacklevel=2,
            )
        return upright_rgb(file)


@contextlib.contextmanager
def decoding(path: str | ImageItem) -> Iterator[None]:
    """Whatever goes wrong within is a DecodeError of `path`, but for a lack of memory."""
    try:
        yield
    except MemoryError:
        raise
    # On broken files Pillow's parsers raise almost anything: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        reason = str(error) or "broken file"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.partition(', could be')[0]}; wanted a smaller copy"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image in a format that Pillow decodes"
        raise DecodeError(path, reason) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An open image as `decode_image` gives it. Raises ValueError for pixels outside the ranges there, and
    what Pillow raises for broken files."""
    _scale_transparency(image)
    image.load()
    return _to_rgb(_upright(image))


def _scale_transparency(image: Image.Image) -> None:
    """Pillow scales the colours of some files to 8 bits as it loads them, but not the transparent one."""
    marked = image.info.get("transparency")
    for tile in getattr(image, "tile", ()):
        if tile[3] in GREY_STEPS and isinstance(marked, int):
            image.info["transparency"] = marked * GREY_STEPS[tile[3]]
        elif tile[3] == "RGB;16B" and isinstance(marked, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in marked)


def transposition_of(image: Image.Image) -> Image.Transpose | None:
    """What makes an open image upright by its EXIF orientation; None if it is as it is stored."""
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, struct.error, ValueError):
        return None  # broken metadata: as stored, which is what viewers show


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it rewrites the metadata, and fails on what it cannot write.
    transposition = transposition_of(image)
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _to_eight_bits(values)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """(h, w) of 16-bit, 32-bit or floating-point grey levels -> uint8."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN fails too
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}, wanted 0 to 1 or 0 to 255")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"32-bit pixels from {low:.0f} to {high:.0f}, wanted 0 to 65535")
        scale = 1 / 257
    return np.rint(values * scale).astype(np.uint8)


def load_image(path: str | ImageItem, preprocessing: Preprocessing) -> torch.Tensor:
    """Decodes and resizes: `Preprocessing.resize_image` of an image.

    Raises:
        DecodeError: as `decode_image`, or too thin an image to be resized with its shape kept.
    """
    image = decode_image(path)
    try:
        return preprocessing.resize_image(image)
    except ValueError as error:
        raise DecodeError(path, error) from error


def check_images(
    images: ImageList,
    *,
    workers: int | None = None,
    preprocessing: Preprocessing | None = None,
    keep_bytes: int = 0,
    progress: Callable[[int], None] | None = None,
) -> CheckedImages:
    """Decodes every image in full and leaves out those that cannot be decoded.

    With a `preprocessing`, the resized pixels are kept as long as they fit into `keep_bytes`. Pass the result
    to `Batches`, so that a resident set is decoded only once.

    Args:
        workers: decoding threads; 0 decodes in the calling thread, None is `default_workers()`.
        keep_bytes: the most bytes of pixels to keep; `resident_budget(device)` is what `Batches` would use.
        progress: called with 1 after each image.

    Raises:
        DataError: no image of a class can be decoded; the message names the class and a reason.
    """
    builder = None
    if preprocessing is not None and keep_bytes > 0:
        builder = ResidentBuilder(preprocessing, len(images), keep_bytes)
    broken = find_broken(
        images,
        workers=workers,
        preprocessing=preprocessing,
        keep=None if builder is None else builder.add,
        progress=progress,
    )
    return leave_out(images, broken, None if builder is None else builder.build())


def find_broken(
    images: ImageList,
    *,
    rank: int = 0,
    size: int = 1,
    workers: int | None = None,
    preprocessing: Preprocessing | None = None,
    keep: Callable[[torch.Tensor], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, DecodeError]:
    """Index -> error of the images that cannot be decoded, as `check_images`.

    Args:
        rank, size: this process's share is every `size`-th image, from number `rank` on.
        keep: called with the resized pixels of each image, in order.
        progress: called after each image with the number of images that all processes have then decoded.
    """

    def load(index: int) -> torch.Tensor | None:
        if preprocessing is None:
            decode_image(images.items[index])
            return None
        return load_image(images.items[index], preprocessing)

    share = range(rank, len(images), size)
    broken: dict[int, DecodeError] = {}
    # Closed whatever ends this: Ctrl-C would leave threads that decode what they had been given.
    with contextlib.closing(map_decoding(load, share, workers)) as loading:
        for i, loaded in zip(share, loading, strict=True):
            if isinstance(loaded, DecodeError):
                broken[i] = loaded
            elif keep is not None and loaded is not None:
                keep(loaded)
            if progress is not None:
                progress(min(size, len(images) - i))
    return broken


def leave_out(
    images: ImageList, broken: Mapping[int, DecodeError], resident: ResidentImages | None = None
) -> CheckedImages:
    """`images` without those that `find_broken` found; `resident` holds the pixels of the others.

    Raises:
        DataError: as `check_images`.
    """
    remaining = images.select([i for i in range(len(images)) if i not in broken])
    errors = sorted(broken.items())
    if lost := sorted(set(images.labels) - set(remaining.labels)):
        names = some_names([images.classes[label] for label in lost], "")
        example = next(error for i, error in errors if images.labels[i] == lost[0])
        raise DataError(f"no image of {names} can be decoded; the first: {example}")
    skipped = tuple(SkippedImage(error.path, error.reason) for _, error in errors)
    return CheckedImages(remaining, skipped, resident)


def load_resident(
    images: ImageList, preprocessing: Preprocessing, *, workers: int | None, max_bytes: int
) -> ResidentImages | None:
    """Decodes and resizes all images; None if they take more than `max_bytes`.

    Raises:
        DecodeError: for the first file that cannot be decoded.
    """
    builder = ResidentBuilder(preprocessing, len(images), max_bytes)
    for pixels in map_threads(lambda path: load_image(path, preprocessing), images.items, workers):
        if not builder.add(pixels):
            return None
    return builder.build()


def map_decoding(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None
) -> Generator[_Result | DecodeError, None, None]:
    """`map_threads`, with the DecodeError of an item that cannot be decoded in place of its result."""

    def attempt(item: _Item) -> _Result | DecodeError:
        try:
            return function(item)
        except DecodeError as error:
            return error

    return map_threads(attempt, items, workers)


def map_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None
) -> Generator[_Result, None, None]:
    """map() in `workers` threads (Pillow releases the GIL to decode and resize), with results in the items'
    order; 0 is the calling thread, None `default_workers()`.

    Only a few items per thread are in flight, so that an interrupt takes effect soon and results do not pile
    up.
    """
    if workers is None:
        workers = default_workers()
    if workers < 0:
        raise ValueError(f"workers: {workers}, wanted 0 or more")
    if workers == 0:
        yield from map(function, items)
        return
    executor = ThreadPoolExecutor(workers)
    under_way: deque[Future[_Result]] = deque()
    try:
        for item in items:
            under_way.append(executor.submit(function, item))
            if len(under_way) > 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
