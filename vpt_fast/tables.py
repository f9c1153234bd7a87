"""Accuracies of many runs in the layout of the paper's Table 1, with the published ones."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt_fast.data import TASKS
from vpt_fast.parameters import PAPER_TOTALS
from vpt_fast.published import BACKBONE, PUBLISHED, Published, published_of
from vpt_fast.recipe import SEGMENTATION, Recipe
from vpt_fast.run import RunFolder

FORMATS = ("markdown", "csv", "latex")
GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))
OTHER = "other"  # the group of tasks that are not the paper's
BASELINE = "full"  # wins are counted against it
MISSING = "-"
SWEEP_FILE = "sweep.yaml"  # in a sweep's folder from its start
LEFT_OUT = "; left out"
SWEEP_KEYS = ("finished", "final", "best", "settings", "parameters", "method", "backbone", "task", "data")


@dataclass(frozen=True)
class Entry:
    """A method's accuracy on a task, in percent.

    standard_deviation: of a sample (n - 1), over `runs` runs; None for one run.
    split: that the accuracy is on: "test", or "val" if there was no test.
    stored: parameters stored for the task; backbone_parameters: of the backbone.
    prompt_location: of the prompts, if there are any.
    has_weights: whether the backbone had pretrained weights, published ones or a checkpoint's.
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
    has_weights: bool

    @property
    def published(self) -> Published | None:
        """Published numbers of the backbone with this prompt location; None for an accuracy on val or of a
        backbone without weights, to which none are comparable."""
        if self.split != "test" or not self.has_weights:
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
    """A run's folder, and what its config.yaml, run.json and results.json hold."""

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    results: dict[str, Any]


def read_entries(folders: Iterable[Path]) -> tuple[list[Entry], list[str]]:
    """Reads sweep folders, run folders, and folders of these; also returns notes on what was left out.

    Runs of one method and task that differ only in their seed are averaged. What is not finished, or is no
    run at all (`runs/*` may name anything), is left out; its note ends with `LEFT_OUT`.

    Raises:
        ValueError: there is no such folder, a method and task occur twice, or two data sets have the same
            name.
    """
    data: dict[str, tuple[Path, list[str]]] = {}  # by task: the first folder with it, and the classes there
    sweeps: dict[Key, Path] = {}
    entries: dict[Key, Entry] = {}
    runs: dict[Key, list[FinishedRun]] = {}
    notes: list[str] = []
    paths: list[Path] = []
    for folder in folders:
        found = _find(folder)
        paths += found
        if not found:
            notes.append(f"{folder}: holds no run or sweep{LEFT_OUT}")
    for path in paths:
        if not (path / "results.json").exists():
            kind = "sweep" if (path / SWEEP_FILE).exists() else "run"
            notes.append(f"{path}: the {kind} is not finished{LEFT_OUT}")
            continue
        results = _read(path / "results.json")
        if results.get("kind") == "sweep":
            _require(path / "results.json", results, *SWEEP_KEYS)
            if not results["finished"] or results["final"]["mean"] is None:
                notes.append(f"{path}: the sweep is not finished{LEFT_OUT}")
                continue
            entry = _sweep_entry(results)
            _require_same_classes(data, entry.task, path, results.get("classes"))
            key = (entry.backbone, entry.method, entry.task)
            _require_once(key, path, sweeps.get(key) or next((run.path for run in runs.get(key, ())), None))
            sweeps[key], entries[key] = path, entry
        elif "val_accuracy" in results:
            config = Recipe.from_yaml(RunFolder(path).config).to_dict()
            if config["task"] == SEGMENTATION:
                notes.append(f"{path}: a run of segmentation; tables are of classification{LEFT_OUT}")
                continue
            facts = _read(RunFolder(path).facts, "parameters")
            _require(path / "results.json", results, "test_accuracy")
            key = (config["backbone"], config["method"], _task(config))
            _require_same_classes(data, key[2], path, facts.get("data", {}).get("classes"))
            _require_once(key, path, sweeps.get(key))
            runs.setdefault(key, []).append(FinishedRun(path, config, facts, results))
        elif "ablation" in results:
            notes.append(f"{path}: an ablation, whose points are sweeps below it{LEFT_OUT}")
        else:
            notes.append(f"{path}: results.json is neither a sweep's nor a run's{LEFT_OUT}")
    for key, seeds in runs.items():
        entries[key] = _run_entry(key, seeds)
    notes += [
        f"{entry.method} on {entry.task}: accuracy on val, there was no test"
        for entry in entries.values()
        if entry.split == "val"
    ]
    notes += [
        f"{entry.method} on {entry.task}: {entry.backbone} had no weights to begin with, and is held against "
        "nothing published"
        for entry in entries.values()
        if not entry.has_weights and published_of(entry.backbone) is not None
    ]
    return list(entries.values()), notes


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping in a JSON file of a run or sweep; ValueError, which names the file, if it is not usable."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping")
    _require(path, values, *keys)
    return values


