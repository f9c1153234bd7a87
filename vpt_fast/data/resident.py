"""A small data set kept decoded, so that epochs need no decoding."""

from __future__ import annotations

import math
import os
import sys
import weakref
from dataclasses import dataclass

import torch

from vpt_fast.free_memory import free_bytes

from .preprocessing import Preprocessing

FREE_FRACTION = 0.25
"""The largest fraction of free memory that one set of pixels may take: the model needs most of it."""
STAGED_FRACTION = 0.5
"""The largest fraction of free host memory that pixels may take on their way to a device."""
UNKNOWN_BYTES = 2 << 30
"""The budget if the system does not report its free memory."""


def device_budget(device: torch.device | str) -> int:
    """Bytes of pixels that may be kept on `device`: a quarter of its free memory."""
    device = torch.device(device)
    return _share_of_free(device, FREE_FRACTION) if device.type == "cuda" else host_budget()


def host_budget() -> int:
    """Bytes of pixels that this process may keep in host memory: a quarter of what is available, divided
    among the processes that torchrun started on this machine."""
    return _share_of_host(FREE_FRACTION)


def host_bytes_left() -> int:
    """Bytes of host memory that are left to this process."""
    return _share_of_host(1)


def _share_of_host(fraction: float) -> int:
    return _share_of_free(torch.device("cpu"), fraction) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _share_of_free(device: torch.device, fraction: float) -> int:
    free = free_bytes(device)
    return UNKNOWN_BYTES if free is None else int(free * fraction)


def resident_budget(device: torch.device | str, resident: str = "auto") -> int:
    """The most bytes of pixels that `Batches` with this `resident` would keep, on `device` or on the host."""
    if resident == "off":
        return 0
    if resident != "auto":
        return sys.maxsize
    # What goes to a device is decoded into host memory first.
    return max(min(device_budget(device), _share_of_host(STAGED_FRACTION)), host_budget())


def least_bytes(preprocessing: Preprocessing, num_images: int) -> int:
    """Bytes that `num_images` resized images take; with `crops_at_random`, a lower bound."""
    height, width = preprocessing.image_size
    if preprocessing.crops_at_random:
        height, width = (math.floor(side / preprocessing.crop_pct) for side in (height, width))
    return num_images * 3 * height * width


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """Decoded and resized images.

    Attributes:
        preprocessing: what they were resized with.
        pixels: uint8 (N, 3, H, W); if `preprocessing.crops_at_random`, a tuple of N (3, h, w) of different
            sizes.
    """

    preprocessing: Preprocessing
    pixels: torch.Tensor | tuple[torch.Tensor, ...]

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

    def pin(self) -> str | None:
        """Pins the pixels in place for as long as they live, so that copies to a GPU can overlap with other
        work. Returns None, or the reason why they cannot be pinned."""
        if not isinstance(self.pixels, torch.Tensor):
            return "each image has memory of its own, since their sizes differ"
        return None if self.pixels.is_pinned() else _pin_in_place(self.pixels)

    def serves(self, preprocessing: Preprocessing) -> bool:
        """Whether these pixels can be used with `preprocessing`."""
        stored = self.preprocessing
        return (
            (stored.image_size, stored.resize, stored.interpolation)
            == (preprocessing.image_size, preprocessing.resize, preprocessing.interpolation)
            and (stored.resize == "squash" or stored.crop_pct == preprocessing.crop_pct)
            and (stored.crops_at_random or not preprocessing.crops_at_random)
        )


def _pin_in_place(pixels: torch.Tensor) -> str | None:
    """Has CUDA pin a tensor's memory; `Tensor.pin_memory` would copy it. Returns the error, or None."""
    cudart = torch.cuda.cudart()
    status = cudart.cudaHostRegister(pixels.data_ptr(), pixels.nbytes, 0)
    if int(status) != 0:
        return str(cudart.cudaGetErrorString(status))
    weakref.finalize(pixels, cudart.cudaHostUnregister, pixels.data_ptr())
    return None


class ResidentBuilder:
    """Collects resized images; once they take more than `max_bytes`, keeps none of them."""

    def __init__(self, preprocessing: Preprocessing, num_images: int, max_bytes: int) -> None:
        self._preprocessing = preprocessing
        self._max_bytes = max_bytes
        self._bytes = 0
        self._count = 0
        self._fits = least_bytes(preprocessing, num_images) <= max_bytes
        self._stack: torch.Tensor | None = None
        self._list: list[torch.Tensor] = []
        if self._fits and not preprocessing.crops_at_random:
            # One buffer, filled in place: stacking a list would need twice the memory.
            self._stack = torch.empty(num_images, 3, *preprocessing.image_size, dtype=torch.uint8)

    def add(self, pixels: torch.Tensor) -> bool:
        """Adds an image, uint8 (3, h, w). Returns whether all images so far are kept."""
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
