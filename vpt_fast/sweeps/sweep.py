"""Sweeps: a search for settings on val, then final runs with several seeds, as in the paper.

A sweep's folder:

    sweep.yaml         what all runs share, what is searched, and how; digests of images and weights
    study.db           the Optuna studies of trials and final runs, unless a storage is named
    trials/<settings>/ a run folder for each trial; only the best one's keeps its prompts
    final/seed-<s>/    a run folder for each final run
    results.json       each trial, the best settings, and the final accuracies

Several processes may share one sweep: each trial is taken by one of them, and by another if that one ends
without a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import shutil
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console

from vpt_fast.backbones.resolve import require_name
from vpt_fast.backbones.sharing import SharedBackbone, sharing_backbones
from vpt_fast.backbones.sources import CONFIG_FILE
from vpt_fast.counting import counted
from vpt_fast.data.tasks import find_task
from vpt_fast.data_names import is_factory_name
from vpt_fast.files import lock_file, parse_json, remove_unfinished, write, write_json
from vpt_fast.sweeps.settings import Params, Sweep
from vpt_fast.sweeps.trials import (
    Display,
    Stopped,
    Worker,
    find_pruner,
    find_sampler,
    is_done,
    key_of,
    open_studies,
    params_of,
    saving_studies,
)
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import Classification
from vpt_fast.training.methods import build_model_without_values, require_operations
from vpt_fast.training.recipe import DATA, MODEL, PROMPTS, Recipe
from vpt_fast.training.report import print_facts, print_no_locks
from vpt_fast.training.resume import digest_lists
from vpt_fast.training.run import RunFolder, default_run_folder
from vpt_fast.training.setting_values import read_yaml
from vpt_fast.training.step import graph_obstacle, require_batches
from vpt_fast.training.world import World, find_device

if TYPE_CHECKING:
    import optuna


def default_sweep_folder(recipe: Recipe) -> Path:
    run = default_run_folder(recipe)
    return run.with_name(f"sweep-{run.name}")


def best_trial(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The finished trial with the highest val accuracy after the last epoch, None if there is none. Ties go
    to the smallest base_lr, then to the largest weight_decay, then to the first in the grid."""
    done = [trial for trial in trials if trial["state"] == "complete"]

    def rank(trial: Mapping[str, Any]) -> tuple[float, ...]:
        params = trial["params"]
        lr, decay = params.get("base_lr", 0.0), params.get("weight_decay", 0.0)
        return (-trial["val_accuracy"], lr, -decay, trial["place"])

    return min(done, key=rank, default=None)


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    storage: str | None = None,
    console: Console | None = None,
    cache: TrainingCache | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs what is not done yet of `sweep` in the folder `out`; returns the contents of results.json.

    Its `finished` is False after SIGINT or SIGTERM; the same call resumes. A trial that diverges counts as
    failed, and the sweep continues.

    Args:
        storage: URL of an Optuna storage that several machines share; None for a file in `out`.
        cache: shared with other sweeps of this process.
        stop: set by these signals, so that the caller can skip its other sweeps.

    Raises:
        ValueError: `storage` cannot be opened, `out` holds another sweep, the data cannot be used, there is
            no model for one of the combinations, or every trial failed.
        SavingFailed: the folder or the storage can no longer be written, or the latter not be reached.
    """
    if storage == "":  # as from an unset shell variable: machines that were to share a sweep would not
        raise ValueError("storage is ''; it must be the URL of an Optuna storage")
    console = console or Console(quiet=True)
    cache = cache or TrainingCache()
    stop = stop or threading.Event()
    require_trials(sweep, cache, console)
    plan = _FinalPlan.of(sweep, cache)
    inputs = digest_inputs(sweep, cache)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {out}, which cannot be written: {error.strerror}") from None
    with _lock(out) as is_locked:  # the first process determines which sweep the folder holds
        _require_same_sweep(sweep, inputs, out)
        search, final = open_studies(sweep.study_name(inputs), out, storage)
        _begin(sweep, inputs, out)
    search.pruner = find_pruner(sweep.pruner)
    sampler = None
    if sweep.sampler != "grid":
        sampler = functools.partial(find_sampler, sweep.sampler, sweep.first_recipe.seed)
    amounts = [_Amount.of(sweep.recipe(**point), plan, cache) for point in sweep.points()]
    _print_plan(console, sweep, amounts, out)
    if not is_locked:
        print_no_locks(console, out)

    tidied: set[int] = set()

    def collect() -> dict[str, Any]:
        return _collect(sweep, plan, search, final, out)

    worker = functools.partial(
        Worker,
        cache=cache,
        stop=stop,
        folder_lock=functools.partial(_lock, out),
        is_only_folder=storage is None and is_locked,
    )
    with saving_studies(out), contextlib.suppress(Stopped):
        changes = plan.changes
        if sweep.axes:
            with Display(console, "trial", sweep.num_trials, _relative_costs(sweep, amounts)) as display:
                worker(
                    study=search,
                    axes=sweep.axes,
                    wanted=sweep.points() if sampler is None else None,
                    sampler=sampler,
                    limit=sweep.num_trials,
                    recipe=sweep.recipe,
                    folder=lambda params: trial_folder(out, params),
                    metric="val_accuracy",
                    display=display,
                    after=lambda: _tidy(collect(), out, tidied),
                    draws_curves=False,
                ).work()
            results = collect()
            _tidy(results, out, tidied)  # after a trial of a process that died before it could
            best = _require_best(results, out)
            changes = {**best, **changes, "batch_size": _batch_size(sweep.recipe(**best), cache)}
        with Display(console, "final run", len(sweep.seeds)) as display:
            worker(
                study=final,
                axes={"seed": sweep.seeds},
                wanted=[{"seed": seed} for seed in sweep.seeds],
                sampler=None,
                limit=len(sweep.seeds),
                recipe=lambda seed: sweep.recipe(**changes, seed=seed),
                folder=lambda params: out / "final" / f"seed-{params['seed']}",
                metric=f"{plan.split}_accuracy",
                display=display,
                after=collect,
                draws_curves=True,
            ).work()
    return collect()


def _require_best(results: Mapping[str, Any], out: Path) -> Params:
    """The settings of the best trial; raises ValueError with the reasons if all of them failed."""
    if results["best"] is None:
        reasons = dict.fromkeys(trial["reason"] or trial["state"] for trial in results["trials"])
        raise ValueError(f"no trial in {out} came to an end: {'; '.join(reasons)}")
    return results["best"]["params"]


def _batch_size(recipe: Recipe, cache: TrainingCache) -> int:
    """The batch size of a trial. A final run's own default could be larger, as it may have more images: the
    learning rate, which follows the batch size, would not be the one that was chosen."""
    splits = Classification().open(recipe, cache)
    device = find_device(recipe.device)
    resolved = recipe.resolved(num_train_images=len(splits.train), device_type=device.type)
    return resolved.batch_size


def require_trials(sweep: Sweep, cache: TrainingCache, console: Console | None = None) -> None:
    """Opens the data and builds the model, without weights, once for each combination of settings that these
    depend on, so that a trial is refused at once and not after hours of other trials.

    Raises:
        ValueError: training would refuse a combination; the message names the searched settings behind it.
    """
    device = find_device(sweep.first_recipe.device)
    if "backbone" not in sweep.axes:
        require_name(sweep.first_recipe.backbone)  # to list the images may take minutes
    Classification().open(sweep.first_recipe, cache, console)  # what no searched setting is to blame for
    panels = {field.name: field.metadata["panel"] for field in dataclasses.fields(Recipe)}
    others = ("precision", "batch_size", "accumulate", "cuda_graph")
    looked_at = [name for name in panels if panels[name] in (DATA, MODEL, PROMPTS) or name in others]
    seen = set()
    with sharing_backbones(SharedBackbone()):
        for point in sweep.points():
            recipe = sweep.recipe(**point)
            key = repr([getattr(recipe, name) for name in looked_at])
            if key in seen:
                continue
            seen.add(key)
            try:
                _require_trial(sweep, recipe, device, cache)
            except ValueError as error:
                blamed = ", ".join(f"{name} is {point[name]}" for name in point if name in looked_at)
                if not blamed:  # all trials share the cause
                    raise
                raise ValueError(f"over: {blamed}, which no trial can have: {error}") from None


def _require_trial(sweep: Sweep, recipe: Recipe, device: torch.device, cache: TrainingCache) -> None:
    problem = Classification()
    splits = problem.open(recipe, cache)
    resolved = recipe.resolved(num_train_images=len(splits.train), device_type=device.type)
    graph_obstacle(resolved, device, problem.graph_obstacle)  # raises if the requested graph is impossible
    model = build_model_without_values(resolved, len(splits.classes))
    if model is not None:
        require_operations(resolved, model, device)
        problem.preprocessing(resolved, model)
        amount, world = _Amount.of(recipe, _FinalPlan.of(sweep, cache), cache), World(0, 1, device)
        if sweep.axes:  # a trial, whose batch size the final runs have
            require_batches(resolved, model, amount.trial_images, world)
        else:
            resolved = recipe.resolved(num_train_images=amount.final_images, device_type=device.type)
        require_batches(resolved, model, amount.final_images, world)


def digest_inputs(sweep: Sweep, cache: TrainingCache) -> dict[str, str | None]:
    """Digests of a sweep's lists of images and, if given, its files of weights (a checkpoint, or the weights
    and config.json of each local-dir: folder); they do not depend on where these are stored.

    Raises ValueError if a file cannot be read.
    """
    # All images: of a part, other seeds and searched numbers of shots take others.
    recipe = dataclasses.replace(sweep.first_recipe, train_fraction=1.0, shots=None)
    splits = Classification().open(recipe, cache)
    lists = filter(None, digest_lists(recipe, splits, cache).values())
    digests: dict[str, list[str]] = {}
    for point in sweep.points():
        recipe = sweep.recipe(**point)
        if recipe.weights_file is None or recipe.weights_file in digests:
            continue
        files = [Path(recipe.weights_file)]
        if recipe.checkpoint is None:
            files.append(files[0].with_name(CONFIG_FILE))
        try:
            digests[recipe.weights_file] = [_file_digest(file) for file in files]
        except OSError as error:
            setting = "checkpoint" if recipe.checkpoint else "backbone"
            raise ValueError(
                f"{setting} is {error.filename}, which cannot be read: {error.strerror}"
            ) from None
    weights = " ".join(itertools.chain(*digests.values())) or None
    return {"data": hashlib.sha256(" ".join(lists).encode()).hexdigest(), "checkpoint": weights}


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class _FinalPlan:
    """The settings that final runs add, and the split that they are evaluated on."""

    changes: dict[str, Any]
    split: str
    reason: str
    classes: tuple[str, ...]

    @classmethod
    def of(cls, sweep: Sweep, cache: TrainingCache) -> _FinalPlan:
        """Final runs of VTAB and of data with test images train on train and val; of FGVC on train, as in the
        paper."""
        recipe = sweep.first_recipe
        splits = Classification().open(recipe, cache)
        if splits.test is None:
            why = "there are no test images"
            if is_factory_name(recipe.data):  # which opens them only for a run that asks for them
                why = "no test images of timm's data sets are looked for"
            return cls({}, "val", f"{why}: final accuracies are of val", splits.classes)
        if recipe.task is not None and find_task(recipe.task).suite == "fgvc":
            return cls({"test": True}, "test", "trained on train, as the paper does for FGVC", splits.classes)
        changes: dict[str, Any] = {"test": True, "train_on": "train+val", "val_fraction": Recipe.val_fraction}
        return cls(changes, "test", "trained on train and val", splits.classes)

    def note(self, recipe: Recipe) -> str:
        """The reason, for final runs of `recipe`."""
        if recipe.trains_on_part and self.split == "test":
            return f"trained on a part of {'train and val' if 'train_on' in self.changes else 'train'}"
        return self.reason


@dataclass(frozen=True)
class _Amount:
    """The amount of training for a combination of the searched settings, as a trial and as a final run."""

    epochs: int
    trial_images: int
    final_images: int
    note: str  # about the final run

    @classmethod
    def of(cls, recipe: Recipe, plan: _FinalPlan, cache: TrainingCache) -> _Amount:
        splits = Classification().open(recipe, cache)
        num_train = num_final = len(splits.train)
        if "train_on" in plan.changes:
            num_final += len(splits.val or ())
            if recipe.trains_on_part:
                shared = dataclasses.replace(recipe, **plan.changes)
                num_final = len(Classification().open(shared, cache).train)
        return cls(recipe.epochs, num_train, num_final, plan.note(recipe))


def _relative_costs(sweep: Sweep, amounts: Sequence[_Amount]) -> Callable[[Params], float]:
    """A function from settings to their trial's cost (epochs times images), relative to the mean."""
    costs = [amount.epochs * amount.trial_images for amount in amounts]
    mean, places = statistics.fmean(costs), _places(sweep.points())
    return lambda params: costs[places[key_of(params)]] / mean


