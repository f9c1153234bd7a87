"""What is common to all kinds of data: which images are trained on, and refusing what cannot be had."""

from __future__ import annotations

from collections import Counter

import pytest

from vpt_fast.data.images import DataError, take_fraction, take_shots
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


def test_fraction_keeps_its_share_of_each_class(write_images):
    images = open_splits(write_images(FOLDERS)).train
    assert Counter(take_fraction(images, 0.5, 0).labels) == {0: 5, 1: 2}
    assert Counter(take_fraction(images, 0.01, 0).labels) == {0: 1, 1: 1}


def test_smaller_fractions_are_parts_of_larger_ones_by_the_same_seed(write_images):
    images = open_splits(write_images(FOLDERS)).train
    parts = [set(take_fraction(images, fraction, 1).items) for fraction in (0.2, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2]
    assert parts[1] != set(take_fraction(images, 0.5, 2).items)


def test_shots_are_as_many_images_of_each_class(write_images):
    images = open_splits(write_images(FOLDERS)).train
    assert Counter(take_shots(images, 3, 0).labels) == {0: 3, 1: 3}
    assert Counter(take_shots(images, 7, 0).labels) == {0: 7, 1: 4}  # all of the class with fewer


def test_fewer_shots_are_parts_of_more_by_the_same_seed(write_images):
    images = open_splits(write_images(FOLDERS)).train
    parts = [set(take_shots(images, shots, 1).items) for shots in (1, 3, 10)]
    assert parts[0] < parts[1] < parts[2] == set(images.items)
    assert parts[1] != set(take_shots(images, 3, 2).items)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_on": "val"}, "train_on: 'val', wanted one of train, train\\+val"),
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
