"""Every way to tune beside prompts: its definition, what it keeps, and how it is stored."""

from __future__ import annotations

import importlib.util
import urllib.error

import pytest
import torch
import torchvision
from concatenation import relative_error, step
from kept_bytes import KeptBytes
from tiny import random_batch, tiny_beit, tiny_distilled, tiny_eva, tiny_vit
from torch import nn
from ways_to_tune import logits

from vpt_fast import LinearProbe, load_pretrained
from vpt_fast.tuned_model import TunedModel
from vpt_fast.tuning.adapter import Adapter, AdapterTuning
from vpt_fast.tuning.bias import BiasTuning, PromptAndBiasTuning
from vpt_fast.tuning.cls_token import ClsTokenTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.lora import LoRATuning
from vpt_fast.tuning.partial import PartialTuning
from vpt_fast.tuning.probes import MLPProbe
from vpt_fast.tuning.side import SideTuning

CLASSES = 5
WAYS = {
    "linear": (LinearProbe, {}),
    "mlp-1": (MLPProbe, {"num_layers": 1}),
    "mlp-3": (MLPProbe, {"num_layers": 3}),
    "partial-1": (PartialTuning, {}),
    "partial-3": (PartialTuning, {"num_tuned_blocks": 3}),
    "sidetune": (SideTuning, {}),
    "cls-token": (ClsTokenTuning, {}),
    "full": (FullTuning, {}),
    "bias": (BiasTuning, {}),
    "vpt+bias": (PromptAndBiasTuning, {"num_prompts": 4}),
    "adapter": (AdapterTuning, {"reduction": 8}),
    "lora": (LoRATuning, {"rank": 2}),
}
# The plain ViT; one with registers, LayerScale, a mean over the patches, and norms on queries and keys, on
# attention's output and in the MLP; one of DeiT's distilled; two of Eva; and one of Beit.
BACKBONES = {
    "plain": {},
    "rich": dict(
        reg_tokens=2, init_values=0.1, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True,
        global_pool="avg", fc_norm=True,
    ),
    "distilled": dict(build=tiny_distilled),
    "dinov3": dict(
        build=tiny_eva, rope_type="dinov3", rope_rotate_half=True, init_values=0.1, num_reg_tokens=2,
        dynamic_img_size=True,
    ),
    "mixed": dict(
        build=tiny_eva, rope_type="mixed", attn_type="rope", qkv_fused=False, swiglu_mlp=True,
        scale_mlp=True, scale_attn_inner=True,
    ),
    "beit": dict(build=tiny_beit),
}  # fmt: skip


def make(method: str, dtype: torch.dtype = torch.float64, build=tiny_vit, **backbone):
    """A timm model, and the method's model on it with every trained tensor moved from its start."""
    kind, options = WAYS[method]
    size = {"img_size": 64, "patch_size": 16} if method == "sidetune" else {}
    vit = build(dtype=dtype, **size, **backbone)
    model = kind(vit, CLASSES, **options).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
    return vit, model.eval()


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_logits_and_gradients_are_those_of_the_definition(method: str, backbone: dict) -> None:
    vit, model = make(method, **backbone)
    images, labels = random_batch(model)
    found = step(model, images, labels)

    trained = {name: t.clone().requires_grad_() for name, t in model.trainable_state_dict().items()}
    wanted = logits(method, vit, images, trained)
    nn.functional.cross_entropy(wanted, labels).backward()
    assert relative_error(found.logits, wanted) < 1e-12
    for name, tensor in trained.items():
        error = (found.gradients[name] - tensor.grad).norm() / (1e-3 + tensor.grad.norm())
        assert error < 1e-11, name
    frozen = [name for name, p in model.named_parameters() if name not in trained and p.grad is not None]
    assert not frozen


@pytest.mark.parametrize("method", ["partial-1", "vpt+bias"])
def test_logits_on_an_eva_without_rotary_positions_are_those_of_the_definition(method: str) -> None:
    eva, model = make(method, build=tiny_eva, use_rot_pos_emb=False)
    images, _ = random_batch(model)
    wanted = logits(method, eva, images, model.trainable_state_dict())
    assert relative_error(model(images), wanted) < 1e-12


