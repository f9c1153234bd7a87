"""The tasks' table, and reading them from VTAB-1k's lists and FGVC's JSON files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter

import pytest
from task_trees import shrink, write_fgvc, write_shards, write_vtab

from vpt_fast.data.decode import check_images
from vpt_fast.data.images import DataError
from vpt_fast.data.splits import open_splits
from vpt_fast.data.task_files import read_task
from vpt_fast.data.tasks import TASKS, find_task

VTAB, FGVC = "vtab/cifar", "fgvc/cub"
SPLITS = ("train", "val", "test")


@pytest.fixture
def vtab(tmp_path, monkeypatch):
    return write_vtab(shrink(monkeypatch, VTAB), tmp_path / "cifar")


@pytest.fixture
def fgvc(tmp_path, monkeypatch):
    return write_fgvc(shrink(monkeypatch, FGVC), tmp_path / "CUB_200_2011")


def sizes(splits) -> list[int | None]:
    return [None if images is None else len(images) for images in (splits.train, splits.val, splits.test)]


def test_the_table_has_the_paper_s_24_tasks_by_group():
    groups = Counter(task.group for task in TASKS.values())
    assert groups == {"natural": 7, "specialized": 4, "structured": 8, "fgvc": 5}


def test_the_table_has_the_published_numbers_of_classes_and_images():
    def sums(group: str) -> tuple[int, ...]:
        tasks = [task for task in TASKS.values() if task.group == group]
        return sum(task.num_classes for task in tasks), *(
            sum(t.sizes[split] for t in tasks) for split in SPLITS
        )

    assert sums("natural") == (795, 7 * 800, 7 * 200, 75_564)
    assert sums("specialized") == (62, 4 * 800, 4 * 200, 87_138)
    assert sums("structured") == (83, 8 * 800, 8 * 200, 225_202)
    assert sums("fgvc") == (1_173, 46_079, 6_028, 53_197)


@pytest.mark.parametrize(
    "name, found",
    [
        ("vtab/cifar", "vtab/cifar"),
        ("cifar100", "vtab/cifar"),
        ("vtab/oxford_pet", "vtab/oxford_iiit_pet"),
        ("VTAB/resisc", "vtab/resisc45"),
        ("CUB_200_2011", "fgvc/cub"),
        ("fgvc/oxford_flowers", "fgvc/flowers"),
    ],
)
def test_task_is_found_by_its_name_or_an_alias(name, found):
    assert find_task(name).name == found


@pytest.mark.parametrize(
    "name, message",
    [
        ("vtab/cifra", "task is 'vtab/cifra', .*close names: vtab/cifar"),
        ("clevr_cont", "close names: vtab/clevr_count"),
        ("oxford_flowers", "wanted one of vtab/oxford_flowers102, fgvc/flowers"),
        ("zzz", "the tasks are vtab/cifar, "),
        ("fgvc/cifar", "task is 'fgvc/cifar'"),
    ],
)
def test_unknown_task_is_refused_with_close_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_task(name)


def test_no_two_tasks_of_a_suite_share_a_folder_name():
    owners: dict[tuple[str, str], set[str]] = {}
    for task in TASKS.values():
        for folder in task.folders:
            owners.setdefault((task.suite, folder.lower()), set()).add(task.name)
    assert [names for names in owners.values() if len(names) > 1] == []


@pytest.mark.parametrize("name", [VTAB, FGVC])
@pytest.mark.parametrize("above", [True, False], ids=["folder of tasks", "the task's own"])
def test_task_is_read_from_its_folder_or_from_that_of_all(name, above, tmp_path, monkeypatch):
    task = shrink(monkeypatch, name)
    write = write_vtab if task.suite == "vtab" else write_fgvc
    folder = write(task, tmp_path / task.folders[1])
    splits = open_splits(tmp_path if above else folder, task=name)
    assert sizes(splits) == [8, 4, 6]
    assert splits.val.labels == (0, 1, 0, 1)
    assert len(check_images(splits.train).images) == 8  # each path leads to an image


def test_train_and_val_together_leave_no_val(vtab):
    splits = open_splits(vtab, task=VTAB, train_on="train+val")
    assert sizes(splits) == [12, None, 6]


def test_classes_of_fgvc_are_ids_in_order_named_by_their_folders(fgvc):
    splits = open_splits(fgvc, task=FGVC)
    assert splits.classes == ("a", "b") and splits.train.labels[:2] == (0, 1)
    assert splits.train.items[0] == fgvc / "images" / "a" / "train0.png"


def test_tenth_of_fgvc_train_is_val_where_none_is_listed(tmp_path, monkeypatch):
    folder = write_fgvc(shrink(monkeypatch, FGVC, train=36), tmp_path, splits=("train", "test"))
    first, again, other = (open_splits(folder, task=FGVC, seed=seed) for seed in (1, 1, 2))
    assert sizes(first) == [36, 4, 6]
    assert Counter(first.val.labels) == {0: 2, 1: 2}
    assert set(first.train.items).isdisjoint(first.val.items)
    assert first == again and first.val != other.val


def test_class_names_of_vtab_are_read_where_they_are(vtab):
    assert open_splits(vtab, task=VTAB).classes == ("0", "1")
    (vtab / "classnames.txt").write_text("apple\nbear\n")
    assert open_splits(vtab, task=VTAB).classes == ("apple", "bear")


def edit(path, old, new):
    path.write_text(re.sub(old, new, path.read_text(), count=1))


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("train800.txt", r"3.jpg 1", "3.jpg 2", r"train800.txt, line 4: class 2; wanted 0 to 1"),
        ("train800.txt", r"3.jpg 1", "3.jpg " + "1" * 5000, "train800.txt, line 4: .*wanted an image's path"),
        ("val200.txt", r"1.jpg 1", "1.jpg,1", r"val200.txt, line 2: .*wanted an image's path, a space"),
        ("test.txt", r"^.*\n", "", r"test.txt: 5 images; this list of vtab/cifar has 6"),
        ("test.txt", r"0002.jpg", "0009.jpg", r"test.txt, line 3: .*000009.jpg is not there$"),
        ("test.txt", r"/000002.jpg", "", r"test.txt, line 3: .*images/test is a folder$"),
        ("test.txt", r"0002.jpg 0", "0001.jpg 1", r"test.txt, line 3: .*000001.jpg again, as in line 2"),
    ],
    ids=["class number", "digits", "no label", "size", "missing image", "folder", "twice"],
)
def test_broken_vtab_list_is_named_with_its_line(vtab, file, old, new, message):
    edit(vtab / file, old, new)
    with pytest.raises(DataError, match=message):
        open_splits(vtab, task=VTAB)


def test_pipe_in_the_place_of_a_tasks_image_is_refused_as_no_file(vtab):
    image = vtab / "images/test/000002.jpg"
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(DataError, match=r"test.txt, line 3: .*000002.jpg is no file$"):
        open_splits(vtab, task=VTAB)


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "train.json",
            {"a/train0.png": "x"},
            "train.json, 'a/train0.png': class id 'x', wanted a whole number",
        ),
        ("train.json", {"a/train0.png": 1.7}, "class id 1.7, wanted a whole number"),
        ("train.json", {"a/train0.png": True}, "class id True, wanted a whole number"),
        ("train.json", {"a/train0.png": float("inf")}, "class id inf, wanted a whole number"),
        ("train.json", {"a/train0.png": 9}, "train.json: 3 class ids; fgvc/cub has 2 classes"),
        (
            "test.json",
            {"a/test0.png": 9},
            "test.json, entry 'a/test0.png': class id 9, which no training image has$",
        ),
        ("val.json", {"a/more.png": 3}, "val.json: 5 images; this list of fgvc/cub has 4"),
    ],
    ids=["no number", "no whole number", "truth value", "infinite", "classes", "unknown class", "size"],
)
def test_broken_fgvc_list_is_named_with_its_entry(fgvc, file, change, message):
    path = fgvc / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        open_splits(fgvc, task=FGVC)


@pytest.mark.parametrize("name", [VTAB, FGVC])
def test_list_with_a_byte_order_mark_is_read(name, tmp_path, monkeypatch):
    task = shrink(monkeypatch, name)
    folder = (write_vtab if task.suite == "vtab" else write_fgvc)(task, tmp_path)
    path = folder / task.files["train"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sizes(open_splits(folder, task=name)) == [8, 4, 6]


@pytest.mark.parametrize("kind", [str, float])
def test_whole_numbers_as_text_or_with_a_point_are_class_ids(fgvc, kind):
    path = fgvc / "train.json"
    path.write_text(json.dumps({name: kind(value) for name, value in json.loads(path.read_text()).items()}))
    assert open_splits(fgvc, task=FGVC).train.labels[:2] == (0, 1)


def test_list_that_is_no_mapping_is_named(fgvc):
    (fgvc / "train.json").write_text('["a/train0.png"]')
    with pytest.raises(DataError, match="train.json: wanted a mapping of image paths to class ids"):
        open_splits(fgvc, task=FGVC)


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_list_of_no_images_is_one_of_too_few(fgvc, name):
    (fgvc / name).write_text("{}")
    with pytest.raises(DataError, match=f"{name}: 0 images; this list of fgvc/cub has"):
        open_splits(fgvc, task=FGVC)


def test_list_that_is_no_text_is_named(vtab):
    (vtab / "val200.txt").write_bytes(b"caf\xe9.jpg 0\n")
    with pytest.raises(DataError, match="val200.txt: is not text"):
        open_splits(vtab, task=VTAB)


def test_missing_images_are_counted_and_the_first_is_named(fgvc):
    for i in (1, 3):
        (fgvc / "images" / "b" / f"test{i}.png").unlink()
    with pytest.raises(DataError, match=r"entry 'b/test1.png': .*is not there, and 1 more of 6"):
        open_splits(fgvc, task=FGVC)


def test_images_of_a_folder_that_is_missing_are_missing(vtab):
    shutil.rmtree(vtab / "images" / "test")
    with pytest.raises(DataError, match=r"line 1: .*000000.jpg is not there, and 5 more of 6"):
        open_splits(vtab, task=VTAB)


def all_of_one_class(folder, *lists: str) -> None:
    for path in map(folder.joinpath, lists):
        path.write_text(path.read_text().replace(".jpg 1", ".jpg 0"))


def test_classes_are_not_missed_that_only_an_unreadable_list_may_have(vtab):
    all_of_one_class(vtab, "train800.txt", "test.txt")
    (vtab / "val200.txt").write_text("x\n")
    (problem,) = read_task(TASKS[VTAB], vtab).problems
    assert "val200.txt, line 1" in problem


def test_list_that_is_missing_is_named(vtab):
    (vtab / "val200.txt").unlink()
    with pytest.raises(DataError, match="val200.txt: is missing"):
        open_splits(vtab, task=VTAB)


def test_blank_lines_of_a_list_are_no_images(vtab):
    edit(vtab / "test.txt", "\n", "\n\n")
    assert sizes(open_splits(vtab, task=VTAB)) == [8, 4, 6]


def test_class_that_no_list_has_is_an_error(vtab):
    all_of_one_class(vtab, "train800.txt", "val200.txt", "test.txt")
    with pytest.raises(DataError, match="images of 1 class in all; vtab/cifar has 2"):
        open_splits(vtab, task=VTAB)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{\n"a": ', "val.json, line 2: is not JSON"),
        ("[" * 100_000, "val.json: is not JSON: too many values lie within each other"),
    ],
    ids=["half", "depth"],
)
def test_file_that_is_no_json_is_named(fgvc, text, message):
    (fgvc / "val.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_splits(fgvc, task=FGVC)


def test_folder_without_the_task_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no train800.txt of vtab/cifar in cifar/, cifar100/ and"):
        open_splits(tmp_path, task=VTAB)


def test_shards_in_the_place_of_a_task_s_lists_are_said_to_be_there(tmp_path):
    write_shards(tmp_path / "cifar", {"train": 2})
    with pytest.raises(DataError, match="there are shards of a full data set: vpt-fast data prepare"):
        open_splits(tmp_path, task=VTAB)


def test_test_split_that_is_asked_for_and_missing_is_an_error(vtab):
    (vtab / "test.txt").unlink()
    assert open_splits(vtab, task=VTAB).test is None
    with pytest.raises(DataError, match="has no test split"):
        open_splits(vtab, task=VTAB, with_test=True)


def test_missing_folder_of_a_task_is_refused_with_what_holds_tasks(tmp_path):
    with pytest.raises(DataError, match=r"no such folder; wanted the folder of vtab/cifar, or the one above"):
        open_splits(tmp_path / "nowhere", task="vtab/cifar")
