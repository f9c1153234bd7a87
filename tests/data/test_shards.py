"""WebDataset shards: the same images and labels as the files that went in."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from task_trees import picture, write_shards

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import check_images, decode_image
from vpt_fast.data.images import DataError
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.splits import open_splits

COUNTS = {"train": 12, "test": 4}


@pytest.fixture
def root(tmp_path):
    return write_shards(tmp_path / "shards", COUNTS)


def pack(path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            file = path.parent / "member"
            file.write_bytes(data)
            tar.add(file, name)
            file.unlink()


def cut_after_a_member(root) -> None:
    """Of the first shard's samples one is left."""
    path = root / "train/0.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:third])


def damage_a_header(root) -> None:
    """That of the third member of the first shard, by a bit."""
    path = root / "train/0.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    contents = bytearray(path.read_bytes())
    contents[third] ^= 1
    path.write_bytes(contents)


def test_every_image_comes_with_its_label(root):
    splits = open_splits(root, train_on="train+val", with_test=True)
    assert splits.classes == ("dark", "bright")
    assert len(splits.train) == 12 and len(splits.test) == 4
    for images, first in ((splits.train, 0), (splits.test, 100)):
        for item, label in zip(images.items, images.labels, strict=True):
            number = int(str(item).rsplit("/s", 1)[1].partition(".")[0])
            assert label == number % 2
            assert np.array_equal(np.asarray(decode_image(item)), np.asarray(picture(first + number)))


def test_blank_lines_after_the_class_names_are_no_classes(root):
    (root / "classnames.txt").write_text("dark\nbright\n\n")
    assert open_splits(root).classes == ("dark", "bright")


def test_shards_that_nothing_counts_are_those_that_are_there(root):
    counted = open_splits(root)
    (root / "train" / "nshards.txt").unlink()
    assert open_splits(root) == counted


def test_train_is_split_as_a_folder_is(root):
    splits = open_splits(root, val_fraction=0.34, seed=3)
    assert (len(splits.train), len(splits.val)) == (8, 4)
    assert sorted(splits.val.labels) == [0, 0, 1, 1]
    assert splits == open_splits(root, val_fraction=0.34, seed=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_shards_are_the_same_resident_or_not(root, workers):
    images, preprocessing = (
        open_splits(root).train,
        Preprocessing((8, 8), resize="shortest", augment="crop_flip"),
    )
    options = {"train": True, "seed": 0, "device": "cpu", "workers": workers}
    resident = Batches(images, preprocessing, 4, **options, resident="host")
    streamed = Batches(images, preprocessing, 4, **options, resident="off")
    for one, other in zip(resident.epoch(0), streamed.epoch(0), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_image_that_cannot_be_decoded_is_named(root):
    images = open_splits(root, train_on="train+val").train
    broken = dataclasses.replace(images.items[3], size=9)
    images = dataclasses.replace(images, items=(*images.items[:3], broken, *images.items[4:]))
    assert [str(skipped.path) for skipped in check_images(images).skipped] == [str(broken)]


def test_classes_are_numbers_where_nothing_names_them(tmp_path):
    assert open_splits(write_shards(tmp_path, COUNTS, names=False)).classes == ("0", "1")


def test_shards_of_one_class_are_refused(tmp_path):
    shards = write_shards(tmp_path, {"train": 1}, names=False)
    with pytest.raises(DataError, match="found one class, '0'; wanted two or more"):
        open_splits(shards, train_on="train+val")


def test_names_do_not_depend_on_where_the_shards_lie(root, tmp_path):
    here = [str(item) for item in open_splits(root).train.items]
    assert here == [str(item) for item in open_splits(root.rename(tmp_path / "moved")).train.items]


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda root: (root / "train/1.tar").unlink(),
            r"train: 1.tar is missing, one of 3 shards; 2 are there",
        ),
        (
            lambda root: (root / "train/nshards.txt").write_text("x"),
            r"nshards.txt, line 1: 'x', wanted the number",
        ),
        (
            lambda root: (root / "train/0.tar").write_bytes(b"\1" * 2000),
            r"0.tar: cannot be read as an uncompr",
        ),
        (lambda root: pack(root / "train/0.tar", {"s1.png": b""}), r"0.tar: s1 has an image and no label"),
        (lambda root: pack(root / "train/0.tar", {"s1.cls": b"1"}), r"0.tar: s1 has a label and no image"),
        (
            lambda root: pack(root / "train/0.tar", {"s1.cls": b"a"}),
            r"0.tar: s1.cls holds 'a', wanted a class",
        ),
        (
            lambda root: (root / "train/nshards.txt").write_text("2"),
            r"nshards.txt: says 2 shards, and 2.tar is there too",
        ),
        (
            lambda root: (root / "train/1.tar").rename(root / "train/00.tar"),
            r"train: found both 0.tar and 00.tar, wanted one of them",
        ),
        (
            lambda root: pack(root / "train/0.tar", {"s1.png": b"", "s1.jpg": b"", "s1.cls": b"1"}),
            r"0.tar: s1 has two images, s1.png and s1.jpg",
        ),
        (
            lambda root: pack(root / "train/0.tar", [("s1.cls", b"1"), ("s1.cls", b"0")]),
            r"0.tar: s1.cls comes twice",
        ),
        (
            lambda root: [shutil.copytree(root / "test", root / name) for name in ("val", "valid")],
            r"found shards in val/ and valid/, wanted one val folder",
        ),
        (
            lambda root: [pack(root / f"train/{i}.tar", {}) for i in range(3)],
            r"train: found no samples in 3 shards",
        ),
        (
            lambda root: pack(root / "train/0.tar", {"s\udce9.png": b"", "s\udce9.cls": b"1"}),
            r"train/0.tar/s\\udce9.png': found a name that is not UTF-8",
        ),
        (cut_after_a_member, r"0.tar: ends after 1 image without a tar's end"),
        (damage_a_header, r"0.tar: ends after 1 image without a tar's end"),
        (
            lambda root: (root / "classnames.txt").write_text("a\n"),
            r"classnames.txt: 1 class name; wanted 2 or more, one for each class",
        ),
        (lambda root: (root / "classnames.txt").write_text("a\na\n"), r"line 2: 'a' again, as in line 1"),
        (
            lambda root: (root / "classnames.txt").write_text("a\n\nb\n"),
            r"line 2: is blank; wanted a class's name",
        ),
    ],
    ids=[
        "missing",
        "nshards",
        "no tar",
        "no label",
        "no image",
        "label",
        "one more",
        "one number",
        "two images",
        "two labels",
        "two of val",
        "no samples",
        "not UTF-8",
        "cut off",
        "damaged header",
        "few names",
        "names twice",
        "blank name",
    ],
)
def test_broken_shards_are_named(root, break_it, message):
    break_it(root)
    with pytest.raises(DataError, match=message):
        open_splits(root)


