"""Normalisation over the last dimension, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch

KINDS = ("layer", "rms")

CODE_MAX = 127
"""Packed x̂ is int8: codes from -127 to 127 and one scale per row."""


def normalize(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x̂ = (x - mean) · rstd (``"layer"``) or x · rstd (``"rms"``), computed in at least float32.

    Args:
        x: (..., d).
        eps: added to the variance (layer) or the mean square (rms).
        kind: ``"layer"`` or ``"rms"``.
        dtype: of the x̂ that is returned.
        pack: also return x̂ in 8 bits, for backward.

    Returns:
        x̂ (..., d) in `dtype` and rstd (..., 1) in at least float32, which are all that backward needs. With
        `pack` also codes (..., d), int8, and scale (..., 1) in at least float32, where x̂ ≈ codes · scale and
        the largest code of a row is ±127; else None and None.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        x_hat, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    else:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x_hat = x * rstd
    codes = scale = None
    if pack:
        scale = x_hat.abs().amax(-1, keepdim=True) / CODE_MAX
        codes = (x_hat / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    return x_hat.to(dtype), rstd, codes, scale


def add_normalize(
    residual: torch.Tensor,
    update: torch.Tensor,
    eps: float,
    kind: str,
    dtype: torch.dtype,
    *,
    pack: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """hidden = residual + update, and its normalisation.

    Args:
        residual: (..., d), any floating dtype.
        update: (..., d), any floating dtype.
        eps, kind, dtype, pack: as for `normalize`.

    Returns:
        hidden (..., d) in residual's dtype, and what `normalize` returns for it.
    """
    hidden = (residual + update).to(residual.dtype)
    return hidden, *normalize(hidden, eps, kind, dtype, pack=pack)


def normalize_backward(
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    kind: str,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Gradient of x from the gradient of x̂.

    layer: dx = rstd · (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂)); rms: the same without mean(dx̂).

    Args:
        grad: dx̂ (..., d), any floating dtype.
        x_hat: as `normalize` returned it: x̂, or its int8 codes.
        rstd: as `normalize` returned it.
        scale: of the codes; None with x̂ itself.
        kind: ``"layer"`` or ``"rms"``.
        residual: (..., d), a gradient to add to the result, or None.
        dtype: of the result; None for rstd's.

    Returns:
        dx (..., d) in `dtype`, rounded once.
    """
    grad = grad.to(rstd.dtype)
    x_hat = x_hat.to(rstd.dtype)
    if scale is not None:
        x_hat = x_hat * scale
    if kind == "layer":
        # native_layer_norm_backward re-normalises its input with the mean and rstd it is handed. Given x̂,
        # mean 0 and rstd 1 it therefore leaves x̂ alone, and all of the sums are one fused pass; its result
        # lacks only the true rstd.
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad,
            x_hat,
            x_hat.shape[-1:],
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            None,
            None,
            [True, False, False],
        )
    else:
        dx = grad - x_hat * (grad * x_hat).mean(-1, keepdim=True)
    dx = dx.mul_(rstd)
    if residual is not None:
        dx = dx.add_(residual)
    return dx if dtype is None else dx.to(dtype)
