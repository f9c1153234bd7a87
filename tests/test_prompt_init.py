"""Prompts that start from tokens of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from tiny import tiny_beit, tiny_eva, tiny_swin, tiny_vit
from torch import Tensor, nn

from vpt_fast import PromptedSegmenter, PromptedSwin, PromptedViT

IMAGES, PATCHES, M = 3, 16, 6


def entering(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """The patches' tokens (B, patches, d) that enter each block of timm's own model."""
    found: list[Tensor] = []
    is_swin = isinstance(backbone, SwinTransformer)
    blocks = [b for stage in backbone.layers for b in stage.blocks] if is_swin else backbone.blocks
    hooks = [block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for block in blocks]
    with torch.no_grad():
        backbone(images)
    for hook in hooks:
        hook.remove()
    return [tokens.flatten(1, 2) if is_swin else tokens[:, -PATCHES:] for tokens in found]


def places(prompts: Tensor, tokens: Tensor) -> list[int]:
    """For each prompt (m, d), which of the tokens (B, patches, d) it is; fails if it is none."""
    distances = torch.cdist(prompts.detach().double(), tokens.flatten(0, 1).double())
    least = distances.min(dim=1)
    assert (least.values < 1e-5).all()
    return least.indices.tolist()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({}, [0, 1, 2]),
        ({"prompt_type": "shallow"}, [0]),
        ({"prompt_layers": [0, 2]}, [0, 2]),
        ({"prompt_layers": -1}, [2]),
        ({"prompt_layers": -2, "prompt_shared": True}, [1]),
        ({"memory": "recompute", "prompt_dropout": 0.5, "backend": "torch"}, [0, 1, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tiny_vit, tiny_eva, tiny_beit])
def test_prompts_start_as_tokens_that_enter_their_block(images, make, settings, blocks):
    backbone = make(torch.float32)
    model = PromptedViT(backbone, 2, M, **settings)
    model.init_prompts_from(images.float(), seeded())
    tokens = entering(backbone, images.float())
    assert len(model.prompts) == len(blocks)
    for prompts, block in zip(model.prompts, blocks, strict=True):
        assert len(set(places(prompts, tokens[block]))) == M  # no patch twice


def test_prompts_may_become_every_patch_of_the_images_and_no_more(images):
    backbone = tiny_vit()
    model = PromptedViT(backbone, 2, IMAGES * PATCHES)
    model.init_prompts_from(images)
    found = places(model.prompts[1], entering(backbone, images)[1])
    assert sorted(found) == list(range(IMAGES * PATCHES))
    before = model.prompts.clone()
    with pytest.raises(
        ValueError, match="images: got 2, of 16 tokens each where they enter a block, want at least 48"
    ):
        model.init_prompts_from(images[:2])
    assert torch.equal(model.prompts, before)


def test_choice_is_the_generators_alone(images):
    model, other = (PromptedViT(tiny_vit(), 2, M) for _ in range(2))
    state = torch.get_rng_state()
    model.init_prompts_from(images, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    other.init_prompts_from(images, seeded())
    assert torch.equal(model.prompts, other.prompts)
    other.init_prompts_from(images)
    assert not torch.equal(model.prompts, other.prompts)


def test_blocks_choose_different_patches(images):
    backbone = tiny_vit()
    model = PromptedViT(backbone, 2, M)
    model.init_prompts_from(images)
    chosen = [places(*found) for found in zip(model.prompts, entering(backbone, images), strict=True)]
    assert chosen[0] != chosen[1] != chosen[2]


def test_prompts_stay_parameters_in_their_dtype_that_train(images):
    model = PromptedViT(tiny_vit(), 2, M, dtype=torch.bfloat16)
    prompts = model.prompts
    model.init_prompts_from(images.float())
    assert model.prompts is prompts and prompts.dtype == torch.float32 and prompts.requires_grad
    model(images.float()).sum().backward()
    assert prompts.grad.abs().sum() > 0


def test_tokens_are_those_under_autocast(images):
    backbone = tiny_vit(torch.float32)
    model, exact = (PromptedViT(backbone, 2, M) for _ in range(2))
    exact.init_prompts_from(images.float(), seeded())
    with torch.autocast("cpu", torch.bfloat16):
        model.init_prompts_from(images.float(), seeded())
    assert not torch.equal(model.prompts[1], exact.prompts[1])
    torch.testing.assert_close(model.prompts, exact.prompts, rtol=0.05, atol=0.05)


def test_segmenters_prompts_start_from_tokens(images):
    backbone = tiny_vit()
    segmenter = PromptedSegmenter(backbone, 2, num_prompts=M, head_channels=4)
    segmenter.encoder.init_prompts_from(images)
    for prompts, tokens in zip(segmenter.encoder.prompts, entering(backbone, images), strict=True):
        places(prompts, tokens)


@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
@pytest.mark.parametrize("size", [32, 24], ids=["whole_windows", "filled_windows"])
def test_swins_prompts_start_as_tokens_that_enter_their_block(size, prompt_type):
    backbone = tiny_swin(torch.float32, img_size=size)
    model = PromptedSwin(backbone, 2, M, prompt_type)
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    model.init_prompts_from(images, seeded())
    sets = [prompts for stage in model.prompts for prompts in stage]
    assert len(sets) == (4 if prompt_type == "deep" else 1)
    for prompts, tokens in zip(sets, entering(backbone, images), strict=False):
        assert len(set(places(prompts, tokens))) == M


def test_too_few_tokens_of_a_later_stage_change_no_prompt():
    model = PromptedSwin(tiny_swin(torch.float32), 2, 17)  # 64 tokens in the first stage, 16 in the second
    before = [stage.clone() for stage in model.prompts]
    with pytest.raises(ValueError, match="images: got 1, of 16 tokens each where they enter a block, want"):
        model.init_prompts_from(torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(*pair) for pair in zip(model.prompts, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_location": "key-value"}, "prompt_location: got 'key-value'"),
        ({"prompt_location": "add", "num_prompts": None}, "prompt_location: got 'add'"),
        ({"prompt_location": "pad", "prompt_type": "shallow"}, "prompt_location: got 'pad'"),
        ({"prompt_project": 4}, "prompt_project: got 4"),
    ],
    ids=str,
)
def test_prompts_that_are_no_tokens_are_refused(settings, message):
    arguments: dict[str, Any] = {"num_prompts": 8, **settings}
    model = PromptedViT(tiny_vit(img_size=48), 2, **arguments)
    with pytest.raises(ValueError, match=message):
        model.init_prompts_from(torch.zeros(1, 3, *model.image_size, dtype=torch.float64))


def test_images_of_another_shape_are_refused():
    model = PromptedViT(tiny_vit(), 2, M)
    with pytest.raises(ValueError, match="images: got 30x32, want 32x32"):
        model.init_prompts_from(torch.zeros(2, 3, 30, 32, dtype=torch.float64))
