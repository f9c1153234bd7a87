"""What two runs have in common, and a signal in the midst of one."""

from __future__ import annotations

import signal

import torch

from vpt_fast.training import loop
from vpt_fast.training.run import RunFolder


def trained(result) -> dict[str, torch.Tensor]:
    return RunFolder(result.path).read().checkpoint.trainable


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def require_equal(one, other) -> None:
    """Bit for bit, metrics too."""
    a, b = trained(one), trained(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert untimed(one.metrics) == untimed(other.metrics)


def interrupt_at_step(monkeypatch, number: int, signal_number=signal.SIGINT) -> None:
    """Sends this process a signal in its step `number`, counted from 1 over all epochs."""
    original, steps = loop.TrainStep.__call__, []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == number:
            signal.raise_signal(signal_number)
        return original(*arguments)

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
