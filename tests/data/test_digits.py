from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vpt_fast.data.decode import decode_image
from vpt_fast.data.digits import _scratch_folder, export_digits
from vpt_fast.data.images import DataError
from vpt_fast.data.splits import open_splits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "new" / "digits"  # the demo's folder is made with it
    export_digits(root, seed=0)
    return root


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def stems(root: Path, split: str) -> set[str]:
    return {path.stem for path in (root / split).rglob("*.png")}


def test_splits_have_800_200_and_797_images(digits):
    splits = open_splits(digits)
    assert splits.classes == tuple("0123456789")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (800, 200, 797)


def test_every_digit_is_in_one_split(digits):
    splits = [stems(digits, split) for split in ("train", "val", "test")]
    assert set.union(*splits) == {f"{i:04d}" for i in range(1797)}


def test_every_split_has_the_classes_in_proportion(digits):
    whole = np.bincount(load_digits().target) / 1797
    for images in (open_splits(digits).train, open_splits(digits).val, open_splits(digits).test):
        counts = Counter(images.labels)
        assert all(abs(counts[label] - share * len(images)) < 1.5 for label, share in enumerate(whole))


def test_image_shows_the_digit_of_its_number_and_class(digits):
    path = next((digits / "train").rglob("*.png"))
    index = int(path.stem)
    data = load_digits()
    image = decode_image(path)
    assert image.size == (32, 32)
    assert path.parent.name == str(data.target[index])
    small = np.asarray(image.convert("L").resize((8, 8), 4), dtype=float)  # 4: the mean of each 4×4 box
    assert np.corrcoef(small.ravel(), data.images[index].ravel())[0, 1] > 0.97
    assert np.abs(small - data.images[index] * 255 / 16).mean() < 20  # the darkest is 0, the brightest 255


def test_complete_folder_of_the_same_seed_is_left_alone(digits):
    before = snapshot(digits)
    export_digits(digits, seed=0)
    assert snapshot(digits) == before


def test_folder_of_another_seed_is_written_anew(digits, tmp_path):
    root = Path(shutil.copytree(digits, tmp_path / "digits"))
    export_digits(root, seed=1)
    assert stems(root, "train") != stems(digits, "train")
    assert sum(len(stems(root, split)) for split in ("train", "val", "test")) == 1797  # no old one
    assert json.loads((root / "digits.json").read_text())["seed"] == 1


def test_incomplete_folder_is_completed(digits, tmp_path):
    shutil.copy(digits / "digits.json", tmp_path)
    shutil.copytree(digits / "val", tmp_path / "val")
    export_digits(tmp_path, seed=0)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == {
        path.relative_to(digits) for path in digits.rglob("*")
    }


def test_nothing_else_is_left_beside_the_folder(digits):
    assert list(digits.parent.iterdir()) == [digits]


def test_empty_folder_is_filled(tmp_path):
    export_digits(tmp_path, seed=0)
    assert len(open_splits(tmp_path).test) == 797


@pytest.mark.parametrize("with_digits", [False, True], ids=["alone", "among-the-digits"])
def test_folder_with_files_of_others_is_refused_and_untouched(digits, tmp_path, with_digits):
    if with_digits:
        shutil.copy(digits / "digits.json", tmp_path)
    (tmp_path / "thesis.tex").write_text("chapter 1")
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"holds 1 file not of the digits, such as thesis\.tex"):
        export_digits(tmp_path, seed=0)
    assert snapshot(tmp_path) == before


def test_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "digits").write_text("")
    with pytest.raises(DataError, match="digits: is a file"):
        export_digits(tmp_path / "digits", seed=0)


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_digits(tmp_path / "digits", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_scratch_folder_of_a_killed_process_is_removed_and_one_in_use_stays(tmp_path):
    left = tmp_path / ".digits.unfinished-abcd_123"
    left.mkdir()
    with _scratch_folder(tmp_path / "digits") as in_use, _scratch_folder(tmp_path / "digits"):
        assert in_use.exists() and not left.exists()


def test_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed: -1"):
        export_digits(tmp_path, seed=-1)
