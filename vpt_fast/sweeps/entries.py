"""The accuracies of finished sweeps and runs, read from their folders."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt_fast.data.tasks import TASKS
from vpt_fast.files import read_json, require_keys
from vpt_fast.sweeps.published import Published, published_of
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.training.run_files import RunFiles

SWEEP_FILE = "sweep.yaml"  # in a sweep's folder from its start
LEFT_OUT = "; left out"
SWEEP_KEYS = (
    "finished", "final", "best", "settings", "parameters", "method", "backbone", "task", "data", "classes",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A method's accuracy on a task, in percent.

    standard_deviation: of a sample (n - 1), over `runs` runs; None for one run.
    split: that the accuracy is on: "test", or "val" if there is none on test.
    stored: parameters stored for the task; backbone_parameters: of the backbone.
    prompt_location: of the prompts, if there are any.
    incomparable: why no published number is comparable, whatever the backbone; None if one may be.
    """

    method: str
    task: str
    backbone: str
    accuracy: float
    standard_deviation: float | None
    runs: int
    split: str
    stored: int
    backbone_parameters: int
    prompt_location: str
    incomparable: str | None

    @property
    def published(self) -> Published | None:
        """Published numbers of the backbone with this prompt location; None if none are comparable, as to an
        accuracy on val."""
        if self.split != "test" or self.incomparable:
            return None
        return published_of(self.backbone, self.prompt_location)

    @property
    def published_accuracy(self) -> float | None:
        """The published accuracy of the method on the task, in percent."""
        accuracies = self.published.accuracies if self.published is not None else {}
        return accuracies.get(self.method, {}).get(self.task)


Key = tuple[str, str, str]  # backbone, method, task


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, what its config.yaml and results.json hold, and of its run.json the numbers of
    parameters and of images by class. The rest of that, all class names, is not held for each of many runs.
    """

    path: Path
    recipe: Recipe
    results: dict[str, Any]
    parameters: dict[str, int]
    images_by_class: tuple[int, ...]


def read_entries(folders: Iterable[Path]) -> tuple[list[Entry], list[str]]:
    """Reads sweep folders, run folders, and folders of these; also returns notes on what was left out.

    Runs of one method and task that differ only in their seed are averaged. What is not finished, or is no
    run at all (`runs/*` may name anything), is left out; its note ends with `LEFT_OUT`.

    Raises:
        ValueError: there is no such folder, a file in one cannot be used, a method and task occur twice (not
            in runs of other seeds alone), or two data sets have the same name and other classes.
    """
    reader = _Reader()
    paths: dict[Path, Path] = {}  # by where they are: a folder may be named beside the one that it lies in
    for folder in folders:
        found = _find(folder)
        for path in found:
            paths.setdefault(path.resolve(), path)
        if not found:
            reader.leave_out(folder, "holds no run or sweep")
    for path in paths.values():
        reader.read(path)
    entries = reader.entries()
    notes = reader.notes
    notes += [
        f"{entry.method} on {entry.task}: accuracy on val; there is none on test"
        for entry in entries
        if entry.split == "val"
    ]
    notes += [
        f"{entry.method} on {entry.task}: {entry.incomparable}; it is held against nothing published"
        for entry in entries
        if entry.incomparable and entry.task in TASKS and published_of(entry.backbone) is not None
    ]
    return entries, notes


class _Reader:
    """The sweeps and runs that have been read, and `notes` on folders that were left out."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._classes: dict[str, tuple[Path, list[str]]] = {}  # by task: its first folder, and its own
        self._sweeps: dict[Key, tuple[Path, Entry]] = {}
        self._runs: dict[Key, list[FinishedRun]] = {}
        self._images: dict[tuple[int, ...], tuple[int, ...]] = {}

    def entries(self) -> list[Entry]:
        of_sweeps = [entry for _, entry in self._sweeps.values()]
        return of_sweeps + [_run_entry(key, runs) for key, runs in self._runs.items()]

    def leave_out(self, path: Path, why: str) -> None:
        self.notes.append(f"{path}: {why}{LEFT_OUT}")

    def read(self, path: Path) -> None:
        """Reads the folder of a run, a sweep or an ablation, or of something else with a results.json."""
        if not (path / "results.json").exists():
            kind = "sweep" if (path / SWEEP_FILE).exists() else "run"
            self.leave_out(path, f"the {kind} is not finished")
            return
        results = read_json(path / "results.json")
        if results.get("kind") == "sweep" or "val_accuracy" in results:
            read = self._read_sweep if results.get("kind") == "sweep" else self._read_run
            try:
                read(path, results)
            except (TypeError, AttributeError, LookupError) as error:
                raise ValueError(f"{path} holds files that were changed: {error!r}") from error
        elif "ablation" in results:
            self.leave_out(path, "an ablation, whose points are sweeps below it")
        else:
            self.leave_out(path, "results.json is neither a sweep's nor a run's")

    def _read_sweep(self, path: Path, results: dict[str, Any]) -> None:
        require_keys(path / "results.json", results, *SWEEP_KEYS)
        if not results["finished"]:
            self.leave_out(path, "the sweep is not finished")
            return
        if results["final"]["mean"] is None:
            self.leave_out(path, "every final run of the sweep diverged")
            return
        try:
            entry = _sweep_entry(results)
        except ValueError as error:
            raise ValueError(f"{path / 'results.json'}: {error}") from None
        if diverged := results["final"]["diverged"]:
            self.notes.append(
                f"{entry.method} on {entry.task}: {len(diverged)} of {entry.runs + len(diverged)} final runs "
                "diverged; mean and standard deviation are of the others"
            )
        self._require_same_classes(entry.task, path, results["classes"])
        key = (entry.backbone, entry.method, entry.task)
        self._require_first(key, path, runs=self._runs.get(key, []))
        self._sweeps[key] = path, entry

    def _read_run(self, path: Path, results: dict[str, Any]) -> None:
        recipe = Recipe.from_yaml(RunFiles(path).config)
        if recipe.task == SEGMENTATION:
            self.leave_out(path, "a run of segmentation; tables are of classification")
            return
        facts = read_json(RunFiles(path).facts, "parameters", "data")
        require_keys(path / "results.json", results, "test_accuracy")
        key = (recipe.backbone, recipe.method, _task(recipe.task, recipe.data))
        self._require_same_classes(key[2], path, facts["data"]["classes"])
        self._require_first(key, path)
        images = _images_by_class(facts["data"])
        images = self._images.setdefault(images, images)  # most runs share them
        run = FinishedRun(path, recipe, results, facts["parameters"], images)
        self._runs.setdefault(key, []).append(run)

    def _require_same_classes(self, task: str, path: Path, classes: list[str]) -> None:
        """Raises ValueError if the data behind `path` have other classes than earlier data with the same
        name."""
        first, known = self._classes.setdefault(task, (path, classes))
        if classes != known:
            raise ValueError(
                f"{first} and {path} are of data that are called {task} and have other classes; tabulate one "
                "without the other"
            )

    def _require_first(self, key: Key, path: Path, runs: Sequence[FinishedRun] = ()) -> None:
        """Raises ValueError if a sweep that was read before has results of this method and task, or there are
        `runs` of them."""
        earlier = [self._sweeps[key][0]] if key in self._sweeps else [run.path for run in runs]
        if earlier:
            raise ValueError(
                f"{earlier[0]} and {path} both hold results of {key[1]} on {key[2]} with {key[0]}; tabulate "
                "one without the other"
            )


