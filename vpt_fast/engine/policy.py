"""What a block keeps for backward, by name, and which of these policies fits the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class MemoryPolicy:
    """What is kept between forward and backward.

    compact: x̂ before the MLP and the activation's derivative in 8 bits; of attention only its x̂ and
        log-sum-exp: backward recomputes queries, keys and values (one more matmul) and does without the
        output. Forward is exact; gradients carry the rounding of the codes.
    recompute_mlp: the MLP's pre-activation is recomputed in backward (one more fc1). Exact.
    recompute_block: only the block's inputs are kept; forward runs again in backward. Exact.
    """

    compact: bool = False
    recompute_mlp: bool = False
    recompute_block: bool = False


POLICIES = {
    "exact": MemoryPolicy(),
    "compact": MemoryPolicy(compact=True),
    "recompute_mlp": MemoryPolicy(recompute_mlp=True),
    "recompute": MemoryPolicy(recompute_block=True),
}
"""By name, the fastest first."""

MEMORY = ("auto", *POLICIES)

# Share of the free memory; the rest is for the allocator's rounding, the optimizer and cuBLAS's workspace.
_USABLE_SHARE = 0.9


def check_memory(memory: str) -> None:
    """Raises ValueError for a name that is not in `MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, want one of {', '.join(map(repr, MEMORY))}")


def choose_policy(step_bytes: Callable[[str], int], dtype: torch.dtype, free: int | None) -> str:
    """The name of the fastest policy whose step fits.

    ``"compact"`` is a candidate for 16-bit matmuls only: their own rounding hides that of the codes, which in
    float32 would be by far the largest error.

    Args:
        step_bytes: bytes that a training step takes under the policy of this name.
        dtype: of the matmuls.
        free: bytes that are free, or None where that is not known, which gives ``"exact"``.

    Returns:
        A name in `POLICIES`; the smallest, ``"recompute"``, where none fits.
    """
    if free is None:
        return "exact"
    for name, policy in POLICIES.items():
        if policy.compact and dtype.itemsize > 2:
            continue
        if step_bytes(name) <= free * _USABLE_SHARE:
            return name
    return "recompute"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a step may take on this device, including the allocator's unused ones; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        left = [size for size in (_available(), _left_to_container()) if size is not None]
        return min(left, default=None)
    return None


def _available() -> int | None:
    """Bytes that the machine has left without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


_CONTROL_GROUP = Path("/sys/fs/cgroup")


def _left_to_container() -> int | None:
    """Bytes that a container has left, by its control group (version 2); reclaimable pages of files count as
    free, as they do in MemAvailable."""
    try:
        limit = int((_CONTROL_GROUP / "memory.max").read_text())  # or "max"
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        stats = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(stats["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None
