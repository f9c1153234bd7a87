"""What Triton's interpreter cannot see by itself: reads and writes out of bounds, races, and false hints.

The interpreter runs the programs of a launch one after another, and takes any address that the process may
touch. A GPU runs programs at the same time, and the threads of one program in any order. So every access is
held against the tensors that the kernel was given, and against all other accesses of the launch. The kernels
have neither atomics nor barriers: what one reads no program of the same launch may have written, itself
included, and two never write to the same element.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class MemoryFault(Exception):
    """A kernel relies on what a GPU does not promise."""


_NONE, _SEVERAL = 0, -1  # instead of the number of a program


class _Memory:
    """The memory of tensors that share a storage: which program has read each element, and which written."""

    def __init__(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.name = " or ".join(name for name, _ in tensors)
        self.start = min(t.data_ptr() for _, t in tensors)
        self.end = max(_end(t) for _, t in tensors)
        self._item_size = 0  # not known before the first access
        self._reader = self._writer = np.empty(0, np.int32)

    def _elements(self, addresses: np.ndarray, item_size: int) -> np.ndarray:
        if not self._item_size:
            self._item_size = item_size
            # Zeros take no memory before they are written to: one test has a tensor of 8 GiB.
            self._reader, self._writer = np.zeros((2, (self.end - self.start) // item_size), np.int32)
        if item_size != self._item_size:
            raise MemoryFault(f"elements of {self._item_size} and of {item_size} bytes in {self.name}")
        offsets = addresses - np.uint64(self.start)
        if (offsets % item_size).any():
            raise MemoryFault(f"an address in {self.name} that is no multiple of {item_size} bytes")
        return offsets // np.uint64(item_size)

    def read(self, program: int, addresses: np.ndarray, item_size: int) -> None:
        at = self._elements(addresses, item_size)
        self._fail_on(self._writer[at], program, "reads what was written by {}")
        reader = self._reader[at]
        self._reader[at] = np.where((reader == _NONE) | (reader == program), program, _SEVERAL)

    def write(self, program: int, addresses: np.ndarray, values: np.ndarray) -> None:
        at = self._elements(addresses, values.itemsize)
        self._fail_on(self._writer[at], program, "writes over what was written by {}")
        reader = self._reader[at]
        self._fail_on(np.where(reader == program, _NONE, reader), program, "writes over what was read by {}")
        self._writer[at] = program
        order = np.argsort(at, kind="stable")
        bits = values.view(f"u{values.itemsize}")[order]
        if ((np.diff(at[order]) == 0) & (np.diff(bits) != 0)).any():
            raise MemoryFault(f"program {program} writes two values to one element of {self.name}")

    def _fail_on(self, others: np.ndarray, program: int, fault: str) -> None:
        if others.any():
            other = int(others[others != _NONE][0])
            named = {program: "itself", _SEVERAL: "others"}.get(other, f"program {other}")
            raise MemoryFault(f"program {program} {fault.format(named)} in {self.name}")


def _end(tensor: torch.Tensor) -> int:
    """The address after the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size() if tensor.numel() else tensor.data_ptr()


