"""PromptedViT against plain concatenation: the same logits and gradients, in float64, for every setting."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from concatenation import ConcatenatedViT, assert_same_step, relative_error, step, training_steps
from timm.layers import Attention, ConvMlp, GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from tiny import random_batch, randomise, tiny_vit
from torch import nn

from vpt_fast import LinearProbe, PromptedViT
from vpt_fast.engine import passes
from vpt_fast.engine.policy import POLICIES

NUM_CLASSES = 5
TOLERANCE = 1e-9  # relative, in float64


def prompted_and_concatenated(
    vit: VisionTransformer, seed: int = 3, **settings: Any
) -> tuple[PromptedViT, ConcatenatedViT]:
    """Both models in float64 with the same random trainable tensors."""
    prompted = PromptedViT(vit, NUM_CLASSES, dtype=torch.float64, **settings).double()
    randomise(prompted, seed, trained_only=True)
    concatenated = ConcatenatedViT(vit, NUM_CLASSES, **settings).double()
    return prompted, concatenated.load_trainables(prompted.trainable_state_dict())


def assert_equal_to_concatenation(
    vit: VisionTransformer,
    batch_size: int = 2,
    image_size: tuple[int, int] | None = None,
    memory: str = "exact",
    **settings: Any,
) -> None:
    """Equal to rounding; under the policy "compact", gradients within what its codes round."""
    prompted, concatenated = prompted_and_concatenated(vit, **settings)
    prompted.memory = memory
    images, labels = random_batch(prompted, batch_size, NUM_CLASSES)
    if image_size is not None:
        images = torch.randn(batch_size, 3, *image_size, dtype=torch.float64)
    actual, expected = step(prompted, images, labels), step(concatenated, images, labels)
    assert_same_step(actual, expected, TOLERANCE, 5e-2 if memory == "compact" else TOLERANCE)


LAYERS: dict[str, dict[str, Any]] = {
    "shallow": {"prompt_type": "shallow"},
    "all": {},
    "first_1": {"prompt_layers": 1},
    "first_2": {"prompt_layers": 2},
    "last_1": {"prompt_layers": -1},
    "last_2": {"prompt_layers": -2},
    "gap_0_3": {"prompt_layers": [0, 3]},
    "middle_1_2": {"prompt_layers": [1, 2]},
}
POOLS = (None, "cls", "image", "prompts", "image_and_prompts")


# Dropped, prompts of these do not reach the end: a head that reads them is refused.
NOT_LAST = ("shallow", "first_1", "first_2", "middle_1_2")
PREPENDED = [
    (layers, after_prompts, pool)
    for layers in LAYERS
    for after_prompts in ("flow", "drop")
    for pool in POOLS
    if not (after_prompts == "drop" and layers in NOT_LAST and pool in ("prompts", "image_and_prompts"))
]


@pytest.mark.parametrize(("layers", "after_prompts", "pool"), PREPENDED)
def test_prepend(layers: str, after_prompts: str, pool: str | None) -> None:
    settings = LAYERS[layers] | {"after_prompts": after_prompts, "pool": pool, "num_prompts": 4}
    assert_equal_to_concatenation(tiny_vit(depth=4), **settings)


PIXEL = {"prompt_location": "prepend-pixel", "prompt_type": "shallow", "num_prompts": 3}
PAD = {"prompt_location": "pad", "prompt_type": "shallow", "num_prompts": 4}
CHANNELS = {"prompt_location": "concat-channel", "prompt_type": "shallow", "num_prompts": 2}
KEY_VALUE = {"prompt_location": "key-value", "num_prompts": 4}
LOCATIONS: dict[str, dict[str, Any]] = {
    "key_value": KEY_VALUE,
    "key_value_shallow": KEY_VALUE | {"prompt_type": "shallow"},
    "key_value_last_1": KEY_VALUE | {"prompt_layers": -1},
    "key_value_gap_image_pool": KEY_VALUE | {"prompt_layers": [0, 2], "pool": "image"},
    "key_value_projected": KEY_VALUE | {"prompt_project": 6},
    "key_value_shared": KEY_VALUE | {"prompt_shared": True},
    "add_shallow": {"prompt_location": "add", "prompt_type": "shallow"},
    "add_deep": {"prompt_location": "add"},
    "add_first_2": {"prompt_location": "add", "prompt_layers": 2},
    "add_last_1": {"prompt_location": "add", "prompt_layers": -1},
    "add_gap_image_pool": {"prompt_location": "add", "prompt_layers": [0, 2], "pool": "image"},
    "add_shared": {"prompt_location": "add", "prompt_shared": True},
    "add_projected": {"prompt_location": "add", "prompt_project": 6},
    "add1_shallow": {"prompt_location": "add-1", "prompt_type": "shallow"},
    "add1_deep": {"prompt_location": "add-1"},
    "add1_middle": {"prompt_location": "add-1", "prompt_layers": [1]},
    "add1_shared_projected": {"prompt_location": "add-1", "prompt_shared": True, "prompt_project": 6},
    "pixel": PIXEL,
    "pixel_drop": PIXEL | {"after_prompts": "drop"},
    "pixel_prompt_pool": PIXEL | {"pool": "prompts"},
    "pad": PAD,
    "pad_image_pool": PAD | {"pool": "image"},
    "channels": CHANNELS,
    "channels_image_pool": CHANNELS | {"pool": "image", "num_prompts": 1},
    "prepend_shared": {"prompt_shared": True, "num_prompts": 4},
    "prepend_shared_gap": {"prompt_shared": True, "num_prompts": 4, "prompt_layers": [0, 2]},
    "prepend_projected": {"prompt_project": 6, "num_prompts": 4},
    "prepend_projected_shallow": {"prompt_project": 6, "num_prompts": 4, "prompt_type": "shallow"},
    "prepend_shared_projected": {"prompt_shared": True, "prompt_project": 6, "num_prompts": 4},
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_location(location: str) -> None:
    assert_equal_to_concatenation(tiny_vit(), **LOCATIONS[location])


@pytest.mark.parametrize("location", [name for name in LOCATIONS if "pool" not in name])
def test_location_with_registers_pre_norm_and_no_cls_position(location: str) -> None:
    vit = tiny_vit(reg_tokens=2, pre_norm=True, no_embed_class=True)
    assert_equal_to_concatenation(vit, **LOCATIONS[location])


@pytest.mark.parametrize("num_prompts", [1, 7, 50])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("layers", ["all", "shallow"])
def test_ragged_batch_and_prompts(layers: str, batch_size: int, num_prompts: int) -> None:
    assert_equal_to_concatenation(tiny_vit(depth=2), batch_size, num_prompts=num_prompts, **LAYERS[layers])


SIZES: dict[str, dict[str, Any]] = {
    "one_patch": {"img_size": 8},
    "two_patches": {"img_size": (8, 16)},
    "wide_image": {"img_size": (16, 40)},
    "tall_image": {"img_size": (56, 8)},
    "wide_patch": {"img_size": (24, 32), "patch_size": (4, 8)},
    "one_block": {"depth": 1},
    "one_head": {"num_heads": 1},
    "heads_of_20": {"embed_dim": 40},
}


@pytest.mark.parametrize(
    "location", ["all", "shallow", "prepend_projected", "key_value", "pixel", "add_deep", "channels"]
)
@pytest.mark.parametrize("size", SIZES)
def test_ragged_sizes(size: str, location: str) -> None:
    settings = LOCATIONS[location] if location in LOCATIONS else LAYERS[location] | {"num_prompts": 3}
    assert_equal_to_concatenation(tiny_vit(**SIZES[size]), **settings)


@pytest.mark.parametrize("img_size", [(24, 32), (32, 24), (40, 40)])
@pytest.mark.parametrize("border", [1, 4, 7])
def test_pad_by_any_border(img_size: tuple[int, int], border: int) -> None:
    # A border that leaves part of a patch over: the patch embedding's stride drops what does not fill one.
    vit = tiny_vit(img_size=tuple(side + 2 * border for side in img_size))
    assert_equal_to_concatenation(vit, prompt_location="pad", prompt_type="shallow", num_prompts=border)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_border_is_not_rounded_to_the_dtype_of_the_images(dtype: torch.dtype) -> None:
    prompted, concatenated = prompted_and_concatenated(tiny_vit(), **PAD)
    images, labels = random_batch(prompted, 2, NUM_CLASSES)
    narrow = images.to(dtype)
    actual, expected = step(prompted, narrow, labels), step(concatenated, narrow.double(), labels)
    assert_same_step(actual, expected, TOLERANCE)


VARIANTS: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 3},
    "registers_gap": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "no_cls_gap": {"class_token": False, "global_pool": "avg"},
    "no_cls_gap_final_norm": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "cls_gap": {"global_pool": "avg"},
    "cls_token_fc_norm": {"fc_norm": True},
    "max_pool": {"global_pool": "max"},
    "avgmax_pool": {"global_pool": "avgmax"},
    "no_final_norm": {"final_norm": False},
    "attention_pool": {"global_pool": "map", "class_token": False},
    "attention_pool_cls": {"global_pool": "map"},
    "refined_pool": {"global_pool": "prr"},
    "layer_scale": {"init_values": 1e-5},
    "pre_norm_quick_gelu": {"pre_norm": True, "act_layer": "quick_gelu"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
    "silu": {"act_layer": "silu"},
    "qk_norm": {"qk_norm": True},
    "qk_norm_rms": {"qk_norm": True, "norm_layer": RmsNorm},
    "rms_norm": {"norm_layer": RmsNorm},
    "rms_norm_without_eps": {"norm_layer": nn.RMSNorm, "qk_norm": True},
    "norm_eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "no_qkv_bias": {"qkv_bias": False},
    "no_qkv_bias_qk_norm": {"qkv_bias": False, "qk_norm": True},
    "no_proj_bias": {"proj_bias": False},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked, "act_layer": "silu"},
    "swiglu_gate_last": {"mlp_layer": GluMlp, "act_layer": "silu"},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": "silu"},
    "swiglu_layer_scale": {"mlp_layer": SwiGLUPacked, "act_layer": "silu", "init_values": 1e-5},
    "mlp_scale_norm": {"scale_mlp_norm": True},
    "attention_scale_norm": {"scale_attn_norm": True, "init_values": 0.1},
    "attention_scale_norm_rms": {"scale_attn_norm": True, "norm_layer": RmsNorm, "num_heads": 1},
    "no_embed_class": {"no_embed_class": True},
    "no_position": {"pos_embed": "none"},
    "embed_norm": {"embed_norm_layer": nn.LayerNorm},
    "dynamic_image_size": {"dynamic_img_size": True},
    "pool_includes_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "rates_of_training": {
        "drop_rate": 0.5,
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
    },
}


@pytest.mark.parametrize("layers", ["all", "shallow", "last_2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_variant(variant: str, layers: str) -> None:
    assert_equal_to_concatenation(tiny_vit(**VARIANTS[variant]), num_prompts=3, **LAYERS[layers])


@pytest.mark.parametrize("pool", ["image", "prompts", "image_and_prompts"])
@pytest.mark.parametrize("variant", ["registers", "no_cls_gap", "cls_token_fc_norm", "attention_pool"])
def test_pool_on_timm_variant(variant: str, pool: str) -> None:
    assert_equal_to_concatenation(tiny_vit(**VARIANTS[variant]), num_prompts=3, pool=pool)


@pytest.mark.parametrize(
    "variant", ["qk_norm", "qk_norm_rms", "registers", "swiglu_packed", "attention_pool"]
)
@pytest.mark.parametrize(
    "location", ["key_value", "pixel", "pad", "channels", "add_deep", "add1_middle", "prepend_shared"]
)
def test_location_on_timm_variant(location: str, variant: str) -> None:
    assert_equal_to_concatenation(tiny_vit(**VARIANTS[variant]), **LOCATIONS[location])


@pytest.mark.parametrize("image_size", [(16, 48), (24, 8), (32, 32)])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_another_input_size_than_the_backbones(no_embed_class: bool, image_size: tuple[int, int]) -> None:
    vit = tiny_vit(dynamic_img_size=True, no_embed_class=no_embed_class)
    assert_equal_to_concatenation(vit, image_size=image_size, num_prompts=3)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAMES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_gap_224": {},
    "vit_medium_patch16_reg4_gap_256": {},
    "vit_betwixt_patch16_reg4_gap_256": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_so400m_patch14_siglip_224": {"mlp_ratio": 2.5},
    "vit_small_patch14_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {},
    "vit_base_patch16_224_miil": {},
    "deit3_base_patch16_224": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_timm_name_built_small(name: str) -> None:
    vit = timm.create_model(name, num_classes=0, **(SMALL | NAMES[name]))
    assert isinstance(vit, VisionTransformer)
    randomise(vit)
    assert_equal_to_concatenation(vit.double().eval(), num_prompts=3)


@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize(
    "location",
    [
        "all",
        "shallow",
        "last_2",
        "prepend_shared",
        "prepend_projected",
        "key_value",
        "key_value_shared",
        "add_deep",
    ],
)
def test_prompt_dropout(location: str, per: str) -> None:
    settings = LOCATIONS[location] if location in LOCATIONS else LAYERS[location] | {"num_prompts": 3}
    settings = settings | {"prompt_dropout": 0.4, "prompt_dropout_per": per}
    prompted, concatenated = prompted_and_concatenated(tiny_vit(), **settings)
    images, labels = random_batch(prompted, 3, NUM_CLASSES)
    assert_same_step(*training_steps((prompted, concatenated), images, labels), TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("pool", ["cls", "image_and_prompts"])
@pytest.mark.parametrize("layers", LAYERS)
def test_blocks_that_run_again_a_few_images_at_a_time(
    layers: str, pool: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 34)
    # Of the five a few at a time, and what is left: without and with prompts that flow on.
    assert [passes.images_at_once(5, num_tokens) for num_tokens in (17, 21)] == [3, 2]
    settings = LAYERS[layers] | {"num_prompts": 4, "pool": pool, "prompt_dropout": dropout}
    prompted, concatenated = prompted_and_concatenated(tiny_vit(depth=4), **settings)
    prompted.memory = "recompute"
    images, labels = random_batch(prompted, 5, NUM_CLASSES)
    assert_same_step(*training_steps((prompted, concatenated), images, labels), TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_keys_and_values_where_blocks_run_again_a_few_images_at_a_time(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 34)
    prompted, concatenated = prompted_and_concatenated(tiny_vit(), **KEY_VALUE, prompt_dropout=dropout)
    prompted.memory = "recompute"
    images, labels = random_batch(prompted, 5, NUM_CLASSES)
    assert_same_step(*training_steps((prompted, concatenated), images, labels), TOLERANCE)


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("variant", ["qk_norm", "qk_norm_rms", "attention_scale_norm"])
def test_memory_policy_gives_the_gradients_of_concatenated_keys_and_values(variant: str, memory: str) -> None:
    assert_equal_to_concatenation(tiny_vit(**VARIANTS[variant]), 3, memory=memory, **KEY_VALUE)


@pytest.mark.parametrize("location", ["key_value", "key_value_projected"])
def test_keys_and_values_of_heads_that_are_wider_than_tokens(location: str) -> None:
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn = Attention(32, num_heads=3, attn_head_dim=16, qkv_bias=True)
    randomise(vit)
    assert_equal_to_concatenation(vit.double(), **LOCATIONS[location])


def test_prompt_dropout_is_off_in_eval_mode() -> None:
    prompted, concatenated = prompted_and_concatenated(tiny_vit(), num_prompts=3, prompt_dropout=0.9)
    images, _ = random_batch(prompted)
    assert relative_error(prompted.eval()(images), concatenated.eval()(images)) < TOLERANCE


class GatedViT(VisionTransformer):
    """Attention with a gate on its output, as in GenLIP."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for block in self.blocks:
            block.attn.gate = nn.Linear(self.embed_dim, self.embed_dim)