def _places(points: Sequence[Params]) -> dict[frozenset[tuple[str, Any]], int]:
    """`key_of` each combination -> its place in the grid."""
    return {key_of(params): place for place, params in enumerate(points)}


def trial_folder(out: Path, params: Params) -> Path:
    """Named by the trial's settings, so that a process that takes over a trial resumes from its last
    epoch."""
    name = ",".join(
        f"{key}={_short(value) if isinstance(value, float) else value}" for key, value in params.items()
    )
    name = name.replace("%", "%25").replace("/", "%2F")  # as in URLs: a/b and a_b are not the same
    if len(os.fsencode(name)) > 150:
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return out / "trials" / name


def _short(value: float) -> str:
    """The value in six significant digits if these are exact, else in full."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _read_begun(path: Path) -> tuple[Sweep, dict[str, str | None]]:
    """The sweep in a sweep.yaml, and its `digest_inputs`."""
    values = read_yaml(path)
    try:
        inputs = values.pop("inputs")
        axes = {name: tuple(axis) for name, axis in values["axes"].items()}
        begun = Sweep(**{**values, "axes": axes, "seeds": tuple(values["seeds"])})
        return begun, {name: inputs[name] for name in ("data", "checkpoint")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what a sweep writes ({error!r}); choose another --out, or remove the sweep there"
        ) from None


def _require_same_sweep(sweep: Sweep, inputs: Mapping[str, str | None], out: Path) -> None:
    """Raises ValueError if the folder holds another sweep."""
    path = out / "sweep.yaml"
    if not path.exists():
        return
    begun, recorded = _read_begun(path)
    ours, theirs = sweep.identity(), begun.identity()
    for each in (ours, theirs):
        each.update(each.pop("settings"))
    changed = [
        f"{name} ({_as_given(theirs.get(name))} there, {_as_given(value)} now)"
        for name, value in ours.items()
        if value != theirs.get(name) and name not in begun.axes
    ]
    for name, digest in inputs.items():
        if digest != recorded[name]:
            now, was = sweep.settings.get(name), begun.settings.get(name)
            if name == "checkpoint" and now is was is None:
                name = "backbone"
                now, was = (
                    ", ".join(dict.fromkeys(each.recipe(**point).backbone for point in each.points()))
                    for each in (sweep, begun)
                )
            changed.append(f"{name} ({was} there, {now} now)" if was != now else f"what is in {name} {now}")
    if changed:
        raise ValueError(
            f"{out} holds a sweep with other settings: {', '.join(changed)}; choose another --out"
        )


def _as_given(value: Any) -> str:
    """A setting, or a sweep's axes, seeds or other choice, as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_as_given(axis)}" for name, axis in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _begin(sweep: Sweep, inputs: Mapping[str, str | None], out: Path) -> None:
    """Writes sweep.yaml if there is none; from then on the folder belongs to this sweep. Removes temporary
    files that a killed process left."""
    remove_unfinished(out / "sweep.yaml", out / "results.json")
    if not (out / "sweep.yaml").exists():
        values = {**sweep.to_dict(), "inputs": dict(inputs)}
        write(out / "sweep.yaml", yaml.safe_dump(values, sort_keys=False).encode())


