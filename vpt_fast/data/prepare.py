"""VTAB-1k lists of a task, made from its full data set.

VTAB-1k trains on the first 800 images of a task's training split and selects models on the first 200 of its
validation split, in the order of TensorFlow Datasets (google-research/task_adaptation). Its images are thus
ranges of these splits, and images taken from TensorFlow Datasets are the published ones. Shards of a full
data set hold the same images in an unspecified order: the first 800, the next 200 and the test images make a
task of the same form, with other training images. So do a set's original files, in an order drawn here.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from vpt_fast.counting import counted
from vpt_fast.files import lock_file, parse_json, remove_unfinished, replacing, unfinished, write, write_json

from .factory import class_names, open_set
from .images import DataError
from .set_files import SET_FILES, SetFiles, Writer, png_writer
from .shards import TarImage, holds_shards, read_shards
from .tasks import HOW_TO_GET, VTAB_FILES, Task
from .vtab_labels import LABEL_RULES, LabelRule

MANIFEST = "prepared.json"
LOCK = ".lock"  # stays there: whoever removed it could lock another file than the next process
_UNFINISHED_IMAGE = re.compile(r"\.\d{6,}(\.\w+)\.[a-z0-9_]{8}\1")  # as `files.replacing` names it
TFDS_RANGES = {
    "vtab/cifar": ("train[:800]", "train[45000:45200]", "test"),
    "vtab/caltech101": ("train[:800]", "train[2754:2954]", "test"),
    "vtab/dtd": ("train[:800]", "validation[:200]", "test"),
    "vtab/oxford_flowers102": ("train[:800]", "validation[:200]", "test"),
    "vtab/oxford_iiit_pet": ("train[:800]", "train[2944:3144]", "test"),
    "vtab/svhn": ("train[:800]", "train[65931:66131]", "test"),
    "vtab/sun397": ("train[:800]", "validation[:200]", "test"),
    "vtab/patch_camelyon": ("train[:800]", "validation[:200]", "test"),
    "vtab/eurosat": ("train[:800]", "train[16200:16400]", "train[21600:]"),
    "vtab/resisc45": ("train[:800]", "train[18900:19100]", "train[25200:]"),
    "vtab/diabetic_retinopathy": ("train[:800]", "validation[:200]", "test"),
    "vtab/clevr_count": ("train[:800]", "train[63000:63200]", "validation"),
    "vtab/clevr_dist": ("train[:800]", "train[63000:63200]", "validation"),
    "vtab/dmlab": ("train[:800]", "validation[:200]", "test"),
    "vtab/kitti": ("train[:800]", "validation[:200]", "test"),
    "vtab/dsprites_loc": ("train[:800]", "train[589824:590024]", "train[663552:]"),
    "vtab/dsprites_ori": ("train[:800]", "train[589824:590024]", "train[663552:]"),
    "vtab/smallnorb_azi": ("train[:800]", "test[:200]", "test[12150:]"),
    "vtab/smallnorb_ele": ("train[:800]", "test[:200]", "test[12150:]"),
}
"""Task -> the TensorFlow Datasets ranges of train800, val200 and test."""

_Sample = tuple[Writer, str, int]  # writes the image to a path; file extension; label


@dataclass(frozen=True)
class _Source:
    """The source that a task's images are taken from.

    Attributes:
        kind: "shards", "files", or the name of a data set.
        samples: split -> its images in order.
        sizes: split -> number of images; None if it is known only after reading them all.
        classes: class names, if the source has them.
        description: texts that identify these images and labels; `fingerprint` is their hash.
    """

    kind: str
    samples: dict[str, Iterator[_Sample]]
    sizes: dict[str, int] | None
    classes: tuple[str, ...]
    description: Iterable[str]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.description).encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    """A prepared task's folder; `is_published` tells whether its images are those that VTAB-1k published."""

    folder: Path
    images: int
    is_published: bool


