"""The closed forms of flops.py, by the same names, for a ConvNet whose image has a border of prompts.

A frozen convolution takes as many operations in backward, for its input's gradient, as in forward. Every
implementation computes all pixels of the network's enlarged image; they differ in what they keep.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from convnet_peers import image_size
from flops import Product, product
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What determines how much a ConvNet computes.

    Attributes:
        network: the model with tensors on "meta", so that layers' outputs have shapes and no values.
        image_size: (height, width) without the border.
        width: d of the features.
    """

    network: nn.Module
    image_size: tuple[int, int]
    width: int


def shape_of(convnet: nn.Module) -> Shape:
    """Read from a model, which is not changed."""
    tensors = (*convnet.parameters(), *convnet.buffers())
    hollow: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in convnet.parameters():
        hollow[id(parameter)] = nn.Parameter(hollow[id(parameter)], requires_grad=False)
    return Shape(copy.deepcopy(convnet, hollow), image_size(convnet), int(convnet.head_hidden_size))  # type: ignore[call-overload]


def block_products(shape: Shape, batch_size: int) -> list[Product]:
    """Empty: a convolution is not a matmul."""
    del shape, batch_size
    return []


def essential(shape: Shape, num_prompts: int, prompt_type: str, batch_size: int, num_classes: int) -> int:
    """The network forward, and backward to its input, on images with their border; and the head: what
    vpt_fast and `convnet_peers.ConcatTimm` do. Arguments as of `flops.essential`."""
    del prompt_type
    layers = _layers(shape, num_prompts, batch_size)
    return 2 * sum(layers) + 3 * product(batch_size, shape.width, num_classes)


def no_prompts(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `convnet_peers.NoPrompts` does."""
    return essential(shape, 0, "shallow", batch_size, num_classes)


def linear_probe(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What vpt_fast.LinearProbe does: forward, and the gradient of the head's weight."""
    return sum(_layers(shape, 0, batch_size)) + 2 * product(batch_size, shape.width, num_classes)


def full_finetuning(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `peers.FullFineTuning` does: every weight's gradient, and every input's but the image's."""
    layers = _layers(shape, 0, batch_size)
    return 3 * sum(layers) - layers[0] + 3 * product(batch_size, shape.width, num_classes)


def _layers(shape: Shape, border: int, batch_size: int) -> list[int]:
    """Operations forward of each convolution and linear layer, in the order in which they run."""
    found: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        # Each output is a sum over one row of the weight.
        found.append(2 * output.numel() * weight[0].numel())

    network = copy.deepcopy(shape.network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    height, width = (side + 2 * border for side in shape.image_size)
    weight = next(network.parameters())
    with torch.no_grad():
        network(torch.empty(batch_size, 3, height, width, device="meta", dtype=weight.dtype))
    return found
