"""How much memory is free, on a GPU or on this machine, inside a container or a cluster's job too."""

from __future__ import annotations

import torch

from vpt_fast.control_groups import memory_left


def free_bytes(device: torch.device) -> int | None:
    """Bytes left on this device; None if unknown. On a GPU, what PyTorch's allocator holds unused is given
    back first, except the memory of a CUDA graph: nothing but the graph may use that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        left = [size for size in (_available(), memory_left()) if size is not None]
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
