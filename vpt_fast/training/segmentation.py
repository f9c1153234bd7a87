"""Segmentation: pixels' classes, trained with cross-entropy; mean IoU evaluated with sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from vpt_fast.data.scene_batches import SceneBatches
from vpt_fast.data.scene_preprocessing import ScenePreprocessing
from vpt_fast.data.scenes import IGNORED, CheckedScenes, SceneList, SceneSplits, check_scenes, open_scenes
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.precision import autocast
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel

WINDOW_STRIDE = 2 / 3
"""Fraction of a window's side, rounded down to pixels: 341 of 512."""
WINDOWS = 16
"""Default for the most windows in one pass."""
PIXELS_AT_ONCE = 2**15
"""Pixels of a photograph that `segment` scores at a time. The scores of 150 classes, 19 MiB in float32, are
then few enough for malloc to give their pages to the next, which halves the time on a CPU."""
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales relative to the size that just covers a window; each is evaluated with and without a flip."""


@dataclass(frozen=True)
class PixelCrossEntropy:
    """Of the head's logits (b, classes, H, W), plus `aux_weight` times that of each auxiliary head's, with
    masks (b, H, W). An image's loss is the sum over its labelled pixels, divided by the number of all its
    pixels."""

    label_smoothing: float
    aux_weight: float

    def loss_sum(self, outputs: tuple[torch.Tensor, ...], masks: torch.Tensor) -> torch.Tensor:
        losses = [
            F.cross_entropy(
                logits.float(),
                masks,
                ignore_index=IGNORED,
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
            for logits in outputs
        ]
        return (losses[0] + self.aux_weight * sum(losses[1:])) / math.prod(masks.shape[1:])

    def hits(self, outputs: tuple[torch.Tensor, ...], masks: torch.Tensor) -> torch.Tensor:
        """Each image's accuracy on its labelled pixels, summed over the images."""
        right = (outputs[0].argmax(1) == masks).flatten(1).sum(1)
        return (right / (masks != IGNORED).flatten(1).sum(1).clamp(min=1)).sum()


