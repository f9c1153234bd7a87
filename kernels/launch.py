"""What launchers of GPU kernels share: which tensors they take, and how builds name them."""

from __future__ import annotations

import torch
import triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
"""Triton's names of dtypes."""


def check_tensor(name: str, t: torch.Tensor) -> None:
    """Raises ValueError for a tensor that kernels do not take: of another dtype, on another device than a
    CUDA one (but for Triton's interpreter), or without a contiguous last dimension."""
    if t.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"backend='triton': {name} is {str(t.dtype).removeprefix('torch.')}, want one of {wanted}"
        )
    if not t.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend='triton': {name} is on {t.device.type}, want a CUDA device")
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"backend='triton': {name} has stride {t.stride(-1)} in its last dimension, want 1"
        )

