"""Training, validation and test images of any kind of data that a recipe can name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vpt_fast.data_names import PREFIXES, is_factory_name

from .folder import LAYOUTS, open_folder
from .images import DataError, Splits
from .shards import holds_shards, open_shards
from .task_files import open_task
from .tasks import find_task

TRAIN_ON = ("train", "train+val")


def open_splits(
    data: str | os.PathLike[str],
    *,
    task: str | None = None,
    train_on: str = "train",
    with_test: bool = False,
    val_fraction: float = 0.2,
    data_root: str | None = None,
    seed: int = 0,
    on_shards: Callable[[int, int], None] | None = None,
) -> Splits:
    """Lists the images of `data`. None is decoded, except those of sequential data sets.

    Args:
        data: with `task`, the folder that holds it; else a folder of class folders (`open_folder`), a folder
            of WebDataset shards (`open_shards`), or a name of timm's data-set factory (`open_factory`).
        task: a name in `TASKS`, or one of its aliases.
        train_on: "train", or "train+val" to train on all images except test's; `val` is then None.
        with_test: whether there must be a test split.
        val_fraction: fraction of each class's training images to hold out if there is no val split; FGVC
            tasks have their own.
        data_root: folder that stores a data set of timm's factory.
        seed: 0 or more, for all random choices.
        on_shards: called while shards are listed, which takes seconds for a gigabyte of small images, with
            a number of bytes whenever these are done and those of all shards.

    Raises:
        DataError: the data cannot be used; the message names the path, what was found and what was wanted.
        ValueError: another argument cannot be used; the message names it.
    """
    if not os.fspath(data):  # pathlib takes "" to be the working directory
        raise ValueError("data: '', wanted a folder or the name of a data set")
    if data_root == "":
        raise ValueError("data_root: '', wanted a folder")
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on: {train_on!r}, wanted one of {', '.join(TRAIN_ON)}")
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction: {val_fraction}, wanted a number above 0 and below 1")
    if seed < 0:
        raise ValueError(f"seed: {seed}, wanted 0 or more")
    held_out = val_fraction if train_on == "train" else None
    splits = _open(data, task, with_test, held_out, data_root, seed, on_shards)
    if len(splits.classes) < 2:
        raise DataError(f"{data}: found one class, {splits.classes[0]!r}; wanted two or more")
    if with_test and splits.test is None:
        raise DataError(f"{data}: has no test split")
    train, val = splits.train, splits.val
    if train_on == "train+val" and val is not None:  # the data have their own val split
        train, val = train + val, None
    return Splits(train, val, splits.test, splits.val_is_drawn)


def _open(
    data: str | os.PathLike[str],
    task: str | None,
    with_test: bool,
    val_fraction: float | None,
    data_root: str | None,
    seed: int,
    on_shards: Callable[[int, int], None] | None,
) -> Splits:
    if task is None and is_factory_name(os.fspath(data)):
        from .factory import open_factory  # timm and torch, which the lists of a folder need not

        return open_factory(
            os.fspath(data), data_root, with_test=with_test, val_fraction=val_fraction, seed=seed
        )
    if data_root is not None:
        raise ValueError(
            f"data_root: goes with a data set of timm's ({', '.join(PREFIXES)}), not with {data}"
        )
    root = Path(data).expanduser()
    wanted = LAYOUTS if task is None else f"wanted the folder of {find_task(task).name}, or the one above it"
    if not root.exists():
        raise DataError(f"{root}: there is no such folder; {wanted}")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, not a folder; {wanted}")
    if task is not None:
        return open_task(find_task(task), root, holds_out=val_fraction is not None, seed=seed)
    if holds_shards(root):
        return open_shards(root, val_fraction=val_fraction, seed=seed, on_shards=on_shards)
    return open_folder(root, val_fraction=val_fraction, seed=seed)
