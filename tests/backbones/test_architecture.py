"""The record of a backbone's settings: what of the same weights is told apart, and what is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoint_files import SMALL_CONVNEXT, SMALL_RESNET, small
from timm.layers import (
    BlurPool2d,
    CondConv2d,
    Conv2dSame,
    EvoNorm2dS0,
    QuickGELU,
    SEModule,
    StdConv2d,
    StdConv2dSame,
)
from timm.layers.pool2d_same import MaxPool2dSame
from tiny import random_batch, tiny_beit, tiny_eva, tiny_swin, tiny_vit
from torch import nn

from vpt_fast import (
    LinearProbe,
    PromptedConvNet,
    PromptedSegmenter,
    PromptedSwin,
    PromptedViT,
    load_pretrained,
)
from vpt_fast.backbones.architecture import architecture, differences
from vpt_fast.tuning.bias import BiasTuning
from vpt_fast.tuning.full import FullTuning


def eps(value: float) -> Callable[..., nn.Module]:
    return lambda *args, **kwargs: nn.LayerNorm(*args, **{**kwargs, "eps": value})


def resnet(**arguments: Any) -> nn.Module:
    return small("resnet50", **SMALL_RESNET, **arguments)


def convnext(**arguments: Any) -> nn.Module:
    return small("convnext_base", **SMALL_CONVNEXT, **arguments)


def nfnet(**arguments: Any) -> nn.Module:
    return small("nf_resnet26", depths=(2,), channels=(16,), stem_chs=8, attn_layer="se", **arguments)


def vit_model(vit: Any) -> Any:
    return PromptedViT(vit, 5, 4)


BUILT = {
    "vit": (vit_model, tiny_vit),
    "eva": (vit_model, tiny_eva),
    "beit": (vit_model, tiny_beit),
    "segmenter": (lambda vit: PromptedSegmenter(vit, 5, num_prompts=2), tiny_vit),
    "bias": (lambda vit: BiasTuning(vit, 5), tiny_vit),
    "full": (lambda vit: FullTuning(vit, 5), tiny_vit),
    "swin": (lambda swin: PromptedSwin(swin, 5, 2), tiny_swin),
    "swin-full": (lambda swin: FullTuning(swin, 5), tiny_swin),
    "convnet": (lambda net: PromptedConvNet(net, 5, 2), convnext),
    "convnet-probe": (lambda net: LinearProbe(net, 5), resnet),
    "nfnet": (lambda net: PromptedConvNet(net, 5, 2), nfnet),
}

CHANGES = [
    ("vit", {"act_layer": QuickGELU}, "blocks.mlp.act.activation was gelu and is quick_gelu"),
    ("vit", {"num_heads": 4}, "blocks.attn.num_heads was 2 and is 4"),
    ("vit", {"norm_layer": eps(1e-3)}, "blocks.norm1.norm was ['layer', 1e-06] and is ['layer', 0.001]"),
    ("vit", {"pool_include_prefix": True}, "pool_include_prefix was False and is True"),
    ("vit", {"global_pool": "avg", "fc_norm": False}, "global_pool was token and is avg"),
    ("segmenter", {"num_heads": 4}, "blocks.attn.num_heads was 2 and is 4"),
    ("bias", {"act_layer": nn.ReLU}, "blocks.mlp.act.activation was gelu and is relu"),
    ("full", {"num_heads": 4}, "blocks.attn.num_heads was 2 and is 4"),
    ("eva", {"num_heads": 4}, "blocks.attn.num_heads was 2 and is 4"),
    ("eva", {"rope_temperature": 100.0}, "rope.temperature was 10000.0 and is 100.0"),
    ("eva", {"rope_rotate_half": True}, "blocks.attn.rotate_half was False and is True"),
    ("eva", {"rope_grid_offset": 0.5}, "rope.grid_offset was 0.0 and is 0.5"),
    ("eva", {"rope_type": "dinov3"}, "rotary was cat and is dinov3"),
    ("eva", {"use_rot_pos_emb": False}, "rotary was cat and is None"),
    ("eva", {"ref_feat_shape": 4}, "rope.ref_feat_shape was None and is [4, 4]"),
    ("swin", {"norm_layer": eps(1e-3)}, "layers.blocks.norm2.norm was ['layer', 1e-05] and is"),
    ("swin-full", {"norm_layer": eps(1e-3)}, "layers.downsample.norm.norm was ['layer', 1e-05] and is"),
    ("convnet", {"act_layer": nn.ReLU}, "stages.blocks.mlp.act.activation was gelu and is relu"),
    ("convnet-probe", {"output_stride": 16}, "layer4.conv2.stride was [2, 2] and is [1, 1]"),
    ("convnet-probe", {"global_pool": "max"}, "global_pool.pool_type was avg and is max"),
    ("nfnet", {"alpha": 0.5}, "stages.alpha was 0.2 and is 0.5"),
    ("nfnet", {"attn_gain": 1.0}, "stages.attn_gain was 2.0 and is 1.0"),
    ("nfnet", {"std_conv_eps": 1e-6}, "stages.conv1.eps was 1e-05 and is 1e-06"),
    ("nfnet", {"gamma_in_act": True}, "stages.conv2.scale was 0.20199198869789597 and is 0.1178"),
]  # fmt: skip


class Wrapper(nn.Module):
    """As peft has it: settings that it lacks are those of the module inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)


def test_settings_that_a_module_finds_elsewhere_are_recorded() -> None:
    found = architecture(Wrapper(nn.Conv2d(3, 4, 5, stride=2)))
    assert found["kernel_size"] == found["inside.kernel_size"] == [5, 5]
    assert found["stride"] == [2, 2]


