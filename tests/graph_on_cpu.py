"""GraphedStep without CUDA: a replay runs the captured step again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vpt_fast import graphed


class CPUStream:
    """In place of CUDA's: a replay that runs the captured step again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = 0

    def run(self, step: Callable[[], None]) -> None:
        step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        return step


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a GraphedStep be of a model on the CPU."""
    monkeypatch.setattr(graphed, "_CaptureStream", CPUStream)
    monkeypatch.setattr(graphed, "_device_of", lambda model, optimizer: torch.device("cpu"))
