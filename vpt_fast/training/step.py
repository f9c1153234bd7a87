"""One optimizer step, eager or in a CUDA graph, and the optimizer that takes it."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vpt_fast.backbones.layers import on_meta
from vpt_fast.graphed import (
    CaptureError,
    GradientAverage,
    GraphedStep,
    backward_on_this_thread,
    trained_parameters,
)
from vpt_fast.training.precision import AUTOCAST, autocast
from vpt_fast.training.problem import Objective
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel


def graph_obstacle(recipe: Recipe, device: torch.device, own: str | None) -> str | None:
    """Why training steps cannot be captured in a CUDA graph; None if they can. `own` is the problem's reason.

    Raises ValueError if a graph was requested and is not possible.
    """
    obstacle = own
    if device.type != "cuda":
        obstacle = f"the device is {device.type}"
    elif recipe.accumulate > 1:
        obstacle = f"accumulate is {recipe.accumulate}"
    elif recipe.precision == "fp16":
        obstacle = "precision is fp16, whose loss scaling looks at the gradients"
    if recipe.cuda_graph and obstacle:
        raise ValueError(f"cuda_graph: got True, and a step cannot be captured: {obstacle}")
    return obstacle


def captures_steps(recipe: Recipe, world: World, console: Console, own: str | None) -> bool:
    """Whether training steps are captured in a CUDA graph; prints the reason if a GPU's are not. Raises as
    `graph_obstacle` does."""
    obstacle = graph_obstacle(recipe, world.device, own)
    if obstacle is None and world.size > 1 and recipe.method == "full" and not recipe.cuda_graph:
        obstacle = "without one, processes exchange the backbone's gradients while backward runs"
    if obstacle and world.device.type == "cuda" and recipe.cuda_graph is None:
        console.print(f"Training steps are not captured in a CUDA graph: {obstacle}.")
    return obstacle is None and recipe.cuda_graph is not False


def build_optimizer(recipe: Recipe, model: TunedModel, *, capturable: bool) -> torch.optim.Optimizer:
    """The optimizer of a resolved recipe, with named parameters; a head's last bias has no weight decay.

    `capturable`: whether its steps may be captured in a CUDA graph.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [pair for pair in trained if pair[0] not in model.undecayed],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [pair for pair in trained if pair[0] in model.undecayed], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, capturable=capturable, fused=capturable or None)
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=capturable or None)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimizer with named parameters, as "slot/parameter name" to tensor."""
    names = _parameter_names(optimizer)
    state = optimizer.state_dict()["state"]  # index: {slot: tensor}
    return {
        f"{slot}/{names[index]}": value for index, slots in state.items() for slot, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    names = _parameter_names(optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        state.setdefault(names.index(name), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """By the indices that the optimizer's state has."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def moving_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorms of a model in train mode that normalise by the batch and update their statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


def require_batches(recipe: Recipe, model: TunedModel, num_images: int, world: World) -> None:
    """Raises ValueError if BatchNorm cannot normalise a part of a batch, which takes more than one value per
    channel: an image alone has one where a feature map is a single pixel."""
    share, own = (math.ceil(count / world.size) for count in (recipe.batch_size, num_images))
    sizes = {recipe.step_images(num_images, world.size), own % share}
    steps = [torch.empty(images, device="meta") for images in sizes]
    is_alone = any(len(part) == 1 for step in steps for part in step.chunk(recipe.accumulate))
    if not is_alone or not moving_norms(model.train()):
        return
    try:
        on_meta(model)(torch.empty(1, model.backbone.in_chans, *model.image_size, device="meta"))
    except ValueError as error:
        processes = f" over {world.size} processes" if world.size > 1 else ""
        raise ValueError(
            f"batch_size is {recipe.batch_size} and accumulate {recipe.accumulate}: one of {num_images} "
            f"training images{processes} is alone, and BatchNorm cannot normalise it ({error}); choose "
            "another batch_size or accumulate"
        ) from error


class TrainStep:
    """One optimizer step: ``loss_sum, hits = step(inputs, targets)``, both (), over the images of the batch.

    With `is_graphed`, batches of `num_images` replay a CUDA graph; a smaller last batch runs eagerly.
    Gradients are then averaged over `process_group`. Without, the network does that.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        objective: Objective,
        *,
        num_images: int,
        is_graphed: bool,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.network, self.recipe, self.optimizer, self.scaler = network, recipe, optimizer, scaler
        self.objective, self.num_images = objective, num_images
        self.graph: GraphedStep | None = None
        self.average: GradientAverage | None = None
        if is_graphed:
            if process_group is not None:  # an average of its own: the graphs refer to the tensors of theirs
                self.average = GradientAverage(optimizer, process_group)
            self.graph = GraphedStep(
                network,
                optimizer,
                lambda logits, labels: objective.loss_sum(logits, labels) / len(labels),
                autocast_dtype=AUTOCAST[recipe.precision or "fp32"],
                max_grad_norm=recipe.clip_grad_norm,
                process_group=process_group,
            )

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graph is not None and len(targets) == self.num_images:
            try:
                loss = self.graph(inputs, targets)
            except CaptureError as error:
                raise ValueError(f"cuda_graph: {error}; want --no-cuda-graph") from error
            return loss * len(targets), self.objective.hits(self.graph.logits, targets)
        return self._eager(inputs, targets)

    def _eager(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, scaler, network = self.recipe, self.scaler, self.network
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=inputs.device)
        hits = torch.zeros((), device=inputs.device)
        parts = list(zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        # Processes average their gradients in the last part's backward pass; until then these accumulate. The
        # average is exact because all processes have equal shares of a batch.
        waiting = network.no_sync if isinstance(network, DistributedDataParallel) else contextlib.nullcontext
        for i, (x, y) in enumerate(parts):  # x and y (b / accumulate, ...)
            with contextlib.nullcontext() if i == len(parts) - 1 else waiting():
                with autocast(recipe.precision, inputs.device):
                    output = network(x)  # logits (b / accumulate, classes), or a segmenter's
                loss = self.objective.loss_sum(output, y)  # ()
                backward_on_this_thread(scaler.scale(loss / len(targets)))
            loss_sum += loss.detach()
            hits += self.objective.hits(output, y)
        if self.average is not None:
            self.average()
        if recipe.clip_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(trained_parameters(self.optimizer), recipe.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        return loss_sum, hits
