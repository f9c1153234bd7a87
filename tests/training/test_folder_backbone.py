"""Training on a backbone from a folder (local-dir:), from the command to prediction."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from run_fixtures import train_arguments
from runs import interrupt_at_step
from timm.models import save_for_hf

from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.sweeps.settings import Sweep
from vpt_fast.sweeps.sweep import run_sweep
from vpt_fast.training.loop import train
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import Labels, RunError, RunFolder

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


def write(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    overlay = {"mean": (0.1, 0.2, 0.3)}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=overlay, num_classes=7, **SIZES)
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "own")


@pytest.fixture
def own(recipe: Recipe, folder: Path) -> Recipe:
    return dataclasses.replace(recipe, backbone=f"local-dir:{folder}", epochs=2)


def test_train_on_a_relative_folder_and_use_the_run_elsewhere(
    command, color_images, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(color_images, tmp_path / "run", backbone="local-dir:own", epochs=2)
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    preprocessing = Labels.read(RunFolder(tmp_path / "run").prompts).preprocessing
    assert isinstance(preprocessing, Preprocessing) and preprocessing.mean == (0.1, 0.2, 0.3)
    assert "holds this run, trained to its end" in command(*arguments).output
    monkeypatch.chdir("/")
    assert command("eval", tmp_path / "run", "--data", color_images).exit_code == 0
    predicted = command("predict", tmp_path / "run", color_images / "test" / "red" / "0.png", "--json")
    assert json.loads(predicted.stdout)[0]["predictions"]


def test_eval_and_predict_are_told_where_the_folder_is_now(own, command, color_images, folder, tmp_path):
    run = train(own, tmp_path / "run").path
    moved = folder.rename(tmp_path / "moved")
    image = color_images / "test" / "red" / "0.png"
    for use in (("eval", run, "--data", color_images), ("predict", run, image)):
        result = command(*use)
        assert result.exit_code == 2 and f"backbone: {folder}, the folder that" in result.stderr
        result = command(*use, "--backbone", f"local-dir:{moved}")
        assert result.exit_code == 0, result.stderr


def test_eval_refuses_a_folder_with_other_weights(own, command, color_images, tmp_path):
    run, other = train(own, tmp_path / "run").path, write(tmp_path / "other", seed=1)
    result = command("eval", run, "--data", color_images, "--backbone", f"local-dir:{other}")
    assert result.exit_code == 2 and "backbone: its weights are not those that" in result.stderr


def test_methods_counts_the_parameters_of_a_folders_architecture(command, folder):
    result = command("methods", "--backbone", f"local-dir:{folder}")
    assert result.exit_code == 0 and "vpt-deep" in result.output


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"),
            "has no model.safetensors",
        ),
    ],
)
def test_train_refuses_a_folder_that_lacks_a_file(command, color_images, folder, tmp_path, change, message):
    change(folder)
    result = command(*train_arguments(color_images, tmp_path / "run", backbone=f"local-dir:{folder}"))
    assert result.exit_code == 2 and message in result.output
    assert not RunFolder(tmp_path / "run").config.exists()


def test_default_run_folder_is_named_by_the_folder(command, color_images, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(color_images, None, backbone="local-dir:own", epochs=1)
    assert command(*arguments).exit_code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["colors-local-dir_own-vpt-deep"]


def test_finished_run_does_not_answer_for_other_weights_in_its_folder(own, folder, tmp_path):
    train(own, tmp_path / "run")
    assert train(own, tmp_path / "run").new_epochs == 0
    os.utime(tmp_path / "run" / "run.json", (0, 0))
    assert train(own, tmp_path / "run").new_epochs == 0  # written again, with the same values
    write(folder, seed=1)
    with pytest.raises(RunError, match=f"on other weights of the backbone: backbone was {folder}"):
        train(own, tmp_path / "run")


def set_activation(folder: Path, name: str) -> None:
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values["model_args"]["act_layer"] = name
    config.write_text(json.dumps(values))


CHANGED = r"the backbone's settings \(blocks.mlp.act.activation was gelu and is relu\) changed"


def test_interrupted_run_does_not_go_on_with_other_settings_in_its_folder(own, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5, signal.SIGINT)
        assert not train(own, tmp_path / "run").is_finished
    set_activation(folder, "relu")
    with pytest.raises(RunError, match=f"cannot go on: {CHANGED}"):
        train(own, tmp_path / "run")
    set_activation(folder, "gelu")
    assert train(own, tmp_path / "run").is_finished


def test_interrupted_run_does_not_go_on_with_other_preprocessing(own, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5, signal.SIGINT)
        train(own, tmp_path / "run")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("0.3", "0.4"))
    with pytest.raises(RunError, match=r"the preprocessing \(mean was .*0.3\] and is .*0.4\]\) changed"):
        train(own, tmp_path / "run")


def test_finished_run_does_not_answer_for_other_settings_in_its_folder(own, folder, tmp_path):
    train(own, tmp_path / "run")
    os.utime(tmp_path / "run" / "run.json", (0, 0))
    set_activation(folder, "relu")
    with pytest.raises(RunError, match=f"holds a finished run, and {CHANGED}"):
        train(own, tmp_path / "run")


def test_finished_run_answers_where_its_folder_is_gone(own, folder, tmp_path):
    train(own, tmp_path / "run")
    folder.rename(tmp_path / "elsewhere")
    assert train(own, tmp_path / "run").new_epochs == 0


OTHERS = {
    "weights": lambda folder: write(folder, seed=1),
    "settings": lambda folder: set_activation(folder, "relu"),
}


@pytest.mark.parametrize("write_other", OTHERS.values(), ids=OTHERS)
def test_sweep_does_not_answer_for_what_has_changed_in_its_folder(
    write_other, color_images, folder, tmp_path
):
    settings = dict(data=str(color_images), backbone=f"local-dir:{folder}", method="linear", device="cpu")
    plan = Sweep({**settings, "epochs": 1, "warmup_epochs": 0, "batch_size": 9}, {}, seeds=(1,))
    run_sweep(plan, tmp_path / "sweep")
    run_sweep(plan, tmp_path / "sweep")
    write_other(folder)
    with pytest.raises(ValueError, match=f"other settings: what is in backbone local-dir:{folder}"):
        run_sweep(plan, tmp_path / "sweep")


def test_sweep_does_not_answer_for_a_searched_folder_that_has_changed(color_images, folder, tmp_path):
    settings = dict(data=str(color_images), method="linear", device="cpu", epochs=1, warmup_epochs=0)
    searched = {"backbone": ("train_test_vit", f"local-dir:{folder}")}
    plan = Sweep({**settings, "batch_size": 9}, searched, seeds=(1,))
    run_sweep(plan, tmp_path / "sweep")
    write(folder, seed=1)
    with pytest.raises(ValueError, match=f"what is in backbone train_test_vit, local-dir:{folder}"):
        run_sweep(plan, tmp_path / "sweep")
