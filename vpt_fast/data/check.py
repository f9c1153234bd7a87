"""What there is of a benchmark task in a folder, and what is missing: all of it, not the first fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .images import DataError
from .shards import holds_shards
from .tasks import Task, find_task_folder, missing_files, read_json, read_list

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class SplitFound:
    """One list of a task: `images` is None where it cannot be read, `problems` say why; `expected` is 0 where
    train stands in for val."""

    split: str
    images: int | None
    expected: int
    classes: frozenset[int]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TaskFound:
    """A task in a folder: `folder` is None where there is nothing of it."""

    task: Task
    folder: Path | None
    splits: tuple[SplitFound, ...]
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return self.folder is not None and not self.problems

    @property
    def num_classes(self) -> int:
        return len(frozenset[int]().union(*(found.classes for found in self.splits)))


def check_task(task: Task, root: Path) -> TaskFound:
    """Reads every list of `task` below `root` and asks for every file that they name; decodes none."""
    folder = find_task_folder(task, root)
    if folder is None:
        shards = [name for name in task.folders if holds_shards(root / name)]
        found = f"{shards[0]}/ holds shards of a full data set" if shards else "not found"
        return TaskFound(task, None, (), (found,))
    splits = tuple(_check_split(task, folder, split) for split in task.files)
    problems = [problem for found in splits for problem in found.problems]
    result = TaskFound(task, folder, splits, ())
    if not problems and result.num_classes != task.num_classes:
        problems.append(f"{result.num_classes} classes in all; wanted {task.num_classes}")
    return TaskFound(task, folder, splits, tuple(problems))


def find_tasks(root: Path, tasks: Iterable[Task]) -> list[TaskFound]:
    """Those of `tasks` that `root` holds, or that it is by its name: each list would fit several tasks."""
    name = root.resolve().name.lower()
    found = [check_task(task, root) for task in tasks]
    return [
        each
        for each in found
        if each.folder is not None
        and (each.folder != root or name in {folder.lower() for folder in each.task.folders})
    ]


def _check_split(task: Task, folder: Path, split: str) -> SplitFound:
    path = folder / task.files[split]
    expected = task.sizes[split]
    if task.suite == "fgvc" and not (folder / task.files["val"]).exists():
        # A tenth of train is held out in place of val: that is as good.
        if split == "val":
            return SplitFound(split, 0, 0, frozenset(), ())
        if split == "train":
            expected += task.num_val
    try:
        if task.suite == "vtab":
            lines = read_list(path, task.num_classes)
            entries = [(f"line {number}", name) for number, name, _ in lines]
            classes = frozenset(label for *_, label in lines)
        else:
            mapping = read_json(path)
            entries = [(repr(name), name) for name in mapping]
            classes = frozenset(mapping.values())
    except DataError as error:
        return SplitFound(split, None, expected, frozenset(), (str(error),))
    problems = []
    if len(entries) != expected:
        problems.append(f"{path.name}: {len(entries):,} images; wanted {expected:,}")
    if missing := missing_files(folder / task.image_folder, entries):
        named = ", ".join(name for _, name in missing[:_NAMES_SHOWN])
        more = f" and {len(missing) - _NAMES_SHOWN:,} more" if len(missing) > _NAMES_SHOWN else ""
        problems.append(f"{path.name}: missing {named}{more}")
    return SplitFound(split, len(entries), expected, classes, tuple(problems))
