"""Copies of tiles by tensor maps (TMA), and mbarriers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .machine import Barrier, Block, Fault, bytes_at

ALIGNMENT = 128  # of a tile in shared memory, in bytes


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory and the box of it that one copy moves. strides: in elements; swizzle: 0 for
    none, 1, 2 and 3 for rows of 32, 64 and 128 bytes."""

    address: int
    element_size: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    box: tuple[int, int]
    swizzle: int

    def __post_init__(self) -> None:
        row = self.box[1] * self.element_size
        if self.address % 16 or self.strides[0] * self.element_size % 16 or self.strides[1] != 1 or row % 16:
            raise Fault(f"tensor map: {self} is not aligned as it must be")
        if self.swizzle and row > 16 << self.swizzle:
            raise Fault(f"tensor map: rows of {row} bytes, more than the swizzle's {16 << self.swizzle}")

    def places(self, shared: int, first: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the box from row and column `first` on: addresses of its elements in shared memory, in global
        memory, and which of them exist."""
        i, j = np.arange(self.box[0])[:, None], np.arange(self.box[1])
        inside = shared + (i * self.box[1] + j) * self.element_size
        inside ^= (inside >> 7 & (1 << self.swizzle) - 1) << 4
        row, column = i + first[0], j + first[1]
        exist = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        outside = self.address + (row * self.strides[0] + column) * self.element_size
        return inside.reshape(-1), outside.reshape(-1), exist.reshape(-1)


class _Copy(NamedTuple):
    """One thread's copy: places of the box's bytes in shared and global memory, and which elements exist."""

    thread: int
    warp: int
    inside: np.ndarray
    outside: np.ndarray
    exist: np.ndarray


def _copies(
    block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], guard: Any, what: str
) -> Iterator[_Copy]:
    for thread in np.nonzero(block.active(guard))[0]:
        described = block.parameters[int(block.each(tensor_map)[thread])]
        address = int(block.each(shared)[thread])
        if address % ALIGNMENT:
            raise Fault(f"{what}: a tile in shared memory that is not at a multiple of {ALIGNMENT} bytes")
        column, row = (int(block.each(c)[thread]) for c in columns_rows)
        inside, outside, exist = described.places(address, (row, column))
        size = described.element_size
        block.memory.require(outside[exist], size, size, what)
        yield _Copy(
            thread, int(block.warp[thread]), bytes_at(inside, size), block.memory.index(outside, size), exist
        )


def load_tile(
    block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], barrier: Any, guard: Any
) -> None:
    """Elements that do not exist are zeros."""
    for copy in _copies(block, shared, tensor_map, columns_rows, guard, "TMA load"):
        counter = block.barriers[int(block.each(barrier)[copy.thread])]
        block.shared.expect(copy.inside, copy.warp, "TMA load")
        counter.in_flight.append(partial(_finish_load, block, copy, counter))


def _finish_load(block: Block, copy: _Copy, counter: Barrier) -> None:
    data = np.zeros(copy.inside.shape, np.uint8)
    data[copy.exist] = block.memory.bytes[copy.outside[copy.exist]]
    block.shared.receive(copy.inside, data, counter)
    counter.bytes_pending -= data.size
    counter.settle()


def store_tile(block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], guard: Any) -> None:
    for copy in _copies(block, shared, tensor_map, columns_rows, guard, "TMA store"):
        block.shared.use(copy.inside, copy.warp, "TMA store")
        block.stores.open.append(partial(_finish_store, block, copy))


def _finish_store(block: Block, copy: _Copy) -> None:
    block.shared.end_use(copy.inside)
    data = block.shared.read(copy.inside, copy.warp, "TMA store")
    block.memory.bytes[copy.outside[copy.exist]] = data[copy.exist]


def make_barrier(block: Block, address: Any, count: Any, guard: Any) -> None:
    thread = block.only_thread(guard, "mbarrier.init")
    if thread is not None:
        number = next(block.program.barrier_numbers)
        expected, nothing = int(block.each(count)[thread]), np.zeros_like(block.shared.seen[0])
        barrier = Barrier(expected, expected, number, arrived=nothing, published=nothing)
        block.barriers[int(block.each(address)[thread])] = barrier


def drop_barrier(block: Block, address: Any, guard: Any) -> None:
    thread = block.only_thread(guard, "mbarrier.inval")
    if thread is not None:
        if block.barriers.pop(int(block.each(address)[thread])).in_flight:
            raise Fault("mbarrier.inval: a copy is on its way")


def arrive(block: Block, address: Any, num_bytes: Any, guard: Any) -> None:
    """An arrival that expects so many bytes."""
    thread = block.only_thread(guard, "mbarrier.arrive")
    if thread is not None:
        barrier = block.barriers[int(block.each(address)[thread])]
        barrier.bytes_pending += int(block.each(num_bytes)[thread])
        barrier.pending -= 1
        barrier.arrived = np.maximum(barrier.arrived, block.shared.seen[block.shared.group])
        barrier.settle()


def wait(block: Block, address: Any, parity: Any) -> np.bool_:
    """Whether the phase of this parity has ended. Copies and products end now, not earlier. If it has not,
    other groups have to go on first."""
    barrier = block.barriers[int(block.each(address)[0])]
    for operations in (barrier.in_flight, barrier.commits):
        while operations:
            operations.pop(0)()
    if barrier.phase % 2 == int(block.each(parity)[0]) % 2:
        block.has_to_wait = True
        return np.bool_(False)
    block.shared.learn(barrier)
    return np.bool_(True)
