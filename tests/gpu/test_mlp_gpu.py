"""The kernels of the MLP's activations, compiled, against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from definitions import activated, assert_as_good_as, assert_equal_twice, gradient, random, slope
from vpt_fast.kernels.mlp import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_empty")]

SHAPES = [(3, 5, 17), (300, 1), (197, 16), (3, 2049), (8, 197, 3072), (4, 257, 5120)]
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


def pre_activation(shape, kind, dtype):
    *lead, h = shape
    return make(*lead, 2 * h if kind == "swiglu" else h, seed=0, dtype=dtype)


@pytest.mark.parametrize("pack", [False, True], ids=["", "codes"])
@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_activate(shape, kind, dtype, pack):
    u = pre_activation(shape, kind, dtype)
    a, codes, scale = assert_equal_twice(ops.activate, u, kind, pack=pack)
    assert_as_good_as(a, activated(u, kind), activated(u.double(), kind))
    if not pack:
        return
    if kind != "swiglu":
        assert ((codes.double() - 27) / 200 - slope(u.double(), kind)).abs().max() <= 0.0025 + 1e-5
        return
    gate, value = u.double().chunk(2, dim=-1)
    halves = torch.stack((value * slope(gate, "silu"), activated(gate, "silu")), -2)
    decoded = codes.unflatten(-1, (2, -1)) * scale.double().unsqueeze(-1)
    assert ((decoded - halves).abs() <= 0.5001 * scale.unsqueeze(-1) + 1e-6).all()


@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_activate_backward(shape, kind, dtype):
    u, grad = pre_activation(shape, kind, dtype), make(*shape, seed=1, dtype=dtype)
    grad_u = assert_equal_twice(ops.activate_backward, grad, u, None, kind)
    eager, exact = (gradient(lambda t: activated(t, kind), t, grad) for t in (u, u.double()))
    assert_as_good_as(grad_u, eager, exact)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_activate_backward_from_codes(shape, kind, dtype):
    u, grad = pre_activation(shape, kind, dtype), make(*shape, seed=1, dtype=dtype)
    _, codes, scale = ops.activate(u, kind, pack=True)
    grad_u = assert_equal_twice(ops.activate_backward, grad, codes, scale, kind)

    def definition(wide):
        if kind == "gelu":
            return grad.to(wide) * ((codes.to(wide) - 27) / 200)
        decoded = codes.unflatten(-1, (2, -1)).to(wide) * scale.to(wide).unsqueeze(-1)
        return (grad.to(wide).unsqueeze(-2) * decoded).flatten(-2)

    assert_as_good_as(grad_u, definition(torch.float32).to(dtype), definition(torch.float64))


@pytest.mark.parametrize("pack", [False, True], ids=["u", "codes"])
@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_in_place_gives_the_same_bits(kind, pack):
    u, grad = (
        make(8, 197, 3072, seed=0, dtype=torch.bfloat16),
        make(8, 197, 3072, seed=1, dtype=torch.bfloat16),
    )
    a, codes, _ = ops.activate(u, kind, pack=pack)
    kept = codes if pack else u.clone()
    expected = ops.activate_backward(grad, kept, None, kind)
    codes_in_place = ops.activate_(u, kind, pack=pack)
    ops.activate_backward_(grad, kept, kind)
    assert torch.equal(u, a) and torch.equal(grad, expected)
    assert codes_in_place is None if codes is None else torch.equal(codes_in_place, codes)


@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
def test_extreme_values_are_finite(kind):
    u = torch.tensor([-200.0, -88, -30, -12, -1e-3, 0, 1e-3, 12, 30, 88, 100, 200], device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, *_ = ops.activate(u.to(dtype), kind, pack=True)
        assert torch.isfinite(a).all()
        assert torch.isfinite(ops.activate_backward(torch.ones_like(a), u.to(dtype), None, kind)).all()


@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    u = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    u[-4096:] = make(4096, seed=0)
    assert torch.equal(ops.activate(u, "gelu")[0][-4096:], ops.activate(u[-4096:].clone(), "gelu")[0])


def test_compiles_without_a_graph_break():
    def both(u, grad):
        a, codes, _ = ops.activate(u, "gelu", pack=True)
        return a, ops.activate_backward(grad, codes, None, "gelu")

    arguments = make(64, 3072, seed=0), make(64, 3072, seed=1)
    for x, y in zip(torch.compile(both, fullgraph=True)(*arguments), both(*arguments), strict=True):
        assert torch.equal(x, y)
