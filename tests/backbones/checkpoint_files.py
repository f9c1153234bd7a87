"""Small files in the formats of the public checkpoints, written from timm models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from tiny import randomise
from torch import Tensor, nn

SMALL_VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=32)
SMALL_SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), img_size=32, window_size=4)
SMALL_CONVNEXT = dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
SMALL_RESNET = dict(layers=(1, 1, 1, 1))


def small(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """A timm model without classifier, every weight random."""
    return randomise(timm.create_model(name, num_classes=0, **arguments), seed)


def small_vit(seed: int = 0, **arguments: Any) -> nn.Module:
    return small("vit_base_patch16_224", seed, **{**SMALL_VIT, **arguments})


def jax_arrays(vit: Any) -> dict[str, np.ndarray]:
    """A ViT's weights as google-research/vision_transformer stores them, with a classifier."""
    dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    t = {name: tensor.numpy() for name, tensor in vit.state_dict().items()}
    arrays = {
        "cls": t["cls_token"],
        "embedding/kernel": t["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": t["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": t["pos_embed"],
        "Transformer/encoder_norm/scale": t["norm.weight"],
        "Transformer/encoder_norm/bias": t["norm.bias"],
        "pre_logits/kernel": np.zeros((dim, dim), np.float32),
        "pre_logits/bias": np.zeros(dim, np.float32),
        "head/kernel": np.zeros((dim, 7), np.float32),
        "head/bias": np.zeros(7, np.float32),
    }
    for i in range(len(vit.blocks)):
        block, where = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{where}/MultiHeadDotProductAttention_1"
        weights = t[f"{block}.attn.qkv.weight"].reshape(3, heads, dim // heads, dim)
        biases = t[f"{block}.attn.qkv.bias"].reshape(3, heads, dim // heads)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.transpose(2, 0, 1)
            arrays[f"{attention}/{part}/bias"] = bias
        out = t[f"{block}.attn.proj.weight"].reshape(dim, heads, dim // heads)
        arrays[f"{attention}/out/kernel"] = out.transpose(1, 2, 0)
        arrays[f"{attention}/out/bias"] = t[f"{block}.attn.proj.bias"]
        for norm, index in (("norm1", 0), ("norm2", 2)):
            arrays[f"{where}/LayerNorm_{index}/scale"] = t[f"{block}.{norm}.weight"]
            arrays[f"{where}/LayerNorm_{index}/bias"] = t[f"{block}.{norm}.bias"]
        for index in (0, 1):
            dense = f"{where}/MlpBlock_3/Dense_{index}"
            arrays[f"{dense}/kernel"] = t[f"{block}.mlp.fc{index + 1}.weight"].T
            arrays[f"{dense}/bias"] = t[f"{block}.mlp.fc{index + 1}.bias"]
    return arrays


def save_jax(vit: nn.Module, path: Path, prefix: str = "") -> Path:
    arrays: dict[str, Any] = {prefix + name: array for name, array in jax_arrays(vit).items()}
    np.savez(path, **arrays)
    return path


def mae(vit: nn.Module) -> dict[str, Any]:
    return {"model": vit.state_dict()}


def mae_with_decoder(vit: nn.Module) -> dict[str, Any]:
    beside = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 32)}
    return {"model": {**vit.state_dict(), **beside}}


def moco_pretrained(vit: nn.Module) -> dict[str, Any]:
    state: dict[str, Tensor] = {}
    for name, tensor in {**vit.state_dict(), "head.0.weight": torch.zeros(4, 32)}.items():
        state[f"module.base_encoder.{name}"] = tensor
        state[f"module.momentum_encoder.{name}"] = tensor + 1
    state["module.predictor.0.weight"] = torch.zeros(4, 4)
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}}}


def moco_linear(vit: nn.Module) -> dict[str, Any]:
    state = {f"module.{name}": tensor for name, tensor in vit.state_dict().items()}
    head = {"module.head.weight": torch.zeros(1000, 32), "module.head.bias": torch.zeros(1000)}
    return {"epoch": 90, "state_dict": {**state, **head}, "best_acc1": torch.tensor(76.7)}


def swin(model: nn.Module) -> dict[str, Any]:
    """The authors' files merge patches at the end of a stage, and hold buffers."""
    state = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): tensor
        for name, tensor in model.state_dict().items()
    }
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    state |= {"head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}
    return {"model": state}


def convnext(model: nn.Module) -> dict[str, Any]:
    renames = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
    )
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    state |= {"head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}
    return {"model": state}


def torchvision_resnet(model: nn.Module) -> dict[str, Any]:
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    return {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
