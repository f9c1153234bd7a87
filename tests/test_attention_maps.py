"""Attention's probabilities, against those of timm's blocks on the concatenated sequence in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from concatenation import ConcatenatedViT, relative_error
from test_segmenter import BACKBONES, CLASSES, SETTINGS
from tiny import random_batch, tiny_vit
from torch import Tensor

from vpt_fast import PromptedViT

BLOCKS = [0, 1, 2]


def maps_of_concatenation(model: ConcatenatedViT, images: Tensor) -> list[Tensor]:
    """Of the image's tokens over themselves, then over the prompts, which stand behind the prefix tokens."""
    found: list[Tensor] = []
    for block in model.vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    model(images)
    prefix, num_tokens = model.vit.num_prefix_tokens, model.vit.patch_embed.num_patches
    num_tokens += prefix
    maps = []
    for over_all in found:  # (B, H, N + m, N + m)
        held = over_all.shape[-1] - num_tokens
        prompts = torch.arange(prefix, prefix + held)
        tokens = torch.cat((torch.arange(prefix), torch.arange(prefix + held, num_tokens + held)))
        maps.append(over_all[:, :, tokens][..., torch.cat((tokens, prompts))])
    return maps


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_maps_are_those_of_concatenation(setting: dict, backbone) -> None:
    vit = backbone()
    model = PromptedViT(vit, CLASSES, **setting).double()
    wanted = ConcatenatedViT(vit, CLASSES, **setting).double()
    wanted.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    exact = maps_of_concatenation(wanted, images)
    for ours, theirs in zip(model.attention_maps(images, BLOCKS), exact, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("backbone", ["ragged", "rotary", "biased"])
def test_maps_are_those_of_concatenated_keys(backbone: str) -> None:
    vit = BACKBONES[backbone]()
    setting = dict(num_prompts=3, prompt_location="key-value", prompt_layers=[0, 2])
    model = PromptedViT(vit, CLASSES, **setting).double()
    wanted = ConcatenatedViT(vit, CLASSES, **setting).double()
    wanted.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    maps: list[Tensor] = []
    attention = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        bias = 0 if options.get("attn_mask") is None else options["attn_mask"]
        found = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)  # over prompts, if any, then tokens
        maps.append(found.roll(found.shape[-2], dims=-1))
        return attention(q, k, v, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", recorded):
        wanted(images)
    for ours, theirs in zip(model.attention_maps(images, BLOCKS), maps, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-12


def test_blocks_that_are_asked_for_are_returned() -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 3).double()
    images, _ = random_batch(model)
    every = model.attention_maps(images, BLOCKS)
    for ours, theirs in zip(model.attention_maps(images, [0, 2]), every[::2], strict=True):
        assert torch.equal(ours, theirs)


def test_maps_have_no_gradient_and_are_at_least_float32() -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 3, dtype=torch.bfloat16)
    (found,) = model.attention_maps(random_batch(model, dtype=torch.float32)[0], [1])
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


@pytest.mark.parametrize("blocks", [[], [1, 0], [3], [-1], 1])
def test_blocks_that_are_not_there_are_refused(blocks: object) -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 3).double()
    with pytest.raises(ValueError, match="blocks: got .*, want rising block indices from 0 to 2"):
        model.attention_maps(random_batch(model)[0], blocks)
