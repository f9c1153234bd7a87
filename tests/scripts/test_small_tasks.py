"""The small tasks: what is drawn is what the labels say, and the study's page is that of its results."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_tasks
import small_tasks_study as study
import typer
from photographs import archive_of
from PIL import Image
from run_fixtures import empty_study, no_curves, quick_studies  # noqa: F401
from scipy import ndimage

from vpt_fast.data.splits import open_splits

ROOT = Path(__file__).parents[2]


def drawn(name: str, split: str = "train", count: int = 40) -> list[tuple[np.ndarray, int]]:
    images = small_tasks.drawn_images(name, split, seed=0)
    return [(np.asarray(image)[..., 0] / 255, label) for image, label in itertools.islice(images, count)]


def test_position_is_that_of_the_shape_s_middle() -> None:
    for pixels, label in drawn("shape_position"):
        middle = (ndimage.center_of_mass(pixels)[1] + 0.5) / small_tasks.SIZE
        assert abs((middle - 0.15) / 0.7 * small_tasks.NUM_POSITIONS - (label + 0.5)) < 1


def test_count_is_that_of_separate_shapes() -> None:
    for pixels, label in drawn("shape_count"):
        assert ndimage.label(pixels > 0, structure=np.ones((3, 3)))[1] == label + 1


def test_images_are_drawn_with_the_seeds_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, right = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or right(seed))
    for name, split in itertools.product(("shape_position", "shape_count"), small_tasks.SPLITS):
        drawn(name, split, count=1)
    assert seeds == [[0, number, split] for number in (0, 2) for split in (0, 1, 2)]


def test_what_is_drawn_is_what_the_study_uses() -> None:
    assert {*study.TASKS} == {"digits", "photo_turn", *small_tasks.DRAWN}


@pytest.mark.parametrize("name", small_tasks.DRAWN)
def test_classes_are_even_and_splits_have_no_image_in_common(name: str) -> None:
    splits = {split: drawn(name, split) for split in small_tasks.SPLITS}
    for images in splits.values():
        counts = Counter(label for _, label in images).values()
        assert max(counts) - min(counts) <= 1
    everything = [pixels.tobytes() for images in splits.values() for pixels, _ in images]
    assert len(set(everything)) == len(everything)


def test_every_photograph_is_in_one_split_under_one_turn() -> None:
    total = sum(small_tasks.SPLITS.values())
    photographs = np.zeros((total, 4, 4, 3), dtype=np.uint8)
    photographs[:, 0, 0, 0], photographs[:, 0, 0, 1] = np.arange(total) // 100, np.arange(total) % 100
    photographs[:, 0, 0, 2] = 255  # marks the corner that is the upper left one
    corners = {0: (0, 0), 1: (3, 0), 2: (3, 3), 3: (0, 3)}
    seen = []
    for images in small_tasks.turned_photographs(photographs, seed=0).values():
        for image, label in images:
            pixel = np.asarray(image)[corners[label]]
            assert pixel[2] == 255
            seen.append(int(pixel[0]) * 100 + int(pixel[1]))
    assert sorted(seen) == list(range(total))


def test_a_task_is_written_as_a_whole_or_not_at_all_and_once(tmp_path: Path) -> None:
    def images(*shades: int, broken: bool = False) -> Iterator[small_tasks.Labelled]:
        for i, shade in enumerate(shades):
            yield Image.new("L", (2, 2), shade), i % 2
        if broken:
            raise KeyboardInterrupt

    folder = tmp_path / "tasks" / "shades"
    with pytest.raises(KeyboardInterrupt):
        small_tasks.write_task(folder, {"train": images(1, 2), "val": images(3, broken=True)})
    assert list(folder.parent.iterdir()) == []
    small_tasks.write_task(folder, {"train": images(1, 2, 3), "val": images(4)})
    small_tasks.write_task(folder, {"train": images(5)})
    written = {
        str(path.relative_to(folder)): Image.open(path).getpixel((0, 0)) for path in folder.rglob("*.png")
    }
    assert written == {
        "train/0/0000.png": 1,
        "train/1/0001.png": 2,
        "train/0/0002.png": 3,
        "val/0/0000.png": 4,
    }


def test_an_archive_that_is_none_is_named_before_anything_is_written(tmp_path: Path) -> None:
    archive = tmp_path / "notes.tar.gz"
    archive.write_text("by hand")
    with pytest.raises(typer.BadParameter, match=r"notes.tar.gz is no tar archive"):
        small_tasks.main(tmp_path / "tasks", archive, 0)
    assert list((tmp_path / "tasks").iterdir()) == []


def test_an_archive_that_is_cut_short_is_named(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", (32, 32), (32, 32))
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(typer.BadParameter, match=r"a.tar.gz is no tar archive, or not whole"):
        small_tasks.main(tmp_path / "tasks", archive, 0)


def test_a_folder_for_each_task_of_the_study_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_tasks, "SPLITS", dict.fromkeys(small_tasks.SPLITS, 8))
    archive = archive_of(tmp_path / "a.tar.gz", *[(32, 32)] * 24)
    small_tasks.main(tmp_path / "tasks", archive, 0)
    for name in study.TASKS:
        splits = open_splits(tmp_path / "tasks" / name)
        assert name == "digits" or [len(splits.train), len(splits.val), len(splits.test)] == [8, 8, 8]


def test_a_photograph_of_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="cat/1.jpg is 64x48, wanted 32x32"):
        small_tasks.main(tmp_path / "tasks", archive_of(tmp_path / "a.tar.gz", (32, 32), (64, 48)), 0)


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"a.tar.gz with 1, want 2000 or more"):
        small_tasks.main(tmp_path / "tasks", archive_of(tmp_path / "a.tar.gz", (32, 32)), 0)


def test_a_task_that_is_not_there_is_named_with_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="small_tasks.py writes it with --photographs"):
        study.main(tmp_path, tmp_path / "out", "photo_turn")


@pytest.mark.parametrize("method", study.METHODS)
def test_every_method_of_the_study_is_a_sweep_with_its_own_rates(method: str, tmp_path: Path) -> None:
    sweep = study.plan(tmp_path, "digits", method)
    rates = [sweep.recipe(**point).base_lr for point in sweep.points()]
    assert rates == list(study.METHODS[method][1]) and sweep.seeds == (42, 44, 82, 100, 800)


def test_the_committed_page_shows_the_committed_results() -> None:
    results = json.loads((ROOT / "docs/small-tasks/results.json").read_text())
    assert study.table(results) in (ROOT / "docs/small-tasks.md").read_text()
    for task in results["tasks"].values():
        for found in task.values():
            assert found["mean"] == pytest.approx(np.mean(list(found["test_accuracies"].values())))


def test_the_committed_page_says_on_how_many_tasks_vpt_deep_is_above_the_linear_probe() -> None:
    tasks = json.loads((ROOT / "docs/small-tasks/results.json").read_text())["tasks"]
    assert all(found["vpt-deep"]["mean"] > found["linear"]["mean"] for found in tasks.values())
    page = " ".join((ROOT / "docs/small-tasks.md").read_text().split())
    assert "VPT-Deep is above the linear probe on all four tasks" in page


def test_the_committed_page_says_how_training_is_not_the_paper_s() -> None:
    page = " ".join((ROOT / "docs/small-tasks.md").read_text().split())
    common = study.COMMON
    said = (
        f"label smoothing of {common['label_smoothing']}",
        f"batches of {study.TRAINED['batch_size']} for {study.TRAINED['epochs']} epochs",
        f"weight decay of {common['weight_decay']}",
        "AdamW for every method",
        "no warm-up and no prompt dropout",
    )
    assert [text for text in said if text not in page] == []


def test_a_study_that_is_not_finished_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="digits/linear is not finished"):
        study.collect(tmp_path, ["digits"], list(study.METHODS))


def test_study_writes_what_its_sweeps_have_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_tasks, "SPLITS", {"train": 12, "val": 6, "test": 6})
    small_tasks.write_task(
        tmp_path / "tasks" / "shape_count",
        {split: small_tasks.drawn_images("shape_count", split, seed=0) for split in small_tasks.SPLITS},
    )
    monkeypatch.setattr(study, "METHODS", {"linear": (dict(epochs=1, batch_size=6), (0.1,))})
    plan = study.plan
    monkeypatch.setattr(study, "plan", lambda *of: dataclasses.replace(plan(*of), seeds=(42, 44)))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "small-tasks.md").write_text(f"<!-- {study.MARKER} -->\n<!-- {study.MARKER} -->\n")
    for folder in (None, docs):
        study.main(tmp_path / "tasks", tmp_path / "out", "shape_count", "linear", folder)
    found = json.loads((docs / "small-tasks/results.json").read_text())["tasks"]["shape_count"]["linear"]
    committed = json.loads((ROOT / "docs/small-tasks/results.json").read_text())["tasks"]["digits"]["linear"]
    assert found.keys() == committed.keys()
    assert found["val_accuracies"].keys() == {"0.1"} and found["test_accuracies"].keys() == {"42", "44"}


def test_results_of_another_task_join_those_that_are_there(tmp_path: Path) -> None:
    committed = json.loads((ROOT / "docs/small-tasks/results.json").read_text())
    (tmp_path / "small-tasks.md").write_text(f"<!-- {study.MARKER} -->\n<!-- {study.MARKER} -->\n")
    for task in ("digits", "photo_turn"):
        study.write_docs({**committed, "tasks": {task: committed["tasks"][task]}}, tmp_path)
    written = json.loads((tmp_path / "small-tasks/results.json").read_text())
    assert list(written["tasks"]) == ["digits", "photo_turn"]
    assert study.table(written) in (tmp_path / "small-tasks.md").read_text()


def test_results_of_one_method_leave_those_of_the_others(tmp_path: Path) -> None:
    committed = json.loads((ROOT / "docs/small-tasks/results.json").read_text())
    (tmp_path / "small-tasks.md").write_text(f"<!-- {study.MARKER} -->\n<!-- {study.MARKER} -->\n")
    study.write_docs(committed, tmp_path)
    again = {"vpt-deep": {**committed["tasks"]["digits"]["vpt-deep"], "base_lr": 3.0}}
    study.write_docs({**committed, "tasks": {"digits": again}}, tmp_path)
    written = json.loads((tmp_path / "small-tasks/results.json").read_text())["tasks"]
    assert written == {**committed["tasks"], "digits": {**committed["tasks"]["digits"], **again}}


def test_a_method_without_results_on_some_task_is_not_in_the_table() -> None:
    committed = json.loads((ROOT / "docs/small-tasks/results.json").read_text())
    del committed["tasks"]["digits"]["full"]
    assert study.common_methods(committed) == [
        "linear",
        "bias",
        "adapter",
        "vpt-shallow",
        "vpt-deep",
        "vpt-deep from tokens",
    ]
    assert "| full |" not in study.table(committed)
