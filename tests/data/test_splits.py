"""What is common to all kinds of data: which images are trained on, and refusing what cannot be had."""

from __future__ import annotations

from collections import Counter

import pytest

from vpt_fast.data.images import DataError
from vpt_fast.data.splits import open_splits

FOLDERS = {"train/a": 10, "train/b": 4, "val/a": 2, "val/b": 2}


@pytest.mark.parametrize("folders", [FOLDERS, {"a": 12, "b": 6}], ids=["with val", "without"])
def test_train_and_val_together_are_all_images(write_images, folders):
    splits = open_splits(write_images(folders), train_on="train+val")
    assert splits.val is None and Counter(splits.train.labels) == {0: 12, 1: 6}


def test_class_of_one_image_can_be_trained_on_where_nothing_is_held_out(write_images):
    root = write_images({"a": 3, "b": 1})
    assert Counter(open_splits(root, train_on="train+val").train.labels) == {0: 3, 1: 1}
    with pytest.raises(DataError, match="found one image in b/"):
        open_splits(root)


def test_train_fraction_keeps_its_share_of_each_class(write_images):
    root = write_images(FOLDERS)
    splits = open_splits(root, train_fraction=0.5)
    assert Counter(splits.train.labels) == {0: 5, 1: 2}
    assert splits.val == open_splits(root).val
    assert Counter(open_splits(root, train_fraction=0.01).train.labels) == {0: 1, 1: 1}


def test_smaller_fractions_are_parts_of_larger_ones_by_the_same_seed(write_images):
    root = write_images(FOLDERS)
    parts = [set(open_splits(root, train_fraction=f, seed=1).train.items) for f in (0.2, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2]
    assert parts[1] != set(open_splits(root, train_fraction=0.5, seed=2).train.items)


def test_shots_are_as_many_images_of_each_class(write_images):
    root = write_images(FOLDERS)
    splits = open_splits(root, shots=3)
    assert Counter(splits.train.labels) == {0: 3, 1: 3}
    assert splits.val == open_splits(root).val
    assert Counter(open_splits(root, shots=7).train.labels) == {0: 7, 1: 4}  # all of the class with fewer
    assert Counter(open_splits(root, shots=5, train_on="train+val").train.labels) == {0: 5, 1: 5}


def test_fewer_shots_are_parts_of_more_by_the_same_seed(write_images):
    root = write_images(FOLDERS)
    parts = [set(open_splits(root, shots=n, seed=1).train.items) for n in (1, 3, 10)]
    assert parts[0] < parts[1] < parts[2] == set(open_splits(root).train.items)
    assert parts[1] != set(open_splits(root, shots=3, seed=2).train.items)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_on": "val"}, "train_on: 'val', wanted one of train, train\\+val"),
        ({"train_fraction": 0}, "train_fraction: 0, wanted a number above 0 and at most 1"),
        ({"shots": 0}, "shots: 0, wanted 1 or more"),
        ({"shots": 2, "train_fraction": 0.5}, "train_fraction: 0.5 beside shots: 2, wanted one of them"),
        *(
            ({"val_fraction": fraction}, f"val_fraction: {fraction}, wanted a number above 0 and below 1")
            for fraction in (0.0, 1.0, -0.1, float("nan"))
        ),
        ({"seed": -1}, "seed: -1"),
        ({"data_root": "x"}, "data_root: goes with a data set of timm's"),
        ({"data_root": ""}, "data_root: '', wanted a folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_that_cannot_be_used_is_named(write_images, options, message):
    with pytest.raises(ValueError, match=message):
        open_splits(write_images(FOLDERS), **options)


def test_test_split_that_is_asked_for_and_missing_is_an_error(write_images):
    with pytest.raises(DataError, match="has no test split"):
        open_splits(write_images(FOLDERS), with_test=True)
