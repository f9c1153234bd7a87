"""Tile operations that kernels share: loads of rows as two power-of-two parts, and matmuls over both parts.

`tl.arange` and `tl.dot` need powers of two, which head dims such as 80 are not. Such a row of D elements is
two tiles, for example 64 + 16, instead of one of 128. Where the tiles are wider than the row, as for D = 72,
the columns past its end are zeros. If the row is one tile, the second is a placeholder: it is the first one
again, and nothing reads it.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def first_width(D):
    """Columns of the first tile of a row of D elements.

    64 < D <= 96 are two tiles, the second of 16 or 32 columns. As 32 + 16, rows of 48 spilled on sm_100.
    """
    return 64 if 64 < D <= 96 else max(16, triton.next_power_of_2(D))


@triton.constexpr_function
def second_width(D):
    """Columns of the second tile; 0 if the first holds the row."""
    rest = D - first_width(D)
    return max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@triton.jit
def load_rows(rows, mask, D: tl.constexpr, offsets=0):
    """Loads the two tiles of n rows.

    rows: pointers to their first elements, or to what these are `offsets` (n, 1) elements after. mask: which
    rows exist, None for all.
    """
    D1: tl.constexpr = first_width(D)
    D2: tl.constexpr = second_width(D)
    first = load_columns(rows, offsets, mask, 0, D1, D)
    second = load_columns(rows, offsets, mask, D1, D2, D) if D2 > 0 else first
    return first, second


@triton.jit
def load_columns(rows, offsets, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Loads WIDTH columns from START on; those past D are zeros."""
    columns = START + tl.arange(0, WIDTH)[None, :]
    pointers = rows[:, None] + (offsets + columns)
    if mask is None:
        if START + WIDTH <= D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=columns < D, other=0.0)
    elif START + WIDTH <= D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (columns < D), other=0.0)


@triton.jit
def store_rows(rows, first, second, mask, D: tl.constexpr):
    """Stores the two tiles of n rows, where the mask allows, in the pointers' dtype."""
    D1: tl.constexpr = first_width(D)
    D2: tl.constexpr = second_width(D)
    store_columns(rows, first, mask, 0, D1, D)
    if D2 > 0:
        store_columns(rows, second, mask, D1, D2, D)


@triton.jit
def store_columns(rows, values, mask, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Stores WIDTH columns from START on, but for those past D."""
    columns = START + tl.arange(0, WIDTH)[None, :]
    mask = mask[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)
    tl.store(rows[:, None] + columns, values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(n: tl.constexpr, D: tl.constexpr):
    """Two tiles of n rows of zeros in float32."""
    D1: tl.constexpr = first_width(D)
    D2: tl.constexpr = second_width(D)
    return tl.zeros((n, D1), tl.float32), tl.zeros((n, D2 if D2 > 0 else D1), tl.float32)


@triton.jit
def dot_rows(a1, a2, b1, b2, D: tl.constexpr):
    """A Bᵀ over D: (n, D) and (k, D) -> (n, k) in float32."""
    D2: tl.constexpr = second_width(D)
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def sum_rows(a1, a2, b1, b2, D: tl.constexpr):
    """rowsum(A ∘ B): (n, D) and (n, D) -> (n,) in float32."""
    D2: tl.constexpr = second_width(D)
    total = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    if D2 > 0:
        total += tl.sum(a2.to(tl.float32) * b2.to(tl.float32), 1)
    return total


@triton.jit
def accumulate(sum1, sum2, a, b1, b2, D: tl.constexpr):
    """sum + A B: (n, D) float32, (n, k) and (k, D) -> (n, D) float32. A is rounded to B's dtype."""
    D2: tl.constexpr = second_width(D)
    a = a.to(b1.dtype)
    sum1 = tl.dot(a, b1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(a, b2, sum2, input_precision="ieee")
    return sum1, sum2
