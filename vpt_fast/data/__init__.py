"""Images from wherever they are kept to normalised batches on a device."""

from __future__ import annotations

from .batches import Batches
from .decode import CheckedImages, DecodeError, SkippedImage, check_images, decode_image
from .digits import export_digits
from .images import DataError, ImageItem, ImageList, Splits, StoredImage
from .preprocessing import Preprocessing
from .resident import ResidentImages, device_budget, resident_budget
from .splits import open_splits
from .tasks import TASKS, Task, find_task

__all__ = [
    "TASKS",
    "Batches",
    "CheckedImages",
    "DataError",
    "DecodeError",
    "ImageItem",
    "ImageList",
    "Preprocessing",
    "ResidentImages",
    "SkippedImage",
    "Splits",
    "StoredImage",
    "Task",
    "check_images",
    "decode_image",
    "device_budget",
    "export_digits",
    "find_task",
    "open_splits",
    "resident_budget",
]
