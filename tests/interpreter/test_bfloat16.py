"""bfloat16 in the amended interpreter, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_conversion_to_bfloat16_rounds_to_the_nearest(dtype: torch.dtype) -> None:
    ties = torch.tensor([256.0, 257, 258, 259, 511, -257, 0, 65280, torch.inf, -torch.inf])
    source = torch.cat([ties.nan_to_num(7, 7, 7), torch.linspace(-1e3, 1e3, 54)]).to(dtype)
    if dtype.is_floating_point:
        source[:10] = ties.to(dtype)
    target = torch.empty(64, dtype=torch.bfloat16)
    copy_kernel[(1,)](source, target, BLOCK=64)
    assert torch.equal(target, source.bfloat16())


def test_conversion_from_bfloat16_is_exact() -> None:
    source, target = torch.linspace(-7, 7, 64).bfloat16(), torch.empty(64)
    copy_kernel[(1,)](source, target, BLOCK=64)
    assert torch.equal(target, source.float())


@triton.jit
def dot_kernel(a, b, c):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_products_are_of_the_values_in_float32() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float())


@triton.jit
def add_kernel(a):
    tl.store(a, tl.load(a) + tl.load(a))


def test_other_arithmetic_is_refused() -> None:
    with pytest.raises(Exception, match="arithmetic of bfloat16 in the interpreter"):
        add_kernel[(1,)](torch.ones(1, dtype=torch.bfloat16))