@torch.no_grad()
def segment(
    model: nn.Module,
    image: torch.Tensor,
    preprocessing: ScenePreprocessing,
    *,
    scales: Sequence[float] = (1.0,),
    flips: bool = False,
    precision: str | None = "fp32",
    windows: int = WINDOWS,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Probabilities of the classes for an image (3, H, W) uint8, on its device, a band of its rows at a time:
    yields the rows, from the top on, and (C, rows, W).

    For each scale, the image is resized to that many times the size that just covers a window of the model's
    image size. Windows slide over it with a stride of two thirds of their side, and overlapping logits are
    averaged. Resized to (H, W), they give probabilities, which are averaged over the scales and, with
    `flips`, over the image and its horizontal flip. Images smaller than a window are padded with the mean
    colour.

    A band has `PIXELS_AT_ONCE` pixels, rounded to rows, or is the whole of an image that has no more pixels
    than all resized ones together. So beyond the windows' logits, whose number depends on an image's shape
    and not on its size, no more than a few times as many numbers are in memory.

    Args:
        model: a PromptedSegmenter in eval mode.
        preprocessing: the one that it was trained with.
        windows: the most windows in one pass.
    """
    height, width = image.shape[-2:]
    mirrorings = (False, True) if flips else (False,)
    num_views = len(scales) * len(mirrorings)
    resized = [preprocessing.covering_size((height, width), scale) for scale in scales]
    is_small = height * width <= len(mirrorings) * sum(map(math.prod, resized))
    at_once = height if is_small else max(PIXELS_AT_ONCE // width, 1)

    def slide() -> Iterator[tuple[torch.Tensor, bool]]:
        for scale in scales:
            pixels = preprocessing.normalize(preprocessing.resize(image, scale))  # (3, h, w)
            for mirrored in mirrorings:
                view = pixels.flip(-1) if mirrored else pixels
                yield _slide(model, view, preprocessing.image_size, precision, windows), mirrored

    # All of them are held only if there is more than one band to read them.
    views = slide() if at_once >= height else list(slide())
    for top in range(0, height, at_once):
        rows = slice(top, min(top + at_once, height))
        total = None
        for logits, mirrored in views:
            found = _resized_rows(logits, (height, width), rows)
            found = (found.flip(-1) if mirrored else found).softmax(0)
            total = found if total is None else total.add_(found)
        assert total is not None, "there is a scale"
        yield rows, total.div_(num_views)


def most_likely(model: nn.Module, image: torch.Tensor, preprocessing: ScenePreprocessing) -> torch.Tensor:
    """The most probable class of every pixel (H, W), int64, as by `segment` at one scale.

    Args: as of `segment`.
    """
    classes = torch.empty(image.shape[-2:], dtype=torch.int64, device=image.device)
    for rows, found in segment(model, image, preprocessing):
        classes[rows] = found.argmax(0)
    return classes


def _resized_rows(logits: torch.Tensor, size: tuple[int, int], rows: slice) -> torch.Tensor:
    """(C, h, w) to (C, rows, W): these rows of ``F.interpolate(logits[None], size, mode="bilinear")[0]``."""
    if rows == slice(0, size[0]):
        return F.interpolate(logits[None], size, mode="bilinear")[0]
    height, width = logits.shape[-2], size[1]
    # Rounded to float32 once, as by the fused multiply-add of F.interpolate: with exact places, whose shares
    # differ by up to 1e-4, some pixels would get other classes.
    scale = torch.tensor(height / size[0], dtype=torch.float32).double()
    places = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * scale - 0.5
    places = places.float().clamp(min=0)
    above = places.long()
    below = (above + 1).clamp(max=height - 1)
    share = (places - above)[:, None].to(logits.device)
    first, last = int(above[0]), int(below[-1])
    read = logits[None, :, first : last + 1]
    wide = F.interpolate(read, (read.shape[-2], width), mode="bilinear")[0]
    found = wide[:, below - first].mul_(share)
    return found.addcmul_(wide[:, above - first], 1 - share)


def _slide(
    model: nn.Module, pixels: torch.Tensor, window: tuple[int, int], precision: str | None, most: int
) -> torch.Tensor:
    """Normalised pixels (3, h, w) to logits (C, h, w), averaged over the windows that contain a pixel."""
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, max(window[1] - width, 0), 0, max(window[0] - height, 0)))
    places = [
        (slice(top, top + window[0]), slice(left, left + window[1]))
        for top in window_starts(pixels.shape[-2], window[0])
        for left in window_starts(pixels.shape[-1], window[1])
    ]
    total = counts = None
    for start in range(0, len(places), most):
        part = places[start : start + most]
        with autocast(precision, pixels.device):
            logits = model(torch.stack([pixels[:, rows, columns] for rows, columns in part])).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], *pixels.shape[1:])
            counts = logits.new_zeros(pixels.shape[1:])
        for found, (rows, columns) in zip(logits, part, strict=True):
            total[:, rows, columns] += found
            counts[rows, columns] += 1
    return (total / counts)[:, :height, :width]


def window_starts(length: int, window: int) -> list[int]:
    """Offsets of the windows along a side: a stride apart, the last one flush with the end."""
    stride = int(window * WINDOW_STRIDE)
    return [*range(0, length - window, stride), length - window]


@dataclass(frozen=True)
class SceneEvaluation:
    """loss: mean cross-entropy over the labelled pixels. accuracy: share of them that are right. iou:
    intersection over union of each class in the order of the classes, NaN for a class that occurs neither in
    a mask nor in a prediction."""

    loss: float
    accuracy: float
    iou: tuple[float, ...]
    num_images: int

    @property
    def miou(self) -> float:
        """Mean over the classes that occur."""
        present = [value for value in self.iou if not math.isnan(value)]
        return sum(present) / len(present)

    @property
    def scores(self) -> dict[str, float]:
        return {"miou": self.miou, "accuracy": self.accuracy}


def evaluate_scenes(
    network: nn.Module,
    batches: SceneBatches,
    num_classes: int,
    world: World,
    precision: str | None,
    progress: Callable[[int], None] | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flips: bool = False,
    windows: int = WINDOWS,
) -> SceneEvaluation:
    """Loss, pixel accuracy and intersection over union over all processes' images, at their original sizes;
    leaves ``network`` in eval mode. The confusion matrix is accumulated image by image."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex  # takes seconds

    settings: dict[str, Any] = dict(num_classes=num_classes, ignore_index=IGNORED, validate_args=False)
    iou = MulticlassJaccardIndex(average="none", zero_division=math.nan, **settings).to(world.device)
    accuracy = MulticlassAccuracy(average="micro", **settings).to(world.device)
    network.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, pixels, images
    for image, mask in batches.epoch(0):  # (3, h, w) uint8, (h, w)
        for rows, found in segment(
            network,
            image,
            batches.preprocessing,
            scales=scales,
            flips=flips,
            precision=precision,
            windows=windows,
        ):  # (C, rows, w)
            wanted = mask[rows]
            loss = F.nll_loss(
                found.clamp(min=torch.finfo(found.dtype).tiny).log()[None],
                wanted[None],
                ignore_index=IGNORED,
                reduction="sum",
            )
            classes = found.argmax(0)
            iou.update(classes[None], wanted[None])
            accuracy.update(classes[None], wanted[None])
            sums[:2] += torch.stack([loss.double(), (wanted != IGNORED).sum().double()])
        sums[2] += 1
        if progress is not None:
            progress(world.size)
    loss_sum, pixels, images = world.sum(sums).tolist()
    return SceneEvaluation(
        loss_sum / pixels, accuracy.compute().item(), tuple(iou.compute().tolist()), int(images)
    )


class Segmentation:
    """The `problem.Problem` of semantic segmentation."""

    score_names: tuple[str, ...] = ("miou", "accuracy")
    graph_obstacle: str | None = "a segmenter has several outputs"

    def open(self, recipe: Recipe, cache: TrainingCache, console: Console) -> SceneSplits:
        return open_scenes(recipe.data, ignore_zero=recipe.ignore_zero)

    def preprocessing(self, recipe: Recipe, model: TunedModel) -> ScenePreprocessing:
        return ScenePreprocessing.for_model(
            model.data_config,
            model.image_size,
            normalization=recipe.normalization,
            interpolation=recipe.interpolation,
        )

    def check(
        self,
        scenes: SceneList,
        preprocessing: ScenePreprocessing,
        recipe: Recipe,
        world: World,
        cache: TrainingCache,
        progress: Callable[[int], None],
    ) -> CheckedScenes:
        return check_scenes(scenes, workers=recipe.workers, progress=progress)

    def batches(
        self,
        scenes: CheckedScenes,
        preprocessing: ScenePreprocessing,
        recipe: Recipe,
        world: World,
        *,
        train: bool,
    ) -> SceneBatches:
        return SceneBatches(
            scenes.images,
            preprocessing,
            math.ceil(recipe.batch_size / world.size),  # uneven only if one batch holds the whole set
            train=train,
            seed=recipe.seed,
            device=world.device,
            workers=recipe.workers,
            rank=world.rank,
            world_size=world.size,
        )

    def objective(self, recipe: Recipe, splits: SceneSplits, world: World) -> PixelCrossEntropy:
        return PixelCrossEntropy(recipe.label_smoothing, recipe.aux_weight)

    evaluate = staticmethod(evaluate_scenes)

    def describe_images(self, recipe: Recipe, batches: SceneBatches, *, read_once: bool) -> str:
        made = batches.preprocessing
        height, width = made.image_size
        return (
            f"random crops of {height}×{width} ({made.interpolation}), mirrored and distorted, "
            f"normalization {recipe.normalization}; decoded in each epoch"
        )

    def describe_data(self, splits: SceneSplits) -> dict[str, Any]:
        return {
            "classes": list(splits.classes),
            "ignores_zero": splits.train.ignores_zero,
            "train": {"images": len(splits.train)},
            "val": {"images": len(splits.val)},
        }
