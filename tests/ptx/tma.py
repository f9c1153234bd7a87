"""Copies of tiles by tensor maps (TMA), and mbarriers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def _copies(block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], guard: Any, what: str):
    """For every active thread: the map, and places and warp of its copy."""
    for thread in np.nonzero(block.active(guard))[0]:
        described = block.parameters[int(block.each(tensor_map)[thread])]
        address = int(block.each(shared)[thread])
        if address % ALIGNMENT:
            raise Fault(f"{what}: a tile in shared memory that is not at a multiple of {ALIGNMENT} bytes")
        column, row = (int(block.each(c)[thread]) for c in columns_rows)
        inside, outside, exist = described.places(address, (row, column))
        block.memory.require(outside[exist], described.element_size, described.element_size, what)
        size = described.element_size
        yield (
            thread,
            bytes_at(inside, size),
            block.memory.index(outside, size),
            exist,
            int(block.warp[thread]),
        )


def load_tile(
    block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], barrier: Any, guard: Any
) -> None:
    """Elements that do not exist are zeros."""
    for thread, inside, outside, exist, warp in _copies(
        block, shared, tensor_map, columns_rows, guard, "TMA load"
    ):
        counter = block.barriers[int(block.each(barrier)[thread])]
        block.shared.expect(inside, warp, "TMA load")

        def finish(
            inside: np.ndarray = inside,
            outside: np.ndarray = outside,
            exist: np.ndarray = exist,
            counter: Barrier = counter,
        ) -> None:
            data = np.zeros(inside.shape, np.uint8)
            data[exist] = block.memory.bytes[outside[exist]]
            # The mbarrier orders it before every thread that has waited.
            block.shared.bytes[inside] = data
            block.shared.is_written[inside] = True
            counter.bytes_pending -= data.size
            counter.settle()

        counter.in_flight.append(finish)


def store_tile(block: Block, shared: Any, tensor_map: Any, columns_rows: list[Any], guard: Any) -> None:
    for _, inside, outside, exist, warp in _copies(
        block, shared, tensor_map, columns_rows, guard, "TMA store"
    ):
        block.shared.use(inside, warp, "TMA store")

        def finish(
            inside: np.ndarray = inside,
            outside: np.ndarray = outside,
            exist: np.ndarray = exist,
            warp: int = warp,
        ) -> None:
            block.shared.end_use(inside)
            data = block.shared.read(inside, warp, "TMA store")
            block.memory.bytes[outside[exist]] = data[exist]

        block.stores.open.append(finish)


def _by_one_thread(block: Block, guard: Any, what: str) -> int | None:
    threads = np.nonzero(block.active(guard))[0]
    if len(threads) > 1:
        raise Fault(f"{what}: by {len(threads)} threads")
    return int(threads[0]) if len(threads) else None


def make_barrier(block: Block, address: Any, count: Any, guard: Any) -> None:
    thread = _by_one_thread(block, guard, "mbarrier.init")
    if thread is not None:
        expected = int(block.each(count)[thread])
        block.barriers[int(block.each(address)[thread])] = Barrier(expected, expected)


def drop_barrier(block: Block, address: Any, guard: Any) -> None:
    thread = _by_one_thread(block, guard, "mbarrier.inval")
    if thread is not None:
        if block.barriers.pop(int(block.each(address)[thread])).in_flight:
            raise Fault("mbarrier.inval: a copy is on its way")


def arrive(block: Block, address: Any, num_bytes: Any, guard: Any) -> None:
    """An arrival that expects so many bytes."""
    thread = _by_one_thread(block, guard, "mbarrier.arrive")
    if thread is not None:
        barrier = block.barriers[int(block.each(address)[thread])]
        barrier.bytes_pending += int(block.each(num_bytes)[thread])
        barrier.pending -= 1
        barrier.settle()


def wait(block: Block, address: Any, parity: Any) -> np.bool_:
    """Until the phase of this parity has ended. Copies and products end now, not earlier."""
    barrier = block.barriers[int(block.each(address)[0])]
    for operations in (barrier.in_flight, barrier.commits):
        while operations:
            operations.pop(0)()
    if barrier.phase % 2 == int(block.each(parity)[0]) % 2:
        raise Fault("mbarrier.try_wait: it would wait for ever")
    return np.bool_(True)