def _find(folder: Path) -> list[Path]:
    """`folder` if it is a run, a sweep or an ablation, finished or not; else those in it."""
    if not folder.exists():
        raise ValueError(f"{folder}: there is no such folder")
    if (folder / "results.json").exists():
        return [folder]
    begun = (RunFiles(folder).config.name, SWEEP_FILE)
    below = {path.parent for name in ("results.json", *begun) for path in folder.glob(f"*/{name}")}
    # Last: a folder of runs may hold a config.yaml that they were started with.
    return sorted(below) or [folder] * any((folder / name).exists() for name in begun)


def _task(task: str | None, data: str) -> str:
    return task or Path(data).expanduser().resolve().name


def _sweep_entry(results: dict[str, Any]) -> Entry:
    final = results["final"]
    deviation = final["standard_deviation"]
    named = {name: results[name] for name in ("data", "backbone", "method")}
    recipe = Recipe.from_dict({**named, **results["settings"], **(results["best"] or {}).get("params", {})})
    return Entry(
        method=recipe.method,
        task=_task(results["task"], results["data"]),
        backbone=recipe.backbone,
        accuracy=100 * final["mean"],
        standard_deviation=None if deviation is None else 100 * deviation,
        runs=len(final["accuracies"]),
        split=final["split"],
        stored=results["parameters"]["trained"],
        backbone_parameters=results["parameters"]["backbone"],
        prompt_location=recipe.prompt_location,
        incomparable=_incomparable(recipe),
    )


def _incomparable(recipe: Recipe) -> str | None:
    if recipe.pretrained is False and recipe.checkpoint is None:
        return f"{recipe.backbone} had no weights to begin with"
    return "trained on a part of the images" if recipe.trains_on_part else None


def _run_entry(key: Key, found: list[FinishedRun]) -> Entry:
    first, named = found[0].recipe, f"{key[1]} on {key[2]}"
    by_seed = {first.seed: found[0].path}
    for run in found[1:]:
        both, seed = f"{found[0].path} and {run.path}", run.recipe.seed
        if others := sorted(set(first.differences(run.recipe)) - {"seed"}):
            raise ValueError(f"{named} comes twice; {both} differ in {', '.join(others)}")
        if seed in by_seed:
            both = f"{by_seed[seed]} and {run.path}"
            raise ValueError(f"{named} comes twice with the seed {seed}, in {both}")
        by_seed[seed] = run.path
    split = "test" if all(run.results["test_accuracy"] is not None for run in found) else "val"
    values = [run.results[f"{split}_accuracy"] for run in found]
    if None in values:
        raise ValueError(f"{named}: of some runs there is neither test nor val accuracy")
    # Of a part of the images, it depends on the seed how many of them cannot be read.
    if not first.trains_on_part and len({run.images_by_class for run in found}) > 1:
        raise ValueError(f"{named}: the runs are of other images; tabulate them apart")
    parameters = found[0].parameters
    return Entry(
        method=key[1],
        task=key[2],
        backbone=key[0],
        accuracy=100 * statistics.fmean(values),
        standard_deviation=100 * statistics.stdev(values) if len(values) > 1 else None,
        runs=len(values),
        split=split,
        stored=parameters["trained"],
        backbone_parameters=parameters["backbone"],
        prompt_location=first.prompt_location,
        incomparable=_incomparable(first),
    )


def _images_by_class(data: dict[str, Any]) -> tuple[int, ...]:
    """Images per class in train and val together, since the seed decides how they are split."""
    counts = [data[split]["per_class"] for split in ("train", "val") if data[split] is not None]
    return tuple(sum(of_class) for of_class in zip(*counts, strict=True))
