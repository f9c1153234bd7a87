"""The closed forms of operations, against operations counted while the implementations run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flops
import peers
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_beit, tiny_eva, tiny_vit
from torch import nn
from torch.utils import flop_counter

from vpt_fast import LinearProbe, PromptedViT

BATCH, CLASSES = 3, 5

MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "tiny": lambda: tiny_vit(torch.float32),
    "test_vit": lambda: timm.create_model("test_vit", num_classes=0, img_size=32),
    "registers": lambda: tiny_vit(torch.float32, reg_tokens=2),
    "average": lambda: tiny_vit(torch.float32, global_pool="avg"),
    "one_block": lambda: tiny_vit(torch.float32, depth=1),
    "separate_projections": lambda: tiny_eva(torch.float32, swiglu_mlp=True, qkv_fused=False),
}


def flash_forward(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_flop_count(query_shape, key_shape, value_shape)


def flash_backward(
    grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return flop_counter.sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


# PyTorch's counter knows FlashAttention's operations on a GPU; these are a CPU's, of the same arguments.
ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
}


def counted(model: nn.Module, vit: VisionTransformer) -> int:
    """Operations of one forward and backward pass."""
    images = torch.randn(BATCH, 3, *vit.patch_embed.img_size)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        F.cross_entropy(model.train()(images), torch.arange(BATCH)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
@pytest.mark.parametrize("name", MODELS)
def test_essential_operations_are_what_vpt_fast_does(name: str, prompt_type: str) -> None:
    vit = MODELS[name]()
    model = PromptedViT(vit, CLASSES, 7, prompt_type)
    expected = flops.essential(flops.shape_of(vit), 7, prompt_type, BATCH, CLASSES)
    assert counted(model, vit) == expected


@pytest.mark.parametrize("name", [*MODELS, "biased"])
@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
def test_operations_of_concatenation_are_what_timms_blocks_do(name: str, prompt_type: str) -> None:
    vit = tiny_beit(torch.float32) if name == "biased" else MODELS[name]()
    model = peers.ConcatTimm(vit, peers.initial_state(vit, 7, prompt_type, CLASSES))
    assert counted(model, vit) == flops.concatenation(flops.shape_of(vit), 7, BATCH, CLASSES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bound", ["no_prompts", "linear_probe", "full_finetuning"])
def test_operations_of_the_bounds_are_what_they_do(name: str, bound: str) -> None:
    vit = MODELS[name]().requires_grad_(False)
    state = peers.initial_state(vit, 7, "deep", CLASSES)
    model = {
        "no_prompts": lambda: peers.NoPrompts(vit, state),
        "linear_probe": lambda: LinearProbe(vit, CLASSES),
        "full_finetuning": lambda: peers.FullFineTuning(vit, state),
    }[bound]()
    assert counted(model, vit) == getattr(flops, bound)(flops.shape_of(vit), BATCH, CLASSES)


# Worked out from the shapes alone, apart from this code: batch 64, 100 classes.
GIGA_FLOP_AN_IMAGE = {
    ("vit_base_patch16_224", 50): (67.3, 92.0),
    ("vit_base_patch16_224", 100): (68.5, 112.5),
    ("vit_base_patch16_224", 200): (70.9, 155.4),
    ("vit_large_patch16_224", 50): (244.6, 319.7),
    ("vit_large_patch16_224", 100): (248.0, 389.4),
    ("vit_large_patch16_224", 200): (254.8, 534.1),
    ("vit_huge_patch14_224", 50): (671, 827),
    ("vit_huge_patch14_224", 100): (679, 972),
    ("vit_huge_patch14_224", 200): (693, 1270),
}


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"])
def test_operations_an_image_of_the_usual_models(model: str) -> None:
    with torch.device("meta"):
        shape = flops.shape_of(timm.create_model(model, num_classes=0))
    for (name, m), expected in GIGA_FLOP_AN_IMAGE.items():
        if name == model:
            step = flops.essential(shape, m, "deep", 64, 100), flops.concatenation(shape, m, 64, 100)
            assert [count / 64 / 1e9 for count in step] == pytest.approx(expected, rel=8e-4)


def test_a_gated_mlps_products_are_those_of_its_matrices() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_giant_patch14_reg4_dinov2", depth=1, img_size=224, num_classes=0)
    *_, first, second = flops.block_products(flops.shape_of(vit), batch_size=2)
    mlp = vit.blocks[0].mlp
    assert first == (2 * 261, mlp.fc1.in_features, mlp.fc1.out_features)
    assert second == (2 * 261, mlp.fc2.in_features, mlp.fc2.out_features)


def test_a_model_that_pools_by_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="pools by attention"):
        flops.shape_of(tiny_vit(global_pool="map", class_token=False))
