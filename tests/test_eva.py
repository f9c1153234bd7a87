"""PromptedViT on timm's Eva, with rotary positions, against plain concatenation in float64."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
from concatenation import assert_same_step, training_steps
from kept_bytes import KeptBytes
from test_concatenation import (
    LAYERS,
    LOCATIONS,
    NUM_CLASSES,
    TOLERANCE,
    assert_equal_to_concatenation,
    prompted_and_concatenated,
)
from timm.layers import RmsNorm, RotaryEmbedding
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from tiny import random_batch, randomise, tiny_eva
from torch import nn

from vpt_fast import LinearProbe, PromptedViT
from vpt_fast.tuning.full import FullTuning

DINOV3 = {
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "qkv_bias": False,
    "init_values": 1e-5,
    "use_fc_norm": False,
    "dynamic_img_size": True,
}
EVA02 = {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": (3, 3)}
MIXED = {"rope_type": "mixed", "attn_type": "rope", "use_abs_pos_emb": False, "global_pool": "token"}
QK_NORM = {"qk_norm": True, "attn_type": "rope"}
KINDS: dict[str, dict[str, Any]] = {
    "dinov3": DINOV3,
    "dinov3_qkv_bias": DINOV3 | {"qkv_bias": True},
    "dinov3_plus": DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8},
    "eva": {"use_rot_pos_emb": False, "global_pool": "avg"},
    "eva02_tiny": {"swiglu_mlp": True, "ref_feat_shape": (3, 3)},
    "eva02_base": EVA02,
    "scaled_mlp": {"scale_mlp": True, "global_pool": "token"},
    "eva02_clip": {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
    "scaled_attention_of_rope": {"scale_attn_inner": True, "attn_type": "rope"},
    "perception_encoder": {
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "global_pool": "map",
    },
    "no_cls": {"class_token": False, "global_pool": "avg", "num_reg_tokens": 1},
    "mixed": MIXED,
    "mrope": {"rope_type": "mrope", "embed_dim": 48, "rope_mrope_section": (4, 4, 4)},
    "qk_norm": QK_NORM,
    "qk_norm_halves": QK_NORM | {"rope_rotate_half": True},
    "rms_norm": {"norm_layer": partial(RmsNorm, eps=1e-5)},
    "attention_scale_alone": {"init_values": 0.1, "attn_only_layer_scale": True},
    "wide_image": {"img_size": (16, 40)},
    "one_patch": {"img_size": 8},
    "rates_of_training": {"patch_drop_rate": 0.5, "drop_path_rate": 0.5, "rope_shift_coords": 0.5},
}


@pytest.mark.parametrize("layers", ["all", "shallow"])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_eva_equals_concatenation(kind: str, layers: str) -> None:
    assert_equal_to_concatenation(tiny_eva(**KINDS[kind]), num_prompts=3, **LAYERS[layers])


@pytest.mark.parametrize("pool", ["cls", "image", "prompts", "image_and_prompts"])
@pytest.mark.parametrize("layers", ["all", "first_2", "gap_0_3"])
def test_pooling_of_prompts_that_flow_on_without_a_position(layers: str, pool: str) -> None:
    assert_equal_to_concatenation(tiny_eva(**DINOV3, depth=4), num_prompts=4, pool=pool, **LAYERS[layers])


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
@pytest.mark.parametrize(
    "location",
    [
        "key_value",
        "pixel",
        "pad",
        "channels",
        "add_deep",
        "add1_middle",
        "prepend_shared",
        "prepend_projected",
    ],
)
def test_location_on_eva(location: str, kind: str) -> None:
    assert_equal_to_concatenation(tiny_eva(**KINDS[kind]), **LOCATIONS[location])


@pytest.mark.parametrize("image_size", [(16, 48), (40, 24)])
@pytest.mark.parametrize("kind", ["dinov3", "mixed", "eva02_base"])
def test_another_image_size_has_its_own_angles(kind: str, image_size: tuple[int, int]) -> None:
    eva = tiny_eva(**(KINDS[kind] | {"dynamic_img_size": True}))
    assert_equal_to_concatenation(eva, image_size=image_size, num_prompts=3)


@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize("layers", ["all", "shallow"])
def test_prompt_dropout_on_eva(layers: str, per: str) -> None:
    settings = LAYERS[layers] | {"num_prompts": 3, "prompt_dropout": 0.4, "prompt_dropout_per": per}
    prompted, concatenated = prompted_and_concatenated(tiny_eva(**DINOV3), **settings)
    images, labels = random_batch(prompted, 3, NUM_CLASSES)
    assert_same_step(*training_steps((prompted, concatenated), images, labels), TOLERANCE)


@pytest.mark.parametrize("layers", ["all", "shallow"])
@pytest.mark.parametrize("kind", ["eva02_base", "scaled_mlp", "qk_norm_halves"])
@pytest.mark.parametrize("memory", ["recompute_mlp", "recompute", "compact"])
def test_memory_policy_gives_the_gradients_of_concatenation(memory: str, kind: str, layers: str) -> None:
    assert_equal_to_concatenation(tiny_eva(**KINDS[kind]), memory=memory, num_prompts=3, **LAYERS[layers])


@pytest.mark.parametrize("memory", ["exact", "compact", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("kind", ["dinov3", "eva02_base", "qk_norm"])
@pytest.mark.parametrize("layers", ["all", "shallow", "key_value", "key_value_shared"])
def test_bytes_kept_equal_the_estimate(layers: str, kind: str, memory: str) -> None:
    eva = tiny_eva(torch.float32, **(KINDS[kind] | {"global_pool": "token"}))
    settings = LOCATIONS[layers] if layers in LOCATIONS else LAYERS[layers] | {"num_prompts": 5}
    model = PromptedViT(eva, NUM_CLASSES, memory=memory, **settings).train()
    images, _ = random_batch(model, 3, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == model.estimate_training_bytes(3)["kept"]


def test_angles_stay_float32_beside_bfloat16_weights() -> None:
    model = PromptedViT(tiny_eva(torch.float32, **MIXED), NUM_CLASSES, 3, dtype=torch.bfloat16)
    exact = PromptedViT(tiny_eva(torch.float32, **MIXED), NUM_CLASSES, 3)
    assert model.backbone.blocks[0].qkv_weight.dtype == torch.bfloat16
    assert torch.equal(model.backbone.sin, exact.backbone.sin) and model.backbone.sin.dtype == torch.float32


ROPES: dict[str, dict[str, Any]] = {
    "dinov3": DINOV3,
    "mixed": MIXED | {"dynamic_img_size": True},
    "axial": {"dynamic_img_size": True},
}
IN_16_BITS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "within": lambda model: nn.Sequential(model).to(torch.float16),
}


@pytest.mark.parametrize("brought", IN_16_BITS)
@pytest.mark.parametrize("kind", ROPES)
def test_angles_stay_as_they_are_when_a_model_is_brought_into_16_bits(kind: str, brought: str) -> None:
    model = PromptedViT(tiny_eva(torch.float32, **ROPES[kind]), NUM_CLASSES, 3)
    sizes = ((32, 32), (16, 40))
    expected = [table for size in sizes for table in model.backbone.rotations(size)[0][:2]]
    IN_16_BITS[brought](model)
    found = [table for size in sizes for table in model.backbone.rotations(size)[0][:2]]
    assert model.prompts.itemsize == 2 and all(map(torch.equal, found, expected))


def test_angles_of_timms_own_blocks_stay_as_they_are_in_16_bits() -> None:
    model = FullTuning(tiny_eva(torch.float32, **MIXED), NUM_CLASSES)
    expected = [position["rope"].detach() for position in model.backbone.timm_positions((32, 32))]
    model.bfloat16()
    found = [position["rope"].detach() for position in model.backbone.timm_positions((32, 32))]
    assert all(map(torch.equal, found, expected))


def test_angles_follow_a_model_to_its_device_and_to_more_bits() -> None:
    model = PromptedViT(tiny_eva(torch.float32, **DINOV3), NUM_CLASSES, 3)

    def angles() -> list[torch.Tensor]:
        """Of the model's own image size and of another."""
        return [t for size in ((32, 32), (16, 40)) for t in model.backbone.rotations(size)[0][:2]]

    assert all(t.dtype == torch.float32 for t in angles())
    model.double()
    assert all(t.dtype == torch.float64 for t in angles())
    model.to("meta")
    assert all(t.is_meta for t in angles())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The grids that timm has been asked for tables of."""
    asked: list[tuple[int, int]] = []
    for rope in (RotaryEmbeddingDinoV3, RotaryEmbeddingCat):
        get_embed = rope.get_embed

        def counted(self, shape, get_embed=get_embed, **arguments):
            asked.append(shape)
            return get_embed(self, shape=shape, **arguments)

        monkeypatch.setattr(rope, "get_embed", counted)
    return asked


@pytest.mark.parametrize("kind", ["dinov3", "axial"])
@pytest.mark.parametrize("method", [LinearProbe, lambda *arguments: PromptedViT(*arguments, 3)])
def test_angles_of_another_image_size_are_made_once(method, kind: str, looks) -> None:
    model = method(tiny_eva(torch.float32, **ROPES[kind]), NUM_CLASSES)
    looks.clear()
    for size in ((16, 40), (24, 24), (16, 40), (32, 32)):
        model(torch.randn(1, 3, *size))
    assert looks == [(2, 5), (3, 3)]


@pytest.mark.parametrize("kind", ["dinov3", "axial"])
def test_angles_of_timms_own_blocks_are_made_once(kind: str, looks) -> None:
    model = FullTuning(tiny_eva(torch.float32, **ROPES[kind]), NUM_CLASSES)
    for size in ((32, 32), (16, 40), (32, 32), (16, 40)):
        model(torch.randn(1, 3, *size))
    assert looks == [(4, 4), (2, 5)]


def test_frequencies_that_are_trained_are_read_anew_in_every_step() -> None:
    model = FullTuning(tiny_eva(torch.float32, **MIXED), NUM_CLASSES)
    images = torch.randn(1, 3, 32, 32)
    before = model(images)
    with torch.no_grad():
        model.backbone.rope.freqs += 1.0
    assert not torch.allclose(model(images), before)


def sized_images_and_model() -> tuple[torch.Tensor, PromptedViT]:
    model = PromptedViT(tiny_eva(torch.float32, **DINOV3), NUM_CLASSES, 3)
    return torch.randn(1, 3, 16, 40), model


def test_angles_made_in_inference_mode_may_be_trained_with() -> None:
    images, model = sized_images_and_model()
    with torch.inference_mode():
        expected = model(images)
    logits = model(images)
    logits.sum().backward()
    assert torch.equal(logits, expected) and model.prompts.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_angles_of_other_sizes_is_the_same(copied) -> None:
    images, model = sized_images_and_model()
    names = list(model.state_dict())
    expected = model(images)
    assert torch.equal(copied(model)(images), expected) and list(model.state_dict()) == names


def test_angles_of_the_first_16_other_sizes_are_kept(looks) -> None:
    _, model = sized_images_and_model()
    looks.clear()
    for _ in range(2):
        for width in range(1, 19):
            model.backbone.rotations((8, 8 * width))
    assert len(looks) == 18 + 2


@pytest.mark.parametrize("same", [lambda m: m.to("cpu"), lambda m: m.load_state_dict(m.state_dict())])
def test_angles_that_a_graph_may_read_stay_where_they_are(same) -> None:
    _, model = sized_images_and_model()
    before = [table.data_ptr() for table in model.backbone.rotations((16, 40))[0][:2]]
    same(model)
    assert [table.data_ptr() for table in model.backbone.rotations((16, 40))[0][:2]] == before


def test_loaded_frequencies_are_those_of_other_image_sizes_too() -> None:
    models = [PromptedViT(tiny_eva(torch.float32, seed, **ROPES["mixed"]), NUM_CLASSES, 3) for seed in (0, 1)]
    images = torch.randn(1, 3, 16, 40)
    expected = models[0](images)
    models[1](images)
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[1](images), expected)


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NAMES: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {"img_size": 32},
    "vit_small_plus_patch16_dinov3_qkvb": {"img_size": 32},
    "eva02_tiny_patch14_224": {"img_size": 42},
    "eva02_base_patch14_448": {"img_size": 42},
    "eva_giant_patch14_224": {"img_size": 42, "mlp_ratio": 2},
    "vit_pe_core_base_patch16_224": {"img_size": 32, "attn_pool_num_heads": 2},
    "vit_small_patch16_rope_mixed_ape_224": {"img_size": 32},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 32},
}


@pytest.mark.parametrize("name", NAMES)
def test_timm_name_built_small(name: str) -> None:
    arguments = SMALL | NAMES[name]
    eva = randomise(timm.create_model(name, num_classes=0, **arguments))
    assert_equal_to_concatenation(eva.double().eval(), num_prompts=3)
    assert isinstance(eva, Eva) and PromptedViT(name, NUM_CLASSES, 3, **arguments).num_blocks == 2


def test_saved_model_is_the_same_and_refuses_other_weights(tmp_path) -> None:
    arguments = SMALL | {"img_size": 32}
    torch.manual_seed(0)
    model = PromptedViT("vit_small_patch16_dinov3", NUM_CLASSES, 3, **arguments).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PromptedViT.from_pretrained(tmp_path).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    assert torch.equal(again(images), model(images)) and again.config == model.config
    with pytest.raises(ValueError, match="not those that .* was trained on"):
        PromptedViT.from_pretrained(tmp_path, tiny_eva(torch.float32))


def with_rope(rope: Any) -> Eva:
    eva = tiny_eva()
    eva.rope = rope
    return eva


class OtherEva(Eva):
    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return -super().forward_head(x, pre_logits)


UNSUPPORTED = {
    "blocks.0 is a EvaBlockPostNorm": lambda: tiny_eva(use_post_norm=True),
    "blocks.0.attn has 1 heads of keys for 2 of queries": lambda: tiny_eva(
        attn_type="rope", qkv_fused=False, num_kv_heads=1
    ),
    "rope is a RotaryEmbedding,": lambda: with_rope(RotaryEmbedding(16)),
    "OtherEva has its own forward_head": lambda: OtherEva(img_size=16, embed_dim=32, depth=1, num_heads=2),
    "got a Eva without blocks": lambda: tiny_eva(depth=0),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_part_of_an_eva_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone: {message}"):
        PromptedViT(UNSUPPORTED[message](), NUM_CLASSES, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"patch_drop_rate": 0.5}, "patch_drop_rate"), ({"rope_shift_coords": 0.5}, "rope_shift_coords")],
)
def test_positions_that_change_in_training_are_refused_where_timms_modules_train(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        FullTuning(tiny_eva(**arguments), NUM_CLASSES)
