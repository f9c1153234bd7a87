"""The tokens before a PromptedViT's first block with prompts, which training computes once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_batch, tiny_beit, tiny_eva, tiny_vit
from torch import Tensor

from vpt_fast import PromptedViT
from vpt_fast.backbones.timm_vit import FrozenViT

SETTINGS: dict[str, dict[str, Any]] = {
    "last": dict(num_prompts=4, prompt_layers=-1),
    "last two": dict(num_prompts=4, prompt_layers=-2),
    "flow": dict(num_prompts=4, prompt_layers=[1]),
    "drop": dict(num_prompts=4, prompt_layers=[1], after_prompts="drop"),
    "shared": dict(num_prompts=4, prompt_layers=-2, prompt_shared=True),
    "key-value": dict(num_prompts=4, prompt_layers=-2, prompt_location="key-value"),
    "add": dict(prompt_layers=-2, prompt_location="add"),
    "prompt pool": dict(num_prompts=4, prompt_layers=-2, pool="prompts"),
    "recomputed": dict(num_prompts=4, prompt_layers=-2, memory="recompute"),
    "stream in bfloat16": dict(num_prompts=4, prompt_layers=-2, residual_dtype=torch.bfloat16),
}


def gradients(logits: Tensor, model: PromptedViT) -> list[Tensor]:
    return list(torch.autograd.grad(logits.square().sum(), (model.prompts, model.head.weight)))


@pytest.mark.parametrize("build", [tiny_vit, tiny_eva, tiny_beit])
@pytest.mark.parametrize("name", SETTINGS)
def test_trained_part_gives_of_them_what_the_model_gives_of_the_images(name: str, build) -> None:
    model = PromptedViT(build().float(), 5, **SETTINGS[name])
    images, _ = random_batch(model, dtype=torch.float32)
    tokens = model.frozen_features(images)
    assert tokens.shape == (len(images), *model.feature_shape)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    found, wanted = model.classify(tokens), model(images)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, gradients(found, model), gradients(wanted, model)))


def test_trained_part_embeds_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedViT(tiny_vit().float(), 5, 4, prompt_layers=-1)
    tokens = model.frozen_features(random_batch(model, dtype=torch.float32)[0])
    ran: list[int] = []
    for index, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda *arguments, index=index: ran.append(index))
    monkeypatch.setattr(FrozenViT, "embed", None)
    model.classify(tokens)
    assert ran == [model.num_blocks - 1]


def test_trained_part_takes_prompts_in_place_of_the_model_s() -> None:
    model = PromptedViT(tiny_vit().float(), 5, 4, prompt_layers=-2)
    images, _ = random_batch(model, dtype=torch.float32)
    prompts = torch.randn(len(images), *model.prompts.shape)
    assert torch.equal(
        model.classify(model.frozen_features(images), prompts=prompts), model(images, prompts=prompts)
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_prompts=4),
        dict(num_prompts=4, prompt_layers=1),
        dict(num_prompts=4, prompt_type="shallow"),
        dict(num_prompts=1, prompt_type="shallow", prompt_location="prepend-pixel"),
        dict(num_prompts=1, prompt_type="shallow", prompt_location="concat-channel"),
    ],
    ids=str,
)
def test_there_are_none_with_prompts_in_or_before_the_first_block(settings: dict[str, Any]) -> None:
    model = PromptedViT(tiny_vit().float(), 5, **settings)
    assert model.feature_shape is None
    images = random_batch(model, dtype=torch.float32)[0]
    for call in (model.frozen_features, model.classify):
        with pytest.raises(NotImplementedError, match="no frozen features"):
            call(images)
