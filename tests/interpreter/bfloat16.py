"""bfloat16 in Triton's interpreter, as a GPU has it.

NumPy has none, so that the interpreter keeps the bits as integers. By Triton 3.6 and 3.8 it cuts bits off to
convert to it, where a GPU rounds to the nearest, and multiplies the integers. Here conversions are PyTorch's,
products are of the values, summed up in float32 as on tensor cores, and all other arithmetic is refused:
kernels do theirs in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.uint16).numpy()


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def compute_bfloat16() -> None:
    """Changes Triton's interpreter for good."""
    builder = InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_with_bfloat16(self: Any, source: TensorHandle, dst_type: Any) -> TensorHandle:
        if _is_bfloat16(source):
            source = TensorHandle(_to_float32(source.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, dst_type)

    def dot_with_bfloat16(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(_to_float32(t.data), tl.float32) if _is_bfloat16(t) else t for t in (a, b))
        return dot(self, a, b, *rest)

    def refusing(compute: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def call(self: Any, *args: Any) -> TensorHandle:
            if any(_is_bfloat16(arg) for arg in args if isinstance(arg, TensorHandle)):
                raise NotImplementedError("arithmetic of bfloat16 in the interpreter")
            return compute(self, *args)

        return call

    builder.cast_impl, builder.create_dot = cast_with_bfloat16, dot_with_bfloat16
    for name in ("binary_op", "ternary_op", "unary_op"):
        setattr(builder, name, refusing(getattr(builder, name)))
