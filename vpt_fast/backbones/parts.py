"""From the layers of timm's blocks, of any of its families, to `engine.weights.BlockParts`.

Variants of timm's that are not supported raise; nothing is approximated.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from timm.layers import GELU, GELUTanh, GluMlp, LayerScale, Mlp, QuickGELU, RmsNorm, SwiGLU
from torch import nn

from vpt_fast.backbones.layers import class_name, current, dtype_of, linear_parts, require_usual_scale
from vpt_fast.engine.weights import LinearParts, NormParts


def check_attention(attn: Any, kinds: tuple[type[nn.Module], ...], where: str) -> None:
    """Raises ValueError for attention of another class, or with a part that is not supported."""
    if type(attn) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where} is a {class_name(attn)}, which is not supported; want timm's {wanted}")
    require_usual_scale(attn, attn.head_dim, where)
    if attn.gate is not None:
        raise ValueError(f"{where} has an output gate, which is not supported")


def norm_parts(norm: nn.Module, where: str) -> NormParts:
    """The kind, eps and affine of a norm over the last dimension; ValueError for another kind of norm."""
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        return NormParts("layer", norm.eps, current(norm, "weight"), current(norm, "bias"))
    if isinstance(norm, (RmsNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
        # For eps None, torch's RMSNorm uses the machine epsilon of its input's dtype, here float32, or
        # float64 if the weights are.
        wide = torch.promote_types(dtype_of(norm, default=torch.float32), torch.float32)
        eps = torch.finfo(wide).eps if norm.eps is None else norm.eps
        return NormParts("rms", eps, current(norm, "weight"), None)
    raise ValueError(f"{where} is a {type(norm).__name__}, which is not supported; want LayerNorm or RMSNorm")


def optional_norm_parts(norm: nn.Module, where: str) -> NormParts | None:
    """As `norm_parts`; None for an nn.Identity."""
    return None if isinstance(norm, nn.Identity) else norm_parts(norm, where)


def layer_scale(scale: nn.Module, where: str) -> torch.Tensor | None:
    """The vector (d,) of a LayerScale, None for an nn.Identity; ValueError for anything else."""
    if isinstance(scale, nn.Identity):
        return None
    if isinstance(scale, LayerScale):
        return scale.gamma
    raise ValueError(f"{where} is a {type(scale).__name__}, which is not supported; want LayerScale")


def _activation(act: Any, where: str) -> str:
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    names: dict[type, str] = {
        GELU: "gelu",
        GELUTanh: "gelu_tanh",
        QuickGELU: "quick_gelu",
        nn.SiLU: "silu",
        nn.ReLU: "relu",
    }
    if type(act) not in names:
        raise ValueError(f"{where}.act is a {type(act).__name__}, which is not supported")
    return names[type(act)]


def qkv_parts(attn: Any, where: str) -> LinearParts:
    """The packed qkv projection of an Eva's or a Beit's attention, where it may be packed or separate, with
    bias on all, some or none."""
    if attn.qkv is None:
        names = ("q_proj", "k_proj", "v_proj")
        return join(*(linear_parts(getattr(attn, name), f"{where}.{name}") for name in names))
    qkv = linear_parts(attn.qkv, f"{where}.qkv")
    if getattr(attn, "q_bias", None) is None:
        return qkv
    return LinearParts(qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))


class MLPParts(TypedDict):
    """The MLP's fields of `BlockParts`. In fc1 a gate, if there is one, comes before the value."""

    fc1: LinearParts
    activation: str
    mlp_norm: NormParts | None
    fc2: LinearParts


def mlp_parts(mlp: Any, where: str) -> MLPParts:
    """The layers of an MLP; ValueError for a class, an activation or a gate that is not supported."""
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise ValueError(
            f"{where} is a {type(mlp).__name__}, which is not supported; want timm's Mlp, GluMlp or SwiGLU"
        )
    activation = _activation(mlp.act, where)
    if type(mlp) is Mlp:
        fc1 = linear_parts(mlp.fc1, f"{where}.fc1")
    else:
        if activation != "silu":
            raise ValueError(f"{where} is gated by {activation}, which is not supported; want SiLU (SwiGLU)")
        activation = "swiglu"
        if type(mlp) is SwiGLU:
            fc1 = join(linear_parts(mlp.fc1_g, f"{where}.fc1_g"), linear_parts(mlp.fc1_x, f"{where}.fc1_x"))
        else:
            fc1 = linear_parts(mlp.fc1, f"{where}.fc1")
            if mlp.gate_last:
                fc1 = join(*(_half(fc1, half) for half in (1, 0)))
    return MLPParts(
        fc1=fc1,
        activation=activation,
        mlp_norm=optional_norm_parts(mlp.norm, f"{where}.norm"),
        fc2=linear_parts(mlp.fc2, f"{where}.fc2"),
    )


def _half(linear: LinearParts, half: int) -> LinearParts:
    bias = None if linear.bias is None else linear.bias.chunk(2)[half]
    return LinearParts(linear.weight.chunk(2)[half], bias)


def join(*layers: LinearParts) -> LinearParts:
    """Joins linear layers with the same input into one; if only some have a bias, the others' is zero."""
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat(
            [
                layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
                for layer in layers
            ]
        )
    return LinearParts(torch.cat([layer.weight for layer in layers]), bias)