def _require(path: Path, values: dict[str, Any], *keys: str) -> None:
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")


def _find(folder: Path) -> list[Path]:
    """`folder` if it is a run, a sweep or an ablation, finished or not; else those in it."""
    if not folder.exists():
        raise ValueError(f"{folder}: there is no such folder")
    if (folder / "results.json").exists():
        return [folder]
    begun = (RunFolder(folder).config.name, SWEEP_FILE)
    below = {path.parent for name in ("results.json", *begun) for path in folder.glob(f"*/{name}")}
    # Last: a folder of runs may hold a config.yaml that they were started with.
    return sorted(below) or [folder] * any((folder / name).exists() for name in begun)


def _task(values: dict[str, Any]) -> str:
    return values["task"] or Path(values["data"]).expanduser().resolve().name


def _require_same_classes(
    data: dict[str, tuple[Path, list[str]]], task: str, path: Path, classes: list[str] | None
) -> None:
    """Raises ValueError if the data behind `path` have other classes than earlier data with the same name.

    classes: None if the results do not record them.
    """
    if classes is None:
        return
    first, known = data.setdefault(task, (path, classes))
    if classes != known:
        raise ValueError(
            f"{first} and {path} are of data that are called {task} and have other classes; tabulate one "
            "without the other"
        )


def _require_once(key: Key, path: Path, earlier: Path | None) -> None:
    """Raises ValueError if the folder `earlier` holds results of the same method and task as `path`."""
    if earlier is not None:
        raise ValueError(
            f"{earlier} and {path} both hold results of {key[1]} on {key[2]} with {key[0]}; tabulate one "
            "without the other"
        )


def _sweep_entry(results: dict[str, Any]) -> Entry:
    final = results["final"]
    deviation = final["standard_deviation"]
    settings = {**results["settings"], **(results["best"] or {}).get("params", {})}
    return Entry(
        method=settings.get("method", results["method"]),
        task=_task(results),
        backbone=settings.get("backbone", results["backbone"]),
        accuracy=100 * final["mean"],
        standard_deviation=None if deviation is None else 100 * deviation,
        runs=len(final["accuracies"]),
        split=final["split"],
        stored=results["parameters"]["trained"],
        backbone_parameters=results["parameters"]["backbone"],
        prompt_location=settings.get("prompt_location", Recipe.prompt_location),
        has_weights=_has_weights(settings),
    )


def _has_weights(settings: dict[str, Any]) -> bool:
    return settings.get("pretrained") is not False or settings.get("checkpoint") is not None


def _run_entry(key: Key, found: list[FinishedRun]) -> Entry:
    recipes = [Recipe.from_dict(run.config) for run in found]
    first, named = recipes[0], f"{key[1]} on {key[2]}"
    by_seed = {first.seed: found[0].path}
    for run, recipe in zip(found[1:], recipes[1:], strict=True):
        both = f"{found[0].path} and {run.path}"
        if others := sorted(set(first.differences(recipe)) - {"seed"}):
            raise ValueError(f"{named} comes twice; {both} differ in {', '.join(others)}")
        if recipe.seed in by_seed:
            both = f"{by_seed[recipe.seed]} and {run.path}"
            raise ValueError(f"{named} comes twice with the seed {recipe.seed}, in {both}")
        by_seed[recipe.seed] = run.path
    split = "test" if all(run.results["test_accuracy"] is not None for run in found) else "val"
    values = [run.results[f"{split}_accuracy"] for run in found]
    if None in values:
        raise ValueError(f"{named}: of some runs there is neither test nor val accuracy")
    if first.train_fraction == 1 and len({repr(_images_by_class(run.facts)) for run in found}) > 1:
        raise ValueError(f"{named}: the runs are of other images; tabulate them apart")
    parameters = found[0].facts["parameters"]
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
        has_weights=_has_weights(found[0].config),
    )


