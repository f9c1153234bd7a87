"""How a launcher becomes one of PyTorch's operations, which torch.compile traces as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

# Never let go of: with it PyTorch would forget the operations.
_LIBRARY = torch.library.Library("vpt_fast", "FRAGMENT")

# How many dispatch modes are on. Nothing public says it: a PyTorch without this is one that always looks on.
_num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# A tensor of another class may dispatch by itself, and need not have memory of its own (FakeTensor, DTensor).
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype))


def torch_op(
    name: str, *, schema: str | None = None, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the function below as the operation ``vpt_fast::name``, on every device.

    The same as torch.library.custom_op but for what that puts around each call, which takes longer than
    launching the kernel: a training step of a ViT-B makes some 120 calls. Where nobody looks on, neither a
    compiler nor a tracer nor a dispatch mode nor a tensor's class, not even PyTorch's dispatcher is asked,
    and the function is called itself.
    custom_op refuses to differentiate; here `checks.require_device` does. What the operation returns without
    running, in torch.compile, is registered beside it with torch.library.register_fake.

    Args:
        name: without the namespace.
        schema: "(Tensor x, ...) -> ..."; None: from the function's annotations.
        mutates_args: names of the arguments that it writes into, and then calls `mark_changed` on; others it
            must not change or return.

    Returns:
        What is called in the function's place.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = schema or torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(f"{name}{signature}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operation = getattr(torch.ops.vpt_fast, name).default

        @wraps(function)
        def call(*args: Any) -> Any:
            return operation(*args) if _is_watched(args) else function(*args)

        return call

    return register


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see operations on these."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _num_dispatch_modes() > 0
        or not _PLAIN.issuperset(map(type, args))
    )


def mark_changed(tensor: torch.Tensor) -> None:
    """Tells autograd that an operation has written into the tensor, so that what was saved of it before is
    not taken for what it was."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
