"""DeiT's distilled models: two heads, on CLS and on the distillation token, whose logits are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from concatenation import relative_error, step
from test_concatenation import LAYERS, LOCATIONS, NUM_CLASSES, TOLERANCE, assert_equal_to_concatenation
from tiny import random_batch, tiny_distilled
from torch import Tensor, nn

from vpt_fast import LinearProbe, PromptedViT
from vpt_fast.tuned_model import TunedModel
from vpt_fast.tuning.full import FullTuning

NAME = "deit_tiny_distilled_patch16_224"
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def two_heads_in_one(vit: nn.Module) -> dict[str, Tensor]:
    """The head of a model here that is timm's two."""
    heads = (vit.head, vit.head_dist)
    return {
        "head.weight": torch.cat([head.weight for head in heads], dim=1).detach(),
        "head.bias": (sum(head.bias for head in heads) / 2).detach(),
    }


@pytest.mark.parametrize("way", [LinearProbe, FullTuning])
def test_logits_and_gradients_are_those_of_timms_two_heads(way: type[TunedModel]) -> None:
    vit = tiny_distilled(num_classes=NUM_CLASSES).requires_grad_(False)
    model: Any = way(vit, NUM_CLASSES).double()
    model.load_state_dict(two_heads_in_one(vit), strict=False)
    images, labels = random_batch(model, 3, NUM_CLASSES)
    found = step(model, images, labels)

    for head in (vit.head, vit.head_dist):
        head.requires_grad_(True)
    logits = vit.train()(images)
    nn.functional.cross_entropy(logits, labels).backward()
    assert relative_error(found.logits, logits) < TOLERANCE
    weights = torch.cat([vit.head.weight.grad, vit.head_dist.weight.grad], dim=1)
    assert relative_error(found.gradients["head.weight"], weights) < TOLERANCE
    # Of two biases that only ever count as their sum there is one here.
    biases = vit.head.bias.grad + vit.head_dist.bias.grad
    assert relative_error(found.gradients["head.bias"], biases) < TOLERANCE


@pytest.mark.parametrize("pool", [None, "cls", "image", "image_and_prompts"])
@pytest.mark.parametrize("layers", ["all", "shallow", "last_1"])
def test_prompts_equal_concatenation(layers: str, pool: str | None) -> None:
    assert_equal_to_concatenation(tiny_distilled(), num_prompts=3, pool=pool, **LAYERS[layers])


@pytest.mark.parametrize("location", ["add_deep", "pixel", "pad", "channels", "prepend_shared_projected"])
def test_location_equals_concatenation(location: str) -> None:
    assert_equal_to_concatenation(tiny_distilled(), **LOCATIONS[location])


def test_another_input_size_equals_concatenation() -> None:
    vit = tiny_distilled(dynamic_img_size=True)
    assert_equal_to_concatenation(vit, image_size=(16, 48), num_prompts=3)


def test_the_last_block_computes_the_two_rows_that_are_read() -> None:
    model = PromptedViT(tiny_distilled(), NUM_CLASSES, 3).double()
    rows = []
    model.backbone.stem.norm.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model(random_batch(model)[0])
    assert rows == [2]


@pytest.mark.parametrize("pool, width", [(None, 64), ("cls", 32)])
def test_features_are_as_wide_as_what_the_head_reads(pool: str | None, width: int) -> None:
    model = PromptedViT(tiny_distilled(), NUM_CLASSES, 3, pool=pool).double()
    model.reset_classifier(7)
    images, _ = random_batch(model)
    assert model.image_features(images).shape == (2, model.num_features) == (2, width)
    assert model(images).shape == (2, 7)


def test_neither_of_timms_heads_is_part_of_the_backbone() -> None:
    with_heads, without = (FullTuning(tiny_distilled(num_classes=n), NUM_CLASSES) for n in (7, 0))
    assert with_heads.trainable_state_dict().keys() == without.trainable_state_dict().keys()
    assert with_heads.num_backbone_parameters == without.num_backbone_parameters
    assert with_heads.config == without.config


def test_saved_model_is_loaded_by_its_backbones_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(NAME, num_classes=0, **SMALL)
    weights = tmp_path / "weights.pth"
    # As DeiT's authors publish them, with both heads.
    heads = {
        f"{name}.{part}": torch.zeros(1000) for name in ("head", "head_dist") for part in ("weight", "bias")
    }
    torch.save({"model": backbone.state_dict() | heads}, weights)
    model = PromptedViT(NAME, NUM_CLASSES, 3, checkpoint=weights, **SMALL).eval()
    model.save_pretrained(tmp_path / "saved")
    again = PromptedViT.from_pretrained(tmp_path / "saved").eval()
    images, _ = random_batch(model, dtype=torch.float32)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("setting", ["no_embed_class", "reg_tokens", "fc_norm"])
def test_what_timm_ignores_or_fails_with_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"VisionTransformerDistilled with {setting}, which is not"):
        LinearProbe(NAME, NUM_CLASSES, **{setting: 1}, **SMALL)


def test_separate_logits_in_training_are_refused() -> None:
    vit = tiny_distilled()
    vit.set_distilled_training(True)
    with pytest.raises(ValueError, match="with distilled_training, which is not supported"):
        PromptedViT(vit, NUM_CLASSES, 3)