class _Launch:
    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        sharing = defaultdict(list)
        for name, tensor in tensors:
            sharing[tensor.untyped_storage().data_ptr()].append((name, tensor))
        self._memories = [_Memory(sharing[start]) for start in sorted(sharing)]
        self._starts, self._ends = (
            np.array([getattr(m, end) for m in self._memories], np.uint64) for end in ("start", "end")
        )
        self.program = 0

    def read(self, addresses: np.ndarray, item_size: int) -> None:
        for memory, which in self._split(addresses, item_size):
            memory.read(self.program, addresses[which], item_size)

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for memory, which in self._split(addresses, values.itemsize):
            memory.write(self.program, addresses[which], values[which])

    def _split(self, addresses: np.ndarray, item_size: int) -> Iterator[tuple[_Memory, Any]]:
        """Each memory, and which addresses are its."""
        if not addresses.size:
            return
        ends = addresses[[addresses.argmin(), addresses.argmax()]]  # first these two: mostly of one memory
        first, last = np.searchsorted(self._starts, ends, "right").astype(np.int64) - 1
        if first == last >= 0 and ends[1] + item_size <= self._ends[first]:
            yield self._memories[first], slice(None)
            return
        owners = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        outside = (owners < 0) | (addresses + np.uint64(item_size) > self._ends[owners])
        if outside.any():
            near = self._memories[max(0, int(owners[outside][0]))]
            raise MemoryFault(
                f"program {self.program} accesses {outside.sum()} addresses beside its tensors, "
                f"{int(addresses[outside][0]) - near.end} bytes past the end of {near.name}"
            )
        for owner in np.unique(owners):
            yield self._memories[owner], owners == owner


def _tensors(name: str, arg: Any) -> Iterator[tuple[str, torch.Tensor]]:
    arg = getattr(arg, "base", arg)  # of a descriptor: its tensor
    if isinstance(arg, torch.Tensor):
        yield name, arg
    elif isinstance(arg, tuple):
        for part in arg:
            yield from _tensors(name, part)


def check_memory() -> None:
    """Makes Triton's interpreter raise `MemoryFault`, for good."""
    builder, launches = InterpreterBuilder, []
    execute, place = GridExecutor.__call__, builder.set_grid_idx
    load, store, hint = builder.create_masked_load, builder.create_masked_store, TensorHandle.set_attr

    @functools.wraps(execute)
    def execute_and_check(self: Any, *args: Any, **kwargs: Any) -> None:
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        launches.append(_Launch(pair for name, arg in named for pair in _tensors(name, arg)))
        try:
            execute(self, *args, **kwargs)
        finally:
            launches.pop()

    @functools.wraps(place)
    def place_and_number(self: Any, x: int, y: int, z: int) -> None:
        place(self, x, y, z)
        launches[-1].program = 1 + (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    @functools.wraps(load)
    def load_and_check(self: Any, ptrs: TensorHandle, mask: Any, other: Any, *rest: Any, **names: Any) -> Any:
        active = _active(mask, ptrs)
        launches[-1].read(ptrs.data[active], ptrs.get_element_ty().primitive_bitwidth // 8)
        loaded = load(self, ptrs, mask, other, *rest, **names)
        if other is None:  # the interpreter takes 0, and a GPU whatever the register held
            unknown = 0x7FC0 if loaded.dtype.scalar == tl.bfloat16 else 77  # bits of NaN
            loaded.data[~active] = np.nan if loaded.data.dtype.kind == "f" else unknown
        return loaded

    @functools.wraps(store)
    def store_and_check(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: Any, *rest: Any) -> None:
        active = _active(mask, ptrs)
        launches[-1].write(ptrs.data[active], np.broadcast_to(value.data, active.shape)[active])
        store(self, ptrs, value, mask, *rest)

    @functools.wraps(hint)
    def hint_and_check(self: TensorHandle, name: str, values: list[int]) -> None:
        hint(self, name, values)
        (value,) = values  # more are of tensors with more axes, for which no kernel here has hints
        true = {
            "tt.divisibility": lambda: not (self.data % value).any(),
            "tt.contiguity": lambda: (np.diff(self.data.reshape(-1, value)) == 1).all(),
        }[name]
        if not true():
            raise MemoryFault(f"the hint {name} = {value} is false")

    GridExecutor.__call__, builder.set_grid_idx = execute_and_check, place_and_number
    builder.create_masked_load, builder.create_masked_store = load_and_check, store_and_check
    TensorHandle.set_attr = hint_and_check


def _active(mask: Any, ptrs: TensorHandle) -> np.ndarray:
    # Descriptors pass the mask as an array.
    return np.broadcast_to(getattr(mask, "data", mask), ptrs.data.shape)
