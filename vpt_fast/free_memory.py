"""How much memory is free, on a GPU or on this machine, inside a container too."""

from __future__ import annotations

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes left on this device; None if unknown. On a GPU, what PyTorch's allocator holds unused is given
    back first, except the memory of a CUDA graph: nothing but the graph may use that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
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