def _print_plan(console: Console, sweep: Sweep, amounts: Sequence[_Amount], out: Path) -> None:
    """Prints the numbers of runs, epochs and images, as ranges if they depend on the searched settings."""
    epochs = _range("epoch", (amount.epochs for amount in amounts))
    trials = [amount.epochs * amount.trial_images for amount in amounts]
    finals = [len(sweep.seeds) * amount.epochs * amount.final_images for amount in amounts]
    searched = [sweep.num_trials * images for images in (min(trials), max(trials))]
    if sweep.axes and sweep.trials is None:
        searched = [sum(trials)]
    facts = {}
    if sweep.axes:
        axes = "; ".join(f"{name} {', '.join(map(str, axis))}" for name, axis in sweep.axes.items())
        images = _range("image", (amount.trial_images for amount in amounts))
        text = f"{counted(sweep.num_trials, 'trial')} of {epochs} on {images}, by {sweep.sampler}"
        facts["search"] = f"{text}: {axes}"
    seeds = ", ".join(map(str, sweep.seeds))
    images = _range("image", (amount.final_images for amount in amounts))
    note = ", or ".join(dict.fromkeys(amount.note for amount in amounts))
    facts["final runs"] = f"{len(sweep.seeds)} of {epochs} on {images}, {note}; seeds {seeds}"
    in_all = _range("image", (min(searched) + min(finals), max(searched) + max(finals)))
    facts["in all"] = f"{in_all} trained on"
    facts["folder"] = str(out)
    print_facts(console, facts)


