"""The kernels of normalisation, compiled, against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from definitions import EPS, assert_as_good_as, assert_equal_twice, gradient, normalized, random, rstd_of
from vpt_fast.kernels.normalization import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

KINDS = ["layer", "rms"]
DTYPES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
]
# Ragged in rows and columns, every class of widths, and the sizes of ViT-B and H.
SHAPES = [
    (50, 3),
    (1, 197, 12, 64),
    (3, 257, 16, 80),
    (2, 197, 384),
    (8, 197, 768),
    (8, 257, 1280),
    (300, 1),
    (3, 1, 1025),
    (7, 3072),
    (5, 8191),
    (5, 8192),
]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]
# Every kernel is compiled for each dtype: all shapes in bfloat16, the last one in the others too.
CASES = [
    pytest.param(shape, torch.bfloat16, id=f"{name}-bf16")
    for shape, name in zip(SHAPES, SHAPE_IDS, strict=True)
]
CASES += [
    pytest.param(SHAPES[-1], torch.float16, id=f"{SHAPE_IDS[-1]}-fp16"),
    pytest.param(SHAPES[-1], torch.float32, id=f"{SHAPE_IDS[-1]}-fp32"),
]


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(*shape, seed=seed, dtype=dtype, device="cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_add_normalize(shape, kind, dtype):
    residual, update = make(*shape, seed=0), make(*shape, seed=1, dtype=dtype)
    hidden, x_hat, rstd, codes, scale = assert_equal_twice(
        ops.add_normalize, residual, update, EPS, kind, dtype, pack=True
    )
    assert torch.equal(hidden, residual + update)
    exact = normalized(hidden.double(), kind)
    if shape[-1] > 1 or kind == "rms":  # one number less its mean is 0, and has no relative error
        assert_as_good_as(x_hat, normalized(hidden, kind).to(dtype), exact)
    assert_as_good_as(rstd, rstd_of(hidden, kind), rstd_of(hidden.double(), kind))
    assert ((codes * scale.double() - exact).abs() <= 0.5001 * scale + 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_normalize(shape, kind, dtype):
    x = make(*shape, seed=0)
    x_hat, rstd, codes, scale = assert_equal_twice(ops.normalize, x, EPS, kind, dtype)
    assert (codes, scale) == (None, None)
    if shape[-1] > 1 or kind == "rms":
        assert_as_good_as(x_hat, normalized(x, kind).to(dtype), normalized(x.double(), kind))
    assert_as_good_as(rstd, rstd_of(x, kind), rstd_of(x.double(), kind))


@pytest.mark.parametrize("packed", [False, True], ids=["x_hat", "codes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), CASES[1:6] + CASES[7:])
def test_normalize_backward(shape, kind, dtype, packed):
    x = make(*shape, seed=0)
    grad, residual = make(*shape, seed=1, dtype=dtype), make(*shape, seed=2, dtype=dtype)
    x_hat, rstd, codes, scale = ops.normalize(x, EPS, kind, dtype, pack=packed)
    kept = codes if packed else x_hat
    dx = assert_equal_twice(ops.normalize_backward, grad, kept, rstd, scale, kind, residual, dtype)
    read = codes * scale if packed else normalized(x, kind).to(dtype).float()
    eager = grad - read * (grad * read).mean(-1, keepdim=True)
    if kind == "layer":
        eager = eager - grad.float().mean(-1, keepdim=True)
    exact = gradient(lambda t: normalized(t, kind), x.double(), grad) + residual
    assert_as_good_as(dx, (eager * rstd_of(x, kind) + residual).to(dtype), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_stream_of_16_bits_is_rounded_once(kind):
    residual, update, above = (make(197, 768, seed=i, dtype=torch.bfloat16) for i in range(3))
    hidden, x_hat, rstd, *_ = assert_equal_twice(
        ops.add_normalize, residual, update, EPS, kind, torch.bfloat16
    )
    assert torch.equal(hidden, (residual.float() + update.float()).bfloat16())
    dx = assert_equal_twice(ops.normalize_backward, update, x_hat, rstd, None, kind, above, torch.bfloat16)
    wide = ops.normalize_backward(update, x_hat, rstd, None, kind, above.float())
    assert_as_good_as(dx, wide.bfloat16(), wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_packed_projection(dtype):
    qkv = make(3, 197, 3, 12, 64, seed=0, dtype=dtype)
    for x in qkv.unbind(2):
        x_hat, *_ = ops.normalize(x, EPS, "rms", dtype)
        assert_as_good_as(x_hat, normalized(x.float(), "rms").to(dtype), normalized(x.double(), "rms"))


@pytest.mark.large
def test_rows_beyond_2_to_the_31_elements():
    x = torch.zeros(2**31 // 1024 + 3, 1024, dtype=torch.float16, device="cuda")
    x[-3:] = make(3, 1024, seed=0)
    x_hat, *_ = ops.normalize(x, EPS, "layer", torch.float16)
    assert torch.equal(x_hat[-3:], ops.normalize(x[-3:].clone(), EPS, "layer", torch.float16)[0])


def test_compiles_without_a_graph_break():
    def block(residual, update, grad):
        hidden, x_hat, rstd, codes, scale = ops.add_normalize(
            residual, update, EPS, "layer", torch.bfloat16, pack=True
        )
        dx = ops.normalize_backward(grad, codes, rstd, scale, "layer", grad, torch.bfloat16)
        return hidden, x_hat, dx

    arguments = make(64, 768, seed=0), *(make(64, 768, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    for a, b in zip(torch.compile(block, fullgraph=True)(*arguments), block(*arguments), strict=True):
        assert torch.equal(a, b)
