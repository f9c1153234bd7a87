"""Trials: that nothing is trained twice or lost, by one process or several, and what is shown of them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import io
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
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from rich.console import Console

from vpt_fast.failures import SavingFailed, TrainingDiverged, find_cause
from vpt_fast.sweeps import sweep, trials
from vpt_fast.sweeps.settings import Sweep
from vpt_fast.sweeps.sweep import digest_inputs, run_sweep, trial_folder
from vpt_fast.training import loop
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.run import RunFolder


def studies(plan: Sweep, out: Path, storage: str | None = None) -> tuple[optuna.Study, optuna.Study]:
    return trials.open_studies(plan.study_name(digest_inputs(plan, TrainingCache())), out, storage)


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


@pytest.mark.filterwarnings("ignore:Heartbeat")
@pytest.mark.parametrize("shared_by", ["a storage", "a folder without locks"])
def test_trial_that_a_process_elsewhere_may_just_have_taken_is_left_to_it(
    settings, tmp_path, trained, monkeypatch, request, empty_study, shared_by
):
    storage = None
    if shared_by == "a storage":
        storage = f"sqlite:///{shutil.copy(empty_study, tmp_path)}"
    else:
        request.getfixturevalue("without_locks")
    plan = Sweep(settings, {}, seeds=(1,))
    (tmp_path / "sweep").mkdir()
    _, study = studies(plan, tmp_path / "sweep", storage)
    study.enqueue_trial({"seed": 1})
    taken, states = study.ask(), []  # its owner is recorded moments later

    def pause(seconds):
        states.append(study.trials[0].state.name)
        study.tell(taken, state=optuna.trial.TrialState.FAIL)

    monkeypatch.setattr(trials.time, "sleep", pause)
    assert run_sweep(plan, tmp_path / "sweep", storage=storage)["finished"]
    assert states == ["RUNNING"] and trained == ["seed-1"]


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_trial_that_two_processes_give_back_at_once_is_taken_again(settings, tmp_path, trained, monkeypatch):
    def is_alive(trial, **_):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # as the other process does
        return False

    plan = Sweep(settings, {}, seeds=(1,))
    _, study = studies(plan, tmp_path)
    study.enqueue_trial({"seed": 1})
    study.ask()
    monkeypatch.setattr(trials, "_is_alive", is_alive)
    assert run_sweep(plan, tmp_path)["finished"] and trained == ["seed-1"]


def test_process_of_which_only_the_exit_status_is_left_has_died():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not collected
    assert trials._process_start(process.pid) is None
    process.wait()


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


def test_results_are_written_while_no_other_process_can(settings, tmp_path, monkeypatch):
    write_json, refused = sweep.write_json, []

    def note(path, results):
        with open(tmp_path / ".lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(path)
        write_json(path, results)

    monkeypatch.setattr(sweep, "write_json", note)
    run_sweep(Sweep(settings, {}, seeds=(1,)), tmp_path)
    assert refused


def run_killed_behind(monkeypatch, name, plan, folder) -> None:
    """Runs the sweep to the end of the first call of `RunFolder`'s method of this name."""
    original = getattr(RunFolder, name)

    def call(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, name, call)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(plan, folder)


def test_pruner_sees_every_epoch_of_a_trial_that_went_on(settings, tmp_path, monkeypatch):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,), pruner="median")
    for name in ("save_epoch", "save_results"):
        run_killed_behind(monkeypatch, name, plan, tmp_path)
    assert run_sweep(plan, tmp_path)["finished"]
    study, _ = studies(plan, tmp_path)
    rows = RunFolder(trial_folder(tmp_path, {"base_lr": 0.5})).read().metrics
    assert study.best_trial.intermediate_values == {row["epoch"]: row["val_accuracy"] for row in rows}


def test_trial_that_had_ended_when_its_process_was_killed_is_not_pruned(settings, tmp_path, monkeypatch):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,), pruner="median")
    run_killed_behind(monkeypatch, "save_results", plan, tmp_path)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    assert [trial["state"] for trial in run_sweep(plan, tmp_path)["trials"]] == ["complete"]


def test_trial_that_goes_on_is_pruned_by_the_epochs_that_it_had_trained(settings, tmp_path, monkeypatch):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,), pruner="median")
    run_killed_behind(monkeypatch, "save_epoch", plan, tmp_path)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    monkeypatch.setattr(trials, "train", None)
    with pytest.raises(ValueError, match="no trial in .* came to an end: pruned"):
        run_sweep(plan, tmp_path)


