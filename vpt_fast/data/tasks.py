"""The 24 tasks of the paper by name, 19 of VTAB-1k and 5 of FGVC; `task_files` reads their files.

Numbers of classes and images are those of Jia et al., "Visual Prompt Tuning", ECCV 2022, appendix, and of
VTAB.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

HOW_TO_GET = {
    "vtab": "images and lists of all 19 tasks: vtab-1k.zip, linked from github.com/ZhangYuanhan-AI/NOAH",
    "fgvc": "lists: github.com/KMnP/vpt links train.json, val.json and test.json",
}
"""Suite -> where the files that `task_files.open_task` reads are published."""

VTAB_FILES = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
FGVC_FILES = {"train": "train.json", "val": "val.json", "test": "test.json"}

# Normalised as in KMnP/vpt, whose recipe the defaults follow; code bases differ (docs/data.md).
PREPROCESSING = {
    "vtab": {"resize": "squash", "augment": "none", "normalization": "imagenet"},
    "fgvc": {"resize": "shortest", "augment": "crop_flip", "normalization": "imagenet"},
}
"""Suite -> default preprocessing, by the recipe's settings."""

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
        folders: possible names of the task's folder, the usual one first.
        image_folder: folder below the task's that the paths in its lists are relative to.
        source: where the images come from.
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
    folders = (name, *aliases)
    return Task(f"vtab/{name}", "vtab", group, num_classes, 800, 200, num_test, folders, "", f"tfds/{source}")


def _fgvc(
    name: str,
    num_classes: int,
    sizes: tuple[int, int, int],
    image_folder: str,
    source: str,
    aliases: tuple[str, ...],
) -> Task:
    folders = (name, *aliases)
    return Task(f"fgvc/{name}", "fgvc", "fgvc", num_classes, *sizes, folders, image_folder, source)


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
    """The task with this name, by suite and name ("vtab/cifar") or by another name of its folder
    ("cifar100").

    Raises:
        ValueError: there is none, and the message suggests close names; or the name is ambiguous.
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
