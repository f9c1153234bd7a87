"""Two processes under torchrun train what one process trains, as often as they like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpt_fast.run import Begun, RunFolder

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import scenes as generated  # noqa: E402

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
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


def test_two_processes_equal_one_with_the_joined_batch(images, tmp_path, command):
    # 26 train images: an even number, since processes repeat an image to share an odd one evenly.
    (images / "train" / "red" / "0.png").unlink()
    one, two = train(command, images, tmp_path)
    assert (one.facts["processes"], two.facts["processes"]) == (1, 2)
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["epoch"], name)


def test_two_processes_segment_as_one_with_the_joined_batch(tmp_path, command):
    data = tmp_path / "scenes"
    generated.write_scenes(data, {"training": 12, "validation": 4}, seed=0)
    scenes = ("--task=segmentation", "--head-channels=8")
    one, two = train(command, data, tmp_path, *scenes)
    assert (one.facts["processes"], two.facts["processes"]) == (1, 2)
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "val_loss", "val_miou", "val_accuracy"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["epoch"], name)


JOINS_OFTEN = """
import torch
from vpt_fast.world import join_world

for time in range(20):
    with join_world("cpu") as world:
        assert world.from_main(lambda: time) == time
        network = torch.nn.Linear(1, 1, bias=False)
        with world.joined(network) as parallel:
            parallel(torch.full((1, 1), world.rank + 1.0)).sum().backward()
        assert network.weight.grad.item() == 1.5
        print("joined", flush=True)
"""


def test_the_same_processes_join_again_and_again_without_a_warning(tmp_path):
    script = tmp_path / "joins_often.py"
    script.write_text(JOINS_OFTEN)
    found = run([*TORCHRUN, str(script)], timeout=120, PYTHONWARNINGS="error::FutureWarning")
    assert found.count("joined") == 40


def train(command, data, folder: Path, *more: str) -> tuple[Begun, Begun]:
    """The runs of one process, which is this one, and of two."""
    one, two = folder / "one", folder / "two"
    done = command("train", f"--data={data}", f"--out={one}", *ARGUMENTS, *more)
    assert done.exit_code == 0, done.output
    arguments = ["train", f"--data={data}", f"--out={two}", *ARGUMENTS, *more]
    run([*TORCHRUN, "-m", "vpt_fast.cli", *arguments], timeout=300)
    return RunFolder(one).read(), RunFolder(two).read()


def run(arguments: list[str], timeout: float, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
