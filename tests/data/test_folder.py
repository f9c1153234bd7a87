from __future__ import annotations

import os
import re
import sys

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS

from vpt_fast.data.folder import IMAGE_EXTENSIONS
from vpt_fast.data.images import DataError, ImageList, require_utf8
from vpt_fast.data.splits import open_splits


def names(images: ImageList) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in images.items]


def test_images_are_files_with_the_endings_that_torchvision_reads_and_gif():
    assert {*IMAGE_EXTENSIONS} == {*IMG_EXTENSIONS, ".gif"}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_train_and_val_folders_are_taken_as_they_are(write_images, val):
    root = write_images({"train/cat": 3, "train/dog": 2, f"{val}/cat": 1, f"{val}/dog": 2})
    splits = open_splits(root)
    assert splits.classes == ("cat", "dog")
    assert names(splits.train) == ["cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png", "dog/001.png"]
    assert splits.train.labels == (0, 0, 0, 1, 1)
    assert splits.val.labels == (0, 1, 1)
    assert splits.test is None


def test_classes_are_sorted_by_name(write_images):
    assert open_splits(write_images({"b": 2, "a10": 2, "a9": 2, "B": 2})).classes == ("B", "a10", "a9", "b")


def test_test_labels_are_those_of_train_where_test_lacks_a_class(write_images):
    root = write_images({"train/a": 1, "train/b": 1, "train/c": 1, "val/a": 1, "val/b": 1, "val/c": 1})
    write_images({"test/c": 2, "test/b": 1})
    test = open_splits(root).test
    assert (test.classes, test.labels) == (("a", "b", "c"), (1, 2, 2))


@pytest.mark.parametrize("is_link", [False, True])
def test_pipe_with_the_name_of_an_image_is_refused_not_waited_for(write_images, is_link):
    root = write_images({"a": 2, "b": 2})
    os.mkfifo(root / "pipe")
    name = root / "a" / "x.jpg"
    name.symlink_to("../pipe") if is_link else (root / "pipe").rename(name)
    with pytest.raises(DataError, match="a/x.jpg: is a pipe, a socket or a device, wanted an image file"):
        open_splits(root)


def test_listing_images_looks_up_links_alone(write_images, monkeypatch):
    root = write_images({"a": 3, "b": 3})
    (root / "b" / "link.png").symlink_to(root / "a" / "000.png")
    looked_up, stat = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *a, **k: looked_up.append(os.fspath(path)) or stat(path, *a, **k)
    )
    splits = open_splits(root)
    assert len(splits.train) + len(splits.val) == 7
    assert {path for path in looked_up if path.endswith(".png")} == {str(root / "b" / "link.png")}


def test_train_without_val_is_split_and_test_left_alone(write_images):
    splits = open_splits(write_images({"train/a": 5, "train/b": 10, "test/a": 1, "test/b": 1}))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 3, 2)


def test_split_is_stratified_and_covers_every_image_once(write_images):
    splits = open_splits(write_images({"a": 10, "b": 5, "c": 2}), val_fraction=0.2)
    assert [splits.val.labels.count(label) for label in range(3)] == [2, 1, 1]
    assert [splits.train.labels.count(label) for label in range(3)] == [8, 4, 1]
    assert sorted(names(splits.train) + names(splits.val)) == sorted(
        [f"a/{i:03d}.png" for i in range(10)]
        + [f"b/{i:03d}.png" for i in range(5)]
        + ["c/000.png", "c/001.png"]
    )


def test_large_val_fraction_leaves_every_class_an_image_to_train_on(write_images):
    splits = open_splits(write_images({"a": 3, "b": 2}), val_fraction=0.99)
    assert splits.train.labels == (0, 1)


def test_split_is_the_same_for_the_same_seed(write_images):
    root = write_images({"a": 20, "b": 20})
    assert open_splits(root, seed=3) == open_splits(root, seed=3)


def test_split_differs_between_seeds(write_images):
    root = write_images({"a": 20, "b": 20})
    assert open_splits(root, seed=3) != open_splits(root, seed=4)


def test_split_of_a_class_does_not_depend_on_other_classes(write_images):
    before = open_splits(write_images({"b": 20, "c": 20}))
    after = open_splits(write_images({"a": 7}))
    assert names(before.val) == [name for name in names(after.val) if not name.startswith("a/")]


def test_hidden_and_other_files_are_left_out_and_endings_have_no_case(write_images):
    root = write_images({"a": 1, "b": 2, ".cache/x": 1, "__MACOSX/a": 1})
    for name in ("._000.png", "notes.txt", "Thumbs.db", "png"):
        (root / "a" / name).write_bytes(b"not an image")
    (root / "readme.md").write_text("about")
    (root / "a" / ".thumbnails").mkdir()
    (root / "a" / ".thumbnails" / "000.png").write_bytes(b"")
    (root / "a" / "deeper").mkdir()
    (root / "a" / "deeper" / "PHOTO.JPEG").write_bytes(b"")
    splits = open_splits(root)
    assert splits.classes == ("a", "b")
    assert sorted(names(splits.train) + names(splits.val)) == [
        "a/000.png",
        "b/000.png",
        "b/001.png",
        "deeper/PHOTO.JPEG",
    ]


