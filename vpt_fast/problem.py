"""What the training loop has to be told of the problem that is solved: classification, or segmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vpt_fast.cache import TrainingCache
from vpt_fast.classifier import TunedModel
from vpt_fast.recipe import Recipe
from vpt_fast.world import World


class Source(Protocol):
    """Where a network's inputs and targets come from: images and labels, features of them, or masks."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


class Objective(Protocol):
    """What a step minimises, and what it counts."""

    def loss_sum(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Summed over the images (): a step's loss is this over their number, so that parts of a batch, and
        processes, may be added up."""
        ...

    def hits(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """What is right of the images, summed (): training accuracy is this over their number."""
        ...


class Evaluated(Protocol):
    """What an evaluation found; the scores by their names, in [0, 1]."""

    @property
    def loss(self) -> float: ...

    @property
    def scores(self) -> Mapping[str, float]: ...

    @property
    def num_images(self) -> int: ...


class Problem(Protocol):
    """The parts of training that depend on it.

    score_names: of an evaluation's scores; one of them is "accuracy". graph_obstacle: why a training step
    cannot be a CUDA graph, or None.
    """

    score_names: tuple[str, ...]
    graph_obstacle: str | None

    def open(self, recipe: Recipe, cache: TrainingCache) -> Any:
        """The images that a recipe names: train, val, test, classes."""
        ...

    def preprocessing(self, recipe: Recipe, model: TunedModel) -> Any:
        """What is done to the images of a resolved recipe."""
        ...

    def check(
        self,
        images: Any,
        preprocessing: Any,
        recipe: Recipe,
        world: World,
        cache: TrainingCache,
        progress: Callable[[int, int], None],
    ) -> Any:
        """The images of one split that can be used, and those that are skipped."""
        ...

    def batches(self, images: Any, preprocessing: Any, recipe: Recipe, world: World, *, train: bool) -> Any:
        """This process's share of the recipe's batches, or what to evaluate on."""
        ...

    def objective(self, recipe: Recipe, splits: Any, world: World) -> Objective: ...

    def evaluate(
        self,
        network: nn.Module,
        batches: Any,
        num_classes: int,
        world: World,
        precision: str | None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluated:
        """Over all processes; leaves ``network`` in eval mode. ``progress`` is called with the number of
        images, of all processes, after each step."""
        ...

    def describe_images(self, recipe: Recipe, batches: Any) -> str:
        """One line for the person who started training."""
        ...

    def describe_data(self, root: Path, splits: Any) -> dict[str, Any]:
        """Counts, classes and a digest, for run.json."""
        ...
