"""Small folders of real image files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from image_files import noise

from vpt_fast.data import loader


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[Mapping[str, int]], Path]:
    """Writes {"class folder": number of PNGs} below tmp_path and returns tmp_path."""

    def write(counts: Mapping[str, int]) -> Path:
        for name, count in counts.items():
            folder = tmp_path / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise(6 + i % 3, 8, seed=i).save(folder / f"{i:03d}.png")
        return tmp_path

    return write


@pytest.fixture
def overlapping(monkeypatch) -> list[torch.device]:
    """The devices to which `Tensor.to` has copied while the program might go on."""
    devices, to = [], torch.Tensor.to

    def recorded(tensor, *arguments, non_blocking=False, **options):
        devices.extend(arguments[:1] if non_blocking else ())
        return to(tensor, *arguments, non_blocking=non_blocking, **options)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    return devices


@pytest.fixture
def full_shared_memory(monkeypatch) -> list[loader._InBytes]:
    """Worker processes find no room in shared memory; the batches that came without it."""
    came, tensors = [], loader._InBytes.tensors

    def refuse(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: Success (0)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    monkeypatch.setattr(loader._InBytes, "tensors", lambda batch: came.append(batch) or tensors(batch))
    return came
