"""Full fine-tuning, biases and others on Swin and ConvNets: the definition, and how they are stored."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from concatenation import relative_error, step
from kept_bytes import KeptBytes
from tiny import random_batch, randomise, tiny_convnet
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn
from ways_to_tune import adapter, low_rank

from vpt_fast import LinearProbe, load_pretrained
from vpt_fast.classifier import TunedClassifier
from vpt_fast.prompts import pad_image
from vpt_fast.training.methods import model_settings
from vpt_fast.training.recipe import Recipe
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.bias import BiasTuning, PromptAndBiasConvNetTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.lora import LoRATuning
from vpt_fast.tuning.partial import PartialNetworkTuning
from vpt_fast.tuning.side import SideTuning

CLASSES = 5
WAYS = {"full": FullTuning, "bias": BiasTuning, "partial": PartialNetworkTuning, "lora": LoRATuning}
OF_TIMMS_OWN_TENSORS = [method for method in WAYS if method != "lora"]
BACKBONES = {
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
    ),
    "resnet10t": dict(stem_width=8, channels=[8, 8, 16, 16]),
    "convnext_atto": dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]),
}


def make(method: str, name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A timm model with statistics of its own, and the method's model on it, moved from its start."""
    torch.manual_seed(seed)
    backbone = randomise(timm.create_model(name, num_classes=0, **BACKBONES[name]), seed)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    if "img_size" not in BACKBONES[name]:
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "input_size": (3, 32, 32)}
    backbone.to(dtype).eval()
    model = WAYS[method](backbone, CLASSES).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return backbone, model


def assert_step_is_defined_by(
    features: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor], model: TunedClassifier
) -> dict[str, torch.Tensor]:
    """Logits and gradients are those of a linear head on `features` of the trained tensors and the images;
    returns the trained tensors."""
    images, labels = random_batch(model)
    found = step(model.eval(), images, labels)  # a Swin of timm's drops whole branches in training
    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    logits = nn.functional.linear(features(trained, images), trained["head.weight"], trained["head.bias"])
    nn.functional.cross_entropy(logits, labels).backward()
    assert relative_error(found.logits, logits) < 1e-12
    for n, tensor in trained.items():
        assert (found.gradients[n] - tensor.grad).norm() < 1e-10 * (1 + tensor.grad.norm()), n
    return trained


def moved(model: TunedClassifier) -> TunedClassifier:
    """In float64, away from where what is trained starts."""
    model.double()
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    return model


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", OF_TIMMS_OWN_TENSORS)
def test_logits_and_gradients_are_those_of_timms_own_network(method: str, name: str) -> None:
    backbone, model = make(method, name)
    network = copy.deepcopy(backbone).requires_grad_(False)

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        own = {n.removeprefix("backbone.stem."): t for n, t in trained.items() if n.startswith("backbone.")}
        return functional_call(network, own, images)

    assert_step_is_defined_by(features, model)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("model", [FullTuning, LinearProbe])
def test_backbone_without_pooling_is_refused(model: type[TunedClassifier], name: str) -> None:
    backbone = timm.create_model(name, num_classes=0, global_pool="", **BACKBONES[name])
    with pytest.raises(ValueError, match="^backbone: .*global_pool=''"):
        model(backbone, CLASSES)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", ["linear", *OF_TIMMS_OWN_TENSORS])
def test_gradient_of_images_is_that_of_timms_own_network(method: str, name: str) -> None:
    backbone, model = make("full" if method == "linear" else method, name)
    if method == "linear":
        model = LinearProbe(backbone, CLASSES).double()
    images, labels = random_batch(model)
    found, wanted = images.clone().requires_grad_(), images.requires_grad_()
    nn.functional.cross_entropy(model.eval()(found), labels).backward()
    network = copy.deepcopy(backbone)
    own = {n.removeprefix("backbone.stem."): t for n, t in model.trainable_state_dict().items()}
    head = own.pop("head.weight"), own.pop("head.bias")
    logits = nn.functional.linear(functional_call(network, own, wanted), *head)
    nn.functional.cross_entropy(logits, labels).backward()
    assert relative_error(found.grad, wanted.grad) < 1e-12


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_head_may_stay_in_float32_behind_a_backbone_in_float64(method: str, name: str) -> None:
    backbone, _ = make(method, name)
    model = WAYS[method](backbone, CLASSES).eval()
    images, _ = random_batch(model)
    found, expected = model(images), model.double()(images)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5


def test_image_size_of_a_convnet_with_a_patch_embedding_is_that_of_its_images() -> None:
    assert FullTuning("fasternet_t0", CLASSES, img_size=32).image_size == (32, 32)


