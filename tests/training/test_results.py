"""Benchmark tasks in training: their defaults, results.json, and eval of such a run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress as Bars
from task_trees import shrink, write_fgvc, write_vtab
from torch import nn

from vpt_fast.data.decode import SkippedImage
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.scenes import SceneList
from vpt_fast.data.shards import TarImage
from vpt_fast.data.splits import open_splits
from vpt_fast.training import classification, inference, loop
from vpt_fast.training.classification import Classification, Evaluation, evaluate
from vpt_fast.training.inference import LoadedRun, SplitAccuracy, evaluate_run, predict_images
from vpt_fast.training.loop import train
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.report import (
    Progress,
    checking_images,
    device_name,
    predicting,
    print_facts,
    print_skipped,
)
from vpt_fast.training.run import RunError, RunFolder, default_run_folder, list_digest
from vpt_fast.training.world import World


@pytest.fixture
def short(recipe) -> Recipe:
    return dataclasses.replace(recipe, epochs=1, warmup_epochs=0)


def resolved(**knobs) -> Recipe:
    recipe = Recipe(data="x", backbone="train_test_vit", **knobs)
    return recipe.resolved(num_train_images=800, device_type="cpu")


@pytest.mark.parametrize(
    "knobs, normalization, augment, resize",
    [
        ({}, "backbone", "none", None),
        ({"task": "vtab/cifar"}, "imagenet", "none", "squash"),
        ({"task": "fgvc/cub"}, "imagenet", "crop_flip", "shortest"),
        ({"task": "fgvc/cub", "normalization": "inception"}, "inception", "crop_flip", "shortest"),
        ({"task": "fgvc/cub", "augment": "none"}, "imagenet", "none", "shortest"),
        ({"task": "fgvc/cub", "resize": "squash"}, "imagenet", "flip", "squash"),
        ({"task": "vtab/cifar", "augment": "crop_flip"}, "imagenet", "crop_flip", "shortest"),
    ],
)
def test_task_fills_the_preprocessing_that_was_not_given(knobs, normalization, augment, resize):
    recipe = resolved(**knobs)
    assert (recipe.normalization, recipe.augment, recipe.resize) == (normalization, augment, resize)


def test_images_are_resized_and_normalised_as_the_recipe_says():
    given = dict(normalization="none", augment="flip", resize="shortest", interpolation="nearest")
    model = SimpleNamespace(data_config={"mean": (0.5,) * 3, "std": (0.5,) * 3}, image_size=(32, 32))
    made = Classification().preprocessing(resolved(**given), model)
    assert (made.image_size, made.mean, made.std) == ((32, 32), (0.0,) * 3, (1.0,) * 3)
    assert (made.augment, made.resize, made.interpolation) == ("flip", "shortest", "nearest")


def test_digest_of_images_in_shards_depends_on_their_sizes(tmp_path):
    one, same, other = (
        list_digest("x", ImageList((TarImage(tmp_path / shard, 0, size, "a.png"),), (0,), ("red",)))
        for shard, size in (("1.tar", 5), ("2.tar", 5), ("1.tar", 6))
    )
    assert one == same != other


def test_digest_takes_apart_no_path_that_is_below_the_data(tmp_path, monkeypatch):
    (tmp_path / "data" / "red").mkdir(parents=True)
    paths = [tmp_path / "data" / "red" / "1.png", tmp_path / "data-2.png"]
    for path in paths:
        path.write_bytes(b"image")
    text = "red/1.png\0red\0005\0../data-2.png\0red\0005\0"
    taken_apart, relpath = [], os.path.relpath
    monkeypatch.setattr(os.path, "relpath", lambda *a: taken_apart.append(a[0]) or relpath(*a))
    monkeypatch.chdir(tmp_path)
    for data, items in (("data", ("data/red/1.png", "data-2.png")), (tmp_path / "x" / ".." / "data", paths)):
        images = ImageList(tuple(map(Path, items)), (0, 0), ("red",))
        assert list_digest(str(data), images) == hashlib.sha256(text.encode()).hexdigest()
    assert taken_apart == [str(paths[1])] * 2


def test_digest_of_scenes_depends_on_their_masks_and_on_what_these_mean(tmp_path):
    def digest(mask: bytes = b"mask", ignores_zero: bool = False, classes: tuple[str, ...] = ("sky",)) -> str:
        (tmp_path / "mask.png").write_bytes(mask)
        (tmp_path / "image.png").write_bytes(b"image")
        names = ((tmp_path / "image.png",), (tmp_path / "mask.png",))
        return list_digest(str(tmp_path), SceneList(*names, classes, ignores_zero))

    changed = (digest(mask=b"other mask"), digest(ignores_zero=True), digest(classes=("sea",)))
    assert digest() == digest() and len({digest(), *changed}) == 4


@pytest.mark.parametrize(
    ("data", "task", "name"),
    [
        (".", None, "birds-hf-hub_a_b-linear"),
        (".", "vtab/cifar", "vtab-cifar-hf-hub_a_b-linear"),
        (".", "segmentation", "birds-segmentation-hf-hub_a_b-linear"),
    ],
)
def test_run_folder_is_named_by_data_or_task_backbone_and_method(tmp_path, monkeypatch, data, task, name):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    recipe = Recipe(data=data, task=task, backbone="hf-hub:a/b", method="linear")
    assert default_run_folder(recipe) == Path("runs") / name


def test_task_of_a_recipe_has_its_own_name():
    assert resolved(task="cifar100") == resolved(task="vtab/cifar")
    with pytest.raises(ValueError, match="task is 'cifar1000'.*close names: vtab/cifar"):
        resolved(task="cifar1000")


@pytest.mark.parametrize(
    "images, said", [(19_999, ""), (20_000, "Checking 20,000 images: each is decoded once.\n")]
)
def test_log_says_what_takes_time_before_training(images, said):
    console = Console(file=io.StringIO())
    with checking_images(console, images):
        assert console.file.getvalue() == said


@pytest.mark.parametrize(
    "images, said", [(19_999, ""), (20_000, "Predicting 20,000 images; the results follow together.\n")]
)
def test_log_says_that_many_images_are_predicted(images, said):
    console = Console(file=io.StringIO(), width=100)
    with predicting(console, images):
        assert console.file.getvalue() == said


def test_results_hold_the_last_epoch_and_the_test_images(short, tmp_path):
    result = train(dataclasses.replace(short, test=True), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == result.results
    last = result.metrics[-1]
    test = evaluate_run(LoadedRun.load(tmp_path / "run"), short.data, "test").evaluation
    assert result.results == {
        "val_accuracy": last["val_accuracy"],
        "val_loss": last["val_loss"],
        "val_images": 9,
        "test_accuracy": test.accuracy,
        "test_loss": pytest.approx(test.loss, rel=1e-5),
        "test_images": 6,
        "test_listed": list_digest(short.data, open_splits(short.data).test),
    }


def test_run_that_evaluates_no_test_images_says_nothing_of_them(short, tmp_path):
    results = train(short, tmp_path / "run").results
    assert {value for name, value in results.items() if name.startswith("test_")} == {None}


def test_class_without_an_image_has_no_accuracy():
    found = SplitAccuracy("val", ("blue", "red"), Evaluation(0.5, (1, 0), (2, 0)), ())
    assert found.to_dict()["per_class"] == {
        "blue": {"images": 2, "accuracy": 0.5},
        "red": {"images": 0, "accuracy": None},
    }


def test_loss_and_accuracy_are_those_counted_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]])
    labels = torch.tensor([0, 1, 2, 2, 2])  # the third and the fifth are wrong
    batches = SimpleNamespace(epoch=lambda _: zip(logits.split(2), labels.split(2), strict=True))
    seen = []
    network = nn.Dropout(0.5)  # of which an evaluation is free
    found = evaluate(network, batches, 3, World(0, 1, torch.device("cpu")), "fp32", seen.append)
    assert (found.correct, found.images, found.accuracy) == ((1, 1, 1), (1, 1, 3), 3 / 5)
    right, first, second = (math.log(sum(math.exp(x - own) for x in (0, 1, 2))) for own in (2, 1, 0))
    assert found.loss == pytest.approx((3 * right + first + second) / 5) and seen == [2, 2, 1]


def test_images_that_are_left_out_are_counted_and_the_first_ten_named():
    console = Console(file=io.StringIO())
    print_skipped(console, [SkippedImage(Path(f"{i}.png"), "no pixels") for i in range(12)])
    first, *named, last = console.file.getvalue().splitlines()
    assert first == "12 images cannot be read and will be left out:"
    assert named == [f"  {i}.png: no pixels" for i in range(10)] and last == "  and 2 more"


def test_a_path_longer_than_a_line_is_printed_in_one_piece():
    console = Console(file=io.StringIO(), width=40)
    path = "/folder" * 10
    print_facts(console, {"data": f"{path}: 3 classes, and train 1,000 and val 200 images", "run": "a"})
    assert console.file.getvalue().splitlines() == [
        f"data  {path}:",
        "      3 classes, and train 1,000 and val",
        "      200 images",
        "run   a",
    ]


EPOCH = {"epoch": 8, "lr": 0.5, "train_loss": 1.5, "train_accuracy": 0.5, "val_loss": 2.5, "val_accuracy": 1}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_epoch_is_broken_between_train_and_val_in_a_narrow_terminal_alone(is_terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal, soft_wrap=True)
    Progress(console, 10, 4, done=0).end_epoch({**EPOCH, "images_per_second": 1000.0})
    train, val = "train loss 1.5000 accuracy 50.00%", "val loss 2.5000 accuracy 100.00%  1,000 images/s"
    between = "\n             " if is_terminal else "  "
    assert console.file.getvalue() == f"epoch  9/10  lr 0.5      {train}{between}{val}\n"


def test_progress_bar_goes_on_while_val_is_evaluated(short, tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    shown, update = [], Bars.update
    monkeypatch.setattr(Bars, "update", lambda *a, **k: shown.append(k.get("what")) or update(*a, **k))
    monkeypatch.setattr(classification, "FORWARD_BATCH", 4)
    train(dataclasses.replace(short, epochs=1, warmup_epochs=0), tmp_path, console=console)
    last = shown.index("4 val images") - 1
    assert shown[last:] == ["4/4 steps", "4 val images", "8 val images", "9 val images"]


def test_run_without_a_completed_epoch_is_said_to_have_none(short, tmp_path):
    RunFolder(tmp_path).config.write_text(short.to_yaml())
    with pytest.raises(RunError, match=f"the run in {tmp_path} has not completed an epoch yet"):
        LoadedRun.load(tmp_path)


def test_eval_reads_the_data_as_it_is_told(monkeypatch):
    asked = {}

    def note(name, answer=None):
        return lambda *given, **options: asked.update({name: (given, options)}) or answer

    def stop(images, preprocessing, batch_size, *, workers, **options):
        asked["Batches"] = (batch_size, workers)
        raise KeyboardInterrupt  # no more is wanted

    run = SimpleNamespace(
        preprocessing=SimpleNamespace(for_evaluation=lambda: None),
        labels=SimpleNamespace(classes=()),
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(inference, "list_split", note("list_split", ()))
    monkeypatch.setattr(inference, "check_images", note("check_images"))
    monkeypatch.setattr(inference, "Batches", stop)
    where = {"data_root": "d", "console": Console(quiet=True)}
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, "x", "test", batch_size=3, workers=2, **where)
    assert asked["list_split"] == ((run, "x", "test"), where)
    assert asked["check_images"][1]["workers"] == 2 and asked["Batches"] == (3, 2)


def test_eval_finds_timm_s_data_sets_where_it_is_told(short, color_images, tmp_path):
    recipe = dataclasses.replace(short, data="torch/image_folder", data_root=str(color_images))
    result = train(recipe, tmp_path / "run")
    found = evaluate_run(LoadedRun.load(result.path), recipe.data, "val", data_root=recipe.data_root)
    assert found.evaluation.num_images == result.results["val_images"]


class Forgetful(nn.Module):
    """Raises if anything would be kept for backward, and else gives the first image's mean as every logit."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return images.mean().expand(len(images), 3)


