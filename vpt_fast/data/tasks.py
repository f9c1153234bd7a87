"""The 24 tasks of the paper by name: VTAB-1k's 19 and FGVC's 5, from the files that people have of them.

VTAB-1k (Zhai et al., arXiv 1910.04867) as lists of images: `<root>/<task>/{train800,val200,test}.txt`, a
line `images/train800/000000.jpg 307`: a path from the task's folder, a space, a class number from 0. This is
what NOAH, SSF, FacT, Convpass and others read. FGVC as JSON: `<root>/<task>/{train,val,test}.json`, each a
mapping of image path to class id, as KMnP/vpt reads it. `root` may also be the task's own folder.

Numbers of classes and images are those of Jia et al., "Visual Prompt Tuning", ECCV 2022, appendix, and of
VTAB.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .images import DataError, ImageList, Splits, hold_out
from .shards import holds_shards, read_class_names

HOW_TO_GET = {
    "vtab": "images and lists of all 19 tasks: vtab-1k.zip, linked from github.com/ZhangYuanhan-AI/NOAH",
    "fgvc": "lists: github.com/KMnP/vpt links train.json, val.json and test.json",
}
"""Suite -> where what `open_task` reads is published."""

VTAB_FILES = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
FGVC_FILES = {"train": "train.json", "val": "val.json", "test": "test.json"}
FGVC_VAL_FRACTION = 0.1  # of train, where no val.json says which: the paper's appendix
_SHOWN = 3


@dataclass(frozen=True)
class Task:
    """A task and what its files must hold.

    Attributes:
        name: as `--task` takes it, such as "vtab/cifar".
        suite: "vtab" or "fgvc".
        group: "natural", "specialized" or "structured" of VTAB; "fgvc".
        num_classes: classes.
        num_train, num_val, num_test: images in each split.
        folders: names of the task's folder that are looked for, the usual one first.
        image_folder: what the paths in its lists start from, below the task's folder.
        source: where the images come from.
        resize, augment, normalization: the preprocessing where a recipe does not say.
    """

    name: str
    suite: str
    group: str
    num_classes: int
    num_train: int
    num_val: int
    num_test: int
    folders: tuple[str, ...]
    image_folder: str
    source: str
    resize: str
    augment: str
    normalization: str

    @property
    def sizes(self) -> dict[str, int]:
        """Split -> images."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}

    @property
    def files(self) -> dict[str, str]:
        """Split -> name of the file that lists it."""
        return VTAB_FILES if self.suite == "vtab" else FGVC_FILES


def _vtab(
    name: str, group: str, num_classes: int, num_test: int, source: str, aliases: tuple[str, ...] = ()
) -> Task:
    # Normalised as KMnP/vpt does, whose recipe the defaults follow; code bases differ (docs/data.md).
    return Task(
        f"vtab/{name}",
        "vtab",
        group,
        num_classes,
        800,
        200,
        num_test,
        (name, *aliases),
        "",
        f"tfds/{source}",
        resize="squash",
        augment="none",
        normalization="imagenet",
    )


def _fgvc(
    name: str,
    num_classes: int,
    sizes: tuple[int, int, int],
    image_folder: str,
    source: str,
    aliases: tuple[str, ...],
) -> Task:
    return Task(
        f"fgvc/{name}",
        "fgvc",
        "fgvc",
        num_classes,
        *sizes,
        (name, *aliases),
        image_folder,
        source,
        resize="shortest",
        augment="crop_flip",
        normalization="imagenet",
    )


