"""PromptedViT and LinearProbe: what they are made of, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import StdConv2d
from timm.models.vision_transformer import VisionTransformer
from tiny import random_batch, tiny_eva, tiny_swin, tiny_vit

from vpt_fast import (
    LinearProbe,
    PromptedConvNet,
    PromptedSegmenter,
    PromptedSwin,
    PromptedViT,
)
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.tuning.probes import MLPProbe


class TestParameters:
    def test_prompts_are_one_parameter_of_the_documented_shape(self) -> None:
        vit = tiny_vit()
        assert PromptedViT(vit, 5, 7).prompts.shape == (3, 7, 32)
        assert PromptedViT(vit, 5, 7, "shallow").prompts.shape == (1, 7, 32)
        assert PromptedViT(vit, 5, 7, prompt_layers=[0, 2]).prompts.shape == (2, 7, 32)
        assert PromptedViT(vit, 5, 7, prompt_shared=True).prompts.shape == (1, 7, 32)
        assert PromptedViT(vit, 5, 7, prompt_project=1).prompts.shape == (3, 7, 1)
        assert PromptedViT(vit, 5, 7, prompt_location="key-value").prompts.shape == (3, 7, 64)
        assert PromptedViT(vit, 5, prompt_location="add").prompts.shape == (3, 17, 32)
        assert PromptedViT(vit, 5, prompt_location="add-1").prompts.shape == (3, 1, 32)

    def test_pixel_prompts_have_the_documented_shapes(self) -> None:
        vit = tiny_vit(img_size=(32, 48))
        pixel = PromptedViT(vit, 5, 3, "shallow", prompt_location="prepend-pixel")
        assert pixel.prompts.shape == (1, 3, 8, 24)
        padded = PromptedViT(vit, 5, 4, "shallow", prompt_location="pad")
        assert padded.image_size == (24, 40)
        assert padded.prompts.shape == (1, 3, 8, 48) and padded.prompts_sides.shape == (1, 3, 24, 8)
        channels = PromptedViT(vit, 5, 2, "shallow", prompt_location="concat-channel")
        assert channels.prompts.shape == (1, 2, 32, 48)

    def test_stored_sizes_agree_with_the_paper(self) -> None:
        """ViT-B/16 with 50 prompts: 0.038 M shallow, 0.46 M deep."""
        with torch.device("meta"):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert PromptedViT(vit, 1, 50, "shallow").prompts.numel() == 38_400
        deep = PromptedViT(vit, 1, 50)
        assert deep.prompts.numel() == 460_800
        assert deep.num_backbone_parameters == 85_798_656

    @pytest.mark.parametrize("location", ["prepend", "key-value"])
    def test_prompts_start_uniform_within_the_official_bound(self, location: str) -> None:
        prompts = PromptedViT(tiny_vit(), 5, 500, prompt_location=location).prompts.detach()
        bound = math.sqrt(6 / (3 * 8 * 8 + 32))
        assert prompts.abs().max() <= bound
        assert prompts.mean().abs() < 0.01 * bound
        assert prompts.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)

    def test_head_starts_as_in_the_official_code(self) -> None:
        head = PromptedViT(tiny_vit(), 400, 1).head
        assert torch.all(head.bias == -math.log(99))
        kaiming_fan_out = math.sqrt(2 / 400)
        assert head.weight.detach().std() == pytest.approx(kaiming_fan_out, rel=0.05)

    def test_what_is_trained_stays_float32_beside_a_bfloat16_backbone(self) -> None:
        model = PromptedViT(tiny_vit(dtype=torch.float32), 5, 3, dtype=torch.bfloat16)
        assert {t.dtype for t in model.trainable_state_dict().values()} == {torch.float32}
        logits = model(torch.randn(2, 3, 32, 32))
        assert logits.dtype == torch.float32

    @pytest.mark.parametrize(
        "build",
        [
            lambda: PromptedViT("vpt_fast_demo", 5, 3, prompt_project=8),
            lambda: PromptedViT("vpt_fast_demo", 5, 4, "shallow", prompt_location="pad"),
            lambda: MLPProbe("vpt_fast_demo", 5),
            lambda: PromptedSegmenter("vpt_fast_demo", 5, num_prompts=3, head_channels=8),
            lambda: PromptedConvNet("resnet10t", 5, 2, img_size=32),
        ],
        ids=["projected", "pad", "mlp", "segmenter", "convnet"],
    )
    def test_what_is_trained_is_float32_where_torchs_default_is_bfloat16(self, build) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = build().eval()
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert next(model.backbone.stem.parameters()).dtype == torch.bfloat16
        model(torch.randn(2, 3, *model.image_size)).sum().backward()

    def test_counts_of_parameters(self) -> None:
        vit = tiny_vit(num_classes=9)
        model = PromptedViT(vit, 5, 7)
        assert model.num_trainable_parameters == 3 * 7 * 32 + 5 * 32 + 5
        head = sum(p.numel() for p in vit.head.parameters())
        assert model.num_backbone_parameters == sum(p.numel() for p in vit.parameters()) - head


class TestBackboneByName:
    def test_keywords_go_to_timm(self) -> None:
        model = PromptedViT("vit_tiny_patch16_224", 5, 3, img_size=(64, 96), depth=2)
        assert model.image_size == (64, 96) and model.num_blocks == 2 and model.patch_size == (16, 16)
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)

    def test_border_is_added_to_the_image_that_is_asked_for(self) -> None:
        settings = dict(prompt_location="pad", depth=1)
        model = PromptedViT("vit_tiny_patch16_224", 5, 8, "shallow", **settings)
        assert model.image_size == (224, 224)
        assert model.backbone.image_size == (240, 240)
        small = PromptedViT("vit_tiny_patch16_224", 5, 8, "shallow", img_size=32, **settings)
        assert small.image_size == (32, 32)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("vit_giant_patch14_224", "pretrained: timm has no published weights of vit_giant_patch14_224"),
            (
                "vit_tiny_patch16_224.none",
                "backbone: got 'vit_tiny_patch16_224.none': Invalid pretrained tag",
            ),
        ],
    )
    def test_weights_that_nobody_has_published_are_named_before_anything_is_built(
        self, name: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("built"))
        with pytest.raises(ValueError, match=message):
            PromptedViT(name, 5, 3, pretrained=True)

    def test_demo_backbone_needs_no_network_and_carries_its_weights(self) -> None:
        first, second = (PromptedViT("vpt_fast_demo", 10, 4) for _ in range(2))
        assert first.image_size == (32, 32)
        assert first.backbone.fingerprint == second.backbone.fingerprint


REFUSED = {
    "num_prompts: got 0": dict(num_prompts=0),
    "num_prompts: got None": dict(num_prompts=None),
    "num_prompts: got 2.5": dict(num_prompts=2.5),
    "num_prompts: got True": dict(num_prompts=True),
    "num_prompts: got 5 with prompt_location='add', want None or 17": dict(prompt_location="add"),
    "after_prompts: got 'drop' with prompt_location='key-value'": dict(
        prompt_location="key-value", after_prompts="drop"
    ),
    "pool: got 'prompts' with prompt_location='key-value', whose prompts have no outputs": dict(
        prompt_location="key-value", pool="prompts"
    ),
    "pool: got 'image_and_prompts' with prompt_location='add', whose prompts have no outputs": dict(
        prompt_location="add", pool="image_and_prompts"
    ),
    "prompt_type: got 'medium'": dict(prompt_type="medium"),
    "prompt_type: got 'deep' with prompt_location='pad'": dict(prompt_location="pad"),
    "prompt_location: got 'below'": dict(prompt_location="below"),
    "prompt_layers: got 4": dict(prompt_layers=4),
    "prompt_layers: got 0": dict(prompt_layers=0),
    "prompt_layers: got \\[\\]": dict(prompt_layers=[]),
    "prompt_layers: got \\[0, 3\\]": dict(prompt_layers=[0, 3]),
    "prompt_layers: got \\[1, 1\\]": dict(prompt_layers=[1, 1]),
    "prompt_layers: got 1 with prompt_type='shallow'": dict(prompt_layers=1, prompt_type="shallow"),
    "after_prompts: got 'stay'": dict(after_prompts="stay"),
    "after_prompts: got 'drop' with prompt_location='add'": dict(
        prompt_location="add", num_prompts=None, after_prompts="drop"
    ),
    "prompt_shared: got True with prompt_type='shallow'": dict(prompt_shared=True, prompt_type="shallow"),
    "prompt_shared: got 'no'": dict(prompt_shared="no"),
    "prompt_project: got 0": dict(prompt_project=0),
    "prompt_project: got 4 with prompt_location='pad'": dict(
        prompt_location="pad", prompt_type="shallow", prompt_project=4
    ),
    "prompt_dropout: got 1.0": dict(prompt_dropout=1.0),
    "prompt_dropout: got '0.1'": dict(prompt_dropout="0.1"),
    "prompt_dropout: got 0.1 with prompt_location='pad'": dict(
        prompt_location="pad", prompt_type="shallow", prompt_dropout=0.1
    ),
    "prompt_dropout_per: got 'epoch'": dict(prompt_dropout_per="epoch"),
    "pool: got 'mean'": dict(pool="mean"),
    "pool: got \\['cls'\\]": dict(pool=["cls"]),
    "pool: the head reads prompts": dict(pool="prompts", prompt_layers=1, after_prompts="drop"),
    "pool: the head reads patches and prompts": dict(
        pool="image_and_prompts", prompt_layers=1, after_prompts="drop"
    ),
    "num_classes: got 0": dict(num_classes=0),
    "dtype: got torch.int8": dict(dtype=torch.int8),
    "dtype: got torch.float8_e4m3fn": dict(dtype=torch.float8_e4m3fn),
    "backend: got 'cuda'": dict(backend="cuda"),
    "pretrained, img_size: only with a backbone's name": dict(pretrained=True, img_size=64),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_setting_is_refused_by_name(message: str) -> None:
    settings = dict(num_classes=5, num_prompts=5) | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        PromptedViT(tiny_vit(), **settings)


def test_unknown_memory_policy_names_the_choices() -> None:
    with pytest.raises(ValueError, match="memory: got 'least', want one of 'auto', 'exact', 'compact'"):
        PromptedViT(tiny_vit(), 5, 5, memory="least")


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_memory_policy_is_checked_when_it_is_changed(kind, backbone) -> None:
    model = kind(backbone(), 5, 5)
    with pytest.raises(ValueError, match="memory: got 'least', want one of 'auto', 'exact', 'compact'"):
        model.memory = "least"
    assert model.memory == "exact"


def test_memory_is_refused_where_no_policy_would_be_read() -> None:
    model = LinearProbe(tiny_vit(), 5)
    with pytest.raises(ValueError, match="memory: got 'recompute' with LinearProbe, which has no memory"):
        model.memory = "recompute"
    assert not hasattr(model, "memory")


@pytest.mark.parametrize(
    "settings",
    [dict(prompt_type="shallow"), dict(pool="image_and_prompts"), dict(prompt_shared=True)],
    ids=lambda settings: "-".join(settings),
)
def test_prompts_of_another_shape_in_place_of_the_models_are_refused(settings: dict) -> None:
    model = PromptedViT(tiny_vit(torch.float32), 5, 4, **settings)
    images, _ = random_batch(model, dtype=torch.float32)
    kept = model.prompts.shape
    model.prompts = torch.nn.Parameter(torch.zeros(kept[0], 6, 32))
    with pytest.raises(
        ValueError, match=rf"prompts: got shape \({kept[0]}, 6, 32\), want \({kept[0]}, 4, 32\)"
    ):
        model(images)
    model.prompts = torch.nn.Parameter(torch.zeros(kept))
    assert model(images).shape == (2, 5)


def test_prompts_of_another_shape_in_a_swin_are_refused() -> None:
    model = PromptedSwin(tiny_swin(torch.float32), 5, 4)
    model.prompts[1] = torch.nn.Parameter(torch.zeros(2, 6, 32))
    images, _ = random_batch(model, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"prompts\.1: got shape \(2, 6, 32\), want \(2, 4, 32\)"):
        model(images)


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_frozen_weights_that_want_a_gradient_are_refused(kind, backbone) -> None:
    model = kind(backbone(), 5, 5)
    images = torch.randn(1, model.backbone.in_chans, *model.image_size)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="got frozen weights with requires_grad True"):
        model(images)
    with torch.no_grad():
        assert model(images).shape == (1, 5)


@pytest.mark.parametrize("name", ["qkv_bias", "proj_bias", "fc1_bias", "fc2_weight"])
@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_any_weight_of_a_frozen_block_that_wants_a_gradient_is_refused(kind, backbone, name: str) -> None:
    model = kind(backbone(), 5, 5)
    block = next(module for module in model.backbone.modules() if isinstance(module, FrozenBlock))
    getattr(block, name).requires_grad_(True)
    with pytest.raises(ValueError, match="got frozen weights with requires_grad True"):
        model(torch.randn(1, model.backbone.in_chans, *model.image_size).double())


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_gradcheck_with_undefined_gradients_passes(kind, backbone) -> None:
    model = kind(backbone(), 3, 2).double()
    images = torch.randn(1, model.backbone.in_chans, *model.image_size, dtype=torch.float64)
    assert torch.autograd.gradcheck(model, images.requires_grad_(), fast_mode=True)


def with_layer_scale(gamma: float) -> VisionTransformer:
    vit = tiny_vit(init_values=1.0)
    for block in vit.blocks:
        for scale in (block.ls1, block.ls2):
            scale.gamma.data.fill_(gamma)
    return vit.float()


def test_float16_is_refused_where_a_layer_scale_would_be_lost_in_it() -> None:
    message = "dtype: got float16.*LayerScale.*want bfloat16 or float32"
    vit = with_layer_scale(1e-5)
    with pytest.raises(ValueError, match=message):
        PromptedViT(vit, 5, 5, dtype=torch.float16)
    model = PromptedViT(vit, 5, 5)
    with pytest.raises(ValueError, match=message):
        model.hold_frozen_weights_in(torch.float16)
    images = torch.randn(1, 3, *model.image_size)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=message):
        model(images)


def test_model_whose_last_block_does_not_survive_in_float16_is_left_as_it_is() -> None:
    vit = with_layer_scale(0.1)
    vit.blocks[-1].ls1.gamma.data.fill_(1e-5)
    model = PromptedViT(vit, 5, 5)
    with pytest.raises(ValueError, match="dtype: got float16"):
        model.hold_frozen_weights_in(torch.float16)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize(("gamma", "dtype"), [(0.1, torch.float16), (1e-6, torch.bfloat16)])
def test_layer_scale_that_survives_is_taken(gamma: float, dtype: torch.dtype) -> None:
    vit = with_layer_scale(gamma)
    PromptedViT(vit, 5, 5, dtype=dtype)
    PromptedViT(vit, 5, 5).hold_frozen_weights_in(dtype)


def test_settings_are_checked_before_a_backbone_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("built a backbone"))
    for bad in (dict(num_prompts=0), dict(num_prompts=1, pool="mean"), dict(num_prompts=1, backend="x")):
        with pytest.raises(ValueError):
            PromptedViT("vit_base_patch16_224", 5, **bad)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vit_base_patch16_225", "'vit_base_patch16_225'.*close names: vit_base_patch16_224"),
        ("swin_tiny_patch4_window7_224", "not a timm VisionTransformer"),
        ("resnet50", "not a timm VisionTransformer, Eva or Beit, the one kind supported here"),
        ("swinv2_tiny_window8_256", r"not a timm Vis.*, nor of another .*\(SwinTransformer, ConvNet\)"),
        (
            torch.nn.Linear(2, 2),
            r"got a torch\.nn\.modules\.linear\.Linear, want a timm name or a timm Vision",
        ),
        (tiny_swin(), r"got a timm\.models\.swin_transformer\.SwinTransformer, want a timm name"),
        (None, r"got a builtins\.NoneType"),
    ],
)
def test_backbone_of_another_kind_is_refused(backbone, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptedViT(backbone, 5, 5)


@pytest.mark.parametrize("size", [225, (224, 200)], ids=str)
def test_image_size_that_the_patch_size_does_not_divide_is_refused(size) -> None:
    with pytest.raises(ValueError, match=r"img_size: got .*multiple of the patch size 16x16"):
        PromptedViT("vit_tiny_patch16_224", 5, 5, img_size=size, depth=1)


def test_border_that_the_patch_size_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"img_size: got 234x234 \(with a border of 5 pixels"):
        PromptedViT("vit_tiny_patch16_224", 5, 5, "shallow", prompt_location="pad", depth=1)


@pytest.mark.parametrize("border", [16, 20])
def test_border_that_leaves_no_image_is_refused(border: int) -> None:
    with pytest.raises(ValueError, match=f"num_prompts: got {border} .* built for 32x32, border included"):
        PromptedViT(tiny_vit(), 5, border, "shallow", prompt_location="pad")


def test_border_around_a_model_of_unknown_image_size_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    settings = dict(prompt_location="pad", depth=1)
    with pytest.raises(ValueError, match="img_size: timm knows no default for 'vit_tiny_patch16_224'"):
        PromptedViT("vit_tiny_patch16_224", 5, 8, "shallow", **settings)
    model = PromptedViT("vit_tiny_patch16_224", 5, 8, "shallow", img_size=48, **settings)
    assert model.image_size == (48, 48)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 4, 32, 32)], ids=str)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: got shape .*want \(batch, 3, height, width\)"):
        PromptedViT(tiny_vit(), 5, 5).double()(torch.zeros(shape).double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("location", ["prepend", "pad"])
def test_images_that_cannot_be_normalised_are_refused(location: str, dtype: torch.dtype) -> None:
    model = PromptedViT(tiny_vit(), 5, 4, "shallow", prompt_location=location)
    with pytest.raises(ValueError, match=f"images: got {dtype}, want normalised images"):
        model(torch.zeros(2, 3, *model.image_size, dtype=dtype))


@pytest.mark.parametrize("images", [[[0.0]], np.zeros((1, 3, 32, 32), np.float32)], ids=["list", "array"])
def test_images_that_are_no_tensor_are_refused(images) -> None:
    with pytest.raises(ValueError, match="images: got a (list|ndarray), want a torch.Tensor"):
        PromptedViT(tiny_vit(), 5, 5)(images)


@pytest.mark.parametrize("location", ["add", "pad", "concat-channel"])
def test_prompts_made_for_one_image_size_refuse_another(location: str) -> None:
    settings = dict(prompt_type="shallow", prompt_location=location)
    num_prompts = None if location == "add" else 4
    model = PromptedViT(tiny_vit(dynamic_img_size=True), 5, num_prompts, **settings)
    with pytest.raises(ValueError, match=f"images: got 40x40.*'{location}' is tied to one size"):
        model(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("kind", [lambda vit: PromptedViT(vit, 5, 4), lambda vit: LinearProbe(vit, 5)])
def test_images_of_another_size_are_refused_unless_any_size_is_taken(kind) -> None:
    with pytest.raises(ValueError, match="images: got 40x32, want 32x32"):
        kind(tiny_vit())(torch.zeros(1, 3, 40, 32))
    model = kind(tiny_vit(dynamic_img_size=True)).double()
    assert model(torch.zeros(1, 3, 40, 32).double()).shape == (1, 5)
    with pytest.raises(ValueError, match="images: got 41x32, want a multiple of 8x8"):
        model(torch.zeros(1, 3, 41, 32))


@pytest.mark.parametrize("backbone", [tiny_vit, tiny_eva])
def test_no_images_are_refused_where_timm_s_positions_take_none(backbone) -> None:
    none = torch.zeros(0, 3, 32, 32).double()
    assert PromptedViT(backbone(), 5, 4).double()(none).shape == (0, 5)
    model = PromptedViT(backbone(dynamic_img_size=True), 5, 4).double()
    with pytest.raises(
        ValueError, match="images: got a batch of 0, and .*dynamic_img_size.* take none; want"
    ):
        model(none)


def test_backbone_for_one_channel_takes_grey_images() -> None:
    vit = tiny_vit(in_chans=1)
    images = torch.zeros(2, 1, 32, 32).double()
    assert PromptedViT(vit, 5, 4).double()(images).shape == (2, 5)
    pixel = PromptedViT(vit, 5, 4, "shallow", prompt_location="prepend-pixel").double()
    assert pixel.prompts.shape == (1, 1, 8, 32) and pixel(images).shape == (2, 5)


def test_border_of_rgb_pixels_around_grey_images_is_refused() -> None:
    with pytest.raises(ValueError, match="'pad' with a backbone for 1 channels"):
        PromptedViT(tiny_vit(in_chans=1), 5, 4, "shallow", prompt_location="pad")


def test_pool_cls_without_a_cls_token_is_refused() -> None:
    with pytest.raises(ValueError, match="pool: got 'cls'"):
        PromptedViT(tiny_vit(class_token=False, global_pool="avg"), 5, 5, pool="cls")


def test_dropout_per_image_differs_between_images_and_per_batch_does_not() -> None:
    vit, images = tiny_vit(), torch.randn(1, 3, 32, 32).double().expand(4, -1, -1, -1)
    for per, distinct in (("image", 4), ("batch", 1)):
        torch.manual_seed(0)
        model = PromptedViT(vit, 5, 50, prompt_dropout=0.5, prompt_dropout_per=per).double().train()
        logits = model(images)
        # one row of a batch may differ from another in the last bits, whatever it holds
        assert len({tuple(row.detach().numpy().round(8)) for row in logits}) == distinct


def test_timm_finds_the_data_settings_as_on_its_own_models() -> None:
    name = "vit_tiny_patch16_224"
    expected = timm.data.resolve_model_data_config(timm.create_model(name, depth=1))
    model = PromptedViT(name, 5, 4, depth=1)
    assert timm.data.resolve_model_data_config(model) == model.data_config == expected
    assert model.num_classes == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_widened_patch_embedding_gives_its_norm_the_dtype_that_it_takes(dtype: torch.dtype) -> None:
    settings = dict(num_prompts=2, prompt_type="shallow", prompt_location="concat-channel")
    model = PromptedViT(tiny_vit(dtype, embed_norm_layer=torch.nn.LayerNorm), 5, **settings)
    images, _ = random_batch(model, dtype=torch.float32)
    model(images).sum().backward()
    assert model.backbone.stem.patch_embed.proj.weight.grad.isfinite().all()


def test_widened_patch_embedding_keeps_the_weights_of_a_float64_backbone() -> None:
    vit = tiny_vit()
    with torch.no_grad():
        vit.patch_embed.proj.weight += 1e-12  # which float32 would lose
    model = PromptedViT(vit, 5, 2, "shallow", prompt_location="concat-channel")
    assert torch.equal(model.backbone.stem.patch_embed.proj.weight[:, :3], vit.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("convolution", "message"),
    [
        (StdConv2d(3, 32, 8, 8, padding=0, bias=True), "^backbone: patch_embed.proj is a timm.*StdConv2d"),
        (torch.nn.Conv2d(3, 33, 8, 8, groups=3), "^prompt_location: .* patch_embed.proj has 3 groups"),
    ],
    ids=["standardised", "groups"],
)
def test_patch_embedding_that_cannot_be_widened_is_refused(
    convolution: torch.nn.Conv2d, message: str
) -> None:
    vit = tiny_vit()
    vit.patch_embed.proj = convolution
    with pytest.raises(ValueError, match=message):
        PromptedViT(vit, 5, 2, "shallow", prompt_location="concat-channel")


def test_bias_of_the_widened_patch_embedding_may_be_trained_alone() -> None:
    model = PromptedViT(tiny_vit(), 5, 2, "shallow", prompt_location="concat-channel").double()
    images, _ = random_batch(model)
    bias = model.backbone.stem.patch_embed.proj.bias
    (expected,) = torch.autograd.grad(model(images).sum(), bias)
    model.requires_grad_(False)
    bias.requires_grad_(True)
    (found,) = torch.autograd.grad(model(images).sum(), bias)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_frozen_weights_are_not_rounded_to_what_they_would_not_survive(dtype: torch.dtype) -> None:
    model = PromptedViT(tiny_vit(torch.float32), 5, 4)
    with pytest.raises(ValueError, match=f"dtype: got {dtype}, want a floating-point torch.dtype of 16 bits"):
        model.hold_frozen_weights_in(dtype)
    assert model.backbone.blocks[0].qkv_weight.dtype == torch.float32


@pytest.mark.parametrize(
    "build",
    [
        lambda: PromptedViT(tiny_vit(torch.float32), 5, 4),
        lambda: PromptedSwin(tiny_swin(torch.float32), 5, 4),
        lambda: LinearProbe(tiny_vit(torch.float32), 5),
    ],
    ids=["vit", "swin", "linear"],
)
def test_weights_folded_under_autocast_are_not_rounded(build) -> None:
    expected = build().backbone.state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = build().backbone.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    "build",
    [
        lambda: PromptedViT(tiny_vit(torch.float32), 5, 4),
        lambda: PromptedSwin(tiny_swin(torch.float32), 5, 4),
        lambda: PromptedConvNet("resnet10t", 5, 2, img_size=32),
        lambda: LinearProbe(tiny_vit(torch.float32), 5),
    ],
    ids=["vit", "swin", "convnet", "linear"],
)
def test_model_built_in_inference_mode_is_trained_outside_of_it(build) -> None:
    with torch.inference_mode():
        model = build()
    images, _ = random_batch(model, dtype=torch.float32)
    model(images).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
