"""Reading the files of the paper's tasks, in the layouts in common use.

VTAB-1k (Zhai et al., arXiv 1910.04867) as lists of images: `<root>/<task>/{train800,val200,test}.txt` with
lines such as `images/train800/000000.jpg 307`: a path relative to the task's folder, a space, a class number
from 0. NOAH, SSF, FacT, Convpass and others read this layout. FGVC as JSON:
`<root>/<task>/{train,val,test}.json`, each a mapping of image path to class id, as in KMnP/vpt. `root` may
also be the task's own folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt_fast.counting import counted

from .images import (
    DataError,
    ImageList,
    Splits,
    class_number,
    hold_out,
    read_class_names,
    read_json_file,
    read_text,
)
from .shards import holds_shards
from .tasks import Task

FGVC_VAL_FRACTION = 0.1  # of train, held out if there is no val.json: the paper's appendix


def find_task_folder(task: Task, root: Path) -> Path | None:
    """The folder in `root`, or `root` itself, that holds the task's list of training images; None if there is
    none."""
    listing = task.files["train"]
    candidates = [root / folder for folder in task.folders]
    # `root` itself comes last; a folder of tasks never holds such a list.
    return next((folder for folder in [*candidates, root] if (folder / listing).is_file()), None)


def open_task(task: Task, root: Path, *, holds_out: bool, seed: int) -> Splits:
    """The task's lists, checked against the task's definition; test is None if its list is missing.

    If an FGVC task has no list of val, a tenth of train is held out; without `holds_out`, val is None.

    Raises:
        DataError: files are missing or do not match the task; the message names the file and the line.
    """
    folder = find_task_folder(task, root)
    if folder is None:
        looked = f"{', '.join(f'{name}/' for name in task.folders)} and {root} itself"
        hint = ""
        if holds_shards(root) or any(holds_shards(root / name) for name in task.folders):
            hint = "; there are shards of a full data set: vpt-fast data prepare makes VTAB-1k lists of those"
        raise DataError(f"{root}: no {task.files['train']} of {task.name} in {looked}{hint}")
    found = read_task(task, folder)
    if found.problems:
        raise DataError(found.problems[0])
    return found.splits(holds_out=holds_out, seed=seed)


@dataclass(frozen=True)
class TaskList:
    """A list of a task.

    Attributes:
        path: of the list.
        expected: number of images that it must have.
        entries: for each image, its place in the list, its path relative to the task's image folder, and its
            class id; None if the list cannot be read.
    """

    path: Path
    expected: int
    entries: tuple[tuple[str, str, int], ...] | None


@dataclass(frozen=True)
class TaskFiles:
    """What a task's folder holds.

    Attributes:
        root: folder that the lists' paths are relative to.
        lists: split -> its list, for the splits that exist or must exist.
        ids: the class ids in the order of the labels.
        classes: their names.
        problems: everything that prevents using the task; each names the file, and the place in it.
    """

    root: Path
    lists: dict[str, TaskList]
    ids: tuple[int, ...]
    classes: tuple[str, ...]
    problems: tuple[str, ...]

    def splits(self, *, holds_out: bool, seed: int) -> Splits:
        """The splits of a task without problems, as `open_task` returns them.

        Raises:
            DataError: a class has too few images to hold one out.
        """
        label_of = {class_id: label for label, class_id in enumerate(self.ids)}
        found: dict[str, ImageList] = {}
        for split, listed in self.lists.items():
            assert listed.entries is not None and not self.problems
            items = tuple(self.root / name for _, name, _ in listed.entries)
            labels = tuple(label_of[class_id] for *_, class_id in listed.entries)
            found[split] = ImageList(items, labels, self.classes)
        train, val = found["train"], found.get("val")
        if is_drawn := val is None:
            where = self.lists["train"].path.parent
            train, val = hold_out(train, FGVC_VAL_FRACTION if holds_out else None, seed, where=where)
        return Splits(train, val, found.get("test"), is_drawn)


def read_task(task: Task, folder: Path) -> TaskFiles:
    """Reads every list of the task and checks that every listed file exists; decodes none."""
    is_vtab = task.suite == "vtab"
    required = ("train", "val") if is_vtab else ("train",)
    there = {s: folder / f for s, f in task.files.items() if s in required or (folder / f).exists()}
    sizes = task.sizes
    if "val" not in there:  # its images are then in train
        sizes["train"] += sizes["val"]
    problems: list[str] = []
    lists: dict[str, TaskList] = {}
    for split, path in there.items():
        entries = None
        try:
            entries = tuple(read_list(path, task.num_classes) if is_vtab else read_json(path))
        except DataError as error:
            problems.append(str(error))
        lists[split] = TaskList(path, sizes[split], entries)

    of_train = lists["train"].entries or ()
    if is_vtab:
        ids = tuple(range(task.num_classes))
        classes = tuple(map(str, ids))
        try:
            classes = _named_classes(task, folder / "classnames.txt") or classes
        except DataError as error:
            problems.append(str(error))
    else:
        # Class ids may start anywhere and have gaps (NABirds).
        ids = tuple(sorted({class_id for *_, class_id in of_train}))
        classes = _folder_names(of_train, ids)
        if of_train and len(ids) != task.num_classes:
            problems.append(
                f"{lists['train'].path}: {len(ids)} class ids; {task.name} has {task.num_classes} classes"
            )

    root = folder / task.image_folder
    for listed in lists.values():
        if listed.entries is not None:
            problems += _problems_of(task, listed, root, set(ids) if of_train else None)
    if "test" in lists and not problems:
        found = {class_id for listed in lists.values() for *_, class_id in listed.entries or ()}
        if len(found) != task.num_classes:
            problems.append(
                f"{folder}: images of {counted(len(found), 'class', 'classes')} in all; "
                f"{task.name} has {task.num_classes}"
            )
    return TaskFiles(root, lists, ids, classes, tuple(problems))


def _problems_of(task: Task, listed: TaskList, root: Path, ids: set[int] | None) -> list[str]:
    """What is wrong with a readable list; `ids` are the class ids of train, None if that is unreadable."""
    path, count, problems = listed.path, len(listed.entries), []
    if foreign := [] if ids is None else [entry for entry in listed.entries if entry[2] not in ids]:
        where, _, class_id = foreign[0]
        more = _more(len(foreign), count)
        problems.append(f"{path}, {where}: class id {class_id}, which no training image has{more}")
    if count != listed.expected:
        problems.append(
            f"{path}: {counted(count, 'image')}; this list of {task.name} has {listed.expected:,}"
        )
    if missing := _missing_files(root, listed.entries):
        where, name = missing[0]
        image = root / name
        what = "is a folder" if image.is_dir() else "is no file" if image.exists() else "is not there"
        problems.append(f"{path}, {where}: {image} {what}{_more(len(missing), count)}")
    return problems


def _more(found: int, of: int) -> str:
    return f", and {found - 1:,} more of {of:,}" if found > 1 else ""


def _missing_files(root: Path, entries: tuple[tuple[str, str, int], ...]) -> list[tuple[str, str]]:
    """(place, path) of the entries without a file. Lists each folder once instead of checking each file."""
    present: dict[Path, set[str]] = {}
    missing = []
    for where, name, _ in entries:
        path = root / name
        if path.parent not in present:
            found = os.scandir(path.parent) if path.parent.is_dir() else ()
            present[path.parent] = {entry.name for entry in found if entry.is_file()}
        if path.name not in present[path.parent]:
            missing.append((where, name))
    return missing


def _named_classes(task: Task, path: Path) -> tuple[str, ...] | None:
    classes = read_class_names(path, 1)
    if classes is not None and len(classes) != task.num_classes:
        raise DataError(
            f"{path}: {counted(len(classes), 'name')}; {task.name} has {task.num_classes} classes"
        )
    return classes


def read_list(path: Path, num_classes: int) -> list[tuple[str, str, int]]:
    """(place, image's path, label) of every line of a VTAB-1k list.

    Raises:
        DataError: the file is missing; a line is not a path and a class number, its class does not exist, or
            its image is a duplicate.
    """
    entries = []
    first: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, space, label = line.strip().rpartition(" ")
        name = name.strip()
        if not line.strip():
            continue
        class_id = class_number(label)
        if not space or class_id is None:
            raise DataError(
                f"{path}, line {number}: {line!r}; wanted an image's path, a space and a class number"
            )
        if class_id >= num_classes:
            raise DataError(f"{path}, line {number}: class {class_id}; wanted 0 to {num_classes - 1}")
        if name in first:
            raise DataError(f"{path}, line {number}: {name} again, as in line {first[name]}")
        first[name] = number
        entries.append((f"line {number}", name, class_id))
    return entries


def read_json(path: Path) -> list[tuple[str, str, int]]:
    """(place, image's path, class id) of every entry of an FGVC list.

    Raises:
        DataError: the file is missing, not JSON, or not a mapping of paths to class ids.
    """
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: wanted a mapping of image paths to class ids")
    entries = []
    for name, value in values.items():
        class_id = _whole_number(value)
        if class_id is None:
            raise DataError(f"{path}, {name!r}: class id {value!r}, wanted a whole number")
        entries.append((f"entry {name!r}", name, class_id))
    return entries


def _whole_number(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            return None
    return None


def _folder_names(entries: tuple[tuple[str, str, int], ...], ids: tuple[int, ...]) -> tuple[str, ...]:
    """The names of the classes' folders if each class has its own, else the ids."""
    folders: dict[int, set[str]] = {}
    for _, name, class_id in entries:
        folders.setdefault(class_id, set()).add(Path(name).parent.name)
    named = [next(iter(folders[class_id])) for class_id in ids]
    if all(len(found) == 1 for found in folders.values()) and len(set(named)) == len(named):
        return tuple(named)
    return tuple(str(class_id) for class_id in ids)
