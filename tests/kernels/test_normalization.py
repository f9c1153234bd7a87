"""The Triton kernels of normalisation, in Triton's interpreter, against float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from definitions import EPS, assert_as_good_as, gradient, normalized, random, rstd_of
from vpt_fast.kernels.normalization import ops

pytestmark = pytest.mark.usefixtures("nan_empty")

KINDS = ["layer", "rms"]
OPS = torch.ops.vpt_fast
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
SHAPES = [(50, 3), (300, 16), (2, 7, 64), (2, 3, 5, 80), (5, 768), (3, 1, 1280), (2, 4097), (1, 8192)]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]


def strided(name: str) -> torch.Tensor:
    """Views as the block makes them."""
    return {
        "few_of_many_rows": random(2, 9, 48, seed=1)[:, 3:7],
        "query_heads_of_packed": random(2, 5, 3, 4, 32, seed=2)[:, :, 1],
        "transposed": random(5, 3, 33, seed=3).transpose(0, 1),
        "wider_rows": random(7, 70, seed=4)[:, 1:50],
        "one_row_for_all": random(1, 40, seed=5).expand(6, 40),
    }[name]


STRIDED = ["few_of_many_rows", "query_heads_of_packed", "transposed", "wider_rows", "one_row_for_all"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_normalize(shape, kind, dtype):
    x = random(*shape, seed=0)
    x_hat, rstd, codes, scale = ops.normalize(x, EPS, kind, dtype)
    assert (x_hat.dtype, rstd.dtype, codes, scale) == (dtype, torch.float32, None, None)
    assert_as_good_as(x_hat, normalized(x, kind).to(dtype), normalized(x.double(), kind))
    assert_as_good_as(rstd, rstd_of(x, kind), rstd_of(x.double(), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STRIDED)
def test_normalize_of_a_view(name, kind):
    x = strided(name)
    assert not x.is_contiguous()
    for got, expected in zip(
        ops.normalize(x, EPS, kind, torch.float16, pack=True),
        ops.normalize(x.contiguous(), EPS, kind, torch.float16, pack=True),
        strict=True,
    ):
        assert got.is_contiguous()
        assert torch.equal(got, expected)


def test_normalize_takes_half_precision():
    x = random(5, 64, seed=0, dtype=torch.float16)
    x_hat, *_ = ops.normalize(x, EPS, "layer", torch.float16)
    assert_as_good_as(x_hat, normalized(x.float(), "layer").half(), normalized(x.double(), "layer"))


def test_rows_with_a_large_mean_keep_their_variance():
    x = random(3, 200, seed=0) + 1000
    x_hat, *_ = ops.normalize(x, EPS, "layer", torch.float32)
    assert_as_good_as(x_hat, normalized(x, "layer"), normalized(x.double(), "layer"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_codes_are_within_half_a_step(shape, kind):
    x = random(*shape, seed=0)
    _, _, codes, scale = ops.normalize(x, EPS, kind, torch.float16, pack=True)
    exact = normalized(x.double(), kind)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (*shape[:-1], 1))
    assert torch.allclose(scale.double(), exact.abs().amax(-1, keepdim=True) / 127, rtol=1e-5)
    assert codes.to(torch.int32).abs().amax(-1).eq(127).all()
    assert ((codes * scale.double() - exact).abs() <= 0.5001 * scale).all()


def test_codes_of_a_row_of_zeros_are_zeros():
    _, rstd, codes, scale = ops.normalize(torch.zeros(3, 20), EPS, "rms", torch.float32, pack=True)
    assert torch.isfinite(rstd).all()
    assert not codes.any()
    assert not scale.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_add_normalize(shape, kind, dtype):
    residual, update = random(*shape, seed=0), random(*shape, seed=1, dtype=dtype)
    hidden, *rest = ops.add_normalize(residual, update, EPS, kind, dtype, pack=True)
    assert torch.equal(hidden, residual + update)
    for got, expected in zip(rest, ops.normalize(hidden, EPS, kind, dtype, pack=True), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", STRIDED)
def test_add_normalize_of_views(name):
    residual = strided(name)
    update = random(*residual.shape, seed=9).half()
    update_view = torch.stack((update, update), -2)[..., 0, :]
    hidden, x_hat, _, codes, scale = ops.add_normalize(residual, update_view, EPS, "layer", torch.float16)
    assert (codes, scale) == (None, None)
    assert torch.equal(hidden, residual + update)
    assert torch.equal(x_hat, ops.normalize(residual + update, EPS, "layer", torch.float16)[0])


# Every two of shape, kind and dtype come with a residual and without.
BACKWARD = [
    pytest.param(shape, kind, *dtype.values, bool((i + j + k) % 2), id=f"{SHAPE_IDS[i]}-{kind}-{dtype.id}")
    for i, shape in enumerate(SHAPES)
    for j, kind in enumerate(KINDS)
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("shape", "kind", "dtype", "with_residual"), BACKWARD)
def test_normalize_backward(shape, kind, dtype, with_residual):
    x, grad = random(*shape, seed=0), random(*shape, seed=1, dtype=dtype)
    residual = random(*shape, seed=2) if with_residual else None
    x_hat, rstd, *_ = ops.normalize(x, EPS, kind, dtype)
    dx = ops.normalize_backward(grad, x_hat, rstd, None, kind, residual)
    exact = gradient(lambda t: normalized(t, kind), x.double(), grad)
    # What low precision is about to lose: x̂ itself is rounded to the compute dtype.
    eager = backward_formula(grad.float(), normalized(x, kind).to(dtype).float(), rstd_of(x, kind), kind)
    if with_residual:
        exact, eager = exact + residual, eager + residual
    assert dx.dtype == torch.float32
    assert_as_good_as(dx, eager, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_stream_of_16_bits_is_rounded_once(kind):
    residual, update = random(5, 48, seed=0).half(), random(5, 48, seed=1).half()
    hidden, x_hat, rstd, *_ = ops.add_normalize(residual, update, EPS, kind, torch.float16)
    assert torch.equal(hidden, (residual.float() + update.float()).half())
    assert torch.equal(x_hat, ops.normalize(hidden.float(), EPS, kind, torch.float16)[0])
    above = random(5, 48, seed=2).half()
    dx = ops.normalize_backward(update, x_hat, rstd, None, kind, above, torch.float16)
    assert torch.equal(dx, ops.normalize_backward(update, x_hat, rstd, None, kind, above.float()).half())


def backward_formula(grad, x_hat, rstd, kind):
    dx = grad - x_hat * (grad * x_hat).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - grad.mean(-1, keepdim=True)
    return dx * rstd


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_normalize_backward_from_codes(shape, kind):
    x, grad, residual = random(*shape, seed=0), random(*shape, seed=1), random(*shape, seed=2)
    _, rstd, codes, scale = ops.normalize(x, EPS, kind, torch.float32, pack=True)
    dx = ops.normalize_backward(grad, codes, rstd, scale, kind, residual)
    eager = backward_formula(grad, codes * scale, rstd, kind) + residual
    exact = backward_formula(grad.double(), codes * scale.double(), rstd.double(), kind) + residual
    assert_as_good_as(dx, eager, exact)


@pytest.mark.parametrize("name", STRIDED)
def test_normalize_backward_of_views(name):
    grad = strided(name)
    x_hat, rstd, _, _ = ops.normalize(random(*grad.shape, seed=1), EPS, "layer", torch.float32)
    residual = torch.stack((grad, grad), 0)[1]
    x_hat_view = torch.cat((x_hat, x_hat), -1)[..., : x_hat.shape[-1]]
    dx = ops.normalize_backward(grad, x_hat_view, rstd, None, "layer", residual)
    contiguous = ops.normalize_backward(grad.contiguous(), x_hat, rstd, None, "layer", grad.contiguous())
    assert torch.equal(dx, contiguous)


def test_statistics_that_are_views_are_those_in_one_piece():
    grad = random(5, 16, seed=1)
    _, rstd, codes, scale = ops.normalize(random(5, 16, seed=0), EPS, "layer", torch.float32, pack=True)
    views = (torch.cat((t, t), -1)[:, :1] for t in (rstd, scale))
    expected = ops.normalize_backward(grad, codes, rstd, scale, "layer")
    assert torch.equal(ops.normalize_backward(grad, codes, *views, "layer"), expected)


def test_dimensions_of_one_row_may_have_any_stride():
    memory = random(2000, seed=0)
    x = memory.as_strided((2, 1, 3, 1, 4, 16), (600, 7, 160, 5, 32, 1))  # the three others do not merge
    x_hat, *_ = ops.normalize(x, EPS, "layer", torch.float32)
    assert torch.equal(x_hat, ops.normalize(x.contiguous(), EPS, "layer", torch.float32)[0])


def test_no_rows_give_no_rows():
    x_hat, rstd, codes, scale = ops.normalize(torch.ones(0, 16), EPS, "rms", torch.float16, pack=True)
    assert [tuple(t.shape) for t in (x_hat, rstd, codes, scale)] == [(0, 16), (0, 1), (0, 16), (0, 1)]
    assert ops.normalize_backward(x_hat, codes, rstd, scale, "rms").shape == (0, 16)


@pytest.mark.parametrize("dim", range(3))
def test_rows_beyond_2_to_the_31_elements(dim):
    far = 2**30 + 80  # an int32, and twice as much is not
    memory = torch.from_numpy(np.empty(2 * far + 80, np.float16))  # pages that nobody touches cost nothing
    shape, strides = [2, 2, 16], [16, 32, 1]  # which do not merge
    shape.insert(dim, 3)
    strides.insert(dim, far)
    x = memory.as_strided(shape, strides)
    x.copy_(random(*shape, seed=0))
    x_hat, *_ = ops.normalize(x, EPS, "layer", torch.float32)
    assert torch.equal(x_hat, ops.normalize(x.contiguous(), EPS, "layer", torch.float32)[0])


def call(op, **changed):
    """An op on small tensors, with some arguments changed."""
    x = torch.ones(4, 8)
    arguments = {
        "normalize": {"x": x, "eps": EPS, "kind": "layer", "dtype": torch.float32},
        "add_normalize": {"residual": x, "update": x, "eps": EPS, "kind": "layer", "dtype": torch.float32},
        "normalize_backward": {
            "grad": x,
            "x_hat": x,
            "rstd": torch.ones(4, 1),
            "scale": None,
            "kind": "layer",
            "residual": None,
        },
    }[op]
    return getattr(ops, op)(**(arguments | changed))


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("normalize", {"x": torch.ones(4, 8).double()}, "x: got torch.float64"),
        ("normalize", {"dtype": torch.float64}, "dtype: got torch.float64"),
        ("normalize", {"x": torch.ones(8, 4).T}, "x: got stride 4"),
        ("normalize", {"x": torch.ones(2, 8193)}, "width: got 8193"),
        ("normalize", {"x": torch.ones(1, 8).expand(2**31 - 1, -1)}, "x: got 2147483647 rows, want at most"),
        ("normalize", {"kind": "batch"}, "kind: got 'batch'"),
        ("normalize", {"x": torch.ones(3, 3, 3, 3, 8).permute(2, 0, 3, 1, 4)}, "x: got 4 leading"),
        ("add_normalize", {"update": torch.ones(1, 8)}, r"update: got shape \(1, 8\), want \(4, 8\)"),
        ("normalize_backward", {"x_hat": torch.ones(4, 8).char()}, "x_hat: got torch.int8"),
        ("normalize_backward", {"scale": torch.ones(4, 1)}, "x_hat: got torch.float32"),
        ("normalize_backward", {"rstd": torch.ones(4)}, r"rstd: got shape \(4,\), want \(4, 1\)"),
        ("normalize_backward", {"residual": torch.ones(4, 8).double()}, "residual: got torch.float64"),
        ("normalize_backward", {"dtype": torch.float64}, "dtype: got torch.float64"),
        ("normalize_backward", {"kind": "batch"}, "kind: got 'batch'"),
    ],
)
def test_error_names_the_argument(op, changed, message):
    with pytest.raises(ValueError, match=message):
        call(op, **changed)


@pytest.mark.parametrize("op", ["normalize", "add_normalize", "normalize_backward"])
def test_cpu_tensors_are_refused_outside_the_interpreter(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': .* on cpu, want a CUDA device"):
        call(op)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.normalize, (torch.ones(2, 3, 8), EPS, "layer", torch.float16, True)),
        (OPS.normalize, (torch.ones(2, 3, 8), EPS, "layer", torch.float16, False)),
        (OPS.add_normalize, (torch.ones(3, 8), torch.ones(3, 8), EPS, "rms", torch.float16, True)),
        *(
            (OPS.normalize_backward, (*[torch.ones(3, 8)] * 2, torch.ones(3, 1), None, "rms", None, dtype))
            for dtype in (torch.float32, torch.float16)
        ),
    ],
    ids=["packed", "plain", "add", "backward", "backward-fp16"],
)
def test_custom_op_tells_the_truth_about_its_outputs(op, arguments):
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_builds_have_all_widths_and_dtypes():
    builds = ops.builds(90)
    assert len({(build.name, build.config) for build in builds}) == len(builds)
    assert {build.constexprs["BLOCK_D"] for build in builds} == {64, 1024, 2048, 4096, 8192}
    assert {build.signature["x_hat"] for build in builds} == {"*fp32", "*bf16", "*fp16", "*i8"}