def vit_with(part: str, module: nn.Module) -> VisionTransformer:
    vit = tiny_vit()
    setattr(vit.blocks[1], part, module)
    return vit


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "norm": (lambda: vit_with("norm2", nn.GroupNorm(1, 32)), r"blocks\.1\.norm2 is a GroupNorm"),
    "norm_of_two_dimensions": (lambda: vit_with("norm1", nn.LayerNorm((17, 32))), r"norm1 is a LayerNorm"),
    "layer_scale": (lambda: vit_with("ls1", nn.Dropout()), r"blocks\.1\.ls1 is a Dropout"),
    "mlp": (lambda: vit_with("mlp", ConvMlp(32)), r"blocks\.1\.mlp is a ConvMlp"),
    "activation": (lambda: tiny_vit(act_layer="mish"), r"mlp\.act is a Mish"),
    "no_pool": (lambda: tiny_vit(global_pool=""), "global_pool='' gives no feature vector"),
    "gate": (lambda: tiny_vit(mlp_layer=GluMlp), "mlp is gated by gelu, which is not supported"),
    "res_post_norm_block": (lambda: tiny_vit(block_fn=ResPostBlock), "ResPostBlock"),
    "parallel_scaling_block": (lambda: tiny_vit(block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
    "parallel_things_block": (lambda: tiny_vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
    "differential_attention": (lambda: tiny_vit(attn_layer="diff"), "DiffAttention"),
    "gated_attention": (
        lambda: GatedViT(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
        "gate",
    ),
    "post_norm_by_name": (lambda: "vit_base_patch16_rpn_224", "ResPostBlock"),
}


@pytest.mark.parametrize("backbone", UNSUPPORTED)
def test_unsupported_backbone_is_named(backbone: str) -> None:
    build, named = UNSUPPORTED[backbone]
    given = build()
    sizes = SMALL if isinstance(given, str) else {}
    with pytest.raises((ValueError, NotImplementedError), match=named):
        PromptedViT(given, NUM_CLASSES, 3, **sizes)


@pytest.mark.parametrize("variant", ["registers", "attention_pool", "cls_gap", "swiglu_packed", "qk_norm"])
def test_linear_probe_equals_the_backbones_own_features(variant: str) -> None:
    vit = tiny_vit(**VARIANTS[variant])
    probe = LinearProbe(vit, NUM_CLASSES, dtype=torch.float64).double()
    images, labels = random_batch(probe, 2, NUM_CLASSES)
    actual = step(probe, images, labels)

    head = nn.Linear(vit.embed_dim, NUM_CLASSES, dtype=torch.float64)
    head.load_state_dict({"weight": probe.head.weight, "bias": probe.head.bias})
    with torch.no_grad():
        features = vit(images)
    logits = head(features)
    nn.functional.cross_entropy(logits, labels).backward()
    assert relative_error(actual.logits, logits) < TOLERANCE
    assert relative_error(actual.gradients["head.weight"], head.weight.grad) < TOLERANCE
    assert actual.gradients.keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("layers", ["all", "shallow", "key_value"])
def test_low_precision_error_is_at_most_that_of_concatenation(layers: str) -> None:
    settings = (KEY_VALUE if layers == "key_value" else LAYERS[layers]) | {"num_prompts": 8}
    # By dtype and tensor: mean square error of vpt_fast, of concatenation.
    squares: dict[tuple[torch.dtype, str], list[float]] = {}
    for seed in range(30):  # rounding is noise: fewer would compare luck
        vit = tiny_vit(dtype=torch.float32, seed=seed, embed_dim=64)
        models = {
            dtype: PromptedViT(vit, NUM_CLASSES, dtype=dtype, **settings)
            for dtype in (torch.bfloat16, torch.float16)
        }
        one = randomise(models[torch.bfloat16], seed, trained_only=True)
        state = one.trainable_state_dict()
        images, labels = random_batch(one, 4, NUM_CLASSES, torch.float32, seed)
        exact = ConcatenatedViT(vit, NUM_CLASSES, **settings).load_trainables(state).double()
        expected = step(exact, images.double(), labels)
        for dtype, prompted in models.items():
            prompted.load_trainable_state_dict(state)
            plain = ConcatenatedViT(vit, NUM_CLASSES, **settings).load_trainables(state)
            plain.vit.to(dtype)
            for which, model in enumerate((prompted, plain)):
                actual = step(model, images, labels)
                pairs = {"logits": (actual.logits, expected.logits)} | {
                    name: (actual.gradients[name], gradient) for name, gradient in expected.gradients.items()
                }
                for name, pair in pairs.items():
                    squares.setdefault((dtype, name), [0.0, 0.0])[which] += relative_error(*pair) ** 2
    for name, (ours, theirs) in squares.items():
        ours, theirs = ours**0.5, theirs**0.5
        assert ours <= 1.25 * theirs + 1e-5, f"{name}: {ours:.2e}, concatenation {theirs:.2e}"


@pytest.mark.parametrize("pool", POOLS)
def test_image_features_are_what_the_head_of_concatenation_reads(pool: str | None) -> None:
    prompted, concatenated = prompted_and_concatenated(tiny_vit(), num_prompts=4, pool=pool)
    images, _ = random_batch(prompted, 2, NUM_CLASSES)
    concatenated.head = nn.Linear(prompted.embed_dim, prompted.embed_dim, bias=False).double()
    nn.init.eye_(concatenated.head.weight)
    assert relative_error(prompted.image_features(images), concatenated(images)) < TOLERANCE