def _images_by_class(facts: dict[str, Any]) -> list[int] | None:
    """Images per class in train and val together, since the seed decides how they are split; None if they are
    not recorded."""
    data = facts.get("data", {})
    counts = [data[split]["per_class"] for split in ("train", "val") if data.get(split)]
    return [sum(of_class) for of_class in zip(*counts, strict=True)] if counts else None


@dataclass(frozen=True)
class Mean:
    """A method's mean over the `tasks` tasks of a group that have results.

    published: the published mean over `published_tasks` tasks: the same ones, or all of the group if single
        tasks were not published.
    wins: number of tasks on which the method is better than full fine-tuning.
    """

    accuracy: float
    published: float | None
    published_tasks: int
    tasks: int
    wins: int | None

    @property
    def difference(self) -> float | None:
        """Accuracy minus the published mean; None if they are not over the same tasks."""
        is_same = self.published is not None and self.published_tasks == self.tasks
        return self.accuracy - self.published if is_same else None


@dataclass(frozen=True)
class Row:
    """A method on a backbone: its entries by task, means by group, and the total parameters for all of its
    tasks in units of the backbone."""

    name: str
    method: str
    entries: dict[str, Entry]
    means: dict[str, Mean]
    total: float

    @property
    def is_papers(self) -> bool:
        """Whether its backbone is that of the paper's Table 1."""
        return published_of(self.backbone) is PUBLISHED[BACKBONE]

    @property
    def published_accuracies(self) -> dict[str, float]:
        """Published accuracies of the method on this backbone, also for tasks without an entry."""
        if not self._first.has_weights:
            return {}
        published = published_of(self.backbone, self._first.prompt_location)
        return published.accuracies.get(self.method, {}) if published is not None else {}

    @property
    def has_published_mean(self) -> bool:
        """Whether a published number stands against the row in the table of groups."""
        has_total = self.is_papers and self.method in PAPER_TOTALS
        return has_total or any(mean.published is not None for mean in self.means.values())

    @property
    def backbone(self) -> str:
        return self._first.backbone

    @property
    def _first(self) -> Entry:
        return next(iter(self.entries.values()))


def make_rows(entries: Sequence[Entry]) -> tuple[list[Row], list[str]]:
    """A row for each method and backbone, and notes on what they are compared with."""
    backbones = dict.fromkeys(entry.backbone for entry in entries)
    rows, notes = [], []
    for backbone in backbones:
        here = [entry for entry in entries if entry.backbone == backbone]
        full = {(entry.task, entry.split): entry.accuracy for entry in here if entry.method == BASELINE}
        published = published_of(backbone)
        of_the_papers = any(entry.task in TASKS for entry in here)
        if not full and published is not None and BASELINE in published.accuracies and of_the_papers:
            full = {(task, "test"): accuracy for task, accuracy in published.accuracies[BASELINE].items()}
            notes.append(f"wins are against {BASELINE} as published: there are no runs of it on {backbone}")
        if published is None and of_the_papers:
            notes.append(f"nothing was published of {backbone}, by this name, to hold its runs against")
        for method in dict.fromkeys(entry.method for entry in here):
            mine = {entry.task: entry for entry in here if entry.method == method}
            name = method if len(backbones) == 1 else f"{method}, {backbone}"
            size = next(iter(mine.values())).backbone_parameters
            total = (size + sum(entry.stored for entry in mine.values())) / size
            # Published accuracies are of pretrained backbones: without weights, only own runs are compared.
            has_baseline = any(entry.method == BASELINE for entry in here)
            against = full if has_baseline or all(entry.has_weights for entry in mine.values()) else {}
            means = {
                group: mean
                for group in (*GROUPS, OTHER)
                if (mean := _mean(method, group, _of_group(mine, group), against)) is not None
            }
            rows.append(Row(name, method, mine, means, total))
    return rows, notes


