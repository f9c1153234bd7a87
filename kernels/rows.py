"""Rows of tensors whose leading dimensions may have any strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_ROWS = 2**31 - 2**11  # row indices are int32, including those of the last program that are past the end


class Rows(NamedTuple):
    """All dimensions but the last of tensors with the same leading shape, merged into at most three.

    Attributes:
        sizes: of the three dimensions, outermost first; missing dimensions come last, with size 1,
            so that Triton's specialisation on 1 removes their arithmetic.
        strides: for each tensor, its strides along those three dimensions, in elements.
    """

    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]

    @property
    def num_rows(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]


def require_contiguous_rows(**tensors: torch.Tensor | None) -> None:
    """ValueError for a tensor whose last dimension is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got stride {tensor.stride(-1)} along the last dimension, want 1")


def leading_rows(**tensors: torch.Tensor) -> Rows:
    """Merges neighbouring leading dimensions wherever the strides of every tensor allow it.

    Raises:
        ValueError: a last dimension that is not contiguous, leading shapes that differ, more than three
            dimensions left, or more than `MAX_ROWS` rows.
    """
    require_contiguous_rows(**tensors)
    first = next(iter(tensors))
    wanted = tensors[first].shape[:-1]
    if wanted.numel() > MAX_ROWS:
        raise ValueError(f"{first}: got {wanted.numel()} rows, want at most {MAX_ROWS}")
    for name, tensor in tensors.items():
        if tensor.shape[:-1] != wanted:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {tuple(wanted)} before the last")
    merged: list[tuple[int, tuple[int, ...]]] = []  # (size, stride of each tensor), outermost first
    for dim, size in enumerate(wanted):
        if size == 1:
            continue
        strides = tuple(tensor.stride(dim) for tensor in tensors.values())
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 3:
        raise ValueError(f"{first}: got {len(merged)} leading dimensions that cannot be merged, want up to 3")
    merged += [(1, (0,) * len(tensors))] * (3 - len(merged))
    size0, size1, size2 = (size for size, _ in merged)
    by_tensor = zip(*(strides for _, strides in merged), strict=True)
    return Rows((size0, size1, size2), tuple((s0, s1, s2) for s0, s1, s2 in by_tensor))


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Element offset, int64, of row number `row` of (size0, size1, size2) rows with free strides."""
    outer = row // size2
    inner = (row % size2).to(tl.int64) * stride2
    return (outer // size1).to(tl.int64) * stride0 + (outer % size1).to(tl.int64) * stride1 + inner