@pytest.mark.parametrize(
    "name, changes, message", CHANGES, ids=[f"{c[0]}-{next(iter(c[1]))}" for c in CHANGES]
)
def test_instance_with_the_same_weights_and_another_setting_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build, backbone = BUILT[name]
    model, other = build(backbone()), backbone(**changes)
    model.save_pretrained(tmp_path)
    assert build(other).backbone.fingerprint == model.backbone.fingerprint
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pretrained(tmp_path, other)


LAYERS = [
    (nn.AvgPool2d(3), nn.AvgPool2d(3, count_include_pad=False), "count_include_pad was True and is False"),
    (nn.AvgPool2d(3), nn.MaxPool2d(3), "pool was avg and is max"),
    (nn.MaxPool2d(3), nn.Identity(), "pool was max and is None"),
    (MaxPool2dSame(3, 2), nn.MaxPool2d((3, 3), (2, 2), (0, 0)), "same_padding was True and is False"),
    (nn.Conv2d(4, 4, 3), Conv2dSame(4, 4, 3), "same_padding was False and is True"),
    (StdConv2d(4, 4, 3, 2, padding=0), StdConv2dSame(4, 4, 3, 2), "same_padding was False and is True"),
    (CondConv2d(4, 4, 3, 2), CondConv2d(4, 4, 3, 2, padding="same"), "same_padding was False and is True"),
    (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding_mode="reflect"), "padding_mode was zeros and is reflect"),
    (BlurPool2d(4, filt_size=3), BlurPool2d(4, filt_size=5), "filt_size was 3 and is 5"),
    (BlurPool2d(4), BlurPool2d(4, pad_mode="constant"), "pad_mode was reflect and is constant"),
    (SEModule(8), SEModule(8, add_maxpool=True), "add_maxpool was False and is True"),
    (nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), "num_groups was 2 and is 4"),
    (EvoNorm2dS0(8, groups=2), EvoNorm2dS0(8, groups=4), "num_groups was 2 and is 4"),
    (nn.GELU(), nn.GELU("tanh"), "activation was gelu and is gelu_tanh"),
    (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), "negative_slope was 0.1 and is 0.2"),
]  # fmt: skip


@pytest.mark.parametrize("one, other, message", LAYERS, ids=[layer[2] for layer in LAYERS])
def test_setting_of_a_convnets_layer_tells_it_apart(one: nn.Module, other: nn.Module, message: str) -> None:
    assert message in "; ".join(differences(architecture(one), architecture(other)))


def test_instance_without_the_pooling_that_it_was_trained_with_is_refused(tmp_path: Path) -> None:
    LinearProbe(resnet(), 5).save_pretrained(tmp_path)
    other = resnet()
    other.maxpool = nn.Identity()
    with pytest.raises(ValueError, match=r"maxpool\.pool was max and is None"):
        load_pretrained(tmp_path, other)


def test_factor_of_an_activation_tells_apart_what_it_scales() -> None:
    relu, silu = (architecture(nfnet(gamma_in_act=True, act_layer=name)) for name in ("relu", "silu"))
    assert f"stages.act1.gamma was {relu['stages.act1.gamma']} and is 1.788" in "; ".join(
        differences(relu, silu)
    )


@pytest.mark.parametrize("name", BUILT)
def test_instance_built_in_the_same_way_is_accepted(name: str, tmp_path: Path) -> None:
    build, backbone = BUILT[name]
    model = build(backbone())
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, backbone())
    assert again.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["architecture"]


POOLED = {
    "cls": lambda vit: PromptedViT(vit, 5, 4, pool="cls"),
    "segmenter": lambda vit: PromptedSegmenter(vit, 5, num_prompts=2),
}


@pytest.mark.parametrize("build", POOLED.values(), ids=POOLED)
def test_pooling_of_the_instance_does_not_matter_where_the_model_does_not_read_it(
    build: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = build(tiny_vit())
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, tiny_vit(global_pool="avg", fc_norm=False))
    images, _ = random_batch(model)
    assert torch.equal(again.double().eval()(images), model.double().eval()(images))


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 7}, {"drop_rate": 0.1, "drop_path_rate": 0.1}, {"dtype": torch.float32}],
    ids=str,
)
def test_classifier_dropout_and_dtype_are_not_recorded(changes: dict[str, Any]) -> None:
    assert architecture(tiny_vit(**changes)) == architecture(tiny_vit())


def test_model_on_the_meta_device_has_the_same_record() -> None:
    assert architecture(tiny_eva().to("meta")) == architecture(tiny_eva())


def test_damaged_record_is_named(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["backbone"]["architecture"] = [1]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: backbone\.architecture is \[1\], want a mapping"):
        load_pretrained(tmp_path, tiny_vit())


def test_attributes_that_another_version_of_timm_adds_are_no_difference() -> None:
    saved = architecture(tiny_vit())
    assert not differences(saved, {**saved, "blocks.attn.temperature": 1.0})
    assert not differences({**saved, "blocks.attn.temperature": 1.0}, saved)
    added = {**saved, "blocks.attn.q_norm.norm": ["rms", 1e-6]}
    assert differences(saved, added) == ["blocks.attn.q_norm.norm was None and is ['rms', 1e-06]"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet50"])
def test_record_survives_json(name: str) -> None:
    with torch.device("meta"):
        found = architecture(timm.create_model(name))
    assert json.loads(json.dumps(found)) == found
