"""Layers whose weights are read in place of calling them: what computes more is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import HybridEmbed, PatchEmbed
from tiny import random_batch, tiny_convnet, tiny_eva, tiny_swin, tiny_vit
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from vpt_fast import LinearProbe, PromptedViT
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.bias import PromptAndBiasSwinTuning, PromptAndBiasTuning
from vpt_fast.tuning.full import FullTuning

CLASSES = 5


def small_resnet() -> nn.Module:
    return tiny_convnet("resnet10t")


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (tiny_vit, "blocks.0.attn.qkv"),
        (tiny_vit, "blocks.2.mlp.fc1"),
        (tiny_vit, "patch_embed.proj"),
        (tiny_eva, "blocks.0.attn.proj"),
        (lambda: tiny_eva(attn_type="rope", qkv_fused=False), "blocks.0.attn.k_proj"),
        (lambda: tiny_eva(swiglu_mlp=True, scale_mlp=True), "blocks.0.mlp.fc1_x"),
        (tiny_swin, "layers.1.blocks.0.mlp.fc2"),
        (tiny_swin, "layers.1.downsample.reduction"),
        (tiny_swin, "patch_embed.proj"),
        (small_resnet, "layer1.0.conv2"),
    ],
)
def test_a_layer_with_low_rank_updates_is_refused_with_what_to_do(build: Callable, layer: str) -> None:
    import peft  # an optional dependency

    config = peft.LoraConfig(r=4, target_modules=re.escape(layer), init_lora_weights=False)
    backbone = peft.inject_adapter_in_model(config, build())
    message = rf"backbone: {re.escape(layer)} is a peft\.tuners\.lora\.layer\..*merge_and_unload\(\)"
    with pytest.raises(ValueError, match=message):
        LinearProbe(backbone, CLASSES)


@pytest.mark.parametrize("method", [lambda vit, classes: PromptedViT(vit, classes, 3), FullTuning])
def test_a_weight_that_wraps_other_tensors_is_refused(method: Any) -> None:
    vit = tiny_vit()
    weight = vit.blocks[0].attn.qkv.weight.detach()
    vit.blocks[0].attn.qkv.weight = nn.Parameter(TwoTensor(weight, weight))
    message = r"backbone: blocks\.0\.attn\.qkv\.weight is a .*\.TwoTensor, .* want a plain tensor"
    with pytest.raises(ValueError, match=message):
        method(vit, CLASSES)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_subclass_of_a_layer_is_named_in_full(name: str) -> None:
    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    vit = tiny_vit()
    old = vit.get_submodule(f"blocks.1.{name}")
    vit.set_submodule(f"blocks.1.{name}", Linear(old.in_features, old.out_features))
    with pytest.raises(
        ValueError, match=rf"blocks\.1\.{name} is a {__name__}\..*\.Linear, .* torch\.nn\.Linear"
    ):
        LinearProbe(vit, CLASSES)


def normalise_weight(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(1.5)


def normalise_weight_in_a_hook(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm.* is deprecated"):
        nn.utils.weight_norm(layer)
    layer.weight_g.data.mul_(1.5)


def prune_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


def prune_before_a_step(layer: nn.Module) -> None:
    prune_twice(layer)
    layer.weight_orig.data.mul_(1.5)


@pytest.mark.parametrize(
    "change", [normalise_weight, normalise_weight_in_a_hook, prune_twice, prune_before_a_step]
)
@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (tiny_vit, "blocks.0.attn.qkv"),
        (lambda: tiny_eva(swiglu_mlp=True), "blocks.0.mlp.fc1"),
        (tiny_swin, "layers.1.blocks.0.mlp.fc1"),
        (lambda: tiny_swin(img_size=24), "layers.0.blocks.1.attn.qkv"),
    ],
)
def test_a_weight_that_is_computed_is_read_as_a_call_would_compute_it(
    change: Callable, build: Callable, layer: str
) -> None:
    backbone = build()
    change(backbone.get_submodule(layer))
    probe = LinearProbe(backbone, CLASSES).double()
    images, _ = random_batch(probe)
    torch.testing.assert_close(probe.image_features(images), backbone(images))


def test_a_pruned_norm_is_read_as_a_call_would_compute_it() -> None:
    vit = tiny_vit()
    prune.random_unstructured(vit.blocks[0].norm1, "bias", 0.5)
    vit.blocks[0].norm1.bias_orig.data.add_(1.0)
    probe = LinearProbe(vit, CLASSES).double()
    images, _ = random_batch(probe)
    torch.testing.assert_close(probe.image_features(images), vit(images))


@pytest.mark.parametrize(
    "build",
    [tiny_vit, tiny_swin, small_resnet],
    ids=["vit", "swin", "convnet"],
)
def test_a_backbone_that_is_pruned_everywhere_is_read_as_a_call_would_compute_it(build: Callable) -> None:
    backbone = build().eval()
    for layer in [*backbone.modules()]:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm):
            prune.random_unstructured(layer, "weight", 0.3)
    probe = LinearProbe(backbone, CLASSES).double().eval()
    images, _ = random_batch(probe)
    torch.testing.assert_close(probe.image_features(images), backbone(images))


HOOKS = {
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "forward hook": lambda module: module.register_forward_hook(lambda *_: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *_: None),
    "forward of its own": lambda module: setattr(module, "forward", lambda x: x),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_of_what_is_not_called_is_refused(kind: str) -> None:
    vit = tiny_vit()
    HOOKS[kind](vit.blocks[1].mlp.act)
    with pytest.raises(ValueError, match=rf"backbone: blocks\.1\.mlp\.act has a {kind}, which would not run"):
        PromptedViT(vit, CLASSES, 3)


@pytest.mark.parametrize(
    ("build", "module", "method"),
    [
        (tiny_vit, "", LinearProbe),
        (tiny_vit, "blocks", LinearProbe),
        (tiny_eva, "blocks.0.attn.proj", LinearProbe),
        (tiny_swin, "", LinearProbe),
        (tiny_swin, "layers.1.downsample", LinearProbe),
        (small_resnet, "", LinearProbe),
        (tiny_vit, "blocks.0", AdapterTuning),
        (tiny_vit, "blocks.0.attn.qkv", lambda *args: PromptAndBiasTuning(*args, 3)),
        (tiny_swin, "layers.0.blocks.0.attn", lambda *args: PromptAndBiasSwinTuning(*args, 3)),
    ],
)
def test_a_hook_is_named_where_it_stands(build: Callable, module: str, method: Any) -> None:
    backbone = build()
    backbone.get_submodule(module).register_forward_hook(lambda *_: None)
    named = re.escape(module or type(backbone).__name__)
    with pytest.raises(ValueError, match=f"backbone: {named} has a forward hook"):
        method(backbone, CLASSES)


@pytest.mark.parametrize(
    ("build", "module"),
    [
        (tiny_vit, "patch_embed.proj"),
        (tiny_vit, "norm"),
        (tiny_swin, "patch_embed.proj"),
        (small_resnet, "layer1.0.conv2"),
        (small_resnet, "layer2.0.bn1"),
    ],
)
def test_a_hook_of_what_is_called_runs(build: Callable, module: str) -> None:
    backbone = build()
    backbone.get_submodule(module).register_forward_hook(lambda _, __, output: 1.5 * output)
    probe = LinearProbe(backbone, CLASSES).double()
    images, _ = random_batch(probe)
    torch.testing.assert_close(probe.image_features(images), backbone(images))


def test_extra_channels_refuse_a_hook_of_the_convolution_that_they_replace() -> None:
    vit = tiny_vit()
    vit.patch_embed.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"backbone: patch_embed\.proj has a forward hook"):
        PromptedViT(vit, CLASSES, 2, "shallow", prompt_location="concat-channel")


@pytest.mark.parametrize(
    ("build", "attn"),
    [(tiny_vit, "blocks.1.attn"), (tiny_eva, "blocks.0.attn"), (tiny_swin, "layers.1.blocks.0.attn")],
)
def test_another_scale_of_the_scores_is_refused(build: Callable, attn: str) -> None:
    backbone = build()
    backbone.get_submodule(attn).scale = 0.1
    with pytest.raises(ValueError, match=rf"backbone: {re.escape(attn)}\.scale: got 0\.1, want head_dim"):
        LinearProbe(backbone, CLASSES)


def hybrid_vit(proj: bool = True) -> nn.Module:
    """A ViT on the feature map of a small ConvNet with BatchNorm."""
    network = nn.Sequential(nn.Conv2d(3, 32, 4, 4, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return tiny_vit(embed_layer=partial(HybridEmbed, network, proj=proj), patch_size=2 if proj else 1)


class FlippedPatches(PatchEmbed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(-1))


@pytest.mark.parametrize("method", [lambda vit, classes: PromptedViT(vit, classes, 3), FullTuning])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: hybrid_vit(proj=False), r"timm\.layers\.hybrid_embed\.HybridEmbed"),
        (hybrid_vit, r"timm\.layers\.hybrid_embed\.HybridEmbed"),
        (lambda: tiny_vit(embed_layer=FlippedPatches), r".*\.FlippedPatches"),
    ],
)
def test_another_patch_embedding_than_one_convolution_is_refused(
    build: Callable, name: str, method: Any
) -> None:
    with pytest.raises(ValueError, match=f"backbone: patch_embed is a {name}, .* want timm's PatchEmbed"):
        method(build(), CLASSES)


def test_a_patch_embedding_with_a_norm_and_padding_is_timms() -> None:
    vit = tiny_vit(embed_norm_layer=nn.LayerNorm, dynamic_img_size=True, dynamic_img_pad=True)
    probe = LinearProbe(vit, CLASSES).double()
    images = torch.randn(2, 3, 30, 41, dtype=torch.float64)
    torch.testing.assert_close(probe.image_features(images), vit(images))
