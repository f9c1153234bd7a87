"""How a launcher becomes one of PyTorch's operations, which torch.compile traces as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._ops import OpOverload

# Never let go of: with it PyTorch would forget the operations.
_LIBRARY = torch.library.Library("vpt_fast", "FRAGMENT")


def torch_op(
    name: str, *, schema: str | None = None, mutates_args: Sequence[str] = ()
) -> Callable[[Callable], OpOverload]:
    """Registers the function below as the operation ``vpt_fast::name``, on every device.

    The same as torch.library.custom_op but for the layers of Python which that puts around each call: they
    take longer than launching the kernel, and a training step of a ViT-B makes some 120 calls. One of them
    refuses to differentiate; here `checks.require_device` does. What the operation returns without running,
    in torch.compile, is registered beside it with torch.library.register_fake.

    Args:
        name: without the namespace.
        schema: "(Tensor x, ...) -> ..."; None: from the function's annotations.
        mutates_args: names of the arguments that it writes into, and then calls `mark_changed` on; others it
            must not change or return.
    """

    def register(function: Callable) -> OpOverload:
        signature = schema or torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(f"{name}{signature}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.vpt_fast, name).default

    return register


def mark_changed(tensor: torch.Tensor) -> None:
    """Tells autograd that an operation has written into the tensor, so that what was saved of it before is
    not taken for what it was."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
