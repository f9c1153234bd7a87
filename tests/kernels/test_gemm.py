"""Products with the activation in the epilogue, in Triton's interpreter, against float64 definitions."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from definitions import activated, assert_as_good_as, random, slope
from vpt_fast.kernels.checks import forget_layouts
from vpt_fast.kernels.mlp import gemm
from vpt_fast.kernels.mlp.descriptors import DescriptorLaunch

pytestmark = pytest.mark.usefixtures("nan_empty")

OPS = torch.ops.vpt_fast
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
# Leading shape of x, depth, columns: tails in every dimension, aligned or not, one row, one tile, groups
SIZES = [
    ((1,), 16, 8),
    ((3, 5), 48, 65),
    ((2, 67), 70, 200),
    ((2, 67), 80, 208),
    ((128,), 64, 128),
    ((130,), 8, 3),
    ((1250,), 5, 4),
]
IDS = ["x".join(map(str, (*lead, depth, columns))) for lead, depth, columns in SIZES]


@pytest.fixture(params=[80, 90], ids=["by_pointers", "by_descriptors"])
def arch(request, monkeypatch):
    """Which of the two kernels what is aligned, and has 16 bits, goes through."""
    monkeypatch.setattr(gemm, "arch_of", lambda device: request.param)
    forget_layouts()
    yield request.param
    forget_layouts()


# What is not aligned, or has 32 bits, goes by pointers on every GPU.
EACH_SIZE = pytest.mark.parametrize(
    ("size", "dtype", "arch"),
    [
        pytest.param(size, *dtype.values, arch, id=f"{name}-{dtype.id}-{arch}")
        for size, name in zip(SIZES, IDS, strict=True)
        for dtype in DTYPES
        for arch in ((80, 90) if size[1] % 16 == size[2] % 16 == 0 and dtype.id != "fp32" else (90,))
    ],
    indirect=["arch"],
)


def forward_inputs(size, dtype):
    """x, weight and bias, with pre-activations of deviation near 1."""
    lead, depth, columns = size
    weight = random(columns, depth, seed=1) / (2 * depth**0.5)
    return random(*lead, depth, seed=0, dtype=dtype), weight.to(dtype), random(columns, seed=2, dtype=dtype)


def backward_inputs(size, dtype):
    """grad of fc2's output, fc2's weight, and the pre-activation."""
    lead, depth, columns = size
    weight = random(depth, columns, seed=1) / (2 * depth**0.5)
    u = random(*lead, columns, seed=2, dtype=dtype)
    return random(*lead, depth, seed=0, dtype=dtype), weight.to(dtype), u


def pre_activation(x, weight, bias):
    return x @ weight.T if bias is None else x @ weight.T + bias


@EACH_SIZE
def test_linear_activate(size, dtype, arch):
    inputs = forward_inputs(size, dtype)
    a, u, codes = gemm.linear_activate(*inputs, "gelu")
    eager, exact = pre_activation(*inputs), pre_activation(*(t.double() for t in inputs))
    assert (a.dtype, u.dtype, codes) == (dtype, dtype, None)
    assert_as_good_as(u, eager, exact)
    assert_as_good_as(a, activated(eager, "gelu"), activated(exact, "gelu"))
    if dtype == torch.float32:  # everywhere, and of the same u: what serves 16 bits is off by twice as much
        assert ((a - activated(u.double(), "gelu")).abs() <= 2e-7 * (1 + u.abs())).all()


@pytest.mark.parametrize("kind", gemm.ELEMENTWISE)
def test_linear_activate_of_every_kind(kind):
    inputs = forward_inputs(((5,), 16, 20), torch.float32)
    a, _, codes = gemm.linear_activate(*inputs, kind, pack=True)
    eager, exact = pre_activation(*inputs), pre_activation(*(t.double() for t in inputs))
    assert_as_good_as(a, activated(eager, kind), activated(exact, kind))
    assert ((codes.double() - 27) / 200 - slope(exact, kind)).abs().max() <= 0.0025 + 1e-5


ALIGNED = ((3, 47), 80, 208)  # more tiles than programs, and a tail of rows, columns and depth


@pytest.mark.parametrize("kind", gemm.ELEMENTWISE)
@pytest.mark.parametrize("keep", ["u", "codes", "nothing"])
def test_descriptors_and_pointers_give_the_same_but_for_where_the_bias_is_added(kind, keep, monkeypatch):
    x, weight, bias = forward_inputs(ALIGNED, torch.float16)
    grad, weight2, u = backward_inputs(ALIGNED, torch.float16)
    kept = torch.arange(u.numel()).view(u.shape).to(torch.uint8) if keep == "codes" else u
    found = []
    for arch in (80, 90):
        monkeypatch.setattr(gemm, "arch_of", lambda device, arch=arch: arch)
        forget_layouts()
        results = gemm.linear_activate(x, weight, bias, kind, pack=keep == "codes", keep=keep != "nothing")
        found.append([*results, gemm.linear_activate_backward(grad, weight2, kept, kind)])
    forget_layouts()
    (*forward, backward), (*other_forward, other_backward) = found
    assert torch.equal(backward, other_backward)
    for one, other in zip(forward, other_forward, strict=True):
        if one is None or one.dtype == torch.uint8:
            assert one is other is None or (one.int() - other.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(one, other, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("size", [ALIGNED, ((3, 47), 72, 200)], ids=["descriptors", "pointers"])
def test_pre_activation_beyond_float16_has_the_gradient_of_the_largest_number(size):
    x, weight, bias = forward_inputs(size, torch.float16)
    bias[0], bias[64] = -60000, 60000  # in the left and in the right half of a tile
    x[..., 0] = 200
    weight[0, 0], weight[64, 0] = -200, 200
    a, u, _ = gemm.linear_activate(x, weight, bias, "gelu")
    assert u[..., 0].unique().tolist() == [-65504] and u[..., 64].unique().tolist() == [65504]
    grad = torch.ones(*x.shape[:-1], 16, dtype=torch.float16)
    weight2 = torch.ones(16, u.shape[-1], dtype=torch.float16)
    grad_u = gemm.linear_activate_backward(grad, weight2, u, "gelu")
    assert grad_u[..., 0].unique().tolist() == [0] and grad_u[..., 64].unique().tolist() == [16]


LAUNCHES = {
    "aligned": (ALIGNED, torch.bfloat16, True),
    "float32": (ALIGNED, torch.float32, False),
    "depth_not_aligned": (((3, 47), 72, 208), torch.bfloat16, False),
    "columns_not_aligned": (((3, 47), 80, 200), torch.bfloat16, False),
}


@pytest.mark.parametrize(("size", "dtype", "by_descriptors"), LAUNCHES.values(), ids=LAUNCHES)
def test_what_is_aligned_goes_by_descriptors(size, dtype, by_descriptors):
    x, weight, bias = forward_inputs(size, dtype)
    grad, weight2, u = backward_inputs(size, dtype)
    launches = (
        gemm._forward_launch("gelu", False, True, x=x, weight=weight, bias=bias),
        gemm._backward_launch("gelu", grad=grad, weight=weight2, kept=u),
    )
    assert [isinstance(launch, DescriptorLaunch) for launch in launches] == [by_descriptors] * 2


def test_specialized_warpgroups_have_a_program_for_each_tile_or_sm(monkeypatch):
    monkeypatch.setattr(gemm, "_tma_config", lambda: gemm.SPECIALIZED)
    forget_layouts()
    x, weight, bias = forward_inputs(((3, 100), 80, 528), torch.bfloat16)  # 3 x 3 tiles of 128 x 256
    grids = []
    for num_sms in (1, 132):
        monkeypatch.setattr(gemm, "num_sms", lambda device, num_sms=num_sms: num_sms)
        forget_layouts()
        launch = gemm._forward_launch("gelu", False, True, x=x, weight=weight, bias=bias)
        grids.append(launch._launch._grid)
    forget_layouts()
    assert grids == [(1, 1, 1), (9, 1, 1)]


def odd_rows(t: torch.Tensor) -> torch.Tensor:
    """Equal to t, the stride of its rows no multiple of 16."""
    return torch.cat((t, t[..., :1]), -1)[..., :-1]


def odd_start(t: torch.Tensor) -> torch.Tensor:
    """Equal to t, its address no multiple of 16."""
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


def one_row(t: torch.Tensor) -> torch.Tensor:
    """t's first row for all of its rows, which have one address."""
    return t[:1].expand_as(t)


