"""The Triton kernels of the MLP's activations, in Triton's interpreter, against float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from definitions import activated, assert_as_good_as, gradient, random, slope
from vpt_fast.kernels.mlp import ops, reference
from vpt_fast.kernels.mlp.jit import activation

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # numpy's, of the interpreter: exponentials that are infinite where the result is 0.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

OPS = torch.ops.vpt_fast
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
# h; the tensor's tail, a tail of each row, one element, whole blocks, more than one block
SHAPES = [(3, 5, 7), (1, 1), (2, 2048), (3, 2049), (2, 1, 1, 1, 3000)]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]
# Elementwise ones differ in their formula alone: each shape with one of them, the others with one shape.
EACH_KIND = pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param(shape, kind, id=f"{name}-{kind}")
        for shape, name in zip(SHAPES, SHAPE_IDS, strict=True)
        for kind in ops.ACTIVATIONS
        if kind in ("gelu", "swiglu") or shape == (3, 2049)
    ],
)


def pre_activation(shape, kind, dtype, seed=0):
    """u of an activation of `shape`."""
    *lead, h = shape
    return random(*lead, 2 * h if kind == "swiglu" else h, seed=seed, dtype=dtype)


def view_of(t: torch.Tensor, name: str) -> torch.Tensor:
    """Equal to t, with other strides."""
    if name == "wider_rows":
        return torch.cat((t, t), -1)[..., : t.shape[-1]]
    if name == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack((t, t), 1)[:, 0]  # every second image


VIEWS = ["wider_rows", "transposed", "every_second"]


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_KIND
def test_activate(shape, kind, dtype):
    u = pre_activation(shape, kind, dtype)
    a, codes, scale = ops.activate(u, kind)
    assert (a.dtype, codes, scale) == (dtype, None, None)
    assert_as_good_as(a, activated(u, kind), activated(u.double(), kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
def test_extreme_values_are_finite(kind, dtype):
    u = torch.tensor([-200.0, -88, -30, -12, -1e-3, 0, 1e-3, 12, 30, 88, 100, 200]).to(dtype)
    a, *_ = ops.activate(u, kind, pack=True)
    expected = activated(u.double(), kind)
    rtol = max(2 * torch.finfo(dtype).eps, 1e-6)
    assert torch.allclose(a.double(), expected, atol=1e-6, rtol=rtol)
    grad_u = ops.activate_backward(torch.ones_like(a), u, None, kind)
    assert torch.isfinite(grad_u).all()


@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_codes_of_a_derivative(shape, kind):
    u = pre_activation(shape, kind, torch.float32)
    a, codes, scale = ops.activate(u, kind, pack=True)
    assert (codes.dtype, codes.shape, scale) == (torch.uint8, u.shape, None)
    assert torch.equal(a, ops.activate(u, kind)[0])
    # Within half a step of 0.005, but for the little that rounding moves a tie.
    assert ((codes.double() - 27) / 200 - slope(u.double(), kind)).abs().max() <= 0.0025 + 1e-6


@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_derivatives_of_0_and_1_are_exact(kind):
    u = torch.tensor([-200.0, 200.0])
    codes = ops.activate(u, kind, pack=True)[1]
    assert codes.tolist() == [27, 227]
    assert ops.activate_backward(torch.tensor([3.0, 3.0]), codes, None, kind).tolist() == [0.0, 3.0]


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    """Every one of a 16-bit dtype."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def assert_within_units(got: torch.Tensor, exact: torch.Tensor, units: float) -> None:
    """16-bit results within so many units in the last place, where they are normal numbers of float16; one
    that is rounded right is within a half."""
    unit = 2.0 ** exact.abs().clamp(min=2.0**-14).log2().floor() * torch.finfo(got.dtype).eps
    assert ((got.double() - exact).abs() / unit).max() <= units


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_every_value_of_16_bits_has_nearly_the_nearest_results(kind, dtype):
    u = finite_values(dtype)
    a, codes, _ = ops.activate(u, kind, pack=True)
    derivative = slope(u.double(), kind)
    assert_within_units(a, activated(u.double(), kind), 0.55)
    # Near the derivative's zero a unit is small.
    units = 0.75 if kind == "gelu" else 1.25
    assert_within_units(ops.activate_backward(torch.ones_like(u), u, None, kind), derivative, units)
    assert ((codes.double() - 27) / 200 - derivative).abs().max() <= 0.0025 + 1e-6


