"""How fast the device multiplies matrices: the ceilings that results are related to.

Two ceilings, measured in the same run as the rows: one large matmul, the fastest that the device gets, and
matmuls of a model's own shapes, the speed of its blocks if nothing but matmuls took time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flops import Product, product
from measure import Stopwatch, empty_cache

ROUNDS = 5  # after one of warm-up
LARGE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the large matmul, a fraction of a second
CALLS = {"cuda": 20, "cpu": 1}  # per round: keeps a GPU busy for much longer than an event takes


def large_product(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matmul, 8192 by 8192 on a GPU, 2048 by 2048 on a CPU.

    Args:
        device: where.
        dtype: of both factors and of the result.
    """
    size = LARGE[device.type]
    return products([(size, size, size)], device, dtype)


def products(sizes: Sequence[Product], device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of matmuls (rows, inputs) by (inputs, outputs), run one after the other, in the fastest round:
    a ceiling is what nothing else on the machine has slowed down. Each is weighted by its operations."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    # weights in nn.Linear's layout
    factors = {size: (random(size[0], size[1]), random(size[2], size[1]).T) for size in sizes}
    seconds = []
    for round_ in range(-1, ROUNDS):
        watch = Stopwatch(device)
        watch.mark()
        for _ in range(CALLS[device.type]):
            for size in sizes:
                left, right = factors[size]
                left @ right
        watch.mark()
        if round_ >= 0:
            seconds += watch.seconds()
    del factors, left, right
    empty_cache(device)
    operations = CALLS[device.type] * sum(product(*size) for size in sizes)
    return operations / min(seconds) / 1e12
