"""What this process's control groups leave it: those of a container, or of a job on a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")

# Of version 2 and of version 1: files with the limit and with what is used, and the entry of memory.stat with
# the pages of files that the kernel takes back when memory is short.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_left() -> int | None:
    """Bytes up to the nearest limit; None without one. Reclaimable pages of files count as free, as they do
    in MemAvailable."""
    found = []
    for group in _groups("memory"):
        for limit, used, reclaimable in _MEMORY:
            try:
                stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Without a limit the first is "max", or in version 1 more than any machine has.
                left = int((group / limit).read_text()) - int((group / used).read_text())
                found.append(left + int(stats[reclaimable]))
            except (OSError, ValueError, KeyError):
                continue
    return min(found, default=None)


def cores() -> int | None:
    """How many cores' time this process may use, rounded up; None without a limit."""
    found = []
    for group in _groups("cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = map(int, (group / "cpu.max").read_text().split())  # or "max"
            else:
                quota, period = (
                    int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
                )
        except (OSError, ValueError):
            continue
        if quota > 0:  # without a limit it is -1 in version 1
            found.append(math.ceil(quota / period))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of the groups around it, as far as they can be seen: a container
    sees its own as the root."""
    try:
        lines = [line.split(":", 2) for line in _OWN.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        if number == "0":  # version 2
            root = _ROOT
        elif controller in controllers.split(","):
            root = _ROOT / controller
        else:
            continue
        group = root / path.lstrip("/")
        yield group
        while group != root:
            group = group.parent
            yield group
