"""What models that are built one after the other share."""

from __future__ import annotations

import pytest
import timm
import torch

from vpt_fast import PromptedSwin, PromptedViT
from vpt_fast.backbones.sharing import SharedBackbone, sharing_backbones
from vpt_fast.tuned_model import TunedModel

MODELS = {"vit": (PromptedViT, "test_vit"), "swin": (PromptedSwin, "swin_tiny_patch4_window7_224")}


def build(kind: str = "vit", **settings) -> TunedModel:
    torch.manual_seed(0)
    model, name = MODELS[kind]
    return model(name, 3, 2, **settings)


def addresses(model: TunedModel) -> list[int]:
    return [block.qkv_weight.data_ptr() for block in model.backbone.blocks]


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_treated_alike_share_blocks_and_nothing_that_is_trained(kind: str) -> None:
    alone, shared = build(kind), SharedBackbone()
    with sharing_backbones(shared, "as they are"):
        one, other = build(kind), build(kind)
    assert addresses(one) == addresses(other)
    assert {p.data_ptr() for p in one.trainable_state_dict().values()}.isdisjoint(
        p.data_ptr() for p in other.trainable_state_dict().values()
    )
    assert one.backbone.fingerprint == other.backbone.fingerprint == alone.backbone.fingerprint
    for ours, theirs in zip(alone.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_models_that_are_treated_otherwise_have_blocks_of_their_own() -> None:
    shared = SharedBackbone()
    with sharing_backbones(shared, "bf16"):
        build().hold_frozen_weights_in(torch.bfloat16)
        assert build().backbone.blocks[0].qkv_weight.dtype == torch.bfloat16
    with sharing_backbones(shared, "fp32"):
        model = build()
    for ours, theirs in zip(model.parameters(), build().parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"attention": "sdpa_cpu"}, {"depth": 3}])
def test_models_with_other_settings_have_blocks_of_their_own(settings: dict) -> None:
    with sharing_backbones(SharedBackbone(), "as they are"):
        one, other = build(), build(**settings)
    assert set(addresses(one)).isdisjoint(addresses(other))
    for ours, theirs in zip(other.parameters(), build(**settings).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [block.backend.needs_out for block in other.backbone.blocks] == (
        [settings.get("attention") == "sdpa_cpu"] * len(other.backbone.blocks)
    )


def test_a_backbone_that_was_passed_shares_nothing() -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    with sharing_backbones(SharedBackbone(), "as they are"):
        one, other = PromptedViT(vit, 3, 2), PromptedViT(vit, 3, 2)
    assert set(addresses(one)).isdisjoint(addresses(other))


def test_without_a_treatment_only_the_backbone_is_shared() -> None:
    with sharing_backbones(SharedBackbone()):
        one, other = build(), build()
    assert set(addresses(one)).isdisjoint(addresses(other))