@pytest.mark.parametrize("odd", [odd_rows, odd_start, one_row])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_forward_of_what_starts_elsewhere_or_overlaps_goes_by_pointers(name, odd):
    x, weight, bias = forward_inputs(((141,), 80, 208), torch.bfloat16)
    given = {"x": x, "weight": weight, "bias": bias}
    given[name] = odd(given[name])
    assert not isinstance(gemm._forward_launch("gelu", False, True, **given), DescriptorLaunch)


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("grad", odd_rows),
        ("grad", odd_start),
        ("grad", one_row),
        ("kept", odd_rows),
        ("kept", odd_start),
        ("kept", one_row),
        ("kept", torch.Tensor.float),
    ],
)
def test_backward_of_what_starts_elsewhere_overlaps_or_is_kept_in_float32_goes_by_pointers(name, odd):
    grad, weight, u = backward_inputs(((141,), 80, 208), torch.bfloat16)
    given = {"grad": grad, "weight": weight, "kept": u}
    given[name] = odd(given[name])
    assert not isinstance(gemm._backward_launch("gelu", **given), DescriptorLaunch)


def test_a_launch_by_descriptors_holds_no_tensor():
    x, weight, bias = forward_inputs(ALIGNED, torch.bfloat16)
    gemm.linear_activate(x, weight, bias, "gelu")
    held = weakref.ref(x)
    del x
    assert held() is None