def prepare_task(
    task: Task,
    source: str,
    out: Path,
    *,
    data_root: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Writes `out`/<task>/{train800,val200,train800val200,test}.txt and the images that they list.

    Each image is written completely or not at all, and the lists after all images, so the same call resumes
    an interrupted one. It also removes the temporary files of one that was killed.

    Args:
        source: timm's name of the task's data set in TensorFlow Datasets, such as "tfds/cifar100", already
            prepared in `data_root`; or a folder of shards; or, for the tasks in `LABEL_RULES`, a folder of
            the set's original files.
        progress: called with 1 after each image, also of those that were there already.

    Raises:
        ValueError: `source` is empty, or `data_root` is or does not go with it.
        DataError: the task is not defined by ranges of a data set; the source is another data set or has the
            wrong number of images; the folder was prepared from another source, by the fingerprint in its
            prepared.json, or holds files that were not prepared here; another process is preparing it.
    """
    if task.name not in TFDS_RANGES:
        why = "its lists name their images one by one"
        raise DataError(f"{task.name} cannot be prepared: {why}; {HOW_TO_GET[task.suite]}")
    if not source:  # pathlib takes "" to be the working directory
        raise ValueError("source: '', wanted the name of a data set or a folder")
    is_published = source == task.source
    if data_root is not None and not (is_published and data_root):
        raise ValueError(f"data_root: {data_root!r}, wanted a folder, and that only with {task.source}")
    files = SET_FILES.get(task.source)
    if is_published:
        found = _read_tfds(task, data_root)
    elif holds_shards(Path(source)):
        found = _read_shards(task, Path(source))
    elif files is not None and Path(source).is_dir():
        found = _read_files(task, files(Path(source)))
    else:
        original = "" if files is None else f", or a folder of {files.layout}"
        raise DataError(f"{source}: wanted {task.source}, a folder of shards of {task.name}{original}")
    for split, size in (found.sizes or {}).items():
        _require_size(source, task, split, size)
    folder = out / task.folders[0]
    manifest = {"task": task.name, "source": found.kind, "fingerprint": found.fingerprint}
    _has_begun(folder, manifest)  # before a lock file is written in a folder that is something else
    with _locked(folder) as is_alone:
        if is_alone:
            _remove_unfinished(folder)
        if not _has_begun(folder, manifest):
            write_json(folder / MANIFEST, manifest)
        done = _write(task, source, found, folder, progress)
    return Prepared(folder, done, is_published)


def _write(
    task: Task, source: str, found: _Source, folder: Path, progress: Callable[[int], None] | None
) -> int:
    """Writes the images that are not there yet and then the lists; returns the number of images."""
    done = 0
    lists = {}
    for split, samples in found.samples.items():
        file = VTAB_FILES[split]
        images = Path("images") / file.removesuffix(".txt")
        (folder / images).mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (save, ending, label) in enumerate(samples):
            path = images / f"{i:06d}{ending}"
            if not (folder / path).exists():
                with replacing(folder / path) as temporary:
                    save(temporary)
            lines.append(f"{path} {label}\n")
            done += 1
            if progress is not None:
                progress(1)
        _require_size(source, task, split, len(lines))
        lists[file] = "".join(lines)
    lists["train800val200.txt"] = lists[VTAB_FILES["train"]] + lists[VTAB_FILES["val"]]
    if len(found.classes) == task.num_classes:
        lists["classnames.txt"] = "".join(f"{name}\n" for name in found.classes)
    # train800.txt last: its presence marks the task as complete
    for file in sorted(lists, key=VTAB_FILES["train"].__eq__):
        write(folder / file, lists[file].encode())
    return done


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Creates the folder and locks it against other processes that prepare it.

    Yields whether it could be locked, which some network file systems cannot do.

    Raises:
        DataError: another process is preparing it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            is_alone = lock_file(lock, wait=False)
        except BlockingIOError:
            raise DataError(
                f"{folder}: another process is preparing it; wait for it, or choose another folder"
            ) from None
        yield is_alone


def _remove_unfinished(folder: Path) -> None:
    """Removes the temporary files that a killed process left; nobody else may be writing there."""
    lists = (*VTAB_FILES.values(), "train800val200.txt", "classnames.txt")
    remove_unfinished(*(folder / name for name in (MANIFEST, *lists)))
    for split in VTAB_FILES.values():
        for left in (folder / "images" / split.removesuffix(".txt")).glob(".*"):
            if _UNFINISHED_IMAGE.fullmatch(left.name):
                left.unlink(missing_ok=True)


def _require_size(source: str, task: Task, split: str, found: int) -> None:
    if found != task.sizes[split]:
        wanted = task.sizes[split]
        raise DataError(
            f"{source}: {counted(found, 'image')} for {VTAB_FILES[split]}; {task.name} has {wanted:,}"
        )


def _has_begun(folder: Path, manifest: dict[str, str]) -> bool:
    """Whether the folder's source is recorded; False for a new folder.

    Raises:
        DataError: the recorded source is not `manifest` (existing images are kept and new lists written for
            them, so both must be of one source), or there are files but no record.
    """
    path = folder / MANIFEST
    if path.exists():
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path}: is not JSON; remove {folder}, or choose another folder") from None
        if found != manifest:
            raise DataError(
                f"{folder}: holds images of another source, {found}, and not {manifest}; go on with that, "
                "choose another folder, or remove this one to prepare it anew"
            )
        return True
    if folder.exists() and {*folder.iterdir()} - {folder / LOCK, *unfinished(path)}:
        raise DataError(f"{folder}: holds files that were not prepared here; choose another folder")
    return False


def _read_tfds(task: Task, data_root: str | None) -> _Source:
    rule = LABEL_RULES.get(task.name)
    sets = {
        split: open_set(task.source, data_root, taken, None if rule is None else rule.field)
        for split, taken in zip(VTAB_FILES, TFDS_RANGES[task.name], strict=True)
    }
    rows = {split: _rows(dataset, rule) for split, dataset in sets.items()}
    classes = () if rule is not None else class_names(sets["train"], task.num_classes)
    # Name and version, such as "cifar100/3.0.2", determine the images and their order.
    versions = [str(dataset.reader.builder.info.full_name) for dataset in sets.values()]
    return _Source(task.source, rows, None, classes, versions)


def _rows(dataset: IterableDataset[Any], rule: LabelRule | None) -> Iterator[_Sample]:
    for image, value in dataset:
        if rule is not None and rule.scale != 1:
            image = Image.fromarray(np.asarray(image) * np.uint8(rule.scale))
        yield png_writer(image.convert("RGB")), ".png", int(value) if rule is None else rule.label(value)


def _read_files(task: Task, files: SetFiles) -> _Source:
    """The ranges of `TFDS_RANGES`, of each part's images in a random order: in the original order the first
    images may all be alike."""
    rule, generator = LABEL_RULES[task.name], np.random.default_rng(0)
    parts = {part: generator.permutation(files.parts[part]) for part in sorted(files.parts)}
    samples: dict[str, Iterator[_Sample]] = {}
    sizes: dict[str, int] = {}
    description: list[str] = []
    for split, taken in zip(VTAB_FILES, TFDS_RANGES[task.name], strict=True):
        part, numbers = _take(parts, taken)
        labels = [rule.label(files.field(rule.field, part, number)) for number in numbers]
        written = zip(files.images(part, numbers), labels, strict=True)
        samples[split] = ((save, ending, label) for (save, ending), label in written)
        sizes[split] = len(numbers)
        stored = [files.path(part, number) for number in numbers]
        bytes_of = {path: _size_of(path) for path in set(stored)}
        description += [
            f"{path.name} {bytes_of[path]} {number} {label}"
            for path, number, label in zip(stored, numbers, labels, strict=True)
        ]
    return _Source("files", samples, sizes, (), description)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None


def _take(parts: Mapping[str, np.ndarray], taken: str) -> tuple[str, list[int]]:
    """A range such as "train[:800]" -> its part's name and the image numbers in it, ascending."""
    part, _, ends = taken.rstrip("]").partition("[")
    start, _, stop = ends.partition(":")
    return part, sorted(parts[part][int(start or 0) : int(stop) if stop else None].tolist())


def _read_shards(task: Task, source: Path) -> _Source:
    found = read_shards(source)
    rule = LABEL_RULES.get(task.name)
    bins = None if rule is None or rule.binned_from is None else rule
    needed = task.num_train + task.num_val
    if len(found["train"]) < needed:
        raise DataError(f"{source}: {len(found['train']):,} training images; wanted {needed:,} or more")
    if "test" not in found:
        raise DataError(f"{source}: has no test shards")
    classes = found["train"].classes
    wanted = task.num_classes if bins is None else bins.binned_from
    if len(classes) != wanted:
        raise DataError(
            f"{source}: {counted(len(classes), 'class', 'classes')}; those of {task.name} have {wanted}"
        )
    order = list(range(needed))
    parts = {
        "train": found["train"].select(order[: task.num_train]),
        "val": found["train"].select(order[task.num_train :]),
        "test": found["test"],
    }
    rows: dict[str, list[tuple[Any, int]]] = {
        split: list(zip(images.items, images.labels, strict=True)) for split, images in parts.items()
    }
    return _Source(
        "shards",
        {split: _members(those, bins) for split, those in rows.items()},
        {split: len(those) for split, those in rows.items()},
        classes,
        [f"{item.name} {item.size} {label}" for those in rows.values() for item, label in those],
    )


def _members(rows: Iterable[tuple[Any, int]], bins: LabelRule | None) -> Iterator[_Sample]:
    """rows: of a `TarImage` and its label."""
    for item, label in rows:
        yield partial(_copy, item), Path(item.name).suffix, label if bins is None else bins.label(label)


def _copy(item: TarImage, path: Path) -> None:
    path.write_bytes(item.read())
