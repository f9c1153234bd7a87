"""Checks of the arguments of GPU kernels beyond those on a single tensor; each error names the argument."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


def require_device(**tensors: torch.Tensor | None) -> None:
    """Every tensor on one CUDA device, or on the CPU in Triton's interpreter; ValueError otherwise."""
    wanted = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(f"backend='triton': {name} is on {tensor.device.type}, want a CUDA device")
        wanted = wanted or tensor.device
        if tensor.device != wanted:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, want {wanted} like the others")


def require_dtype(wanted: tuple[torch.dtype, ...], **dtypes: torch.dtype) -> None:
    """ValueError for a dtype that is not one of `wanted`."""
    for name, dtype in dtypes.items():
        if dtype not in wanted:
            raise ValueError(f"{name}: got {dtype}, want one of {', '.join(map(str, wanted))}")


def require_shape(wanted: tuple[int, ...], **tensors: torch.Tensor | None) -> None:
    """ValueError for a tensor of another shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {tuple(wanted)}")


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