@pytest.mark.parametrize("method", ["full", "partial"])
def test_batch_norm_of_what_is_trained_is_that_of_timms_network_in_training(method: str) -> None:
    network, _ = make(method, "resnet10t")
    model = WAYS[method](network, CLASSES).double()  # a new model is in train mode
    wanted = copy.deepcopy(network)
    (wanted if method == "full" else wanted.layer4).train()
    given = copy.deepcopy(network.state_dict())
    images, _ = random_batch(model, 4)
    assert torch.equal(model.image_features(images), wanted(images))
    found = model.backbone.stem.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    assert all(torch.equal(tensor, given[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("method", ["full", "partial"])
def test_statistics_of_batch_norm_are_saved_with_what_is_trained(method: str, tmp_path) -> None:
    network, model = make(method, "resnet10t", torch.float32)
    images, _ = random_batch(model, dtype=torch.float32)
    model.train()(images)
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, network).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["bias", "lora"])
def test_batch_norm_keeps_its_statistics_in_training(method: str) -> None:
    _, model = make(method, "resnet10t")
    images, _ = random_batch(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(model.train()(images), model.eval()(images))
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("method", ["full", "bias", "partial", "lora"])
def test_update_bn_of_pytorch_forms_the_statistics_that_move_and_leaves_the_others(method: str) -> None:
    _, model = make(method, "resnet10t")
    averaged = AveragedModel(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    update_bn([random_batch(model)[0]], averaged)
    moved = {
        name for name, buffer in before.items() if not torch.equal(averaged.module.get_buffer(name), buffer)
    }
    assert moved == {name for name in before if name in model.trainable_state_dict()}


def test_stochastic_depth_of_timms_acts_in_training() -> None:
    _, model = make("full", "swin_tiny_patch4_window7_224")
    images, _ = random_batch(model, 8)
    assert not torch.equal(model.train()(images), model.eval()(images))


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_trained_is_every_weight_or_every_bias(name: str) -> None:
    backbone, full = make("full", name, torch.float32)
    head = full.head.weight.numel() + full.head.bias.numel()
    assert full.num_trainable_parameters - head == sum(p.numel() for p in backbone.parameters())
    _, bias = make("bias", name, torch.float32)
    biases = {n for n, _ in backbone.named_parameters() if n.endswith("bias")}
    found = {n.removeprefix("backbone.stem.") for n in bias.trainable_state_dict()}
    assert biases and found == biases | {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_saved_model_gives_the_same_logits(method: str, name: str, tmp_path) -> None:
    backbone, model = make(method, name, torch.float32)
    model.save_pretrained(tmp_path)
    other = make(method, name, torch.float32, seed=1)[0] if method == "full" else backbone
    again = load_pretrained(tmp_path, other).eval()  # full has weights and statistics of its own
    images, _ = random_batch(model, dtype=torch.float32)
    assert torch.equal(again(images), model.eval()(images)) and again.config == model.config


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_estimate_covers_what_is_kept(method: str, name: str) -> None:
    _, model = make(method, name, torch.float32)
    images, _ = random_batch(model, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert 0.95 * kept.total <= model.estimate_training_bytes(2)["kept"] <= 1.5 * kept.total


def test_lora_on_a_swin_adds_its_products_to_attentions_layers() -> None:
    backbone, _ = make("full", "swin_tiny_patch4_window7_224")
    network = copy.deepcopy(backbone).requires_grad_(False)

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        for path, linear in network.named_modules():
            if path.endswith((".attn.qkv", ".attn.proj")):
                linear.register_forward_hook(low_rank(trained, f"backbone.stem.{path}"))
        return network(images)

    trained = assert_step_is_defined_by(features, moved(LoRATuning(backbone, CLASSES, rank=2)))
    assert len(trained) == 2 + 3 * 2 * 2  # the head; A and B of two layers in three blocks


# A convolution or linear layer that is updated, and one that is not.
CONVNETS = {
    "resnet10t": ("layer2.0.downsample.1", "conv1.0"),
    "convnext_atto": ("stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.conv_dw"),
    "efficientnet_b0": ("blocks.2.0.se.conv_reduce", "blocks.2.0.conv_dw"),
    "regnety_002": ("s2.b1.conv1.conv", "s2.b1.conv2.conv"),  # grouped
    "densenet121": ("features.denseblock1.denselayer2.conv2", "features.conv0"),
    "skresnet18": ("layer1.0.conv2.conv", "layer1.0.conv1.paths.1.conv"),  # dilated
    "test_nfnet": ("stages.0.0.attn_last.fc1", "stages.0.0.conv1"),  # standardised
    "repvgg_a0": ("stages.0.0.conv_1x1.conv", "stem.conv_1x1.conv"),
    "repghostnet_050": ("blocks.1.0.ghost1.primary_conv.0", "blocks.1.0.ghost1.cheap_operation.0"),
    "hrnet_w18_small": ("stage2.0.fuse_layers.0.1.0", "conv2"),
}


@pytest.fixture(scope="module", params=CONVNETS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    """Built once for all tests, which only read it."""
    return tiny_convnet(request.param)


def test_lora_on_a_convnet_is_the_network_of_merged_weights(network: nn.Module) -> None:
    model = moved(LoRATuning(network, CLASSES, rank=2))

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        merged = {path: weight.detach() for path, weight in network.named_parameters()}
        for path, weight in merged.items():
            layer = f"backbone.stem.{path.removesuffix('.weight')}"
            if f"{layer}.lora_A.default.weight" in trained:
                a, b = (trained[f"{layer}.lora_{side}.default.weight"].flatten(1) for side in "AB")
                merged[path] = weight + (b @ a).view_as(weight)
        return functional_call(network, merged, images)

    assert_step_is_defined_by(features, model)


def test_lora_on_a_convnet_starts_as_the_frozen_network() -> None:
    network = tiny_convnet("resnet10t")
    model = LoRATuning(network, CLASSES).double().eval()
    images, _ = random_batch(model)
    assert relative_error(model.image_features(images), network(images)) < 1e-12


def test_lora_on_a_convnet_leaves_stem_and_what_is_no_plain_layer_frozen(network: nn.Module) -> None:
    model = LoRATuning(network, CLASSES, rank=2)
    updated, frozen = (f"backbone.stem.{layer}" for layer in CONVNETS[network.pretrained_cfg["architecture"]])
    trained = model.trainable_state_dict().keys()
    assert {f"{updated}.lora_A.default.weight", f"{updated}.lora_B.default.weight"} <= trained
    assert model.get_submodule(frozen) and not any(n.startswith(f"{frozen}.") for n in trained)


def test_lora_on_a_resnet_trains_two_matrices_of_every_convolution_of_its_blocks_and_the_head() -> None:
    network = tiny_convnet("resnet10t")
    model = LoRATuning(network, CLASSES, rank=2)
    blocks = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("layer")}
    sides = {f"backbone.stem.{layer}.lora_{side}.default.weight" for layer in blocks for side in "AB"}
    assert model.trainable_state_dict().keys() == sides | {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["nf_resnet26", "resnetv2_50x1_bit"])
def test_lora_refuses_a_convnet_of_standardised_convolutions(name: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"backbone: got '{name}', which has no plain nn.Linear or nn.Conv2d"),
    ):
        LoRATuning(name, CLASSES)


def test_adapters_on_a_swin_stand_behind_every_mlp() -> None:
    backbone, _ = make("full", "swin_tiny_patch4_window7_224")
    network = copy.deepcopy(backbone).requires_grad_(False)

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        for path, module in network.named_modules():
            if path.endswith(".mlp"):
                module.register_forward_hook(adapter(trained, f"backbone.stem.{path}.1"))
        return network(images)

    trained = assert_step_is_defined_by(features, moved(AdapterTuning(backbone, CLASSES, reduction=4)))
    widths = {t.shape for n, t in trained.items() if n.endswith("down.weight")}
    assert widths == {(4, 16), (8, 32)}  # of the two stages


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_atto", BACKBONES["convnext_atto"]),
        (
            "convnext_tiny",
            BACKBONES["convnext_atto"] | {"ls_init_value": None},
        ),  # linear layers, no LayerScale
        ("convnextv2_atto", BACKBONES["convnext_atto"]),
        ("inception_next_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}),
    ],
)
def test_adapters_on_a_convnet_follow_the_layer_scale_of_every_block(name: str, arguments: dict) -> None:
    overlay = {"input_size": (3, 32, 32)}
    network = timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    randomise(network).double().eval()
    model = moved(AdapterTuning(network, CLASSES, reduction=4))
    network.requires_grad_(False)

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        for path, module in network.named_modules():
            if path.endswith(".drop_path"):  # what the residual sum takes
                behind = adapter(trained, f"backbone.stem.{path}.0")
                module.register_forward_hook(
                    lambda module, inputs, x, behind=behind: behind(module, inputs, x.movedim(1, 3)).movedim(
                        3, 1
                    )
                )
        return network(images)

    trained = assert_step_is_defined_by(features, model)
    dims = arguments["dims"]
    assert [t.shape[1] for n, t in trained.items() if n.endswith("down.weight")] == dims


def test_adapters_are_stored_with_a_convnext(tmp_path) -> None:
    backbone, _ = make("full", "convnext_atto", torch.float32)
    model = AdapterTuning(backbone, CLASSES, reduction=4).eval()
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(tmp_path)
    images, _ = random_batch(model, dtype=torch.float32)
    assert torch.equal(load_pretrained(tmp_path, backbone).eval()(images), model(images))


def test_adapters_refuse_a_convnet_whose_blocks_have_no_mlp() -> None:
    with pytest.raises(ValueError, match="backbone: got a ResNet, a ConvNet whose blocks have no MLP"):
        AdapterTuning("resnet10t", CLASSES, **BACKBONES["resnet10t"])


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_border_and_biases_of_a_convnet_are_those_of_timms_own_network(name: str) -> None:
    backbone, _ = make("full", name)
    model = moved(PromptAndBiasConvNetTuning(backbone, CLASSES, 3))
    network = copy.deepcopy(backbone).requires_grad_(False)

    def features(trained: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        own = {n.removeprefix("backbone.stem."): t for n, t in trained.items() if n.startswith("backbone.")}
        bordered = pad_image(images, trained["prompts"], trained["prompts_sides"], 3)
        return functional_call(network, own, bordered)

    trained = assert_step_is_defined_by(features, model)
    biases = {f"backbone.stem.{n}" for n, _ in network.named_parameters() if n.endswith("bias")}
    assert trained.keys() == biases | {"prompts", "prompts_sides", "head.weight", "head.bias"}


def test_border_and_biases_of_a_convnet_are_stored(tmp_path) -> None:
    backbone, _ = make("full", "resnet10t", torch.float32)
    model = PromptAndBiasConvNetTuning(backbone, CLASSES, 3).eval()
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(tmp_path)
    images, _ = random_batch(model, dtype=torch.float32)
    again = load_pretrained(tmp_path, backbone).eval()
    assert torch.equal(again(images), model(images)) and again.config == model.config


@pytest.mark.parametrize(
    ("name", "num_prompts", "settings", "message"),
    [
        ("resnet10t", 0, {}, "num_prompts: got 0"),
        ("resnet10t", 2, {"prompt_dropout": 0.1}, "prompt_dropout=0.1: not with a ConvNet"),
        ("resnet10t", 2, {"in_chans": 1}, "prompt_location: got 'pad' with a backbone for 1 channels"),
        ("hrnet_w18_small", 2, {}, "num_prompts: got 2 with images of 224x224"),
    ],
)
def test_border_and_biases_name_what_they_refuse(name, num_prompts, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PromptAndBiasConvNetTuning(name, CLASSES, num_prompts, **settings)


def test_reduction_beyond_a_swins_narrowest_stage_is_refused() -> None:
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(ValueError, match="reduction: got 17, want at most the backbone's width 16"):
        AdapterTuning(name, CLASSES, 17, **BACKBONES[name])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t"])
def test_side_network_is_mixed_with_the_backbones_own_features(name: str) -> None:
    arguments = BACKBONES[name] | {"img_size": 64}
    model = SideTuning(name, CLASSES, **arguments).eval()
    model.alpha.data.fill_(0.7)
    images, _ = random_batch(model, dtype=torch.float32)
    reads = model.backbone.head_reads_of_image(None)
    own = model.backbone.features(model.backbone.run_folded(images, reads), None)
    share = torch.tensor(0.7).sigmoid()
    wanted = model.head(share * own + (1 - share) * model.side(images))
    assert relative_error(model(images), wanted) < 1e-6


def test_no_images_are_refused_by_a_swin_in_timm_s_own_modules() -> None:
    _, model = make("bias", "swin_tiny_patch4_window7_224")
    images, _ = random_batch(model)
    with pytest.raises(ValueError, match="images: got a batch of 0, and .*Swin.* take none; want 1 or more"):
        model(images[:0])


def test_pooling_of_a_trained_swin_is_its_own() -> None:
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(ValueError, match="pool: got 'image' with a SwinTransformer"):
        FullTuning(name, CLASSES, pool="image", **BACKBONES[name])


TRAINED = {  # by partial-1, beside the head
    "swin_tiny_patch4_window7_224": ("layers.1.blocks.0", "layers.1.downsample", "norm"),
    "resnet10t": ("layer4.0",),
    "convnext_atto": ("stages.3.blocks.0", "stages.3.downsample", "head.norm"),
    "densenet121": ("features.denseblock4.denselayer16", "features.norm5"),
    "efficientnet_b0": ("blocks.6.0", "conv_head", "bn2"),
    "regnetx_002": ("s4.b7",),
}


@pytest.mark.parametrize("name", TRAINED)
def test_partial_1_trains_the_last_block_and_what_stands_behind_it(name: str) -> None:
    model = PartialNetworkTuning(name, CLASSES, 1, **BACKBONES.get(name, {}))
    stem = model.backbone.stem
    trained = {n for n, p in stem.named_parameters() if p.requires_grad}
    expected = {
        n for n, _ in stem.named_parameters() if n.startswith(tuple(f"{part}." for part in TRAINED[name]))
    }
    assert trained == expected


def test_as_many_blocks_as_there_are_train_all_but_the_stem() -> None:
    model = PartialNetworkTuning("resnet50", CLASSES, 16)
    frozen = {n for n, p in model.backbone.stem.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "bn1.weight", "bn1.bias"}


def test_frozen_blocks_keep_nothing_and_drop_nothing_in_training() -> None:
    arguments = BACKBONES["swin_tiny_patch4_window7_224"] | {"depths": [2, 2]}
    model = PartialNetworkTuning("swin_tiny_patch4_window7_224", CLASSES, 1, **arguments).train()
    first, second = model.backbone.stem.layers
    assert not any(module.training for module in (*first.modules(), *second.blocks[0].modules()))
    assert all(module.training for module in second.blocks[1].modules())
    gradients = []
    first.register_forward_hook(lambda _, __, output: gradients.append(output.requires_grad))
    model(random_batch(model, dtype=torch.float32)[0])
    assert gradients == [False]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "name", [*BACKBONES, "efficientnet_b0", "mobilenetv3_small_050", "inception_next_atto", "starnet_s050"]
)
def test_frozen_features_and_the_trained_part_make_up_a_network(name: str, k: int) -> None:
    backbone = make("partial", name)[0] if name in BACKBONES else tiny_convnet(name)
    model = PartialNetworkTuning(backbone, CLASSES, k).double().train()
    whole = copy.deepcopy(model)
    images, labels = random_batch(model)
    features = model.frozen_features(images)
    assert features.shape == (2, *model.feature_shape) and not features.requires_grad
    for way, read in ((model.classify, features), (whole, images)):
        torch.manual_seed(0)  # a Swin of timm's drops whole branches in training
        nn.functional.cross_entropy(way(read), labels).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True))
    for own, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert (own.grad is None) is not own.requires_grad
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "k"), [("densenet121", 1), ("hrnet_w18_small", 1), ("selecsls42", 2)])
def test_layers_that_read_several_tensors_of_the_frozen_ones_have_no_frozen_features(
    name: str, k: int
) -> None:
    model = PartialNetworkTuning(name, CLASSES, k)
    assert model.feature_shape is None
    with pytest.raises(NotImplementedError, match=f"num_tuned_blocks: got {k}.*more than one tensor"):
        model.frozen_features(torch.zeros(2, 3, *model.image_size))


