"""The frozen weights of a block, folded once and kept once.

A pre-norm transformer block computes

    h = x + γ1 · (Attention(LN1(x) W_qkv + b_qkv) W_o + b_o)
    y = h + γ2 · (act(LN2(h) W_1 + b_1) W_2 + b_2)

Everything in it that is frozen and linear is folded into the neighbouring matrices, in at least float32:
LN1's affine and the softmax scale into W_qkv, LN2's affine into W_1, the LayerScales γ1, γ2 into W_o, W_2.
With query-key normalisation the softmax scale goes into the query norm's affine instead. Where a norm stands
before W_o or W_2 (EVA-02, BEiT-3), its affine goes into that matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


def require_frozen(*weights: torch.Tensor | None) -> None:
    """Raises ValueError if a frozen weight requires a gradient, which nothing here computes."""
    for weight in weights:  # a loop and not any(...), which takes longer; every block asks in every step
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "backbone: got frozen weights with requires_grad True, whose gradients are not formed; want "
                "requires_grad_(False) on model.backbone, fully_shard instead of FullyShardedDataParallel, "
                "or a method that trains the backbone (docs/methods.md)"
            )


@dataclass(frozen=True)
class NormParts:
    """A normalisation layer as stored in a checkpoint.

    kind: ``"layer"`` or ``"rms"``; weight, bias: (d,) or None.
    """

    kind: str
    eps: float
    weight: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LinearParts:
    """A linear layer as stored in a checkpoint: weight (out, in), bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class BlockParts:
    """One pre-norm transformer block as stored in a checkpoint, before folding.

    `scale1`, `scale2` are the LayerScale vectors (d,) or None; `q_norm`, `k_norm` normalise each head's
    queries and keys over the head dimension; `attn_norm` normalises attention's output over all heads;
    `activation` is one of `kernels.mlp.reference.ACTIVATIONS`, with fc1 giving the gate before the value if
    it is gated; `mlp_norm` normalises the activation's output.
    """

    num_heads: int
    norm1: NormParts
    qkv: LinearParts
    q_norm: NormParts | None
    k_norm: NormParts | None
    attn_norm: NormParts | None
    proj: LinearParts
    scale1: torch.Tensor | None
    norm2: NormParts
    fc1: LinearParts
    activation: str
    mlp_norm: NormParts | None
    fc2: LinearParts
    scale2: torch.Tensor | None


