"""Elementwise kernels of the MLP's activation, forward and backward, and the functions that epilogues share.

A program processes a block of one row. The launcher treats a contiguous tensor as a single row.
"""

import triton
import triton.language as tl
from vpt_fast.kernels.codes import (
    INTEGER,
    INTEGER_BITS,
    decode_symmetric,
    encode_symmetric,
    symmetric_scale,
)
from vpt_fast.kernels.mlp.reference import CODE_OF_ZERO, CODES_PER_UNIT, QUICK_GELU_SLOPE
from vpt_fast.kernels.rows import row_offset

_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_LOG2_DENSITY_AT_0 = tl.constexpr(-1.3257480647361592)
_TANH_CUBIC = tl.constexpr(0.044715)
_QUICK_SLOPE = tl.constexpr(QUICK_GELU_SLOPE)
_STEPS = tl.constexpr(float(CODES_PER_UNIT))
_ZERO = tl.constexpr(float(CODE_OF_ZERO))
# Contiguous elements per thread: 16 bytes in 16-bit dtypes. By itself Triton chooses 16, for the 8-bit codes,
# and moves 16-bit tensors through shared memory to store them.
_AT_ONCE = tl.constexpr(8)


@triton.jit
def sigmoid(x, SCALE: tl.constexpr, EXACT: tl.constexpr):
    """s = sigmoid(SCALE x) and its derivative s (1 - s), without overflow or loss of small values.

    Without EXACT, for results that are rounded to 16 bits, the error is at most 4e-7. The reciprocal is the
    square of rsqrt, a single instruction: a division takes eight more to handle numbers that are too large or
    too small, and 1 + e is neither unless it is infinite, where s is 0.
    """
    if EXACT:
        x = x * SCALE
        e = tl.exp(-tl.abs(x))
        large = 1.0 / (1.0 + e)
        small = e * large
        return tl.where(x < 0.0, small, large), small * large
    else:
        e = tl.exp2(x * (-_LOG2_E * SCALE))
        root = tl.rsqrt(1.0 + e)
        s = root * root
        return s, s * (tl.minimum(e, 1e37) * s)  # 1 - s = e s, without what 1 - s would cancel


@triton.jit
def normal_cdf(u, EXACT: tl.constexpr):
    """The standard normal CDF and density at u, float32.

    Without EXACT, for results that are rounded to 16 bits, the tail beyond |u| is 2^p(|u|), since its
    logarithm is nearly a polynomial: one exponential, no reciprocal, and half the instructions. p, of degree
    7, was fitted by linear programming on a dense grid of [0, 5.5] to minimise the tail's largest error,
    absolute in units of 1e-6 or relative in units of 3e-5, whichever is larger. It is exact at 0.75179, where
    GELU's derivative is 0, and p decreases on all of [0, ∞), so nothing needs clamping. Evaluated in float32,
    the tail's absolute error is at most 6e-7, its relative error at most 2e-5 up to |u| = 5.5, and from 14.3
    on it is 0.
    """
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(u * _SQRT_HALF)
        density = tl.exp2(u * u * (-0.5 * _LOG2_E)) * _DENSITY_AT_0
    else:
        x = tl.abs(u)
        p = x * -1.199326e-06 + 5.0160317e-05
        p = p * x - 0.0008511906
        p = p * x + 0.008242858
        p = p * x - 0.053525783
        p = p * x - 0.45878062
        p = p * x - 1.1511695
        p = p * x - 0.9999985
        tail = tl.exp2(p)
        cdf = tl.where(u < 0.0, tail, 1.0 - tail)
        density = tl.exp2(u * u * (-0.5 * _LOG2_E) + _LOG2_DENSITY_AT_0)
    return cdf, density


