"""The device that a process trains and evaluates on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.training.inference import LoadedRun
from vpt_fast.training.world import find_device, join_world


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A stack of current devices on a machine with two GPUs."""
    devices = [torch.device("cuda", 0)]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        devices.append(chosen)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def test_gpu_that_is_asked_for_is_the_current_one(current: list[torch.device]) -> None:
    with join_world("cuda:1") as world:
        assert world.device == current[-1] == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0)]


def test_gpu_that_is_not_there_is_refused(current: list[torch.device]) -> None:
    with pytest.raises(ValueError, match="device is 'cuda:2'; torch sees 2 CUDA devices here"):
        find_device("cuda:2")


def test_processes_that_would_share_a_gpu_are_refused(
    current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is 'cuda:1' in each of 2 processes.* 'cuda', each"):
        with join_world("cuda:1"):
            pass


@pytest.mark.parametrize("command", ["eval . --data=.", "predict . x.jpg", "plot tsne . --data=."])
def test_gpu_that_a_run_is_used_on_is_the_current_one(
    command: str, current: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []

    def load(*_: object, **__: object) -> LoadedRun:
        found.append(current[-1])
        raise ValueError("that is all")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jpg").touch()
    (tmp_path / "prompts").mkdir()  # as of a run
    monkeypatch.setattr(LoadedRun, "load", load)
    CliRunner().invoke(app, [*command.split(), "--device=cuda:1"])
    assert found == [torch.device("cuda", 1)]
