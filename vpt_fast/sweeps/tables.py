"""Accuracies of many runs in the layout of the paper's Table 1, with the published ones."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vpt_fast.counting import counted
from vpt_fast.data.tasks import TASKS
from vpt_fast.sweeps.entries import Entry
from vpt_fast.sweeps.published import BACKBONE, PAPER_TOTALS, PUBLISHED, published_of
from vpt_fast.training.method_rules import parse_method

FORMATS = ("markdown", "csv", "latex")
GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))
OTHER = "other"  # the group of tasks that are not the paper's
BASELINE = "full"  # wins are counted against it
MISSING = "-"


@dataclass(frozen=True)
class Mean:
    """A method's mean over the `tasks` tasks of a group that have results.

    published: the published mean over `published_tasks` tasks: the same ones, or all of the group if single
        tasks were not published.
    wins: number of tasks on which the method is better than full fine-tuning, of the `compared` ones that can
        be held against a result of it; None if there are none.
    """

    accuracy: float
    published: float | None
    published_tasks: int
    tasks: int
    wins: int | None
    compared: int

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
        if all(entry.incomparable for entry in self.entries.values()):
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
        has_own = bool(full)
        published = published_of(backbone)
        of_the_papers = [entry for entry in here if entry.task in TASKS]
        comparable = any(entry.incomparable is None for entry in of_the_papers)
        if not has_own and published is not None and BASELINE in published.accuracies and comparable:
            full = {(task, "test"): accuracy for task, accuracy in published.accuracies[BASELINE].items()}
            notes.append(f"wins are against {BASELINE} as published: there are no runs of it on {backbone}")
        if published is None and of_the_papers:
            notes.append(f"nothing was published of {backbone}, by this name, to hold its runs against")
        for method in dict.fromkeys(entry.method for entry in here):
            mine = {entry.task: entry for entry in here if entry.method == method}
            name = method if len(backbones) == 1 else f"{method}, {backbone}"
            size = next(iter(mine.values())).backbone_parameters
            shared = 0 if parse_method(method).rule.stores_backbone else size
            total = (shared + sum(entry.stored for entry in mine.values())) / size
            means = {
                group: mean
                for group in (*GROUPS, OTHER)
                if (mean := _mean(method, group, _of_group(mine, group), full, has_own)) is not None
            }
            rows.append(Row(name, method, mine, means, total))
    return rows, notes


def _of_group(entries: dict[str, Entry], group: str) -> list[Entry]:
    if group == OTHER:
        return [entry for name, entry in entries.items() if name not in TASKS]
    return [entries[name] for name, task in TASKS.items() if task.group == group and name in entries]


def _mean(
    method: str, group: str, entries: list[Entry], full: dict[tuple[str, str], float], has_own: bool
) -> Mean | None:
    """`full` holds the baseline's accuracies by task and split: of own runs, or published ones."""
    if not entries:
        return None
    published, published_tasks = _published_mean(method, group, entries)
    # What nothing published is comparable to is held against own runs alone.
    comparable = [
        entry
        for entry in entries
        if (entry.task, entry.split) in full and (has_own or entry.incomparable is None)
    ]
    wins = sum(entry.accuracy > full[entry.task, entry.split] for entry in comparable)
    return Mean(
        statistics.fmean(entry.accuracy for entry in entries),
        published,
        published_tasks,
        len(entries),
        wins if comparable and method != BASELINE else None,
        len(comparable),
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
    """The tables as text, in one of `FORMATS`. Raises ValueError for another, or if there are no entries."""
    if form not in FORMATS:
        raise ValueError(f"format is {form!r}; it must be one of {', '.join(FORMATS)}")
    if not entries:
        raise ValueError("; ".join(["there are no finished runs to tabulate", *notes]))
    rows, more = make_rows(entries)
    if form == "csv":
        return _csv(rows)
    means = [mean for row in rows for mean in row.means.values()]
    of_published = any(mean.published is not None for mean in means)
    of_wins = any(mean.wins is not None for mean in means)
    of_fewer = any(mean.wins is not None and mean.compared < mean.tasks for mean in means)
    notes = [
        "Accuracy in percent; ± is the standard deviation of a sample (n - 1) over the seeds.",
        "Means are over the tasks that are there"
        + (", published ones too unless they say of how many" if of_published else "")
        + (f"; in brackets behind a mean: tasks better than {BASELINE}" if of_wins else "")
        + (", of those that can be held against it where not all can" if of_fewer else "")
        + ".",
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
        of_tasks = counted(tasks, "task")
        cells: Lines = [[row.name, f"{row.total:.2f}× of {of_tasks}"], ["published"], ["difference"]]
        cells[1].append(MISSING if paper is None else f"{paper:.2f}× of {len(TASKS)} tasks")
        is_of_same = row.entries.keys() == TASKS.keys()
        cells[2].append(f"{row.total - paper:+.2f}" if paper is not None and is_of_same else MISSING)
        for group in groups:
            mean = row.means.get(group)
            if mean is None:
                for line in cells:
                    line.append(MISSING)
                continue
            of = mean.tasks if group == OTHER else _tasks_of(group)
            missing = "" if mean.tasks == of else f", {mean.tasks} of {of} tasks"
            all_tasks = "" if mean.published_tasks == mean.tasks else f" of {of} tasks"
            compared = "" if mean.compared == mean.tasks else f" of {mean.compared}"
            wins = "" if mean.wins is None else f" ({mean.wins}{compared})"
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
        escaped = ([cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines)
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
    "compared",
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
                    "compared": None if mean.wins is None else mean.compared,
                }
            )
    return text.getvalue()
