"""A launcher as one of PyTorch's operations: called itself where nobody looks on, else seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from vpt_fast.kernels.mlp import ops


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operation() -> None:
    u = torch.ones(2, 8)
    with Seen() as seen:
        ops.activate(u, "gelu")
    assert seen.names[0] == "vpt_fast.activate.default"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_trace_holds_the_operation_and_not_what_it_gave() -> None:
    traced = torch.jit.trace(lambda u: ops.activate(u, "gelu")[0], torch.ones(2, 8))
    u = torch.full((2, 8), 3.0)
    assert torch.equal(traced(u), ops.activate(u, "gelu")[0])


def test_a_tensor_that_dispatches_sees_the_operation() -> None:
    with FakeTensorMode() as mode:
        u = mode.from_tensor(torch.ones(2, 8))
    a, *_ = ops.activate(u, "gelu")  # out of the mode
    assert isinstance(a, FakeTensor) and a.shape == (2, 8)


def test_without_onlookers_the_dispatcher_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)
    a, *_ = ops.activate(torch.zeros(2, 8), "gelu")
    assert torch.equal(a, torch.zeros(2, 8))
