"""Tile operations that kernels share: loads of rows as two power-of-two parts, and matmuls over both parts.

`tl.arange` and `tl.dot` need powers of two, which head dims such as 80 and 96 are not. Such a row of D
elements is two tiles, D1 + D2 = 64 + 16 or 64 + 32, instead of being padded to 128. If D is a power of two,
D2 is 0 and the second tile is a placeholder: it is the first one again, and nothing reads it.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(rows, mask, D1: tl.constexpr, D2: tl.constexpr):
    """Loads tiles (n, D1) and (n, D2). rows: pointers to the first elements of n rows; mask: which of them
    exist, None for all."""
    first_pointers = rows[:, None] + tl.arange(0, D1)[None, :]
    second_pointers = rows[:, None] + (D1 + tl.arange(0, D2 if D2 > 0 else D1))[None, :]
    if mask is None:
        first = tl.load(first_pointers)
        second = tl.load(second_pointers) if D2 > 0 else first
    else:
        first = tl.load(first_pointers, mask=mask[:, None], other=0.0)
        second = tl.load(second_pointers, mask=mask[:, None], other=0.0) if D2 > 0 else first
    return first, second


@triton.jit
def store_rows(rows, first, second, mask, D1: tl.constexpr, D2: tl.constexpr):
    """Stores tiles (n, D1) and (n, D2) in the n rows, where the mask allows, in the pointers' dtype."""
    dtype = rows.dtype.element_ty
    tl.store(rows[:, None] + tl.arange(0, D1)[None, :], first.to(dtype), mask=mask[:, None])
    if D2 > 0:
        tl.store(rows[:, None] + (D1 + tl.arange(0, D2))[None, :], second.to(dtype), mask=mask[:, None])


@triton.jit
def dot_rows(a1, a2, b1, b2, D2: tl.constexpr):
    """A Bᵀ over D: (n, D) and (k, D) -> (n, k) in float32."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def sum_rows(a1, a2, b1, b2, D2: tl.constexpr):
    """rowsum(A ∘ B): (n, D) and (n, D) -> (n,) in float32."""
    total = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    if D2 > 0:
        total += tl.sum(a2.to(tl.float32) * b2.to(tl.float32), 1)
    return total


@triton.jit
def accumulate(sum1, sum2, a, b1, b2, D2: tl.constexpr):
    """sum + A B: (n, D) float32, (n, k) and (k, D) -> (n, D) float32. A is rounded to B's dtype."""
    a = a.to(b1.dtype)
    sum1 = tl.dot(a, b1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(a, b2, sum2, input_precision="ieee")
    return sum1, sum2
