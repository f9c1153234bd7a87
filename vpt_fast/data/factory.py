"""Data sets by the names that timm's factory gives them: torch/…, hfds/…, hfids/…, wds/…, tfds/…."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from .decode import decoding, upright_rgb
from .images import (
    MOST_CLASSES,
    DataError,
    ImageItem,
    ImageList,
    Splits,
    hold_out,
    open_image,
    run_no_other_program,
)
from .resident import host_budget

_LABEL_FIELDS = ("targets", "labels", "_labels")  # their names in torchvision's data sets


@dataclass(frozen=True)
class Row:
    """An image of a data set with random access."""

    dataset: Any = dataclasses.field(repr=False)
    index: int
    split: str

    def __str__(self) -> str:
        return f"{self.split}[{self.index}]"

    def open(self) -> Image.Image:
        # timm's dataset returns the next image in place of a broken one; its reader does not.
        reader = getattr(self.dataset, "reader", None)
        if reader is not None:
            return open_image(reader[self.index][0])
        run_no_other_program()  # this may be another process than the one that opened the set
        return self.dataset[self.index][0]


@dataclass(frozen=True, eq=False)
class HeldImage:
    """An image of a sequential data set, held decoded."""

    pixels: np.ndarray  # (h, w, 3) uint8
    name: str

    def __str__(self) -> str:
        return self.name

    def open(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def open_factory(
    name: str, root: str | None, *, with_test: bool, val_fraction: float | None, seed: int
) -> Splits:
    """The set's train split, divided like a folder's, and with `with_test` its test split.

    Only sets of the Hugging Face hub (hfds/, hfids/) are downloaded. A set that can only be read sequentially
    (hfids/, wds/, tfds/) is decoded and held in memory.

    Raises:
        DataError: the set cannot be opened, is too large to be held, or its rows have no class numbers.
    """
    all_train = _read(name, root, "train")
    train, val = hold_out(all_train, val_fraction, seed, where=name)
    test = _read(name, root, "test") if with_test else None
    if test is not None and test.classes != train.classes:
        # If classes are numbered, for lack of names, test may have fewer: the last ones may not occur there.
        if train.classes[: len(test.classes)] != test.classes:
            raise DataError(f"{name}: the test split has other classes than train")
        test = ImageList(test.items, test.labels, train.classes)
    return Splits(train, val, test, val_is_drawn=True)


def open_set(name: str, root: str | None, split: str, label_field: str | None = None) -> Any:
    """timm's data set; `label_field` names the field to use as label, None the default one. Where it, or
    torchvision, opens images itself, `run_no_other_program` holds.

    Raises:
        DataError: it cannot be opened.
    """
    run_no_other_program()
    try:
        options: dict[str, Any] = {} if label_field is None else {"target_key": label_field}
        if not name.startswith("tfds/"):  # which has decoded its images
            options["input_img_mode"] = ""  # images as they are stored, for `upright_rgb`
        dataset = create_dataset(name, root=root, split=split, is_training=False, download=False, **options)
    # Each library behind timm raises its own exceptions for a set that does not exist.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{place(name, root, split)}: cannot be opened: {reason} (only hfds/ and hfids/ are downloaded)"
        ) from error
    # Where several processes train, timm's readers of streams give each of them a part of the set. Here all
    # have to list the same images: `Batches` divides these among the processes.
    reader = getattr(dataset, "reader", None)
    if hasattr(reader, "dist_num_replicas"):
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset


def place(name: str, root: str | None, split: str) -> str:
    return f"{name}, split {split}" + (f", in {root}" if root else "")


def _read(name: str, root: str | None, split: str) -> ImageList:
    dataset = open_set(name, root, split)
    where = place(name, root, split)
    items: tuple[ImageItem, ...]
    if isinstance(dataset, IterableDataset):
        items, labels = _hold(dataset, split, where)
    else:
        labels = _labels(dataset, where)
        items = tuple(Row(dataset, i, split) for i in range(len(labels)))
    if not labels:
        raise DataError(f"{where}: has no images")
    if min(labels) < 0:
        raise DataError(f"{where}: image {labels.index(min(labels))} has no class number")
    if (highest := max(labels)) >= MOST_CLASSES:
        raise DataError(
            f"{where}: image {labels.index(highest)} has the class number {highest}, wanted one below "
            f"{MOST_CLASSES:,}"
        )
    return ImageList(items, tuple(labels), class_names(dataset, max(labels) + 1))


def _labels(dataset: Any, where: str) -> list[int]:
    """The labels of all rows, without decoding an image."""
    reader = getattr(dataset, "reader", None)
    if reader is not None:  # timm's, of the Hugging Face hub's data sets
        try:
            column = reader.dataset[reader.label_key]
        except KeyError as error:
            raise DataError(f"{where}: has no field {reader.label_key!r}: {error.args[0]}") from error
        return _class_numbers(column, where)
    field = next((field for field in _LABEL_FIELDS if hasattr(dataset, field)), None)
    if field is None:
        raise DataError(f"{where}: {type(dataset).__name__} does not list its labels")
    return _class_numbers(getattr(dataset, field), where)


def _class_numbers(labels: Iterable[Any], where: str) -> list[int]:
    try:
        return [_class_number(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: wanted one class number for each image: {error}") from error


def _class_number(label: Any) -> int:
    number = int(label)
    if number != label and not isinstance(label, str):  # int cuts off what is behind the point
        raise ValueError(f"got {label}")
    return number


def _stream(dataset: Any, where: str) -> Iterator[tuple[Image.Image, Any]]:
    """The rows of a sequential data set. For one that it cannot read, each library behind timm raises its own
    exceptions."""
    try:
        yield from dataset
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{where}: cannot be read on: {error!r}") from error


def _hold(dataset: Any, split: str, where: str) -> tuple[tuple[ImageItem, ...], list[int]]:
    items: list[ImageItem] = []
    labels: list[Any] = []
    budget = host_budget()
    taken = 0
    for image, label in _stream(dataset, where):
        with decoding(f"{where}: image {len(items)}"):
            pixels = np.asarray(upright_rgb(image))
        taken += pixels.nbytes
        if taken > budget:
            raise DataError(
                f"{where}: comes as a stream, and more than {budget / 1e9:.1f} GB of it ({len(items)} images)"
                " cannot be held in memory; write it to a folder of class folders"
            )
        items.append(HeldImage(pixels, f"{split}[{len(items)}]"))
        labels.append(label)
    return tuple(items), _class_numbers(labels, where)


def class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """The set's own class names if there are at least `count` distinct ones, else the numbers."""
    by_name = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    found = sorted(by_name, key=by_name.__getitem__) or [
        str(name) for name in getattr(dataset, "classes", ())
    ]
    if len(found) >= count and len(set(found)) == len(found):
        return tuple(found)
    return tuple(str(label) for label in range(count))