@pytest.mark.parametrize("method", ["full", "bias"])
def test_an_attention_pool_that_another_pooling_replaces_is_not_trained(method: str) -> None:
    kind, options = WAYS[method]
    model = kind(tiny_vit(global_pool="map"), CLASSES, pool="cls", **options).double()
    trained = model.trainable_state_dict().keys()
    assert trained and not any("attn_pool" in name for name in trained)
    assert step(model, *random_batch(model)).gradients.keys() == trained


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_gradient_of_images_is_that_of_the_definition(method: str, backbone: dict) -> None:
    vit, model = make(method, **backbone)
    images, labels = random_batch(model)
    found, wanted = images.clone().requires_grad_(), images.requires_grad_()
    nn.functional.cross_entropy(model(found), labels).backward()
    trained = model.trainable_state_dict()
    nn.functional.cross_entropy(logits(method, vit, wanted, trained), labels).backward()
    assert relative_error(found.grad, wanted.grad) < 1e-12


def test_patch_tokens_of_a_linear_probe_pass_a_gradient_to_the_images() -> None:
    vit, model = make("linear")
    images, _ = random_batch(model)
    found, wanted = images.clone().requires_grad_(), images.requires_grad_()
    for block, tokens in zip((0, 2), model.patch_tokens(found, (0, 2)), strict=True):
        after = vit.forward_intermediates(wanted, indices=[block], norm=False, output_fmt="NLC")[1][0]
        assert relative_error(tokens, after) < 1e-12
        for x in (tokens, after):
            x.square().sum().backward(retain_graph=True)
    assert relative_error(found.grad, wanted.grad) < 1e-12


@pytest.mark.parametrize("method", ["linear", "mlp-3", "partial-1", "sidetune"])
def test_nothing_of_the_frozen_blocks_is_recorded_where_images_want_no_gradient(method: str) -> None:
    _, model = make(method)
    recorded = []
    for block in model.backbone.folded_blocks:
        block.register_forward_hook(lambda m, args, out: recorded.append(out.sum().requires_grad))
    model(random_batch(model)[0])
    assert recorded and not any(recorded)


@pytest.mark.parametrize("method", WAYS)
def test_saved_model_gives_the_same_logits_and_settings(method: str, tmp_path) -> None:
    vit, model = make(method, torch.float32)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, vit).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    assert type(again) is type(model) and again.config == model.config
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("method", WAYS)
def test_frozen_features_and_the_trained_part_make_up_the_model(method: str) -> None:
    _, model = make(method)
    images, _ = random_batch(model)
    if method in ("linear", "mlp-1", "mlp-3", "partial-1", "partial-3"):
        features = model.frozen_features(images)
        assert features.shape == (2, *model.feature_shape) and not features.requires_grad
        assert torch.equal(model.classify(features), model(images))
    else:
        assert model.feature_shape is None
        with pytest.raises(NotImplementedError, match="has no frozen features"):
            model.frozen_features(images)


IN_TIMMS_BLOCKS = ["partial-1", "partial-3", "full", "bias", "vpt+bias", "adapter", "lora"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [tiny_vit, tiny_eva, tiny_beit])
@pytest.mark.parametrize("method", IN_TIMMS_BLOCKS)
def test_model_may_be_brought_into_16_bits(method: str, build, dtype: torch.dtype) -> None:
    _, model = make(method, torch.float32, build)
    images, labels = random_batch(model, dtype=torch.float32)
    expected = step(model, images, labels)
    found = step(model.to(dtype), images, labels)
    assert relative_error(found.logits, expected.logits) < 0.1
    assert {gradient.dtype for gradient in found.gradients.values()} == {dtype}


@pytest.mark.parametrize("method", IN_TIMMS_BLOCKS)
def test_head_may_stay_in_float32_behind_a_backbone_in_float64(method: str) -> None:
    kind, options = WAYS[method]
    model = kind(tiny_vit(), CLASSES, **options).eval()
    images, _ = random_batch(model)
    found, expected = model(images), model.double()(images)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("method", ["bias", "vpt+bias", "adapter"])
def test_inputs_of_frozen_linear_layers_are_not_kept(method: str) -> None:
    _, model = make(method)
    inputs = []  # the tensors too: memory that was given back could be handed out again
    for name, module in model.backbone.blocks.named_modules():
        if name.endswith("norm1"):  # attention's projection takes what it gives
            module.register_forward_hook(lambda module, args, output: inputs.append(output))
        if name.endswith(("fc1", "fc2")):
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images, _ = random_batch(model)
    with KeptBytes(model, images) as kept:
        model(images)
    assert len(inputs) == (12 if method == "vpt+bias" else 9)  # of the prompts too
    assert not any(tensor in kept for tensor in inputs)


