"""Classification: labels for whole images, trained with cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import filesize
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import CheckedImages, check_images, find_broken, leave_out
from vpt_fast.data.images import ImageList, Splits, take_fraction, take_shots
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.resident import least_bytes, resident_budget
from vpt_fast.data.splits import open_splits
from vpt_fast.training.bars import listing_shards
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.precision import autocast
from vpt_fast.training.problem import Source
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel

FORWARD_BATCH = 64  # images in a forward pass without backward


@dataclass(frozen=True)
class CrossEntropy:
    """Of logits (b, classes) and labels (b,). With class weights too, the mean divides by the image count."""

    label_smoothing: float
    class_weights: torch.Tensor | None  # (classes,)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            logits.float(),
            labels,
            self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def hits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(1) == labels).sum()


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, and counts per class in the order of the classes."""

    loss: float
    correct: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / sum(self.images)

    @property
    def scores(self) -> dict[str, float]:
        return {"accuracy": self.accuracy}

    @property
    def num_images(self) -> int:
        return sum(self.images)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Source,
    num_classes: int,
    world: World,
    precision: str | None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Loss and accuracy over all processes' batches; leaves ``network`` in eval mode.

    ``progress`` is called after each step with its number of images over all processes.
    """
    network.eval()
    loss = torch.zeros(1, device=world.device)
    correct = torch.zeros(num_classes, device=world.device)
    images = torch.zeros(num_classes, device=world.device)
    for inputs, labels in batches.epoch(0):  # (b, 3, H, W) or features; (b,)
        with autocast(precision, world.device):
            logits = network(inputs).float()  # (b, classes)
        loss += cross_entropy(logits, labels, reduction="sum")
        # Not torch.bincount, nor labels[...]: these wait for the GPU.
        is_correct = (logits.argmax(1) == labels).float()
        images.index_add_(0, labels, torch.ones_like(is_correct))
        correct.index_add_(0, labels, is_correct)
        if progress is not None:
            progress(len(labels) * world.size)
    sums = world.sum(torch.cat([loss, correct, images])).tolist()
    counts = [int(count) for count in sums[1:]]
    return Evaluation(
        sums[0] / sum(counts[num_classes:]), tuple(counts[:num_classes]), tuple(counts[num_classes:])
    )


def class_weights(recipe: Recipe, splits: Splits, world: World) -> torch.Tensor | None:
    """The weight of each class in the training loss (classes,), None if all weigh the same.

    Balanced: n / (classes · n_c) for n_c of n training images in class c, so that every class has the same
    total weight in an epoch and, if none is empty, the mean weight of an image is 1. A class without images,
    which a small benchmark task may have, weighs 0: label smoothing multiplies with the weights of all
    classes.
    """
    if recipe.class_weights == "none":
        return None
    labels = torch.as_tensor(splits.train.labels, device=world.device)
    counts = torch.bincount(labels, minlength=len(splits.classes))
    return torch.where(counts > 0, len(labels) / (len(counts) * counts.float()), 0.0)


class Classification:
    """The `problem.Problem` of image classification."""

    score_names: tuple[str, ...] = ("accuracy",)
    graph_obstacle: str | None = None

    def open(self, recipe: Recipe, cache: TrainingCache, console: Console | None = None) -> Splits:
        named: dict[str, Any] = dict(
            task=recipe.task,
            train_on=recipe.train_on,
            with_test=recipe.test,
            val_fraction=recipe.val_fraction,
            data_root=recipe.data_root,
            seed=recipe.seed,
        )

        def list_images() -> Splits:
            with listing_shards(console or Console(quiet=True)) as on_shards:
                return open_splits(recipe.data, **named, on_shards=on_shards)

        splits = cache.get("splits", (recipe.data, *named.values()), list_images)
        if splits.val is not None and not splits.val_is_drawn and recipe.val_fraction != Recipe.val_fraction:
            raise ValueError(
                f"val_fraction is {recipe.val_fraction}, and {recipe.data} has a val split of its own; leave "
                "it out"
            )
        if not recipe.trains_on_part:
            return splits

        def take() -> ImageList:
            if recipe.shots is not None:
                return take_shots(splits.train, recipe.shots, recipe.seed)
            return take_fraction(splits.train, recipe.train_fraction, recipe.seed)

        # Apart from the lists: for another part, a stream would be decoded again to list it.
        key = (recipe.data, *named.values(), recipe.shots, recipe.train_fraction)
        return replace(splits, train=cache.get("parts", key, take))

    def preprocessing(self, recipe: Recipe, model: TunedModel) -> Preprocessing:
        return Preprocessing.for_model(
            model.data_config,
            model.image_size,
            normalization=recipe.normalization,
            augment=recipe.augment,
            resize=recipe.resize,
            interpolation=recipe.interpolation,
        )

    def check(
        self,
        images: ImageList,
        preprocessing: Preprocessing,
        recipe: Recipe,
        world: World,
        cache: TrainingCache,
        progress: Callable[[int], None],
    ) -> CheckedImages:
        """The images that can be decoded, with their decoded pixels if these fit in memory."""

        def check() -> CheckedImages:
            keep_bytes = resident_budget(world.device, recipe.resident)
            named: dict[str, Any] = dict(
                workers=recipe.workers, preprocessing=preprocessing, progress=progress
            )
            may_keep = keep_bytes >= least_bytes(preprocessing, len(images))
            if world.any(may_keep):  # each process needs all pixels
                return check_images(images, keep_bytes=keep_bytes, **named)
            shares = world.share_on_machine(
                lambda rank, size: find_broken(images, rank=rank, size=size, **named)
            )
            return leave_out(images, {i: error for share in shares for i, error in share.items()})

        return cache.get("images", (images, preprocessing, recipe.resident), check)

    def batches(
        self,
        images: CheckedImages,
        preprocessing: Preprocessing,
        recipe: Recipe,
        world: World,
        *,
        train: bool,
    ) -> Batches:
        """This process's share of the recipe's batches, or batches to evaluate on."""
        share = math.ceil(recipe.batch_size / world.size)  # uneven only if one batch holds the whole set
        return Batches(
            images,
            preprocessing,
            share if train else FORWARD_BATCH,
            train=train,
            seed=recipe.seed,
            device=world.device,
            workers=recipe.workers,
            rank=world.rank,
            world_size=world.size,
            resident=recipe.resident,
        )

    def objective(self, recipe: Recipe, splits: Splits, world: World) -> CrossEntropy:
        return CrossEntropy(recipe.label_smoothing, class_weights(recipe, splits, world))

    evaluate = staticmethod(evaluate)

    def describe_images(self, recipe: Recipe, batches: Batches, *, read_once: bool) -> str:
        """The preprocessing of the training images, and where they are kept."""
        made = batches.preprocessing
        height, width = made.image_size
        kept = "read once" if read_once else "decoded in each epoch"
        if batches.is_resident:
            kept = f"{filesize.decimal(batches.resident_bytes)} decoded, kept on {batches.resident_device}"
            if batches.not_pinned is not None:
                kept += f", not pinned as a whole: {batches.not_pinned}"
        return (
            f"{made.resize} to {height}×{width} ({made.interpolation}), augment {made.augment}, "
            f"normalization {recipe.normalization}; {kept}"
        )

    def describe_data(self, splits: Splits) -> dict[str, Any]:
        return {
            "classes": list(splits.classes),
            "train": _counts(splits.train),
            "val": None if splits.val is None else _counts(splits.val),
        }


def _counts(images: ImageList) -> dict[str, Any]:
    per_class = [0] * len(images.classes)
    for label in images.labels:
        per_class[label] += 1
    return {"images": len(images), "per_class": per_class}
