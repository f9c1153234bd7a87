"""vpt-fast data: check benchmark tasks on disk, or prepare a task's lists from a full data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from vpt_fast.commands.flags import (
    PATH,
    DebugFlag,
    LastingConsole,
    NameConsole,
    OutputConsole,
    one_line_errors,
    require_folder,
    require_folder_place,
)
from vpt_fast.commands.help import CommandApp
from vpt_fast.counting import counted
from vpt_fast.data.check import SplitFound, TaskFound, check_task, find_tasks
from vpt_fast.data.folder import holds_scenes
from vpt_fast.data.images import DataError
from vpt_fast.data.splits import open_splits
from vpt_fast.data.tasks import HOW_TO_GET, TASKS, find_task
from vpt_fast.training.bars import listing_shards, progress_bar

app = CommandApp(help="Check benchmark tasks on disk, or prepare them.")


@app.command()
def check(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the folders of the tasks.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task, or vtab or fgvc for a whole suite; may be repeated.",
            show_default="all that are found",
        ),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Report images, classes and missing files of the tasks in DIR. The exit status is 1 if any are missing.

    Files are checked for existence; no image is decoded. A DIR without any
    task is reported as train would read it.
    """
    with one_line_errors(debug):
        require_folder("DIR", root)
        suites = {each.suite: [t for t in TASKS.values() if t.suite == each.suite] for each in TASKS.values()}
        named = dict.fromkeys(each for name in task or () for each in suites.get(name) or [find_task(name)])
        shown = [check_task(each, root) for each in named] or find_tasks(root)
        console = OutputConsole()
        if not shown:
            try:
                console.print(_scenes_table(root) if holds_scenes(root) else _splits_table(root))
                return
            except DataError as error:
                said = f"none of the tasks, and {error}"
                console.print(said, highlight=False, markup=False, soft_wrap=True)
    if shown:
        console.print(_table(shown))
    for found in shown:  # not in the table, where names of files would be broken
        for problem in found.problems:
            console.print(f"{found.task.name}: {problem}", highlight=False, markup=False, soft_wrap=True)
    absent = [] if named else [t for t in TASKS.values() if t not in [each.task for each in shown]]
    if absent:
        console.print(f"not found: {', '.join(each.name for each in absent)}", highlight=False)
    lacking = absent + [each.task for each in shown if not each.is_complete]
    for suite in dict.fromkeys(each.suite for each in lacking):
        console.print(f"{suite}: {HOW_TO_GET[suite]}", highlight=False)
    for each in lacking if named else []:
        console.print(f"{each.name}: images from {each.source}", highlight=False)
    if not shown or not all(each.is_complete for each in shown):
        raise typer.Exit(1)


def _scenes_table(root: Path) -> Table:
    from vpt_fast.data.scenes import open_scenes  # which imports torch

    splits = open_scenes(root)
    table = Table("split", "images with masks", "classes")
    for name, scenes in (("train", splits.train), ("val", splits.val)):
        table.add_row(name, f"{len(scenes):,}", str(len(scenes.classes)))
    return table


def _splits_table(root: Path) -> Table:
    with listing_shards(NameConsole(stderr=True)) as on_shards:
        splits = open_splits(root, on_shards=on_shards)
    table = Table("split", "images", "classes")
    for name, images in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if images is not None:
            table.add_row(name, f"{len(images):,}", str(len(set(images.labels))))
    return table


def _table(found: list[TaskFound]) -> Table:
    # Two lines each, so that names are whole in a terminal of 80 columns.
    table = Table(Column("task\n  folder", overflow="fold"), "train", "val", "test", "classes", "missing")
    for each in found:
        splits = [_count(split) for split in each.splits]
        classes = f"{each.num_classes}" if each.folder else ""
        if each.folder and each.num_classes != each.task.num_classes:
            classes = f"{each.num_classes}/{each.task.num_classes}"
        table.add_row(
            f"{each.task.name}\n  {escape(each.folder.name)}" if each.folder else each.task.name,
            *(splits or ["", "", ""]),
            classes,
            "see below" if each.problems else "nothing",
        )
    return table


def _count(split: SplitFound) -> str:
    if split.expected == 0:  # val is a tenth of train
        return "of train"
    if split.images == split.expected:
        return f"{split.images:,}"
    return f"{split.images:,}/{split.expected:,}"


@app.command()
def prepare(
    task: Annotated[str, typer.Option(help="VTAB-1k task, such as vtab/cifar.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="The data set in TensorFlow Datasets, such as tfds/cifar100; or a folder with WebDataset "
            "shards, or with the original files of CLEVR, KITTI, dSprites or smallNORB.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder in which the task's folder is written.", **PATH)],
    data_root: Annotated[
        str | None,
        typer.Option(help="Folder of TensorFlow Datasets.", show_default="the library's own"),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Write the VTAB-1k splits of a task (800 + 200 training images, and test) from its full data set.

    Ctrl-C stops; the same command resumes. From TensorFlow Datasets, the
    images are those of VTAB-1k. From shards or original files, they are a
    different selection of the same kind.
    """
    with one_line_errors(debug):
        chosen = find_task(task)
        require_folder_place(out)
        from vpt_fast.data.prepare import prepare_task

        console = LastingConsole()
        total = sum(chosen.sizes.values())
        console.print(f"{chosen.name}: {total:,} images from {source}", highlight=False)
        with progress_bar(console, "writing", total) as advance:
            prepared = prepare_task(chosen, source, out, data_root=data_root, progress=advance)
    console.print(f"{counted(prepared.images, 'image')}: {prepared.folder}", highlight=False)
    if not prepared.is_published:
        console.print(
            "The training images are a choice of the same form, not those that VTAB-1k published: "
            "results are not comparable to published ones image by image.",
            style="yellow",
        )