def test_prompts_beside_biases_are_keys_and_values_alone() -> None:
    _, model = make("vpt+bias")
    rows = {"norm1": [], "proj": [], "fc1": []}
    for name, module in model.backbone.blocks.named_modules():
        seen = rows.get(name.rpartition(".")[2])
        if seen is not None:
            module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[:2]))
    model.eval()(random_batch(model)[0])
    tokens, prompts = (2, model.backbone.num_tokens), (1, model.prompts.shape[1])
    assert rows == {"norm1": [tokens, prompts] * 3, "proj": [tokens] * 3, "fc1": [tokens] * 3}


@pytest.mark.parametrize("method", WAYS)
def test_image_features_are_what_the_head_is_given(method: str) -> None:
    _, model = make(method)
    images, _ = random_batch(model)
    given = []
    model.head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    if model.feature_shape is None:
        model.eval()(images)
    else:  # by the way that training takes over cached features
        model.eval().classify(model.frozen_features(images))
    assert torch.equal(model.image_features(images), given[0])
    assert given[0].shape == (2, model.embed_dim)


def test_nothing_is_kept_of_what_stands_before_the_first_adapter() -> None:
    _, model = make("adapter")
    with_gradient = []
    for block in model.backbone.blocks:
        block.norm2.register_forward_hook(lambda m, args, out: with_gradient.append(out.requires_grad))
    model(random_batch(model)[0])
    assert with_gradient == [False, True, True]


