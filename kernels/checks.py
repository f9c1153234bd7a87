"""Checks of GPU kernels' arguments, done once for each layout of tensors; each error names the argument."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from vpt_fast.kernels.launch import LEAST_CAPABILITY, takes_kernels

Found = TypeVar("Found")

MOST_LAYOUTS = 1024  # cached per function

_memories: list[dict[Hashable, Any]] = []


def once_per_layout(function: Callable[..., Found]) -> Callable[..., Found]:
    """Caches what `function` returns by the tensors' layout, such as how to launch a kernel on them: a step
    asks for the same layouts over and over, and finding the answer takes longer than the launch.

    The result may depend on the positional arguments, which must be hashable; on dtype, device, shape,
    strides, address modulo 16 bytes and requires_grad of the tensors, which are passed by keyword; on whether
    grad mode is enabled; and, for tensors that are not on a CUDA device, on whether Triton's interpreter is
    on. An argument that the function does not read, such as `pack`, tells apart launches with other pointers.
    """
    known: dict[Hashable, Found] = {}
    _memories.append(known)

    @wraps(function)
    def remembered(*arguments: Hashable, **tensors: torch.Tensor | None) -> Found:
        layouts = [None if t is None else _layout(t) for t in tensors.values()]
        key = (arguments, torch.is_grad_enabled(), *tensors, *layouts)
        try:
            return known[key]
        except KeyError:
            found = function(*arguments, **tensors)
        if len(known) >= MOST_LAYOUTS:
            known.clear()
        known[key] = found
        return found

    return remembered


def forget_layouts() -> None:
    """Empties all of these caches, for callers that change something else that cached results depend on."""
    for known in _memories:
        known.clear()


def _layout(t: torch.Tensor) -> Hashable:
    can_launch = t.is_cuda or triton.knobs.runtime.interpret
    return t.dtype, t.device, can_launch, t.shape, t.stride(), t.data_ptr() % 16, t.requires_grad


def require_device(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one CUDA device that runs the kernels (or on the CPU in
    Triton's interpreter), and unless, in grad mode, none of them requires a gradient."""
    wanted = None
    is_grad_enabled = torch.is_grad_enabled()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if is_grad_enabled and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, and kernels are not differentiated: their callers form it, "
                "want torch.no_grad()"
            )
        if not tensor.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(f"backend='triton': {name} is on {tensor.device.type}, want a CUDA device")
        if tensor.is_cuda and not takes_kernels(tensor.device):
            least = ".".join(map(str, LEAST_CAPABILITY))
            raise ValueError(
                f"backend='triton': {name} is on {torch.cuda.get_device_name(tensor.device)}, want an NVIDIA "
                f"GPU of compute capability {least} or more; 'auto' and 'torch' take any"
            )
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