def test_evaluation_and_prediction_keep_nothing_for_backward(color_images):
    batches = SimpleNamespace(epoch=lambda _: [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))])
    evaluate(Forgetful(), batches, 3, World(0, 1, torch.device("cpu")), "fp32")
    run = LoadedRun(Forgetful(), predictable(), torch.device("cpu"))
    (found,) = predict_images(run, [color_images / "test" / "red" / "0.png"], 1)
    assert found["predictions"]


def predictable(**preprocessing) -> SimpleNamespace:
    """The labels of a run with three classes."""
    return SimpleNamespace(
        classes=("blue", "green", "red"), preprocessing=Preprocessing((16, 16), **preprocessing)
    )


def test_images_to_predict_are_cropped_as_in_evaluation(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    labels = predictable(resize="shortest", augment="crop_flip")
    (found,) = predict_images(LoadedRun(Forgetful(), labels, torch.device("cpu")), [tmp_path / "wide.png"], 1)
    assert found["predictions"]


def test_images_are_not_decoded_any_more_when_a_prediction_has_failed(monkeypatch):
    ended = []

    def decoding(*_):
        try:
            while True:
                yield torch.zeros(3, 16, 16, dtype=torch.uint8)
        finally:
            ended.append(True)

    monkeypatch.setattr(inference, "map_decoding", decoding)
    run = LoadedRun(nn.Linear(2, 2), predictable(), torch.device("cpu"))
    with pytest.raises(RuntimeError) as raised:
        list(predict_images(run, [Path("x.png")], 1))
    assert ended == [True] and raised.tb is not None  # which holds what was running


def test_finished_run_is_tested_when_that_is_asked_for_later(short, tmp_path, monkeypatch):
    first = train(short, tmp_path / "run")
    assert first.results["test_accuracy"] is None and first.results["val_images"] == 9
    recipe = dataclasses.replace(short, test=True)
    later = train(recipe, tmp_path / "run")
    assert later.new_epochs == 0 and later.results["test_images"] == 6
    monkeypatch.setattr("vpt_fast.training.methods.build_model", None)  # not again
    assert train(recipe, tmp_path / "run").results == later.results


def test_finished_run_without_its_checkpoint_is_not_trained_again_for_test_images(short, tmp_path):
    train(short, tmp_path / "run")
    RunFolder(tmp_path / "run").checkpoint.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="finished, but not its checkpoint.*--split test.*--fresh"):
        train(dataclasses.replace(short, test=True), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["vpt-deep", "linear"])
