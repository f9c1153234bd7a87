"""A small data set kept decoded, so that an epoch costs no decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .preprocessing import Preprocessing

RESIDENT_BYTES = 2 << 30
"""The most bytes of pixels that `resident="auto"` keeps on a device."""
RESIDENT_FREE_FRACTION = 0.25
"""The most that it takes of a CUDA device's free memory: most of it is the model's."""


def resident_budget(device: torch.device | str) -> int:
    """Bytes of pixels that may be kept on `device`: `RESIDENT_BYTES`, and on CUDA no more than a quarter of
    what is free there now."""
    device = torch.device(device)
    if device.type != "cuda":
        return RESIDENT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(RESIDENT_BYTES, int(free * RESIDENT_FREE_FRACTION))


def least_bytes(preprocessing: Preprocessing, num_images: int) -> int:
    """Bytes that `num_images` resized images take: exactly, or if `crops_at_random` at least."""
    height, width = preprocessing.image_size
    if preprocessing.crops_at_random:
        height, width = (math.floor(side / preprocessing.crop_pct) for side in (height, width))
    return num_images * 3 * height * width


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """Decoded and resized images.

    Attributes:
        preprocessing: whose `resize_image` made them.
        pixels: uint8 (N, 3, H, W); if `preprocessing.crops_at_random`, a tuple of N (3, h, w), h and w as
            they come.
    """

    preprocessing: Preprocessing
    pixels: torch.Tensor | tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_bytes(self) -> int:
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels.nbytes
        return sum(image.nbytes for image in self.pixels)

    def to(self, device: torch.device) -> ResidentImages:
        """The same on `device`."""
        if isinstance(self.pixels, torch.Tensor):
            return ResidentImages(self.preprocessing, self.pixels.to(device))
        return ResidentImages(self.preprocessing, tuple(image.to(device) for image in self.pixels))

    def serves(self, preprocessing: Preprocessing) -> bool:
        """Whether `preprocessing` could start from these pixels."""
        stored = self.preprocessing
        return (
            (stored.image_size, stored.resize, stored.interpolation)
            == (preprocessing.image_size, preprocessing.resize, preprocessing.interpolation)
            and (stored.resize == "squash" or stored.crop_pct == preprocessing.crop_pct)
            and (stored.crops_at_random or not preprocessing.crops_at_random)
        )


class ResidentBuilder:
    """Collects resized images until they are too many bytes; then lets go of all of them."""

    def __init__(self, preprocessing: Preprocessing, num_images: int, max_bytes: int) -> None:
        self._preprocessing = preprocessing
        self._max_bytes = max_bytes
        self._bytes = 0
        self._count = 0
        self._fits = least_bytes(preprocessing, num_images) <= max_bytes
        self._stack: torch.Tensor | None = None
        self._list: list[torch.Tensor] = []
        if self._fits and not preprocessing.crops_at_random:
            # One buffer, filled in place: a list to be stacked would need the memory twice.
            self._stack = torch.empty(num_images, 3, *preprocessing.image_size, dtype=torch.uint8)

    def add(self, pixels: torch.Tensor) -> bool:
        """Takes one more image, uint8 (3, h, w); whether everything up to it has been kept."""
        self._bytes += pixels.nbytes
        self._fits = self._fits and self._bytes <= self._max_bytes
        if not self._fits:
            self._list.clear()
            return False
        if self._stack is None:
            self._list.append(pixels)
        else:
            self._stack[self._count] = pixels
        self._count += 1
        return True

    def build(self) -> ResidentImages | None:
        if not self._fits:
            return None
        pixels = tuple(self._list) if self._stack is None else self._stack[: self._count]
        return ResidentImages(self._preprocessing, pixels)
