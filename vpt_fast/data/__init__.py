"""Images from folders of class folders to normalised batches on a device."""

from __future__ import annotations

from .batches import Batches
from .decode import CheckedImages, DecodeError, SkippedImage, check_images, decode_image
from .digits import export_digits
from .folder import DataError, ImageList, Splits, open_splits
from .preprocessing import Preprocessing
from .resident import ResidentImages, resident_budget

__all__ = [
    "Batches",
    "CheckedImages",
    "DataError",
    "DecodeError",
    "ImageList",
    "Preprocessing",
    "ResidentImages",
    "SkippedImage",
    "Splits",
    "check_images",
    "decode_image",
    "export_digits",
    "open_splits",
    "resident_budget",
]
