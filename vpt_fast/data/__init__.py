"""From stored images (folders, shards, data sets) to normalised batches on a device."""

from __future__ import annotations

from .batches import Batches
from .decode import CheckedImages, DecodeError, SkippedImage, check_images, decode_image, load_image
from .digits import export_digits
from .images import DataError, ImageItem, ImageList, Splits, StoredImage
from .preprocessing import Preprocessing
from .resident import ResidentImages, device_budget, resident_budget
from .scene_batches import SceneBatches
from .scene_preprocessing import ScenePreprocessing
from .scenes import IGNORED, CheckedScenes, SceneList, SceneSplits, check_scenes, ignores_zero, open_scenes
from .splits import open_splits
from .tasks import TASKS, Task, find_task

__all__ = [
    "IGNORED",
    "TASKS",
    "Batches",
    "CheckedImages",
    "CheckedScenes",
    "DataError",
    "DecodeError",
    "ImageItem",
    "ImageList",
    "Preprocessing",
    "ResidentImages",
    "SceneBatches",
    "SceneList",
    "ScenePreprocessing",
    "SceneSplits",
    "SkippedImage",
    "Splits",
    "StoredImage",
    "Task",
    "check_images",
    "check_scenes",
    "decode_image",
    "device_budget",
    "export_digits",
    "find_task",
    "ignores_zero",
    "load_image",
    "open_scenes",
    "open_splits",
    "resident_budget",
]
