"""Reads planned batches in worker processes: what batches of images and of scenes have in common."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from .decode import DecodeError

_Read = TypeVar("_Read")


def copies_may_overlap(device: torch.device) -> bool:
    """Whether a copy from the host may go on while the program does. Only CUDA's pinned memory is kept until
    it is done: on Apple's MPS, PyTorch reads the memory of a tensor that was freed meanwhile
    (pytorch/pytorch#189690)."""
    return device.type == "cuda"


def require_usable(
    *, images: int, batch_size: int, seed: int, workers: int, rank: int, world_size: int
) -> None:
    """Raises ValueError, which names the argument, for one that no batches of `images` images are made
    with."""
    for name, value, least in (
        ("images", images, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("workers", workers, 0),
        ("world_size", world_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: {value}, wanted {least} or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank}, wanted 0 to world_size - 1 = {world_size - 1}")


class PlannedLoader(Generic[_Read]):
    """Reads an epoch's batches, each a list of what `read` takes, in processes that live over all epochs.

    Args:
        read: gives a tensor, or a tuple of tensors; worker processes receive it pickled or by fork.
        workers: processes; 0 reads in this one.
        device: batches for a GPU are in pinned memory.
    """

    def __init__(self, read: Callable[[_Read], Any], *, workers: int, device: torch.device) -> None:
        self._plan: list[list[_Read]] = []  # the batches of the next epoch
        self._epochs = 0
        # Set at exit, just before multiprocessing ends the processes that are left and waits for them.
        is_exiting = multiprocessing.RawValue(ctypes.c_bool, False)
        multiprocessing.util.Finalize(self, setattr, (is_exiting, "value", True), exitpriority=0)
        self._loader: DataLoader = DataLoader(
            _Reads(read),
            batch_sampler=self._plan,
            num_workers=workers,
            multiprocessing_context=_start_method() if workers else None,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=functools.partial(_leave_stop_signals, is_exiting),
            generator=torch.Generator(),  # else each epoch draws from the global one
        )

    def epoch(self, plan: Sequence[list[_Read]]) -> Iterator[Any]:
        """The stacked tensors of each batch. Only one epoch can run at a time.

        Raises:
            DecodeError: `read` raised it.
            RuntimeError: another epoch was started before this one had ended.
        """
        self._epochs += 1
        this = self._epochs
        self._plan[:] = plan
        for loaded in self._loader:
            if self._epochs != this:  # the workers' one iterator now serves the other epoch
                raise RuntimeError("epoch: another epoch was started before this one had ended")
            if isinstance(loaded, DecodeError):
                # A new exception: the original's traceback would tie the loader to this frame in a reference
                # cycle. The garbage collector would free it after its queues, and it would wait for workers
                # that it can no longer tell to stop.
                raise DecodeError(loaded.path, loaded.reason)
            yield loaded.tensors() if isinstance(loaded, _InBytes) else loaded


def _start_method() -> str:
    """How worker processes start: as multiprocessing does, but forked where that would be by a server.

    Python 3.14 made the server Linux's default. A process that it starts imports PyTorch and timm anew, which
    takes seconds of a core for each of them, where a fork takes milliseconds.
    """
    method = multiprocessing.get_start_method()
    return "fork" if method == "forkserver" else method


class _Reads(Dataset, Generic[_Read]):
    """What `read` gives, or its DecodeError. That is returned because an exception raised in a worker process
    would reach the user with the worker's traceback as its message."""

    def __init__(self, read: Callable[[_Read], Any]) -> None:
        self._read = read

    def __getitem__(self, wanted: _Read) -> Any:
        try:
            return self._read(wanted)
        except DecodeError as error:
            return error


class _InBytes:
    """A batch that comes from a worker process through a pipe, since it found no room in shared memory: a
    container has 64 MiB of that, unless it is started with more."""

    def __init__(self, loaded: list[Any]) -> None:
        self._is_tuple = isinstance(loaded[0], tuple)
        columns = zip(*loaded, strict=True) if self._is_tuple else (loaded,)
        self._arrays = [torch.stack(column).numpy() for column in columns]

    def tensors(self) -> Any:
        """As `default_collate` gives them."""
        found = [torch.from_numpy(array) for array in self._arrays]
        return found if self._is_tuple else found[0]

    def pin_memory(self) -> Any:
        """The same, pinned: DataLoader's thread for that calls it."""
        found = self.tensors()
        return [t.pin_memory() for t in found] if self._is_tuple else found.pin_memory()


def _collate(loaded: list[Any]) -> Any:
    """The batch, or its first error."""
    error = next((item for item in loaded if isinstance(item, DecodeError)), None)
    if error is not None:
        return error
    try:
        return default_collate(loaded)
    except RuntimeError as full:
        if "unable to allocate shared memory" not in str(full):
            raise
        return _InBytes(loaded)


def _leave_stop_signals(is_exiting: Any, worker: int) -> None:
    """Leaves SIGINT and SIGTERM to the process that reads the batches, until that exits."""
    # Ctrl-C reaches every process of the terminal, and a cluster's SIGTERM every process of the job; only the
    # training process handles them, and ends its workers. Without it they end by themselves. One that exits
    # with an epoch under way, for an error or at the end of a script, ends them by SIGTERM.

    def end(number: int, frame: Any) -> None:
        if is_exiting.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
