"""Epochs that take less time than saving their state."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from runs import interrupt_at_step, require_equal, trained

from vpt_fast import load_pretrained
from vpt_fast.training import saving
from vpt_fast.training.loop import train
from vpt_fast.training.run import RunFolder
from vpt_fast.training.saving import EpochSaver


@pytest.fixture
def rarely(monkeypatch) -> list[int]:
    """Saves take so long that the first epoch and the last alone are saved: the epochs whose state was."""
    original, saved = RunFolder.save_epoch, []

    def save_epoch(self, rows, checkpoint):
        saved.append(checkpoint.epochs_done)
        original(self, rows, checkpoint)

    monkeypatch.setattr(RunFolder, "save_epoch", save_epoch)
    monkeypatch.setattr(saving, "SHARE", 1e-9)
    return saved


def test_first_and_last_epoch_are_saved_however_long_that_takes(recipe, tmp_path, rarely):
    train(recipe, tmp_path / "run")
    assert rarely == [1, 4]


@pytest.mark.parametrize(("epoch_takes", "saved"), [(19.0, [1, 3, 4]), (21.0, [1, 2, 3, 4])])
def test_saving_takes_its_share_of_the_time_at_most(
    recipe, tmp_path, monkeypatch, rarely, epoch_takes, saved
):
    now = 0.0
    original = RunFolder.save_epoch

    def save_epoch(self, rows, checkpoint):
        nonlocal now
        now += 1.0
        original(self, rows, checkpoint)

    def after_epoch(self, rows, *arguments, **options):
        nonlocal now
        now += epoch_takes
        end_epoch(self, rows, *arguments, **options)

    end_epoch = EpochSaver.end_epoch
    monkeypatch.setattr(EpochSaver, "end_epoch", after_epoch)
    monkeypatch.setattr(RunFolder, "save_epoch", save_epoch)
    monkeypatch.setattr(saving, "SHARE", 0.05)
    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: now))
    train(recipe, tmp_path / "run")
    assert rarely == saved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ctrl_c_saves_the_last_completed_epoch_and_the_run_goes_on_from_it(
    recipe, tmp_path, monkeypatch, rarely, optimizer
):
    recipe = dataclasses.replace(recipe, optimizer=optimizer, base_lr=0.5 if optimizer == "sgd" else 0.05)
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 14)  # the second step of the fourth epoch
        stopped = train(recipe, tmp_path / "parts")
    assert len(stopped.metrics) == 3 and rarely == [1, 4, 1, 3]
    saved = load_pretrained(tmp_path / "parts" / "prompts").trainable_state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained(stopped).items())
    parts = train(recipe, tmp_path / "parts")
    assert parts.new_epochs == 1
    require_equal(whole, parts)


@pytest.mark.parametrize(("save", "epoch"), [(1, 1), (2, 3)], ids=["of an epoch", "of the held state"])
def test_ctrl_c_while_a_state_is_saved_loses_no_epoch(recipe, tmp_path, monkeypatch, rarely, save, epoch):
    original, calls = RunFolder.save_epoch, []

    def save_epoch(self, rows, checkpoint):
        calls.append(checkpoint.epochs_done)
        if len(calls) == save:
            raise KeyboardInterrupt
        original(self, rows, checkpoint)

    monkeypatch.setattr(RunFolder, "save_epoch", save_epoch)
    interrupt_at_step(monkeypatch, 14)  # the second step of the fourth epoch
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    assert rarely[-1] == epoch
    saved = RunFolder(tmp_path / "run").read()
    assert len(saved.metrics) == saved.checkpoint.epochs_done == epoch
    assert RunFolder(tmp_path / "run").holds_prompts_of(saved.checkpoint)


def test_killed_run_goes_on_from_the_last_saved_epoch(recipe, tmp_path, monkeypatch, rarely):
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(EpochSaver, "close", lambda self: None)
        interrupt_at_step(patch, 14)
        train(recipe, tmp_path / "parts")
    parts = train(recipe, tmp_path / "parts")
    assert parts.new_epochs == 3
    require_equal(whole, parts)


def test_epoch_is_saved_if_what_is_called_after_it_raises(recipe, tmp_path, rarely):
    def on_epoch(row):
        if row["epoch"] == 2:
            raise LookupError

    with pytest.raises(LookupError):
        train(recipe, tmp_path / "run", on_epoch=on_epoch)
    assert rarely == [1, 3]


def test_metrics_of_an_epoch_whose_state_is_not_saved_are_written_at_once(recipe, tmp_path, rarely):
    seen = []
    path = tmp_path / "run" / "metrics.jsonl"
    train(recipe, path.parent, on_epoch=lambda row: seen.append(path.read_text().splitlines()))
    assert [len(lines) for lines in seen] == [1, 2, 3, 4]
    assert [json.loads(line)["epoch"] for line in seen[-1]] == [0, 1, 2, 3]
