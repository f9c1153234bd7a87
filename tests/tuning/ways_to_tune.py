"""The plain definition of every way to tune, beside prompts, written with timm's modules and hooks.

Nothing here imports vpt_fast; the trained tensors come in under the names that its models give them.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torchvision
from concatenation import ConcatenatedViT
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call


class Features(nn.Module):
    """What timm's own head would read (B, d); of a distilled model, half of what each of the two would, side
    by side (B, 2 d)."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit.forward_features(images)
        if isinstance(self.vit, VisionTransformerDistilled):
            return torch.cat([x[:, 0], x[:, 1]], dim=1) / 2
        return self.vit.forward_head(x, pre_logits=True)


def logits(method: str, vit: VisionTransformer, images: Tensor, trained: dict[str, Tensor]) -> Tensor:
    """Logits (B, classes) of `method` on the backbone `vit`, as a function of the trained tensors."""
    if method == "vpt+bias":
        model = ConcatenatedViT(vit, len(trained["head.bias"]), trained["prompts"].shape[1]).to(images.dtype)
        own = {k: v for k, v in trained.items() if not k.startswith("backbone.")}
        return functional_call(model, in_timm(trained) | own, images)
    features = Features(vit)
    if method == "adapter":
        for i, block in enumerate(features.vit.blocks):  # before the residual sum
            scaled = block.ls2 if hasattr(block, "ls2") else with_scale(block)
            scaled.register_forward_hook(adapter(trained, f"adapters.{i}"))
    if method == "lora":
        for i, block in enumerate(features.vit.blocks):
            block.attn.qkv_bias_separate = True  # so that Eva's attention calls its qkv
            for name, linear in block.attn.named_children():
                if isinstance(linear, nn.Linear):
                    linear.register_forward_hook(low_rank(trained, f"backbone.blocks.{i}.attn.{name}"))
        x = features(images)
    else:
        x = functional_call(features, in_timm(trained), images)
    if method == "sidetune":
        with torch.device("meta"):  # every weight is among the trained tensors
            alexnet = torchvision.models.alexnet()
            side = nn.Sequential(alexnet.features, alexnet.avgpool, nn.Flatten(), nn.Linear(9216, x.shape[1]))
        tensors = {k.removeprefix("side."): v for k, v in trained.items() if k.startswith("side.")}
        alpha = torch.sigmoid(trained["alpha"])
        x = alpha * x + (1 - alpha) * functional_call(side, tensors, images)
    if method.startswith("mlp"):
        for i in range(int(method.removeprefix("mlp-")) - 1):
            x = F.relu(F.linear(x, trained[f"hidden.{2 * i}.weight"], trained[f"hidden.{2 * i}.bias"]))
    return F.linear(x, trained["head.weight"], trained["head.bias"])


def in_timm(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of the backbone under the names that they have in `Features`."""
    names = {
        k: k.removeprefix("backbone.").removeprefix("stem.") for k in trained if k.startswith("backbone.")
    }
    return {f"vit.{name}": trained[k] for k, name in names.items()}


def with_scale(block: nn.Module) -> nn.Module:
    """Eva's or Beit's MLP, its LayerScale taken into it."""
    gamma = block.gamma_2
    if gamma is not None:
        block.gamma_2 = nn.Parameter(torch.ones_like(gamma))
    block.mlp.register_forward_hook(lambda module, inputs, x: x if gamma is None else gamma * x)
    return block.mlp


def adapter(trained: dict[str, Tensor], where: str):
    def hook(module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        inner = F.gelu(F.linear(x, trained[f"{where}.down.weight"], trained[f"{where}.down.bias"]))
        return x + F.linear(inner, trained[f"{where}.up.weight"], trained[f"{where}.up.bias"])

    return hook


def low_rank(trained: dict[str, Tensor], where: str):
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        a, b = trained[f"{where}.lora_A.default.weight"], trained[f"{where}.lora_B.default.weight"]
        return output + inputs[0] @ a.T @ b.T

    return hook
