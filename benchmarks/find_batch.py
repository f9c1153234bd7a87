"""The largest batch that an implementation trains on before the GPU is out of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from implementations import Start, random_batch
from measure import Contender, empty_cache

MOST = 2**16 - 1  # images: the most that attention's kernels launch on, where a search ends


def largest(fits: Callable[[int], bool], first: int) -> int:
    """The largest batch found that fits, 0 for none: by doubling from `first`, then by bisection.

    It is exact below 64 and else at most 1/32 too small, since each try takes seconds on a GPU, and a minute
    with a compiled model. No more than `MOST` are tried.
    """
    low, high = 0, first
    while fits(high):
        if high >= MOST:
            return high
        low, high = high, min(2 * high, MOST)
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def largest_batch(
    build: Callable[[Start], Contender],
    start: Start,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """The largest batch on which a contender can take training steps, with nothing else on the device.

    Args:
        build: makes the contender.
        start: on the CPU; each try copies its weights to the device and leaves nothing there.
        device: a GPU.
        progress: is told of each try.

    Raises:
        RuntimeError: a step failed for another reason than lack of memory.
    """

    def fits(batch_size: int) -> bool:
        progress(f"batch {batch_size}")
        torch.compiler.reset()  # every batch size is compiled, and recompilations are limited
        empty_cache(device)
        try:
            contender = build(start.copy_to(device))
            images, labels = random_batch(start, batch_size, device)
        except torch.OutOfMemoryError:
            return False
        with contender.turn(device):
            for _ in range(contender.steps_to_settle):
                contender.step(images, labels)
        if contender.error is not None and not ran_out_of_memory(contender.error):
            raise RuntimeError(f"batch {batch_size}: {contender.error}")
        return contender.error is None

    found = largest(fits, start.setting.batch_size)
    empty_cache(device)
    return found


def ran_out_of_memory(error: str) -> bool:
    """Whether a contender's error says so; cuBLAS, cuDNN and the driver word it differently."""
    words = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return any(word in error for word in words)