def _range(noun: str, values: Iterable[int]) -> str:
    low, *_, high = 2 * sorted(values)
    return counted(low, noun) if low == high else f"{low:,} to {counted(high, noun)}"


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[bool]:
    """Lets one process at a time into the block. Yields whether the file system can do that."""
    with open(out / ".lock", "w") as file:
        yield lock_file(file)


def _collect(
    sweep: Sweep, plan: _FinalPlan, search: optuna.Study, final: optuna.Study, out: Path
) -> dict[str, Any]:
    """The results of the studies so far; writes them to results.json."""
    points = sweep.points()
    places = _places(points)
    rows: dict[int, dict[str, Any]] = {}  # by place in the grid: a sampler may repeat a choice
    for trial in search.get_trials(deepcopy=False):
        if not is_done(trial) or (place := places[key_of(params_of(trial))]) in rows:
            continue
        state = trial.state.name.lower()
        rows[place] = {
            "params": points[place],
            "state": state,
            "val_accuracy": trial.value if state == "complete" else None,
            "reason": trial.user_attrs.get("diverged"),
            "place": place,
        }
    trials = sorted(rows.values(), key=lambda row: row["place"])
    best = best_trial(trials)
    runs = final.get_trials(deepcopy=False)
    complete = {run.params["seed"]: run for run in runs if run.state.name == "COMPLETE"}
    accuracies = {str(seed): complete[seed].value for seed in sweep.seeds if seed in complete}
    diverged = {
        str(run.params["seed"]): run.user_attrs["diverged"] for run in runs if "diverged" in run.user_attrs
    }
    parameters = (run.user_attrs.get("parameters") for run in complete.values())
    # The best trial's recipe: backbone and method may be searched, too.
    recipe = sweep.recipe(**(points[0] if best is None else best["params"]))
    results = {
        "kind": "sweep",
        "task": recipe.task,
        "data": recipe.data,
        "classes": list(plan.classes),
        "backbone": recipe.backbone,
        "method": recipe.method,
        "settings": sweep.settings,
        "axes": {name: list(axis) for name, axis in sweep.axes.items()},
        "num_trials": sweep.num_trials,
        "trials": trials,
        "best": None if best is None else {k: best[k] for k in ("params", "val_accuracy")},
        "parameters": next(filter(None, parameters), None),
        "final": {
            "split": plan.split,
            "note": plan.note(recipe),
            "accuracies": accuracies,
            "diverged": diverged,
            "mean": statistics.fmean(accuracies.values()) if accuracies else None,
            # of a sample: n - 1
            "standard_deviation": statistics.stdev(accuracies.values()) if len(accuracies) > 1 else None,
        },
        "finished": len(accuracies) + len(diverged) == len(sweep.seeds),
    }
    with _lock(out):
        if not _holds_more(out / "results.json", results):
            write_json(out / "results.json", results)
    return results


def _holds_more(path: Path, results: Mapping[str, Any]) -> bool:
    """Whether the file has final runs that `results` lacks. This happens if their study was lost: until the
    runs have been read from their folders again, the file is the only record of them."""
    try:
        known = parse_json(path.read_text(encoding="utf-8"))["final"]["accuracies"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(set(known) - set(results["final"]["accuracies"]))


def _tidy(results: Mapping[str, Any], out: Path, tidied: set[int]) -> None:
    """Deletes the checkpoints of finished trials, and the prompts of all but the best one.

    tidied: places of the trials of which nothing is left to delete; added to.
    """
    for row in results["trials"]:
        if row["place"] in tidied:
            continue
        folder = RunFolder(trial_folder(out, row["params"]))
        folder.checkpoint.unlink(missing_ok=True)
        if results["best"] is None or row["params"] != results["best"]["params"]:
            shutil.rmtree(folder.prompts, ignore_errors=True)
            tidied.add(row["place"])
