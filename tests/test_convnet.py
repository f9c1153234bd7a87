"""PromptedConvNet against its plain definition in float64; what is kept; how it is stored."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from concatenation import relative_error
from kept_bytes import KeptBytes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tiny import random_batch, tiny_convnet
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from vpt_fast import LinearProbe, PromptedConvNet, load_pretrained
from vpt_fast.backbones.creation import overlay_of
from vpt_fast.backbones.known import KNOWN
from vpt_fast.backbones.resolve import CONVNET, resolve_backbone
from vpt_fast.prompts import pad_image

FAMILIES = (
    "resnet10t",
    "convnext_atto",
    "efficientnet_b0",
    "regnetx_002",
    "mobilenetv3_small_050",
    "densenet121",
)
# Small ones of what else is supported: normalised weights, re-parametrised branches, splits, several inputs.
MORE_FAMILIES = (
    "cs3darknet_focus_s",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "ghostnet_050",
    "inception_next_atto",
    "repghostnet_050",
    "rexnet_100",
    "starnet_s050",
    "test_byobnet",
    "test_nfnet",
)


@pytest.mark.parametrize("name", FAMILIES + MORE_FAMILIES)
def test_border_gives_the_logits_and_gradients_of_the_plain_definition(name):
    plain = tiny_convnet(name)
    model = PromptedConvNet(plain, 5, 3).double()
    images, labels = random_batch(model)
    F.cross_entropy(model(images), labels).backward()
    rows, sides = (t.detach().clone().requires_grad_() for t in (model.prompts, model.prompts_sides))
    logits = model.head(plain(pad_image(images, rows, sides, 3)))
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), (rows, sides, *model.head.parameters()))
    got = (model.prompts.grad, model.prompts_sides.grad, *(p.grad for p in model.head.parameters()))
    torch.testing.assert_close(model(images), logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_map_and_its_gradient_are_timms_own_of_the_image_with_its_border(name):
    plain = tiny_convnet(name)
    model = PromptedConvNet(plain, 5, 3).double()
    images, _ = random_batch(model)
    rows, sides = (t.detach().clone().requires_grad_() for t in (model.prompts, model.prompts_sides))
    wanted = plain.forward_features(pad_image(images, rows, sides, 3))
    got = model.forward_features(images)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * weights).sum(), (rows, sides))
    found = torch.autograd.grad((got * weights).sum(), (model.prompts, model.prompts_sides))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_extra_channels_are_the_image_plus_a_convolution_of_the_prompts(name):
    plain = tiny_convnet(name)
    model = PromptedConvNet(copy.deepcopy(plain), 5, 2, prompt_location="concat-channel").double()
    images, labels = random_batch(model)
    first = model.backbone.first_name
    trained = model.backbone.stem.get_submodule(first)
    prompts = model.prompts.detach().clone().requires_grad_()
    plain.set_submodule(first, copy.deepcopy(trained))
    logits = model.head(plain(torch.cat((images, prompts.expand(2, -1, -1, -1)), dim=1)))
    F.cross_entropy(model(images), labels).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), prompts)
    torch.testing.assert_close(model.prompts.grad, expected, rtol=1e-9, atol=1e-10)
    names = {"prompts", "head.weight", "head.bias", f"backbone.stem.{first}.weight"}
    assert model.trainable_state_dict().keys() - {f"backbone.stem.{first}.bias"} == names


def test_less_is_kept_than_by_timm_and_what_is_kept_is_what_the_estimate_says():
    plain = tiny_convnet("resnet10t").requires_grad_(False)
    model = PromptedConvNet(plain, 5, 3).double()
    images, _ = random_batch(model)
    rows, sides = model.prompts, model.prompts_sides
    both = nn.ModuleList([plain, model])
    with KeptBytes(both, images) as of_timm:
        model.head(plain(pad_image(images, rows, sides, 3)))
    with KeptBytes(both, images) as ours:
        model(images)
    assert ours.total < 0.6 * of_timm.total
    assert ours.total == model.estimate_training_bytes(2)["kept"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_estimate_is_that_of_training_in_every_mode(mode):
    model = PromptedConvNet(tiny_convnet("resnet10t"), 5, 3)
    in_training = model.estimate_training_bytes(2)
    with mode():
        assert model.estimate_training_bytes(2) == in_training


def test_saved_model_gives_the_same_logits(tmp_path):
    plain = tiny_convnet("resnet10t")
    model = PromptedConvNet(plain, 5, 3).double()
    images, _ = random_batch(model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, plain)
    torch.testing.assert_close(loaded.double()(images), model(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("location", ["pad", "concat-channel"])
def test_model_may_be_brought_into_another_dtype(location, dtype):
    plain = tiny_convnet("resnet10t").float()
    model = PromptedConvNet(plain, 5, 3, prompt_location=location)
    images, labels = random_batch(model, dtype=torch.float32)
    expected = model(images)
    model.to(dtype)
    F.cross_entropy(model(images), labels).backward()
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert relative_error(model(images), expected) < tolerance
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_memory_policy_is_checked_when_it_is_changed():
    model = PromptedConvNet(tiny_convnet("resnet10t"), 5, 3)
    with pytest.raises(ValueError, match="memory: got 'recompute' with a ConvNet"):
        model.memory = "recompute"


def test_frozen_weights_that_want_a_gradient_are_refused():
    model = PromptedConvNet(tiny_convnet("resnet10t"), 5, 3).requires_grad_(True)
    with pytest.raises(ValueError, match="got frozen weights with requires_grad True"):
        model(torch.randn(1, 3, *model.image_size))


def test_backbone_in_16_bits_is_refused_where_its_first_convolution_is_trained():
    plain = tiny_convnet("resnet10t").bfloat16()
    message = "backbone: got one in torch.bfloat16 with prompt_location='concat-channel'"
    with pytest.raises(ValueError, match=message):
        PromptedConvNet(plain, 5, 2, prompt_location="concat-channel")
    PromptedConvNet(plain, 5, 2, prompt_location="concat-channel", dtype=torch.float32)


def test_linear_probe_reads_the_pooled_features():
    plain = tiny_convnet("resnet10t")
    probe = LinearProbe(plain, 5)
    images, _ = random_batch(probe)
    torch.testing.assert_close(probe.frozen_features(images), plain(images).float())


def test_border_is_normalised_before_it_is_rounded():
    model = PromptedConvNet(tiny_convnet("resnet10t").float(), 5, 4, dtype=torch.bfloat16)
    first = model.backbone.stem.get_submodule(model.backbone.first_name)
    seen = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(random_batch(model, dtype=torch.float32)[0])
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    top = ((model.prompts[0, :, :4] - mean) / std).bfloat16()
    assert all(torch.equal(image[:, :4], top) for image in seen[0])


def test_frozen_weights_are_in_the_dtype_that_is_asked_for():
    probe = LinearProbe(tiny_convnet("resnet10t"), 5, dtype=torch.bfloat16)
    assert {p.dtype for p in probe.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in probe.head.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ("resnet10t", {"prompt_type": "deep"}, "prompt_type: got 'deep' with a ConvNet"),
        (
            "resnet10t",
            {"prompt_location": "prepend"},
            "got 'prepend' with a ConvNet, want 'pad' or 'concat-channel'",
        ),
        ("resnet10t", {"pool": "cls"}, "pool: got 'cls' with a ConvNet"),
        ("resnet10t", {"prompt_dropout": 0.1}, "prompt_dropout=0.1: not with a ConvNet"),
        (
            "resnet10t",
            {"prompt_location": "concat-channel", "dtype": torch.bfloat16},
            "dtype: got torch.bfloat16 with prompt_location='concat-channel'",
        ),
        ("resnet10t", {"attention": "flash_attn"}, "attention: got 'flash_attn' with a ConvNet; want 'auto'"),
        ("resnet10t", {"memory": "compact"}, "memory: got 'compact' with a ConvNet, want 'auto' or"),
        ("dla46x_c", {"img_size": 32}, "num_prompts: got 2 with images of 32x32, and .* none of 36x36"),
        ("bat_resnext26ts", {}, "num_prompts: got 2 with images of 256x256, and .* none of 260x260"),
        (
            "repvgg_a0",
            {"prompt_location": "concat-channel"},
            "prompt_location: got 'concat-channel' with repvgg_a0, .* several read the image",
        ),
        (
            "mobileone_s0",
            {"prompt_location": "concat-channel"},
            "prompt_location: got 'concat-channel' with mobileone_s0, .* several read the image",
        ),
        ("test_vit", {}, "backbone: 'test_vit' is not a timm ConvNet"),
    ],
)
def test_what_a_convnet_does_not_have_is_named(backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        PromptedConvNet(backbone, 3, 2, **settings)


def test_an_instance_that_takes_no_extra_channels_is_named_by_its_class():
    with pytest.raises(ValueError, match="prompt_location: got 'concat-channel' with a ByobNet"):
        PromptedConvNet(timm.create_model("repvgg_a0"), 3, 2, prompt_location="concat-channel")


@pytest.mark.parametrize(
    "change", [weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)], ids=["norm", "pruned"]
)
def test_first_convolution_whose_weight_is_computed_is_not_widened(change):
    plain = tiny_convnet("resnet10t")
    change(plain.conv1[0])
    with pytest.raises(ValueError, match="prompt_location: .* whose conv1.0 computes its weight"):
        PromptedConvNet(plain, 5, 2, prompt_location="concat-channel")


def test_batch_norm_without_running_statistics_is_named():
    norm = partial(nn.BatchNorm2d, track_running_stats=False)
    plain = timm.create_model("resnet10t", norm_layer=norm)
    with pytest.raises(ValueError, match="backbone: conv1.1 is a .*Norm.* without running statistics; want"):
        PromptedConvNet(plain, 5, 2)


def test_image_size_leaves_the_normalisation_of_a_known_backbone():
    with torch.device("meta"):
        model, _ = resolve_backbone("imagenet_sup_rn50", False, {"img_size": 64}, kind=CONVNET)
    known = overlay_of(KNOWN["imagenet_sup_rn50"])
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert {name: model.pretrained_cfg[name] for name in known} == known
