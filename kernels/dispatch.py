"""Which implementation of the operations a block runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vpt_fast.kernels.mlp import reference as mlp
from vpt_fast.kernels.normalization import reference as normalization
from vpt_fast.kernels.prompted_attention import reference as prompted_attention

BACKENDS = ("auto", "torch", "triton")


class Ops(NamedTuple):
    """One complete implementation of the block's operations.

    The signatures and their meaning are those of the functions in the `reference` modules. `needs_out`:
    attention's backward cannot do without attention's output.
    """

    name: str
    normalize: Callable[..., tuple[torch.Tensor, ...]]
    add_normalize: Callable[..., tuple[torch.Tensor, ...]]
    normalize_backward: Callable[..., torch.Tensor]
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attention_backward: Callable[..., Any]
    activate: Callable[..., tuple[torch.Tensor, ...]]
    activate_backward: Callable[..., torch.Tensor]
    needs_out: bool


TORCH_OPS = Ops(
    name="torch",
    normalize=normalization.normalize,
    add_normalize=normalization.add_normalize,
    normalize_backward=normalization.normalize_backward,
    attention=prompted_attention.attention,
    attention_backward=prompted_attention.attention_backward,
    activate=mlp.activate,
    activate_backward=mlp.activate_backward,
    needs_out=False,
)


def get_ops(backend: str) -> Ops:
    """The list of operations that `backend` stands for.

    Args:
        backend: ``"torch"``: plain PyTorch, any device. ``"auto"``: the fastest list that this version has
            for every device, which is ``"torch"``. ``"triton"``: not in this version.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: ``"triton"``; it never falls back to another path in silence.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        raise NotImplementedError(
            "backend='triton': this version of vpt_fast has no Triton kernels; want 'torch' or 'auto'"
        )
    return TORCH_OPS
