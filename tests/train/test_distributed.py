"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vpt_fast.run import RunFolder

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


def test_two_processes_equal_one_with_the_joined_batch(images, tmp_path):
    # 26 train images: an even number, since processes repeat an image to share an odd one evenly.
    (images / "train" / "red" / "0.png").unlink()
    launch(["-m", "vpt_fast.cli"], images, tmp_path / "one")
    launch(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vpt_fast.cli"],
        images,
        tmp_path / "two",
    )
    one, two = (RunFolder(tmp_path / name).read() for name in ("one", "two"))
    assert (one.facts["processes"], two.facts["processes"]) == (1, 2)
    for row, other in zip(one.metrics, two.metrics, strict=True):
        for name in ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["epoch"], name)


def launch(module: list[str], images, out) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *module, "train", f"--data={images}", f"--out={out}", *ARGUMENTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
