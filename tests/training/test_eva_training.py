"""Training with a timm Eva, which has rotary positions, through the commands, from a file of weights."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import timm
import torch
from run_fixtures import train_arguments

from vpt_fast import load_pretrained
from vpt_fast.training.loop import train
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder

EVA = "vit_small_patch16_dinov3"
SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in timm's own names."""
    file = tmp_path_factory.mktemp("weights") / "eva.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(EVA, num_classes=0, **SMALL).state_dict(), file)
    return file


def test_commands_train_evaluate_and_predict(command, color_images, weights, tmp_path):
    arguments = train_arguments(color_images, tmp_path / "run", backbone=EVA, checkpoint=weights)
    arguments += [f"--backbone-arg={name}={value}" for name, value in SMALL.items()]
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    metrics = RunFolder(tmp_path / "run").read().metrics
    assert metrics[-1]["train_loss"] < 0.9 * metrics[0]["train_loss"]

    result = command("eval", tmp_path / "run", "--data", color_images, "--split", "test", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 6, result.output
    picture = color_images / "test" / "red" / "0.png"
    result = command("predict", tmp_path / "run", picture, "--json")
    assert result.exit_code == 0 and "red" in result.stdout, result.output


@pytest.mark.parametrize("method", ["linear", "partial-1", "full"])
def test_method_trains_and_is_stored(method, color_images, weights, tmp_path):
    recipe = Recipe(
        data=str(color_images), backbone=EVA, method=method, pretrained=False, checkpoint=str(weights),
        backbone_arg=SMALL, epochs=3, warmup_epochs=0, batch_size=9, optimizer="adamw", base_lr=0.3,
        device="cpu", workers=0, tensorboard=False,
    )  # fmt: skip
    metrics = train(recipe, tmp_path / "run").metrics
    assert metrics[-1]["train_loss"] < 0.9 * metrics[0]["train_loss"]
    folder = RunFolder(tmp_path / "run")
    stored = load_pretrained(folder.prompts).trainable_state_dict()
    assert stored.keys() == folder.read().checkpoint.trainable.keys()
