"""Kernels of attention in windows, compiled, against float64 autograd on every window's joined sequence."""

from __future__ import annotations

import pytest
import torch
from vpt_fast.kernels.prompted_attention import window_ops
from window_attention_definition import Size, assert_forward_and_backward, computed, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# B, W, T, m, f, H, D: stages of Swin-T at 224 pixels, windows of 12x12, prompts that are read, odd ones; and
# BEiT, whose one window is the image, also with prompts among its tokens
SIZES = [
    Size(2, 64, 49, 50, 0, 3, 32),
    Size(4, 16, 49, 50, 50, 6, 32),
    Size(4, 1, 49, 10, 10, 24, 32, is_shifted=False),
    Size(2, 16, 144, 50, 0, 4, 32),
    Size(2, 4, 144, 7, 7, 8, 32),
    Size(4, 1, 49, 50, 50, 24, 32, reads_tokens=False, is_shifted=False),
    Size(2, 3, 35, 0, 0, 3, 32),
    Size(3, 2, 1, 1, 1, 1, 32),
    Size(4, 1, 197, 50, 0, 12, 64, is_shifted=False),
    Size(4, 1, 247, 0, 0, 12, 64, is_shifted=False),
    Size(2, 9, 49, 50, 7, 2, 64),
]
# Every kernel is compiled for each dtype and head dim: all sizes in bfloat16, two in the others too.
CASES = [
    pytest.param(size, dtype, id=f"{size}-{name}")
    for name, dtype in DTYPES.items()
    for size in (SIZES if dtype == torch.bfloat16 else [SIZES[0], SIZES[-1]])
]


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_forward_and_backward(size: Size, dtype: torch.dtype) -> None:
    assert_forward_and_backward(window_ops, make_case(size, True, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_prompts_of_each_image(dtype: torch.dtype) -> None:
    assert_forward_and_backward(window_ops, make_case(SIZES[1], False, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_without_the_output_are_as_good(dtype: torch.dtype) -> None:
    assert_forward_and_backward(window_ops, make_case(SIZES[0], True, dtype, "cuda"), keep_out=False)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_same_bits_when_run_again(size: Size) -> None:
    case = make_case(size, True, torch.bfloat16, "cuda")
    for first, second in zip(computed(window_ops, case), computed(window_ops, case), strict=True):
        assert torch.equal(first, second)