def _of_group(entries: dict[str, Entry], group: str) -> list[Entry]:
    if group == OTHER:
        return [entry for name, entry in entries.items() if name not in TASKS]
    return [entries[name] for name, task in TASKS.items() if task.group == group and name in entries]


def _mean(method: str, group: str, entries: list[Entry], full: dict[tuple[str, str], float]) -> Mean | None:
    """`full` holds the baseline's accuracies by task and split."""
    if not entries:
        return None
    published, published_tasks = _published_mean(method, group, entries)
    comparable = [entry for entry in entries if (entry.task, entry.split) in full]
    wins = sum(entry.accuracy > full[entry.task, entry.split] for entry in comparable)
    return Mean(
        statistics.fmean(entry.accuracy for entry in entries),
        published,
        published_tasks,
        len(entries),
        wins if comparable and method != BASELINE else None,
    )


def _published_mean(method: str, group: str, entries: list[Entry]) -> tuple[float | None, int]:
    """The method's published mean over a group, and its number of tasks. It is the published value if all
    tasks are present (single accuracies are rounded) or if no single accuracies were published."""
    of_all = entries[0].published.means.get(method, {}).get(group) if entries[0].published else None
    single = [entry.published_accuracy for entry in entries]
    known = [value for value in single if value is not None]
    of_one_source = all(entry.published is entries[0].published for entry in entries)
    if of_all is not None and of_one_source and (len(entries) == _tasks_of(group) or not known):
        return of_all, _tasks_of(group)
    return statistics.fmean(known) if len(known) == len(entries) else None, len(entries)


def _tasks_of(group: str) -> int:
    """The number of tasks that the paper has in a group."""
    return sum(task.group == group for task in TASKS.values())


def format_table(entries: Sequence[Entry], notes: Sequence[str], form: str) -> str:
    """The tables as text, in one of `FORMATS`."""
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}; it must be one of {', '.join(FORMATS)}")
    if not entries:
        raise ValueError("; ".join(["there are no finished runs to tabulate", *notes]))
    rows, more = make_rows(entries)
    if form == "csv":
        return _csv(rows)
    notes = [
        "Accuracy in percent; ± is the standard deviation of a sample (n - 1) over the seeds.",
        "Means are over the tasks that are there, published ones too unless they say of how many; in "
        "brackets: tasks better than full.",
        *notes,
        *more,
    ]
    sections = (_summary(rows), _tasks(rows))
    return (_markdown if form == "markdown" else _latex)(sections, notes)


Lines = list[list[str]]


def _summary(rows: list[Row]) -> Lines:
    groups = _groups(rows)
    lines = [["method", "total params", *(_group_title(group, rows) for group in groups)]]
    for row in rows:
        tasks = len(row.entries)
        paper = PAPER_TOTALS.get(row.method) if row.is_papers else None
        of_tasks = f"{tasks} task{'s' * (tasks != 1)}"
        cells: Lines = [[row.name, f"{row.total:.2f}× of {of_tasks}"], ["published"], ["difference"]]
        cells[1].append(MISSING if paper is None else f"{paper:.2f}× of 24 tasks")
        cells[2].append(f"{row.total - paper:+.2f}" if paper is not None and tasks == 24 else MISSING)
        for group in groups:
            mean = row.means.get(group)
            if mean is None:
                for line in cells:
                    line.append(MISSING)
                continue
            of = mean.tasks if group == OTHER else _tasks_of(group)
            missing = "" if mean.tasks == of else f", {mean.tasks} of {of} tasks"
            all_tasks = "" if mean.published_tasks == mean.tasks else f" of {of} tasks"
            wins = "" if mean.wins is None else f" ({mean.wins})"
            cells[0].append(f"{mean.accuracy:.2f}{wins}{missing}")
            cells[1].append(MISSING if mean.published is None else f"{mean.published:.2f}{all_tasks}")
            cells[2].append(MISSING if mean.difference is None else f"{mean.difference:+.2f}")
        lines += cells if row.has_published_mean else cells[:1]
    return lines


