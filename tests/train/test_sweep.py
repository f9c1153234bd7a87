"""Sweeps: what they choose, and that nothing is trained twice or lost."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import timm
import torch
import yaml
from rich.console import Console

from vpt_fast import loop, sweep, trials
from vpt_fast.cache import TrainingCache
from vpt_fast.failures import SavingFailed, TrainingDiverged
from vpt_fast.recipe import Recipe
from vpt_fast.run import RunFolder
from vpt_fast.sweep import (
    Sweep,
    best_trial,
    default_axes,
    digest_inputs,
    parse_axes,
    parse_axis,
    run_sweep,
    trial_folder,
)


@pytest.fixture
def settings(color_images) -> dict:
    return dict(
        data=str(color_images),
        backbone="train_test_vit",
        method="linear",
        epochs=2,
        warmup_epochs=0,
        batch_size=9,
        device="cpu",
    )


@pytest.fixture
def trained(monkeypatch) -> list:
    """The run folders that were trained in, in order."""
    original, folders = loop.train, []

    def train(recipe, out, **options):
        folders.append(out.name)
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    return folders


def studies(plan: Sweep, out: Path) -> tuple[optuna.Study, optuna.Study]:
    return trials.open_studies(plan.study_name(digest_inputs(plan, TrainingCache())), out, None)


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


def test_ctrl_c_gives_the_trial_back_and_its_run_goes_on(settings, tmp_path, monkeypatch, trained):
    settings = dict(settings, epochs=3)
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    original, steps = loop.TrainStep.__call__, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 5:  # the second epoch of the first trial, of 3 steps each
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop.TrainStep, "__call__", step)
    stopped = run_sweep(plan, tmp_path / "parts")
    assert not stopped["finished"] and stopped["trials"] == []
    finished = run_sweep(plan, tmp_path / "parts")
    assert finished["finished"] and sorted(trained) == ["base_lr=0.1", "base_lr=0.5", "base_lr=0.5", "seed-1"]
    assert len(steps) == 5 + 3 * 2 + 3 * 3 + 4 * 3  # one epoch of the stopped trial was not trained again
    assert finished == run_sweep(plan, tmp_path / "whole")


def test_ctrl_c_that_is_too_late_for_a_run_stops_the_sweep_behind_it(
    settings, tmp_path, late_ctrl_c, trained
):
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1, 2))
    for done in (1, 2, 3, 4):
        found = run_sweep(plan, tmp_path)
        assert len(trained) == done and found["finished"] == (done == 4)
    assert len(set(trained)) == 4 and len(found["trials"]) == 2


@pytest.mark.parametrize("is_owner_recorded", [True, False], ids=["owned", "just taken"])
def test_trial_of_a_process_that_died_is_taken_again_at_once(
    settings, tmp_path, trained, monkeypatch, is_owner_recorded
):
    monkeypatch.setattr(trials.Display, "wait", lambda self, running: pytest.fail("it waits"))
    plan = Sweep(settings, {}, seeds=(1,))
    _, study = studies(plan, tmp_path)
    study.enqueue_trial({"seed": 1})
    with pytest.warns(UserWarning, match="Heartbeat"):
        dead = study.ask()
    if is_owner_recorded:
        dead.set_user_attr("owner", {**trials._owner(), "started": "another process's"})
        dead.suggest_categorical("seed", [1])
    assert run_sweep(plan, tmp_path)["finished"] and trained == ["seed-1"]


def test_one_process_at_a_time_takes_a_trial(settings, tmp_path, monkeypatch):
    owner, found = trials._owner, []

    def note(what):
        with open(tmp_path / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append((what, "unlocked"))
            except BlockingIOError:
                found.append((what, "locked"))

    def train(recipe, out, **options):
        note("trained")
        raise trials.Stopped

    monkeypatch.setattr(trials, "_owner", lambda: note("taken") or owner())
    monkeypatch.setattr(trials, "train", train)
    run_sweep(Sweep(settings, {}, seeds=(1,)), tmp_path)
    assert found == [("taken", "locked"), ("trained", "unlocked")]


def killed_behind(monkeypatch, owner, name) -> None:
    """Interrupts this process behind the first call of `owner.name`."""
    original = getattr(owner, name)

    def call(*arguments):
        original(*arguments)
        monkeypatch.setattr(owner, name, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, call)


def test_pruner_sees_every_epoch_of_a_trial_that_went_on(settings, tmp_path, monkeypatch):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,), pruner="median")
    for name in ("save_epoch", "save_results"):
        killed_behind(monkeypatch, RunFolder, name)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(plan, tmp_path)
    assert run_sweep(plan, tmp_path)["finished"]
    study, _ = studies(plan, tmp_path)
    rows = RunFolder(trial_folder(tmp_path, {"base_lr": 0.5})).read().metrics
    assert study.best_trial.intermediate_values == {row["epoch"]: row["val_accuracy"] for row in rows}


def test_trial_that_was_stopped_goes_on_before_the_next(settings, tmp_path, monkeypatch):
    def train(recipe, out, **options):
        trained.append(out.name)
        raise trials.Stopped

    trained = []
    monkeypatch.setattr(trials, "train", train)
    for _ in range(2):
        run_sweep(Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,)), tmp_path)
    assert trained == ["base_lr=0.5"] * 2


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
    found = run_sweep(plan, tmp_path)
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


def test_study_that_can_no_longer_be_saved_is_named(settings, tmp_path, monkeypatch):
    original = loop.train

    def train(recipe, out, **options):
        with sqlite3.connect(tmp_path / "study.db") as study:  # every write of attributes fails from here on
            study.execute("DROP TABLE trial_user_attributes")
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    with pytest.raises(SavingFailed, match="studies of the sweep in .* could not be saved: .* no such table"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path)


def test_empty_storage_is_not_the_sweep_s_own(settings, tmp_path):
    with pytest.raises(ValueError, match="storage is ''; it must be the URL"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path / "sweep", storage="")


@pytest.mark.parametrize(
    "storage", ["nope:secret", "sqlite:////no/such/folder/x.db", "mysql://user:secret@host/x"]
)
def test_storage_that_cannot_be_opened_is_refused_without_its_url(settings, tmp_path, storage):
    with pytest.raises(ValueError, match="storage cannot be opened") as raised:
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path, storage=storage)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_study_lies_in_the_folder_whatever_that_is_called(settings, tmp_path):
    folder = tmp_path / "{x} 50%25?y#z"
    run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), folder)
    assert (folder / "study.db").stat().st_size > 0 and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "text", ["{}", "{axes: 5, settings: 3, seeds: x}", "{axes: {}, seeds: [1], newer: 1}"]
)
def test_sweep_file_that_was_changed_is_named(settings, tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.yaml is not what a sweep writes"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path)


def test_file_in_the_folders_place_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out is .*file, which cannot be written"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path / "file")


def test_setting_searched_twice_is_refused():
    with pytest.raises(ValueError, match="'base-lr=2', and base_lr is searched already"):
        parse_axes(["base_lr=1", "base-lr=2"], {"data": "x", "backbone": "y"})


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


def test_graph_of_accumulated_steps_is_refused_on_a_gpu(settings):
    recipe = Sweep({**settings, "cuda_graph": True, "accumulate": 2}, {}).recipe()
    with pytest.raises(ValueError, match="cuda_graph: .* a step cannot be captured: accumulate is 2"):
        sweep._require_trial(recipe, torch.device("cuda"), TrainingCache())


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


OTHER_PROCESS = """
import json, sys
from pathlib import Path
from vpt_fast.sweep import Sweep, run_sweep
settings, axes, out = json.loads(sys.argv[1])
run_sweep(Sweep(settings, axes, seeds=(1, 2)), Path(out))
"""


def test_two_processes_share_one_sweep(settings, tmp_path, trained):
    settings = dict(settings, backbone="test_vit", pretrained=False)
    axes = {"base_lr": (0.5, 0.25, 0.1, 0.05)}
    argument = json.dumps([settings, axes, str(tmp_path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, argument], env=environment)
    while not (tmp_path / "trials").exists() and other.poll() is None:
        time.sleep(0.02)
    found = run_sweep(Sweep(settings, axes, seeds=(1, 2)), tmp_path)
    assert other.wait(timeout=300) == 0 and found["finished"]
    assert len(found["trials"]) == 4 and len(found["final"]["accuracies"]) == 2
    assert len(trained) == len(set(trained))
    # What the other process has trained, this one has not: its runs are of another process's id.
    plan = Sweep(settings, axes, seeds=(1, 2))
    study, final = studies(plan, tmp_path)
    done = [
        t for t in (*study.trials, *final.trials) if t.state.name == "COMPLETE" and "results" in t.user_attrs
    ]
    assert len(done) == 6  # each was trained once
    assert sum(t.user_attrs["owner"]["pid"] == os.getpid() for t in done) == len(trained)


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_waiting_trial_is_taken_by_one_process_alone(settings, tmp_path, monkeypatch):
    from optuna.storages._rdb.models import TrialModel

    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    one, other = (studies(plan, tmp_path)[0] for _ in range(2))
    one.enqueue_trial({"base_lr": 0.5})
    read = TrialModel.find_or_raise_by_id.__func__

    def slowly(cls, *arguments, **options):
        found = read(cls, *arguments, **options)
        time.sleep(0.1)  # between the reading of a trial's state and its writing
        return found

    monkeypatch.setattr(TrialModel, "find_or_raise_by_id", classmethod(slowly))
    with ThreadPoolExecutor(2) as threads:
        taken = [trial.number for trial in threads.map(lambda study: study.ask(), (one, other))]
    assert sorted(taken) == [0, 1]


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_trial_that_has_not_recorded_its_settings_yet_is_not_trained_twice(
    settings, tmp_path, monkeypatch, trained
):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,))
    study, _ = studies(plan, tmp_path)
    for _ in range(2):  # two processes that began at once found it missing
        study.enqueue_trial({"base_lr": 0.5})
    taken = study.ask()
    taken.set_user_attr("owner", trials._owner())

    def pause(seconds):
        assert trained == []
        if not study.get_trials(deepcopy=False)[0].state.is_finished():
            study.tell(taken, state=optuna.trial.TrialState.FAIL)

    monkeypatch.setattr(trials.time, "sleep", pause)
    assert run_sweep(plan, tmp_path)["finished"]
    assert trained == ["base_lr=0.5", "seed-1"]


def test_command_says_what_it_does_and_what_came_of_it(command, color_images, tmp_path):
    flags = [f"--data={color_images}", f"--out={tmp_path / 'sweep'}", "--backbone=train_test_vit"]
    flags += ["--method=linear", "--epochs=1", "--device=cpu", "--seeds=1,2", "--over=base_lr=0.5,0.1"]
    result = command("sweep", *flags)
    assert result.exit_code == 0, result.output
    for text in (
        "2 trials of 1 epochs on 27 images, by grid: base_lr 0.5, 0.1",
        "2 of 1 epochs on 36 images, trained on train and val; seeds 1, 2",
        "126 images trained on",  # 2 · 27 + 2 · 36
        "1 trial is left, about",
        "best of 2 trials: base_lr",
        "standard deviation, n - 1",
    ):
        assert text in result.output
    assert command("sweep", *flags, "--train-on=train").exit_code == 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_samplers_take_as_many_trials_as_asked(settings, tmp_path, sampler):
    plan = Sweep(
        settings, {"base_lr": (0.5, 0.1, 0.05)}, seeds=(1,), sampler=sampler, trials=2, pruner="median"
    )
    found = run_sweep(plan, tmp_path)
    assert found["finished"] and 1 <= len(found["trials"]) <= 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_sampler_chooses_after_interruptions_what_it_would_have_chosen(sampler, tmp_path, monkeypatch):
    axes = {"base_lr": (0.8, 0.4, 0.2, 0.1), "weight_decay": (0.1, 0.01, 0.001, 0.0)}
    suggest = optuna.Trial.suggest_categorical

    def train(recipe, out, **options):
        results = {"val_accuracy": recipe.base_lr - recipe.weight_decay}
        return SimpleNamespace(results=results, facts={"parameters": None})

    def choices(interrupted: tuple[int, ...]) -> list[dict]:
        """The settings of 14 trials (TPE's first ten are random), interrupted behind these of all the records
        of a setting."""
        recorded = itertools.count(1)

        def record(*arguments):
            value = suggest(*arguments)
            if next(recorded) in interrupted:
                raise KeyboardInterrupt
            return value

        monkeypatch.setattr(optuna.Trial, "suggest_categorical", record)
        study = optuna.create_study(direction="maximize")
        worker = trials.Worker(
            study=study,
            axes=axes,
            wanted=None,
            sampler=functools.partial(trials.find_sampler, sampler, 42),
            limit=14,
            recipe=lambda **params: SimpleNamespace(epochs=1, **params),
            folder=lambda params: tmp_path,
            metric="val_accuracy",
            cache=TrainingCache(),
            display=trials.Display(Console(quiet=True), "trial", 14),
            after=lambda: None,
            stop=threading.Event(),
            folder_lock=contextlib.nullcontext,
            is_only_folder=True,
        )
        for _ in interrupted:
            with pytest.raises(KeyboardInterrupt):
                worker.work()
        worker.work()
        return [trial.params for trial in study.trials if trials.is_done(trial)]

    monkeypatch.setattr(trials, "train", train)
    undisturbed = choices(())
    assert len(undisturbed) == 14 and len({tuple(params.values()) for params in undisturbed}) > 4
    # With half of the second trial's settings recorded, all of the third's, and half of a late one's.
    assert choices((3, 8, 29)) == undisturbed


@pytest.fixture
def sampler_that_repeats(monkeypatch):
    """Chooses the first value in every trial."""

    class First(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            return distribution.choices[0]

    monkeypatch.setattr(optuna.samplers, "TPESampler", First)


REPEATED = {"base_lr": (0.5, 0.1)}


def test_settings_that_a_sampler_repeats_are_a_trial_that_trains_nothing(
    settings, tmp_path, trained, sampler_that_repeats
):
    plan = Sweep(settings, REPEATED, seeds=(1,), sampler="tpe", trials=3)
    found = run_sweep(plan, tmp_path)
    assert found["finished"] and trained == ["base_lr=0.5", "seed-1"]
    study, _ = studies(plan, tmp_path)
    outcomes = [(trial.state.name, trial.value, trial.intermediate_values) for trial in study.trials]
    assert len(outcomes) == 3 and outcomes[1:] == outcomes[:1] * 2 and len(outcomes[0][2]) == 2


def test_pruned_settings_that_a_sampler_repeats_are_pruned_again_without_training(
    settings, tmp_path, trained, sampler_that_repeats, monkeypatch
):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    with pytest.raises(ValueError, match="no trial in"):
        run_sweep(Sweep(settings, REPEATED, sampler="tpe", trials=2, pruner="median"), tmp_path)
    assert trained == ["base_lr=0.5"]


def test_diverged_settings_that_a_sampler_repeats_are_not_trained_again(
    settings, tmp_path, trained, sampler_that_repeats
):
    plan = Sweep(settings, {"base_lr": (1e38, 0.1)}, sampler="tpe", trials=2)
    with pytest.raises(ValueError, match="no trial in .* the loss is"):
        run_sweep(plan, tmp_path)
    assert trained == ["base_lr=1e+38"]


def test_command_says_that_a_sampler_repeated_settings(command, color_images, tmp_path, sampler_that_repeats):
    flags = [f"--data={color_images}", f"--out={tmp_path / 'sweep'}", "--backbone=train_test_vit"]
    flags += ["--method=linear", "--epochs=1", "--device=cpu", "--seeds=1", "--over=base_lr=0.5,0.1"]
    result = command("sweep", *flags, "--sampler=tpe", "--trials=2")
    assert result.exit_code == 0, result.output
    assert "trial 2/2 base_lr=0.5: as before, val accuracy" in result.output
    assert "best of 2 trials of 1 combinations: base_lr 0.5" in result.output


def test_sampler_takes_a_seed_of_more_than_32_bits(settings, tmp_path):
    plan = Sweep({**settings, "seed": 2**40}, {"base_lr": (0.5, 0.1)}, seeds=(1,), sampler="tpe", trials=1)
    assert run_sweep(plan, tmp_path)["finished"]


def test_pruned_trial_is_never_the_best(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.params["base_lr"] == 0.5)
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,), pruner="median")
    found = run_sweep(plan, tmp_path)
    assert [t["state"] for t in found["trials"]] == ["pruned", "complete"]
    assert len(RunFolder(tmp_path / "trials" / "base_lr=0.5").metrics.read_text().splitlines()) == 1


def test_without_test_images_the_final_runs_are_of_val(settings, images, tmp_path):
    shutil.rmtree(images / "test")
    found = run_sweep(Sweep(dict(settings, data=str(images)), {}, seeds=(1,)), tmp_path)
    assert found["final"]["split"] == "val" and "no test images" in found["final"]["note"]
    assert found["final"]["mean"] is not None and found["best"] is None


def test_folder_of_another_sweep_is_refused(settings, tmp_path):
    run_sweep(Sweep(settings, {}, seeds=(1,)), tmp_path)
    with pytest.raises(ValueError, match="other settings: seeds, batch_size"):
        run_sweep(Sweep(dict(settings, batch_size=3), {}, seeds=(2,)), tmp_path)


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


@pytest.mark.parametrize("with_digests", [True, False], ids=["digests", "written before there were any"])
def test_data_by_another_path_are_the_same(own_images, images, tmp_path, monkeypatch, trained, with_digests):
    run_sweep(Sweep(own_images, {}, seeds=(1,)), tmp_path / "sweep")
    if not with_digests:
        values = yaml.safe_load((tmp_path / "sweep" / "sweep.yaml").read_text())
        del values["inputs"]
        (tmp_path / "sweep" / "sweep.yaml").write_text(yaml.safe_dump(values))
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


def test_searched_method_and_backbone_are_those_of_the_best_trial(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_trial", lambda trials: trials[-1] if len(trials) == 2 else None)
    del settings["method"]
    found = run_sweep(Sweep(settings, {"method": ("linear", "bias")}, seeds=(1,)), tmp_path)
    assert found["method"] == "bias"


def test_plan_of_searched_epochs_and_images_is_a_sum_and_a_range(settings, tmp_path, capsys):
    del settings["epochs"]
    axes = {"epochs": (1, 2), "train_fraction": (0.34, 1.0)}
    console = Console(width=200)
    run_sweep(Sweep(settings, axes, seeds=(1, 2)), tmp_path, console=console)
    printed = capsys.readouterr().out
    assert "4 trials of 1 to 2 epochs on 9 to 27 images, by grid" in printed
    assert (
        "2 of 1 to 2 epochs on 12 to 36 images, trained on a share of train and val, or trained on" in printed
    )
    # Trials (1 + 2) · (9 + 27); final runs from 2 · 1 · 12 to 2 · 2 · 36.
    assert "132 to 252 images trained on" in printed


def test_time_left_is_by_what_a_trial_costs():
    console = Console(record=True, width=200)
    display = trials.Display(console, "trial", 3, lambda params: params["epochs"] / 10)
    display.begin({"epochs": 2})
    display._started -= 10
    display.end({"epochs": 2}, "done")
    assert "2 trials are left, about 2 min" in console.export_text()  # 2 trials of 50 s


def test_trials_show_how_far_their_frozen_features_are(settings, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        trials.Display, "features", lambda self, params, images, of: shown.append((params, images, of))
    )
    run_sweep(Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,)), tmp_path)
    trial = [(images, of) for params, images, of in shown if params == {"base_lr": 0.5}]
    assert trial == sorted(trial) and trial[0][0] > 0 and trial[-1] == (36, 36)  # train and val


def test_description_of_a_trial_names_its_frozen_features():
    display = trials.Display(Console(), "trial", 1)
    display.features({"base_lr": 0.5}, 1_024, 2_000)
    (task,) = display._bars.tasks
    assert task.description == "trial 1/1 base_lr=0.5, frozen features 1,024/2,000"


def test_sweep_file_holds_what_was_asked(settings, tmp_path):
    run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), tmp_path)
    values = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert values["settings"] == settings and values["axes"] == {"base_lr": [0.1]} and values["seeds"] == [1]


@pytest.mark.parametrize(
    ("method", "task", "axes"),
    [
        ("vpt-deep", None, {"base_lr": 10, "weight_decay": 4}),
        ("linear", "fgvc/cub", {"base_lr": 9, "weight_decay": 4}),
        ("full", "vtab/cifar", {"base_lr": 4}),
    ],
)
def test_default_grid_is_the_papers(method, task, axes):
    recipe = Recipe(data="x", backbone="y", method=method, task=task)
    assert {name: len(axis) for name, axis in default_axes(recipe).items()} == axes


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("base-lr=5e-4,1", ("base_lr", (5e-4, 1.0))),
        ("num_prompts=1,10,10", ("num_prompts", (1, 10))),
        ("prompt_layers=0,1;-1", ("prompt_layers", ("0,1", -1))),
        ("optimizer=sgd,adamw", ("optimizer", ("sgd", "adamw"))),
    ],
)
def test_axes_are_parsed_as_the_recipe_parses(text, axis):
    assert parse_axis(text, {"data": "x", "backbone": "y"}) == axis


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bace_lr=1", "close names: base_lr"),
        ("base_lr=fast", "base_lr is 'fast'"),
        ("base_lr", "must be KEY=A,B,C"),
        ("seed=1,2", "seed is no setting of the training"),
        ("workers=1,2", "workers is no setting of the training"),
        ("base_lr={1", "over is 'base_lr={1', whose value '{1' is not YAML"),
    ],
)
def test_axes_that_cannot_be_searched_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_axis(text, {"data": "x", "backbone": "y"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(sampler="annealing"), "sampler is 'annealing'"),
        (dict(sampler="tpe", trials=0), "trials is 0 with sampler tpe"),
        (dict(seeds=(1, 2**64)), "seed is 18446744073709551616"),
        (dict(pruner="axe"), "pruner is 'axe'"),
        (dict(sampler="tpe"), "trials is None with sampler tpe"),
        (dict(trials=3), "trials is 3 with sampler grid"),
        (dict(seeds=()), "seeds is"),
        (dict(axes={"epochs": (1, 2)}), "epochs is given as 2 and searched over too"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(settings, changes, reason):
    with pytest.raises(ValueError, match=reason):
        Sweep(**{"settings": settings, "axes": {}, **changes})


def test_missing_optuna_is_named(settings, monkeypatch):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optuna, which is not installed; pip install optuna"):
        Sweep(settings, {})