class ScaledByMode(type(timm.create_model("resnet10t", num_classes=0))):
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_features(x) * (2 if self.training else 1)


def test_network_with_code_of_its_own_is_not_cut_in_two() -> None:
    """Tracing would keep one way of a decision in that code for ever."""
    backbone = timm.create_model("resnet10t", num_classes=0, **BACKBONES["resnet10t"])
    backbone.__class__ = ScaledByMode
    assert PartialNetworkTuning(backbone, CLASSES, 1).feature_shape is None


@pytest.mark.parametrize(
    ("name", "k", "message"),
    [
        ("resnet10t", 0, "num_tuned_blocks: got 0, want a whole number from 1"),
        ("resnet10t", 6, "num_tuned_blocks: got 6, and the backbone has 5 blocks"),
        ("vit_tiny_patch16_224", 1, "'vit_tiny_patch16_224' is not a timm SwinTransformer"),
    ],
)
def test_partial_names_what_it_refuses(name: str, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialNetworkTuning(name, CLASSES, k, **BACKBONES.get(name, {}))


@pytest.mark.parametrize(("knob", "value"), [("dtype", "bfloat16"), ("backend", "torch")])
def test_settings_of_the_engine_are_refused_where_it_does_not_run(knob: str, value: str) -> None:
    recipe = Recipe(data="", backbone="resnet10t", method="partial-1", pretrained=False, **{knob: value})
    with pytest.raises(ValueError, match=f"{knob} is '{value}', which there is not for method 'partial-1'"):
        model_settings(recipe.resolved(num_train_images=2, device_type="cpu"))
