"""PyTorch's contexts that the engine has to know: autocast, whose casts it does itself, and those in which
its `torch.autograd.Function`s cannot be called, which it refuses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.fx.experimental import proxy_tensor
from torch.utils import _python_dispatch


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turns autocast off: the engine does its own casts."""
    if _is_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # which takes no time


def _is_autocast(device_type: str) -> bool:
    # PyTorch raises if asked about a device without autocast, such as "meta".
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def compute_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: the weights' own, or autocast's, which leaves float64 alone.

    Raises:
        ValueError: the weights have one 16-bit dtype and autocast the other, whose tensors PyTorch does not
            concatenate; or they are whole numbers, or have 8 bits and there is no autocast.
    """
    if not weight_dtype.is_floating_point or (weight_dtype.itemsize < 2 and not _is_autocast(device_type)):
        raise ValueError(
            f"backbone: got weights in {weight_dtype}, want a floating-point dtype of 16 bits or more"
        )
    if not _is_autocast(device_type) or weight_dtype == torch.float64:
        return weight_dtype
    dtype = torch.get_autocast_dtype(device_type)
    if weight_dtype != dtype and weight_dtype.itemsize == dtype.itemsize:
        raise ValueError(
            f"autocast: got {dtype} around a backbone with weights in {weight_dtype}, want autocast to their "
            "dtype, or none"
        )
    return dtype


# There is no public API for these; a PyTorch without them raises its own errors, which name no way out.
_is_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_transforms = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)
_num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_dispatch_modes = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)


def _is_in_forward_ad() -> bool:
    # There is no public API for it either; a PyTorch without this one counts as never in forward mode.
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def require_plain_autograd() -> None:
    """Raises NotImplementedError where the engine's `torch.autograd.Function`s cannot be called."""
    if torch.compiler.is_compiling():
        return
    if _is_in_transform():
        raise NotImplementedError(
            "backbone: torch.func's transforms (grad, vmap, jacrev, ...) do not differentiate frozen blocks; "
            "want torch.autograd.grad, of torch.func.functional_call too"
        )
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "backbone: torch.jit.trace does not record gradients of frozen blocks; want it under "
            "torch.no_grad(), or torch.export"
        )
    if _is_in_forward_ad():
        raise NotImplementedError(
            "backbone: forward-mode differentiation does not pass frozen blocks while gradients are "
            "recorded; want it under torch.no_grad(), with backend='torch'"
        )


def require_no_selective_checkpointing() -> None:
    """Raises NotImplementedError within selective activation checkpointing, which keeps results of operations
    that the blocks change in place: backward would silently compute on the changed ones."""
    if torch.compiler.is_compiling() or _num_dispatch_modes() == 0:
        return
    if any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _dispatch_modes()):
        raise NotImplementedError(
            "backbone: selective activation checkpointing (create_selective_checkpoint_contexts) is not "
            "there for frozen blocks; want torch.utils.checkpoint without context_fn, or memory='recompute'"
        )


def require_no_vmap() -> None:
    """Raises NotImplementedError under `torch.func.vmap`, which does not batch writing prompts' and tokens'
    rows into one tensor."""
    if torch.compiler.is_compiling() or not _is_in_transform():
        return
    if any(transform.key().name == "Vmap" for transform in _transforms() or ()):
        raise NotImplementedError(
            "backbone: torch.func.vmap is not there for frozen blocks with prompts; want the images as one "
            "batch, and a call for each set of prompts"
        )


def require_single_gradient(grad: torch.Tensor) -> None:
    """Raises NotImplementedError in a backward pass of several gradients at once."""
    if not torch.compiler.is_compiling() and _is_batched(grad):
        raise NotImplementedError(
            "backbone: several gradients in one backward pass (is_grads_batched, "
            "torch.autograd.functional.jacobian(vectorize=True)) are not there for frozen blocks; want "
            "one backward pass for each (vectorize=False)"
        )


def require_first_order() -> None:
    """Raises NotImplementedError in a backward pass that autograd records, for second derivatives."""
    # Here and not with `once_differentiable`, whose error comes only if a later backward pass gets to it:
    # torch.autograd.grad takes its outputs for independent of the model's inputs.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "backbone: second derivatives (create_graph=True, torch.autograd.functional.hvp) are not there "
            "for frozen blocks; want create_graph=False"
        )


def require_no_linearize() -> None:
    """Raises NotImplementedError under `torch.func.linearize`, which takes tensors that the blocks write to
    for constants, and would return wrong tangents."""
    if torch.compiler.is_compiling() or not _is_in_forward_ad():
        return
    if proxy_tensor.get_proxy_mode() is not None:
        raise NotImplementedError(
            "backbone: torch.func.linearize is not there for frozen blocks; want torch.func.jvp"
        )


def require_no_forward_ad() -> None:
    """Raises NotImplementedError in forward-mode differentiation, whose tangents kernels do not propagate."""
    if _is_in_forward_ad():
        raise NotImplementedError(
            "backbone: forward-mode differentiation is not there in Triton's kernels; want backend='torch'"
        )
