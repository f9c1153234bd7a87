"""Rotation of queries and keys by their positions (Su et al., RoFormer, 2021), in plain PyTorch.

Dimensions i and i + D/2 of a head are the two coordinates of a point in a plane. A patch rotates the point by
an angle that depends on the patch's position and on i, so that dot products of queries and keys depend on
their relative positions. Other layouts, which pair i and i + 1, are converted to this one when the frozen
projection is read: dot products do not depend on the order of the dimensions.
"""

from __future__ import annotations

import torch


def rotate_(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, *, inverse: bool = False) -> None:
    """Rotates the rows of x in place, computed in at least float32.

    With x = [x1, x2]:  x1 ← x1 · cos - x2 · sin,  x2 ← x2 · cos + x1 · sin.  The gradient of x is that of the
    result, rotated back.

    Args:
        x: (B, P, H, D), queries or keys of P patches, in any strides.
        sin, cos: (P, 1 or H, D/2), of the angles; the same for all heads, or each head's own.
        inverse: rotate by the opposite angles.
    """
    first, second = x.chunk(2, dim=-1)
    if inverse:
        sin = -sin
    # Written at once: in an ONNX file every write scatters element by element.
    turned = (first * cos - second * sin, second * cos + first * sin)
    x.copy_(torch.cat([half.to(x.dtype) for half in turned], dim=-1))
