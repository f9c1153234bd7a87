"""The head of a model: another number of classes, another network in its place, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from concatenation import relative_error
from tiny import random_batch, tiny_swin, tiny_vit
from torch import nn

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSwin, PromptedViT
from vpt_fast.tuning.bias import PromptAndBiasConvNetTuning, PromptAndBiasSwinTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.probes import MLPProbe
from vpt_fast.tuning.side import SideTuning

NUM_CLASSES = 5
CONVNET: dict[str, Any] = {"depths": [1] * 4, "dims": [8, 8, 16, 32], "img_size": 64}


def test_new_head_has_another_number_of_classes_and_the_prompts_stay(tmp_path: Path) -> None:
    vit = tiny_vit(torch.float32)
    model = PromptedViT(vit, NUM_CLASSES, 3).double()
    prompts = model.prompts.detach().clone()
    model.reset_classifier(NUM_CLASSES + 2)
    images, _ = random_batch(model, dtype=torch.float64)
    assert model.get_classifier()(model.image_features(images)).shape[1] == model.num_classes == 7
    assert torch.equal(model(images), model.get_classifier()(model.image_features(images)))
    assert torch.equal(model.prompts, prompts) and model.head.in_features == model.num_features
    model.float().save_pretrained(tmp_path)
    assert PromptedViT.from_pretrained(tmp_path, vit).head.out_features == 7
    with pytest.raises(ValueError, match="num_classes: got 0"):
        model.reset_classifier(0)


def test_new_head_is_on_the_backbone_s_device() -> None:
    model = PromptedViT(tiny_vit().to("meta"), NUM_CLASSES, 3)
    model.reset_classifier(7)
    assert model.head.weight.is_meta


@pytest.mark.parametrize("pool", [None, "token"])
def test_new_head_takes_the_pooling_that_there_is_by_timm_s_name(pool: str | None) -> None:
    model = PromptedViT(tiny_vit(torch.float32), NUM_CLASSES, 3)
    model.reset_classifier(7, pool)
    assert model.head.out_features == 7


@pytest.mark.parametrize(
    ("build", "own"),
    [
        (lambda: PromptedViT(tiny_vit(), NUM_CLASSES, 3), "token"),
        (lambda: PromptedViT(tiny_vit(), NUM_CLASSES, 3, pool="prompts"), "prompts"),
        (lambda: PromptedSwin(tiny_swin(), NUM_CLASSES, 3), "avg"),
        (lambda: FullTuning("convnext_atto", NUM_CLASSES, depths=[1] * 4, dims=[8] * 4), "avg"),
    ],
)
def test_new_head_refuses_another_pooling(build: Any, own: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"global_pool: got 'max', want None or the model's own '{own}'"):
        model.reset_classifier(7, global_pool="max")
    assert model.num_classes == NUM_CLASSES


METHODS: dict[str, Any] = {
    "vit": lambda: PromptedViT(tiny_vit(torch.float32), NUM_CLASSES, 3),
    "swin": lambda: PromptedSwin(tiny_swin(torch.float32), NUM_CLASSES, 3),
    "convnet": lambda: PromptedConvNet("convnext_atto", NUM_CLASSES, 3, **CONVNET),
    "linear": lambda: LinearProbe(tiny_vit(torch.float32), NUM_CLASSES),
    "mlp": lambda: MLPProbe(tiny_vit(torch.float32), NUM_CLASSES),
    "side": lambda: SideTuning(tiny_vit(torch.float32, img_size=64, patch_size=16), NUM_CLASSES),
    "full": lambda: FullTuning(tiny_vit(torch.float32), NUM_CLASSES),
    "whole": lambda: FullTuning("convnext_atto", NUM_CLASSES, **CONVNET),
    "swin_bias": lambda: PromptAndBiasSwinTuning(tiny_swin(torch.float32), NUM_CLASSES, 3),
    "convnet_bias": lambda: PromptAndBiasConvNetTuning("convnext_atto", NUM_CLASSES, 3, **CONVNET),
}


@pytest.mark.parametrize("method", METHODS)
def test_head_may_be_a_network(method: str) -> None:
    model = METHODS[method]().eval()
    images, _ = random_batch(model, dtype=torch.float32)
    linear, expected = model.head, model(images)
    model.head = nn.Sequential(nn.Dropout(0.1), linear).eval()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_head_may_be_taken_away(method: str, dtype: torch.dtype) -> None:
    model = METHODS[method]().eval().to(dtype)
    images, _ = random_batch(model, dtype=torch.float32)
    expected = model.image_features(images)
    model.head = nn.Identity()
    found = model(images)
    assert found.shape == (2, model.num_features) and relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_estimate_without_a_head_lacks_its_weights_alone(method: str) -> None:
    model = METHODS[method]()
    with_head = model.estimate_training_bytes(2)
    held = 3 * sum(p.nbytes for p in model.head.parameters())
    model.head = nn.Identity()
    without = model.estimate_training_bytes(2)
    assert with_head["weights"] - without["weights"] == held
    assert 0 <= with_head["kept"] - without["kept"] <= 2 * 4 * model.num_features


def test_trained_tensors_go_onto_another_model_with_the_same_network_as_head() -> None:
    models = [METHODS["vit"]() for _ in range(2)]
    for model in models:
        model.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 7))
    models[1].load_trainable_state_dict(models[0].trainable_state_dict())
    images, _ = random_batch(models[0], dtype=torch.float32)
    assert torch.equal(models[0](images), models[1](images))


@pytest.mark.parametrize(
    "head",
    [nn.Identity(), nn.Sequential(nn.Dropout(0.1), nn.Linear(32, NUM_CLASSES)), nn.Linear(32, 7)],
    ids=["none", "network", "other_classes"],
)
def test_head_that_would_not_be_built_again_is_not_saved(head: nn.Module, tmp_path: Path) -> None:
    model = METHODS["vit"]()
    model.head = head
    with pytest.raises(ValueError, match=rf"head: got a {type(head).__name__} .* want nn.Linear\(32, 5\)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_head_that_was_replaced_is_reset_to_a_linear_one() -> None:
    model = METHODS["vit"]().double()
    model.head = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 3)).double()
    model.reset_classifier(7)
    assert (model.head.in_features, model.head.out_features) == (32, 7)
    assert model(random_batch(model)[0]).dtype == torch.float64
