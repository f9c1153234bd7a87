"""Arithmetic of PTX on NumPy's arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64


def bfloat16_to_float(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x).astype(U32) << U32(16)).view(np.float32)


def float_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded.astype(U16))


def float16_to_float(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).view(np.float16).astype(np.float32)


def float_to_float16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).view(U16)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once, but for the rare sum that lies next to the middle of two float32."""
    return (np.asarray(a).astype(np.float64) * b + c).astype(np.float32)


def divide(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    """Of integers, towards 0."""
    a, b = np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64)
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) ^ (b < 0), -quotient, quotient).astype(dtype)


def remainder(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    """Of `divide`."""
    return np.asarray(a - b * divide(a, b, dtype)).astype(dtype)


def shift_left(x: np.ndarray, by: np.ndarray, bits: int) -> np.ndarray:
    x = np.asarray(x)
    return np.where(by >= bits, x.dtype.type(0), x << np.asarray(by).astype(x.dtype))


def shift_right(x: np.ndarray, by: np.ndarray, bits: int) -> np.ndarray:
    """Of signed numbers, with copies of the sign."""
    x = np.asarray(x)
    return (
        x >> np.minimum(by, bits - 1).astype(x.dtype)
        if x.dtype.kind == "i"
        else np.where(by >= bits, x.dtype.type(0), x >> np.asarray(by).astype(x.dtype))
    )


def extract_bits(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of 32 bits, of signed numbers with copies of the highest bit."""
    x = np.asarray(x)
    up = (32 - np.asarray(start).astype(np.int64) - length).astype(x.dtype)
    return (x << up) >> (32 - np.asarray(length).astype(np.int64)).astype(x.dtype)


def permute_bytes(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """prmt: four bytes of the eight in a, the low ones, and b; or copies of their signs."""
    both = np.asarray(b).astype(U64) << U64(32) | np.asarray(a).astype(U64)
    found = U32(0)
    for i in range(4):
        selector = np.asarray(selectors) >> U32(4 * i) & U32(0xF)
        byte = (both >> (selector & U32(7)).astype(U64) * U64(8) & U64(0xFF)).astype(U32)
        sign = np.where(byte >= 128, U32(0xFF), U32(0))
        found = found | np.where(selector >= 8, sign, byte) << U32(8 * i)
    return found


def combine(parts: list[np.ndarray], bits: int) -> np.ndarray:
    """A register of parts of `bits` bits, the lowest first."""
    whole = {16: U32, 32: U64}[bits]
    found = whole(0)
    for i, part in enumerate(parts):
        found = found | np.asarray(part).astype(whole) << whole(bits * i)
    return found


def in_pairs(operation: Callable[..., np.ndarray], kind: str, *pairs: np.ndarray) -> np.ndarray:
    """An operation on both halves of registers, as numbers of `kind` (bf16, f16 or f32), rounded once."""
    to_float, from_float = CONVERSIONS[kind]
    bits, half = (32, U32) if kind == "f32" else (16, U16)
    halves = [
        [to_float((np.asarray(p) >> np.asarray(p).dtype.type(shift)).astype(half)) for p in pairs]
        for shift in (0, bits)
    ]
    return combine([from_float(operation(*each)) for each in halves], bits)


CONVERSIONS = {
    "bf16": (bfloat16_to_float, float_to_bfloat16),
    "f16": (float16_to_float, float_to_float16),
    "f32": (lambda x: x.view(np.float32), lambda x: np.asarray(x).view(U32)),
}
"""Of bits to float32, and back."""