def test_links_to_folders_are_followed_and_one_to_itself_is_none(write_images):
    root = write_images({"a": 2, "b": 2, "elsewhere/more": 2})
    (root / "elsewhere").rename(root.parent / "elsewhere")
    (root / "a" / "more").symlink_to(root.parent / "elsewhere" / "more")
    (root / "a" / "itself").symlink_to("itself")
    (root / "itself").symlink_to("itself")
    splits = open_splits(root)
    assert splits.classes == ("a", "b")
    assert splits.train.labels.count(0) + splits.val.labels.count(0) == 4


@pytest.mark.parametrize(
    "links",
    [
        pytest.param({"a/loop": "."}, id="folder-in-itself"),
        pytest.param({"a/loop": ".."}, id="folder-above"),
        pytest.param({"loop": "."}, id="class"),
        pytest.param({"a/loop": "../b", "b/loop": "../a"}, id="two-folders-in-each-other"),
    ],
)
def test_links_that_lead_back_are_refused_not_followed(write_images, links):
    root = write_images({"a": 2, "b": 2})
    for name, target in links.items():
        (root / name).symlink_to(target)
    with pytest.raises(DataError, match=r"loop.*: found a link back to .*, which it lies in"):
        open_splits(root)


@pytest.mark.parametrize("name", [b"a/caf\xe9.png", b"caf\xe9"], ids=["file", "class"])
def test_name_that_is_not_utf8_is_refused_by_name(write_images, name):
    root = write_images({"a": 2, "b": 2, "c": 2})
    old = b"a/000.png" if name.endswith(b".png") else b"c"
    os.rename(os.fsencode(root) + b"/" + old, os.fsencode(root) + b"/" + name)
    with pytest.raises(DataError, match=r"caf\\udce9.*: found a name that is not UTF-8"):
        open_splits(root)


def test_name_that_the_locale_cannot_read_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(DataError, match="Python reads names as ascii, want PYTHONUTF8=1"):
        require_utf8("caf\udcc3\udca9.png")


def test_classes_may_be_called_like_splits(write_images):
    assert open_splits(write_images({"train": 2, "bus": 2, "test": 2})).classes == ("bus", "test", "train")


@pytest.mark.parametrize(
    "counts, found",
    [
        pytest.param({}, "found no class folders", id="empty"),
        pytest.param({".": 3}, "found 3 images and no class folders", id="no-class-folders"),
        pytest.param({"a": 0, "b": 0}, "found no images in a/, b/", id="no-images"),
        pytest.param({"a": 3, "b": 0}, "found no images in b/", id="empty-class"),
        pytest.param({"cat": 3}, "found one class, 'cat'", id="one-class"),
        pytest.param({"pets/cat": 3, "pets/dog": 3}, "did you mean .*/pets", id="one-folder-too-high"),
        pytest.param({"a": 3, "b": 1, "c": 1}, "found one image in b/, c/", id="too-few-to-split"),
        pytest.param({"val/a": 1, "val/b": 1, "test/a": 1}, "found test/, val/ but no train", id="no-train"),
        pytest.param({"train/a": 1, "val/a": 1, "valid/a": 1}, "both val.*/ and val", id="two-val-folders"),
        pytest.param(
            {"train/a": 1, "train/b": 1, "train/c": 1, "val/a": 1, "val/d": 1},
            "val: found d/, not among the classes",
            id="class-in-val-unknown-to-train",
        ),
        pytest.param(
            {"train/a": 1, "train/b": 1, "train/c": 1, "val/a": 1, "val/c": 1},
            "val: found no b/, which .*train has",
            id="class-missing-from-val",
        ),
        pytest.param(
            {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0},
            "val: found no images in b/",
            id="class-empty-in-val",
        ),
        pytest.param({"train/a": 1, "val/a": 1}, "train: found one class, 'a'", id="one-class-in-train"),
        pytest.param(
            {"a": 2, "b": 2, "test/a": 1}, "found test/ .* beside a/, b/", id="classes-beside-a-split"
        ),
    ],
)
def test_unusable_folder_is_refused_by_name(write_images, counts, found):
    root = write_images(counts)
    with pytest.raises(DataError, match=found) as error:
        open_splits(root)
    assert str(root) in str(error.value)


def test_images_in_other_formats_are_named(write_images):
    root = write_images({"a": 2, "b": 0})
    (root / "b" / "photo.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"found no images in b/ \(files: 1 × \.heic; images end in \.jpg"):
        open_splits(root)


def test_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path / 'nowhere'}: there is no such folder; wanted")
    ):
        open_splits(tmp_path / "nowhere")


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"images\.zip: is a file"):
        open_splits(tmp_path / "images.zip")


def test_lists_of_other_classes_are_not_joined():
    with pytest.raises(ValueError, match="classes: two lists with other classes cannot be joined"):
        ImageList((), (), ("a", "b")) + ImageList((), (), ("b", "a"))


@pytest.mark.parametrize("labels", [(0,), (0, 2), (-1, 0)])
def test_labels_that_do_not_fit_are_refused(labels, tmp_path):
    with pytest.raises(ValueError, match="labels: "):
        ImageList((tmp_path / "0.png", tmp_path / "1.png"), labels, ("a", "b"))


def test_scenes_with_masks_are_not_taken_for_two_classes(write_images):
    folders = ("images/training", "images/validation", "annotations/training", "annotations/validation")
    root = write_images(dict.fromkeys(folders, 4))
    with pytest.raises(DataError, match="holds images with masks, for task segmentation; wanted train/"):
        open_splits(root)
