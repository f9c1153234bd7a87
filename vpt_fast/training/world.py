"""The processes that train together: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_joined = itertools.count()  # process groups that this process has joined


@dataclass(frozen=True)
class World:
    """This process's rank among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over all processes, on each of them."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each of ``tensors`` by its mean over all processes."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self.sum(tensor) / self.size)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def agree(self, value: object) -> bool:
        """Whether ``value`` is in all processes what it is in the main one."""
        theirs = self.from_main(lambda: value)
        return not self.any(value != theirs)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes; None if this is the only one."""
        return dist.group.WORLD if self.size > 1 else None

    def share_parameters(self, network: nn.Module) -> None:
        """Gives all processes the main one's parameters."""
        if self.size > 1:
            for parameter in network.parameters():
                values = parameter.detach().contiguous()  # NCCL takes no others
                dist.broadcast(values, src=0)
                parameter.detach().copy_(values)

    @contextlib.contextmanager
    def joined(self, network: nn.Module) -> Iterator[nn.Module]:
        """``network`` with gradients averaged over all processes, if there are several."""
        if self.size == 1:
            yield network
            return
        # No step reads a buffer that changes: a trained BatchNorm's statistics are read in evaluation alone,
        # before which the loop averages them.
        with warnings.catch_warnings():  # torch 2.14 has another name for it, which 2.11 does not know
            warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
            # Gradients are views of the buffers that are exchanged, not copies beside them.
            parallel = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        try:
            yield parallel
        finally:
            # Released before the process group is destroyed: torch 2.11 may hang if a Reducer holds the last
            # reference to the group, and a process that still holds it at exit may abort.
            parallel.reducer = parallel.logger = parallel.process_group = None

    def from_main(self, function: Callable[[], T]) -> T:
        """Calls ``function`` in the main process and returns its result, or raises its ValueError or OSError,
        in all of them."""
        if self.size == 1:
            return function()
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.is_main:
            try:
                answer[0] = (function(), None)
            except (ValueError, OSError) as error:
                answer[0] = (None, error)
        dist.broadcast_object_list(answer, src=0)
        value, raised = answer[0]
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]

    def share_on_machine(self, function: Callable[[int, int], T]) -> list[T]:
        """Calls ``function(rank, size)`` with this process's rank among the ``size`` on its machine, and
        returns what they got, on each of them. What a process can read, the others of its machine can."""
        if self.size == 1:
            return [function(0, 1)]
        machine = os.environ["GROUP_RANK"]
        mine = function(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (machine, mine))
        return [theirs for place, theirs in found if place == machine]


@contextlib.contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """Joins the other processes if torchrun started this one; ``device`` is as for `on_device`.

    Raises ValueError for a device that torch does not know or this machine does not have, and for a GPU by
    number that several processes would have to share, which NCCL refuses.
    """
    with on_device(device, int(os.environ.get("LOCAL_RANK", 0))) as chosen:
        if not dist.is_torchelastic_launched():
            yield World(0, 1, chosen)
            return
        sharing = int(os.environ["LOCAL_WORLD_SIZE"])
        if sharing > 1 and chosen.type == "cuda" and device not in (None, "cuda"):
            raise ValueError(
                f"device is {device!r} in each of {sharing} processes, which need a GPU each; with "
                "'cuda', each takes its own"
            )
        # torchrun's store lives as long as its processes. With torch's own keys, a new process group would
        # read addresses that an earlier one may have left there; hence the prefix.
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"vpt_fast/{next(_joined)}", store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            yield World(rank, size, chosen)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def on_device(name: str | None, local_rank: int = 0) -> Iterator[torch.device]:
    """`find_device`; a GPU is CUDA's current device inside. What names no device, such as pinning batches or
    reading the peak of memory, means the current one, and takes half a gigabyte of it.

    Raises ValueError as find_device does.
    """
    chosen = find_device(name, local_rank)
    with torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext():
        yield chosen


def find_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device called ``name``; None is this process's GPU if there is one, else the CPU.

    Raises ValueError for a device that torch does not know or this machine does not have, or that is neither
    a CPU nor a CUDA device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device is {name!r}; it must be one that torch knows, such as cpu or cuda:0"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; only cpu and cuda are supported")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}; torch sees {torch.cuda.device_count()} CUDA devices here")
        return torch.device("cuda", index)
    return device
