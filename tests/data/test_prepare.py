"""Making VTAB-1k lists of a full data set, and `vpt-fast data check`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from task_trees import picture, shrink, stream, write_fgvc, write_shards, write_vtab
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.data import check, prepare
from vpt_fast.data.decode import decode_image
from vpt_fast.data.images import DataError
from vpt_fast.data.prepare import TFDS_RANGES, prepare_task
from vpt_fast.data.splits import open_splits
from vpt_fast.data.task_files import read_task
from vpt_fast.data.tasks import TASKS


@pytest.fixture
def command():
    """Runs vpt-fast data with the arguments given."""
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def cifar(monkeypatch):
    return shrink(monkeypatch, "vtab/cifar")


def taken_by(ranges: str, full: Sequence[int]) -> Sequence[int]:
    """What TensorFlow Datasets takes by "split[a:b]"."""
    start, stop = re.fullmatch(r"\w+(?:\[(\d*):(\d*)\])?", ranges).groups()
    return full[slice(int(start or 0), int(stop) if stop else None)]


@pytest.fixture
def tfds(monkeypatch):
    """Pretends that there is tfds/cifar100: training images 0 to 19, test images 100 to 105. Its version is
    the one item of what this returns."""
    monkeypatch.setitem(TFDS_RANGES, "vtab/cifar", ("train[:8]", "train[16:20]", "test"))

    def create(name, root, split, **options):
        full = list(range(20)) if split.startswith("train") else list(range(100, 106))
        return stream([(picture(i), i % 2) for i in taken_by(split, full)], f"cifar100/{version[0]}")

    version = ["3.0.2"]
    monkeypatch.setattr("vpt_fast.data.factory.create_dataset", create)
    return version


def numbers(images) -> list[int]:
    """Which pictures the images are."""
    known = {np.asarray(picture(i)).tobytes(): i for i in [*range(20), *range(100, 106)]}
    return [known[np.asarray(decode_image(item)).tobytes()] for item in images.items]


def test_every_task_of_vtab_is_a_range():
    assert TFDS_RANGES.keys() == {name for name, task in TASKS.items() if task.suite == "vtab"}


@pytest.mark.parametrize("name", TFDS_RANGES)
def test_ranges_take_as_many_images_as_vtab_1k_has(name):
    train, val, test = TFDS_RANGES[name]
    many = range(10**6)
    assert (len(taken_by(train, many)), len(taken_by(val, many))) == (800, 200)
    sizes = {"eurosat/rgb": 27_000, "resisc45": 31_500, "dsprites": 737_280, "smallnorb": 24_300}
    if test not in ("test", "validation"):
        of = sizes[TASKS[name].source.removeprefix("tfds/")]
        assert len(taken_by(test, range(of))) == TASKS[name].num_test


def test_images_of_tfds_are_the_task_s_own(cifar, tfds, tmp_path):
    done = []
    prepared = prepare_task(cifar, "tfds/cifar100", tmp_path, progress=done.append)
    assert prepared.is_published and prepared.images == 18 and done == [1] * 18
    splits = open_splits(tmp_path, task="vtab/cifar")
    assert numbers(splits.train) == list(range(8))
    assert numbers(splits.val) == list(range(16, 20))
    assert numbers(splits.test) == list(range(100, 106))
    assert splits.train.labels == (0, 1) * 4
    both = (tmp_path / "cifar" / "train800val200.txt").read_text().splitlines()
    assert len(both) == 12


def test_shards_give_their_first_images_as_they_are(cifar, tmp_path):
    shards = write_shards(tmp_path / "shards", {"train": 14, "test": 6})
    prepared = prepare_task(cifar, str(shards), tmp_path / "out")
    assert not prepared.is_published
    splits = open_splits(tmp_path / "out", task="vtab/cifar")
    assert splits.classes == ("dark", "bright")
    assert (numbers(splits.train), numbers(splits.val)) == (list(range(8)), list(range(8, 12)))
    assert splits.train.items[0].suffix == ".webp"


def test_preparing_goes_on_where_it_was_stopped(cifar, tfds, tmp_path, monkeypatch):
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_task(cifar, "tfds/cifar100", tmp_path, progress=stop)
    assert not list(tmp_path.rglob("*.txt"))  # it does not look like a task yet
    first = (tmp_path / "cifar/images/train800/000000.png").stat().st_mtime_ns
    written = []
    writer = prepare.png_writer
    monkeypatch.setattr(
        prepare, "png_writer", lambda image: lambda path: (written.append(1), writer(image)(path))
    )
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    assert len(written) == 8
    assert (tmp_path / "cifar/images/train800/000000.png").stat().st_mtime_ns == first
    assert numbers(open_splits(tmp_path, task="vtab/cifar").val) == list(range(16, 20))


KILLED = """
import os, signal, sys
from pathlib import Path
from vpt_fast.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert found.returncode == -signal.SIGKILL


