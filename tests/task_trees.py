"""Small folders in the layouts of VTAB-1k, FGVC and WebDataset, with real image files."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from timm.data.dataset import IterableImageDataset

from vpt_fast.data.tasks import TASKS, Task

SIZES = {"train": 8, "val": 4, "test": 6}
NUM_CLASSES = 2


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, **sizes: int) -> Task:
    """The task with 2 classes and 8, 4 and 6 images, or as said, for as long as the test runs."""
    wanted = {f"num_{split}": count for split, count in (SIZES | sizes).items()}
    task = dataclasses.replace(TASKS[name], num_classes=NUM_CLASSES, **wanted)
    monkeypatch.setitem(TASKS, name, task)
    return task


def picture(seed: int, size: int = 16) -> Image.Image:
    """Noise over a red channel that is bright for odd seeds, so that label = seed % 2 can be learned."""
    pixels = np.random.default_rng(seed).integers(0, 160, (size, size + seed % 3, 3), dtype=np.uint8)
    pixels[..., 0] += 80 * (seed % 2)
    return Image.fromarray(pixels)


def write_vtab(task: Task, folder: Path) -> Path:
    """Layout A, JPEG files; labels 0, 1, 0, 1, ..."""
    for number, (split, file) in enumerate(task.files.items()):
        name = file.removesuffix(".txt")
        (folder / "images" / name).mkdir(parents=True)
        lines = []
        for i in range(task.sizes[split]):
            path = f"images/{name}/{i:06d}.jpg"
            picture(100 * number + i).save(folder / path, quality=95)
            lines.append(f"{path} {i % 2}")
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def write_fgvc(task: Task, folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Layout B, PNG files in class folders; class ids 3 and 7."""
    for number, split in enumerate(splits):
        count = task.sizes[split] + (task.num_val if split == "train" and "val" not in splits else 0)
        entries = {}
        for i in range(count):
            name = f"{'ab'[i % 2]}/{split}{i}.png"
            path = folder / task.image_folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(100 * number + i).save(path)
            entries[name] = (3, 7)[i % 2]
        (folder / task.files[split]).write_text(json.dumps(entries))
    return folder


def stream(samples: list[tuple[Image.Image, object]], full_name: str) -> IterableImageDataset:
    """What timm makes of a range of a data set in TensorFlow Datasets."""

    class Reader(list):
        builder = SimpleNamespace(info=SimpleNamespace(full_name=full_name))

    return IterableImageDataset(None, reader=Reader(samples))


def write_shards(
    root: Path,
    counts: dict[str, int],
    *,
    per_shard: int = 5,
    names: bool = True,
    first: int = 0,
    shift: int = 0,
) -> Path:
    """Layout C, lossless WebP files; labels 0, 1, 0, 1, ... or from `shift` on, pictures from `first` on."""
    root.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        (root / split).mkdir()
        starts = range(0, count, per_shard)
        (root / split / "nshards.txt").write_text(str(len(starts)))
        for shard, start in enumerate(starts):
            with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
                for i in range(start, min(start + per_shard, count)):
                    encoded = io.BytesIO()
                    picture(100 * number + first + i).save(encoded, "webp", lossless=True)
                    for ending, data in (
                        ("cls", str((i + shift) % 2).encode()),
                        ("webp", encoded.getvalue()),
                    ):
                        member = tarfile.TarInfo(f"s{i:07d}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    if names:
        (root / "classnames.txt").write_text("dark\nbright\n")
    return root
