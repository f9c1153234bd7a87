"""The demo, in small, and prompts learned on real digits."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from rich.console import Console

from vpt_fast.commands import demo
from vpt_fast.training import plots
from vpt_fast.training.loop import train
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder


@pytest.fixture
def small_demo(recipe, color_images, monkeypatch):
    """The demo's three methods on a few images for two epochs."""

    def export(root, *, seed):
        shutil.copytree(color_images, root, dirs_exist_ok=True)

    def recipes(digits):
        common = dict(data=str(digits), epochs=2, prompt_dropout=None)
        return [
            dataclasses.replace(recipe, method="linear", num_prompts=None, **common),
            dataclasses.replace(recipe, method="vpt-shallow", **common),
            dataclasses.replace(recipe, method="vpt-deep", **common),
        ]

    monkeypatch.setattr(demo, "export_digits", export)
    monkeypatch.setattr(demo, "demo_recipes", recipes)
    monkeypatch.setattr(demo, "plot_comparison", lambda runs, accuracies, path: path.touch())  # takes seconds


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("│")]


def test_demo_prints_a_table_and_where_everything_is(small_demo, command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plot_comparison", plots.plot_comparison)
    result = command("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    linear, shallow, deep = (line.split("│")[1:-1] for line in table_of(result.stdout))
    # a head of 33 × 3; prompts of 3 × 32, in one block and in two
    assert [row[2].strip() for row in (linear, shallow, deep)] == ["99", "195", "291"]
    assert [row[0].strip() for row in (linear, shallow, deep)] == ["linear probe", "VPT-Shallow", "VPT-Deep"]
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 0
    assert str(tmp_path / "demo" / "comparison.png") in result.stdout
    assert (tmp_path / "demo" / "vpt-deep" / "prompts").is_dir()


def test_second_demo_prints_the_same_table_and_trains_nothing(small_demo, command, tmp_path, monkeypatch):
    first = command("demo", "--out", tmp_path / "demo")
    monkeypatch.setattr("vpt_fast.training.methods.build_model", None)
    again = command("demo", "--out", tmp_path / "demo")
    assert again.exit_code == 0, again.output
    assert table_of(again.stdout) == table_of(first.stdout)


def test_ctrl_c_that_is_too_late_for_a_method_stops_the_demo_behind_it(
    small_demo, command, tmp_path, late_ctrl_c
):
    result = command("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 130 and "the same command goes on" in result.stdout
    assert (tmp_path / "demo" / "linear").exists() and not (tmp_path / "demo" / "vpt-shallow").exists()


def test_fresh_demo_trains_again(small_demo, command, tmp_path):
    command("demo", "--out", tmp_path / "demo")
    result = command("demo", "--out", tmp_path / "demo", "--fresh")
    assert result.exit_code == 0 and "epoch 2/2" in result.stdout


def test_fresh_demo_that_is_stopped_leaves_no_results_of_the_earlier_one(
    small_demo, command, tmp_path, late_ctrl_c
):
    results = tmp_path / "results.json"
    results.write_text('{"linear probe": {}}')
    assert command("demo", "--out", tmp_path, "--fresh").exit_code == 130
    assert not results.exists()


def test_demo_removes_temporary_files_of_a_process_that_was_killed(small_demo, tmp_path, monkeypatch):
    def train(*arguments, **options):
        raise KeyboardInterrupt

    left = tmp_path / ".comparison.png.abcd_123.png"
    left.touch()
    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, console=Console(quiet=True))
    assert not left.exists()


def test_results_file_that_was_changed_is_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json cannot be read: "):
        demo.run_demo(tmp_path, console=Console(quiet=True))


def test_demo_table_repeats_what_eval_says(small_demo, command, tmp_path):
    command("demo", "--out", tmp_path / "demo")
    found = json.loads((tmp_path / "demo" / "results.json").read_text())["VPT-Deep"]
    arguments = ("eval", tmp_path / "demo" / "vpt-deep", "--data", tmp_path / "demo" / "digits")
    answer = json.loads(command(*arguments, "--split", "test", "--json").stdout)
    assert found["test_accuracy"] == answer["accuracy"]


def test_demo_recipes_differ_in_method_prompts_epochs_and_learning_rate_alone(tmp_path):
    linear, shallow, deep = demo.demo_recipes(tmp_path)
    tuned = {"method", "base_lr", "num_prompts"}
    assert set(deep.differences(shallow)) <= tuned
    assert set(deep.differences(linear)) <= tuned | {"prompt_dropout", "epochs"}


def test_linear_probe_of_the_demo_gets_the_most_epochs(tmp_path):
    linear, shallow, deep = demo.demo_recipes(tmp_path)
    assert linear.epochs > shallow.epochs == deep.epochs


def test_deep_prompts_learn_real_digits_with_the_packaged_backbone(digits, tmp_path):
    few = tmp_path / "few"
    for split, count in (("train", 15), ("val", 10)):
        for name in "0123456789":
            (few / split / name).mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(path, few / split / name)
    recipe = Recipe(
        data=str(few),
        backbone="vpt_fast_demo",
        epochs=3,
        warmup_epochs=0,
        batch_size=4,
        optimizer="adamw",
        base_lr=1.5,
        device="cpu",
    )
    result = train(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read().metrics == result.metrics
    assert result.metrics[-1]["val_accuracy"] > 0.4  # one in ten by chance
