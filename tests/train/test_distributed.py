"""Two processes under torchrun train what one process trains, as often as they like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vpt_fast import loop
from vpt_fast.cache import TrainingCache
from vpt_fast.classification import Classification
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.splits import open_splits
from vpt_fast.run import RunFolder
from vpt_fast.world import World

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import scenes as generated  # noqa: E402

ARGUMENTS = (
    "--backbone=vit_tiny_patch16_224",
    "--no-pretrained",
    "--backbone-arg=img_size=32",
    "--backbone-arg=depth=2",
    "--backbone-arg=embed_dim=48",
    "--num-prompts=3",
    "--prompt-dropout=0",
    "--epochs=3",
    "--warmup-epochs=0",
    "--batch-size=6",
    "--accumulate=2",
    "--base-lr=2",
    "--device=cpu",
)

# Everything that two processes do here, since starting them takes longer than all of it.
TWO_PROCESSES = """
import json, os, sys, pytest, torch
from graph_on_cpu import capture_on_cpu
from vpt_fast import loop
from vpt_fast.cli import app
from vpt_fast.world import join_world

for arguments in json.loads(sys.argv[1]):
    app([part.replace("RANK", os.environ["RANK"]) for part in arguments], standalone_mode=False)

with pytest.MonkeyPatch.context() as patch:
    capture_on_cpu(patch)
    patch.setattr(loop, "captures_steps", lambda *_: True)
    app(json.loads(sys.argv[2]), standalone_mode=False)

for time in range(20):
    with join_world("cpu") as world:
        assert world.from_main(lambda: time) == time
        network = torch.nn.Linear(1, 1, bias=False)
        with world.joined(network) as parallel:
            parallel(torch.full((1, 1), world.rank + 1.0)).sum().backward()
        assert network.weight.grad.item() == 1.5
        network = torch.nn.Linear(2, 3, bias=False)
        network.weight.data = torch.full((2, 3), world.rank + 1.0).T
        world.share_parameters(network)
        assert (network.weight == 1).all()
        mean = torch.tensor(world.rank + 1.0)
        world.average([mean])
        assert mean.item() == 1.5
        print("joined", flush=True)
"""


GRAPHED = ("--accumulate=1", "--clip-grad-norm=0.01")  # 4 steps an epoch are captured, and a last one is not


def arguments(folder: Path, problem: str, processes: str) -> list[str]:
    scenes = ("--task=segmentation", "--head-channels=8") if problem == "segmentation" else ()
    return [
        "train",
        f"--data={folder / problem}",
        f"--out={folder / problem}-{processes}",
        *ARGUMENTS,
        *scenes,
    ]


@pytest.fixture(scope="module")
def two_processes(color_images, tmp_path_factory) -> tuple[Path, str]:
    """The folder of the data and of the runs of two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("distributed")
    images = Path(shutil.copytree(color_images, folder / "classification"))
    # 26 train images: an even number, since processes repeat an image to share an odd one evenly.
    (images / "train" / "red" / "0.png").unlink()
    generated.write_scenes(folder / "segmentation", {"training": 12, "validation": 4}, seed=0)
    (folder / "two_processes.py").write_text(TWO_PROCESSES)
    commands = [arguments(folder, problem, "two") for problem in ("classification", "segmentation")]
    # Process 1 reads a folder that has an image less.
    for rank in (0, 1):
        shutil.copytree(images, folder / f"others-{rank}")
    (folder / "others-1" / "val" / "red" / "0.png").unlink()
    commands.append(arguments(folder, "others-RANK", "two"))
    graphed = [*arguments(folder, "classification", "two-graphed"), *GRAPHED]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(folder / "two_processes.py"), json.dumps(commands), json.dumps(graphed)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            "PYTHONWARNINGS": "error::FutureWarning",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("problem", "metrics"),
    [("classification", ["val_accuracy"]), ("segmentation", ["val_miou", "val_accuracy"])],
)
def test_two_processes_equal_one_with_the_joined_batch(two_processes, command, problem, metrics):
    folder, _ = two_processes
    done = command(*arguments(folder, problem, "one"))
    assert done.exit_code == 0, done.output
    require_equal(folder / f"{problem}-one", folder / f"{problem}-two", metrics)


def test_two_processes_that_capture_their_steps_equal_one_that_does_not(two_processes, command):
    folder, _ = two_processes
    done = command(*arguments(folder, "classification", "one-eager"), *GRAPHED)
    assert done.exit_code == 0, done.output
    require_equal(
        folder / "classification-one-eager", folder / "classification-two-graphed", ["val_accuracy"]
    )


def require_equal(folder_of_one: Path, folder_of_two: Path, metrics: list[str]) -> None:
    one, two = RunFolder(folder_of_one).read(), RunFolder(folder_of_two).read()
    assert (one.facts["processes"], two.facts["processes"]) == (1, 2)
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "val_loss", *metrics):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["epoch"], name)


def test_the_same_processes_join_again_and_again_without_a_warning(two_processes):
    _, printed = two_processes
    assert printed.count("joined") == 40


def test_processes_that_read_other_images_are_refused(two_processes):
    folder, printed = two_processes
    assert printed.count("not all processes read the same images") == 2
    assert not (folder / "others-0-two").exists()


def test_processes_that_can_read_other_test_images_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(World, "agree", lambda world, value: False)
    splits = open_splits(recipe.data, with_test=True)
    with pytest.raises(ValueError, match="not all processes read the same images"):
        loop.evaluate_test(
            Classification(), None, splits, Preprocessing((16, 16)), recipe, World(0, 2, torch.device("cpu")),
            Console(quiet=True), TrainingCache(), threading.Event(),
        )  # fmt: skip