_ALL = (
    _vtab("cifar", "natural", 100, 10_000, "cifar100", ("cifar100",)),
    _vtab("caltech101", "natural", 102, 6_084, "caltech101"),
    _vtab("dtd", "natural", 47, 1_880, "dtd"),
    _vtab("oxford_flowers102", "natural", 102, 6_149, "oxford_flowers102", ("flowers102", "oxford_flowers")),
    _vtab("oxford_iiit_pet", "natural", 37, 3_669, "oxford_iiit_pet", ("oxford_pet", "pets")),
    _vtab("svhn", "natural", 10, 26_032, "svhn_cropped"),
    _vtab("sun397", "natural", 397, 21_750, "sun397/tfds"),
    _vtab("patch_camelyon", "specialized", 2, 32_768, "patch_camelyon", ("camelyon", "pcam")),
    _vtab("eurosat", "specialized", 10, 5_400, "eurosat/rgb"),
    _vtab("resisc45", "specialized", 45, 6_300, "resisc45", ("resisc",)),
    _vtab(
        "diabetic_retinopathy",
        "specialized",
        5,
        42_670,
        "diabetic_retinopathy_detection/btgraham-300",
        ("retinopathy",),
    ),
    _vtab("clevr_count", "structured", 8, 15_000, "clevr", ("clevr_count_all",)),
    _vtab(
        "clevr_dist", "structured", 6, 15_000, "clevr", ("clevr_distance", "clevr_closest_object_distance")
    ),
    _vtab("dmlab", "structured", 6, 22_735, "dmlab"),
    _vtab("kitti", "structured", 4, 711, "kitti", ("kitti_dist", "kitti_closest_vehicle_distance")),
    _vtab(
        "dsprites_loc",
        "structured",
        16,
        73_728,
        "dsprites",
        ("dsprites_location", "dsprites_label_x_position", "dsprites_xpos"),
    ),
    _vtab(
        "dsprites_ori",
        "structured",
        16,
        73_728,
        "dsprites",
        ("dsprites_orientation", "dsprites_label_orientation"),
    ),
    _vtab(
        "smallnorb_azi",
        "structured",
        18,
        12_150,
        "smallnorb",
        ("smallnorb_azimuth", "smallnorb_label_azimuth"),
    ),
    _vtab(
        "smallnorb_ele",
        "structured",
        9,
        12_150,
        "smallnorb",
        ("smallnorb_elevation", "smallnorb_label_elevation"),
    ),
    _fgvc(
        "cub",
        200,
        (5_394, 600, 5_794),
        "images",
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        ("CUB_200_2011", "CUB", "CUB-200-2011"),
    ),
    _fgvc(
        "nabirds",
        555,
        (21_536, 2_393, 24_633),
        "images",
        "https://dl.allaboutbirds.org/nabirds",
        ("NABirds", "NABirds-555"),
    ),
    _fgvc(
        "flowers",
        102,
        (1_020, 1_020, 6_149),
        "",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        ("OxfordFlowers", "OxfordFlower", "oxford_flowers", "Flowers"),
    ),
    _fgvc(
        "dogs",
        120,
        (10_800, 1_200, 8_580),
        "Images",
        "http://vision.stanford.edu/aditya86/ImageNetDogs",
        ("StanfordDogs", "stanford-dogs", "stanford_dogs", "Dogs"),
    ),
    _fgvc(
        "cars",
        196,
        (7_329, 815, 8_041),
        "",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        ("StanfordCars", "stanford-cars", "stanford_cars", "Cars"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Name -> task, in the order of the paper's tables."""


def find_task(name: str) -> Task:
    """The task of that name, with its suite ("vtab/cifar") or another name of its folder ("cifar100").

    Raises:
        ValueError: there is none, with close names, or two suites have it.
    """
    if name in TASKS:
        return TASKS[name]
    suite, slash, alias = name.rpartition("/")
    wanted = alias.lower()
    matches = [
        task
        for task in TASKS.values()
        if (not slash or task.suite == suite.lower())
        and wanted in {folder.lower() for folder in (task.name.split("/")[1], *task.folders)}
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"task is {name!r}; wanted one of {', '.join(task.name for task in matches)}")
    known = {f"{task.suite}/{folder}": task.name for task in TASKS.values() for folder in task.folders}
    known |= {folder: task.name for task in TASKS.values() for folder in task.folders}
    near = dict.fromkeys(
        known[match] for match in difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.5)
    )
    close = f"close names: {', '.join(near)}" if near else f"the tasks are {', '.join(TASKS)}"
    raise ValueError(f"task is {name!r}, which there is none of; {close}")


def find_task_folder(task: Task, root: Path) -> Path | None:
    """`root` or the folder in it that holds the task's list of training images; None where there is none."""
    listing = task.files["train"]
    candidates = [root / folder for folder in task.folders]
    # The task's own folder last: a folder of tasks never holds such a list itself.
    return next((folder for folder in [*candidates, root] if (folder / listing).is_file()), None)


def open_task(task: Task, root: Path, *, holds_out: bool, seed: int) -> Splits:
    """The task's lists, checked against what the task is; test is None where its list is not there.

    Where FGVC has no list of val, a tenth of train is val, or with `holds_out` false val is None.

    Raises:
        DataError: files are missing or hold something else than the task; the text says which, and which
            line.
    """
    folder = find_task_folder(task, root)
    if folder is None:
        looked = f"{', '.join(f'{name}/' for name in task.folders)} and {root} itself"
        hint = ""
        if holds_shards(root) or any(holds_shards(root / name) for name in task.folders):
            hint = "; there are shards of a full data set: vpt-fast data prepare makes VTAB-1k lists of those"
        raise DataError(f"{root}: no {task.files['train']} of {task.name} in {looked}{hint}")
    splits = _open_vtab(task, folder) if task.suite == "vtab" else _open_fgvc(task, folder, holds_out, seed)
    if splits.test is not None:
        found = [images for images in (splits.train, splits.val, splits.test) if images is not None]
        classes = {label for images in found for label in images.labels}
        if len(classes) != task.num_classes:
            raise DataError(
                f"{folder}: images of {len(classes)} classes in all; {task.name} has {task.num_classes}"
            )
    return splits


def _open_vtab(task: Task, folder: Path) -> Splits:
    classes = read_class_names(folder / "classnames.txt", task.num_classes)
    classes = classes or tuple(str(label) for label in range(task.num_classes))
    if len(classes) != task.num_classes:
        raise DataError(
            f"{folder / 'classnames.txt'}: {len(classes)} names; {task.name} has {task.num_classes} classes"
        )
    found: dict[str, ImageList] = {}
    for split, file in task.files.items():
        path = folder / file
        if split == "test" and not path.exists():
            continue
        entries = read_list(path, task.num_classes)
        _require_size(task, path, len(entries), task.sizes[split])
        _require_files(path, folder, [(f"line {number}", name) for number, name, _ in entries])
        found[split] = ImageList(
            tuple(folder / name for _, name, _ in entries), tuple(label for *_, label in entries), classes
        )
    return Splits(found["train"], found["val"], found.get("test"))


def read_list(path: Path, num_classes: int) -> list[tuple[int, str, int]]:
    """(line, image's path, label) of every line of a VTAB-1k list.

    Raises:
        DataError: the file is missing; a line is no path and class number, or its number is no class's.
    """
    entries = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        name, space, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not space or not label.isdecimal():
            raise DataError(
                f"{path}, line {number}: {line!r}; wanted an image's path, a space and a class number"
            )
        if int(label) >= num_classes:
            raise DataError(f"{path}, line {number}: class {label}; wanted 0 to {num_classes - 1}")
        entries.append((number, name.strip(), int(label)))
    return entries


def _open_fgvc(task: Task, folder: Path, holds_out: bool, seed: int) -> Splits:
    listed = {
        split: read_json(folder / file)
        for split, file in task.files.items()
        if split == "train" or (folder / file).exists()
    }
    # The class ids of a data set may start anywhere and leave gaps (NABirds').
    ids = sorted(set(listed["train"].values()))
    if len(ids) != task.num_classes:
        raise DataError(
            f"{folder / task.files['train']}: {len(ids)} class ids; "
            f"{task.name} has {task.num_classes} classes"
        )
    sizes = dict(task.sizes)
    if "val" not in listed:
        sizes["train"] += sizes["val"]
    index = {class_id: label for label, class_id in enumerate(ids)}
    classes = _class_names(listed["train"], ids)
    root = folder / task.image_folder
    found: dict[str, ImageList] = {}
    for split, entries in listed.items():
        path = folder / task.files[split]
        for name, class_id in entries.items():
            if class_id not in index:
                raise DataError(f"{path}, {name!r}: class id {class_id}, which no training image has")
        _require_size(task, path, len(entries), sizes[split])
        _require_files(path, root, [("entry " + repr(name), name) for name in entries])
        labels = tuple(index[class_id] for class_id in entries.values())
        found[split] = ImageList(tuple(root / name for name in entries), labels, classes)
    train, val = found["train"], found.get("val")
    if val is None:
        train, val = hold_out(train, FGVC_VAL_FRACTION if holds_out else None, seed, where=folder)
    return Splits(train, val, found.get("test"))


def read_json(path: Path) -> dict[str, int]:
    """Image path -> class id, of a FGVC list.

    Raises:
        DataError: the file is missing, no JSON, or no such mapping.
    """
    try:
        values: Any = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: is not JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: wanted a mapping of image paths to class ids")
    entries = {}
    for name, value in values.items():
        try:
            entries[name] = int(value)
        except (TypeError, ValueError):
            raise DataError(f"{path}, {name!r}: class id {value!r}, wanted a whole number") from None
    return entries


def _class_names(entries: dict[str, int], ids: list[int]) -> tuple[str, ...]:
    """Names of the folders that the classes' images lie in, where each class has its own; else the ids."""
    folders: dict[int, set[str]] = {}
    for name, class_id in entries.items():
        folders.setdefault(class_id, set()).add(Path(name).parent.name)
    named = [next(iter(folders[class_id])) for class_id in ids]
    if all(len(found) == 1 for found in folders.values()) and len(set(named)) == len(named):
        return tuple(named)
    return tuple(str(class_id) for class_id in ids)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text") from None


def _require_size(task: Task, path: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"{path}: {found:,} images; this list of {task.name} has {wanted:,}")


def _require_files(path: Path, root: Path, entries: list[tuple[str, str]]) -> None:
    missing = missing_files(root, entries)
    if missing:
        more = f", and {len(missing) - 1:,} more of {len(entries):,}" if len(missing) > 1 else ""
        raise DataError(f"{path}, {missing[0][0]}: {root / missing[0][1]} is not there{more}")


def missing_files(root: Path, entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of (place in a list, path from `root`), those with no file. Asks for folders, not file by file."""
    present: dict[Path, set[str]] = {}
    missing = []
    for where, name in entries:
        path = root / name
        if path.parent not in present:
            present[path.parent] = {p.name for p in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in present[path.parent]:
            missing.append((where, name))
    return missing