@triton.jit
def before_rounding(u, value, slope, BLOCK: tl.constexpr):
    """GELU for 16-bit results, not rounded to them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, derivative = activation(tl.load(u + at), "gelu", EXACT=False)
    tl.store(value + at, a)
    tl.store(slope + at, derivative)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_for_16_bits_before_it_is_rounded(dtype):
    u = finite_values(dtype)  # a multiple of 256
    value, derivative = torch.empty(2, len(u))
    before_rounding[(len(u) // 256,)](u.float(), value, derivative, BLOCK=256)
    u = u.double()
    exact = u * torch.special.erfc(u * -(0.5**0.5)) / 2  # with a tail that does not cancel
    error = (value.double() - exact).abs()
    assert (error / (1 + u.abs())).max() <= 5e-7
    assert (derivative.double() - slope(u, "gelu")).abs().max() <= 7e-7
    in_tail = (u < 0) & (u > -5.5) & (u.abs() > 1e-30)
    assert (error / exact.abs())[in_tail].max() <= 2.5e-5
    assert value[u < -15].count_nonzero() == derivative[u < -15].count_nonzero() == 0


@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_infinity_and_nan_stay(kind):
    a, *_ = ops.activate(torch.tensor([torch.inf, torch.nan], dtype=torch.float16), kind)
    assert a[0] == torch.inf and a[1].isnan()


def halves_of(u: torch.Tensor) -> torch.Tensor:
    """The two derivatives of a gated unit, (..., 2, h)."""
    gate, value = u.chunk(2, dim=-1)
    return torch.stack((value * slope(gate, "silu"), activated(gate, "silu")), -2)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_codes_of_a_gated_unit_are_within_half_a_step(shape):
    u = pre_activation(shape, "swiglu", torch.float32)
    u[0] = -u[0].abs()  # the largest magnitudes are of negative numbers
    a, codes, scale = ops.activate(u, "swiglu", pack=True)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, u.shape, (*shape[:-1], 2))
    assert torch.equal(a, ops.activate(u, "swiglu")[0])
    exact = halves_of(u.double())
    assert torch.allclose(scale.double(), exact.abs().amax(-1) / 127, rtol=1e-5)
    decoded = codes.unflatten(-1, (2, -1)) * scale.double().unsqueeze(-1)
    assert ((decoded - exact).abs() <= 0.5001 * scale.unsqueeze(-1)).all()


@pytest.mark.parametrize("number", [0.0, 1e-39])
def test_codes_of_a_gated_row_of_zeros_or_next_to_nothing_are_zeros(number):
    _, codes, scale = ops.activate(torch.full((2, 12), number), "swiglu", pack=True)
    assert not codes.any()
    assert not scale.any()


@pytest.mark.parametrize("dtype", DTYPES)
@EACH_KIND
def test_activate_backward(shape, kind, dtype):
    u, grad = pre_activation(shape, kind, dtype), random(*shape, seed=1, dtype=dtype)
    grad_u = ops.activate_backward(grad, u, None, kind)
    assert grad_u.dtype == dtype
    eager, exact = (gradient(lambda t: activated(t, kind), t, grad) for t in (u, u.double()))
    assert_as_good_as(grad_u, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_activate_backward_from_codes(shape, dtype):
    grad = random(*shape, seed=1, dtype=dtype)
    codes = torch.arange(grad.numel()).view(shape).to(torch.uint8)  # every code, cut to 8 bits
    grad_u = ops.activate_backward(grad, codes, None, "gelu")
    exact = grad.double() * (codes.double() - 27) / 200
    eager = (grad.float() * ((codes.float() - 27) / 200)).to(dtype)
    assert_as_good_as(grad_u, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_activate_backward_from_codes_of_a_gated_unit(shape, dtype):
    grad, scale = random(*shape, seed=1, dtype=dtype), random(*shape[:-1], 2, seed=2).abs()
    codes = pre_activation(shape, "swiglu", torch.float32, seed=3).mul(30).clamp(-127, 127).char()
    grad_u = ops.activate_backward(grad, codes, scale, "swiglu")
    assert grad_u.dtype == dtype
    exact, eager = (
        (grad.to(wide).unsqueeze(-2) * (codes.unflatten(-1, (2, -1)) * scale.to(wide).unsqueeze(-1))).flatten(
            -2
        )
        for wide in (torch.float64, torch.float32)
    )
    assert_as_good_as(grad_u, eager.to(dtype), exact)


def test_scales_that_are_views_are_those_in_one_piece():
    grad, (_, codes, scale) = random(5, 16, seed=1), ops.activate(random(5, 32, seed=0), "swiglu", pack=True)
    expected = ops.activate_backward(grad, codes, scale, "swiglu")
    view = torch.cat((scale, scale), -1)[:, :2]
    assert torch.equal(ops.activate_backward(grad, codes, view, "swiglu"), expected)


@pytest.mark.parametrize("pack", [False, True], ids=["", "codes"])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, kind, pack):
    u, grad = pre_activation((4, 3, 24), kind, torch.float32), random(4, 3, 24, seed=1)
    forward = ops.activate(u, kind, pack=pack)
    assert not view_of(u, view).is_contiguous()
    for got, expected in zip(ops.activate(view_of(u, view), kind, pack=pack), forward, strict=True):
        assert got is expected is None or torch.equal(got, expected)
    kept, scale = (forward[1], forward[2]) if pack else (u, None)
    got = ops.activate_backward(view_of(grad, view), view_of(kept, view), scale, kind)
    assert torch.equal(got, ops.activate_backward(grad, kept, scale, kind))


def test_nothing_gives_nothing():
    a, codes, scale = ops.activate(torch.ones(0, 8), "swiglu", pack=True)
    assert [tuple(t.shape) for t in (a, codes, scale)] == [(0, 4), (0, 8), (0, 2)]
    assert ops.activate_backward(a, codes, scale, "swiglu").shape == (0, 8)


def test_rows_beyond_2_to_the_31_elements():
    far = 2**30 + 16  # an int32, and twice as much is not
    u = torch.from_numpy(np.empty(2 * far + 16, np.float16)).as_strided(
        (3, 16), (far, 1)
    )  # untouched pages are free
    u.copy_(random(3, 16, seed=0))
    assert torch.equal(ops.activate(u, "gelu")[0], ops.activate(u.contiguous(), "gelu")[0])
    assert torch.equal(
        ops.activate_backward(u, u, None, "gelu"), ops.activate_backward(u.clone(), u.clone(), None, "gelu")
    )


def forward(u=None, kind="gelu", pack=False):
    return ops.activate(torch.ones(2, 8) if u is None else u, kind, pack=pack)


def backward(grad=None, kept=None, scale=None, kind="gelu"):
    ones = torch.ones(2, 8)
    return ops.activate_backward(ones if grad is None else grad, ones if kept is None else kept, scale, kind)


@pytest.mark.parametrize("implementation", [reference, ops], ids=["torch", "triton"])
@pytest.mark.parametrize("pack", [False, True], ids=["u", "codes"])
@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_backward_in_place_gives_the_same_bits(kind, pack, implementation):
    grad, u = random(3, 1027, seed=1), random(3, 1027, seed=0)
    kept = reference.activate(u, kind, pack=True)[1] if pack else u
    expected = implementation.activate_backward(grad, kept, None, kind)
    version = grad._version
    implementation.activate_backward_(grad, kept, kind)
    assert torch.equal(grad, expected)
    assert grad._version > version  # autograd is told


@pytest.mark.parametrize("implementation", [reference, ops], ids=["torch", "triton"])
@pytest.mark.parametrize("pack", [False, True], ids=["u", "codes"])
@pytest.mark.parametrize("kind", ops.ELEMENTWISE)
def test_forward_in_place_gives_the_same_bits(kind, pack, implementation):
    u = random(3, 1027, seed=0)
    expected, expected_codes, _ = implementation.activate(u, kind, pack=pack)
    version = u._version
    codes = implementation.activate_(u, kind, pack=pack)
    assert torch.equal(u, expected)
    assert codes is None if expected_codes is None else torch.equal(codes, expected_codes)
    assert u._version > version  # autograd is told


@pytest.mark.parametrize("implementation", [reference, ops], ids=["torch", "triton"])
def test_gated_activation_is_refused_in_place(implementation):
    with pytest.raises(ValueError, match="activation: got 'swiglu'"):
        implementation.activate_(torch.ones(2, 16), "swiglu")
    with pytest.raises(ValueError, match="activation: got 'swiglu'"):
        implementation.activate_backward_(torch.ones(2, 8), torch.ones(2, 16), "swiglu")


def test_strides_are_refused_in_place():
    with pytest.raises(ValueError, match=r"u: got strides \(1, 2\) of \(2, 2\), want a contiguous one"):
        ops.activate_(torch.ones(2, 2).T, "gelu")
    with pytest.raises(ValueError, match=r"grad: got strides \(1, 2\) of \(2, 2\), want a contiguous one"):
        ops.activate_backward_(torch.ones(2, 2).T, torch.ones(2, 2), "gelu")


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (forward, {"kind": "tanh"}, "activation: got 'tanh', want one of 'gelu'"),
        (forward, {"u": torch.ones(2, 8).double()}, "u: got torch.float64"),
        (forward, {"u": torch.ones(8, 2).T}, "u: got stride 2"),
        (forward, {"u": torch.ones(2, 7), "kind": "swiglu"}, "u: got width 7, want an even one"),
        (forward, {"u": torch.ones(1, 16386), "kind": "swiglu", "pack": True}, "u: got width 2 x 8193"),
        (forward, {"u": torch.ones(1, 8).expand(2**31, -1)}, "u: got 2147483648 rows, want at most"),
        (
            forward,
            {"u": torch.ones(1, 4097).expand(2**30, -1)},
            "u: got 1073741824 rows of 4097, want at most",
        ),
        (backward, {"kind": "tanh"}, "activation: got 'tanh'"),
        (backward, {"kept": torch.ones(2, 9)}, r"kept: got shape \(2, 9\), want \(2, 8\)"),
        (backward, {"kept": torch.ones(2, 8).char()}, "kept: got torch.int8"),
        (backward, {"kind": "swiglu"}, r"kept: got shape \(2, 8\), want \(2, 16\)"),
        (backward, {"kept": torch.ones(2, 16).char(), "kind": "swiglu"}, "kept: got torch.int8"),
        (backward, {"scale": torch.ones(2, 2)}, "scale: got .* for 'gelu'"),
        (backward, {"grad": torch.ones(2, 8).double()}, "grad: got torch.float64"),
    ],
)
def test_error_names_the_argument(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("function", [forward, backward])
def test_cpu_tensors_are_refused_outside_the_interpreter(function, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': .* on cpu, want a CUDA device"):
        function()


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.activate, (torch.ones(2, 3, 8), "gelu", False)),
        (OPS.activate, (torch.ones(2, 3, 8), "gelu", True)),
        (OPS.activate, (torch.ones(2, 3, 8), "swiglu", True)),
        (OPS.activate_, (torch.ones(2, 3, 8), "gelu", True)),
        (OPS.activate_backward, (torch.ones(3, 8), torch.ones(3, 8), None, "gelu")),
        (OPS.activate_backward, (torch.ones(3, 8), torch.ones(3, 16).char(), torch.ones(3, 2), "swiglu")),
        (OPS.activate_backward_, (torch.ones(3, 8), torch.ones(3, 8), "gelu")),
    ],
    ids=["plain", "packed", "gated", "in_place", "backward", "gated_backward", "backward_in_place"],
)
def test_custom_op_tells_the_truth_about_its_outputs(op, arguments):
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_builds_have_all_kinds_and_dtypes():
    builds = ops.builds(90)
    assert len({(build.name, build.config) for build in builds}) == len(builds)
    assert {build.constexprs["KIND"] for build in builds if "KIND" in build.constexprs} == set(
        ops.ELEMENTWISE
    )