def _groups(rows: list[Row]) -> list[str]:
    """The paper's groups if any of its tasks is present, then the group of other tasks if there are any."""
    found = {group for row in rows for group in row.means}
    return [*(GROUPS if found - {OTHER} else ()), *([OTHER] if OTHER in found else [])]


def _group_title(group: str, rows: list[Row]) -> str:
    if group == OTHER:
        tasks = len({name for row in rows for name in row.entries} - TASKS.keys())
        return f"Other tasks ({tasks})"
    return f"{'FGVC' if group == 'fgvc' else group.capitalize()} ({_tasks_of(group)})"


def _tasks(rows: list[Row]) -> Lines:
    names = dict.fromkeys(task for row in rows for task in row.entries)
    groups = {TASKS[name].group for name in names if name in TASKS}
    shown = [name for name, task in TASKS.items() if task.group in groups]  # missing ones too
    lines = [["task"]]
    for row in rows:
        lines[0] += [row.name, *(["published", "difference"] if row.published_accuracies else [])]
    for name in [*shown, *(name for name in names if name not in TASKS)]:
        line = [name]
        for row in rows:
            entry = row.entries.get(name)
            published = entry.published_accuracy if entry else row.published_accuracies.get(name)
            if entry is None:
                line += ["missing"]
            else:
                spread = "" if entry.standard_deviation is None else f" ± {entry.standard_deviation:.2f}"
                line += [f"{entry.accuracy:.2f}{spread}"]
            if row.published_accuracies:
                difference = None if entry is None or published is None else entry.accuracy - published
                line += [MISSING if published is None else f"{published:.1f}"]
                line += [MISSING if difference is None else f"{difference:+.2f}"]
        lines.append(line)
    return lines


def _markdown(sections: Iterable[Lines], notes: Iterable[str]) -> str:
    tables = []
    for header, *body in sections:
        lines = [header, ["---"] * len(header), *body]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        tables.append("\n".join("| " + " | ".join(line) + " |" for line in escaped))
    return "\n\n".join([*tables, *notes]) + "\n"


_LATEX = {"×": r"$\times$", "±": r"$\pm$", "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
_LATEX |= {character: "\\" + character for character in "%_&#{}$"}


def _latex(sections: Iterable[Lines], notes: Iterable[str]) -> str:
    """LaTeX tables with booktabs."""

    def escaped(text: str) -> str:
        if text == MISSING:
            return "--"
        if re.fullmatch(r"[+-][\d.]+", text):  # in text, LaTeX sets a minus as a hyphen
            return f"${text}$"
        return "".join(_LATEX.get(character, character) for character in text)

    tables = [r"% needs \usepackage{booktabs}"]
    for header, *body in sections:
        lines = [" & ".join(map(escaped, line)) + r" \\" for line in (header, *body)]
        columns = "l" + "r" * (len(header) - 1)
        tables.append(
            "\n".join(
                [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
                + [r"\bottomrule", r"\end{tabular}"]
            )
        )
    return "\n\n".join([*tables, *map(escaped, notes)]) + "\n"


CSV_COLUMNS = (
    "method", "backbone", "of", "accuracy", "standard_deviation", "runs", "tasks", "split",
    "stored_parameters", "published", "difference", "wins",
)  # fmt: skip


def _csv(rows: list[Row]) -> str:
    """A line for each method and task, then for each method and group."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        named = {"method": row.method, "backbone": row.backbone}
        for entry in row.entries.values():
            published = entry.published_accuracy
            writer.writerow(
                named
                | {
                    "of": entry.task,
                    "accuracy": entry.accuracy,
                    "standard_deviation": entry.standard_deviation,
                    "runs": entry.runs,
                    "tasks": 1,
                    "split": entry.split,
                    "stored_parameters": entry.stored,
                    "published": published,
                    "difference": None if published is None else round(entry.accuracy - published, 6),
                }
            )
        for group, mean in row.means.items():
            writer.writerow(
                named
                | {
                    "of": group,
                    "accuracy": mean.accuracy,
                    "tasks": mean.tasks,
                    "published": mean.published,
                    "difference": None if mean.difference is None else round(mean.difference, 6),
                    "wins": mean.wins,
                }
            )
    return text.getvalue()
