"""Full fine-tuning, biases and others on Swin and ConvNets: the definition, and how they are stored."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from concatenation import relative_error, step
from tiny import random_batch, randomise
from torch import nn
from torch.func import functional_call
from ways_to_tune import low_rank

from vpt_fast import load_pretrained
from vpt_fast.tuning.bias import BiasTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.lora import LoRATuning
from vpt_fast.tuning.side import SideTuning

CLASSES = 5
WAYS = {"full": FullTuning, "bias": BiasTuning}
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


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", WAYS)
def test_logits_and_gradients_are_those_of_timms_own_network(method: str, name: str) -> None:
    backbone, model = make(method, name)
    images, labels = random_batch(model)
    found = step(model.eval(), images, labels)  # a Swin of timm's drops whole branches in training

    trained = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    own = {n.removeprefix("backbone.stem."): t for n, t in trained.items() if n.startswith("backbone.")}
    network = copy.deepcopy(backbone).requires_grad_(False)
    features = functional_call(network, own, images)
    logits = nn.functional.linear(features, trained["head.weight"], trained["head.bias"])
    nn.functional.cross_entropy(logits, labels).backward()
    assert relative_error(found.logits, logits) < 1e-12
    for n, tensor in trained.items():
        assert (found.gradients[n] - tensor.grad).norm() < 1e-10 * (1 + tensor.grad.norm()), n


def test_batch_norm_keeps_its_statistics_in_training() -> None:
    _, model = make("full", "resnet10t")
    images, _ = random_batch(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert torch.equal(model.train()(images), model.eval()(images))
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


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
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images)
    total = sum(storage.nbytes() for storage in kept.values())
    assert 0.95 * total <= model.estimate_training_bytes(2)["kept"] <= 1.5 * total


def test_lora_on_a_swin_adds_its_products_to_attentions_layers() -> None:
    name = "swin_tiny_patch4_window7_224"
    backbone, _ = make("full", name)
    model = LoRATuning(backbone, CLASSES, rank=2).double().eval()
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    images, labels = random_batch(model)
    found = step(model, images, labels)

    trained = {n: t.clone().requires_grad_() for n, t in model.trainable_state_dict().items()}
    network = copy.deepcopy(backbone).requires_grad_(False)
    for path, linear in network.named_modules():
        if path.endswith((".attn.qkv", ".attn.proj")):
            linear.register_forward_hook(low_rank(trained, f"backbone.stem.{path}"))
    logits = nn.functional.linear(network(images), trained["head.weight"], trained["head.bias"])
    nn.functional.cross_entropy(logits, labels).backward()
    assert len(trained) == 2 + 3 * 2 * 2  # the head; A and B of two layers in three blocks
    assert relative_error(found.logits, logits) < 1e-12
    for n, tensor in trained.items():
        assert (found.gradients[n] - tensor.grad).norm() < 1e-10 * (1 + tensor.grad.norm()), n


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


def test_pooling_of_a_trained_swin_is_its_own() -> None:
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(ValueError, match="pool: got 'image' with a SwinTransformer"):
        FullTuning(name, CLASSES, pool="image", **BACKBONES[name])