def test_killed_process_leaves_no_temporary_files_once_the_command_is_repeated(cifar, tfds, tmp_path):
    folder = tmp_path / "cifar"
    folder.mkdir()
    kill_while_writing(folder / "prepared.json")
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    images = folder / "images" / "train800"
    for path in (images / "000003.png", images / "000012.webp", folder / "val200.txt"):
        kill_while_writing(path)
    assert len([path for path in folder.rglob(".*") if path.name != ".lock"]) == 3
    own = [images / ".000003.png", images / ".notes.png.abcdefgh.png", folder / ".mine.txt"]
    for path in own:
        path.touch()
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    assert {*folder.rglob(".*")} == {*own, folder / ".lock"}
    assert numbers(open_splits(tmp_path, task="vtab/cifar").train) == list(range(8))


def test_second_process_is_refused_and_leaves_the_files_of_the_first(cifar, tfds, tmp_path):
    left = tmp_path / "cifar/images/train800/.000009.png.abcdefgh.png"

    def again(count):
        left.touch()
        with pytest.raises(DataError, match="cifar: another process is preparing it; wait for it"):
            prepare_task(cifar, "tfds/cifar100", tmp_path)

    prepare_task(cifar, "tfds/cifar100", tmp_path, progress=again)
    assert left.exists()


