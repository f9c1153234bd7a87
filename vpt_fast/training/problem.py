"""The interface between the training loop and the problem: classification or segmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import nn

from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel


class Source(Protocol):
    """Yields a network's inputs and targets: images or their features with labels, or images with masks."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


class Objective(Protocol):
    """The training loss, and the training accuracy."""

    def loss_sum(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """The sum () of the images' losses. A step's loss is this divided by the number of images, so that
        parts of a batch, and processes, can be added up."""
        ...

    def hits(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """The sum () of the images' accuracies; training accuracy is this divided by the number of images."""
        ...


class Evaluated(Protocol):
    """The result of an evaluation; scores by name, in [0, 1]."""

    @property
    def loss(self) -> float: ...

    @property
    def scores(self) -> Mapping[str, float]: ...

    @property
    def num_images(self) -> int: ...


class Problem(Protocol):
    """The parts of training that are specific to a problem.

    score_names: names of an evaluation's scores; one of them is "accuracy". graph_obstacle: why a training
    step cannot be captured in a CUDA graph, or None.
    """

    score_names: tuple[str, ...]
    graph_obstacle: str | None

    def open(self, recipe: Recipe, cache: TrainingCache, console: Console) -> Any:
        """The images that a recipe names: train, val, test, classes. ``console`` shows how far it is."""
        ...

    def preprocessing(self, recipe: Recipe, model: TunedModel) -> Any:
        """The preprocessing for a resolved recipe."""
        ...

    def check(
        self,
        images: Any,
        preprocessing: Any,
        recipe: Recipe,
        world: World,
        cache: TrainingCache,
        progress: Callable[[int], None],
    ) -> Any:
        """The usable images of one split, and those that are skipped. ``progress`` is called with a number of
        images whenever these are checked."""
        ...

    def batches(self, images: Any, preprocessing: Any, recipe: Recipe, world: World, *, train: bool) -> Any:
        """This process's share of the recipe's training batches, or of the batches to evaluate on."""
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
        """Evaluates over all processes; leaves ``network`` in eval mode. ``progress`` is called after each
        step with its number of images over all processes."""
        ...

    def describe_images(self, recipe: Recipe, batches: Any, *, read_once: bool) -> str:
        """One line about the images, for the user. ``read_once``: no epoch reads them."""
        ...

    def describe_data(self, splits: Any) -> dict[str, Any]:
        """Counts and classes, for run.json."""
        ...
