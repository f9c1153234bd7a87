"""Backbones that a user unfreezes in part: what stands outside of the frozen blocks gets its gradient, what
stands in them is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from concatenation import relative_error
from tiny import random_batch, randomise, tiny_beit, tiny_eva, tiny_swin, tiny_vit
from torch import nn

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSwin, PromptedViT
from vpt_fast.tuned_model import TunedModel
from vpt_fast.tuning.partial import PartialTuning
from vpt_fast.tuning.probes import MLPProbe
from vpt_fast.tuning.side import SideTuning

CLASSES = 5
REFUSED = "got frozen weights with requires_grad True, .* want requires_grad_\\(False\\)"


def rich_vit(**arguments: Any) -> nn.Module:
    return tiny_vit(
        reg_tokens=2,
        pre_norm=True,
        embed_norm_layer=nn.LayerNorm,
        global_pool="avg",
        fc_norm=False,
        **arguments,
    )


def dinov3() -> nn.Module:
    return tiny_eva(rope_type="dinov3", num_reg_tokens=2, dynamic_img_size=True)


def small_convnext() -> nn.Module:
    size = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}
    model = timm.create_model("convnext_atto", num_classes=0, depths=[1] * 4, dims=[8, 8, 16, 16], **size)
    return randomise(model).double().eval()


def unfrozen_stem(model: TunedModel) -> dict[str, nn.Parameter]:
    """All parameters outside of the blocks, which now want a gradient."""
    found = dict(model.backbone.stem.named_parameters())
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


@pytest.mark.parametrize("kind", [LinearProbe, MLPProbe])
@pytest.mark.parametrize("build", [tiny_vit, rich_vit, dinov3, tiny_beit, tiny_swin])
def test_gradients_outside_of_the_blocks_are_those_of_timms_own_network(kind: Any, build: Callable) -> None:
    backbone = build()
    model = kind(backbone, CLASSES).double()
    images, labels = random_batch(model)
    trained = unfrozen_stem(model)
    nn.functional.cross_entropy(model(images), labels).backward()
    nn.functional.cross_entropy(model.classify(backbone(images)), labels).backward()
    for name, parameter in trained.items():
        assert relative_error(parameter.grad, backbone.get_parameter(name).grad) < 1e-10, name


PROMPTED = {
    "deep": (rich_vit, lambda vit: PromptedViT(vit, CLASSES, 3)),
    "shallow": (rich_vit, lambda vit: PromptedViT(vit, CLASSES, 3, "shallow")),
    "add": (tiny_vit, lambda vit: PromptedViT(vit, CLASSES, prompt_location="add")),
    "pixels": (
        tiny_vit,
        lambda vit: PromptedViT(vit, CLASSES, 2, "shallow", prompt_location="prepend-pixel"),
    ),
    "packed": (rich_vit, lambda vit: PromptedViT(vit, CLASSES, 3, memory="recompute")),
    "rotary": (dinov3, lambda vit: PromptedViT(vit, CLASSES, 3)),
    "swin": (tiny_swin, lambda swin: PromptedSwin(swin, CLASSES, 3)),
    "side": (lambda: tiny_vit(img_size=64, patch_size=16), lambda vit: SideTuning(vit, CLASSES)),
    "partial": (rich_vit, lambda vit: PartialTuning(vit, CLASSES)),
}


@pytest.mark.parametrize("name", PROMPTED)
def test_gradients_outside_of_the_blocks_are_those_of_differences(name: str) -> None:
    build, method = PROMPTED[name]
    model = method(build()).double().eval()
    images, _ = random_batch(model)
    trained = unfrozen_stem(model)
    model(images).sin().sum().backward()
    for place, parameter in trained.items():
        step = 1e-6 * torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step
            above = model(images).sin().sum()
            parameter -= 2 * step
            below = model(images).sin().sum()
            parameter += step
        expected = (above - below).item()
        assert (2 * step * parameter.grad).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-9), place


@pytest.mark.parametrize(
    "build", [lambda: PromptedViT(rich_vit(), CLASSES, 3), lambda: PromptedSwin(tiny_swin(), CLASSES, 3)]
)
def test_a_trained_embedding_is_in_the_estimate(build: Callable) -> None:
    model = build()
    frozen = model.estimate_training_bytes(2)["kept"]
    model.backbone.stem.patch_embed.proj.weight.requires_grad_(True)
    assert model.estimate_training_bytes(2)["kept"] > frozen


def merge(model: Any) -> nn.Parameter:
    return next(p for entry in model.backbone._enter for p in entry.parameters())


@pytest.mark.parametrize(
    ("build", "weight"),
    [
        (lambda: LinearProbe(tiny_vit(), CLASSES), lambda m: m.backbone.blocks[0].qkv_weight),
        (lambda: LinearProbe(tiny_swin(), CLASSES), merge),
        (lambda: PromptedSwin(tiny_swin(), CLASSES, 3), merge),
        (lambda: PromptedViT(dinov3(), CLASSES, 3), lambda m: m.backbone.cos),
        (
            lambda: PromptedViT(tiny_eva(rope_type="mixed", dynamic_img_size=True), CLASSES, 3),
            lambda m: m.backbone.rope.freqs,
        ),
        (lambda: PromptedConvNet(small_convnext(), CLASSES, 3), lambda m: m.backbone.stem.stem[0].conv.bias),
        (lambda: LinearProbe(small_convnext(), CLASSES), lambda m: m.backbone.stem.stem[0].conv.bias),
        (lambda: LinearProbe(small_convnext(), CLASSES), lambda m: m.backbone.stem.stem[0].conv.weight),
    ],
)
def test_a_weight_whose_gradient_is_not_formed_is_refused(build: Callable, weight: Callable) -> None:
    model = build().double()
    weight(model).requires_grad_(True)
    with pytest.raises(ValueError, match=REFUSED):
        model(random_batch(model)[0])


@pytest.mark.parametrize("kind", [LinearProbe, lambda *arguments: PromptedConvNet(*arguments, 3)])
def test_layers_of_a_convnet_that_are_no_convolutions_get_their_gradient(kind: Any) -> None:
    model = kind(small_convnext(), CLASSES).double()
    images, _ = random_batch(model)
    weight = model.backbone.stem.get_parameter("stages.1.blocks.0.norm.weight").requires_grad_(True)
    model(images).sum().backward()
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        weight += step
        above = model(images).sum()
        weight -= 2 * step
        expected = (above - model(images).sum()).item()
    assert (2 * step * weight.grad).sum().item() == pytest.approx(expected, rel=1e-4)
