"""What a folder holds of a benchmark task, and what is missing: all problems, not only the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .images import DataError
from .shards import holds_shards
from .task_files import find_task_folder, read_task
from .tasks import TASKS, Task


@dataclass(frozen=True)
class SplitFound:
    """One list of a task: `images` is 0 if it cannot be read; `expected` is 0 for val if it is held out of
    train."""

    images: int
    expected: int


@dataclass(frozen=True)
class TaskFound:
    """A task in a folder: `folder`, an absolute path, is None if nothing of it was found; `splits` are those
    of its lists of train, val and test; `num_classes` counts the classes that occur in them."""

    task: Task
    folder: Path | None
    splits: tuple[SplitFound, ...]
    num_classes: int
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return not self.problems


def check_task(task: Task, root: Path) -> TaskFound:
    """Reads `task` below `root` as `open_task` does. Problems are what that would refuse, and a missing list
    of test images."""
    folder = find_task_folder(task, root)
    if folder is None:
        shards = [name for name in task.folders if holds_shards(root / name)]
        found = f"{shards[0]}/ holds shards of a full data set" if shards else "not found"
        return TaskFound(task, None, (), 0, (found,))
    folder = folder.absolute()  # that of "." has a name
    files = read_task(task, folder)
    problems = list(files.problems)
    if not problems:
        try:
            files.splits(holds_out=True, seed=0)
        except DataError as error:
            problems.append(str(error))
    if "test" not in files.lists:
        problems.append(f"{task.files['test']}: is missing")
    splits = []
    for split in task.files:
        listed = files.lists.get(split)
        if listed is not None:
            splits.append(SplitFound(len(listed.entries or ()), listed.expected))
        else:  # a missing val list is no problem for FGVC: a tenth of train is held out instead
            splits.append(SplitFound(0, 0 if split == "val" else task.sizes[split]))
    classes = {class_id for listed in files.lists.values() for *_, class_id in listed.entries or ()}
    # What is printed of a task names its folder once.
    shown = tuple(problem.replace(f"{folder}/", "").removeprefix(f"{folder}: ") for problem in problems)
    return TaskFound(task, folder, tuple(splits), len(classes), shown)


def find_tasks(root: Path) -> list[TaskFound]:
    """The tasks that `root` holds, or that `root` itself is. The latter goes by its name, since lists
    of several tasks have the same file names."""
    name = root.resolve().name.lower()
    found = []
    for task in TASKS.values():
        folder = find_task_folder(task, root)
        if folder is not None and (folder != root or name in {each.lower() for each in task.folders}):
            found.append(check_task(task, root))
    return found
