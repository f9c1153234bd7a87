"""MLP activations, forward and backward, in plain PyTorch.

`GATED` activations are gated linear units: they take (..., 2h), gate before value, and return (..., h).

For backward either the pre-activation is kept, or its local derivative in 8 bits. An activation's derivative
lies in about [-0.13, 1.13], so its codes are uniform, in steps of 1/200, with 0 and 1 exact. The two
derivatives of a gated unit are unbounded, so each gets one scale per row.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
GATED = ("swiglu",)

QUICK_GELU_SLOPE = 1.702  # x · sigmoid(1.702 x): CLIP's approximation of GELU (Hendrycks & Gimpel, 2016)

CODES_PER_UNIT = 200
CODE_OF_ZERO = 27
"""code = 200 · derivative + 27 in a uint8: derivatives from -0.135 to 1.14."""
GATED_CODE_MAX = 127


def activate(
    u: torch.Tensor, kind: str, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The activation `kind` of the pre-activation `u`.

    Args:
        u: (..., h), or (..., 2h) for a gated kind.
        kind: one of `ACTIVATIONS`.
        pack: also return the local derivative in 8 bits, for backward.

    Returns:
        The activation's output (..., h) in u's dtype; with `pack` the derivative's codes, of u's shape,
        uint8, else None; for a gated kind the codes are int8, with a scale (..., 2) in at least float32 for
        the two halves of each row, else None.

    Raises:
        ValueError: an unknown kind.
    """
    if not pack:
        return _activate(u, kind), None, None
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    if kind in GATED:
        ones = torch.ones_like(wide[..., : wide.shape[-1] // 2])
        halves = activate_backward(ones, wide, None, kind).unflatten(-1, (2, -1))
        scale = halves.abs().amax(-1) / GATED_CODE_MAX
        codes = (halves / torch.where(scale > 0, scale, 1).unsqueeze(-1)).round()
        return _activate(u, kind), codes.flatten(-2).to(torch.int8), scale
    derivative = activate_backward(torch.ones_like(wide), wide, None, kind)
    codes = (derivative * CODES_PER_UNIT).round().add_(CODE_OF_ZERO).clamp_(0, 255)
    return _activate(u, kind), codes.to(torch.uint8), None


def _activate(u: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "gelu":
        return F.gelu(u)
    if kind == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    if kind == "quick_gelu":
        return u * torch.sigmoid(QUICK_GELU_SLOPE * u)
    if kind == "silu":
        return F.silu(u)
    if kind == "relu":
        return F.relu(u)
    if kind == "swiglu":
        gate, value = u.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, ACTIVATIONS))}")


def activate_(u: torch.Tensor, kind: str, *, pack: bool = False) -> torch.Tensor | None:
    """`activate` in place: the pre-activation becomes the activation's output.

    Args:
        u: contiguous (..., h).
        kind, pack: as of `activate`; not a gated kind, whose input is wider than its output.

    Returns:
        With `pack` the derivative's codes, else None.

    Raises:
        ValueError: an unknown or a gated kind.
    """
    _refuse_gated(kind)
    if kind in ("gelu", "gelu_tanh") and not pack:
        torch.ops.aten.gelu_(u, approximate="tanh" if kind == "gelu_tanh" else "none")
        return None
    output, codes, _ = activate(u, kind, pack=pack)
    u.copy_(output)
    return codes


def activate_backward(
    grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """Gradient of the pre-activation.

    Args:
        grad: gradient of the activation's output (..., h).
        kept: the pre-activation that `activate` was given, or the codes that it returned.
        scale: as `activate` returned it.
        kind: one of `ACTIVATIONS`.

    Returns:
        gradient of the pre-activation, of its shape, in grad's dtype.

    Raises:
        ValueError: an unknown kind.
    """
    if kept.dtype == torch.uint8:
        return (grad * ((kept.to(_wide(grad)) - CODE_OF_ZERO) / CODES_PER_UNIT)).to(grad.dtype)
    if kept.dtype == torch.int8:
        halves = kept.unflatten(-1, (2, -1)).to(_wide(grad)) * scale.unsqueeze(-1)
        return (grad.unsqueeze(-2) * halves).flatten(-2).to(grad.dtype)
    u = kept
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(grad, u)
    if kind == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, u, approximate="tanh")
    if kind == "quick_gelu":
        s = torch.sigmoid(QUICK_GELU_SLOPE * u)
        return grad * (s + QUICK_GELU_SLOPE * u * s * (1 - s))
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, u)
    if kind == "relu":
        return grad * (u > 0)
    if kind == "swiglu":
        gate, value = u.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return torch.cat((grad_gate, grad * F.silu(gate)), dim=-1)
    raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, ACTIVATIONS))}")


def activate_backward_(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    """`activate_backward` in place: overwrites the gradient of the activation's output by that of its input.

    Args:
        grad: contiguous (..., h).
        kept, kind: as of `activate_backward`; not a gated kind, whose input is wider than its output.

    Raises:
        ValueError: an unknown or a gated kind.
    """
    _refuse_gated(kind)
    if kept.dtype != torch.uint8 and kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, kept, approximate=approximate, grad_input=grad)
    else:
        grad.copy_(activate_backward(grad, kept, None, kind))


def _refuse_gated(kind: str) -> None:
    if kind in GATED:
        raise ValueError(f"activation: got {kind!r} in place, want one that is not gated")


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
