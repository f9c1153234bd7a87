"""Frozen features in place of images: where training reads the same ones in every epoch, they are computed
once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from vpt_fast.classifier import TunedClassifier
from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import CheckedImages
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.resident import device_budget
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import FORWARD_BATCH
from vpt_fast.training.precision import autocast
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.report import computing_features
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel


def caches_features(
    recipe: Recipe,
    model: TunedModel,
    lists: Sequence[ImageList],
    preprocessing: Preprocessing,
    world: World,
    cache: TrainingCache,
) -> bool:
    """Whether the trained part's inputs are the same in every epoch, and those of the images in `lists` are
    in the cache or small enough to keep."""
    if not isinstance(model, TunedClassifier) or model.feature_shape is None or recipe.augment != "none":
        return False
    # Those in the cache take no more memory. If they counted, a sweep's later runs might train without them.
    new = [
        images
        for images in lists
        if not cache.holds("features", features_key(model, images, preprocessing, recipe, world))
    ]
    return feature_bytes(model, sum(map(len, new))) <= device_budget(world.device)


def features_key(
    model: TunedClassifier,
    images: ImageList,
    preprocessing: Preprocessing,
    recipe: Recipe,
    world: World,
) -> Hashable:
    """All that the features of `images` depend on."""
    frozen = json.dumps(model.features_config, sort_keys=True)
    return frozen, images, preprocessing, recipe.precision, world.device


def feature_bytes(model: TunedClassifier, num_images: int) -> int:
    """Bytes of the frozen features of `num_images` images, in float32; under autocast some are narrower."""
    return 4 * math.prod(model.feature_shape) * num_images


def feature_batches(
    model: TunedClassifier,
    train: tuple[CheckedImages, Batches],
    val: tuple[CheckedImages, Batches] | None,
    preprocessing: Preprocessing,
    recipe: Recipe,
    world: World,
    console: Console,
    cache: TrainingCache,
    on_features: Callable[[int, int], None] | None,
) -> tuple[FeatureBatches, FeatureBatches | None, float]:
    """The batches of train and val, each given with its images, with frozen features in their place; and the
    seconds that train's took. Of the given batches only the order is used. Each process computes the features
    of all images; `on_features` is called with the number of images that are done and of all."""
    num_images = sum(batches.num_images for _, batches in filter(None, (train, val)))
    num_bytes = feature_bytes(model, num_images)

    with computing_features(console, num_images, num_bytes, world.device, on_features) as advance:

        def with_features(images: CheckedImages, batches: Batches) -> FeatureBatches:
            features, labels = cache.get(
                "features",
                features_key(model, images.images, preprocessing, recipe, world),
                lambda: compute_features(model, images, preprocessing, recipe, world, advance),
            )
            return FeatureBatches(batches, features, labels)

        val_batches = None if val is None else with_features(*val)
        started = time.perf_counter()
        train_batches = with_features(*train)
        return train_batches, val_batches, time.perf_counter() - started


@dataclass(frozen=True)
class FeatureBatches:
    """`batches`, with frozen features (n, d), (n, N, d) or (n, C, H, W) of all images in place of the images,
    and labels (n,)."""

    batches: Batches
    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.batches.indices(epoch).to(self.features.device)
        for chunk in order.split(self.batches.batch_size):
            yield self.features[chunk], self.labels[chunk]


def compute_features(
    model: TunedClassifier,
    images: CheckedImages,
    preprocessing: Preprocessing,
    recipe: Recipe,
    world: World,
    advance: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen features of all images in order, and labels (n,); shapes as in `FeatureBatches`."""
    in_order = Batches(
        images,
        preprocessing,
        FORWARD_BATCH,
        train=False,
        seed=recipe.seed,
        device=world.device,
        workers=recipe.workers,
        # They are read once: not worth a place on the device, nor in host memory if they have none yet.
        resident="off" if images.resident is None else "host",
    )
    features, labels, done = torch.empty(0), [], 0
    with autocast(recipe.precision, world.device):
        for x, y in in_order.epoch(0):  # x (b, 3, H, W), y (b,)
            found = model.frozen_features(x)
            if done == 0:  # filled as they come: to join all of them at the end would take twice their memory
                features = found.new_empty(in_order.num_images, *found.shape[1:])
            features[done : done + len(y)] = found
            labels.append(y)
            done += len(y)
            advance(len(y))
    return features, torch.cat(labels)
