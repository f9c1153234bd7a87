"""How fast the device multiplies matrices: what the share of the ceiling is a share of.

Two ceilings, measured in the same run as the rows: one large product, which is as fast as the device gets,
and products of a model's own shapes, as fast as its blocks could be if nothing but products took time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flops import Shape
from measure import Stopwatch, empty_cache

ROUNDS = 5  # after one of warm-up
LARGE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the large product, a fraction of a second
CALLS = {"cuda": 20, "cpu": 1}  # in a round: a GPU is to be busy for much longer than an event takes


def large_product(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square product, 8192 by 8192 on a GPU, 2048 by 2048 on a CPU.

    Args:
        device: where.
        dtype: of both factors and of the result.
    """
    size = LARGE[device.type]
    return products([(size, size, size)], device, dtype)


def block_products(shape: Shape, batch_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the four products of a ViT's block, one after the other, on B images without prompts.

    That is queries, keys and values; the projection; and the MLP's two. Each counts by its operations.
    """
    rows, d, a = batch_size * shape.num_tokens, shape.width, shape.attention_width
    hidden = shape.mlp_weights // (2 * d)
    sizes = [(rows, d, 3 * a), (rows, a, d), (rows, d, hidden), (rows, hidden, d)]
    return products(sizes, device, dtype)


def products(sizes: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of products (rows, inputs) by (inputs, outputs), one after the other, in the fastest round: a
    ceiling is what nothing else on the machine has slowed down."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    # weights lie as nn.Linear has them
    factors = [(random(rows, inputs), random(outputs, inputs).T) for rows, inputs, outputs in sizes]
    seconds = []
    for round_ in range(-1, ROUNDS):
        watch = Stopwatch(device)
        watch.mark()
        for _ in range(CALLS[device.type]):
            for left, right in factors:
                left @ right
        watch.mark()
        if round_ >= 0:
            seconds += watch.seconds()
    del factors, left, right
    empty_cache(device)
    operations = CALLS[device.type] * sum(2 * rows * inputs * outputs for rows, inputs, outputs in sizes)
    return operations / min(seconds) / 1e12
