"""Training: what it computes, and that stopping, going on and failing lose nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import timm
import torch
from graph_on_cpu import capture_on_cpu
from rich.console import Console
from runs import interrupt_at_step, require_equal, trained, untimed
from safetensors.torch import load_file, save_file

from vpt_fast import PromptedViT, load_pretrained
from vpt_fast.classifier import TunedClassifier
from vpt_fast.failures import OutOfMemory, SavingFailed, TrainingDiverged
from vpt_fast.files import write
from vpt_fast.training import classification, loop, plots, report
from vpt_fast.training.classification import Classification
from vpt_fast.training.loop import train
from vpt_fast.training.methods import build_model
from vpt_fast.training.run import Labels, RunError, RunFolder
from vpt_fast.training.step import build_optimizer, captures_steps
from vpt_fast.training.world import World


@pytest.fixture(scope="module")
def trained_once(recipe, tmp_path_factory):
    """The result of training by the recipe, in a folder that is not to be changed."""
    return train(recipe, tmp_path_factory.mktemp("once") / "run")


@pytest.fixture
def first(trained_once, tmp_path):
    """The same, and a copy of its folder as tmp_path / "run"."""
    shutil.copytree(trained_once.path, tmp_path / "run")
    return trained_once


def test_training_lowers_the_loss(trained_once):
    metrics = trained_once.metrics
    assert metrics[-1]["train_loss"] < 0.7 * metrics[0]["train_loss"]


def test_first_epoch_of_warm_up_changes_no_weight(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, epochs=2, warmup_epochs=1)
    torch.manual_seed(recipe.seed)
    start = build_model(recipe.resolved(num_train_images=27, device_type="cpu"), 3).trainable_state_dict()
    after = []

    def keep(self, rows, checkpoint):
        after.append({name: tensor.clone() for name, tensor in checkpoint.trainable.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", keep)
        train(recipe, tmp_path / "run")
    assert all(torch.equal(start[name], after[0][name]) for name in start)


@pytest.mark.parametrize("layers", [None, -1], ids=["from_images", "from_cached_tokens"])
def test_prompts_start_from_tokens_of_training_images_once(recipe, tmp_path, monkeypatch, layers):
    recipe = dataclasses.replace(recipe, prompt_init="tokens", prompt_layers=layers)
    started, seen = [], []
    init, step = PromptedViT.init_prompts_from, loop.TrainStep.__call__

    def init_prompts_from(self, images, generator):
        init(self, images, generator)
        started.append((images, self.prompts.detach().clone()))

    def train_step(self, inputs, targets):
        seen.append(inputs)
        return step(self, inputs, targets)

    monkeypatch.setattr(PromptedViT, "init_prompts_from", init_prompts_from)
    said = io.StringIO()
    whole = train(recipe, tmp_path / "whole", console=Console(file=said))
    assert "Prompts start from tokens of 27 training images." in said.getvalue()
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "__call__", train_step)
        interrupt_at_step(patch, 5)  # the first step of the second epoch: the first has a rate of 0
        stopped = train(recipe, tmp_path / "parts")
    images, prompts = started[1]
    assert torch.equal(trained(stopped)["prompts"], prompts) and torch.equal(started[0][1], prompts)
    if layers is None:
        assert torch.equal(images.unique(dim=0), torch.cat(seen[:4]).unique(dim=0))  # all 27
    require_equal(whole, train(recipe, tmp_path / "parts"))
    assert len(started) == 2  # a run that goes on has its prompts


def test_training_set_that_is_smaller_than_the_batch_is_one_step_by_the_batch_s_rate(recipe, tmp_path):
    small = dataclasses.replace(recipe, batch_size=128, warmup_epochs=0, epochs=1)
    found = train(small, tmp_path / "run")
    one_step = dataclasses.replace(small, batch_size=27, base_lr=0.5 * 128 / 27)
    assert found.metrics[0]["lr"] == pytest.approx(0.5 * 128 / 256)
    require_equal(found, train(one_step, tmp_path / "other"))


@pytest.mark.parametrize(
    ("method", "precision"),
    [("vpt-deep", "fp32"), ("vpt-deep", "bf16"), ("linear", "fp32")],  # the last on cached features
)
def test_captured_steps_go_on_after_an_evaluation(recipe, tmp_path, monkeypatch, method, precision):
    prompts = {} if method == "vpt-deep" else dict(num_prompts=None, prompt_dropout=None)
    recipe = dataclasses.replace(
        recipe, method=method, precision=precision, batch_size=4, epochs=2, **prompts
    )
    eager = train(recipe, tmp_path / "eager")
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(loop, "captures_steps", lambda *_: True)
    captured = train(recipe, tmp_path / "captured")
    for ours, theirs in zip(captured.metrics, eager.metrics, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_going_on_after_ctrl_c_equals_an_uninterrupted_run(recipe, tmp_path, monkeypatch, optimizer):
    recipe = dataclasses.replace(recipe, optimizer=optimizer, base_lr=0.5 if optimizer == "sgd" else 0.05)
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 10)  # the second step of the third epoch
        stopped = train(recipe, tmp_path / "parts")
    assert len(stopped.metrics) == 2 and not stopped.is_finished
    parts = train(recipe, tmp_path / "parts")
    assert parts.new_epochs == 2
    require_equal(whole, parts)


def test_each_seed_epoch_and_process_has_draws_of_its_own(recipe, tmp_path, monkeypatch):
    draws = set()
    for numbers in ((42, 0, 0), (43, 0, 0), (42, 1, 0), (42, 0, 1)):
        loop.seed_epoch(*numbers)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4
    seeded = []
    monkeypatch.setattr(loop, "seed_epoch", lambda *numbers: seeded.append(numbers))
    train(dataclasses.replace(recipe, epochs=2, seed=7), tmp_path / "run")
    assert seeded == [(7, 0, 0), (7, 1, 0)]


def test_sigterm_stops_as_ctrl_c_does(recipe, tmp_path, monkeypatch):
    interrupt_at_step(monkeypatch, 6, signal.SIGTERM)
    assert len(train(recipe, tmp_path / "run").metrics) == 1


def test_single_process_stops_after_the_step_in_which_it_is_told_to(recipe, tmp_path, monkeypatch):
    steps, original = [], loop.TrainStep.__call__

    def train_step(*arguments):
        steps.append(1)
        stop.set()
        return original(*arguments)

    stop = threading.Event()
    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    train(recipe, tmp_path / "run", stop=stop)
    assert len(steps) == 1


def test_second_ctrl_c_interrupts_at_once(recipe, tmp_path, monkeypatch):
    def train_step(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")


def test_signal_handlers_are_put_back(recipe, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(dataclasses.replace(recipe, epochs=1, warmup_epochs=0), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("left", ['{"epoch": 2}\n', '{"epoch": 2, "lr'], ids=["a line", "half a line"])
def test_metrics_of_an_epoch_with_no_checkpoint_are_dropped(recipe, tmp_path, monkeypatch, left):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 10)
        train(recipe, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + left)  # killed before the checkpoint was written
    result = train(recipe, tmp_path / "run")
    assert [row["epoch"] for row in result.metrics] == [0, 1, 2, 3]
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == result.metrics


def test_tensorboard_shows_an_epoch_once_that_is_trained_again(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, kept = RunFolder(tmp_path / "run"), tmp_path / "kept.safetensors"
    stop = threading.Event()

    def on_epoch(row):
        shutil.copy(folder.checkpoint, kept) if row["epoch"] == 0 else stop.set()

    train(recipe, folder.path, on_epoch=on_epoch, stop=stop)
    shutil.copy(kept, folder.checkpoint)  # of the second epoch, all but its events is gone
    train(recipe, folder.path)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("val_loss")] == [0, 1, 2, 3]


def test_epoch_adds_its_line_to_the_metrics_and_does_not_write_the_others_again(recipe, tmp_path):
    files = []
    train(
        dataclasses.replace(recipe, epochs=3),
        tmp_path / "run",
        on_epoch=lambda row: files.append((tmp_path / "run" / "metrics.jsonl").stat()),
    )
    assert len({file.st_ino for file in files}) == 1  # else each epoch had replaced it
    assert files[0].st_size < files[1].st_size < files[2].st_size


def test_line_of_an_epoch_is_on_the_disk_before_its_checkpoint(recipe, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    train(dataclasses.replace(recipe, epochs=2), tmp_path / "run")
    behind = synced[synced.index("metrics.jsonl") :]  # in the second epoch, which adds its line
    assert [".checkpoint.safetensors." in name for name in behind[:2]] == [False, True]


def test_metrics_that_were_removed_under_a_run_are_written_again(recipe, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    train(recipe, path.parent, on_epoch=lambda row: path.unlink() if row["epoch"] == 1 else None)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_run_killed_behind_its_last_checkpoint_has_the_prompts_of_that_epoch(recipe, tmp_path, monkeypatch):
    save_epoch = RunFolder.save_epoch

    def killed_behind_it(self, rows, checkpoint):
        save_epoch(self, rows, checkpoint)
        if len(rows) == recipe.epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_epoch", killed_behind_it)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    result = train(recipe, tmp_path / "run")
    assert result.is_finished and result.new_epochs == 0
    saved = load_pretrained(tmp_path / "run" / "prompts").trainable_state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained(result).items())


def test_facts_of_a_run_that_went_on_are_those_in_its_folder(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5)
        train(recipe, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    facts = json.loads(folder.facts.read_text())
    facts["versions"]["torch"] = "of the start"
    folder.facts.write_text(json.dumps(facts))
    assert train(recipe, folder.path).facts == facts


def test_finished_run_without_its_checkpoint_is_finished(recipe, first, tmp_path):
    RunFolder(tmp_path / "run").checkpoint.unlink()
    result = train(recipe, tmp_path / "run")
    assert result.is_finished and result.metrics == first.metrics


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("run.json", None, "No such file"),
        ("run.json", '{"backbone": {"na', "Unterminated string"),
        ("run.json", "[" * 100_000, "lie within each other"),
        ("run.json", "{}", "lacks backbone, data, processes"),
        ("metrics.jsonl", None, "No such file"),
        ("metrics.jsonl", '{"epoch": 0', "cannot be read"),
        ("metrics.jsonl", "", "has 0 of 2 epochs"),
        ("results.json", "null", "holds no mapping"),
        ("checkpoint.safetensors", "{", "cannot be read"),
        ("config.yaml", "data: x\nbackbone: y\nepochs:\n", "epochs is None"),
    ],
)
def test_a_file_of_a_run_that_was_changed_is_named(recipe, tmp_path, name, text, message):
    recipe = dataclasses.replace(recipe, epochs=2, warmup_epochs=0)
    path = tmp_path / "run" / name
    train(recipe, path.parent)
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        train(recipe, path.parent)
    assert str(path) in str(raised.value)


def test_fresh_removes_what_is_left_of_a_run_without_its_facts(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.touch()
    folder.metrics.touch()
    folder.require_clearable()
    folder.clear()
    assert not list(tmp_path.iterdir())


def test_checkpoint_in_another_format_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    save_file({}, folder.checkpoint, {"format": "0"})
    with pytest.raises(RunError, match=f"{folder.checkpoint} has format 0, not 1"):
        folder.read_checkpoint()


def test_interrupted_run_does_not_go_on_in_another_number_of_processes(recipe, tmp_path, monkeypatch):
    interrupt_at_step(monkeypatch, 5)
    train(recipe, tmp_path / "run")
    facts = RunFolder(tmp_path / "run").facts
    facts.write_text(facts.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(RunError, match="cannot go on: the number of processes changed"):
        train(recipe, tmp_path / "run")


def test_finished_run_is_not_trained_again(recipe, first, tmp_path, monkeypatch):
    monkeypatch.setattr("vpt_fast.training.methods.build_model", None)
    again = train(recipe, tmp_path / "run")
    assert again.is_finished and again.new_epochs == 0 and again.metrics == first.metrics


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def removed(prompts):
    shutil.rmtree(prompts)


def one_file_gone(prompts):
    (prompts / "labels.json").unlink()


def cut_short(prompts):
    weights = prompts / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def one_tensor_gone(prompts):
    weights = prompts / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name != "prompts"}, weights)


def one_tensor_of_another_epoch(prompts):
    weights = prompts / "model.safetensors"
    save_file({name: tensor + (name == "prompts") for name, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("with_results", [True, False], ids=["results", "no results"])
@pytest.mark.parametrize(
    "damage", [removed, one_file_gone, cut_short, one_tensor_gone, one_tensor_of_another_epoch]
)
def test_damaged_prompts_of_a_trained_run_are_written_again_from_its_checkpoint(
    recipe, first, tmp_path, monkeypatch, damage, with_results
):
    folder = RunFolder(tmp_path / "run")
    saved = files_of(folder.prompts)
    damage(folder.prompts)
    if not with_results:  # killed before they were written
        folder.results.unlink()
    monkeypatch.setattr(loop.TrainStep, "__call__", None)
    again = train(recipe, tmp_path / "run")
    assert again.new_epochs == 0 and again.results == first.results
    assert files_of(folder.prompts) == saved


def test_damaged_prompts_on_a_backbone_that_changed_are_refused(recipe, first, tmp_path):
    folder = RunFolder(tmp_path / "run")
    removed(folder.prompts)
    values = json.loads(folder.facts.read_text())
    values["backbone"]["fingerprint"] = "0" * 64
    folder.facts.write_text(json.dumps(values))
    with pytest.raises(
        RunError, match=r"prompts is damaged.* the backbone's weights changed since the run began"
    ):
        train(recipe, tmp_path / "run")


def test_fresh_trains_again_from_the_start(recipe, first, tmp_path):
    again = train(dataclasses.replace(recipe, workers=0), tmp_path / "run", fresh=True)
    assert again.new_epochs == 4
    require_equal(first, again)


def test_fresh_run_that_cannot_begin_leaves_the_old_one(recipe, first, tmp_path):
    with pytest.raises(ValueError, match="img_size"):
        train(dataclasses.replace(recipe, backbone_arg={"img_size": 18}), tmp_path / "run", fresh=True)
    assert train(recipe, tmp_path / "run").metrics == first.metrics


@pytest.fixture(scope="module")
def short_runs(recipe, tmp_path_factory):
    """Two of one epoch, with other settings."""
    folder = tmp_path_factory.mktemp("short")
    recipe = dataclasses.replace(recipe, epochs=1, warmup_epochs=0, tensorboard=False)
    other = dataclasses.replace(recipe, base_lr=0.25)
    return train(recipe, folder / "run"), other, train(other, folder / "other")


@pytest.mark.parametrize("removals", range(7))
def test_run_whose_removal_was_stopped_leaves_nothing_for_another_to_go_on_from(
    short_runs, tmp_path, monkeypatch, removals
):
    one, other, alone = short_runs
    shutil.copytree(one.path, tmp_path / "run")
    unlink, rmtree, done = Path.unlink, shutil.rmtree, []

    def until_stopped(remove):
        def call(path, **arguments):
            if len(done) == removals:
                raise KeyboardInterrupt
            done.append(path)
            remove(path, **arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", until_stopped(unlink))
        patch.setattr(shutil, "rmtree", until_stopped(rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            RunFolder(tmp_path / "run").clear()
    assert len(done) == removals
    fresh = (tmp_path / "run" / "config.yaml").exists()  # else there is no run to be seen
    interrupt_at_step(monkeypatch, 1)
    train(other, tmp_path / "run", fresh=fresh)
    require_equal(train(other, tmp_path / "run"), alone)


def test_fresh_removes_nothing_that_is_not_of_a_run(recipe, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "config.yaml").write_text("mine: yes\n")
    with pytest.raises(RunError, match=r"config\.yaml is not of a run"):
        train(recipe, tmp_path, fresh=True)
    assert (tmp_path / "prompts").is_dir() and (tmp_path / "config.yaml").read_text() == "mine: yes\n"


def test_other_settings_in_the_same_folder_are_refused_by_name(recipe, first, tmp_path):
    with pytest.raises(RunError, match=r"base_lr \(0.5 there, 1.0 now\), epochs|epochs .*base_lr"):
        train(dataclasses.replace(recipe, base_lr=1.0, epochs=5), tmp_path / "run")


def other_name(images):
    os.rename(images / "train" / "red" / "0.png", images / "train" / "red" / "new.png")


def other_size(images):
    (images / "val" / "red" / "0.png").write_bytes((images / "val" / "red" / "0.png").read_bytes() + b" ")


@pytest.mark.parametrize("change", [other_name, other_size])
def test_going_on_with_other_images_is_refused(recipe, images, tmp_path, monkeypatch, change):
    recipe = dataclasses.replace(recipe, data=str(images))
    interrupt_at_step(monkeypatch, 6)
    train(recipe, tmp_path / "run")
    change(images)
    with pytest.raises(RunError, match="the images changed since it began"):
        train(recipe, tmp_path / "run")


def test_step_and_images_of_training_are_gone_before_the_test_images_come(
    recipe, images, tmp_path, monkeypatch
):
    made, alive = [], []

    def recording(original):
        def make(*arguments, **options):
            made.append(weakref.ref(result := original(*arguments, **options)))
            return result

        return make

    def evaluate_test(*arguments):
        alive.extend(ref() for ref in made)

    for name in ("TrainStep", "build_optimizer"):
        monkeypatch.setattr(loop, name, recording(getattr(loop, name)))
    monkeypatch.setattr(classification, "Batches", recording(classification.Batches))
    monkeypatch.setattr(loop, "evaluate_test", evaluate_test)
    gc.disable()  # which would free, some time, what a cycle holds
    try:
        train(dataclasses.replace(recipe, data=str(images), epochs=2, test=True), tmp_path / "run")
    finally:
        gc.enable()
    assert alive == [None] * 4


def test_run_that_lacks_only_its_test_results_keeps_no_pixels_for_epochs(
    recipe, images, tmp_path, monkeypatch
):
    def evaluate_test(*arguments):
        raise KeyboardInterrupt

    recipe = dataclasses.replace(recipe, data=str(images), epochs=2, test=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_test", evaluate_test)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    are_kept, make = [], classification.Batches

    def batches(*arguments, **options):
        made = make(*arguments, **options)
        are_kept.append(made.is_resident)
        return made

    monkeypatch.setattr(classification, "Batches", batches)
    assert train(recipe, tmp_path / "run").results["test_images"]
    assert are_kept == [False, False, True]  # train, val, test


@pytest.fixture
def finished(recipe, images, tmp_path):
    """The recipe of a finished run in tmp_path / "run", on images that may be changed."""
    recipe = dataclasses.replace(recipe, data=str(images), epochs=2, test=True, tensorboard=False)
    train(recipe, tmp_path / "run")
    return recipe


def other_class(images):
    for split in ("train", "val", "test"):
        os.rename(images / split / "red", images / split / "pink")


def other_test_image(images):
    (images / "test" / "red" / "0.png").unlink()


@pytest.mark.parametrize(
    "change, named",
    [(other_class, "classes"), (other_name, "images"), (other_size, "images"), (other_test_image, "test im")],
)
def test_finished_run_answers_for_its_own_images_alone(finished, images, tmp_path, change, named):
    others = Path(shutil.copytree(images, tmp_path / "other" / "colors"))
    change(others)
    with pytest.raises(RunError, match=f"on other {named}.*: data was {images} and is {others} now; .*--out"):
        train(dataclasses.replace(finished, data=str(others)), tmp_path / "run")


def test_finished_run_answers_for_images_that_were_moved(finished, images, tmp_path):
    os.rename(images, tmp_path / "moved")
    again = train(dataclasses.replace(finished, data=str(tmp_path / "moved")), tmp_path / "run")
    assert again.new_epochs == 0


def test_val_image_that_is_broken_is_no_part_of_the_run(recipe, images, tmp_path):
    (images / "val" / "red" / "0.png").write_bytes(b"no image")
    console = Console(file=io.StringIO(), width=500)
    recipe = dataclasses.replace(recipe, data=str(images), epochs=1, warmup_epochs=0)
    found = train(recipe, tmp_path / "run", console=console)
    data = found.facts["data"]
    assert data["val"]["per_class"] == [3, 3, 2] and found.results["val_images"] == 8
    assert data["used"]["train"] == data["listed"]["train"] and data["used"]["val"] != data["listed"]["val"]
    assert Labels.read(tmp_path / "run" / "prompts").val_listed == data["listed"]["val"]
    assert str(Path("val") / "red" / "0.png") in console.file.getvalue()


def test_processes_compare_what_they_list_and_what_they_can_read(recipe, images, tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        (images / split / "red" / "0.png").write_bytes(b"no image")
    compared, console = [], Console(file=io.StringIO(), width=500)
    monkeypatch.setattr(
        loop,
        "require_same_lists",
        lambda _, splits, world: compared.append(tuple(map(len, (splits.train, splits.val, splits.test)))),
    )
    recipe = dataclasses.replace(recipe, data=str(images), epochs=1, warmup_epochs=0, test=True)
    found = train(recipe, tmp_path / "run", console=console)
    assert compared == [(27, 9, 6), (26, 8, 6), (26, 8, 5)] and found.results["test_images"] == 5
    assert str(Path("test") / "red" / "0.png") in console.file.getvalue()


def test_val_and_test_are_kept_in_memory_as_they_are_evaluated(recipe, tmp_path, monkeypatch):
    kept, check = [], classification.check_images

    def check_images(images, *, preprocessing, **options):
        kept.append(preprocessing.augment)
        return check(images, preprocessing=preprocessing, **options)

    monkeypatch.setattr(classification, "check_images", check_images)
    recipe = dataclasses.replace(recipe, augment="crop_flip", epochs=1, warmup_epochs=0, test=True)
    train(recipe, tmp_path / "run")
    assert kept == ["crop_flip", "none", "none"]  # random crops need more pixels


def test_finished_run_answers_where_broken_images_are_and_where_they_were_removed(recipe, images, tmp_path):
    broken = images / "train" / "red" / "0.png"
    broken.write_bytes(b"no image")
    recipe = dataclasses.replace(recipe, data=str(images))
    train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run").new_epochs == 0
    broken.unlink()
    assert train(recipe, tmp_path / "run").new_epochs == 0


@pytest.fixture
def weights(recipe, tmp_path):
    """A function that writes a file of weights."""

    def write(name, shift):
        state = timm.create_model(recipe.backbone).state_dict()
        torch.save({"model": {key: tensor + shift for key, tensor in state.items()}}, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_finished_run_answers_for_its_own_weights_alone(recipe, weights, tmp_path):
    one, other, same = weights("one.pth", 0.1), weights("other.pth", 0.2), weights("same.pth", 0.1)
    train(dataclasses.replace(recipe, checkpoint=one), tmp_path / "run")
    with pytest.raises(RunError, match=f"checkpoint was {one} and is {other} now; .*--fresh"):
        train(dataclasses.replace(recipe, checkpoint=other), tmp_path / "run")
    assert train(dataclasses.replace(recipe, checkpoint=same), tmp_path / "run").new_epochs == 0


def test_finished_run_does_not_answer_for_weights_in_the_place_of_its_own(recipe, weights, tmp_path):
    recipe = dataclasses.replace(recipe, checkpoint=weights("one.pth", 0.1))
    train(recipe, tmp_path / "run")
    os.utime(tmp_path / "run" / "run.json", (0, 0))
    weights("one.pth", 0.2)
    with pytest.raises(RunError, match="on other weights"):
        train(recipe, tmp_path / "run")


def test_finished_run_answers_where_its_own_weights_are_gone(recipe, weights, tmp_path):
    recipe = dataclasses.replace(recipe, checkpoint=weights("one.pth", 0.1))
    train(recipe, tmp_path / "run")
    Path(recipe.checkpoint).unlink()
    assert train(recipe, tmp_path / "run").new_epochs == 0


def test_finished_run_does_not_answer_for_weights_that_do_not_exist(recipe, tmp_path):
    train(dataclasses.replace(recipe, pretrained=False), tmp_path / "run")
    with pytest.raises(ValueError, match=r"checkpoint is no\.pth, which is no file"):
        train(dataclasses.replace(recipe, checkpoint="no.pth"), tmp_path / "run")


def test_going_on_with_other_backbone_weights_is_refused(recipe, tmp_path, monkeypatch):
    interrupt_at_step(monkeypatch, 6)
    train(recipe, tmp_path / "run")
    facts = tmp_path / "run" / "run.json"
    values = json.loads(facts.read_text())
    values["backbone"]["fingerprint"] = "0" * 64
    facts.write_text(json.dumps(values))
    with pytest.raises(RunError, match="the backbone's weights changed since it began"):
        train(recipe, tmp_path / "run")


def test_going_on_with_other_weights_in_the_checkpoints_place_is_refused(recipe, tmp_path, monkeypatch):
    path, weights = tmp_path / "backbone.pth", timm.create_model(recipe.backbone).state_dict()
    torch.save({"model": {name: tensor + 0.1 for name, tensor in weights.items()}}, path)
    recipe = dataclasses.replace(recipe, checkpoint=str(path))
    interrupt_at_step(monkeypatch, 6)
    train(recipe, tmp_path / "run")
    torch.save({"model": weights}, path)
    with pytest.raises(RunError, match="the backbone's weights changed since it began"):
        train(recipe, tmp_path / "run")


def test_two_processes_in_one_folder_are_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training in .*run"):
            train(recipe, tmp_path / "run")


def test_folder_that_cannot_be_locked_is_trained_in_after_a_note(recipe, tmp_path, without_locks):
    console = Console(file=io.StringIO(), width=500)
    assert train(recipe, tmp_path / "run", console=console).results
    assert console.file.getvalue().startswith(f"No file in {tmp_path / 'run'} can be locked: nothing keeps a")


@pytest.mark.parametrize(("free", "is_short"), [(1000, True), (10**12, False), (None, False)], ids=str)
def test_memory_that_may_not_suffice_is_said_before_training(recipe, tmp_path, monkeypatch, free, is_short):
    monkeypatch.setattr(report, "free_bytes", lambda device: free)
    console = Console(file=io.StringIO(), width=500)
    train(dataclasses.replace(recipe, epochs=1, warmup_epochs=0), tmp_path / "run", console=console)
    assert ("More memory is expected than is free" in console.file.getvalue()) is is_short


def test_folder_in_which_another_process_begins_while_it_is_removed_stays(tmp_path, monkeypatch):
    path, unlink = tmp_path / "run", Path.unlink

    def begun_behind_it(self):
        unlink(self)
        (path / "config.yaml").touch()

    with RunFolder.locked(path):
        monkeypatch.setattr(Path, "unlink", begun_behind_it)
    assert [file.name for file in path.iterdir()] == ["config.yaml"]


def test_folder_that_another_process_removes_while_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / "run", fcntl.flock

    def removed_first(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        (path / ".lock").unlink()
        path.rmdir()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with RunFolder.locked(path):
        with pytest.raises(RunError, match="another process is training in .*run"), RunFolder.locked(path):
            pass


def test_run_removes_temporary_files_of_a_process_that_was_killed_as_it_began(recipe, tmp_path):
    left = tmp_path / ".config.yaml.abcd_123.yaml"
    left.touch()
    RunFolder(tmp_path).begin(recipe, {})
    assert not left.exists()


RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "results.json",
    "curves.png",
    "checkpoint.safetensors",
    "prompts/labels.json",
    "prompts/config.json",
    "prompts/model.safetensors",
)


@pytest.mark.parametrize("is_run", [True, False], ids=["a run's", "another's"])
def test_temporary_files_of_a_killed_process_are_removed_from_a_run_s_folder_alone(tmp_path, is_run):
    (tmp_path / "prompts").mkdir()
    paths = [tmp_path / name for name in RUN_FILES]
    left = [path.with_name(f".{path.name}.abcd_123{path.suffix}") for path in paths]
    for path in left:
        path.touch()
    if is_run:
        (tmp_path / "config.yaml").touch()
    with RunFolder.locked(tmp_path):
        assert [path.exists() for path in left] == [not is_run] * len(left)


def test_worker_that_outlives_a_killed_run_does_not_keep_its_folder(tmp_path):
    processes = multiprocessing.get_context("fork")
    is_forked = processes.Event()
    worker = processes.Process(target=lambda: is_forked.set() or time.sleep(60))
    with RunFolder.locked(tmp_path / "run") as folder:
        write(folder.metrics, b"")  # without any file, folder and lock would be removed
        worker.start()
        assert is_forked.wait(60)
    try:
        with RunFolder.locked(tmp_path / "run"):
            pass
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize(
    ("changes", "size", "captured", "note"),
    [
        ({"method": "full"}, 1, True, ""),
        ({"method": "full"}, 2, False, "without one, processes exchange the backbone's gradients"),
        ({"method": "full", "cuda_graph": True}, 2, True, ""),
        ({"method": "linear"}, 2, True, ""),
        ({"method": "linear", "cuda_graph": False}, 1, False, ""),
        ({"method": "linear", "accumulate": 2}, 1, False, "accumulate is 2"),
        ({"method": "linear", "accumulate": 2, "cuda_graph": False}, 1, False, ""),
        ({"method": "linear", "precision": "fp16"}, 1, False, "precision is fp16"),
    ],
)
def test_steps_on_a_gpu_are_captured_unless_they_cannot_be_or_should_not_and_this_is_said(
    recipe, changes, size, captured, note
):
    recipe = dataclasses.replace(recipe, num_prompts=None, prompt_dropout=None, **changes)
    console = Console(file=io.StringIO(), width=500)
    assert captures_steps(recipe, World(0, size, torch.device("cuda")), console, None) == captured
    printed = console.file.getvalue()
    assert note in printed and bool(printed) == bool(note)


def test_backbone_that_there_is_not_is_refused_before_the_images_are_listed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "open_splits", None)
    recipe = dataclasses.replace(recipe, backbone="vit_tiny_patch16_225")
    with pytest.raises(ValueError, match="backbone: got 'vit_tiny_patch16_225', want .*vit_tiny_patch16_224"):
        train(recipe, tmp_path / "run")


def test_graph_that_cannot_be_captured_is_refused_before_the_model_is_built(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("vpt_fast.training.methods.build_model", None)
    with pytest.raises(ValueError, match="a step cannot be captured: the device is cpu"):
        train(dataclasses.replace(recipe, cuda_graph=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("attention", "precision", "message"),
    [
        ("sdpa_cudnn", "fp32", "got dtype float32, want float16 or bfloat16 .precision fp32 on cpu"),
        ("sdpa_flash", "bf16", "got a tensor on cpu, want one on cuda .precision bf16 on cpu"),
    ],
    ids=["dtype", "device"],
)
@pytest.mark.parametrize("method", ["vpt-deep", "linear"])
def test_attention_that_cannot_be_had_is_refused_before_an_image_is_read(
    recipe, tmp_path, monkeypatch, method, attention, precision, message
):
    monkeypatch.setattr(loop, "read_images", None)
    prompts = {} if method == "vpt-deep" else dict(num_prompts=None, prompt_dropout=None)
    recipe = dataclasses.replace(recipe, method=method, attention=attention, precision=precision, **prompts)
    with pytest.raises(ValueError, match=f"attention='{attention}': {message}"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attention_by_name_that_can_be_had_trains(recipe, tmp_path):
    assert train(dataclasses.replace(recipe, attention="sdpa_cpu"), tmp_path / "run").is_finished


@pytest.mark.parametrize("step", [3, 4])  # of the third epoch's four
def test_nan_loss_stops_and_keeps_the_last_good_state(recipe, tmp_path, monkeypatch, step):
    original, steps = loop.TrainStep.__call__, []

    def train_step(*arguments):
        steps.append(1)
        loss, hits = original(*arguments)
        return (loss * float("nan") if len(steps) == 8 + step else loss), hits

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    with pytest.raises(
        TrainingDiverged, match=rf"loss is nan in epoch 3 of 4, step {step} of 4, at a learning rate of 0\.0"
    ):
        train(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read().checkpoint.epochs_done == 2


def test_loss_that_is_not_finite_is_found_in_the_midst_of_an_epoch(recipe, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        loop.TrainStep, "__call__", lambda *_: steps.append(1) or (torch.tensor(float("nan")), 0)
    )
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    with pytest.raises(TrainingDiverged, match="step 1 of 4"):
        train(recipe, tmp_path / "run")
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to.\nSee also"), "CUDA out of memory. Tried to."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPU.*: can't allocate memory"),
        (MemoryError(), "no more can be allocated"),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_step_that_lacks_memory_says_what_needs_less_and_keeps_the_last_good_state(
    recipe, tmp_path, monkeypatch, error, said
):
    original, steps = loop.TrainStep.__call__, []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise error
        return original(*arguments)

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    with pytest.raises(
        OutOfMemory,
        match=rf"cpu .* too little memory for a step of 8 images: {said} "
        r"\(what epoch 1 ended with is kept\); --accumulate splits a batch, --memory recompute keeps less",
    ):
        train(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read().checkpoint.epochs_done == 1


def test_step_that_lacks_memory_is_not_told_of_a_setting_that_its_method_does_not_have(
    recipe, tmp_path, monkeypatch
):
    def train_step(*_):
        raise MemoryError

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    recipe = dataclasses.replace(recipe, method="linear", num_prompts=None, prompt_dropout=None)
    with pytest.raises(OutOfMemory, match="; --accumulate splits a batch$"):
        train(recipe, tmp_path / "run")


def test_step_that_fails_for_another_reason_is_not_said_to_lack_memory(recipe, tmp_path, monkeypatch):
    def train_step(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    with pytest.raises(RuntimeError, match="^a kernel failed$"):
        train(recipe, tmp_path / "run")


def test_run_where_tensorboard_is_not_installed_has_no_logs_and_may_ask_for_none(
    recipe, tmp_path, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    recipe = dataclasses.replace(recipe, epochs=1, warmup_epochs=0)
    with pytest.raises(ValueError, match="tensorboard is on, but not installed; pip install tensorboard"):
        train(dataclasses.replace(recipe, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = train(recipe, tmp_path / "run")
    assert result.is_finished and not RunFolder(result.path).tensorboard.exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_ends_the_tensorboard_log_by_name_and_training_goes_on_from_it(
    recipe, tmp_path, monkeypatch
):
    from vpt_fast.training.events import RecordWriter

    recipe = dataclasses.replace(recipe, tensorboard=True)
    whole = train(recipe, tmp_path / "whole")
    write = RecordWriter.write

    def write_two_epochs(self, data):
        if b"val_loss" in data and len(RunFolder(tmp_path / "parts").read().metrics) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write_two_epochs)
        with pytest.raises(
            SavingFailed, match="TensorBoard log of epoch 3 could not be saved .*: No space left on device"
        ):
            train(recipe, tmp_path / "parts")
    require_equal(whole, train(recipe, tmp_path / "parts"))


def test_run_that_fails_leaves_no_thread_of_tensorboards(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.TrainStep, "__call__", lambda *_: (torch.tensor(float("nan")), torch.tensor(0)))
    before = set(threading.enumerate())
    with pytest.raises(TrainingDiverged):
        train(dataclasses.replace(recipe, tensorboard=True), tmp_path / "run")
    assert set(threading.enumerate()) == before


def test_infinite_weight_after_the_last_step_is_not_saved(recipe, tmp_path, monkeypatch):
    original, steps = loop.TrainStep.__call__, []

    def train_step(step, *arguments):
        steps.append(1)
        answer = original(step, *arguments)
        if len(steps) == 8:
            step.network.head.bias.data[0] = float("inf")
        return answer

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    with pytest.raises(TrainingDiverged, match="head.bias not finite after the last step of epoch 2"):
        train(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read().checkpoint.epochs_done == 1


@pytest.mark.parametrize(("every", "epochs"), [(0, [3]), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2, 3])])
def test_val_images_are_evaluated_as_often_as_asked_and_after_the_last_epoch(recipe, tmp_path, every, epochs):
    result = train(dataclasses.replace(recipe, eval_every=every), tmp_path / "run")
    for name in ("val_loss", "val_accuracy"):
        assert [row["epoch"] for row in result.metrics if row[name] is not None] == epochs


def test_training_is_the_same_however_often_the_val_images_are_evaluated(recipe, tmp_path):
    often = train(recipe, tmp_path / "often")
    once = train(dataclasses.replace(recipe, eval_every=0), tmp_path / "once")
    assert all(torch.equal(tensor, trained(once)[name]) for name, tensor in trained(often).items())
    assert untimed(once.metrics[-1:]) == untimed(often.metrics[-1:]) and once.results == often.results


def test_validation_loss_that_is_not_finite_is_not_saved(recipe, tmp_path, monkeypatch):
    original, losses = Classification.evaluate, [0.5, float("inf")]
    monkeypatch.setattr(
        Classification,
        "evaluate",
        staticmethod(lambda *arguments: dataclasses.replace(original(*arguments), loss=losses.pop(0))),
    )
    with pytest.raises(TrainingDiverged, match="the validation loss is inf after the last step of epoch 2"):
        train(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read().checkpoint.epochs_done == 1


def test_full_disk_keeps_the_last_good_state_and_training_goes_on_from_it(recipe, tmp_path, monkeypatch):
    whole = train(recipe, tmp_path / "whole")
    original = RunFolder.save_epoch

    def save_epoch(self, rows, checkpoint):
        with pytest.MonkeyPatch.context() as patch:
            if checkpoint.epochs_done == 3:
                patch.setattr("vpt_fast.files.os.fsync", no_space)
            original(self, rows, checkpoint)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", save_epoch)
        with pytest.raises(
            SavingFailed, match="epoch 3 could not be saved in .*parts: No space left on device"
        ):
            train(recipe, tmp_path / "parts")
    begun = RunFolder(tmp_path / "parts").read()
    assert len(begun.metrics) == begun.checkpoint.epochs_done == 2
    assert not [path for path in (tmp_path / "parts").rglob("*") if "tmp" in path.name]
    require_equal(whole, train(recipe, tmp_path / "parts"))


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ((RunFolder, "begin"), "the start of the run"),
        ((plots, "plot_curves"), "the curves"),
        ((RunFolder, "save_results"), "the results"),
    ],
    ids=["start", "curves", "results"],
)
def test_what_a_full_disk_has_no_room_for_is_named(recipe, tmp_path, monkeypatch, where, what):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*where, no_space)
    recipe = dataclasses.replace(recipe, epochs=1, warmup_epochs=0)
    with pytest.raises(SavingFailed, match=f"^{what} could not be saved in .*run: No space left on device"):
        train(recipe, tmp_path / "run")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("gone", "what"),
    [("run", "epoch 2"), ("run/tensorboard", "the TensorBoard log of epoch 2")],
    ids=["run", "tensorboard"],
)
def test_folder_that_is_removed_while_training_runs_is_named_and_not_made_anew(
    recipe, tmp_path, monkeypatch, gone, what
):
    def seed_epoch(seed, epoch, rank):
        if epoch == 1:
            shutil.rmtree(tmp_path / gone)

    monkeypatch.setattr(loop, "seed_epoch", seed_epoch)
    with pytest.raises(
        SavingFailed, match=f"^{what} could not be saved: the folder {tmp_path / gone} is gone$"
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / gone).exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_heads_bias_alone_has_no_weight_decay(recipe, optimizer):
    recipe = dataclasses.replace(recipe, optimizer=optimizer, prompt_project=4)
    model = build_model(recipe.resolved(num_train_images=27, device_type="cpu"), 3)
    groups = build_optimizer(recipe, model, capturable=False).param_groups
    assert {name: group["weight_decay"] for group in groups for name in group["param_names"]} == {
        "prompts": 1e-4,
        "prompt_projection.weight": 1e-4,
        "prompt_projection.bias": 1e-4,
        "head.weight": 1e-4,
        "head.bias": 0.0,
    }


def test_momentum_is_the_recipe_s(recipe):
    recipe = dataclasses.replace(recipe, momentum=0.5)
    model = build_model(recipe.resolved(num_train_images=27, device_type="cpu"), 3)
    groups = build_optimizer(recipe, model, capturable=False).param_groups
    assert [group["momentum"] for group in groups] == [0.5, 0.5]


def test_accumulation_gives_the_gradients_of_the_whole_batch(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, prompt_dropout=0.0)
    whole = trained(train(recipe, tmp_path / "whole"))
    parts = trained(train(dataclasses.replace(recipe, accumulate=3), tmp_path / "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_linear_probe_on_features_computed_once_equals_training_through_the_model(
    recipe, tmp_path, monkeypatch
):
    recipe = dataclasses.replace(recipe, method="linear", num_prompts=None, prompt_dropout=None)
    once = train(recipe, tmp_path / "once")
    monkeypatch.setattr(loop, "caches_features", lambda *arguments: False)
    through = train(recipe, tmp_path / "through")
    for name, tensor in trained(through).items():
        torch.testing.assert_close(trained(once)[name], tensor, rtol=1e-4, atol=1e-5)
    assert once.metrics[-1]["val_accuracy"] == through.metrics[-1]["val_accuracy"]


def test_time_of_frozen_features_counts_in_the_first_epoch_alone(recipe, tmp_path, monkeypatch):
    compute = loop.feature_batches
    monkeypatch.setattr(loop, "feature_batches", lambda *arguments: (*compute(*arguments)[:2], 1e9))
    recipe = dataclasses.replace(recipe, method="linear", num_prompts=None, prompt_dropout=None)
    rows = train(recipe, tmp_path / "run").metrics
    assert [row["seconds"] >= 1e9 for row in rows] == [True, False, False, False]


def test_linear_probe_with_augmentation_goes_through_the_model(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "feature_batches", None)
    recipe = dataclasses.replace(
        recipe, method="linear", num_prompts=None, prompt_dropout=None, augment="flip"
    )
    assert train(recipe, tmp_path / "run").is_finished


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(recipe, tmp_path, precision):
    metrics = train(dataclasses.replace(recipe, precision=precision), tmp_path / "run").metrics
    assert metrics[-1]["train_loss"] < 0.7 * metrics[0]["train_loss"]


def test_scale_of_the_loss_in_fp16_goes_on_with_an_interrupted_run(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, precision="fp16", epochs=2)
    train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5)
        train(recipe, tmp_path / "parts")
    train(recipe, tmp_path / "parts")
    whole, parts = (RunFolder(tmp_path / name).read().checkpoint.scaler for name in ("whole", "parts"))
    # The scale is halved after a step with an infinite gradient, of which there are some in each epoch.
    assert parts == whole and 1 < whole["scale"] < 2**14


def test_a_residual_stream_in_bfloat16_trains_and_is_saved(recipe, tmp_path):
    settings = dict(precision="bf16", residual_dtype="bfloat16")
    metrics = train(dataclasses.replace(recipe, **settings), tmp_path / "run").metrics
    assert metrics[-1]["train_loss"] < 0.7 * metrics[0]["train_loss"]
    saved = load_pretrained(tmp_path / "run" / "prompts")
    assert saved.backbone.residual_dtype == torch.bfloat16


def test_frozen_weights_are_rounded_once_and_nothing_else_changes(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, precision="bf16", epochs=2)
    rounded = train(recipe, tmp_path / "rounded")
    calls = []
    monkeypatch.setattr(TunedClassifier, "hold_frozen_weights_in", lambda model, dtype: calls.append(dtype))
    require_equal(rounded, train(recipe, tmp_path / "cast in every step"))
    assert calls == [torch.bfloat16]


def test_clipping_bounds_the_gradient(recipe, tmp_path):
    # One step at learning rate 1 from rest moves the weights by the gradient.
    settings = dict(
        epochs=1, warmup_epochs=0, batch_size=27, base_lr=256 / 27, weight_decay=0.0, clip_grad_norm=1e-3
    )
    recipe = dataclasses.replace(recipe, **settings)
    torch.manual_seed(recipe.seed)
    start = build_model(recipe.resolved(num_train_images=27, device_type="cpu"), 3).trainable_state_dict()
    end = trained(train(recipe, tmp_path / "run"))
    moved = torch.cat([(end[name] - start[name]).flatten() for name in start]).norm().item()
    assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "vpt-shallow"},
        {"prompt_location": "add", "num_prompts": None},
        {"prompt_location": "pad", "num_prompts": 2, "prompt_dropout": 0.0, "method": "vpt-shallow"},
        {"prompt_location": "concat-channel", "prompt_dropout": 0.0, "method": "vpt-shallow"},
        {"prompt_layers": -1, "pool": "image", "prompt_dropout_per": "batch"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_prompt_settings_reach_the_saved_model(recipe, tmp_path, settings):
    recipe = dataclasses.replace(recipe, epochs=1, warmup_epochs=0, **settings)
    result = train(recipe, tmp_path / "run")
    saved = load_pretrained(tmp_path / "run" / "prompts").trainable_state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained(result).items())


def test_val_fraction_is_refused_where_the_data_have_a_val_split(recipe, tmp_path):
    with pytest.raises(ValueError, match="^val_fraction is 0.3, and .*colors has a val split of its own"):
        train(dataclasses.replace(recipe, val_fraction=0.3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