@pytest.mark.parametrize(
    ("pruner", "others", "epochs"),
    [
        ("none", {}, [1]),
        ("none", {"eval_every": 1}, [0, 1]),
        ("median", {}, [0, 1]),
        ("median", {"eval_every": 0}, [1]),
    ],
)
def test_trials_evaluate_before_their_last_epoch_only_for_a_pruner_or_if_asked(
    settings, tmp_path, pruner, others, epochs
):
    run_sweep(Sweep({**settings, **others}, {"base_lr": (0.5,)}, seeds=(1,), pruner=pruner), tmp_path)
    rows = RunFolder(trial_folder(tmp_path, {"base_lr": 0.5})).read().metrics
    assert [row["epoch"] for row in rows if row["val_accuracy"] is not None] == epochs


def test_epochs_that_no_pruner_sees_are_not_recorded_in_the_study(settings, tmp_path):
    plan = Sweep(settings, {"base_lr": (0.5,)}, seeds=(1,))
    run_sweep(plan, tmp_path)
    study, _ = studies(plan, tmp_path)
    assert study.best_trial.intermediate_values == {}


def test_trial_that_was_stopped_goes_on_before_the_next(settings, tmp_path, monkeypatch):
    def train(recipe, out, **options):
        trained.append(out.name)
        raise trials.Stopped

    trained = []
    monkeypatch.setattr(trials, "train", train)
    for _ in range(2):
        run_sweep(Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,)), tmp_path)
    assert trained == ["base_lr=0.5"] * 2


def test_study_that_can_no_longer_be_saved_is_named(settings, tmp_path, monkeypatch):
    original = loop.train

    def train(recipe, out, **options):
        with sqlite3.connect(tmp_path / "study.db") as study:  # every write of attributes fails from here on
            study.execute("DROP TABLE trial_user_attributes")
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    with pytest.raises(SavingFailed, match="studies of the sweep in .* could not be saved: .* no such table"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path)


@pytest.mark.parametrize(
    "storage", ["nope:secret", "sqlite:////no/such/folder/x.db", "mysql://user:secret@host/x"]
)
def test_storage_that_cannot_be_opened_is_refused_without_its_url(settings, tmp_path, storage):
    with pytest.raises(ValueError, match="storage cannot be opened") as raised:
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path, storage=storage)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_error_that_quotes_the_url_of_a_storage_is_shown_without_it(tmp_path, monkeypatch):
    def refuse(url, *_, **__):
        raise ImportError(f"no driver for {url!r}\nand more")

    monkeypatch.setattr(optuna.storages, "RDBStorage", refuse)
    with pytest.raises(ValueError, match="^storage cannot be opened: no driver for 'the URL'$"):
        trials.open_studies("name", tmp_path, "db://user:secret@host/x")


def test_storage_that_may_only_be_read_is_refused(settings, tmp_path, empty_study):
    storage = f"sqlite:///file:{empty_study}?mode=ro&uri=true"
    with pytest.raises(
        ValueError, match="^storage cannot be opened: .* attempt to write a readonly database"
    ):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path, storage=storage)


def test_study_that_another_version_of_optuna_made_is_refused_with_its_advice(
    settings, tmp_path, empty_study
):
    with sqlite3.connect(shutil.copy(empty_study, tmp_path)) as study:
        study.execute("UPDATE alembic_version SET version_num = 'of a later version'")
    with pytest.raises(ValueError, match="study.db cannot be opened: .* try updating optuna"):
        run_sweep(Sweep(settings, {"base_lr": (0.1,)}), tmp_path)


def test_study_lies_in_the_folder_whatever_that_is_called(settings, tmp_path):
    folder = tmp_path / "{x} 50%25?y#z"
    run_sweep(Sweep(settings, {"base_lr": (0.1,)}, seeds=(1,)), folder)
    assert (folder / "study.db").stat().st_size > 0 and list(tmp_path.iterdir()) == [folder]


