"""A small backbone and small data sets for training in seconds: fixtures of tests of training, sweeps and
commands, whose conftest.py import them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import train_test_vit  # noqa: F401 (timm then knows it)
from PIL import Image
from typer.testing import CliRunner

from vpt_fast.data.digits import export_digits
from vpt_fast.sweeps import trials
from vpt_fast.training import loop
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder

CLASSES = ("blue", "green", "red")


def write_images(root: Path, counts: dict[str, int], seed: int) -> None:
    """Noise over one bright channel per class: root/class/i.png."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
            pixels[..., CLASSES[::-1].index(name)] += 60
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def train_arguments(images, out, **flags) -> list[str]:
    flags = {
        "data": images,
        "out": out,
        "backbone": "train_test_vit",
        "num-prompts": 3,
        "epochs": 6,
        "batch-size": 8,
        "base-lr": 1,
        "prompt-dropout": 0,
        "device": "cpu",
        **flags,
    }
    return ["train", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]


@pytest.fixture(scope="session")
def color_images(tmp_path_factory) -> Path:
    """Three classes; train 27, val 9, test 6 images. Not to be changed: copy it with `images`."""
    root = tmp_path_factory.mktemp("data") / "colors"
    for seed, (split, count) in enumerate({"train": 9, "val": 3, "test": 2}.items()):
        write_images(root / split, dict.fromkeys(CLASSES, count), seed)
    return root


@pytest.fixture
def images(color_images, tmp_path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(color_images, tmp_path / "colors"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    export_digits(root, seed=42)
    return root


@pytest.fixture(scope="session")
def recipe(color_images) -> Recipe:
    """VPT-Deep in 4 epochs of 4 steps, the last of 3 images, with prompt dropout."""
    return Recipe(
        data=str(color_images),
        backbone="train_test_vit",
        num_prompts=3,
        epochs=4,
        warmup_epochs=1,
        batch_size=8,
        base_lr=0.5,
        prompt_dropout=0.2,
        device="cpu",
    )


@pytest.fixture
def settings(color_images) -> dict:
    """Of a sweep of linear probes on the color images."""
    return dict(
        data=str(color_images),
        backbone="train_test_vit",
        method="linear",
        epochs=2,
        warmup_epochs=0,
        batch_size=9,
        device="cpu",
    )


@pytest.fixture
def without_locks(monkeypatch) -> None:
    """A file system that has no locks."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def trained(monkeypatch) -> list:
    """The names of the run folders that trials have trained in, in order."""
    original, folders = loop.train, []

    def train(recipe, out, **options):
        folders.append(out.name)
        return original(recipe, out, **options)

    monkeypatch.setattr(trials, "train", train)
    return folders


@pytest.fixture(scope="session")
def empty_study(tmp_path_factory) -> Path:
    """The file of a sweep's studies before the first, with Optuna's tables."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "sqlite3", sqlite3)  # and not what `quick_studies` has made of it
        trials.open_studies("none", folder, None)
    with sqlite3.connect(folder / "study.db") as file:
        file.execute("DELETE FROM study_directions")
        file.execute("DELETE FROM studies")
    return folder / "study.db"


@pytest.fixture(autouse=True)
def quick_studies(request, monkeypatch) -> None:
    """Studies in a sweep's folder begin as a copy of `empty_study`, as making the tables takes most of a
    second, and nothing waits until they are on the disk."""

    def connect(path, **options):
        if not path.exists():
            shutil.copy(request.getfixturevalue("empty_study"), path)
        connection = original(path, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    original = sqlite3.connect
    monkeypatch.setattr(trials, "sqlite3", SimpleNamespace(connect=connect))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch) -> None:
    """Drawing them takes most of so short a run. Fixtures of a module or the session draw them."""
    monkeypatch.setattr("vpt_fast.training.plots.plot_curves", lambda rows, path: path.touch())


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch) -> None:
    """Which epochs are depends on the time that they take."""
    monkeypatch.setattr("vpt_fast.training.saving.SHARE", 1e9)


@pytest.fixture
def command():
    """Runs vpt-fast with the arguments given."""
    from vpt_fast.commands.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def late_ctrl_c(monkeypatch) -> None:
    """Sends this process SIGINT when a run has come to its end, and nothing of it is left to stop."""
    original = RunFolder.save_results

    def save_results(folder, results):
        original(folder, results)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "save_results", save_results)