@dataclass(frozen=True)
class BlockSpec:
    """The block's constants that are not tensors. `qk_norm` is None or (kind, q eps, k eps), `attn_norm` and
    `mlp_norm` are None or (kind, eps); `float16_error` is the largest error of rounding a matrix that holds a
    LayerScale to float16, relative to its norm."""

    num_heads: int
    head_dim: int
    norm1: tuple[str, float]
    norm2: tuple[str, float]
    qk_norm: tuple[str, float, float] | None
    attn_norm: tuple[str, float] | None
    activation: str
    mlp_norm: tuple[str, float] | None
    float16_error: float = 0.0

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raises ValueError for matmuls in a dtype that the folded weights do not survive."""
        if dtype == torch.float16 and self.float16_error > _MOST_ROUNDING:
            raise ValueError(
                "dtype: got float16, whose smallest number is 6e-8, and which rounds matrices that hold a "
                f"LayerScale by {self.float16_error:.2g} of their norm; want bfloat16 or float32, as dtype "
                "or of autocast"
            )


# About the relative error of rounding a matrix to bfloat16, which has float32's range.
_MOST_ROUNDING = 2.0**-9


class BlockWeights(NamedTuple):
    """The folded tensors of a block; None where the block has no such term."""

    qkv_weight: torch.Tensor  # (3·H·D, d)
    qkv_bias: torch.Tensor | None
    q_norm_weight: torch.Tensor | None  # (D,)
    q_norm_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_bias: torch.Tensor | None
    proj_weight: torch.Tensor  # (d, H·D)
    proj_bias: torch.Tensor | None
    fc1_weight: torch.Tensor  # (h, d), (2h, d) for a gated activation
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor  # (d, h)
    fc2_bias: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> BlockWeights:
        if all(w is None or w.dtype == dtype for w in self):
            return self
        return BlockWeights(*(None if w is None else w.to(dtype) for w in self))


def fold(parts: BlockParts, dtype: torch.dtype | None = None) -> tuple[BlockSpec, BlockWeights]:
    """Fold a block's frozen affine parts into its matrices.

    Args:
        parts: the block; its tensors are read, never changed.
        dtype: of the result; None keeps the dtype of the block's own weights.

    Returns:
        The block's constants and its folded weights, each a tensor of its own.

    Raises:
        ValueError: only queries or only keys have a norm, or two kinds; weights that `dtype` would lose.
    """
    if (parts.q_norm is None) != (parts.k_norm is None):
        raise ValueError("q_norm and k_norm: got one without the other, want both or neither")
    dtype = dtype or parts.qkv.weight.dtype
    attn_dim = parts.qkv.weight.shape[0] // 3
    head_dim = attn_dim // parts.num_heads
    scale = head_dim**-0.5

    qkv = after_norm(parts.norm1, parts.qkv)
    q_norm: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    k_norm: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    qk_norm = None
    if parts.q_norm is None or parts.k_norm is None:
        qkv.weight[:attn_dim] *= scale
        if qkv.bias is not None:
            qkv.bias[:attn_dim] *= scale
    else:
        if parts.q_norm.kind != parts.k_norm.kind:
            raise ValueError("q_norm and k_norm: got two kinds of norm, want one")
        qk_norm = (parts.q_norm.kind, parts.q_norm.eps, parts.k_norm.eps)
        ones = torch.ones(head_dim, dtype=qkv.weight.dtype, device=qkv.weight.device)
        q_norm = tuple(None if t is None else t * scale for t in _affine(parts.q_norm, ones))  # type: ignore[assignment]
        k_norm = _affine(parts.k_norm, ones)

    attn_norm, mlp_norm = parts.attn_norm, parts.mlp_norm
    proj = _before_scale(parts.proj if attn_norm is None else after_norm(attn_norm, parts.proj), parts.scale1)
    fc1 = after_norm(parts.norm2, parts.fc1)
    fc2 = _before_scale(parts.fc2 if mlp_norm is None else after_norm(mlp_norm, parts.fc2), parts.scale2)
    spec = BlockSpec(
        num_heads=parts.num_heads,
        head_dim=head_dim,
        norm1=(parts.norm1.kind, parts.norm1.eps),
        norm2=(parts.norm2.kind, parts.norm2.eps),
        qk_norm=qk_norm,
        attn_norm=None if attn_norm is None else (attn_norm.kind, attn_norm.eps),
        activation=parts.activation,
        mlp_norm=None if mlp_norm is None else (mlp_norm.kind, mlp_norm.eps),
        float16_error=max(
            0.0 if gamma is None else _float16_error(linear.weight)
            for linear, gamma in ((proj, parts.scale1), (fc2, parts.scale2))
        ),
    )
    spec.require_dtype(dtype)
    weights = BlockWeights(
        qkv.weight, qkv.bias, *q_norm, *k_norm,
        proj.weight, proj.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
    )  # fmt: skip
    return spec, weights.to(dtype)


def _float16_error(weight: torch.Tensor) -> float:
    """The error of rounding a matrix to float16, relative to its norm, from a hundred of its rows or more; 0
    for one without values."""
    if weight.is_meta:
        return 0.0
    weight = weight[:: max(1, weight.shape[0] // 100)]  # all of a ViT-H's would take seconds
    return float((weight - weight.half()).norm() / weight.norm().clamp(min=1e-30))


def _wide(t: torch.Tensor) -> torch.Tensor:
    """A copy of t, detached, in at least float32."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True)


def _affine(norm: NormParts, ones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = ones.clone() if norm.weight is None else _wide(norm.weight)
    return weight, None if norm.bias is None else _wide(norm.bias)


def after_norm(norm: NormParts, linear: LinearParts) -> LinearParts:
    """The linear layer that takes x̂ and returns W (x̂ · w + β) + b."""
    weight = _wide(linear.weight)
    bias = None if linear.bias is None else _wide(linear.bias)
    if norm.bias is not None:
        shift = weight @ _wide(norm.bias)
        bias = shift if bias is None else bias + shift
    if norm.weight is not None:
        weight *= _wide(norm.weight)
    return LinearParts(weight, bias)


def _before_scale(linear: LinearParts, scale: torch.Tensor | None) -> LinearParts:
    """The linear layer that returns γ · (W x + b)."""
    weight = _wide(linear.weight)
    bias = None if linear.bias is None else _wide(linear.bias)
    if scale is not None:
        weight *= _wide(scale).unsqueeze(1)
        bias = None if bias is None else bias * _wide(scale)
    return LinearParts(weight, bias)
