"""What the launchers' checks remember: a layout that has passed is not looked at again, others are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vpt_fast.kernels import checks, launch


@pytest.fixture
def looked_at() -> list[str]:
    return []


@pytest.fixture
def check(looked_at: list[str]):
    @checks.once_per_layout
    def remembered(kind: str = "", **tensors: torch.Tensor | None) -> int:
        looked_at.append(kind)
        if kind == "wrong":
            raise ValueError("wrong")
        return len(looked_at)

    return remembered


def x() -> torch.Tensor:
    return torch.zeros(4, 8)


def test_the_same_layout_is_looked_at_once(check, looked_at) -> None:
    assert check(x=x()) == check(x=x()) == 1
    assert len(looked_at) == 1


OTHERS = {
    "shape": lambda: torch.zeros(2, 8),
    "strides": lambda: torch.zeros(8, 4).t(),
    "dtype": lambda: x().double(),
    "alignment": lambda: torch.zeros(33)[1:].view(4, 8),
    "device": lambda: x().to("meta"),
    "requires_grad": lambda: x().requires_grad_(),
    "none": lambda: None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_layout_is_looked_at(check, looked_at, other) -> None:
    check(x=x())
    check(x=other())
    assert len(looked_at) == 2


def test_another_name_argument_or_mode_is_looked_at(check, looked_at) -> None:
    check(x=x())
    check(y=x())
    check("kind", x=x())
    with torch.no_grad():
        check(x=x())
    assert len(looked_at) == 4


def test_off_cuda_it_is_looked_at_anew_without_the_interpreter(check, looked_at, monkeypatch) -> None:
    check(x=x())
    monkeypatch.delenv("TRITON_INTERPRET")
    check(x=x())
    assert len(looked_at) == 2


def test_what_is_wrong_is_wrong_every_time(check) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            check("wrong", x=x())


def test_no_more_layouts_are_remembered_than_the_most(check, looked_at, monkeypatch) -> None:
    monkeypatch.setattr(checks, "MOST_LAYOUTS", 2)
    for width in (1, 2, 3, 1):  # the third sweeps out the first two
        check(x=torch.zeros(width))
    assert len(looked_at) == 4


def test_tensors_to_be_differentiated_are_refused() -> None:
    with pytest.raises(ValueError, match="x: requires a gradient, .* want torch.no_grad"):
        checks.require_device(x=x().requires_grad_())
    with torch.no_grad():
        checks.require_device(x=x().requires_grad_())


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="y: got a tensor on meta, want cpu like the others"):
        checks.require_device(x=x(), none=None, y=x().to("meta"))


def test_a_gpu_older_than_triton_takes_is_named(monkeypatch) -> None:
    old = SimpleNamespace(is_cuda=True, requires_grad=False, device=torch.device("cuda", 0))
    monkeypatch.setattr(launch, "_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    wanted = "backend='triton': x is on Tesla T4, want an NVIDIA GPU of compute capability 8.0 or more"
    with pytest.raises(ValueError, match=wanted):
        checks.require_device(x=old)


def test_what_is_forgotten_is_looked_at_again(check, looked_at) -> None:
    check(x=x())
    checks.forget_layouts()
    check(x=x())
    assert len(looked_at) == 2
