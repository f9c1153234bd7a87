"""Trials of an Optuna study, shared between processes: each is run by one of them, and by another if that one
ends without a result."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vpt_fast.counting import counted
from vpt_fast.failures import SavingFailed, TrainingDiverged, find_cause
from vpt_fast.sweeps.settings import Params
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.loop import train
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder

if TYPE_CHECKING:
    import optuna
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

HEARTBEAT_SECONDS, GRACE_SECONDS = 60, 300  # of trials on other machines
POLL_SECONDS = 2.0


class Stopped(Exception):
    """Asked to stop (Ctrl-C): the current trial is released."""


class _Twin(Exception):
    """Another process is already training these settings."""


def open_studies(name: str, out: Path, storage: str | None) -> tuple[optuna.Study, optuna.Study]:
    """The studies `name`, of trials, and `name`-final, of final runs; the first process creates them, so that
    only one at a time may call this.

    storage: URL of an Optuna storage; None for a file in `out`.

    Raises ValueError if the storage cannot be opened. The message does not contain its URL, which may hold a
    password.
    """
    import optuna
    from sqlalchemy.event import listen  # Optuna's storage is built on SQLAlchemy
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The path is not put into the URL: it may contain characters that are special there, or to Optuna ({}).
    path = (out / "study.db").resolve()
    url = storage or "sqlite:///study.db"
    connect: dict[str, Any] = {"timeout": 60, "isolation_level": None}
    engine: dict[str, Any] = {"connect_args": connect} if url.startswith("sqlite:") else {}
    if storage is None:
        engine = {"creator": lambda: sqlite3.connect(path, check_same_thread=False, **connect)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            opened = optuna.storages.RDBStorage(
                url, engine, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
            )
            if url.startswith("sqlite:"):
                # Optuna takes a waiting trial by reading its state and then writing it. SQLite would lock its
                # file for the writing alone, and two processes with different folders could take one trial.
                listen(
                    opened.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
                )
            search, final = (
                optuna.create_study(
                    storage=opened, study_name=each, direction="maximize", load_if_exists=True
                )
                for each in (name, f"{name}-final")
            )
        # The last is of tables that another version of Optuna made.
        except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
            where = "storage" if storage else out / "study.db"
            reason = str(find_cause(error, SQLAlchemyError) or error).splitlines()[0].replace(url, "the URL")
            raise ValueError(f"{where} cannot be opened: {reason}") from None
    final.pruner = optuna.pruners.NopPruner()
    return search, final


def find_sampler(name: str, seed: int, taken: int) -> BaseSampler:
    """Optuna's sampler by a sweep's name for it, for the draw that follows `taken` trials.

    It draws by their results and these numbers alone, so that a search that was interrupted goes
    on as if it had not been.
    """
    import optuna

    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    # numpy's seeds have 32 bits.
    return samplers[name](seed=int(np.random.SeedSequence((seed, taken)).generate_state(1)[0]))


def find_pruner(name: str) -> BasePruner:
    """Optuna's pruner by a sweep's name for it."""
    import optuna

    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return pruners[name]()


@contextlib.contextmanager
def saving_studies(out: Path) -> Iterator[None]:
    """Turns errors of the studies' storage, such as a full disk or a lost connection, into SavingFailed."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # If Optuna cannot save that a trial failed either, an error of its own code hides the cause.
    except Exception as error:
        cause = find_cause(error, SQLAlchemyError)
        if cause is None:
            raise
        raise SavingFailed(
            f"the studies of the sweep in {out} could not be saved: {str(cause).splitlines()[0]}; what was "
            "saved before is still there, and the same command goes on from it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Runs the trials of a study one by one, until none is left to run, here or in another process.

    wanted: the settings to try; None if a sampler chooses them, `limit` times.
    sampler: number of trials taken -> the sampler for the next; None if the settings are known.
    folder_lock: locks the sweep's folder. One process at a time takes a trial, so that no two take the same
        or, together, more than `limit`.
    is_only_folder: whether all processes that share the study use this folder.
    draws_curves: whether each run draws its curves, which takes longer than a linear probe takes to train.
    """

    study: optuna.Study
    axes: Mapping[str, Sequence[Any]]
    wanted: list[Params] | None
    sampler: Callable[[int], BaseSampler] | None
    limit: int
    recipe: Callable[..., Recipe]
    folder: Callable[[Params], Path]
    metric: str
    cache: TrainingCache
    display: Display
    after: Callable[[], Any]
    stop: threading.Event
    folder_lock: Callable[[], contextlib.AbstractContextManager[bool]]
    is_only_folder: bool
    draws_curves: bool

    def work(self) -> None:
        while True:
            with contextlib.ExitStack() as taking:
                taking.enter_context(self.folder_lock())
                self._give_back_dead()
                trials = self.study.get_trials(deepcopy=False)
                states = [trial.state.name for trial in trials]
                taken = [params_of(t) for t in trials if is_done(t) or t.state.name in ("RUNNING", "WAITING")]
                # Without all its settings a trial is drawn again: the sampler will choose the same.
                lost = [params_of(t) for t in trials if t.state.name == "FAIL"]
                lost = [params for params in lost if params.keys() == self.axes.keys()]
                there = set(map(key_of, taken))
                wanted = lost if self.wanted is None else self.wanted
                missing = list(
                    {key_of(params): params for params in wanted if key_of(params) not in there}.values()
                )
                # One after the other: a trial that was stopped goes on before the next, and the pruner
                # decides as if it had not been. Where a process in another folder could take the only one
                # that is queued, all are.
                if "WAITING" not in states:
                    for params in missing[:1] if self.is_only_folder else missing:
                        self.study.enqueue_trial(params)
                self.display.done(sum(map(is_done, trials)))
                draws = self.sampler is not None and len(taken) < self.limit
                if draws:
                    self.study.sampler = self.sampler(len(taken))
                if missing or draws or "WAITING" in states:
                    self._take_one(taking)
                    continue
            if "RUNNING" not in states:
                return
            self.display.wait(states.count("RUNNING"))
            time.sleep(POLL_SECONDS)

    def _take_one(self, taking: contextlib.ExitStack) -> None:
        """Runs a trial; `taking` is closed, which unlocks the folder, once its owner and its settings are
        recorded."""
        self.study.optimize(
            lambda trial: self._objective(trial, taking), n_trials=1, catch=(TrainingDiverged, _Twin)
        )
        self.after()
        if self.stop.is_set():  # after the trial had finished
            raise Stopped

    def _objective(self, trial: Trial, taking: contextlib.ExitStack) -> float:
        import optuna

        trial.set_user_attr("owner", _owner())
        params = {name: trial.suggest_categorical(name, list(axis)) for name, axis in self.axes.items()}
        taking.close()
        known = self.study.get_trials(deepcopy=False)
        if done := next((other for other in known if other.params == params and is_done(other)), None):
            return self._repeat(trial, done)
        if any(self._is_twin(other, trial.number, params) for other in known):
            time.sleep(POLL_SECONDS)
            raise _Twin

        recipe, folder = self.recipe(**params), self.folder(params)
        # To record an epoch in the study takes as long as to save it, and only a pruner reads it there.
        is_pruned = not isinstance(self.study.pruner, optuna.pruners.NopPruner)

        def on_epoch(row: dict[str, Any], *, may_prune: bool = True) -> None:
            self.display.epoch(params, row["epoch"] + 1, recipe.epochs)
            if is_pruned and row["val_accuracy"] is not None:  # as of an epoch that eval_every passes over
                trial.report(row["val_accuracy"], row["epoch"])
                if may_prune and trial.should_prune():
                    raise optuna.TrialPruned

        self.display.begin(params)
        try:
            # Of a run that goes on, the pruner has to see all epochs, as of one that was never stopped.
            if begun := RunFolder(folder).read():
                for row in begun.metrics:
                    on_epoch(row, may_prune=begun.results is None)
            result = train(
                recipe,
                folder,
                draw_curves=self.draws_curves,
                cache=self.cache,
                on_features=partial(self.display.features, params),
                on_epoch=on_epoch,
                stop=self.stop,
            )
        except (TrainingDiverged, optuna.TrialPruned) as error:
            # Optuna holds the error in a cycle with its own frame. Until that is collected, train's frames
            # would keep the model, its graph and the images on the GPU.
            traceback.clear_frames(error.__traceback__)
            outcome = "pruned"
            if isinstance(error, TrainingDiverged):
                trial.set_user_attr("diverged", str(error))
                outcome = f"diverged: {error}"
            self.display.end(params, outcome)
            raise
        if result.results is None:
            raise Stopped
        trial.set_user_attr("parameters", result.facts["parameters"])
        value = result.results[self.metric]
        self.display.end(params, self._outcome(value))
        return value

    @staticmethod
    def _is_twin(other: FrozenTrial, number: int, params: Params) -> bool:
        """Whether `other` runs with these settings and began earlier. A process in another folder may just
        have taken it and not have recorded all of its settings: it is a twin unless one that is known
        differs."""
        known = params_of(other)
        return (
            other.state.name == "RUNNING"
            and other.number < number
            and all(known.get(name, value) == value for name, value in params.items())
        )

    def _repeat(self, trial: Trial, done: FrozenTrial) -> float:
        """Ends a trial as the earlier one with its settings ended, which trained and would again give the
        same. Samplers draw settings more than once; as everywhere in Optuna, each draw is a trial."""
        import optuna

        for epoch, accuracy in done.intermediate_values.items():
            trial.report(accuracy, epoch)
        if (reason := done.user_attrs.get("diverged")) is not None:
            trial.set_user_attr("diverged", reason)
            self.display.repeat(done.params, "diverged")
            raise TrainingDiverged(reason)
        if done.state.name == "PRUNED":
            self.display.repeat(done.params, "pruned")
            raise optuna.TrialPruned
        assert done.value is not None, "it is complete"
        self.display.repeat(done.params, self._outcome(done.value))
        return done.value

    def _outcome(self, value: float) -> str:
        return f"{self.metric.replace('_', ' ')} {value:.2%}"

    def _give_back_dead(self) -> None:
        """Fails trials whose process has died: on this machine at once, elsewhere after the grace period."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if not _is_alive(trial, nobody_takes_one=self.is_only_folder):  # the folder is locked
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def params_of(trial: FrozenTrial) -> Params:
    """A trial's settings, also of one that is still waiting."""
    return dict(trial.params or trial.system_attrs.get("fixed_params", {}))


def key_of(params: Params) -> frozenset[tuple[str, Any]]:
    """The same for the same settings, to look them up among thousands."""
    return frozenset(params.items())


def is_done(trial: FrozenTrial) -> bool:
    """Whether the trial need not be run again: it is complete or pruned, or it diverged."""
    return trial.state.name in ("COMPLETE", "PRUNED") or "diverged" in trial.user_attrs


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}


