"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
import itertools
import os
import sys

import pytest
import torch

# Kernels run in Triton's interpreter, on the CPU, but in the tests for a GPU (`-m gpu`). Triton reads the
# variable when it is first imported, which other conftest files may do before pytest has read its arguments.
# The processes of `-n` are given no arguments, but this one's environment.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "0" if ("-m", "gpu") in itertools.pairwise(sys.argv) else "1"
if os.environ["TRITON_INTERPRET"] == "1":
    assert "triton" not in sys.modules, "imported before its interpreter was asked for"

    from interpreter import amend_interpreter

    amend_interpreter()

gc.disable()  # until all tests are collected, as these and all imported live to the end


def pytest_collection_finish() -> None:
    gc.freeze()  # nothing looks for garbage among them either
    gc.set_threshold(10_000)  # with Python's own 700, a twelfth of the tests' time goes into looking
    gc.enable()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So wide that the commands break and cut no text, of paths above all: how long those are is chance."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, or 77 where it is of integers, so that no test passes on
    what an allocator happened to hand out."""

    # torch.device as a context remembers for good which functions make tensors: not those of this fixture.
    with torch.device("meta"):
        torch.empty(1)

    def filled(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            with torch.no_grad():  # torch.compile makes some that require a gradient
                return t.fill_(float("nan") if t.is_floating_point() else 77)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