def test_rows_that_are_no_one_dimension_go_by_pointers():
    x, weight, bias = forward_inputs(ALIGNED, torch.bfloat16)
    launch = gemm._forward_launch("gelu", False, True, x=wider(x), weight=weight, bias=bias)
    assert not isinstance(launch, DescriptorLaunch)


def test_linear_activate_without_bias():
    x, weight, _ = forward_inputs(((5,), 16, 20), torch.float32)
    a, *_ = gemm.linear_activate(x, weight, None, "gelu")
    exact = activated(x.double() @ weight.double().T, "gelu")
    assert_as_good_as(a, activated(x @ weight.T, "gelu"), exact)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_codes_are_within_half_a_step(size):
    inputs = forward_inputs(size, torch.float32)
    a, u, codes = gemm.linear_activate(*inputs, "gelu", pack=True)
    assert (u, codes.dtype) == (None, torch.uint8)
    assert torch.equal(a, gemm.linear_activate(*inputs, "gelu")[0])
    exact = slope(pre_activation(*(t.double() for t in inputs)), "gelu")
    assert ((codes.double() - 27) / 200 - exact).abs().max() <= 0.0025 + 1e-5


def test_nothing_is_kept_where_nothing_is_wanted():
    inputs = forward_inputs(SIZES[1], torch.float32)
    a, u, codes = gemm.linear_activate(*inputs, "gelu", keep=False)
    assert (u, codes) == (None, None)
    assert torch.equal(a, gemm.linear_activate(*inputs, "gelu")[0])


@EACH_SIZE
def test_linear_activate_backward(size, dtype, arch):
    grad, weight, u = backward_inputs(size, dtype)
    grad_u = gemm.linear_activate_backward(grad, weight, u, "gelu")
    assert grad_u.dtype == dtype
    eager, exact = (
        torch.ops.aten.gelu_backward(grad.to(wide) @ weight.to(wide), u.to(wide))
        for wide in (dtype, torch.float64)
    )
    assert_as_good_as(grad_u, eager, exact)


