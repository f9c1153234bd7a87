"""From a decoded image and its mask to what a segmenter takes: in training ADE20k's usual augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torchvision import tv_tensors
from torchvision.transforms import v2

from .preprocessing import Preprocessing
from .scenes import IGNORED

SCALES = (0.5, 2.0)
"""In training an image is resized to this range of times what covers a crop."""
MOST_OF_ONE_CLASS = 0.75
"""A crop of which one class covers more than this is drawn again,"""
TRIES = 10
"""so many times at most."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
"""Those that torchvision has for tensors."""


@dataclass(frozen=True)
class ScenePreprocessing:
    """What is done to an image and its mask before a segmenter sees them.

    Training: resized with its shape kept to a random 0.5 to 2 times the size that just covers `image_size`;
    a random crop of `image_size`, padded where the image is smaller with the mean colour and no class, and
    drawn again where one class covers more than 75 %; mirrored left to right for half of the images;
    photometric distortion (torchvision's defaults, those of SSD). Evaluation: resized to just cover
    `image_size`.

    Attributes:
        image_size: (height, width) of a crop, in pixels.
        interpolation: one of `INTERPOLATIONS`, for images; masks are resized by the nearest pixel.
        mean, std: of the channels red, green, blue, for pixels in [0, 1].

    Raises:
        ValueError: a field has another value than these, or one that `Preprocessing` would not take.
    """

    image_size: tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON gives lists
            object.__setattr__(self, field.name, getattr(self._images, field.name))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: {self.interpolation!r}, wanted one of {', '.join(INTERPOLATIONS)} for scenes"
            )

    @property
    def _images(self) -> Preprocessing:
        """The same fields, where they are checked, and what they have in common."""
        return Preprocessing(self.image_size, interpolation=self.interpolation, mean=self.mean, std=self.std)

    @classmethod
    def for_model(
        cls,
        data_config: Mapping[str, Any],
        image_size: tuple[int, int],
        *,
        normalization: str = "backbone",
        interpolation: str | None = None,
    ) -> ScenePreprocessing:
        """As `Preprocessing.for_model`."""
        made = Preprocessing.for_model(
            data_config, image_size, normalization=normalization, interpolation=interpolation
        )
        return cls(made.image_size, made.interpolation, made.mean, made.std)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON and YAML."""
        return {field.name: self._images.to_dict()[field.name] for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScenePreprocessing:
        """The inverse of `to_dict`; raises TypeError or ValueError for other fields or values."""
        return cls(**values)

    def for_evaluation(self) -> ScenePreprocessing:
        """The same: only `augment` is training's."""
        return self

    def covering_size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """(height, width) that an image of `size` (height, width) is resized to: `scale` times what just
        covers `image_size`, its shape kept."""
        factor = scale * max(crop / side for crop, side in zip(self.image_size, size, strict=True))
        height, width = (max(round(side * factor), 1) for side in size)
        return height, width

    def resize(self, pixels: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """An image (3, h, w) uint8 as evaluation sees it, to (3, H, W) uint8."""
        size = self.covering_size((pixels.shape[-2], pixels.shape[-1]), scale)
        return v2.functional.resize(
            pixels, list(size), interpolation=str_to_interp_mode(self.interpolation), antialias=True
        )

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std."""
        return self._images.normalize(pixels)

    def augment(self, image: Image.Image, mask: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image and its mask (h, w) uint8 as training sees them: (3, H, W) and (H, W), both uint8, with
        (H, W) = `image_size`. What is drawn depends on `seed` alone; torch's own generator is left alone."""
        pixels = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        labels = tv_tensors.Mask(torch.from_numpy(mask))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            low, high = SCALES
            scale = low + (high - low) * torch.rand(()).item()
            pixels = tv_tensors.wrap(self.resize(pixels, scale), like=pixels)
            labels = v2.functional.resize(labels, list(pixels.shape[-2:]))
            pixels, labels = self._crop(pixels, labels)
            pixels, labels = v2.RandomHorizontalFlip()(pixels, labels)
            pixels = v2.RandomPhotometricDistort()(pixels)
        return pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)

    def _crop(self, pixels: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Any, Any]:
        fill = {tv_tensors.Image: [round(255 * mean) for mean in self.mean], tv_tensors.Mask: IGNORED}
        crop = v2.RandomCrop(self.image_size, pad_if_needed=True, fill=fill)
        for _ in range(TRIES):
            cropped = crop(pixels, labels)
            if _is_varied(cropped[1]):
                break
        return cropped


def _is_varied(labels: torch.Tensor) -> bool:
    counts = torch.bincount(labels.flatten().long(), minlength=IGNORED + 1)[:IGNORED]
    return int(counts.max()) <= MOST_OF_ONE_CLASS * int(counts.sum()) and int(counts.sum()) > 0


def image_seed(seed: int, epoch: int, index: int) -> int:
    """What an image's augmentation in an epoch is drawn from."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))
