"""Matrix products with the activation in the epilogue, compiled, against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from definitions import activated, assert_as_good_as, assert_equal_twice, random, slope
from vpt_fast.kernels.checks import forget_layouts
from vpt_fast.kernels.mlp import gemm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

# Leading shape of x, depth, columns: tails in every dimension, aligned or not, one row, ViT-B, ViT-H
SIZES = [
    ((1,), 16, 144),
    ((2, 67), 70, 200),
    ((2, 67), 80, 208),
    ((130,), 33, 3),
    ((300,), 1, 1),
    ((4, 197), 768, 3072),
    ((2, 257), 1280, 5120),
]
IDS = ["x".join(map(str, (*lead, depth, columns))) for lead, depth, columns in SIZES]
# Every kernel is compiled for each dtype: all sizes in bfloat16, the last one in the others too.
CASES = [pytest.param(size, torch.bfloat16, id=f"{name}-bf16") for size, name in zip(SIZES, IDS, strict=True)]
CASES += [
    pytest.param(SIZES[-1], torch.float16, id=f"{IDS[-1]}-fp16"),
    pytest.param(SIZES[-1], torch.float32, id=f"{IDS[-1]}-fp32"),
]


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(*shape, seed=seed, dtype=dtype, device="cuda")


def assert_forward(size, kind, dtype, pack):
    lead, depth, columns = size
    x, bias = make(*lead, depth, seed=0, dtype=dtype), make(columns, seed=2, dtype=dtype)
    weight = (make(columns, depth, seed=1) / (2 * depth**0.5)).to(dtype)
    a, u, codes = assert_equal_twice(gemm.linear_activate, x, weight, bias, kind, pack=pack)
    eager = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_as_good_as(a, activated(eager, kind), activated(exact, kind))
    if pack:
        # u may have been rounded first, as eager rounds it.
        of_rounding = (slope(eager.double(), kind) - slope(exact, kind)).abs().max()
        assert ((codes.double() - 27) / 200 - slope(exact, kind)).abs().max() <= 0.0025 + 1e-4 + of_rounding
    else:
        assert_as_good_as(u, eager, exact)


def assert_backward(size, kind, dtype, pack):
    lead, depth, columns = size
    grad, u = make(*lead, depth, seed=0, dtype=dtype), make(*lead, columns, seed=2, dtype=dtype)
    weight = (make(depth, columns, seed=1) / (2 * depth**0.5)).to(dtype)
    kept, derivative = u, slope(u.double(), kind)
    if pack:
        kept = (derivative * 200).round().add(27).to(torch.uint8)
        derivative = (kept.double() - 27) / 200
    grad_u = assert_equal_twice(gemm.linear_activate_backward, grad, weight, kept, kind)
    assert_as_good_as(
        grad_u, (grad @ weight) * derivative.to(dtype), (grad.double() @ weight.double()) * derivative
    )


EACH_KEPT = pytest.mark.parametrize("pack", [False, True], ids=["u", "codes"])
EACH_KIND = pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])


@EACH_KEPT
@EACH_KIND
@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_linear_activate(size, kind, dtype, pack):
    assert_forward(size, kind, dtype, pack)


@EACH_KEPT
@EACH_KIND
@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_linear_activate_backward(size, kind, dtype, pack):
    assert_backward(size, kind, dtype, pack)


@pytest.fixture
def specialized(monkeypatch):
    """What goes by descriptors goes through the kernels whose warpgroups do different work."""
    if gemm.arch_of(torch.device("cuda")) != 90:
        pytest.skip("these kernels are for sm_90")
    monkeypatch.setattr(gemm, "_tma_config", lambda: gemm.SPECIALIZED)
    forget_layouts()
    yield
    forget_layouts()


BY_DESCRIPTORS = [case for case in CASES if case.values[1].itemsize == 2 and not case.values[0][1] % 16]


@EACH_KEPT
@pytest.mark.parametrize(("size", "dtype"), BY_DESCRIPTORS)
def test_linear_activate_by_specialized_warpgroups(size, dtype, pack, specialized):
    assert_forward(size, "gelu", dtype, pack)


@EACH_KEPT
@pytest.mark.parametrize(("size", "dtype"), BY_DESCRIPTORS)
def test_linear_activate_backward_by_specialized_warpgroups(size, dtype, pack, specialized):
    assert_backward(size, "gelu", dtype, pack)


@pytest.mark.large
def test_results_beyond_2_to_the_31_elements():
    rows = 2**31 // 4096 + 5
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    x[-5:] = make(5, 64, seed=0)
    weight = (make(4096, 64, seed=1) / 16).bfloat16()
    a, *_ = gemm.linear_activate(x, weight, None, "gelu", keep=False)
    expected, *_ = gemm.linear_activate(x[-5:].clone(), weight, None, "gelu", keep=False)
    assert torch.equal(a[-5:], expected)


def test_compiles_without_a_graph_break():
    def both(x, grad, weight1, bias, weight2):
        a, _, codes = gemm.linear_activate(x, weight1, bias, "gelu", pack=True)
        return a, gemm.linear_activate_backward(grad, weight2, codes, "gelu")

    arguments = [
        make(*shape, seed=seed, dtype=torch.bfloat16)
        for seed, shape in enumerate([(64, 96), (64, 96), (384, 96), (384,), (96, 384)])
    ]
    for x, y in zip(torch.compile(both, fullgraph=True)(*arguments), both(*arguments), strict=True):
        assert torch.equal(x, y)
