"""Training with a ConvNet: which methods it has, and that each is trained and stored."""

from __future__ import annotations

import pytest
import torch

from vpt_fast import load_pretrained
from vpt_fast.loop import train
from vpt_fast.methods import build_model
from vpt_fast.recipe import Recipe
from vpt_fast.run import RunFolder


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vpt-shallow", {"num_prompts": 2, "prompt_location": "pad"}),
        ("linear", {}),
        ("full", {}),
        ("bias", {}),
        ("vpt+bias", {"num_prompts": 2}),
        ("lora", {"lora_rank": 2}),
    ],
)
def test_training_leaves_a_model(method, settings, color_images, tmp_path):
    recipe = Recipe(
        data=str(color_images), backbone="resnet10t", method=method, pretrained=False, epochs=1,
        backbone_arg={"img_size": 32}, warmup_epochs=0, batch_size=8, device="cpu", workers=0,
        tensorboard=False, **settings,
    )  # fmt: skip
    result = train(recipe, tmp_path / "run")
    assert len(result.metrics) == 1
    torch.manual_seed(recipe.seed)  # the backbone's weights are random, drawn first
    loaded = load_pretrained(RunFolder(tmp_path / "run").prompts)
    assert loaded.image_size == (32, 32)
    stored = RunFolder(tmp_path / "run").read().checkpoint.trainable
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.trainable_state_dict().items())


@pytest.mark.parametrize("method", ["vpt-deep", "cls-token"])
def test_method_that_there_is_not_for_a_convnet_is_named(method):
    recipe = Recipe(data="", backbone="resnet10t", method=method, pretrained=False)
    with pytest.raises(ValueError, match=f"method is '{method}'.*a ConvNet"):
        build_model(recipe, 3)