def _process_start(pid: int) -> str | None:
    """When a process started, in kernel ticks, since process ids are reused; None if there is none, or only
    its exit status is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _is_alive(trial: FrozenTrial, *, nobody_takes_one: bool) -> bool:
    owner = trial.user_attrs.get("owner")
    if owner is None:  # just taken: the owner is recorded moments later
        return not nobody_takes_one and datetime.now() - trial.datetime_start < timedelta(
            seconds=GRACE_SECONDS
        )
    if owner["host"] != socket.gethostname():
        return True  # its heartbeat decides
    return _process_start(owner["pid"]) == owner["started"]


class Display:
    """A progress bar over the trials, on a terminal; a line for each finished trial; and once an estimate of
    the remaining time."""

    def __init__(
        self,
        console: Console,
        noun: str,
        total: int,
        relative_cost: Callable[[Params], float] = lambda params: 1.0,
    ) -> None:
        self._console, self._noun, self._total, self._relative_cost = console, noun, total, relative_cost
        self._done = 0
        self._has_estimated = False
        self._bars = Progress(
            # Settings may have brackets; where they are long, they go on below and leave the rest its room.
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task(noun, total=total)

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def done(self, trials: int) -> None:
        self._done = trials
        self._bars.update(self._task, completed=trials)

    def begin(self, params: Params) -> None:
        self._started = time.perf_counter()
        self._bars.update(self._task, description=f"{self._name(params)}, reading backbone and images")

    def features(self, params: Params, images: int, of: int) -> None:
        text = f"{self._name(params)}, frozen features {images:,}/{of:,}"
        self._bars.update(self._task, description=text)

    def epoch(self, params: Params, epochs: int, of: int) -> None:
        text = f"{self._name(params)}, epoch {epochs}/{of}"
        self._bars.update(self._task, description=text, completed=self._done + epochs / of)

    def end(self, params: Params, outcome: str) -> None:
        seconds = time.perf_counter() - self._started
        self._console.print(f"{self._name(params)}: {outcome}, {_duration(seconds)}", highlight=False)
        left = self._total - self._done - 1
        if not self._has_estimated and left > 0:
            self._has_estimated = True
            about = _duration(left * seconds / self._relative_cost(params))
            are = "is" if left == 1 else "are"
            self._console.print(f"{counted(left, self._noun)} {are} left, about {about}", highlight=False)

    def repeat(self, params: Params, outcome: str) -> None:
        self._console.print(f"{self._name(params)}: as before, {outcome}", highlight=False)

    def wait(self, running: int) -> None:
        self._bars.update(self._task, description=f"{counted(running, self._noun)} in other processes")

    def _name(self, params: Params) -> str:
        listed = " ".join(f"{key}={value}" for key, value in params.items())
        return f"{self._noun} {self._done + 1}/{self._total} {listed}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
