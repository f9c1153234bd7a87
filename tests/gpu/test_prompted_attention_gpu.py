"""Prompted attention's kernels, compiled, against float64 autograd on the joined sequence."""

from __future__ import annotations

import pytest
import torch
from attention_definition import assert_forward_and_backward, inputs, random
from vpt_fast.kernels.prompted_attention import HEAD_DIMS, ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# B, R, N, m, H, D: the shapes of ViT-B/16, ViT-H/14, ViT-B/32, a last block, and what is odd about others
SIZES = [
    (4, 197, 197, 100, 12, 64),
    (2, 257, 257, 50, 16, 80),
    (4, 50, 50, 10, 12, 64),
    (4, 1, 197, 100, 12, 64),
    (2, 197, 197, 0, 3, 64),
    (4096, 1, 1, 1, 1, 64),  # many: with two keys a gradient may be next to nothing, and its error large
    (1, 65, 130, 1024, 1, 64),
    (1, 4096, 4096, 7, 1, 64),
]
SIZES += [(2, 129, 129, 65, 3, d) for d in HEAD_DIMS]
# Every kernel is compiled for each dtype and head dim: all sizes in bfloat16, two in the others too.
CASES = [
    pytest.param(size, dtype, id=f"{'_'.join(f'{n}{v}' for n, v in zip('BRNmHD', size, strict=True))}-{name}")
    for name, dtype in DTYPES.items()
    for size in (SIZES if dtype == torch.bfloat16 else SIZES[:2])
]


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_forward_and_backward(size: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_forward_and_backward(inputs(size, True, dtype, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_prompts_of_each_image(dtype: torch.dtype) -> None:
    assert_forward_and_backward(inputs((3, 197, 197, 50, 4, 64), False, dtype, "cuda"))


WANTED = {
    "packed": dict(need_q=True, need_kv=True, packed=True),
    "queries": dict(need_q=True, need_kv=False),
    "prompts": dict(need_q=False, need_kv=False),
}


def backward(wanted: dict[str, bool], keep_out: bool = True):
    given = inputs((8, 197, 197, 100, 12, 64), True, torch.bfloat16, "cuda")
    grad = random(*given[0].shape, seed=9).to(given[0])
    out, lse = ops.attention(*given)
    return ops.attention_backward(grad, *given, out if keep_out else None, lse, **wanted)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_same_bits_when_run_again(wanted: dict[str, bool]) -> None:
    for first, second in zip(backward(wanted), backward(wanted), strict=True):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("wanted", [WANTED["queries"], WANTED["prompts"]], ids=["queries", "prompts"])
def test_fewer_gradients_are_the_same_ones(wanted: dict[str, bool]) -> None:
    every, some = backward(dict(need_q=True, need_kv=True)), backward(wanted)
    torch.testing.assert_close(some.prompt_kv, every.prompt_kv, rtol=2e-2, atol=1e-2)
    if wanted["need_q"]:
        assert torch.equal(some.q, every.q)


def test_gradients_without_the_output_are_the_same() -> None:
    kept, formed = (backward(WANTED["packed"], keep_out) for keep_out in (True, False))
    for actual, expected in ((formed.qkv, kept.qkv), (formed.prompt_kv, kept.prompt_kv)):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 5e-3  # bfloat16's own is about as large


def test_tensors_of_another_than_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_forward_and_backward(inputs((2, 37, 37, 50, 2, 64), True, torch.float16, "cuda:1"))


@pytest.mark.large
def test_images_2_to_the_31_elements_apart() -> None:
    far = torch.zeros(2**31 + 64, dtype=torch.float16, device="cuda")
    far = far.as_strided((3, 1, 1, 64), (2**30, 64, 64, 1))  # a stride of int32, not times the index
    far.copy_(random(3, 1, 1, 64, seed=1))
    near = far.clone()
    out, lse = ops.attention(far, far, far, None, None)
    expected, expected_lse = ops.attention(near, near, near, None, None)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    wanted = dict(need_q=True, need_kv=True)
    actual = ops.attention_backward(far, far, far, far, None, None, out, lse, **wanted)
    plain = ops.attention_backward(near, near, near, near, None, None, out, lse, **wanted)
    assert torch.equal(actual.q, plain.q) and torch.equal(actual.kv, plain.kv)