def test_folder_that_something_else_is_in_is_left_alone_without_a_lock_file(cifar, tfds, tmp_path):
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "mine.png").touch()
    with pytest.raises(DataError, match="holds files that were not prepared here"):
        prepare_task(cifar, "tfds/cifar100", tmp_path)
    assert [path.name for path in (tmp_path / "cifar").iterdir()] == ["mine.png"]


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("fgvc/cub", "x", "fgvc/cub cannot be prepared: its lists name their images one by one"),
        ("vtab/cifar", "torch/cifar100", "torch/cifar100: wanted tfds/cifar100, a folder of shards"),
        ("vtab/kitti", "torch/kitti", "wanted tfds/kitti, .* or a folder of training/image_2"),
    ],
)
def test_what_cannot_be_prepared_is_refused_with_the_reason(tmp_path, name, source, message):
    with pytest.raises(DataError, match=message):
        prepare_task(TASKS[name], source, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source, data_root, message",
    [
        ("", None, "source: '', wanted the name of a data set or a folder"),
        ("tfds/cifar100", "", "data_root: '', wanted a folder, and that only with tfds/cifar100"),
        (".", "sets", "data_root: 'sets', wanted a folder, and that only with tfds/cifar100"),
    ],
)
def test_source_that_a_mistake_may_have_left_empty_or_that_has_no_data_root_is_refused(
    cifar, tfds, tmp_path, monkeypatch, source, data_root, message
):
    monkeypatch.chdir(write_shards(tmp_path / "shards", {"train": 12, "test": 6}))
    with pytest.raises(ValueError, match=message):
        prepare_task(cifar, source, tmp_path / "out", data_root=data_root)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "counts, message",
    [
        ({"train": 10, "test": 6}, "10 training images; wanted 12 or more"),
        ({"train": 12}, "has no test shards"),
        ({"train": 12, "test": 5}, "5 images for test.txt; vtab/cifar has 6"),
    ],
    ids=["few", "no test", "other test"],
)
def test_shards_of_another_set_are_refused(cifar, tmp_path, counts, message):
    with pytest.raises(DataError, match=message):
        prepare_task(cifar, str(write_shards(tmp_path / "shards", counts)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_another_number_of_classes_are_refused(cifar, tmp_path):
    shards = write_shards(tmp_path / "shards", {"train": 12, "test": 6})
    (shards / "classnames.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match="shards: 3 classes; those of vtab/cifar have 2"):
        prepare_task(cifar, str(shards), tmp_path / "out")


def test_folder_prepared_from_another_source_is_left_alone(cifar, tfds, tmp_path):
    prepare_task(cifar, str(write_shards(tmp_path / "shards", {"train": 12, "test": 6})), tmp_path)
    with pytest.raises(DataError, match="'source': 'shards'.* and not .*'tfds/cifar100'.*; go on with that"):
        prepare_task(cifar, "tfds/cifar100", tmp_path)


@pytest.mark.parametrize("change", ["label", "image"])
def test_shards_of_other_contents_do_not_go_on_with_what_is_there(cifar, tmp_path, change):
    prepare_task(cifar, str(write_shards(tmp_path / "a", {"train": 12, "test": 6})), tmp_path)
    (tmp_path / "cifar" / "train800.txt").unlink()  # as after an interruption
    changed = {"shift": 1} if change == "label" else {"first": 50}
    other = write_shards(tmp_path / "b", {"train": 12, "test": 6}, **changed)
    with pytest.raises(DataError, match="holds images of another source"):
        prepare_task(cifar, str(other), tmp_path)
    assert not (tmp_path / "cifar" / "train800.txt").exists()


def test_shards_elsewhere_with_the_same_contents_go_on(cifar, tmp_path):
    shards = write_shards(tmp_path / "a", {"train": 12, "test": 6})
    prepare_task(cifar, str(shards), tmp_path)
    (tmp_path / "cifar" / "train800.txt").unlink()
    prepare_task(cifar, str(shards.rename(tmp_path / "b")), tmp_path)
    assert len(open_splits(tmp_path, task="vtab/cifar").train) == 8


def test_another_version_of_a_data_set_does_not_go_on_with_what_is_there(cifar, tfds, tmp_path):
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    tfds[0] = "4.0.0"
    with pytest.raises(DataError, match="holds images of another source"):
        prepare_task(cifar, "tfds/cifar100", tmp_path)


def test_manifest_that_is_no_json_is_named(cifar, tfds, tmp_path):
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    (tmp_path / "cifar" / "prepared.json").write_text("{")
    with pytest.raises(DataError, match="prepared.json: is not JSON; remove"):
        prepare_task(cifar, "tfds/cifar100", tmp_path)


def test_prepare_says_whose_images_they_are(command, cifar, tmp_path):
    shards = write_shards(tmp_path / "shards", {"train": 12, "test": 6})
    result = command("prepare", "--task", "cifar", "--from", shards, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "not those that VTAB-1k published" in " ".join(result.output.split())
    assert command("check", tmp_path / "out", "--task", "cifar").exit_code == 0


def test_check_lists_what_is_there(command, cifar, monkeypatch, tmp_path):
    write_vtab(cifar, tmp_path / "cifar100")
    cub = shrink(monkeypatch, "fgvc/cub", train=36)
    write_fgvc(cub, tmp_path / "CUB", splits=("train", "test"))  # a tenth of train stands in for val
    result = command("check", tmp_path)
    assert result.exit_code == 0, result.output
    assert "vtab/cifar" in result.output and "cifar100" in result.output and "CUB" in result.output
    assert "of train" in result.output and "not found: vtab/caltech101" in result.output


def test_check_counts_the_images_of_each_list(cifar, monkeypatch, tmp_path):
    def counts(task) -> list[tuple[int, int]]:
        return [(split.images, split.expected) for split in check.check_task(task, tmp_path).splits]

    folder = write_vtab(cifar, tmp_path / "cifar")
    (folder / "val200.txt").write_text("x\n")
    (folder / "test.txt").unlink()
    assert counts(cifar) == [(8, 8), (0, 4), (0, 6)]
    cub = shrink(monkeypatch, "fgvc/cub")
    write_fgvc(cub, tmp_path / "CUB", splits=("train", "test"))
    assert counts(cub) == [(12, 12), (0, 0), (6, 6)]


def test_check_names_missing_files_and_where_to_get_them(command, cifar, tmp_path):
    folder = write_vtab(cifar, tmp_path / "cifar")
    for i in range(5):
        (folder / "images" / "test" / f"{i:06d}.jpg").unlink()
    (folder / "val200.txt").write_text("x\n")
    result = command("check", tmp_path, "--task", "vtab/cifar")
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 1
    for part in ("000000.jpg", "and 4 more of 6", "line 1", "images from tfds/cifar100"):
        assert part in said, said


def refused(check: str, folder: Path, name: str) -> str:
    """What open_splits says of the folder, which is what `check` shows, without the folder."""
    with pytest.raises(DataError) as error:
        open_splits(folder, task=name)
    text = str(error.value).replace(f"{folder}/", "")
    assert text in " ".join(check.replace("│", " ").split()), check
    return text


@pytest.mark.parametrize("names, said", [("a\n", "1 name;"), ("a\nb\nc\n", "3 names;")])
def test_check_names_a_number_of_class_names_that_training_refuses(
    command, cifar, monkeypatch, tmp_path, names, said
):
    monkeypatch.setenv("COLUMNS", "300")
    folder = write_vtab(cifar, tmp_path / "cifar")
    (folder / "classnames.txt").write_text(names)
    result = command("check", tmp_path, "--task", "cifar")
    assert result.exit_code == 1
    assert refused(result.output, folder, "vtab/cifar").startswith(f"classnames.txt: {said}")


def test_check_names_a_class_that_train_lacks_as_training_does(command, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    cub = shrink(monkeypatch, "fgvc/cub")
    folder = write_fgvc(cub, tmp_path / "CUB")
    entries = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(dict.fromkeys(entries, 3)))
    result = command("check", tmp_path, "--task", "cub")
    assert result.exit_code == 1
    assert refused(result.output, folder, "fgvc/cub").startswith("train.json: 1 class ids")


def test_check_names_a_class_that_has_no_image_to_hold_out(command, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    cub = shrink(monkeypatch, "fgvc/cub")
    folder = write_fgvc(cub, tmp_path / "CUB", splits=("train", "test"))
    names = list(json.loads((folder / "train.json").read_text()))
    (folder / "train.json").write_text(json.dumps({name: 3 if name != names[1] else 7 for name in names}))
    result = command("check", tmp_path, "--task", "cub")
    assert result.exit_code == 1 and "found one image in" in result.output


def test_check_wants_the_list_of_test_images_that_training_does_without(command, cifar, tmp_path):
    (write_vtab(cifar, tmp_path / "cifar") / "test.txt").unlink()
    result = command("check", tmp_path, "--task", "cifar")
    assert result.exit_code == 1 and "test.txt: is missing" in " ".join(result.output.split())


def test_check_of_a_task_s_own_folder_takes_it_for_no_other_task(command, cifar, monkeypatch, tmp_path):
    for name in TASKS:
        shrink(monkeypatch, name)  # every list would fit
    result = command("check", write_vtab(TASKS["vtab/cifar"], tmp_path / "cifar100"))
    assert result.exit_code == 0 and "vtab/cifar" in result.output
    assert "not found: vtab/caltech101" in result.output


def test_check_of_the_working_directory_has_its_name(command, cifar, monkeypatch, tmp_path):
    monkeypatch.chdir(write_vtab(cifar, tmp_path / "cifar100"))
    cells = [line.strip("│ ").split("│")[0].strip() for line in command("check", ".").output.splitlines()]
    assert cells[cells.index("vtab/cifar") + 1] == "cifar100"


def test_lists_of_a_task_s_own_folder_are_read_once(cifar, tmp_path, monkeypatch):
    """All tasks of VTAB have lists of the same names."""
    read = []
    monkeypatch.setattr(check, "read_task", lambda task, folder: read.append(task) or read_task(task, folder))
    (found,) = check.find_tasks(write_vtab(TASKS["vtab/cifar"], tmp_path / "cifar100"))
    assert found.is_complete and read == [TASKS["vtab/cifar"]]


@pytest.mark.parametrize("test", [[], [["test", "6", "2"]]], ids=["no test images", "test images"])
def test_check_reports_other_folders_as_train_reads_them(command, write_images, test):
    folders = {"train/a": 5, "train/b": 5} | ({"test/a": 3, "test/b": 3} if test else {})
    result = command("check", write_images(folders))
    counts = [re.findall(r"\w+", line) for line in result.output.splitlines() if "│" in line]
    assert result.exit_code == 0
    assert counts == [["train", "8", "2"], ["val", "2", "2"], *test]


@pytest.mark.parametrize("options, said", [(["--task", "cub"], "not found"), ([], "not found: vtab/cifar")])
def test_check_fails_where_there_is_nothing(command, tmp_path, options, said):
    result = command("check", tmp_path, *options)
    assert result.exit_code == 1 and said in result.output


def test_check_cuts_no_name_short_in_a_narrow_terminal(command, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    flowers = shrink(monkeypatch, "vtab/oxford_flowers102")
    folder = write_vtab(flowers, tmp_path / "oxford_flowers102")
    (folder / "images" / "test" / "000000.jpg").unlink()
    lines = [line.strip("│ ") for line in command("check", tmp_path).output.splitlines()]
    row = next(i for i, line in enumerate(lines) if line.startswith("vtab/oxford_flowers102 "))
    assert lines[row + 1].startswith("oxford_flowers102")
    assert any("images/test/000000.jpg is not there" in line for line in lines)


def test_check_names_shards_of_the_full_set(command, tmp_path):
    write_shards(tmp_path / "cifar", {"train": 2})
    result = command("check", tmp_path, "--task", "cifar")
    assert result.exit_code == 1 and "shards" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [(["no-folder"], "DIR is no-folder"), ([".", "--task", "cifra"], "close names: vtab/cifar")],
)
def test_check_refuses_what_it_cannot_do(command, arguments, message):
    result = command("check", *arguments)
    assert result.exit_code == 2 and message in result.output


def test_manifest_says_where_the_images_came_from(cifar, tfds, tmp_path):
    prepare_task(cifar, "tfds/cifar100", tmp_path)
    found = json.loads((tmp_path / "cifar" / "prepared.json").read_text())
    assert (found["task"], found["source"]) == ("vtab/cifar", "tfds/cifar100")