def test_training_on_val_too_reports_no_val(command, short, color_images, tmp_path, method):
    prompts = {"num_prompts": None, "prompt_dropout": None} if method == "linear" else {}
    recipe = dataclasses.replace(short, method=method, train_on="train+val", test=True, **prompts)
    result = train(recipe, tmp_path / "run")
    assert result.facts["data"]["train"]["images"] == 36 and result.facts["data"]["val"] is None
    assert result.metrics[-1]["val_accuracy"] is None and result.metrics[-1]["val_loss"] is None
    assert result.results["val_accuracy"] is None and result.results["test_images"] == 6
    refused = command("eval", tmp_path / "run", "--data", color_images)
    assert refused.exit_code == 2 and "want test, if the data have it" in refused.output


def test_test_images_go_on_after_ctrl_c(short, tmp_path, monkeypatch):
    recipe = dataclasses.replace(short, test=True)
    with monkeypatch.context() as patch:

        def interrupted(*arguments):
            signal.raise_signal(signal.SIGINT)
            return print_skipped(*arguments)

        patch.setattr(
            loop, "print_skipped", interrupted
        )  # between reading the test images and evaluating them
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    result = train(recipe, tmp_path / "run")
    assert result.new_epochs == 0 and result.results["test_images"] == 6


def test_ctrl_c_before_the_test_images_are_read_does_not_wait_for_all_of_them(short, tmp_path, monkeypatch):
    evaluate_test = loop.evaluate_test
    monkeypatch.setattr(
        loop,
        "evaluate_test",
        lambda *arguments: signal.raise_signal(signal.SIGINT) or evaluate_test(*arguments),
    )
    monkeypatch.setattr(loop, "print_skipped", lambda *_: pytest.fail("all of them were read"))
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(short, test=True), tmp_path / "run")


