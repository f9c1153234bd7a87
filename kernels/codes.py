"""int8 codes of numbers in kernels, with one scale for a row, and the conversion that 8-bit codes share."""

import triton
import triton.language as tl

# Adding 1.5 · 2^23 to a float32 of magnitude below 2^22 leaves no bits for a fraction: the sum is rounded to
# the nearest integer, ties to even, and its lowest bits are that integer in two's complement. Converting
# through the bits thus costs one addition; the hardware's conversions run at a quarter of that rate.
INTEGER = tl.constexpr(12582912.0)
INTEGER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def symmetric_scale(largest):
    """The scale of int8 codes for magnitudes up to `largest`; 0 where its inverse would overflow."""
    scale = largest * (1.0 / 127.0)
    return tl.where(scale > 1.2e-38, scale, 0.0)


@triton.jit
def encode_symmetric(x, scale):
    """int8 codes round(x / scale); 0 where the scale is 0."""
    inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
    return (x * inverse + INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def decode_symmetric(codes, scale):
    """float32 values of int8 codes."""
    return ((codes.to(tl.int32) + INTEGER_BITS).to(tl.float32, bitcast=True) - INTEGER) * scale