def test_progress_counts_every_byte_of_all_shards(root):
    sizes = [path.stat().st_size for path in root.glob("*/*.tar")]
    counted = []
    open_splits(root, on_shards=lambda done, total: counted.append((done, total)))
    assert len(sizes) > 2 and sum(done for done, _ in counted) == sum(sizes)
    assert {total for _, total in counted} == {sum(sizes)} and all(done >= 0 for done, _ in counted)


def with_header(path, **header: str) -> None:
    """Puts a header in the pax format before the first member, without its end."""
    text = "".join(f"{len(f'00 {key}={value}') + 1} {key}={value}\n" for key, value in header.items())
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, len(text)
    path.write_bytes(member.tobuf() + text.encode().ljust(512, b"\0") + path.read_bytes())


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda root: pack(root / "train/0.tar", {"s1.cls": b"999999999999"}),
            "0.tar: s1.cls holds '999999999999', wanted a class number",
        ),
        (lambda root: pack(root / "train/0.tar", {"s1.cls": b"9" * 5000}), "0.tar: s1.cls holds '9{20}', "),
        (lambda root: (root / "train/nshards.txt").write_text("9" * 5000), "wanted the number of shards"),
        (
            lambda root: (
                (root / "test/nshards.txt").unlink(),
                (root / "test/0.tar").rename(root / "test/99999999999999.tar"),
            ),
            "test: 0.tar is missing, one of 100000000000000 shards",
        ),
        (
            lambda root: with_header(
                root / "train/0.tar", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
            ),
            "0.tar: cannot be read as an uncompressed tar: not enough values",
        ),
    ],
    ids=["label", "digits of a label", "digits of nshards", "number", "header"],
)
def test_numbers_in_shards_that_no_memory_holds_are_refused(root, break_it, message):
    break_it(root)
    with pytest.raises(DataError, match=message):
        open_splits(root)


def test_links_in_shards_and_names_outside_of_them_are_not_followed(root, tmp_path):
    whole = len(open_splits(root, train_on="train+val").train)
    with tarfile.open(root / "train/0.tar", "a") as tar:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.FIFOTYPE),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(tmp_path / "secret")
            tar.addfile(link)
        for name, data in (("../../out.png", b"x"), ("../../out.cls", b"1"), ("../../out.pkl", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    before = set(tmp_path.rglob("*"))
    assert len(open_splits(root, train_on="train+val").train) == whole + 1
    assert set(tmp_path.rglob("*")) == before
