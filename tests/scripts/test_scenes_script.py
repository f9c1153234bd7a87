"""scripts/scenes.py: what it draws is what the labels say, and the picture of it can be told apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scenes
import torch
import typer

from vpt_fast.training import scene_inference, segmentation
from vpt_fast.training.inference import LoadedRun
from vpt_fast.training.plots import class_colors
from vpt_fast.training.run import RunFolder


def test_labels_are_of_the_classes_and_edges_have_none():
    for seed in range(5):
        image, labels = scenes.draw_scene(np.random.default_rng(seed))
        assert image.size == labels.shape[::-1] == (scenes.WIDTH, scenes.HEIGHT)
        found = set(np.unique(labels)) - {scenes.NO_CLASS}
        assert {scenes.SKY, scenes.GROUND} < found <= set(range(len(scenes.CLASSES)))
        is_known = labels != scenes.NO_CLASS
        across = (labels[:, 1:] != labels[:, :-1]) & is_known[:, 1:] & is_known[:, :-1]
        assert not across.any()  # wherever two classes meet there is a pixel with none between them


def test_ground_is_below_the_sky_and_of_another_colour():
    image, labels = scenes.draw_scene(np.random.default_rng(0))
    rows = np.arange(scenes.HEIGHT)[:, None].repeat(scenes.WIDTH, axis=1)
    assert rows[labels == scenes.SKY].mean() + 10 < rows[labels == scenes.GROUND].mean()
    pixels = np.asarray(image, np.float64)
    means = [pixels[labels == kind].mean(0) for kind in (scenes.SKY, scenes.GROUND)]
    assert np.abs(means[0] - means[1]).max() > 20


def test_folder_depends_on_the_seed_and_one_that_is_there_stays(tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        scenes.write_scenes(tmp_path / name, {"training": 2, "validation": 1}, seed)
    files = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
        for name in ("one", "again", "other")
    ]
    assert len(files[0]) == 3 and files[0] == files[1] != files[2]
    scenes.write_scenes(tmp_path / "one", {"training": 1}, seed=9)
    assert len(list((tmp_path / "one").rglob("*.png"))) == 3


def test_folder_that_holds_another_number_of_scenes_is_refused(tmp_path):
    for _ in range(2):
        scenes.draw(tmp_path / "some", train=2, val=1, seed=0)
    with pytest.raises(typer.BadParameter, match="where there are 2 and 1 scenes already, want 3 and 1"):
        scenes.draw(tmp_path / "some", train=3, val=1, seed=0)


def test_report_gives_the_model_images_on_its_device(tmp_path, monkeypatch):
    scenes.draw(tmp_path / "scenes", train=1, val=1, seed=0)
    begun = SimpleNamespace(
        recipe=SimpleNamespace(backbone="", method="", epochs=1),
        facts={"parameters": {"trained": 1}, "data": {"train": {"images": 1}}},
    )
    labels = SimpleNamespace(ignore_zero=None)
    run = LoadedRun(model=None, labels=labels, device=torch.device("meta"))
    scores = SimpleNamespace(to_dict=lambda: {"miou": 1.0})
    devices = []

    def most_likely(model, image, preprocessing):
        devices.append(image.device.type)
        return torch.zeros(image.shape[1:])

    monkeypatch.setattr(RunFolder, "read", lambda folder: begun)
    monkeypatch.setattr(LoadedRun, "load", lambda run_folder: run)
    monkeypatch.setattr(LoadedRun, "scene_preprocessing", None)
    monkeypatch.setattr(scene_inference, "evaluate_scene_run", lambda *_, **__: scores)
    monkeypatch.setattr(segmentation, "most_likely", most_likely)
    scenes.report(tmp_path, tmp_path / "scenes", tmp_path / "out")
    assert devices == ["meta"] and (tmp_path / "out/scenes.png").exists()


def test_report_of_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match=f"run: got {tmp_path}, which is no run folder"):
        scenes.report(tmp_path, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("count", [2, 19, 150])
def test_colours_of_classes_differ(count):
    assert len(np.unique(class_colors(count), axis=0)) == count