OTHER_PROCESS = """
import json, sys
from pathlib import Path
from vpt_fast.sweeps.sweep import run_sweep
from vpt_fast.sweeps.settings import Sweep
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
        t
        for t in (*study.trials, *final.trials)
        if t.state.name == "COMPLETE" and "parameters" in t.user_attrs
    ]
    assert len(done) == 6  # each was trained once
    assert sum(t.user_attrs["owner"]["pid"] == os.getpid() for t in done) == len(trained)


@pytest.mark.filterwarnings("ignore:Heartbeat")
@pytest.mark.parametrize("is_shared", [False, True], ids=["the folder's", "a shared storage"])
def test_waiting_trial_is_taken_by_one_process_alone(settings, tmp_path, monkeypatch, empty_study, is_shared):
    from optuna.storages._rdb.models import TrialModel

    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,))
    storage = f"sqlite:///{shutil.copy(empty_study, tmp_path)}" if is_shared else None
    one, other = (studies(plan, tmp_path, storage)[0] for _ in range(2))
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


@pytest.mark.filterwarnings("ignore:Heartbeat")
@pytest.mark.parametrize(
    ("search", "own"),
    [({}, ["base_lr=0.1"]), ({"sampler": "random", "trials": 1}, [])],
    ids=["grid", "sampler"],
)
def test_trial_that_another_process_runs_is_waited_for_and_counts_as_taken(
    settings, tmp_path, monkeypatch, trained, search, own
):
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,), **search)
    study, _ = studies(plan, tmp_path)
    study.enqueue_trial({"base_lr": 0.5})
    taken = study.ask()
    taken.set_user_attr("owner", trials._owner())
    taken.suggest_categorical("base_lr", [0.5, 0.1])
    monkeypatch.setattr(trials.time, "sleep", lambda seconds: study.tell(taken, 1.0))
    assert run_sweep(plan, tmp_path)["finished"]
    assert len(study.trials) == 1 + len(own) and trained == [*own, "seed-1"]


def test_of_two_trials_with_the_same_settings_the_later_one_alone_is_a_twin():
    def is_twin(number: int, **recorded: float) -> bool:
        running = SimpleNamespace(number=3, params=recorded, system_attrs={}, state=running_state)
        return trials.Worker._is_twin(running, number, {"base_lr": 0.5, "weight_decay": 0.1})

    running_state = SimpleNamespace(name="RUNNING")
    found = [is_twin(number, base_lr=0.5, weight_decay=0.1) for number in (2, 3, 4)]
    assert found == [False, False, True]
    # Of settings that are not recorded yet, it may be one.
    assert is_twin(4) and is_twin(4, base_lr=0.5) and not is_twin(4, base_lr=0.1)


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
            draws_curves=False,
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
    plan = Sweep(settings, REPEATED, seeds=(1,), sampler="tpe", trials=3, pruner="median")
    found = run_sweep(plan, tmp_path)
    assert found["finished"] and trained == ["base_lr=0.5", "seed-1"]
    study, _ = studies(plan, tmp_path)
    outcomes = [(trial.state.name, trial.value, trial.intermediate_values) for trial in study.trials]
    assert len(outcomes) == 3 and outcomes[1:] == outcomes[:1] * 2 and len(outcomes[0][2]) == 2


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_numbers_of_parameters_stay_where_a_final_run_came_twice(settings, tmp_path):
    plan = Sweep(settings, {}, seeds=(1, 2))
    first = run_sweep(plan, tmp_path)
    _, final = studies(plan, tmp_path)
    # As a repeated trial is recorded, which has nothing but its accuracy.
    final.add_trial(
        optuna.trial.create_trial(
            params=final.trials[0].params, distributions=final.trials[0].distributions, value=0.5
        )
    )
    assert run_sweep(plan, tmp_path)["parameters"] == first["parameters"]


def test_pruned_settings_that_a_sampler_repeats_are_pruned_again_without_training(
    settings, tmp_path, trained, sampler_that_repeats, monkeypatch
):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    with pytest.raises(ValueError, match="no trial in .* came to an end: pruned"):
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
    assert "best of 2 trials of 1 combination: base_lr 0.5" in result.output


def test_sampler_draws_by_the_seed_of_the_sweep(settings, tmp_path, monkeypatch):
    seeds, find_sampler = [], sweep.find_sampler
    monkeypatch.setattr(
        sweep, "find_sampler", lambda name, seed, taken: seeds.append(seed) or find_sampler(name, seed, taken)
    )
    plan = Sweep({**settings, "seed": 7}, {"base_lr": (0.5,)}, seeds=(1,), sampler="random", trials=1)
    run_sweep(plan, tmp_path)
    assert seeds == [7]


def test_sampler_takes_a_seed_of_more_than_32_bits(settings, tmp_path):
    plan = Sweep({**settings, "seed": 2**40}, {"base_lr": (0.5, 0.1)}, seeds=(1,), sampler="tpe", trials=1)
    assert run_sweep(plan, tmp_path)["finished"]


def test_pruned_trial_is_never_the_best(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.params["base_lr"] == 0.5)
    plan = Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,), pruner="median")
    found = run_sweep(plan, tmp_path)
    assert [t["state"] for t in found["trials"]] == ["pruned", "complete"]
    assert found["trials"][0]["val_accuracy"] is None
    assert len(RunFolder(tmp_path / "trials" / "base_lr=0.5").metrics.read_text().splitlines()) == 1


@pytest.mark.parametrize("end", ["pruned", "diverged"])
def test_model_of_a_trial_that_failed_is_gone_before_the_next_one_is_built(
    settings, tmp_path, monkeypatch, end: str
):
    models, alive, build = [], [], loop.build_seeded

    def build_seeded(*arguments):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    def require_finite_state(*arguments):
        if end == "diverged":
            raise TrainingDiverged("the loss is inf")

    monkeypatch.setattr(loop, "build_seeded", build_seeded)
    monkeypatch.setattr(loop, "require_finite_state", require_finite_state)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    gc.disable()  # which would free, some time, what a cycle holds
    try:
        with pytest.raises(ValueError, match="no trial in .* came to an end"):
            run_sweep(Sweep(settings, {"base_lr": (0.5, 0.1)}, seeds=(1,), pruner="median"), tmp_path)
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_time_left_is_said_once_and_by_what_a_trial_costs():
    console = Console(record=True, width=200)
    display = trials.Display(console, "trial", 4, lambda params: params["epochs"] / 10)
    for done in (1, 2):
        display.done(done)
        display.begin({"epochs": 2})
        display._started -= 10
        display.end({"epochs": 2}, "done")
    first, left, second = console.export_text().splitlines()
    assert first.startswith("trial 2/4 epochs=2: done, 10") and second.startswith("trial 3/4 epochs=2: done")
    assert left == "2 trials are left, about 2 min"  # 2 trials of 50 s


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


def test_trials_of_other_processes_are_counted_in_singular_and_plural():
    display = trials.Display(Console(), "trial", 4)
    shown = []
    for running in (1, 2):
        display.wait(running)
        shown.append(display._bars.tasks[0].description)
    assert shown == ["1 trial in other processes", "2 trials in other processes"]


def test_long_settings_of_a_trial_leave_room_for_the_time_that_is_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with trials.Display(console, "trial", 2) as display:
        display.begin({"base_lr": 0.5, "weight_decay": 0.001, "prompt_dropout": 0.1})
        display._bars.refresh()
    assert "-:--:-- left" in console.file.getvalue() and "…" not in console.file.getvalue()


def test_brackets_in_a_setting_are_shown_as_they_are():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with trials.Display(console, "trial", 1) as display:
        display.begin({"backbone": "local-dir:[/b]"})
        display._bars.refresh()
    assert "backbone=local-dir:[/b]" in console.file.getvalue()


def test_cause_is_found_where_an_error_was_raised_from_it_and_where_one_hides_it():
    raised_from, hiding, neither = RuntimeError(), RuntimeError(), RuntimeError()
    raised_from.__cause__, raised_from.__context__ = OSError("cause"), KeyError()
    hiding.__context__ = RuntimeError()
    hiding.__context__.__context__ = OSError("hidden")
    assert [str(find_cause(error, OSError)) for error in (raised_from, hiding)] == ["cause", "hidden"]
    assert find_cause(neither, OSError) is None


def test_an_error_that_is_raised_again_by_itself_has_no_other_cause():
    first = OSError("full")
    again = SavingFailed("not saved")
    again.__cause__, first.__context__ = first, again
    assert find_cause(first, TrainingDiverged) is None


def test_trial_of_another_machine_is_left_to_its_heartbeat_and_a_dead_process_of_this_one_is_dead():
    def is_alive(**changes) -> bool:
        trial = SimpleNamespace(user_attrs={"owner": trials._owner() | changes})
        return trials._is_alive(trial, nobody_takes_one=True)

    assert is_alive() and not is_alive(started="0")
    assert is_alive(started="0", host="another machine")
