"""Kernels that normalise rows, forward and backward. A program holds its rows in registers throughout."""

import triton
import triton.language as tl
from vpt_fast.kernels.codes import decode_symmetric, encode_symmetric, symmetric_scale
from vpt_fast.kernels.rows import row_offset


@triton.jit
def normalize_kernel(
    x,
    update,  # or None: no addition
    hidden,  # or None, as update
    x_hat,
    rstd,
    codes,  # or None: none are made
    scale,  # or None, as codes
    num_rows,
    d,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    update_stride0,
    update_stride1,
    update_stride2,
    eps,
    LAYER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)[None, :]
    row_mask = row < num_rows
    col_mask = col < d
    mask = row_mask[:, None] & col_mask
    at = row.to(tl.int64)[:, None] * d + col  # in the contiguous outputs

    x_at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)[:, None] + col
    h = tl.load(x + x_at, mask, other=0.0).to(tl.float32)
    if update is not None:
        update_at = (
            row_offset(row, size1, size2, update_stride0, update_stride1, update_stride2)[:, None] + col
        )
        h += tl.load(update + update_at, mask, other=0.0).to(tl.float32)
        # The sum is normalised as it is stored, rounded to the residual's dtype.
        stored = h.to(hidden.dtype.element_ty)
        tl.store(hidden + at, stored, mask)
        h = stored.to(tl.float32)

    if LAYER:
        mean = tl.sum(h, 1) / d
        h = tl.where(col_mask, h - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(h * h, 1) / d + eps)
    h *= r[:, None]
    tl.store(rstd + row, r, row_mask)
    tl.store(x_hat + at, h.to(x_hat.dtype.element_ty), mask)
    if codes is not None:
        s = symmetric_scale(tl.max(tl.abs(h), 1))
        tl.store(scale + row, s, row_mask)
        tl.store(codes + at, encode_symmetric(h, s[:, None]), mask)


@triton.jit
def normalize_backward_kernel(
    grad,
    x_hat,  # int8 codes where there is a scale
    rstd,
    scale,  # or None
    residual,  # or None
    dx,
    num_rows,
    d,
    size1,
    size2,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    x_hat_stride0,
    x_hat_stride1,
    x_hat_stride2,
    residual_stride0,
    residual_stride1,
    residual_stride2,
    LAYER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)[None, :]
    row_mask = row < num_rows
    mask = row_mask[:, None] & (col < d)

    grad_at = row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)[:, None] + col
    g = tl.load(grad + grad_at, mask, other=0.0).to(tl.float32)
    x_hat_at = row_offset(row, size1, size2, x_hat_stride0, x_hat_stride1, x_hat_stride2)[:, None] + col
    if scale is not None:
        s = tl.load(scale + row, row_mask, other=0.0)
        h = decode_symmetric(tl.load(x_hat + x_hat_at, mask, other=0), s[:, None])
    else:
        h = tl.load(x_hat + x_hat_at, mask, other=0.0).to(tl.float32)
    r = tl.load(rstd + row, row_mask, other=0.0)

    out = g - h * (tl.sum(g * h, 1) / d)[:, None]
    if LAYER:
        out -= (tl.sum(g, 1) / d)[:, None]
    out *= r[:, None]
    if residual is not None:
        at = (
            row_offset(row, size1, size2, residual_stride0, residual_stride1, residual_stride2)[:, None] + col
        )
        out += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    tl.store(dx + row.to(tl.int64)[:, None] * d + col, out.to(dx.dtype.element_ty), mask)
