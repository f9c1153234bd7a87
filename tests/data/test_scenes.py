"""Folders in ADE20k's layout: what is listed, what a mask says, and what is refused before training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from image_files import png_of_one_row
from PIL import ExifTags, Image

from vpt_fast.data.images import DataError
from vpt_fast.data.scenes import (
    IGNORED,
    MOST_ELONGATED,
    check_scenes,
    decode_scene,
    open_scenes,
    read_mask,
    read_scene,
)


def write(root: Path, labels: dict[str, np.ndarray], classes: str = "a\nb\nc\n") -> Path:
    """A scene for each name, "training/0" for example, whose image is of the labels' size."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
    for name, array in labels.items():
        Image.new("RGB", array.shape[::-1], "red").save(root / "images" / f"{name}.jpg")
        Image.fromarray(array).save(root / "annotations" / f"{name}.png")
    (root / "classnames.txt").write_text(classes)
    return root


@pytest.fixture
def scenes(tmp_path) -> Path:
    labels = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    return write(tmp_path / "scenes", {"training/0": labels, "training/1": labels, "validation/0": labels})


def write_object_info(root: Path, count: int = 150) -> None:
    rows = [f"{i}\t0.1\t10\t1\t1\tthing {i}, object" for i in range(1, count + 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")


def test_splits_hold_the_images_with_their_masks(scenes):
    found = open_scenes(scenes)
    assert found.classes == ("a", "b", "c") and (len(found.train), len(found.val)) == (2, 1)
    assert [p.name for p in found.train.images] == ["0.jpg", "1.jpg"]
    assert [p.name for p in found.train.masks] == ["0.png", "1.png"]
    image, mask = read_scene(found.val, 0)
    assert image.size == (3, 2) and mask.tolist() == [[0, 1, 2], [IGNORED, 2, 1]]


def test_images_that_would_share_a_mask_are_refused(scenes):
    Image.new("RGB", (3, 2)).save(scenes / "images/training/0.png")
    Image.new("RGB", (3, 2)).save(scenes / "images/training/0.m.jpg")  # which sorts between them
    with pytest.raises(DataError, match="0.jpg and 0.png would share the mask 0.png; wanted one image for"):
        open_scenes(scenes)


def turn(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_image_that_is_turned_and_keeps_its_size_is_refused_by_name(scenes, orientation):
    turn(scenes / "images/training/1.jpg", orientation)
    with pytest.raises(
        DataError, match=r"images/training/1\.jpg: its EXIF orientation turns it.*training/1\.png"
    ):
        check_scenes(open_scenes(scenes).train, workers=0)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)], ids=str)
def test_image_that_would_be_resized_to_gigapixels_is_refused_by_name(tmp_path, shape):
    labels = {"training/0": np.zeros((2, 3), np.uint8), "training/1": np.zeros(shape, np.uint8)}
    scenes = write(tmp_path / "scenes", {**labels, "validation/0": labels["training/0"]})
    with pytest.raises(DataError, match=rf"training/1\.jpg: {shape[1]}×{shape[0]} pixels is too thin"):
        check_scenes(open_scenes(scenes).train, workers=0)


def test_longest_image_that_is_no_gigapixels_is_accepted(tmp_path):
    Image.new("RGB", (3, 3 * MOST_ELONGATED)).save(tmp_path / "strip.png")
    assert decode_scene(tmp_path / "strip.png").size == (3, 3 * MOST_ELONGATED)


def test_mask_of_the_size_of_the_turned_image_is_accepted(scenes):
    Image.new("RGB", (2, 3)).save(scenes / "images/training/1.jpg")
    turn(scenes / "images/training/1.jpg", 6)
    assert len(check_scenes(open_scenes(scenes).train, workers=0).images) == 2


def test_names_of_ade20k_come_from_its_own_file_and_label_0_is_no_class(scenes):
    write_object_info(scenes)
    found = open_scenes(scenes).train
    assert len(found.classes) == 150 and found.classes[0] == "thing 1, object" and found.ignores_zero
    assert read_scene(found, 0)[1].tolist() == [[IGNORED, 0, 1], [IGNORED, 1, 0]]
    assert not open_scenes(scenes, ignore_zero=False).train.ignores_zero


def test_label_0_is_ignored_where_that_is_asked_for(scenes):
    assert read_scene(open_scenes(scenes, ignore_zero=True).train, 0)[1].tolist() == [
        [IGNORED, 0, 1],
        [IGNORED, 1, 0],
    ]


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_of_every_kind_of_whole_numbers_are_read(tmp_path, mode):
    labels = np.array([[0, 1], [2, 255]], np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 3, no_zero=False).tolist() == [[0, 1], [2, IGNORED]]


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x40"), (2, b"\x10"), (4, b"\x01")])
def test_mask_of_grey_values_that_pillow_would_scale_is_refused(tmp_path, bits, row):
    (tmp_path / "mask.png").write_bytes(png_of_one_row(2, bits, 0, row))  # labels 0 and 1
    with pytest.raises(DataError, match="mask.png: wanted one .* a greyscale one of 8 or 16 bits"):
        read_mask(tmp_path / "mask.png", 100, no_zero=False)


