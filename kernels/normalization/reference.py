"""Normalisation over the last dimension, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch

KINDS = ("layer", "rms")


def normalize(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ = (x - mean) · rstd (``"layer"``) or x · rstd (``"rms"``), computed in at least float32.

    Args:
        x: (..., d).
        eps: added to the variance (layer) or the mean square (rms).
        kind: ``"layer"`` or ``"rms"``.
        dtype: of the x̂ that is returned.

    Returns:
        x̂ (..., d) in `dtype`, and rstd (..., 1) in at least float32: all that backward needs.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        x_hat, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    else:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        x_hat = x * rstd
    return x_hat.to(dtype), rstd


def normalize_backward(
    grad: torch.Tensor, x_hat: torch.Tensor, rstd: torch.Tensor, kind: str
) -> torch.Tensor:
    """Gradient of x from the gradient of x̂.

    layer: dx = rstd · (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂)); rms: the same without mean(dx̂).

    Args:
        grad: dx̂ (..., d), any floating dtype.
        x_hat, rstd: as `normalize` returned them.
        kind: ``"layer"`` or ``"rms"``.

    Returns:
        dx (..., d) in rstd's dtype.
    """
    grad = grad.to(rstd.dtype)
    x_hat = x_hat.to(rstd.dtype)
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
        return dx.mul_(rstd)
    projection = (grad * x_hat).mean(-1, keepdim=True)
    return (grad - x_hat * projection).mul_(rstd)
