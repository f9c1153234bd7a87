"""The device that a process trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vpt_fast.world import join_world


def test_gpu_that_is_asked_for_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    with join_world("cuda:1") as world:
        assert world.device == current[-1] == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0)]