def test_trained_run_that_lacks_its_test_results_computes_no_frozen_features(short, tmp_path, monkeypatch):
    recipe = dataclasses.replace(short, method="linear", num_prompts=None, prompt_dropout=None)
    train(recipe, tmp_path / "run")
    monkeypatch.setattr(loop, "feature_batches", None)
    result = train(dataclasses.replace(recipe, test=True), tmp_path / "run")
    assert result.new_epochs == 0 and result.results["test_images"] == 6


@pytest.mark.parametrize("part, kept", [({"train_fraction": 0.34}, 3), ({"shots": 2}, 2)], ids=str)
def test_part_of_the_training_images_is_trained_on(short, tmp_path, part, kept):
    result = train(dataclasses.replace(short, **part), tmp_path / "run")
    assert result.facts["data"]["train"]["per_class"] == [kept] * 3
    assert result.facts["data"]["val"]["images"] == 9


@pytest.mark.parametrize("name, write", [("vtab/cifar", write_vtab), ("fgvc/cub", write_fgvc)])
def test_run_of_a_task_is_evaluated_as_the_task(command, tmp_path, monkeypatch, name, write):
    folder = write(shrink(monkeypatch, name), tmp_path / "data")
    options = "--backbone train_test_vit --num-prompts 2 --epochs 1 --test --device cpu --precision fp32"
    run = tmp_path / "run"
    trained = command("train", "--data", folder, "--task", name, *options.split(), "--out", run)
    assert trained.exit_code == 0 and "test accuracy" in trained.output, trained.output
    results = json.loads((run / "results.json").read_text())
    for split in ("val", "test"):
        found = json.loads(command("eval", run, "--data", folder, "--split", split, "--json").stdout)
        assert found["accuracy"] == results[f"{split}_accuracy"]
        assert found["images"] == results[f"{split}_images"]
    saved = json.loads((run / "prompts" / "labels.json").read_text())
    assert saved["split"]["task"] == name
    assert saved["preprocessing"] == json.loads((run / "run.json").read_text())["preprocessing"]
    assert saved["preprocessing"]["augment"] == ("crop_flip" if name == "fgvc/cub" else "none")


def test_test_images_that_are_missing_are_found_before_training(short, images, tmp_path):
    shutil.rmtree(images / "test")
    with pytest.raises(ValueError, match="has no test split"):
        train(dataclasses.replace(short, data=str(images), test=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("threads", "named"), [(1, "cpu (1 thread)"), (2, "cpu (2 threads)")])
def test_device_is_named_with_its_threads(threads, named, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")) == named