# With heads of 64, as statistics of a head's norms are not counted.
@pytest.mark.parametrize(
    "backbone",
    [BACKBONES["plain"], BACKBONES["rich"] | dict(embed_dim=128, num_heads=2), BACKBONES["dinov3"]],
    ids=["plain", "rich", "dinov3"],
)
@pytest.mark.parametrize("method", [name for name in WAYS if name != "sidetune"])
def test_estimate_covers_what_is_kept(method: str, backbone: dict) -> None:
    _, model = make(method, torch.float32, **backbone)
    images, _ = random_batch(model, 8, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert 0.98 * kept.total <= model.estimate_training_bytes(len(images))["kept"] <= 1.5 * kept.total


@pytest.mark.parametrize("rate", ["proj_drop_rate", "drop_rate"])
@pytest.mark.parametrize("method", ["full", "bias", "adapter", "partial-1"])
def test_dropout_of_timms_acts_in_training_alone(method: str, rate: str) -> None:
    _, model = make(method, **{rate: 0.5})
    images, _ = random_batch(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    "rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
)
@pytest.mark.parametrize("build", [tiny_vit, tiny_eva, tiny_beit])
def test_full_tuning_drops_what_timm_s_own_model_drops(build, rate: str) -> None:
    vit, model = make("full", build=build, num_classes=CLASSES, **{rate: 0.5})
    vit.load_state_dict(
        {name.removeprefix("backbone.").removeprefix("stem."): t for name, t in model.state_dict().items()}
    )
    images, _ = random_batch(model, 4)
    logits_of = []
    for each in (model.train(), vit.train()):
        torch.manual_seed(0)
        logits_of.append(each(images))
    assert relative_error(*logits_of) < 1e-12


def test_full_tuning_is_loaded_without_the_weights_that_it_began_from(tmp_path) -> None:
    _, model = make("full", torch.float32)
    model.save_pretrained(tmp_path)
    images, _ = random_batch(model, dtype=torch.float32)
    other = FullTuning.from_pretrained(tmp_path, tiny_vit(torch.float32, seed=5)).eval()
    assert torch.equal(other(images), model(images)) and other.config == model.config


@pytest.mark.parametrize("method", ["partial-1", "bias"])
def test_other_backbone_is_refused(method: str, tmp_path) -> None:
    make(method)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not those that .* was trained on"):
        load_pretrained(tmp_path, tiny_vit(seed=5))


def test_frozen_and_trained_parts_of_a_16_bit_backbone() -> None:
    vit = tiny_vit(torch.float32)
    model = PartialTuning(vit, CLASSES, dtype=torch.bfloat16)
    assert model.backbone.blocks[0].qkv_weight.dtype == torch.bfloat16
    for name, tensor in vit.norm.state_dict().items():  # the start of what is trained has not been rounded
        assert torch.equal(model.backbone.stem.norm.state_dict()[name], tensor)
    images, _ = random_batch(model, dtype=torch.float32)
    assert model.frozen_features(images).dtype == torch.float32
    half = AdapterTuning(tiny_vit(torch.bfloat16), CLASSES)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


BAD = {
    "num_layers": (lambda vit: MLPProbe(vit, CLASSES, 0), "num_layers: got 0, want a whole number from 1"),
    "no_block": (lambda vit: PartialTuning(vit, CLASSES, 0), "num_tuned_blocks: got 0, want a whole"),
    "blocks": (lambda vit: PartialTuning(vit, CLASSES, 4), "num_tuned_blocks: got 4, and .* has 3 blocks"),
    "reduction": (
        lambda vit: AdapterTuning(vit, CLASSES, 33),
        "reduction: got 33, want at most",
    ),
    "rank": (lambda vit: LoRATuning(vit, CLASSES, 0), "rank: got 0, want a whole number from 1"),
    "large_rank": (lambda vit: LoRATuning(vit, CLASSES, 33), "rank: got 33, want at most .*width, 32"),
    "side": (lambda vit: SideTuning(vit, CLASSES), "images are 3x32x32, and the side network.* 63x63"),
    "pool": (lambda vit: FullTuning(vit, CLASSES, pool="prompts"), "pool: got 'prompts', and .* no prompts"),
    "num_prompts": (lambda vit: PromptAndBiasTuning(vit, CLASSES, 0), "num_prompts: got 0"),
    "dtype": (
        lambda _: FullTuning("vpt_fast_demo", CLASSES, dtype=torch.bfloat16),
        "dtype: got torch.bfloat16 with FullTuning, whose modules run in float32 or more; want autocast",
    ),
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD)
def test_argument_out_of_range_is_refused_by_name(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny_vit())


@pytest.mark.parametrize(("build", "name"), [(tiny_eva, "Eva"), (tiny_beit, "Beit")])
@pytest.mark.parametrize("method", ["partial-1", "bias", "adapter"])
def test_no_images_are_refused_where_timm_s_attention_takes_none(method: str, build, name: str) -> None:
    _, model = make(method, build=build)
    images, _ = random_batch(model)
    with pytest.raises(ValueError, match=f"images: got a batch of 0, and .*{name} take none; want 1 or more"):
        model(images[:0])


def test_cls_token_tuning_refuses_a_backbone_without_one() -> None:
    with pytest.raises(ValueError, match="backbone: it has no CLS token to tune"):
        ClsTokenTuning(tiny_vit(class_token=False, global_pool="avg"), CLASSES)


def test_lora_without_peft_names_the_package_before_a_backbone_is_built(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package peft"):
        LoRATuning("no such backbone", CLASSES)


def test_adapters_start_as_the_identity_with_a_gradient() -> None:
    vit = tiny_vit()
    model = AdapterTuning(vit, CLASSES).double()
    images, labels = random_batch(model)
    probe = LinearProbe(vit, CLASSES).double()
    probe.head.load_state_dict(model.head.state_dict())
    assert relative_error(model(images), probe(images)) < 1e-12
    assert step(model, images, labels).gradients["adapters.0.up.weight"].norm() > 0


def test_adapters_are_drawn_as_narrowly_as_the_linear_layers_of_a_vit() -> None:
    torch.manual_seed(0)
    down = Adapter(512, 4, torch.device("cpu"), torch.float32).down
    assert down.weight.std().item() == pytest.approx(0.02, rel=0.02) and not down.bias.any()


def test_side_network_starts_from_published_weights_where_they_can_be_had(monkeypatch) -> None:
    published = {f"features.{k}": v for k, v in torchvision.models.alexnet().features.state_dict().items()}
    classifier = {"classifier.1.weight": torch.empty(4096, 9216, device="meta")}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **settings: published | classifier)
    model = SideTuning(tiny_vit(img_size=64, patch_size=16), CLASSES, side_pretrained=True)
    found = model.side[0].state_dict()
    assert len(found) == len(published)
    assert all(torch.equal(tensor, published[f"features.{name}"]) for name, tensor in found.items())


def test_side_network_takes_no_memory_for_alexnets_classifier(monkeypatch) -> None:
    built, start = [], nn.Linear.reset_parameters
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: (built.append(self.weight), start(self)))
    SideTuning(tiny_vit(img_size=64, patch_size=16), CLASSES)
    assert max(weight.numel() for weight in built if not weight.is_meta) == 9216 * 32


def test_side_network_that_starts_random_says_so(monkeypatch) -> None:
    def offline(url: str, **settings):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.warns(UserWarning, match="the side network starts random: .*no network"):
        SideTuning(tiny_vit(img_size=64, patch_size=16), CLASSES, side_pretrained=True)


def test_every_class_is_found_by_load_pretrained() -> None:
    from vpt_fast.pretrained import MODELS

    assert {kind for kind, _ in WAYS.values()} <= set(MODELS.values())
    assert all(issubclass(kind, TunedModel) for kind in MODELS.values())
