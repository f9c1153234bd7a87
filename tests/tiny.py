"""Small random backbones and batches for tests."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, trained_only: bool = False) -> nn.Module:
    """Fills every parameter, or those that require a gradient, with random values of a sensible size, norm
    affines, biases and LayerScales too.

    Freshly built layers start with affines of one and biases of zero, which would hide a folding mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if name.endswith(("gamma", "gamma_1", "gamma_2")):  # LayerScale
            parameter.copy_(0.7 + 0.3 * noise)
        elif name.endswith("weight") and parameter.dim() == 1:  # a norm's
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif name.endswith("weight"):
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:  # positions, CLS, registers, prompts
            parameter.copy_(0.5 * noise)
    return module


_VIT: dict[str, Any] = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, num_classes=0
)


def tiny_vit(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    kind: type[VisionTransformer] = VisionTransformer,
    **arguments,
) -> VisionTransformer:
    """A timm VisionTransformer of width 32 with 3 blocks for 32x32 images, every weight random."""
    vit = kind(**(_VIT | arguments))
    randomise(vit, seed)
    return vit.to(dtype).eval()


def tiny_distilled(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments) -> VisionTransformer:
    """`tiny_vit` as timm's class of DeiT's distilled models: with a distillation token beside CLS."""
    return tiny_vit(dtype, seed, VisionTransformerDistilled, **arguments)


def tiny_eva(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments) -> Eva:
    """A timm Eva of width 32 with 3 blocks for 32x32 images, every weight random. Built in `dtype`, as timm
    keeps the angles of rotary positions in the dtype that a model is built in."""
    eva = Eva(**(_VIT | {"use_rot_pos_emb": True} | arguments), dtype=dtype)
    randomise(eva, seed)
    return eva.eval()


def tiny_beit(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments: Any) -> Beit:
    """A timm Beit of width 32 with 3 blocks for 32x32 images, every weight random."""
    defaults = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    return randomise(Beit(**(_VIT | defaults | arguments)), seed).to(dtype).eval()


def tiny_swin(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments: Any) -> SwinTransformer:
    """Two stages, 8x8 tokens of width 16 and then 4x4 of 32, in windows of 4x4, every weight random."""
    defaults: dict[str, Any] = dict(
        img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2, num_classes=0
    )
    swin = SwinTransformer(**(defaults | arguments))
    randomise(swin, seed)
    return swin.to(dtype).eval()


_CONVNETS: dict[str, Any] = {  # narrow; others are as timm has them
    "resnet10t": dict(stem_width=8, channels=[8, 8, 16, 16]),
    "convnext_atto": dict(depths=[1] * 4, dims=[8, 8, 16, 16]),
}


def tiny_convnet(name: str) -> nn.Module:
    """A timm ConvNet for 32x32 images with random weights and statistics, in float64."""
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **_CONVNETS.get(name, {}))
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def random_batch(
    model: nn.Module,
    batch_size: int = 2,
    num_classes: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of the size the model takes, and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    size: tuple[int, int] = model.image_size  # type: ignore[assignment]
    images = torch.randn(batch_size, 3, *size, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (batch_size,), generator=generator)
    return images.to(dtype), labels
