"""MLP activations, forward and backward, in plain PyTorch.

`PACKED` activations are gated linear units: they take (..., 2h), gate before value, and give (..., h).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
PACKED = ("swiglu",)

_QUICK_GELU_SLOPE = 1.702  # x · sigmoid(1.702 x): CLIP's approximation of GELU (Hendrycks & Gimpel, 2016)


def activate(u: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation `kind` of the pre-activation `u`.

    Args:
        u: (..., h), or (..., 2h) for a packed kind.
        kind: one of `ACTIVATIONS`.

    Returns:
        (..., h), dtype of `u`.
    """
    if kind == "gelu":
        return F.gelu(u)
    if kind == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if kind == "quick_gelu":
        return u * torch.sigmoid(_QUICK_GELU_SLOPE * u)
    if kind == "silu":
        return F.silu(u)
    if kind == "relu":
        return F.relu(u)
    if kind == "swiglu":
        gate, value = u.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, ACTIVATIONS))}")


def activate_backward(grad: torch.Tensor, u: torch.Tensor, kind: str) -> torch.Tensor:
    """Gradient of the pre-activation.

    Args:
        grad: gradient of the activation's output (..., h).
        u: the pre-activation that `activate` was given: the one tensor that is kept for backward.
        kind: one of `ACTIVATIONS`.

    Returns:
        gradient of `u`, of its shape.
    """
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(grad, u)
    if kind == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, u, approximate="tanh")
    if kind == "quick_gelu":
        s = torch.sigmoid(_QUICK_GELU_SLOPE * u)
        return grad * (s + _QUICK_GELU_SLOPE * u * s * (1 - s))
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, u)
    if kind == "relu":
        return grad * (u > 0)
    if kind == "swiglu":
        gate, value = u.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return torch.cat((grad_gate, grad * F.silu(gate)), dim=-1)
    raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, ACTIVATIONS))}")
