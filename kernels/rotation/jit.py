"""The kernel that rotates queries or keys in place; backward differs from forward in the sine's sign."""

import triton
import triton.language as tl
from vpt_fast.kernels.rows import row_offset


@triton.jit
def rotate_kernel(
    x,
    sin,  # (num_patches, table_heads, HALF)
    cos,
    num_rows,
    num_patches,
    num_heads,
    table_heads,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,  # a constexpr, so that accesses are wide for any multiple of 8
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # of (images, patches, heads)
    col = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (row < num_rows)[:, None] & (col < HALF)
    head = row % num_heads
    patch = (row // num_heads) % num_patches

    first = x + row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)[:, None] + col
    second = first + HALF
    x1 = tl.load(first, mask, other=0.0).to(tl.float32)
    x2 = tl.load(second, mask, other=0.0).to(tl.float32)
    at = (patch * table_heads + head % table_heads)[:, None] * HALF + col
    s = tl.load(sin + at, mask, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    tl.store(first, (x1 * c - x2 * s).to(x.dtype.element_ty), mask)
    tl.store(second, (x2 * c + x1 * s).to(x.dtype.element_ty), mask)
