"""Segmentation from the command line: trained, gone on with, evaluated, predicted; and what it computes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import interrupt_at_step, require_equal
from test_folder_backbone import write
from torch import nn
from torch.nn import functional as F

from vpt_fast import load_pretrained
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.scene_preprocessing import ScenePreprocessing
from vpt_fast.data.scenes import IGNORED
from vpt_fast.training import classification, scene_inference, segmentation
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import Classification
from vpt_fast.training.inference import LoadedRun
from vpt_fast.training.loop import train
from vpt_fast.training.plots import class_colors
from vpt_fast.training.recipe import Recipe, lr_factor
from vpt_fast.training.run import Labels, RunFolder
from vpt_fast.training.segmentation import (
    MULTI_SCALE,
    PixelCrossEntropy,
    Segmentation,
    evaluate_scenes,
    most_likely,
    segment,
    window_starts,
)
from vpt_fast.training.world import World

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import scenes as generated  # noqa: E402

CLASSES = generated.CLASSES


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    generated.write_scenes(root, {"training": 12, "validation": 3}, seed=0)
    return root


def settings(scenes: Path, **changes) -> dict:
    return {
        "task": "segmentation",
        "data": str(scenes),
        "backbone": "train_test_vit",
        "backbone_arg": {"img_size": 32},
        "num_prompts": 3,
        "head_channels": 8,
        "epochs": 3,
        "batch_size": 4,
        "optimizer": "adamw",
        "base_lr": 1.0,
        "prompt_dropout": 0.1,
        "device": "cpu",
        "workers": 0,
        "tensorboard": False,
        **changes,
    }


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A finished run, which was interrupted in its second epoch, and the same without an interruption."""
    recipe, out = Recipe(**settings(scenes)), tmp_path_factory.mktemp("runs")
    whole = train(recipe, out / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_step(patch, 5, signal.SIGINT)
        stopped = train(recipe, out / "run")
    assert len(stopped.metrics) == 1 and not stopped.is_finished
    return whole, train(recipe, out / "run")


def test_going_on_after_ctrl_c_equals_an_uninterrupted_run(run):
    require_equal(*run)


def test_training_lowers_the_loss_and_its_results_hold_miou(run):
    rows = run[1].metrics
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"]
    found = run[1].results
    assert found["val_miou"] == rows[-1]["val_miou"] > 0 and found["val_images"] == 3
    assert found["test_miou"] is None


def test_eval_repeats_the_scores_of_training(run, command, scenes):
    result = command("eval", run[1].path, "--data", scenes, "--workers", 0, "--json")
    found = json.loads(result.stdout)
    last = run[1].metrics[-1]
    assert (found["miou"], found["accuracy"]) == (last["val_miou"], last["val_accuracy"])
    assert found["loss"] == pytest.approx(last["val_loss"]) and found["per_class"].keys() == set(CLASSES)


def test_report_of_the_generated_scenes_has_the_scores_of_training(run, scenes, tmp_path):
    generated.report(run[1].path, scenes, tmp_path / "report")
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert found["single_scale"]["miou"] == run[1].metrics[-1]["val_miou"]
    assert 0 < found["multi_scale"]["miou"] != found["single_scale"]["miou"]
    assert (found["train_images"], found["epochs"]) == (12, 3)
    with Image.open(tmp_path / "report" / "scenes.png") as picture:
        assert picture.format == "PNG"


def test_eval_takes_label_0_for_what_it_was_in_training(run, scenes, monkeypatch):
    labels = dataclasses.replace(Labels.read(run[1].path / "prompts"), ignore_zero=True)
    asked = []

    def open_scenes(data, **options):
        asked.append(options)
        raise KeyboardInterrupt  # no more is wanted

    monkeypatch.setattr(scene_inference, "open_scenes", open_scenes)
    with pytest.raises(KeyboardInterrupt):
        scene_inference.evaluate_scene_run(LoadedRun(None, labels, torch.device("cpu")), scenes)
    assert asked == [{"ignore_zero": True}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("sky", "sea")}, "has other classes than the run was trained on"),
        ({}, "no pixel of any mask has a class"),
    ],
    ids=["classes", "masks"],
)
def test_eval_on_data_that_it_cannot_score_is_refused(run, scenes, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(scene_inference, "evaluate_scenes", None)
    data = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    for mask in (data / "annotations" / "validation").iterdir():
        Image.new("L", (generated.WIDTH, generated.HEIGHT), IGNORED).save(mask)
    labels = dataclasses.replace(Labels.read(run[1].path / "prompts"), **changes)
    with pytest.raises(ValueError, match=message):
        scene_inference.evaluate_scene_run(LoadedRun(None, labels, torch.device("cpu")), data, workers=0)


@pytest.mark.parametrize(("multi_scale", "scales"), [(False, (1.0,)), (True, MULTI_SCALE)])
def test_eval_takes_the_scales_and_windows_that_it_is_told(run, scenes, monkeypatch, multi_scale, scales):
    asked = []

    def evaluate_scenes(*given, **options):
        asked.append(options)
        raise KeyboardInterrupt  # no more is wanted

    monkeypatch.setattr(scene_inference, "evaluate_scenes", evaluate_scenes)
    with pytest.raises(KeyboardInterrupt):
        scene_inference.evaluate_scene_run(
            LoadedRun.load(run[1].path), scenes, multi_scale=multi_scale, windows=3, workers=0
        )
    assert asked == [{"scales": scales, "flips": multi_scale, "windows": 3}]


def test_eval_and_predict_are_told_where_the_backbones_folder_is_now(command, scenes, tmp_path):
    folder = write(tmp_path / "own")
    train(Recipe(**settings(scenes, backbone=f"local-dir:{folder}", epochs=1)), tmp_path / "run")
    backbone = ("--backbone", f"local-dir:{folder.rename(tmp_path / 'moved')}")
    image = next((scenes / "images" / "validation").iterdir())
    result = command("eval", tmp_path / "run", "--data", scenes, "--workers", 0, *backbone)
    assert result.exit_code == 0, result.stderr
    result = command("predict", tmp_path / "run", image, "--out", tmp_path / "out", *backbone)
    assert result.exit_code == 0, result.stderr


def test_eval_at_several_scales_prints_a_table(run, command, scenes):
    result = command(
        "eval", run[1].path, "--data", scenes, "--multi-scale", "--batch-size", 3, "--workers", 0
    )
    assert result.exit_code == 0, result.output
    assert "tree" in result.stdout and "(3 images, multi-scale)" in result.stdout


def test_predict_writes_masks_of_the_image_size_and_overlays(run, command, scenes, tmp_path):
    images = scenes / "images" / "validation"
    result = command("predict", run[1].path, images, "--out", tmp_path / "out", "--json")
    answers = json.loads(result.stdout)
    assert [Path(answer["mask"]).name for answer in answers] == ["0000.png", "0001.png", "0002.png"]
    for answer in answers:
        shares = list(answer["classes"].values())
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        with Image.open(answer["mask"]) as mask, Image.open(answer["overlay"]) as overlay:
            assert mask.size == (generated.WIDTH, generated.HEIGHT) and overlay.format == "PNG"
            names = {CLASSES[index] for index in np.unique(np.asarray(mask))}
            colors = np.reshape(mask.getpalette(), (-1, 3))
        assert np.array_equal(colors[: len(CLASSES)], class_colors(len(CLASSES)))
        assert names == set(answer["classes"])


def test_predicted_labels_begin_at_1_if_label_0_means_no_class(run, scenes, tmp_path):
    loaded, image = LoadedRun.load(run[1].path), scenes / "images" / "validation" / "0000.jpg"
    found = []
    for ignore_zero in (False, True):
        labels = dataclasses.replace(loaded.labels, ignore_zero=ignore_zero)
        changed = dataclasses.replace(loaded, labels=labels)
        (answer,) = scene_inference.predict_scenes(changed, [image], tmp_path / str(ignore_zero))
        with Image.open(answer["mask"]) as mask:
            found.append((np.asarray(mask), np.asarray(mask.convert("RGB"))))
    (from_0, colors), (from_1, same_colors) = found
    assert np.array_equal(from_0 + 1, from_1) and np.array_equal(colors, same_colors)


def test_predict_prints_a_folder_with_brackets_as_it_is(run, command, scenes, tmp_path):
    image = next((scenes / "images" / "validation").iterdir())
    result = command("predict", run[1].path, image, "--out", tmp_path / "masks[v2]")
    assert str(tmp_path / "masks[v2]" / f"{image.stem}.png") in result.stdout


def test_predict_names_a_broken_image_and_goes_on(run, command, scenes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good = scenes / "images" / "validation" / "0000.jpg"
    result = command("predict", run[1].path, tmp_path / "broken.jpg", good, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "broken.jpg" in result.stderr
    assert (tmp_path / "out" / "0000.png").exists() and "0000-overlay.png" in result.stdout


def test_predict_names_an_image_too_thin_to_be_resized_and_goes_on(run, command, scenes, tmp_path):
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    good = scenes / "images" / "validation" / "0000.jpg"
    result = command("predict", run[1].path, tmp_path / "thin.png", good, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "thin.png: 1×20000 pixels is too thin" in result.stderr
    assert (tmp_path / "out" / "0000.png").exists()


def test_masks_of_two_images_with_one_name_are_refused(run, command, scenes, tmp_path):
    images = [scenes / "images" / split / "0000.jpg" for split in ("training", "validation")]
    result = command("predict", run[1].path, *images, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "would both be written to 0000.png" in result.stderr


def test_masks_that_would_replace_a_picture_are_refused(run, command, scenes, tmp_path):
    with Image.open(scenes / "images" / "validation" / "0000.jpg") as photo:
        photo.save(tmp_path / "photo.png")
        photo.save(tmp_path / "photo-overlay.png")
    result = command("predict", run[1].path, tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "would both be written to photo-overlay.png" in result.stderr


def test_check_reports_scenes_as_segmentation_reads_them(command, scenes):
    result = command("data", "check", scenes)
    assert result.exit_code == 0 and "images with masks" in result.stdout


@pytest.mark.parametrize("way", ["folder", "file", "link in the folder", "link to the image"])
def test_folder_of_the_images_is_refused_for_masks_before_the_run_is_loaded(command, scenes, tmp_path, way):
    photos, links = tmp_path / "photos", tmp_path / "links"
    photos.mkdir()
    links.mkdir()
    shutil.copy(scenes / "images" / "validation" / "0000.jpg", photos / "photo.jpg")
    (links / "photo.jpg").symlink_to(photos / "photo.jpg")
    images, out = {
        "folder": (photos, photos),
        "file": (photos / "photo.jpg", f"{photos}/../photos"),
        "link in the folder": (links, links),
        "link to the image": (links, photos),
    }[way]
    (tmp_path / "no run" / "prompts").mkdir(parents=True)
    result = command("predict", tmp_path / "no run", images, "--out", out)
    assert result.exit_code == 2 and "which holds the image" in result.stderr
    assert [path.name for path in photos.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("folder", ["images", "images/training", "annotations/validation", "annotations/new"])
def test_folder_of_a_data_set_is_refused_for_masks(run, command, scenes, tmp_path, folder):
    shutil.copy(scenes / "images" / "validation" / "0000.jpg", tmp_path / "photo.jpg")
    result = command("predict", run[1].path, tmp_path / "photo.jpg", "--out", scenes / folder)
    assert result.exit_code == 2 and f"part of the data set {scenes}" in result.stderr
    assert not list(scenes.rglob("photo*"))


@pytest.mark.parametrize(
    "folder", ["scenes/masks", "images"], ids=["beside the images", "of that name alone"]
)
def test_folder_that_is_no_part_of_a_data_set_is_taken_for_masks(scenes, tmp_path, folder):
    data = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    scene_inference.require_masks_folder([data / "images" / "validation" / "0000.jpg"], tmp_path / folder)


def test_masks_folder_is_checked_before_a_prediction_in_python_too(scenes, tmp_path):
    images = [scenes / "images" / split / "0000.jpg" for split in ("training", "validation")]
    with pytest.raises(ValueError, match=r"would both be written to 0000\.png"):
        next(scene_inference.predict_scenes(None, images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["0000.png", "0000-overlay.png"])
def test_file_that_is_no_prediction_is_not_replaced(run, command, scenes, tmp_path, name):
    image = scenes / "images" / "validation" / "0000.jpg"
    (tmp_path / name).write_bytes(b"a user's")
    result = command("predict", run[1].path, image, "--out", tmp_path)
    assert result.exit_code == 2 and f"{name}, which is no earlier prediction" in result.stderr
    assert (tmp_path / name).read_bytes() == b"a user's"


def test_repeated_prediction_replaces_its_own_files_and_joins_others(run, command, scenes, tmp_path):
    images = scenes / "images" / "validation"
    for names in (["0000.jpg"], ["0000.jpg", "0001.jpg"]):
        result = command("predict", run[1].path, *(images / name for name in names), "--out", tmp_path)
        assert result.exit_code == 0, result.output
    assert len(list(tmp_path.iterdir())) == 4


def test_prediction_removes_files_that_a_killed_one_left_half_written(run, command, scenes, tmp_path):
    for name in (".0000.png.abcd_123.png", ".0000-overlay.png.abcd_123.png"):
        (tmp_path / name).touch()
    command("predict", run[1].path, scenes / "images" / "validation" / "0000.jpg", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0000.png", "0000-overlay.png"}


def test_file_in_the_place_of_the_masks_folder_is_one_line(run, command, scenes, tmp_path):
    (tmp_path / "file").write_text("")
    result = command("predict", run[1].path, scenes / "images" / "validation", "--out", tmp_path / "file")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "file is no folder" in result.stderr


def test_saved_segmenter_is_the_trained_one(run):
    saved = load_pretrained(run[1].path / "prompts").trainable_state_dict()
    trained = RunFolder(run[1].path).read().checkpoint.trainable
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


def test_classifiers_commands_refuse_a_segmentation_run(run, command, scenes, tmp_path):
    result = command("plot", "tsne", run[1].path, "--data", scenes, "--out", tmp_path / "tsne.png")
    assert result.exit_code == 2 and "PromptedSegmenter, which does not classify images" in result.stderr
    for flags, message in ((["--split", "test"], "split"), (["--data-root", "x"], "data_root")):
        result = command("eval", run[1].path, "--data", scenes, *flags)
        assert result.exit_code == 2 and f"{message}: a segmentation run" in result.stderr
    result = command("predict", run[1].path, scenes / "images" / "validation", "--top-k", 2)
    assert result.exit_code == 2 and "top_k: a segmentation run" in result.stderr


@pytest.mark.parametrize("method", ["vpt+bias", "linear", "bias", "full"])
def test_other_methods_train(scenes, tmp_path, method):
    changes = {} if method == "vpt+bias" else {"num_prompts": None, "prompt_dropout": None}
    recipe = Recipe(**settings(scenes, method=method, epochs=1, **changes))
    assert train(recipe, tmp_path / "run").results["val_miou"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "lora"}, "method is 'lora' with backbone 'train_test_vit', which there is not for task"),
        ({"backbone": "resnet10t"}, "with backbone 'resnet10t', which there is not for task segmentation"),
        ({"augment": "flip"}, "augment: task segmentation has no such setting"),
        ({"test": True, "train-on": "train+val"}, "train_on, test: task segmentation has no such setting"),
        ({"prompt-location": "add", "num-prompts": None}, "prompt_location: got 'add' with a segmenter"),
        ({"task": None, "aux-weight": 0.1}, "aux_weight: only goes with task segmentation"),
        ({"cuda-graph": True}, "a segmenter has several outputs|the device is cpu"),
        ({"data": "nowhere"}, "data is nowhere; there is no such folder"),
        ({"backbone-arg": "img_size=30"}, "img_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_before_anything_is_made(command, scenes, tmp_path, flags, message):
    wanted = {
        "task": "segmentation", "data": scenes, "backbone": "train_test_vit", "backbone-arg": "img_size=32",
        "no-pretrained": True, "out": tmp_path / "run", "device": "cpu", "workers": 0, **flags,
    }  # fmt: skip
    arguments = [f"--{k}" if v is True else f"--{k}={v}" for k, v in wanted.items() if v is not None]
    result = command("train", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert any(part in result.stderr for part in message.split("|"))
    assert not (tmp_path / "run").exists()


def test_sweeps_and_ablations_of_segmentation_are_refused(command, scenes, tmp_path):
    flags = ("--task", "segmentation", "--data", scenes, "--backbone", "train_test_vit")
    for words, message in (
        (["sweep"], "which no sweep searches"),
        (["ablate", "length"], "paper's ablations"),
    ):
        result = command(*words, *flags)
        assert result.exit_code == 2 and message in result.stderr


def test_defaults_of_segmentation():
    recipe = Recipe(task="segmentation", data="x", backbone="x").resolved(
        num_train_images=100, device_type="cpu"
    )
    assert (recipe.batch_size, recipe.warmup_epochs, recipe.schedule) == (16, 0, "poly")
    assert recipe.learning_rate(50) == pytest.approx(recipe.peak_lr * 0.5**0.9)
    assert lr_factor(0, warmup_epochs=2, epochs=4, schedule="poly") == 0.0


def test_images_are_resized_and_normalised_as_the_recipe_says():
    recipe = Recipe(**settings(Path("x"), interpolation="nearest", normalization="none"))
    model = SimpleNamespace(data_config={"mean": (0.5,) * 3, "std": (0.5,) * 3}, image_size=(32, 32))
    made = Segmentation().preprocessing(recipe, model)
    assert made == ScenePreprocessing((32, 32), "nearest", mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("module", "problem", "check", "batches"),
    [
        (segmentation, Segmentation(), "check_scenes", "SceneBatches"),
        (classification, Classification(), "check_images", "Batches"),
    ],
    ids=["segmentation", "classification"],
)
def test_images_are_decoded_by_as_many_workers_as_the_recipe_says(
    monkeypatch, module, problem, check, batches
):
    asked = []
    for name in (check, batches):
        monkeypatch.setattr(module, name, lambda *_, workers, **__: asked.append(workers))
    recipe = Recipe(data="x", backbone="x", workers=3, batch_size=4)
    world, made = World(0, 1, torch.device("cpu")), Preprocessing((16, 16))
    images = SimpleNamespace(images=())
    problem.check((), made, recipe, world, TrainingCache(kept=0), asked.append)
    problem.batches(images, made, recipe, world, train=True)
    assert asked == [3, 3]


def test_loss_adds_up_over_parts_of_a_batch_and_ignores_what_has_no_class():
    torch.manual_seed(0)
    outputs = tuple(torch.randn(4, 3, 5, 6) for _ in range(3))
    masks = torch.randint(0, 3, (4, 5, 6))
    masks[:, 0] = IGNORED
    objective = PixelCrossEntropy(0.0, 0.4)
    each = [
        -(x.log_softmax(1) * F.one_hot(masks.clamp(max=2), 3).movedim(-1, 1)).sum(1)[:, 1:] for x in outputs
    ]
    wanted = (each[0].sum() + 0.4 * (each[1].sum() + each[2].sum())) / 30
    torch.testing.assert_close(objective.loss_sum(outputs, masks), wanted)
    halves = [objective.loss_sum(tuple(x[i : i + 2] for x in outputs), masks[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(halves), wanted)
    right = (outputs[0].argmax(1) == masks)[:, 1:].float().mean((1, 2)).sum()
    torch.testing.assert_close(objective.hits(outputs, masks), right)


def test_image_without_a_labelled_pixel_is_no_hit():
    logits, masks = torch.randn(1, 3, 5, 6), torch.full((1, 5, 6), IGNORED)
    assert PixelCrossEntropy(0.0, 0.4).hits((logits,), masks) == 0


def test_loss_smooths_the_labels_as_the_recipe_says():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    objective = Segmentation().objective(Recipe(**settings(Path("x"), label_smoothing=0.3)), None, None)
    wanted = F.cross_entropy(logits, masks, label_smoothing=0.3, reduction="sum") / 30
    torch.testing.assert_close(objective.loss_sum((logits,), masks), wanted)


class Colours(nn.Module):
    """Logits that are the pixels' own channels, and how many windows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.windows.append(len(images))
        return images


PLAIN = ScenePreprocessing((6, 6), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def segmented(*arguments, **how) -> torch.Tensor:
    """All that `segment` yields, as one tensor (C, H, W)."""
    return torch.cat([found for _, found in segment(*arguments, **how)], dim=1)


@pytest.mark.parametrize(
    ("length", "window", "starts"),
    [(512, 512, [0]), (683, 512, [0, 171]), (1024, 512, [0, 341, 512]), (7, 6, [0, 1]), (10, 6, [0, 4])],
)
def test_windows_are_two_thirds_of_their_side_apart_and_end_at_the_edge(length, window, starts):
    assert window_starts(length, window) == starts


def test_windows_together_give_what_the_pixels_do_one_by_one():
    image = torch.randint(0, 256, (3, 6, 20), dtype=torch.uint8)
    model = Colours()
    found = segmented(model, image, PLAIN, windows=3)
    torch.testing.assert_close(found, (image / 255).softmax(0))
    assert model.windows == [3, 2]  # of five


def test_overlapping_windows_are_averaged():
    class Places(nn.Module):
        def forward(self, images):
            ramp = torch.arange(6.0).expand(len(images), 1, 6, 6)
            return torch.cat((ramp, -ramp), dim=1)

    found = segmented(Places(), torch.zeros(3, 6, 10, dtype=torch.uint8), PLAIN)
    ramp = torch.tensor([0.0, 1, 2, 3, 2, 3, 2, 3, 4, 5])  # 4 and 0, then 5 and 1, where two windows meet
    torch.testing.assert_close(found[0, 0], torch.stack((ramp, -ramp)).softmax(0)[0])


def test_scales_and_mirrored_images_are_averaged_in_the_image_own_frame():
    image = torch.zeros(3, 6, 12, dtype=torch.uint8)
    image[0, :, :6], image[1, :, 6:] = 255, 255
    found = segmented(Colours(), image, PLAIN, scales=(0.5, 1.0, 1.5), flips=True)
    torch.testing.assert_close(found.sum(0), torch.ones(6, 12))
    assert (found.argmax(0)[:, :5] == 0).all() and (found.argmax(0)[:, 7:] == 1).all()


class Mixed(nn.Module):
    """Five classes, each of which some pixels have."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.roll(images, i, 2).sum(1) * (-1) ** i for i in range(5)], dim=1)


PHOTO = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 43, 61), np.uint8))
SEVERAL = {"scales": (0.5, 1.5), "flips": True}


@pytest.mark.parametrize(
    ("how", "pixels", "num_rows"),
    [({}, 1, 1), ({}, 200, 3), ({}, 61 * 43, 43), (SEVERAL, 200, 3)],
    ids=["rows", "threes", "whole", "several scales"],
)
def test_photograph_is_scored_in_bands_of_rows_with_the_same_classes(monkeypatch, how, pixels, num_rows):
    whole = segmented(Mixed(), PHOTO, PLAIN, **how)
    monkeypatch.setattr(segmentation, "PIXELS_AT_ONCE", pixels)
    bands = list(segment(Mixed(), PHOTO, PLAIN, **how))
    assert [rows.start for rows, _ in bands] == list(range(0, 43, num_rows)) and bands[-1][0].stop == 43
    assert all(found.shape == (5, rows.stop - rows.start, 61) for rows, found in bands)
    joined = torch.cat([found for _, found in bands], dim=1)
    torch.testing.assert_close(joined, whole)
    assert torch.equal(joined.argmax(0), whole.argmax(0)) and len(whole.argmax(0).unique()) > 2
    if not how:
        assert torch.equal(most_likely(Mixed(), PHOTO, PLAIN), whole.argmax(0))


@pytest.mark.parametrize("size", [(3000, 7), (40, 50), (31, 90)], ids=["enlarged", "as it is", "reduced"])
def test_rows_resized_alone_are_those_of_the_image_resized(size):
    logits = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], size, mode="bilinear")[0]
    for rows in (slice(0, 1), slice(size[0] // 3, size[0] // 2), slice(size[0] - 2, size[0])):
        found = segmentation._resized_rows(logits, size, rows)
        torch.testing.assert_close(found, whole[:, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "bands"), [(12, 1), (14, 2)])
def test_logits_of_the_scales_are_held_together_only_for_several_bands(monkeypatch, side, bands):
    # The resized images of a square have 2 × (3² + 9²) pixels together: more than 12², fewer than 14².
    steps, resized_rows = [], segmentation._resized_rows

    class Seen(Mixed):
        def forward(self, images):
            steps.append("windows")
            return super().forward(images)

    def resized(*arguments):
        steps.append("resized")
        return resized_rows(*arguments)

    monkeypatch.setattr(segmentation, "_resized_rows", resized)
    monkeypatch.setattr(segmentation, "PIXELS_AT_ONCE", 7 * 14)
    segmented(Seen(), PHOTO[:, :side, :side], PLAIN, **SEVERAL)
    held = ["windows"] * 4 + ["resized"] * 4 * bands
    assert steps == (["windows", "resized"] * 4 if bands == 1 else held)


def test_scores_do_not_depend_on_the_bands(monkeypatch):
    masks = torch.arange(43 * 61).view(43, 61) % 5
    masks[20:30] = IGNORED

    def scores():
        held = Held((PHOTO, masks), (PHOTO.flip(-1), masks))
        return evaluate_scenes(Mixed(), held, 5, World(0, 1, torch.device("cpu")), "fp32")

    whole = scores()
    monkeypatch.setattr(segmentation, "PIXELS_AT_ONCE", 600)
    parts = scores()
    assert (parts.iou, parts.accuracy, parts.num_images) == (whole.iou, whole.accuracy, 2)
    assert parts.loss == pytest.approx(whole.loss)


def test_windows_are_of_the_image_at_the_scale_and_in_the_precision_that_are_asked_for():
    class Precise(Colours):
        def forward(self, images):
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
            return super().forward(images)

    model = Precise()
    segmented(model, torch.zeros(3, 6, 6, dtype=torch.uint8), PLAIN, scales=(2.0,), precision="bf16")
    assert model.windows == [9]  # 12 pixels wide and high, at 0, 4 and 6


@pytest.mark.parametrize("found_by", [segmented, most_likely])
def test_nothing_of_a_prediction_is_kept_for_backward(found_by):
    class Forgetful(Colours):
        def forward(self, images):
            assert not torch.is_grad_enabled()
            return super().forward(images)

    found_by(Forgetful(), torch.zeros(3, 6, 6, dtype=torch.uint8), PLAIN)


def test_padding_of_an_image_that_is_smaller_than_a_window_is_cut_off_again():
    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[0, :, :3], image[1, :, 3:] = 255, 255
    found = segmented(Colours(), image, PLAIN, scales=(0.5,)).argmax(0)
    assert (found[:, 0] == 0).all() and (found[:, -1] == 1).all()


class Held:
    """Scenes from memory, in place of SceneBatches."""

    preprocessing = PLAIN

    def __init__(self, *scenes: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.scenes = scenes

    def epoch(self, epoch: int):
        return iter(self.scenes)


def test_scores_are_those_counted_by_hand():
    def image(classes: torch.Tensor) -> torch.Tensor:
        return 255 * F.one_hot(classes, 3).movedim(-1, 0).to(torch.uint8)

    found = [torch.zeros(6, 6, dtype=torch.int64), torch.ones(6, 9, dtype=torch.int64)]
    masks = [found[0].clone(), found[1].clone()]
    masks[0][0] = 1  # 6 of 36 are of class 1
    masks[1][:3] = IGNORED
    held = Held(*zip(map(image, found), masks, strict=True))
    scores = evaluate_scenes(Colours(), held, 3, World(0, 1, torch.device("cpu")), "fp32")
    assert scores.accuracy == pytest.approx((30 + 27) / (36 + 27))
    assert scores.iou[:2] == pytest.approx((30 / 36, 27 / 33)) and np.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((30 / 36 + 27 / 33) / 2) and scores.num_images == 2
    right, wrong = np.log(np.e + 2) - 1, np.log(np.e + 2)
    assert scores.loss == pytest.approx((57 * right + 6 * wrong) / 63, rel=1e-5)


def test_evaluation_is_in_the_windows_and_precision_that_it_is_told(monkeypatch):
    asked = []

    def one_class(model, image, preprocessing, **how):
        asked.append(how)
        yield slice(0, 6), F.one_hot(torch.zeros(6, 6, dtype=torch.int64), 3).movedim(-1, 0).float()

    monkeypatch.setattr(segmentation, "segment", one_class)
    how = {"scales": (0.5, 2.0), "flips": True, "windows": 3}
    held = Held((torch.zeros(3, 6, 6, dtype=torch.uint8), torch.zeros(6, 6, dtype=torch.int64)))
    evaluate_scenes(Colours(), held, 3, World(0, 1, torch.device("cpu")), "bf16", **how)
    assert asked == [{**how, "precision": "bf16"}]


def test_loss_of_a_class_whose_probability_is_rounded_to_zero_is_finite():
    class Sure(Colours):
        def forward(self, images):
            return 1e4 * super().forward(images)

    image = torch.zeros(3, 6, 6, dtype=torch.uint8)
    image[0] = 255
    held = Held((image, torch.ones(6, 6, dtype=torch.int64)))
    scores = evaluate_scenes(Sure(), held, 3, World(0, 1, torch.device("cpu")), "fp32")
    assert scores.loss == pytest.approx(-np.log(torch.finfo(torch.float32).tiny))