@triton.jit
def activation(u, KIND: tl.constexpr, EXACT: tl.constexpr):
    """act(u) and act'(u), float32, of an activation that is not gated. The compiler drops what is unused."""
    if KIND == "gelu":
        cdf, density = normal_cdf(u, EXACT)
        value = u * cdf
        slope = cdf + u * density
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        s, ds = sigmoid(u + u * u * u * _TANH_CUBIC, 2.0 * _SQRT_2_OVER_PI, EXACT)
        value = u * s
        square = tl.minimum(u * u, 1e30)  # by then ds is 0, and 0 times infinity would be NaN
        slope = s + u * ds * ((1.0 + square * (3.0 * _TANH_CUBIC)) * (2.0 * _SQRT_2_OVER_PI))
    elif KIND == "quick_gelu":
        s, ds = sigmoid(u, _QUICK_SLOPE, EXACT)
        value = u * s
        slope = s + u * ds * _QUICK_SLOPE
    elif KIND == "silu":
        s, ds = sigmoid(u, 1.0, EXACT)
        value = u * s
        slope = s + u * ds
    else:
        tl.static_assert(KIND == "relu")
        value = tl.where(u < 0.0, 0.0, u)  # NaN stays NaN
        slope = tl.where(u > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def encode_derivative(derivative):
    """uint8 codes round(200 · derivative) + 27: steps of 0.005, with 0 and 1 exact.

    Derivatives of the activations here lie in [-0.13, 1.13], codes 1 to 253, so nothing needs clamping.
    """
    return (derivative * _STEPS + (INTEGER + _ZERO)).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def decode_derivative(codes):
    """float32 derivatives of uint8 codes."""
    return ((codes.to(tl.int32) + INTEGER_BITS).to(tl.float32, bitcast=True) - (INTEGER + _ZERO)) * (
        1.0 / _STEPS
    )


@triton.jit
def row_and_start(width, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    """This program's row and the first column of its block, int64, since one row may be a whole tensor.

    ONE_ROW saves the division that finds the row, some forty instructions.
    """
    if ONE_ROW:
        return tl.full((), 0, tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    row = pid // blocks
    return row.to(tl.int64), (pid - row * blocks).to(tl.int64) * BLOCK


@triton.jit
def activate_kernel(
    u,
    a,
    codes,  # or None: none are made
    width,
    size1,
    size2,
    u_stride0,
    u_stride1,
    u_stride2,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    row, start = row_and_start(width, BLOCK, ONE_ROW)
    col = tl.max_contiguous(tl.arange(0, BLOCK), _AT_ONCE)
    mask = col < width - start
    u += row_offset(row, size1, size2, u_stride0, u_stride1, u_stride2) + start
    at = row * width + start  # in the contiguous outputs
    x = tl.load(u + col, mask, other=0.0).to(tl.float32)
    value, slope = activation(x, KIND, EXACT=u.dtype.element_ty == tl.float32)
    tl.store(a + at + col, value.to(a.dtype.element_ty), mask)
    if codes is not None:
        tl.store(codes + at + col, encode_derivative(slope), mask)


@triton.jit
def activate_backward_kernel(
    grad,
    kept,  # the pre-activation, or uint8 codes of the derivative
    grad_u,
    width,
    size1,
    size2,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    kept_stride0,
    kept_stride1,
    kept_stride2,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    row, start = row_and_start(width, BLOCK, ONE_ROW)
    col = tl.max_contiguous(tl.arange(0, BLOCK), _AT_ONCE)
    mask = col < width - start
    grad += row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2) + start
    kept += row_offset(row, size1, size2, kept_stride0, kept_stride1, kept_stride2) + start
    g = tl.load(grad + col, mask, other=0.0).to(tl.float32)
    k = tl.load(kept + col, mask, other=0)
    if kept.dtype.element_ty == tl.uint8:
        slope = decode_derivative(k)
    else:
        _, slope = activation(k.to(tl.float32), KIND, EXACT=grad.dtype.element_ty == tl.float32)
    tl.store(grad_u + row * width + start + col, (g * slope).to(grad_u.dtype.element_ty), mask)


@triton.jit
def swiglu_kernel(
    u,  # (rows, 2 width), gate before value
    a,
    codes,  # or None: none are made; else one block is a whole row
    scale,  # or None, as codes
    width,
    size1,
    size2,
    u_stride0,
    u_stride1,
    u_stride2,
    BLOCK: tl.constexpr,
):
    row, start = row_and_start(width, BLOCK, ONE_ROW=False)
    col = tl.arange(0, BLOCK)
    mask = col < width - start
    u += row_offset(row, size1, size2, u_stride0, u_stride1, u_stride2) + start
    gate = tl.load(u + col, mask, other=0.0).to(tl.float32)
    value = tl.load(u + width + col, mask, other=0.0).to(tl.float32)
    silu, slope = activation(gate, "silu", EXACT=u.dtype.element_ty == tl.float32)
    tl.store(a + row * width + start + col, (silu * value).to(a.dtype.element_ty), mask)
    if codes is not None:
        by_gate = value * slope
        gate_scale = symmetric_scale(tl.max(tl.abs(by_gate), 0))
        value_scale = symmetric_scale(tl.max(tl.abs(silu), 0))
        tl.store(scale + 2 * row, gate_scale)
        tl.store(scale + 2 * row + 1, value_scale)
        codes += 2 * row * width
        tl.store(codes + col, encode_symmetric(by_gate, gate_scale), mask)
        tl.store(codes + width + col, encode_symmetric(silu, value_scale), mask)


@triton.jit
def swiglu_backward_kernel(
    grad,
    kept,  # (rows, 2 width): the pre-activation, or int8 codes of both derivatives where there is a scale
    scale,  # (rows, 2) or None
    grad_u,  # (rows, 2 width)
    width,
    size1,
    size2,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    kept_stride0,
    kept_stride1,
    kept_stride2,
    BLOCK: tl.constexpr,
):
    row, start = row_and_start(width, BLOCK, ONE_ROW=False)
    col = tl.arange(0, BLOCK)
    mask = col < width - start
    grad += row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2) + start
    kept += row_offset(row, size1, size2, kept_stride0, kept_stride1, kept_stride2) + start
    g = tl.load(grad + col, mask, other=0.0).to(tl.float32)
    gate = tl.load(kept + col, mask, other=0)
    value = tl.load(kept + width + col, mask, other=0)
    if scale is not None:
        by_gate = decode_symmetric(gate, tl.load(scale + 2 * row))
        by_value = decode_symmetric(value, tl.load(scale + 2 * row + 1))
    else:
        by_value, slope = activation(gate.to(tl.float32), "silu", EXACT=grad.dtype.element_ty == tl.float32)
        by_gate = value.to(tl.float32) * slope
    grad_u += 2 * row * width + start
    tl.store(grad_u + col, (g * by_gate).to(grad_u.dtype.element_ty), mask)
    tl.store(grad_u + width + col, (g * by_value).to(grad_u.dtype.element_ty), mask)
