"""From a decoded image and its mask to a segmenter's input; in training, ADE20k's usual augmentation."""

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
"""Range of the random scale in training, relative to the size that just covers a crop."""
MOST_OF_ONE_CLASS = 0.75
"""A crop is redrawn if one class covers more than this share of its labelled pixels, or none is labelled."""
TRIES = 10
"""The most crops drawn for an image."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
"""Those that torchvision implements for tensors."""
NEAREST = v2.InterpolationMode.NEAREST_EXACT
"""The pixel below the centre of the new one, as in Pillow. torchvision's NEAREST takes the one below its
upper left corner, which shifts a mask by almost half a pixel against its image."""


@dataclass(frozen=True)
class ScenePreprocessing:
    """What is done to an image and its mask before a segmenter sees them.

    Training: resized with its aspect ratio kept to a random 0.5 to 2 times the size that just covers
    `image_size`; a random crop of `image_size`, with smaller images padded by the mean colour and label
    `IGNORED`, and redrawn if one class covers more than 75 % of the labelled pixels; a horizontal flip with
    probability 1/2; photometric distortion (torchvision's defaults, those of SSD). Evaluation: resized to
    just cover `image_size`.

    Attributes:
        image_size: (height, width) of a crop, in pixels.
        interpolation: one of `INTERPOLATIONS`, for images; masks use nearest-neighbour interpolation.
        mean, std: of the red, green and blue channels, for pixels in [0, 1].

    Raises:
        ValueError: a field has an invalid value, or one that `Preprocessing` refuses.
    """

    image_size: tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = Preprocessing.mean
    std: tuple[float, ...] = Preprocessing.std

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON has lists
            object.__setattr__(self, field.name, getattr(self._images, field.name))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: {self.interpolation!r}, wanted one of {', '.join(INTERPOLATIONS)} for scenes"
            )

    @property
    def _images(self) -> Preprocessing:
        """The same fields as a `Preprocessing`, which checks them and does what both have in common."""
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
        """The same: only `augment` is specific to training."""
        return self

    def covering_size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """(height, width) that an image of `size` (height, width) is resized to: `scale` times the size that
        just covers `image_size`, with the aspect ratio kept."""
        factor = scale * max(crop / side for crop, side in zip(self.image_size, size, strict=True))
        height, width = (max(round(side * factor), 1) for side in size)
        return height, width

    def resize(self, pixels: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Resizes an image (3, h, w) uint8 to (3, H, W) uint8, `scale` times just covering `image_size`."""
        size = self.covering_size((pixels.shape[-2], pixels.shape[-1]), scale)
        mode = NEAREST if self.interpolation == "nearest" else str_to_interp_mode(self.interpolation)
        return v2.functional.resize(pixels, list(size), interpolation=mode, antialias=True)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std."""
        return self._images.normalize(pixels)

    def augment(self, image: Image.Image, mask: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image and its mask (h, w) uint8, augmented: (3, H, W) and (H, W), both uint8, with (H, W) =
        `image_size`. The random choices depend on `seed` alone; torch's global generators are unchanged."""
        pixels = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        labels = tv_tensors.Mask(torch.from_numpy(mask))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: without workers, that would seed the GPU's dropout too with each image.
            torch.default_generator.manual_seed(seed)
            low, high = SCALES
            scale = low + (high - low) * torch.rand(()).item()
            pixels = tv_tensors.wrap(self.resize(pixels, scale), like=pixels)
            labels = tv_tensors.wrap(_resize_mask(labels, list(pixels.shape[-2:])), like=labels)
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


def _resize_mask(labels: torch.Tensor, size: list[int]) -> torch.Tensor:
    """(h, w) to (H, W) of `size`; torchvision's own for a Mask knows no other mode than its NEAREST."""
    plain = labels.as_subclass(torch.Tensor)
    return v2.functional.resize(plain[None], size, interpolation=NEAREST)[0]


def _is_varied(labels: torch.Tensor) -> bool:
    counts = torch.bincount(labels.flatten().long())[:IGNORED]
    return int(counts.max()) <= MOST_OF_ONE_CLASS * int(counts.sum()) and int(counts.sum()) > 0


def image_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of an image's augmentation in an epoch."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))
