"""Using a finished segmentation run: mean intersection over union on val, and masks of image files."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torchvision.transforms.v2.functional import pil_to_tensor

from vpt_fast.data.decode import DecodeError
from vpt_fast.data.folder import SCENE_FOLDERS, holds_scenes
from vpt_fast.data.scene_batches import SceneBatches
from vpt_fast.data.scenes import check_scenes, decode_scene, ignores_zero, open_scenes
from vpt_fast.files import remove_unfinished, replacing
from vpt_fast.training.inference import LoadedRun, require_same_classes
from vpt_fast.training.plots import class_colors, plot_segmentation
from vpt_fast.training.report import checking_images, evaluating
from vpt_fast.training.segmentation import MULTI_SCALE, WINDOWS, SceneEvaluation, evaluate_scenes, most_likely
from vpt_fast.training.world import World


@dataclass(frozen=True)
class SceneScores:
    """The result of an evaluation on val."""

    classes: tuple[str, ...]
    multi_scale: bool
    evaluation: SceneEvaluation

    def to_dict(self) -> dict[str, Any]:
        found = self.evaluation
        return {
            "split": "val",
            "images": found.num_images,
            "multi_scale": self.multi_scale,
            **found.scores,
            "loss": found.loss,
            "per_class": {
                name: {"iou": None if math.isnan(iou) else iou}
                for name, iou in zip(self.classes, found.iou, strict=True)
            },
        }


def evaluate_scene_run(
    run: LoadedRun,
    data: str | Path,
    *,
    multi_scale: bool = False,
    windows: int = WINDOWS,
    workers: int | None = None,
    console: Console | None = None,
) -> SceneScores:
    """Scores of a run on the validation images of ``data``, in windows of the model's image size.

    ``multi_scale`` averages over six scales from 0.5 to 1.75, each with and without a horizontal flip.
    ``windows`` is the most windows in one pass. ``console`` shows progress.

    Raises ValueError as open_scenes and check_scenes do, if the data have other classes, and for a run that
    classifies images.
    """
    labels, preprocessing = run.labels, run.scene_preprocessing
    console = console or Console(quiet=True)
    scenes = open_scenes(data, ignore_zero=labels.ignore_zero).val
    require_same_classes(data, scenes.classes, labels)
    with checking_images(console, len(scenes)) as advance:
        check_scenes(scenes, workers=workers, progress=advance)
    batches = SceneBatches(scenes, preprocessing, 1, train=False, seed=0, device=run.device, workers=workers)
    with evaluating(console, "val", len(scenes)) as count:
        found = evaluate_scenes(
            run.model,
            batches,
            len(labels.classes),
            World(0, 1, run.device),
            run.precision,
            count,
            scales=MULTI_SCALE if multi_scale else (1.0,),
            flips=multi_scale,
            windows=windows,
        )
    return SceneScores(labels.classes, multi_scale, found)


def predict_scenes(run: LoadedRun, paths: Sequence[Path], out: Path) -> Generator[dict[str, Any], None, None]:
    """Writes ``out``/NAME.png for each image, a palette PNG of its size with labels as in the training masks,
    and ``out``/NAME-overlay.png, an overlay with a legend.

    Yields {"image", "mask", "overlay", "classes": {name: share of the pixels}}, the largest share first, or
    {"image", "error"}.

    Raises ValueError as require_masks_folder does, before anything is written.
    """
    require_masks_folder(paths, out)
    out.mkdir(parents=True, exist_ok=True)
    written = (file for path in paths for file in _files_of(path, out))
    remove_unfinished(*written)  # what a killed process left of them
    labels, preprocessing = run.labels, run.scene_preprocessing
    first = 1 if ignores_zero(len(labels.classes), labels.ignore_zero) else 0
    for path in paths:
        answer: dict[str, Any] = {"image": str(path)}
        try:
            image = decode_scene(path)
        except DecodeError as error:
            yield {**answer, "error": error.reason}
            continue
        found = most_likely(run.model, pil_to_tensor(image).to(run.device), preprocessing)
        classes = found.to("cpu", torch.uint8).numpy()  # (h, w)
        mask, overlay = _files_of(path, out)
        # Both are complete before the first takes its place: one alone is no prediction to be replaced.
        with replacing(mask) as temporary:
            _write_mask(classes, first, len(labels.classes), temporary)
            plot_segmentation([(np.asarray(image), {"found": classes})], labels.classes, overlay)
        shares = np.bincount(classes.ravel()) / classes.size
        order = [index for index in np.argsort(-shares) if shares[index] > 0]
        answer["mask"], answer["overlay"] = str(mask), str(overlay)
        answer["classes"] = {labels.classes[index]: float(shares[index]) for index in order}
        yield answer


def _files_of(image: Path, out: Path) -> tuple[Path, Path]:
    """Where an image's mask and overlay go."""
    return out / f"{image.stem}.png", out / f"{image.stem}-overlay.png"


def require_masks_folder(images: Sequence[Path], out: Path) -> None:
    """Checks that the masks of ``images`` can be written to ``out`` and mix with nothing else there.

    Raises ValueError if ``out`` holds one of the images or is part of a data set, if two images would be
    written to one file, or if a file would be replaced that no earlier prediction wrote.
    """
    place = out.resolve()
    for image in images:
        if place in (image.parent.resolve(), image.resolve().parent):
            raise ValueError(f"out is {out}, which holds the image {image}; choose a folder for masks alone")
    for folder in (place, *place.parents):
        if folder.name in SCENE_FOLDERS and holds_scenes(folder.parent):
            raise ValueError(
                f"out is {out}, which is part of the data set {folder.parent}; choose another folder"
            )
    written: dict[Path, Path] = {}
    for image in images:
        mask, overlay = _files_of(image, out)
        for path in (mask, overlay):
            if path in written:
                raise ValueError(f"images {written[path]} and {image} would both be written to {path.name}")
            written[path] = image
        there, lacking = (mask, overlay) if mask.exists() else (overlay, mask)
        if there.exists() and not lacking.exists():
            raise ValueError(
                f"out is {out}, where the prediction for {image} would replace {there.name}, which is no "
                f"earlier prediction: {lacking.name} is not beside it; choose another folder, or remove it"
            )


def _write_mask(classes: np.ndarray, first: int, num_classes: int, path: Path) -> None:
    """Writes class indices (h, w) as labels starting at `first`, with a palette of the classes' colours."""
    image = Image.fromarray(classes + np.uint8(first)).convert("P")
    palette = np.zeros((256, 3), np.uint8)
    palette[first : first + num_classes] = class_colors(num_classes)
    image.putpalette(palette.ravel().tolist())
    image.save(path, format="PNG")
