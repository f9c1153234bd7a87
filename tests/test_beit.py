"""PromptedViT on timm's Beit, with relative position bias, against plain concatenation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from concatenation import relative_error, training_steps
from kept_bytes import KeptBytes
from test_concatenation import (
    LAYERS,
    LOCATIONS,
    NUM_CLASSES,
    POOLS,
    TOLERANCE,
    assert_equal_to_concatenation,
    prompted_and_concatenated,
)
from timm.models.beit import Beit
from tiny import random_batch, tiny_beit

from vpt_fast import LinearProbe, PromptedViT

KINDS: dict[str, dict[str, Any]] = {
    "beit": {},
    "cls": {"global_pool": "token"},
    "cls_norm_behind_pooling": {"global_pool": "token", "use_fc_norm": True},
    "positions": {"use_abs_pos_emb": True},
    "positions_alone": {"use_abs_pos_emb": True, "use_rel_pos_bias": False},
    "no_bias": {"qkv_bias": False},
    "no_layer_scale": {"init_values": None},
    "swiglu": {"swiglu_mlp": True, "scale_mlp": True},
    "wide_image": {"img_size": (16, 40)},
    "one_patch": {"img_size": 8},
    "rates_of_training": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "pos_drop_rate": 0.5},
}


@pytest.mark.parametrize("layers", ["all", "shallow"])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_beit_equals_concatenation(kind: str, layers: str) -> None:
    assert_equal_to_concatenation(tiny_beit(**KINDS[kind]), num_prompts=3, **LAYERS[layers])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layers", ["all", "first_2", "last_1", "gap_0_3"])
def test_pooling_of_prompts_that_flow_on_without_a_position(layers: str, pool: str | None) -> None:
    assert_equal_to_concatenation(tiny_beit(depth=4), num_prompts=4, pool=pool, **LAYERS[layers])


@pytest.mark.parametrize("location", LOCATIONS)
def test_location_on_beit(location: str) -> None:
    assert_equal_to_concatenation(tiny_beit(), **LOCATIONS[location])


@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize("layers", ["all", "shallow"])
def test_prompt_dropout_on_beit(layers: str, per: str) -> None:
    settings = LAYERS[layers] | {"num_prompts": 3, "prompt_dropout": 0.4, "prompt_dropout_per": per}
    prompted, concatenated = prompted_and_concatenated(tiny_beit(), **settings)
    images, labels = random_batch(prompted, 3, NUM_CLASSES)
    actual, expected = training_steps((prompted, concatenated), images, labels)
    for name, gradient in expected.gradients.items():
        assert relative_error(actual.gradients[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("layers", ["all", "shallow", "last_1"])
@pytest.mark.parametrize("kind", ["beit", "swiglu"])
@pytest.mark.parametrize("memory", ["recompute_mlp", "recompute", "compact"])
def test_memory_policy_gives_the_gradients_of_concatenation(memory: str, kind: str, layers: str) -> None:
    assert_equal_to_concatenation(tiny_beit(**KINDS[kind]), memory=memory, num_prompts=3, **LAYERS[layers])


@pytest.mark.parametrize("memory", ["exact", "compact", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("kind", ["cls", "swiglu"])
@pytest.mark.parametrize("layers", ["all", "shallow", "key_value"])
def test_bytes_kept_equal_the_estimate(layers: str, kind: str, memory: str) -> None:
    settings = LAYERS.get(layers) or {"num_prompts": 3, **LOCATIONS.get(layers, {})}
    model = PromptedViT(
        tiny_beit(torch.float32, **KINDS[kind]), NUM_CLASSES, memory=memory, **{"num_prompts": 3} | settings
    )
    images, _ = random_batch(model, 4, NUM_CLASSES, torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == model.estimate_training_bytes(len(images))["kept"]


@pytest.mark.parametrize("kind", ["beit", "cls"])
def test_linear_probe_gives_timms_own_features(kind: str) -> None:
    beit = tiny_beit(**KINDS[kind])
    model = LinearProbe(beit, NUM_CLASSES).double()
    images, _ = random_batch(model)
    expected = beit.forward_head(beit.forward_features(images), pre_logits=True)
    assert relative_error(model.image_features(images), expected) < TOLERANCE


BAD = {
    "blocks share their relative position bias": lambda: tiny_beit(
        use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "got a Beit without blocks": lambda: tiny_beit(depth=0),
    "global_pool='' gives no feature vector": lambda: tiny_beit(global_pool=""),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_supported_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone: .*{message}"):
        PromptedViT(BAD[message](), NUM_CLASSES, 3)


def test_attention_by_name_is_refused_as_it_takes_no_bias() -> None:
    with pytest.raises(ValueError, match="attention: got 'sdpa_flash' with a Beit"):
        PromptedViT(tiny_beit(), NUM_CLASSES, 3, attention="sdpa_flash")


def test_another_image_size_is_refused() -> None:
    model = PromptedViT(tiny_beit(torch.float32), NUM_CLASSES, 3)
    with pytest.raises(ValueError, match="images: got 40x40, want 32x32"):
        model(torch.zeros(1, 3, 40, 40))


def test_unfrozen_bias_is_refused() -> None:
    model = PromptedViT(tiny_beit(torch.float32), NUM_CLASSES, 3)
    model.backbone.blocks[1].relative_bias.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad"):
        model(random_batch(model, dtype=torch.float32)[0])


def test_loading_gives_the_saved_model(tmp_path) -> None:
    beit = tiny_beit(torch.float32)
    model = PromptedViT(beit, NUM_CLASSES, 3)
    model.save_pretrained(tmp_path)
    images, _ = random_batch(model, dtype=torch.float32)
    loaded = PromptedViT.from_pretrained(tmp_path, beit)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match="weights"):
        PromptedViT.from_pretrained(tmp_path, tiny_beit(torch.float32, seed=1))


@pytest.mark.parametrize("name", [name for name in timm.list_models(module="beit") if "large" not in name])
def test_published_beit_is_supported(name: str) -> None:
    with torch.device("meta"):
        beit = timm.create_model(name, num_classes=0)
        model = PromptedViT(beit, NUM_CLASSES, 3)
    assert isinstance(beit, Beit) and model.num_blocks == 12
