"""From a decoded image to the backbone's input: resize, crop, flip, normalise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from PIL import Image
from timm.data.constants import (
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms.v2 import functional as F

RESIZES = ("squash", "shortest")
AUGMENTS = ("none", "flip", "crop_flip")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Name -> (mean, std) of the three channels, for pixels in [0, 1]. The name "backbone" stands for the
backbone's own values."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it, in training and in evaluation.

    Attributes:
        image_size: (height, width) of the result, in pixels.
        resize: "squash" resizes to exactly `image_size`, ignoring the aspect ratio, as VTAB does; "shortest"
            keeps the aspect ratio: the image is resized to just cover `image_size` / `crop_pct` (rounded
            down, as in timm; for a square, the short side gets that length), then cropped to `image_size`.
        crop_pct: the fraction of the resized short side that the crop keeps; "squash" ignores it.
        interpolation: timm's names; downsampling is always antialiased (Pillow's filters).
        mean, std: of the red, green and blue channels, for pixels in [0, 1].
        augment: in training, "none"; "flip", a horizontal flip with probability 1/2; or "crop_flip", as for
            FGVC: a random crop instead of the centre crop, and flip. "crop_flip" requires resize="shortest".
            Evaluation crops at the centre and never flips.

    Raises:
        ValueError: a field has an invalid value; the message names it.
    """

    image_size: tuple[int, int]
    resize: str = "squash"
    crop_pct: float = DEFAULT_CROP_PCT
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    augment: str = "none"

    def __post_init__(self) -> None:
        # JSON and YAML have lists.
        object.__setattr__(self, "image_size", _numbers("image_size", self.image_size, 2))
        object.__setattr__(self, "mean", _numbers("mean", self.mean, 3))
        object.__setattr__(self, "std", _numbers("std", self.std, 3))
        if any(size != int(size) or size < 1 for size in self.image_size):
            raise ValueError(
                f"image_size: {self.image_size}, wanted (height, width) in whole pixels, 1 or more"
            )
        object.__setattr__(self, "image_size", (int(self.image_size[0]), int(self.image_size[1])))
        _require_one_of("resize", self.resize, RESIZES)
        _require_one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _require_one_of("augment", self.augment, AUGMENTS)
        if (
            isinstance(self.crop_pct, bool)
            or not isinstance(self.crop_pct, int | float)
            or not 0 < self.crop_pct <= 1
        ):
            raise ValueError(f"crop_pct: {self.crop_pct!r}, wanted a number above 0 and at most 1")
        if min(self.std) <= 0:
            raise ValueError(f"std: {self.std}, wanted numbers above 0")
        if self.augment == "crop_flip" and self.resize != "shortest":
            raise ValueError(
                f'augment: "crop_flip" crops, so it goes with resize="shortest", not {self.resize!r}'
            )

    @classmethod
    def for_model(
        cls,
        data_config: Mapping[str, Any],
        image_size: tuple[int, int],
        *,
        normalization: str = "backbone",
        augment: str = "none",
        resize: str | None = None,
        interpolation: str | None = None,
    ) -> Preprocessing:
        """The standard preprocessing for a backbone.

        Args:
            data_config: timm's: `mean`, `std` and `interpolation` are read.
            image_size: (height, width) of the model's input.
            normalization: "backbone" (data_config's mean and std) or a name in `NORMALIZATIONS`.
            augment: "none", "flip" or "crop_flip".
            resize: None means "shortest" with "crop_flip", as for FGVC, else "squash", as for VTAB.
            interpolation: None means data_config's.

        Raises:
            ValueError: an argument has an invalid value.
        """
        _require_one_of("normalization", normalization, ("backbone", *NORMALIZATIONS))
        if normalization == "backbone":
            mean, std = data_config["mean"], data_config["std"]
        else:
            mean, std = NORMALIZATIONS[normalization]
        return cls(
            image_size=image_size,
            resize=resize or ("shortest" if augment == "crop_flip" else "squash"),
            interpolation=interpolation or data_config["interpolation"],
            mean=mean,
            std=std,
            augment=augment,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON and YAML."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or has an invalid value.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(
                f"preprocessing: unknown {', '.join(map(str, unknown))}; wanted {', '.join(fields)}"
            )
        if missing := [name for name in fields if name not in values]:
            raise ValueError(f"preprocessing: missing {', '.join(missing)}")
        return cls(**values)

    def for_evaluation(self) -> Preprocessing:
        """The same without augmentation."""
        return dataclasses.replace(self, augment="none")

    @property
    def crops_at_random(self) -> bool:
        """Whether `resize_image` leaves out the crop, which is drawn anew in each epoch."""
        return self.augment == "crop_flip"

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of `size` (height, width) is resized to, before any crop."""
        if self.resize == "squash":
            return self.image_size
        (height, width) = size
        cover_height, cover_width = (math.floor(side / self.crop_pct) for side in self.image_size)
        # As torchvision's Resize(int) of the side that limits the size, including its rounding.
        if height * cover_width <= width * cover_height:
            return cover_height, int(cover_height * width / height)
        return int(cover_width * height / width), cover_width

    def resize_image(self, image: Image.Image) -> torch.Tensor:
        """What is the same in every epoch: resize, and the centre crop unless `crops_at_random`.

        Args:
            image: RGB.

        Returns:
            uint8 (3, H, W) with (H, W) = `image_size`; if `crops_at_random`, at least that.

        Raises:
            ValueError: the image is so long and thin that, resized with its aspect ratio kept, it would have
                more pixels than Pillow decodes.
        """
        size = self.resized_size((image.height, image.width))
        if size != self.image_size and Image.MAX_IMAGE_PIXELS and math.prod(size) > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{image.width}×{image.height} is too thin to keep its shape: it would be resized to "
                f"{size[1]}×{size[0]} pixels"
            )
        resized = F.resize(
            image, list(size), interpolation=str_to_interp_mode(self.interpolation), antialias=True
        )
        pixels = F.pil_to_tensor(resized)
        return pixels if self.crops_at_random else self.crop(pixels)

    def crop(self, pixels: torch.Tensor, position: tuple[float, float] | None = None) -> torch.Tensor:
        """Cuts `image_size` out of (3, h, w), which is at least as large.

        Args:
            position: (vertical, horizontal), each in [0, 1); uniform values make all offsets equally likely.
                None: the centre.
        """
        height, width = self.image_size
        spare = pixels.shape[-2] - height, pixels.shape[-1] - width
        if position is None:
            top, left = (int(round(room / 2.0)) for room in spare)
        else:
            top, left = (int(where * (room + 1)) for where, room in zip(position, spare, strict=True))
        return pixels[..., top : top + height, left : left + width]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std."""
        mean = _per_channel(self.mean, pixels.device)
        std = _per_channel(self.std, pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """One RGB image as evaluation sees it: float32 (3, H, W)."""
        return self.normalize(self.for_evaluation().resize_image(image))


@functools.lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Cached: a copy to the GPU for every batch would make the host wait for the GPU.
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _require_one_of(name: str, value: object, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: {value!r}, wanted one of {', '.join(wanted)}")


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )
    if not numbers or len(value) != count:
        raise ValueError(f"{name}: {value!r}, wanted {count} numbers")
    return tuple(float(x) for x in value)