def test_label_255_is_no_class_of_255_either(scenes):
    (scenes / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(255)))
    assert len(open_scenes(scenes).classes) == 255
    with pytest.raises(DataError, match="classnames.txt: 255 names; wanted at most 254 where label 0 is no"):
        open_scenes(scenes, ignore_zero=True)


def test_pipe_with_the_name_of_an_image_is_refused_not_waited_for(scenes):
    (scenes / "images/training/1.jpg").unlink()
    os.mkfifo(scenes / "images/training/1.jpg")
    with pytest.raises(DataError, match="1.jpg: is a pipe, a socket or a device, wanted an image file"):
        open_scenes(scenes)


def test_hidden_and_other_files_beside_the_images_are_left_out(scenes):
    for name in (".1.jpg", "notes.txt"):
        (scenes / "images/training" / name).touch()
    assert [path.name for path in open_scenes(scenes).train.images] == ["0.jpg", "1.jpg"]


def mask_in_another_format(root):
    Image.new("L", (3, 2)).save(root / "annotations/training/1.png", "JPEG")


def turned_mask(root):
    turn(root / "annotations/training/1.png", 3)


def remove_mask(root):
    (root / "annotations/training/1.png").unlink()


def other_size(root):
    Image.new("RGB", (2, 2)).save(root / "images/training/1.jpg")


def label_out_of_range(root):
    Image.fromarray(np.array([[0, 1, 7], [0, 0, 0]], np.uint8)).save(root / "annotations/training/1.png")


def colour_mask(root):
    Image.new("RGB", (3, 2)).save(root / "annotations/training/1.png")


def broken_image(root):
    (root / "images/training/1.jpg").write_bytes(b"no image")


def broken_mask(root):
    (root / "annotations/training/1.png").write_bytes(b"no image")


def name_that_is_not_utf8(root):
    for folder, ending in (("images", "jpg"), ("annotations", "png")):
        path = root / folder / f"training/1.{ending}"
        path.rename(path.with_stem("caf\udce9"))


def no_validation(root):
    (root / "images/validation").rename(root / "elsewhere")


def no_images(root):
    (root / "images/validation/0.jpg").unlink()


def no_names(root):
    (root / "classnames.txt").unlink()


def one_name(root):
    (root / "classnames.txt").write_text("a\n")


def too_many_names(root):
    (root / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(256)))


def short_object_info(root):
    write_object_info(root, 149)


def name_twice_in_object_info(root):
    write_object_info(root)
    path = root / "objectInfo150.txt"
    path.write_text(path.read_text().replace("thing 7,", "thing 8,"))


def nothing_labelled(root):
    for path in (root / "annotations/training").iterdir():
        Image.fromarray(np.full((2, 3), 255, np.uint8)).save(path)


def no_folder(root):
    root.rename(root.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "there is no such folder; wanted images/training/NAME.jpg"),
        (remove_mask, "annotations/training: found no 1.png; wanted a mask for each of 2 images"),
        (other_size, r"training/1.png: 3×2 pixels; its image .*training/1.jpg has 2×2"),
        (label_out_of_range, "training/1.png: label 7; wanted 0 to 2 of 3 classes, or 255 for no class"),
        (mask_in_another_format, "training/1.png: a JPEG file; wanted a PNG file"),
        (turned_mask, "training/1.png: its EXIF orientation turns it"),
        (colour_mask, "training/1.png: wanted one whole-number label a pixel"),
        (broken_image, "training/1.jpg: not an image"),
        (broken_mask, "training/1.png: not an image in a format that Pillow decodes"),
        (name_that_is_not_utf8, r"training/caf\\udce9.jpg': found a name that is not UTF-8"),
        (no_validation, "images/validation: there is no such folder; wanted images/training/NAME.jpg"),
        (no_images, "images/validation: found no images"),
        (no_names, "has neither objectInfo150.txt nor classnames.txt"),
        (one_name, "classnames.txt: 1 class name; wanted 2 or more"),
        (too_many_names, "classnames.txt: 256 names; wanted at most 255"),
        (short_object_info, "objectInfo150.txt: 149 class names; wanted 150"),
        (name_twice_in_object_info, "objectInfo150.txt: 149 class names; wanted 150"),
        (nothing_labelled, "annotations/training: no pixel of any mask has a class"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_cannot_be_used_is_named(scenes, spoil, message):
    spoil(scenes)
    with pytest.raises(DataError, match=message):
        check_scenes(open_scenes(scenes).train, workers=0)


def test_check_lets_all_through_and_counts_them(scenes):
    seen = []
    found = check_scenes(open_scenes(scenes).train, workers=2, progress=seen.append)
    assert len(found.images) == 2 and found.skipped == () and seen == [1, 1]
