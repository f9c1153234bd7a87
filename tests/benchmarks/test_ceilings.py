"""What the share of the ceiling is a share of."""

from __future__ import annotations

import ceilings
import flops
import pytest
import torch
from tiny import tiny_vit
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, torch.dtype]]:
    """The products that are computed, and a clock by which each takes a millisecond, but twice as long in
    the first round that counts."""
    done: list[tuple[int, int, int, torch.dtype]] = []

    class Counted(Tensor):
        def __matmul__(self, other: Tensor) -> Tensor:
            done.append((*self.shape, other.shape[1], self.dtype))  # type: ignore[arg-type]
            return self

    class Clock:
        def __init__(self, device: torch.device) -> None:
            self.marks: list[int] = []

        def mark(self) -> None:
            self.marks.append(len(done))

        def seconds(self) -> list[float]:
            start, end = self.marks
            slow = 2 if start == end - start else 1  # the second round of equally many
            return [1e-3 * (end - start) * slow]

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **kind: randn(*size, **kind).as_subclass(Counted))
    monkeypatch.setattr(ceilings, "Stopwatch", Clock)
    return done


def test_the_large_product_is_square(
    multiplied: list[tuple[int, int, int, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ceilings.LARGE, "cpu", 16)
    assert ceilings.large_product(CPU, torch.bfloat16) == pytest.approx(2 * 16**3 / 1e-3 / 1e12)
    assert set(multiplied) == {(16, 16, 16, torch.bfloat16)}


def test_products_of_a_block_are_those_of_its_matrices(
    multiplied: list[tuple[int, int, int, torch.dtype]],
) -> None:
    shape = flops.shape_of(tiny_vit())  # 17 tokens, width 32, hidden 64
    speed = ceilings.products(flops.block_products(shape, 3), CPU, torch.float32)
    sizes = [(51, 32, 96), (51, 32, 32), (51, 32, 64), (51, 64, 32)]
    assert [size[:3] for size in multiplied[:4]] == sizes
    assert speed == pytest.approx(sum(2 * a * b * c for a, b, c in sizes) / 4e-3 / 1e12)