@pytest.mark.parametrize("kind", gemm.ELEMENTWISE)
def test_linear_activate_backward_of_every_kind(kind):
    grad, weight, u = backward_inputs(((5,), 16, 20), torch.float32)
    grad_u = gemm.linear_activate_backward(grad, weight, u, kind)
    exact = (grad.double() @ weight.double()) * slope(u.double(), kind)
    assert_as_good_as(grad_u, (grad @ weight) * slope(u, kind), exact)


@EACH_SIZE
def test_linear_activate_backward_from_codes(size, dtype, arch):
    grad, weight, u = backward_inputs(size, dtype)
    codes = torch.arange(u.numel()).view(u.shape).to(torch.uint8)  # every code, cut to 8 bits
    grad_u = gemm.linear_activate_backward(grad, weight, codes, "gelu")
    derivative = (codes.double() - 27) / 200
    exact = (grad.double() @ weight.double()) * derivative
    assert_as_good_as(grad_u, (grad @ weight) * derivative.to(dtype), exact)


def wider(t: torch.Tensor) -> torch.Tensor:
    """Equal to t, its rows further apart, each image's rows further still."""
    return torch.cat((torch.cat((t, t), -1), torch.cat((t, t), -1)), 1)[:, : t.shape[1], : t.shape[2]]


