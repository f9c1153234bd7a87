"""sm_100's tensor memory and the products whose sums are in it (tcgen05), as in NVIDIA's PTX ISA, "TensorCore
5th Generation Family Instructions".

An address is a lane (of 128) in its upper half and a column (of 512, of 32 bits) in the lower one. Row i of a
matrix of 128 rows is in lane i. One of 64 rows has 16 of every 32 lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import LANES, WARP, Block, Fault, bytes_at
from .matrices import described, multiply_exactly
from .numbers import CONVERSIONS

DEPTH = 16  # of one product in 16 bits
FORMATS = ("f16", "bf16")


def allocate(block: Block, shared: Any, columns: int, guard: Any) -> None:
    """By one warp; writes the address, 0, to shared memory."""
    on = block.active(guard)
    if not on.any():
        return
    if block.tensor_memory.allocated or len({*block.warp[on]}) > 1:
        raise Fault("tcgen05.alloc: tensor memory is allocated already")
    block.tensor_memory.allocated = columns
    block.store_shared(shared, 4, [np.uint32(0)], guard)


def _places(block: Block, address: Any, length: int, split: int | None, guard: Any) -> list[tuple]:
    """For each warp: its threads, and their lanes and columns, (32, length). split: columns between the two
    halves of a warp, which access 16 lanes; None: it accesses 32."""
    found = []
    addresses = block.addresses(address).reshape(-1, WARP)
    for warp, on in enumerate(block.active(guard).reshape(-1, WARP)):
        if not on.any():
            continue
        if not on.all() or (addresses[warp] != addresses[warp][0]).any():
            raise Fault("tcgen05.ld/st: not by a whole warp at one address")
        lane, column = divmod(int(addresses[warp][0]), 2**16)
        if lane // WARP != warp % 4 or lane % (WARP if split is None else WARP // 2):
            raise Fault(f"tcgen05.ld/st: warp {warp} has no access to lane {lane}")
        thread = np.arange(WARP)
        lanes = lane + (thread if split is None else thread % 16)
        first = column + (0 if split is None else split * (thread // 16))
        columns = first[:, None] + np.arange(length) if split is not None else column + np.arange(length)
        block.tensor_memory.require(int(np.max(columns)) + 1)
        threads = slice(WARP * warp, WARP * (warp + 1))
        found.append((threads, lanes[:, None], np.broadcast_to(columns, (WARP, length))))
    return found


def load(block: Block, address: Any, length: int, split: int | None) -> list[np.ndarray]:
    values = np.zeros((block.num_threads, length), np.uint32)
    for threads, lanes, columns in _places(block, address, length, split, None):
        values[threads] = block.tensor_memory.words[lanes, columns]
    return list(values.T)


def store(block: Block, address: Any, values: list[Any], split: int | None, guard: Any) -> None:
    data = np.stack([block.each(value) for value in values], 1)
    for threads, lanes, columns in _places(block, address, len(values), split, guard):
        block.tensor_memory.words[lanes, columns] = data[threads]


def multiply(
    block: Block,
    total: Any,
    a: Any,
    b: Any,
    a_is_in_tensor_memory: bool,
    instruction: Any,
    accumulates: Any,
    guard: Any,
) -> None:
    """tcgen05.mma of 16 bits: D = A B (+ D), by the one active thread.

    Args:
        total: address of D.
        a: address of A, or its descriptor in shared memory; b: B's descriptor.
        instruction: the descriptor of formats and sizes.
        accumulates: whether D is added.
    """
    thread = block.only_thread(guard, "tcgen05.mma")
    if thread is None:
        return
    total, a, b, bits, added = (int(block.each(x)[thread]) for x in (total, a, b, instruction, accumulates))
    if bits & 0b1111 or bits >> 4 & 3 != 1 or bits >> 13 & 3:
        raise NotImplementedError(f"tcgen05.mma: instruction descriptor {bits:#x}")
    kinds = FORMATS[bits >> 7 & 7], FORMATS[bits >> 10 & 7]
    columns, rows = (bits >> 17 & 0x3F) << 3, (bits >> 24 & 0x1F) << 4
    lanes = np.arange(rows) if rows == LANES else np.arange(rows) // 16 * WARP + np.arange(rows) % 16
    memory, warp = block.tensor_memory, int(block.warp[thread])

    def operand(descriptor: int, size: int, is_transposed: int, kind: str) -> Callable[[], np.ndarray]:
        """Begins to read a matrix from shared memory; what ends it."""
        places = bytes_at(described(descriptor, size, bool(is_transposed)).reshape(-1), 2)
        block.shared.use(places, warp, "tcgen05.mma")

        def end() -> np.ndarray:
            values = block.shared.end_use(places).view(np.uint16)
            return CONVERSIONS[kind][0](values).reshape(size, DEPTH)

        return end

    def from_tensor_memory() -> np.ndarray:
        lane, column = divmod(a, 2**16)
        memory.require(column + DEPTH // 2)
        pairs = memory.words[lane + lanes, column : column + DEPTH // 2]
        return CONVERSIONS[kinds[0]][0](np.ascontiguousarray(pairs).view(np.uint16))

    left = from_tensor_memory if a_is_in_tensor_memory else operand(a, rows, bits >> 15 & 1, kinds[0])
    right = operand(b, columns, bits >> 16 & 1, kinds[1])

    def finish() -> None:
        lane, column = divmod(total, 2**16)
        memory.require(column + columns)
        own = lane + lanes, slice(column, column + columns)
        before = memory.words[own].view(np.float32) if added else np.float32(0)
        memory.words[own] = multiply_exactly(left(), right().T, before).view(np.uint32)

    memory.products.append(finish)


def commit(block: Block, barrier: Any, guard: Any) -> None:
    """The barrier is arrived at when all products until now have ended."""
    thread = block.only_thread(guard, "tcgen05.commit")
    if thread is None:
        return
    counter = block.barriers[int(block.each(barrier)[thread])]
    memory = block.tensor_memory
    last = memory.products[-1] if memory.products else None

    def finish() -> None:
        while last in memory.products:
            memory.products.pop(0)()
        counter.pending -= 1
        counter.settle()

    counter.commits.append(finish)
