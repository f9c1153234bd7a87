"""Registers launchers as PyTorch operators, each of which torch.compile traces as a single node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

# Never freed: PyTorch would unregister the operators with it.
_LIBRARY = torch.library.Library("vpt_fast", "FRAGMENT")

# Number of active dispatch modes. There is no public API for it; without this one, calls always go through
# PyTorch's dispatcher.
_num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# Tensors of other classes may override dispatch, and need not have memory of their own (FakeTensor, DTensor).
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


def torch_op(
    name: str, *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the operator ``vpt_fast::name``, on every device.

    The same as torch.library.custom_op without its overhead per call, which takes longer than launching the
    kernel: a training step of a ViT-B makes some 120 calls. If nothing observes the call (no compiler,
    tracer, dispatch mode or tensor subclass), the function is called directly, without PyTorch's dispatcher.
    custom_op refuses to differentiate; here `checks.require_device` does. What the operator returns without
    running, under torch.compile, is registered beside it with torch.library.register_fake.

    Args:
        name: without the namespace.
        mutates_args: names of the arguments that the function writes to, and then calls `mark_changed` on; it
            must not change or return any other.

    Returns:
        A decorator, which returns what is to be called instead of the function.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(f"{name}{signature}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operation = getattr(torch.ops.vpt_fast, name).default

        @wraps(function)
        def call(*args: Any) -> Any:
            return operation(*args) if _is_watched(args) else function(*args)

        return call

    return register


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether something observes operators that are called with these arguments."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _num_dispatch_modes() > 0
        or not _PLAIN.issuperset(map(type, args))
    )


@torch.compiler.assume_constant_result  # torch 2.11's Dynamo takes is_exporting() for True in every graph
def is_for_other_programs() -> bool:
    """Whether operators are recorded into a file (torch.export, torch.onnx.export, torch.jit.trace): who
    reads it may not have this package's."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def mark_changed(tensor: torch.Tensor) -> None:
    """Tells autograd that the tensor was written to, so that backward refuses values saved of it before."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
