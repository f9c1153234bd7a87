"""Sweeps: what they choose, what their folders hold, and what they refuse before the first trial."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from rich.console import Console
from task_trees import shrink, write_fgvc

from vpt_fast.failures import TrainingDiverged
from vpt_fast.sweeps import sweep, trials
from vpt_fast.sweeps.settings import Sweep
from vpt_fast.sweeps.sweep import best_trial, run_sweep, trial_folder
from vpt_fast.training import classification, loop
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.method_rules import METHODS
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder


def test_folder_that_cannot_be_locked_is_swept_in_after_one_note(settings, tmp_path, without_locks):
    console = Console(file=io.StringIO(), width=500)
    assert run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), tmp_path, console=console)["finished"]
    assert console.file.getvalue().count(f"No file in {tmp_path} can be locked") == 1


def test_best_trial_and_final_runs_are_those_trained_by_hand(settings, tmp_path):
    axes = {"base_lr": (0.5, 0.001), "weight_decay": (0.01, 0.0)}
    found = run_sweep(Sweep(settings, axes, seeds=(1, 2)), tmp_path / "sweep")

    by_hand = {}
    for lr in axes["base_lr"]:
        for decay in axes["weight_decay"]:
            recipe = Recipe(**settings, base_lr=lr, weight_decay=decay, tensorboard=False)
            by_hand[lr, decay] = loop.train(recipe, tmp_path / f"{lr}-{decay}").metrics[-1]["val_accuracy"]
    assert {tuple(t["params"].values()): t["val_accuracy"] for t in found["trials"]} == by_hand
    lr, decay = min(by_hand, key=lambda point: (-by_hand[point], point[0], -point[1]))
    assert found["best"] == {
        "params": {"base_lr": lr, "weight_decay": decay},
        "val_accuracy": by_hand[lr, decay],
    }

    common = dict(settings, base_lr=lr, weight_decay=decay, train_on="train+val", test=True)
    finals = [loop.train(Recipe(**common, seed=s), tmp_path / f"final-{s}").results for s in (1, 2)]
    one, two = (run["test_accuracy"] for run in finals)
    assert found["final"]["accuracies"] == {"1": one, "2": two}
    assert found["final"]["mean"] == pytest.approx((one + two) / 2)
    assert found["final"]["standard_deviation"] == pytest.approx(abs(one - two) / 2**0.5)
    assert found["finished"] and json.loads((tmp_path / "sweep" / "results.json").read_text()) == found


def test_final_runs_on_more_images_have_the_batch_size_of_the_search(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "linear", replace(METHODS["linear"], batch_size=30))
    del settings["batch_size"]
    run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), tmp_path)
    trial, final = (Recipe.from_yaml(file) for file in sorted(tmp_path.rglob("config.yaml"), reverse=True))
    # Fewer than 30 images are in batches of 64; train and val together are more.
    assert (trial.train_on, trial.batch_size) == ("train", 64)
    assert (final.train_on, final.batch_size) == ("train+val", 64)


def test_results_name_the_method_that_a_search_of_methods_chose(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_trial", lambda trials: trials[-1] if trials else None)
    del settings["method"]
    found = run_sweep(Sweep(settings, {"method": ("linear", "cls-token")}, seeds=(1,)), tmp_path)
    assert (found["best"]["params"], found["method"]) == ({"method": "cls-token"}, "cls-token")


def test_same_command_again_trains_nothing(settings, tmp_path, trained):
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    first = run_sweep(plan, tmp_path)
    assert trained == ["base_lr=0.5", "base_lr=0.1", "seed-1"]
    assert run_sweep(plan, tmp_path) == first and len(trained) == 3


def test_trial_folders_keep_metrics_and_the_best_ones_prompts_only(settings, tmp_path):
    found = run_sweep(Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,)), tmp_path)
    for trial in found["trials"]:
        folder = RunFolder(trial_folder(tmp_path, trial["params"]))
        assert folder.metrics.exists() and folder.results.exists() and not folder.checkpoint.exists()
        assert folder.prompts.exists() == (trial["params"] == found["best"]["params"])
        assert not folder.curves.exists()
    assert RunFolder(tmp_path / "final" / "seed-1").curves.exists()


def test_files_of_a_trial_are_deleted_once_and_not_after_each_later_trial(tmp_path, monkeypatch):
    trials = [
        {"params": {"base_lr": float(place)}, "val_accuracy": accuracy, "place": place}
        for place, accuracy in enumerate((0.5, 0.2, 0.9))
    ]
    prompts = [RunFolder(trial_folder(tmp_path, trial["params"])).prompts for trial in trials]
    for folder in prompts:
        folder.mkdir(parents=True)
    tidied, deleted, rmtree = set(), [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: deleted.append(path) or rmtree(path))
    for done in (1, 2, 3):
        best = max(trials[:done], key=lambda trial: trial["val_accuracy"])
        sweep._tidy({"trials": trials[:done], "best": best}, tmp_path, tidied)
    assert deleted == [prompts[1], prompts[0]] and prompts[2].is_dir()


def test_checkpoint_that_a_killed_process_left_at_a_trial_s_end_is_removed(settings, tmp_path):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,))
    run_sweep(plan, tmp_path)
    checkpoint = RunFolder(trial_folder(tmp_path, {"base_lr": 0.5})).checkpoint
    checkpoint.touch()
    run_sweep(plan, tmp_path)
    assert not checkpoint.exists()


def test_sweep_removes_temporary_files_of_a_process_that_was_killed(settings, tmp_path):
    left = [tmp_path / name for name in (".sweep.yaml.abcd_123.yaml", ".results.json.abcd_123.json")]
    for path in left:
        path.touch()
    sweep._begin(Sweep(settings, {}, seeds=(1,)), {}, tmp_path)
    assert not any(path.exists() for path in left)


def test_diverged_trial_is_a_failed_one_with_its_reason(settings, tmp_path, trained):
    plan = Sweep(settings, {"base_lr": (1e38, 0.1)}, seeds=(1,))
    console = Console(file=io.StringIO(), width=500)
    found = run_sweep(plan, tmp_path, console=console)
    assert "base_lr=1e+38: diverged: the loss is" in console.file.getvalue()
    diverged, good = found["trials"]
    assert diverged["state"] == "fail" and diverged["val_accuracy"] is None
    assert "epoch" in diverged["reason"] and good["state"] == "complete"
    run_sweep(plan, tmp_path)
    assert trained.count("base_lr=1e+38") == 1


def test_final_runs_that_all_diverge_are_an_error_with_the_reason(
    command, color_images, tmp_path, monkeypatch
):
    original = loop.train

    def train(recipe, out, **options):
        if out.parent.name == "final":
            raise TrainingDiverged("the loss is inf")
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    flags = ("--over", "base_lr=0.1", "--seeds", "1,2", "--epochs", 1, "--device", "cpu")
    result = command(
        "sweep", "--data", color_images, "--backbone", "train_test_vit", "--method", "linear",
        "--out", tmp_path / "sweep", *flags,
    )  # fmt: skip
    assert result.exit_code == 1 and "every final run diverged: the loss is inf" in result.stderr


def test_final_runs_that_diverged_are_counted_beside_the_mean(command, color_images, tmp_path, monkeypatch):
    original = loop.train

    def train(recipe, out, **options):
        if out.name == "seed-2":
            raise TrainingDiverged("the loss is inf")
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    result = command(
        "sweep", "--data", color_images, "--backbone", "train_test_vit", "--method", "linear", "--epochs", 1,
        "--out", tmp_path / "sweep", "--over", "base_lr=0.1", "--seeds", "1,2", "--device", "cpu",
    )  # fmt: skip
    assert "1 run, 1 more diverged, trained on train and val" in " ".join(result.output.split())


def test_trials_that_differ_in_the_seventh_digit_have_folders_of_their_own(tmp_path):
    names = [trial_folder(tmp_path, {"base_lr": lr}).name for lr in (0.1, 0.12345671, 0.12345672)]
    assert names == ["base_lr=0.1", "base_lr=0.12345671", "base_lr=0.12345672"]


def test_trials_of_paths_that_differ_in_a_slash_have_folders_of_their_own(tmp_path):
    paths = ("hf-hub:a/b", "hf-hub:a_b", "hf-hub:a%2Fb")
    folders = {trial_folder(tmp_path, {"backbone": path}) for path in paths}
    assert len(folders) == 3 and all(folder.parent == tmp_path / "trials" for folder in folders)


def test_trial_folder_of_a_long_name_can_be_created(tmp_path):
    folder = trial_folder(tmp_path, {"backbone": f"local-dir:{'é' * 130}"})  # 2 bytes each; 255 are the limit
    folder.mkdir(parents=True)
    assert folder.is_dir()


def test_command_searches_backbones(command, color_images, tmp_path):
    flags = [f"--data={color_images}", f"--out={tmp_path}", "--method=linear", "--epochs=1", "--device=cpu"]
    flags += ["--seeds=1", "--over=base_lr=0.1", "--over=backbone=train_test_vit,vpt_fast_demo"]
    result = command("sweep", *flags)
    assert result.exit_code == 0, result.output
    trials = json.loads((tmp_path / "results.json").read_text())["trials"]
    assert [trial["params"]["backbone"] for trial in trials] == ["train_test_vit", "vpt_fast_demo"]


def test_empty_storage_is_not_the_sweep_s_own(settings, tmp_path):
    with pytest.raises(ValueError, match="storage is ''; it must be the URL"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path / "sweep", storage="")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{axes: 5, settings: 3, seeds: x}",
        "{axes: {}, seeds: [1], newer: 1}",
        "{inputs: {}, axes: 5, settings: {}, seeds: [1]}",
        "{inputs: {}, axes: {}, settings: {}, seeds: 1}",
        "{inputs: {}, axes: {}, settings: {data: x}, seeds: [1]}",
        "{inputs: {}, axes: {}, settings: {data: x, backbone: y}, seeds: [1]}",
    ],
)
def test_sweep_file_that_was_changed_is_named(settings, tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.yaml is not what a sweep writes"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path)


def test_file_in_the_folders_place_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out is .*file, which cannot be written"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "axes", "named"),
    [
        (
            {"method": "vpt-deep"},
            {"base_lr": (0.5, 0.1), "prompt_layers": (1, 3)},
            "over: prompt_layers is 3, which no trial can have: prompt_layers: got 3, want 1 to 2",
        ),
        (
            {"method": "vpt-shallow"},
            {"prompt_location": ("prepend", "pad"), "num_prompts": (2, 3)},
            "over: prompt_location is pad, num_prompts is 3, .* want a multiple of the patch size 4x4",
        ),
        ({}, {"pool": ("cls", "prompts")}, "over: pool is prompts, .* want None, 'cls' or 'image'"),
        ({}, {"method": ("linear", "partial-3")}, "over: method is partial-3, .* the backbone has 2 blocks"),
        (
            {},
            {"attention": ("auto", "sdpa_cudnn")},
            "over: attention is sdpa_cudnn, .* want float16 or bfloat16 .precision fp32 on cpu",
        ),
        (
            {},
            {"resize": ("shortest", "squash"), "augment": ("crop_flip",)},
            "over: resize is squash, augment is crop_flip, .* goes with resize=.shortest.",
        ),
        (
            {"pretrained": True},
            {"backbone": ("vit_tiny_patch16_224", "test_vit4")},
            "over: backbone is test_vit4, .* pretrained: timm has no published weights of test_vit4",
        ),
        (
            {},
            {"backbone": ("vit_tiny_patch16_224", "nosuch")},
            "over: backbone is nosuch, .* backbone: got 'nosuch', want the name of a timm model",
        ),
        ({"backbone": "nosuch"}, {"base_lr": (0.5,)}, "^backbone: got 'nosuch', want the name of a timm"),
        (
            {},
            {"cuda_graph": (False, True)},
            "over: cuda_graph is True, .* a step cannot be captured: the device is cpu",
        ),
        ({"pool": "prompts"}, {"base_lr": (0.5,)}, "^pool: got 'prompts', and the model has no prompts"),
    ],
    ids=[
        "layers",
        "two settings",
        "pool",
        "method",
        "attention",
        "preprocessing",
        "weights",
        "no backbone",
        "no backbone of any",
        "graph",
        "shared by all",
    ],
)
def test_value_that_no_trial_can_have_is_refused_before_any_is_trained(
    settings, tmp_path, trained, changes, axes, named
):
    given = {name: value for name, value in {**settings, **changes}.items() if name not in axes}
    with pytest.raises(ValueError, match=named):
        run_sweep(Sweep(given, axes, seeds=(1,)), tmp_path / "sweep")
    assert trained == [] and not (tmp_path / "sweep").exists()


def test_backbone_that_there_is_not_is_refused_before_the_images_are_listed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "open_splits", None)
    with pytest.raises(ValueError, match="^backbone: got 'nosuch', want the name of a timm model"):
        run_sweep(Sweep(settings | {"backbone": "nosuch"}, {"base_lr": (0.5,)}), tmp_path / "sweep")


def test_data_that_cannot_be_used_are_not_blamed_on_what_is_searched(settings, tmp_path):
    with pytest.raises(ValueError, match="^no such: there is no such folder"):
        run_sweep(Sweep(dict(settings, data="no such"), {"shots": (1, 2)}), tmp_path / "sweep")


@pytest.mark.parametrize("batch_size", [13, 7])  # of 27 images in a trial, and of 36 in a final run
def test_image_that_batch_norm_cannot_normalise_is_found_before_any_trial(settings, batch_size):
    network = {"backbone": "resnet10t", "backbone_arg": {"img_size": 32}, "method": "full"}
    given = {**settings, **network, "batch_size": batch_size, "pretrained": False}
    with pytest.raises(ValueError, match=f"batch_size is {batch_size} .* BatchNorm cannot normalise it"):
        sweep.require_trials(Sweep(given, {"base_lr": (0.1,)}), TrainingCache())


@pytest.mark.parametrize(
    ("axes", "named"),
    [({"batch_size": (9, 13)}, "batch_size is 13"), ({"accumulate": (1, 9)}, "accumulate is 9")],
    ids=["batch size", "parts"],
)
def test_searched_batch_that_batch_norm_cannot_normalise_is_named(settings, axes, named):
    network = {"backbone": "resnet10t", "backbone_arg": {"img_size": 32}, "method": "full"}
    given = {**settings, **network, "pretrained": False}
    given = {name: value for name, value in given.items() if name not in axes}
    with pytest.raises(ValueError, match=f"over: {named}, which no trial can have: .* BatchNorm"):
        sweep.require_trials(Sweep(given, axes), TrainingCache())


def test_searched_precision_that_does_not_go_with_the_weights_is_named(settings):
    plan = Sweep(dict(settings, dtype="float16"), {"precision": ("fp32", "bf16")})
    with pytest.raises(
        ValueError, match="over: precision is bf16, which no trial can have: dtype is float16"
    ):
        sweep.require_trials(plan, TrainingCache())


def test_batches_of_final_runs_are_checked_with_the_batch_size_that_they_will_have(settings, monkeypatch):
    checked = []
    monkeypatch.setattr(
        sweep, "require_batches", lambda recipe, _, images, __: checked.append((recipe.batch_size, images))
    )
    monkeypatch.setitem(METHODS, "linear", replace(METHODS["linear"], batch_size=30))
    del settings["batch_size"]
    sweep.require_trials(Sweep(settings, {"base_lr": (0.1,)}), TrainingCache())
    assert checked == [(64, 27), (64, 36)]  # fewer than 30 images are in batches of 64
    checked.clear()
    sweep.require_trials(Sweep(settings, {}), TrainingCache())  # there are no trials
    assert checked == [(30, 36)]


def test_graph_of_accumulated_steps_is_refused_on_a_gpu(settings):
    graphed = Sweep({**settings, "cuda_graph": True, "accumulate": 2}, {})
    with pytest.raises(ValueError, match="cuda_graph: .* a step cannot be captured: accumulate is 2"):
        sweep._require_trial(graphed, graphed.recipe(), torch.device("cuda"), TrainingCache())


def test_grid_of_rates_builds_one_model_beforehand(settings, monkeypatch):
    built, original = [], sweep.build_model_without_values
    monkeypatch.setattr(
        sweep, "build_model_without_values", lambda *arguments: built.append(original(*arguments))
    )
    axes = {"base_lr": (0.5, 0.1), "weight_decay": (0.1, 0.0), "pool": ("cls", "image")}
    sweep.require_trials(Sweep(settings, axes), TrainingCache())
    assert len(built) == 2


def test_backbone_that_cannot_be_built_without_values_is_left_to_its_trials(settings, monkeypatch):
    def built(*arguments, **keywords):
        torch.ones(()).item()  # as a rate of stochastic depth may be asked for

    monkeypatch.setattr(timm, "create_model", built)
    recipe = Sweep(settings, {}).recipe().resolved(num_train_images=27, device_type="cpu")
    assert sweep.build_model_without_values(recipe, 3) is None


def test_sweep_with_no_good_trial_says_why(settings, tmp_path, monkeypatch):
    def train(*arguments, **options):
        raise TrainingDiverged("the loss is inf")

    monkeypatch.setattr(trials, "train", train)
    with pytest.raises(ValueError, match="the loss is inf"):
        run_sweep(Sweep(settings, {"base_lr": (1.0,)}), tmp_path)


def trial(value, place=0, **params) -> dict:
    return {"state": "complete", "val_accuracy": value, "place": place, "params": params}


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([trial(0.5, base_lr=1.0), trial(0.6, base_lr=5.0)], 1),
        ([trial(0.5, base_lr=5.0), trial(0.5, base_lr=1.0)], 1),
        ([trial(0.5, base_lr=1.0, weight_decay=0.0), trial(0.5, base_lr=1.0, weight_decay=0.01)], 1),
        ([trial(0.5, 1, num_prompts=5), trial(0.5, 0, num_prompts=1)], 1),
        ([{**trial(0.9, base_lr=1.0), "state": "pruned"}, trial(0.1, base_lr=5.0)], 1),
    ],
    ids=["accuracy", "smaller rate", "larger decay", "first of the grid", "finished only"],
)
def test_best_trial(trials, best):
    assert best_trial(trials) is trials[best]


def test_command_says_what_it_does_and_what_came_of_it(command, color_images, tmp_path):
    flags = [f"--data={color_images}", f"--out={tmp_path / 'sweep'}", "--backbone=train_test_vit"]
    flags += ["--method=linear", "--epochs=1", "--device=cpu", "--seeds=1,2", "--over=base_lr=0.5,0.1"]
    result = command("sweep", *flags)
    assert result.exit_code == 0, result.output
    for text in (
        "2 trials of 1 epoch on 27 images, by grid: base_lr 0.5, 0.1",
        "2 of 1 epoch on 36 images, trained on train and val; seeds 1, 2",
        "126 images trained on",  # 2 · 27 + 2 · 36
        "1 trial is left, about",
        "best of 2 trials: base_lr",
        "standard deviation, n - 1",
    ):
        assert text in result.output
    assert command("sweep", *flags, "--train-on=train").exit_code == 2


def test_without_test_images_the_final_runs_are_of_val(settings, images, tmp_path):
    shutil.rmtree(images / "test")
    found = run_sweep(Sweep(dict(settings, data=str(images)), {}, seeds=(1,)), tmp_path)
    assert found["final"]["split"] == "val" and "no test images" in found["final"]["note"]
    assert found["final"]["mean"] is not None and found["best"] is None


def test_of_timm_s_data_sets_nothing_is_said_of_test_images_that_were_not_looked_for(
    settings, images, tmp_path
):
    given = dict(settings, data="torch/image_folder", data_root=str(images))
    final = run_sweep(Sweep(given, {}, seeds=(1,)), tmp_path / "sweep")["final"]
    assert final["split"] == "val"
    assert final["note"] == "no test images of timm's data sets are looked for: final accuracies are of val"


def test_final_runs_train_on_what_the_search_held_out_by_a_fraction_of_its_own(settings, images, tmp_path):
    shutil.rmtree(images / "val")
    given = dict(settings, data=str(images), val_fraction=0.4)
    run_sweep(Sweep(given, {"base_lr": (0.1,)}, seeds=(1,)), tmp_path)
    final, trial = (json.loads(file.read_text())["data"] for file in sorted(tmp_path.rglob("run.json")))
    assert (trial["train"]["per_class"], trial["val"]["per_class"]) == ([5, 5, 5], [4, 4, 4])
    assert (final["train"]["per_class"], final["val"]) == ([9, 9, 9], None)


def test_folder_of_another_sweep_is_refused(settings, tmp_path):
    run_sweep(Sweep(settings, {}, seeds=(1,)), tmp_path)
    changed = "axes .none there, base_lr 0.1 now., seeds .1 there, 1, 2 now., batch_size .9 there, 3 now."
    with pytest.raises(ValueError, match=f"other settings: {changed}; choose another --out"):
        run_sweep(Sweep(dict(settings, batch_size=3), {"base_lr": (0.1,)}, seeds=(1, 2)), tmp_path)


def test_results_are_written_after_each_final_run(settings, tmp_path, monkeypatch):
    original, there = loop.train, []

    def train(recipe, out, **options):
        if (tmp_path / "results.json").exists():
            there.append([*json.loads((tmp_path / "results.json").read_text())["final"]["accuracies"]])
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    run_sweep(Sweep(settings, {}, seeds=(1, 2)), tmp_path)
    assert there == [["1"]]


def test_results_stay_where_their_study_is_gone(settings, tmp_path, monkeypatch):
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    run_sweep(plan, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    (tmp_path / "study.db").unlink()

    def interrupted(self):
        raise trials.Stopped

    monkeypatch.setattr(trials.Worker, "work", interrupted)
    run_sweep(plan, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.fixture
def own_images(settings, images) -> dict:
    """The settings, on images that may be changed."""
    return dict(settings, data=str(images))


def test_sweep_that_was_killed_does_not_go_on_with_other_images(own_images, images, tmp_path, monkeypatch):
    plan = Sweep(own_images, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    monkeypatch.setattr(trials, "train", None)
    with pytest.raises(TypeError):  # the first trial
        run_sweep(plan, tmp_path / "sweep")
    os.rename(images / "train" / "red" / "0.png", images / "train" / "red" / "new.png")
    with pytest.raises(ValueError, match=f"other settings: what is in data {images}; choose another --out"):
        run_sweep(plan, tmp_path / "sweep")


@pytest.mark.parametrize("part", [{"shots": 1}, {"train_fraction": 0.1}], ids=str)
def test_sweep_on_a_part_of_the_images_does_not_go_on_where_any_changed(own_images, images, tmp_path, part):
    plan = Sweep(dict(own_images, **part), {"base_lr": (0.1,)}, seeds=(1,))
    run_sweep(plan, tmp_path / "sweep")
    for image in (images / "train" / "red").iterdir():
        other = shutil.copytree(images, tmp_path / image.stem / images.name)
        (other / "train" / "red" / image.name).unlink()
        moved = Sweep(dict(plan.settings, data=str(other)), plan.axes, seeds=(1,))
        with pytest.raises(ValueError, match=f"data .{images} there, {other} now"):
            run_sweep(moved, tmp_path / "sweep")


def test_finished_sweep_does_not_answer_for_other_images(own_images, images, tmp_path):
    run_sweep(Sweep(own_images, {}, seeds=(1,)), tmp_path / "sweep")
    other = shutil.copytree(images, tmp_path / "other" / images.name)
    (other / "test" / "red" / "0.png").unlink()
    with pytest.raises(ValueError, match=f"data .{images} there, {other} now"):
        run_sweep(Sweep(dict(own_images, data=str(other)), {}, seeds=(1,)), tmp_path / "sweep")


def test_finished_sweep_does_not_answer_for_other_weights(settings, tmp_path):
    for shift in (0.0, 0.1):
        state = timm.create_model("train_test_vit").state_dict()
        torch.save({name: tensor + shift for name, tensor in state.items()}, tmp_path / f"{shift}.pth")
    given = dict(settings, checkpoint=str(tmp_path / "0.0.pth"))
    run_sweep(Sweep(given, {}, seeds=(1,)), tmp_path / "sweep")
    given["checkpoint"] = str(tmp_path / "0.1.pth")
    with pytest.raises(ValueError, match=r"checkpoint .*0\.0\.pth there, .*0\.1\.pth now"):
        run_sweep(Sweep(given, {}, seeds=(1,)), tmp_path / "sweep")


def test_weights_that_do_not_exist_are_refused_before_the_first_trial(settings, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint is no\.pth, which cannot be read: No such file"):
        run_sweep(Sweep(dict(settings, checkpoint="no.pth"), {}), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_weights_of_a_folder_that_cannot_be_read_are_named_as_the_backbone_s(settings, tmp_path):
    given = Sweep(dict(settings, backbone=f"local-dir:{tmp_path}"), {})
    with pytest.raises(ValueError, match=f"^backbone is {tmp_path}/.*, which cannot be read: No such file"):
        sweep.digest_inputs(given, TrainingCache())


def test_data_by_another_path_are_the_same(own_images, images, tmp_path, monkeypatch, trained):
    run_sweep(Sweep(own_images, {}, seeds=(1,)), tmp_path / "sweep")
    monkeypatch.chdir(images.parent)
    for path in (images.name, f"{images}/", f"../{images.parent.name}/{images.name}"):
        run_sweep(Sweep(dict(own_images, data=path), {}, seeds=(1,)), tmp_path / "sweep")
    assert len(trained) == 1


def test_shared_storage_parts_data_of_one_name(own_images, images, tmp_path, trained):
    other = shutil.copytree(images, tmp_path / "other" / images.name)
    (other / "train" / "red" / "0.png").unlink()
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    for data in (images, other):
        plan = Sweep(dict(own_images, data=str(data)), {}, seeds=(1,))
        run_sweep(plan, tmp_path / f"sweep-{data.parent.name}", storage=storage)
    assert len(trained) == 2


def test_shared_storage_joins_copies_of_the_data(own_images, images, tmp_path, trained):
    copy = shutil.copytree(images, tmp_path / "other" / "copy")
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    for data in (images, copy):
        run_sweep(
            Sweep(dict(own_images, data=str(data)), {}, seeds=(1,)), tmp_path / data.name, storage=storage
        )
    assert len(trained) == 1


def test_storage_that_cannot_be_opened_claims_no_folder(settings, tmp_path):
    with pytest.raises(ValueError, match="storage cannot be opened"):
        run_sweep(Sweep(settings, {}, seeds=(1,)), tmp_path, storage="sqlite:////no/such/folder/x.db")
    assert run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(2,)), tmp_path)["finished"]


def test_plan_of_trials_that_a_sampler_chooses_is_a_range(settings, tmp_path):
    del settings["epochs"]
    plan = Sweep(settings, {"epochs": (1, 2, 3)}, seeds=(1,), sampler="random", trials=2)
    amounts = [sweep._Amount(epochs, 10, 20, "note") for epochs in (1, 2, 3)]
    console = Console(file=io.StringIO(), width=200)
    sweep._print_plan(console, plan, amounts, tmp_path)
    assert (
        "40 to 120 images trained on" in console.file.getvalue()
    )  # 2 · 1 · 10 + 1 · 20, 2 · 3 · 10 + 3 · 20


def test_cost_of_a_trial_follows_its_epochs_and_images(settings):
    del settings["epochs"]
    plan = Sweep(settings, {"epochs": (1, 3)})
    cost = sweep._relative_costs(plan, [sweep._Amount(1, 10, 0, ""), sweep._Amount(3, 20, 0, "")])
    assert [cost(params) for params in plan.points()] == pytest.approx([10 / 35, 60 / 35])


def test_plan_of_searched_epochs_and_images_is_a_sum_and_a_range(settings, tmp_path, capsys):
    del settings["epochs"]
    axes = {"epochs": (1, 2), "train_fraction": (0.34, 1.0)}
    console = Console(width=200)
    run_sweep(Sweep(settings, axes, seeds=(1, 2)), tmp_path, console=console)
    printed = capsys.readouterr().out
    assert "4 trials of 1 to 2 epochs on 9 to 27 images, by grid" in printed
    assert (
        "2 of 1 to 2 epochs on 12 to 36 images, trained on a part of train and val, or trained on" in printed
    )
    # Trials (1 + 2) · (9 + 27); final runs from 2 · 1 · 12 to 2 · 2 · 36.
    assert "132 to 252 images trained on" in printed


def test_final_runs_train_on_the_shots_of_train_and_val_together(settings, tmp_path):
    found = run_sweep(Sweep(dict(settings, shots=2), {"base_lr": (0.1,)}, seeds=(1,)), tmp_path)
    assert found["final"]["note"] == "trained on a part of train and val"
    (run,) = (tmp_path / "final").iterdir()
    assert json.loads((run / "run.json").read_text())["data"]["train"]["per_class"] == [2, 2, 2]


def test_final_runs_on_the_shots_of_fgvc_are_said_to_be_on_a_part_of_train(settings, tmp_path, monkeypatch):
    write_fgvc(shrink(monkeypatch, "fgvc/cub"), tmp_path / "cub")
    given = dict(settings, data=str(tmp_path), task="fgvc/cub", shots=2)
    found = run_sweep(Sweep(given, {}, seeds=(1,)), tmp_path / "sweep")
    assert found["final"]["note"] == "trained on a part of train"


def test_sweep_file_holds_what_was_asked(settings, tmp_path):
    run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), tmp_path)
    values = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert values["settings"] == settings and values["axes"] == {"base_lr": [0.1]} and values["seeds"] == [1]
