"""Two processes under torchrun train what one process trains, as often as they like."""

from __future__ import annotations

import dataclasses
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

from vpt_fast.data import decode
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.splits import open_splits
from vpt_fast.training import loop
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import Classification
from vpt_fast.training.resume import require_same_lists
from vpt_fast.training.run import RunFolder
from vpt_fast.training.world import World

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
    "--prompt-init=tokens",
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
from vpt_fast.training import loop
from vpt_fast.commands.cli import app
from vpt_fast.training.world import join_world

for arguments in json.loads(sys.argv[1]):
    app([part.replace("RANK", os.environ["RANK"]) for part in arguments], standalone_mode=False)

with pytest.MonkeyPatch.context() as patch:
    capture_on_cpu(patch)
    patch.setattr(loop, "captures_steps", lambda *_: True)
    app(json.loads(sys.argv[2]), standalone_mode=False)

for time in range(20):
    with join_world("cpu") as world:
        assert world.from_main(lambda: time) == time
        for error in (ValueError, OSError):
            def refuse():
                raise error(f"of rank {world.rank}")
            with pytest.raises(error, match="of rank 0"):
                world.from_main(refuse)
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
        assert world.share_on_machine(lambda rank, size: (rank, size)) == [(0, 2), (1, 2)]
        with pytest.MonkeyPatch.context() as patch:  # each on a machine of its own
            patch.setenv("GROUP_RANK", os.environ["RANK"])
            patch.setenv("LOCAL_RANK", "0")
            patch.setenv("LOCAL_WORLD_SIZE", "1")
            assert world.share_on_machine(lambda rank, size: (rank, size, world.rank)) == [(0, 1, world.rank)]
        print("joined", flush=True)
"""


BROKEN = (
    "train/blue/3.png",
    "train/green/1.png",
    "val/red/1.png",
)  # process 1 decodes the first, 0 the second
DECODED = ("--resident=off", "--workers=0")
# 4 steps an epoch are captured, and a last one is not.
GRAPHED = ("--accumulate=1", "--clip-grad-norm=0.01", "--class-weights=balanced")


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
        for image in (folder / f"others-{rank}" / "val" / "red").iterdir():
            image.write_bytes(b"no image")
    (folder / "others-1" / "val" / "red" / "0.png").unlink()
    commands.append(arguments(folder, "others-RANK", "two"))
    shutil.copytree(images, folder / "broken")
    for name in BROKEN:
        (folder / "broken" / name).write_bytes(b"no image")
    commands.append([*arguments(folder, "broken", "two"), *DECODED])
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


def test_two_processes_leave_out_the_images_that_one_does(two_processes, command):
    folder, printed = two_processes
    done = command(*arguments(folder, "broken", "one"), *DECODED)
    assert done.exit_code == 0, done.output
    require_equal(folder / "broken-one", folder / "broken-two", ["val_accuracy"])
    one, two = (RunFolder(folder / f"broken-{count}").read().facts["data"] for count in ("one", "two"))
    assert one == two
    said = done.output[done.output.index("3 images cannot be read") :].splitlines()[:4]
    assert [name in line for name, line in zip(BROKEN, said[1:], strict=True)] == [True] * 3
    assert " ".join(" ".join(said).split()) in " ".join(printed.split())


@pytest.mark.parametrize("resident", ["off", "host"])
def test_processes_share_the_check_of_images_whose_pixels_are_not_kept(images, recipe, monkeypatch, resident):
    for name in ("blue/3.png", "green/0.png", "red/8.png"):
        (images / "train" / name).write_bytes(b"no image")
    train, decoded, counts = open_splits(str(images)).train, [], []

    def load_image(item, preprocessing):
        decoded.append(item)
        return load(item, preprocessing)

    load = decode.load_image
    monkeypatch.setattr(decode, "load_image", load_image)
    monkeypatch.setattr(World, "any", lambda world, flag: flag)
    monkeypatch.setattr(World, "share_on_machine", lambda world, check: [check(rank, 2) for rank in (0, 1)])
    recipe, preprocessing = dataclasses.replace(recipe, resident=resident, workers=0), Preprocessing((16, 16))
    world = World(0, 2, torch.device("cpu"))
    checked = Classification().check(train, preprocessing, recipe, world, TrainingCache(), counts.append)
    assert sorted(decoded) == sorted(train.items)
    alone = decode.check_images(train)
    assert (checked.images, checked.skipped) == (alone.images, alone.skipped) and len(alone.skipped) == 3
    assert (checked.resident is None) == (resident == "off")
    of_main = counts[: 14 if resident == "off" else 27]  # whose progress is shown
    assert sum(of_main) == 27


def require_equal(folder_of_one: Path, folder_of_two: Path, metrics: list[str]) -> None:
    one, two = RunFolder(folder_of_one).read(), RunFolder(folder_of_two).read()
    assert (one.facts["processes"], two.facts["processes"]) == (1, 2)
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "val_loss", *metrics):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["epoch"], name)


def test_the_same_processes_join_again_and_again_without_a_warning(two_processes):
    _, printed = two_processes
    assert printed.count("joined") == 40


def test_processes_that_read_other_images_are_refused_before_one_is_decoded(two_processes):
    folder, printed = two_processes
    assert printed.count("not all processes read the same images") == 2
    assert not (folder / "others-0-two").exists()


def test_processes_agree_on_lists_by_names_labels_and_classes_wherever_these_are(images, recipe, monkeypatch):
    digests = []
    monkeypatch.setattr(World, "agree", lambda world, digest: digests.append(digest) or True)
    moved = Path(shutil.copytree(images, images.parent / "moved"))
    one = open_splits(str(images), with_test=True)
    swapped = dataclasses.replace(one.train, labels=one.train.labels[::-1])
    renamed = {
        name: dataclasses.replace(getattr(one, name), classes=one.classes[::-1])
        for name in ("train", "val", "test")
    }
    for splits in (
        one,
        open_splits(str(moved), with_test=True),
        dataclasses.replace(one, train=swapped),
        dataclasses.replace(one, **renamed),
        dataclasses.replace(one, val=one.test),
        dataclasses.replace(one, test=one.val),
    ):
        require_same_lists(recipe, splits, World(0, 2, torch.device("cpu")))
    assert digests[0] == digests[1] and len(set(digests)) == 5


def test_processes_that_can_read_other_test_images_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(World, "any", lambda world, flag: flag)
    monkeypatch.setattr(World, "agree", lambda world, value: False)
    splits = open_splits(recipe.data, with_test=True)
    with pytest.raises(ValueError, match="not all processes read the same images"):
        loop.evaluate_test(
            Classification(), None, splits, Preprocessing((16, 16)), recipe, World(0, 2, torch.device("cpu")),
            Console(quiet=True), TrainingCache(), threading.Event(),
        )  # fmt: skip
