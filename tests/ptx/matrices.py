"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma. Fragments and descriptors as in NVIDIA's
PTX ISA, "Warp Level Matrix Instructions" and "Asynchronous Warpgroup Level Matrix Instructions"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import WARP, Block, Fault, bytes_at
from .numbers import CONVERSIONS

ROW = 16  # bytes of a row of an 8x8 matrix
GROUP = 128  # threads of a warpgroup


def _fragment(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every (warp, lane): the warp, and the row and first column of what it holds of an 8x8 matrix."""
    lane = block.lane.reshape(-1, WARP)
    return np.arange(len(lane))[:, None], lane // 4, 2 * (lane % 4)


def _rows(block: Block, address: Any, count: int, what: str) -> np.ndarray:
    """(warps, count, 8): the addresses of the matrices' rows, given by one lane each."""
    rows = block.addresses(address).reshape(-1, WARP)[:, : 8 * count]
    block.shared.require(rows, ROW, what)
    return rows.reshape(len(rows), count, 8)


def load_matrices(block: Block, address: Any, count: int, transposed: bool) -> list[np.ndarray]:
    rows = _rows(block, address, count, "ldmatrix")
    warp, row, column = _fragment(block)
    places = bytes_at(rows.reshape(-1), ROW)
    data = block.shared.read(places, np.repeat(np.arange(len(rows)), 8 * count)[:, None], "ldmatrix")
    matrices = data.view(np.uint16).reshape(len(rows), count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = (matrices[warp, i, row, column + e] for i in range(count) for e in range(2))
    return [_pack(low, next(pairs)).reshape(-1) for low in pairs]


def store_matrices(block: Block, address: Any, values: list[Any], transposed: bool) -> None:
    rows = _rows(block, address, len(values), "stmatrix")
    warp, row, column = _fragment(block)
    matrices = np.zeros((len(rows), len(values), 8, 8), np.uint16)
    for i, value in enumerate(values):
        for e, half in enumerate(_unpack(block.each(value).reshape(-1, WARP))):
            matrices[warp, i, row, column + e] = half
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, ROW)
    warps = np.repeat(np.arange(len(rows)), 8 * len(values))[:, None]
    block.shared.write(bytes_at(rows.reshape(-1), ROW), warps, data, "stmatrix")


def _pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _unpack(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (pairs & np.uint32(0xFFFF)).astype(np.uint16), (pairs >> np.uint32(16)).astype(np.uint16)


def multiply_exactly(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b, rounded once."""
    return (a.astype(np.float64) @ b.astype(np.float64) + total).astype(np.float32)


def _a_operand(block: Block, registers: list[Any], kind: str) -> np.ndarray:
    """(warps, 16, 16) float32 of four registers."""
    warp, row, column = _fragment(block)
    a = np.zeros((len(warp), 16, 16), np.float32)
    for i, value in enumerate(registers):
        for e, half in enumerate(_unpack(block.each(value).reshape(-1, WARP))):
            a[warp, row + 8 * (i % 2), column + 8 * (i // 2) + e] = CONVERSIONS[kind][0](half)
    return a


def multiply(
    block: Block, shape: str, kind: str, a: list[Any], b: list[Any], c: list[Any]
) -> list[np.ndarray]:
    """mma.sync of a warp: D = A B + C of 16x16 by 16x8."""
    if shape != "m16n8k16":
        raise NotImplementedError(f"mma.sync of {shape}")
    warp, row, column = _fragment(block)
    right = np.zeros((len(warp), 16, 8), np.float32)
    for i, value in enumerate(b):
        for e, half in enumerate(_unpack(block.each(value).reshape(-1, WARP))):
            right[warp, column + 8 * i + e, row] = CONVERSIONS[kind][0](half)
    total = np.zeros((len(warp), 16, 8), np.float32)
    for i, value in enumerate(c):
        total[warp, row + 8 * (i // 2), column + i % 2] = block.each(value).view(np.float32).reshape(-1, WARP)
    total = multiply_exactly(_a_operand(block, a, kind), right, total)
    found = (total[warp, row + 8 * (i // 2), column + i % 2] for i in range(4))
    return [d.reshape(-1).view(np.uint32) for d in found]


def described(descriptor: int, rows: int, is_transposed: bool) -> np.ndarray:
    """(rows, 16) addresses of the elements of an operand in shared memory, of 16 bits each. Transposed: those
    of a column lie side by side."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("wgmma: a base offset")
    swizzle = {0: 0, 1: 7, 2: 3, 3: 1}[descriptor >> 62]  # which of the address's bits 7 to 9 are used
    width = ROW * (swizzle + 1)  # bytes of a row of the pattern that is swizzled
    i, k = np.arange(rows)[:, None], np.arange(16)
    if is_transposed:
        if not swizzle:
            raise NotImplementedError("wgmma: a transposed operand that is not swizzled")
        per_row = width // 2
        places = 2 * (i % per_row) + i // per_row * leading + k % 8 * width + k // 8 * stride
    elif swizzle:
        places = i % 8 * width + i // 8 * stride + 2 * k
    else:
        places = i % 8 * ROW + i // 8 * stride + k // 8 * leading + 2 * (k % 8)
    places = places + start
    return places ^ (places >> 7 & swizzle) << 4


def multiply_async(
    block: Block,
    totals: list[int],
    a: Any,
    b: Any,
    accumulates: Any,
    transposed: tuple[bool, bool],
    columns: int,
    kind: str,
) -> None:
    """wgmma of each warpgroup: D = A Bᵀ (+ D) of 64x16 by `columns` x16.

    Args:
        totals: numbers of D's registers.
        a: numbers of A's registers, or its descriptor in shared memory; b: B's descriptor.
        accumulates: a predicate, or a number: whether D is added.
        transposed: A and B.
    """

    def operand(descriptor: Any, rows: int, is_transposed: bool) -> Callable[[], np.ndarray]:
        """Begins to read each warpgroup's matrix from shared memory; what ends it, (warpgroups, rows, 16)."""
        groups = []
        for own in block.each(descriptor).reshape(-1, GROUP):
            if (own != own[0]).any():
                raise Fault("wgmma: a warpgroup's threads have different descriptors")
            groups.append(bytes_at(described(int(own[0]), rows, is_transposed).reshape(-1), 2))
            block.shared.use(groups[-1], (len(groups) - 1) * GROUP // WARP, "wgmma")

        def end() -> np.ndarray:
            for group, places in enumerate(groups):
                block.shared.end_use(places)
                block.shared.read(places, group * GROUP // WARP, "wgmma")
            data = block.shared.bytes[np.stack(groups)]
            return CONVERSIONS[kind][0](data.view(np.uint16)).reshape(-1, rows, 16)

        return end

    def from_registers() -> np.ndarray:
        return _a_operand(block, [block.registers[i] for i in a], kind).reshape(-1, 64, 16)

    left_operand = from_registers if isinstance(a, list) else operand(a, 64, transposed[0])
    right_operand = operand(b, columns, transposed[1])

    def finish() -> None:
        left, right = left_operand(), right_operand()
        thread = np.arange(GROUP)[:, None]
        i = np.arange(len(totals))
        row = thread // WARP * 16 + thread % WARP // 4 + 8 * (i // 2 % 2)
        column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
        before = np.stack([block.each(block.registers[d]) for d in totals], 1).view(np.float32)
        added = block.each(accumulates)[:, None]
        total = np.zeros((len(left), 64, columns), np.float32)
        total[:, row, column] = np.where(added, before, np.float32(0)).reshape(-1, GROUP, len(totals))
        total = multiply_exactly(left, right.swapaxes(1, 2), total)
        after = total[:, row, column].reshape(-1, len(totals)).view(np.uint32)
        for i, d in enumerate(totals):
            block.registers[d] = after[:, i]

    block.products.open.append(finish)