def test_rows_apart_go_by_descriptors_too():
    x, weight, bias = forward_inputs(((141,), 80, 208), torch.bfloat16)
    apart = torch.cat((x, x), 1)[:, :80]
    assert isinstance(
        gemm._forward_launch("gelu", False, True, x=apart, weight=weight, bias=bias), DescriptorLaunch
    )
    for got, expected in zip(
        gemm.linear_activate(apart, torch.cat((weight, weight), 1)[:, :80], bias, "gelu")[:2],
        gemm.linear_activate(x, weight, bias, "gelu")[:2],
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_views():
    size = ((3, 5), 24, 40)
    x, weight, bias = forward_inputs(size, torch.float32)
    for got, expected in zip(
        gemm.linear_activate(wider(x), torch.cat((weight, weight), 1)[:, :24], bias, "gelu")[:2],
        gemm.linear_activate(x, weight, bias, "gelu")[:2],
        strict=True,
    ):
        assert got.is_contiguous()
        assert torch.equal(got, expected)
    grad, weight, u = backward_inputs(size, torch.float32)
    got = gemm.linear_activate_backward(wider(grad), torch.cat((weight, weight), 1)[:, :40], wider(u), "gelu")
    assert torch.equal(got, gemm.linear_activate_backward(grad, weight, u, "gelu"))


def test_no_rows_give_no_rows(arch):
    x, weight, bias = forward_inputs(((0,), 16, 32), torch.float16)
    a, u, _ = gemm.linear_activate(x, weight, bias, "gelu")
    assert a.shape == u.shape == (0, 32)
    assert gemm.linear_activate_backward(x, weight.T.contiguous(), u, "gelu").shape == (0, 32)


def far_apart(seed: int) -> torch.Tensor:
    """Three rows, 2^30 elements apart and more: an int32, and twice as much is not."""
    far = 2**30 + 16
    rows = np.empty(2 * far + 16, np.float16)  # pages that nobody touches cost nothing
    return torch.from_numpy(rows).as_strided((3, 16), (far, 1)).copy_(random(3, 16, seed=seed))


def test_rows_beyond_2_to_the_31_elements(arch):
    x, kept = far_apart(0), far_apart(1)
    weight = random(16, 16, seed=2, dtype=torch.float16)
    near, kept_near = x.clone(), kept.clone()
    assert torch.equal(
        gemm.linear_activate(x, weight, None, "gelu")[0], gemm.linear_activate(near, weight, None, "gelu")[0]
    )
    assert torch.equal(
        gemm.linear_activate_backward(x, weight, kept, "gelu"),
        gemm.linear_activate_backward(near, weight, kept_near, "gelu"),
    )


def test_rows_of_weights_beyond_2_to_the_31_elements():
    weight, x, grad = far_apart(0), random(2, 16, seed=1).half(), random(2, 3, seed=1).half()
    near, u = weight.clone(), random(2, 16, seed=2).half()
    assert torch.equal(
        gemm.linear_activate(x, weight, None, "gelu")[0], gemm.linear_activate(x, near, None, "gelu")[0]
    )
    assert torch.equal(
        gemm.linear_activate_backward(grad, weight, u, "gelu"),
        gemm.linear_activate_backward(grad, near, u, "gelu"),
    )


def forward(**changed):
    x, weight, bias = forward_inputs(((4,), 8, 12), torch.float32)
    return gemm.linear_activate(**({"x": x, "weight": weight, "bias": bias, "kind": "gelu"} | changed))


def backward(**changed):
    grad, weight, u = backward_inputs(((4,), 8, 12), torch.float32)
    return gemm.linear_activate_backward(
        **({"grad": grad, "weight": weight, "kept": u, "kind": "gelu"} | changed)
    )


@pytest.mark.parametrize(
    ("function", "changed", "message"),
    [
        (forward, {"kind": "swiglu"}, "activation: got 'swiglu', want one of 'gelu'"),
        (forward, {"x": torch.ones(4, 8).double()}, "x: got torch.float64"),
        (forward, {"x": torch.ones(4, 9)}, r"x: got shape \(4, 9\), want \(4, 8\)"),
        (forward, {"x": torch.ones(8, 4).T}, "x: got stride 4"),
        (forward, {"x": torch.ones(1, 8).expand(2**31 - 1, -1)}, "x: got 2147483647 rows, want at most"),
        (
            forward,
            {"weight": torch.ones(1, 8).expand(2**31 - 1, -1), "bias": None},
            "rows: got 4 x 2147483647 results",
        ),
        (
            forward,
            {name: torch.ones(1, 8).expand(2**22, -1) for name in ("x", "weight")} | {"bias": None},
            "rows: got 4194304 x 4194304 results, more than one launch can number",
        ),
        (forward, {"weight": torch.ones(12, 8).half()}, "weight: got torch.float16"),
        (forward, {"weight": torch.ones(8, 12).T}, "weight: got stride 12"),
        (forward, {"bias": torch.ones(12).requires_grad_()}, "bias: requires a gradient"),
        (forward, {"bias": torch.ones(8)}, r"bias: got shape \(8,\), want \(12,\)"),
        (backward, {"kind": "swiglu"}, "activation: got 'swiglu'"),
        (backward, {"kept": torch.ones(4, 13)}, r"kept: got shape \(4, 13\), want \(4, 12\)"),
        (backward, {"kept": torch.ones(4, 12).char()}, "kept: got torch.int8"),
        (backward, {"grad": torch.ones(4, 9)}, r"grad: got shape \(4, 9\), want \(4, 8\)"),
        (backward, {"weight": torch.ones(12, 8).T}, "weight: got stride 8"),
    ],
)
def test_error_names_the_argument(function, changed, message):
    with pytest.raises(ValueError, match=message):
        function(**changed)


@pytest.mark.parametrize("function", [forward, backward])
def test_cpu_tensors_are_refused_outside_the_interpreter(function, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': .* on cpu, want a CUDA device"):
        function()


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.linear_activate, (torch.ones(2, 8), torch.ones(4, 8), None, "gelu", True, True)),
        (OPS.linear_activate, (torch.ones(2, 8), torch.ones(4, 8), torch.ones(4), "gelu", False, True)),
        (OPS.linear_activate_backward, (torch.ones(2, 8), torch.ones(8, 4), torch.ones(2, 4), "gelu")),
    ],
    ids=["packed", "plain", "backward"],
)
def test_custom_op_tells_the_truth_about_its_outputs(op, arguments):
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_builds_ask_for_wgmma_wherever_there_are_tensor_cores():
    builds = gemm.builds(90)
    assert len({(build.name, build.config) for build in builds}) == len(builds)
    for build in builds:
        (left,) = {build.signature[name] for name in {"x", "grad"} & set(build.signature)}
        assert build.wgmma == (left != "*fp32")
