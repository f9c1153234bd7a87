"""The rotation of queries and keys: its definition, and the Triton kernel in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from definitions import assert_as_good_as, random
from torch.utils._python_dispatch import TorchDispatchMode
from vpt_fast.kernels.prompted_attention import HEAD_DIMS
from vpt_fast.kernels.rotation import ops, reference

IMPLEMENTATIONS = [pytest.param(reference.rotate_, id="torch"), pytest.param(ops.rotate_, id="triton")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(patches: int, heads: int, head_dim: int) -> torch.Tensor:
    return random(patches, heads, head_dim // 2, seed=7)


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """A head's halves as the parts of complex numbers, turned in float64."""
    first, second = x.double().chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle.double()), angle.double())
    return torch.cat((z.real, z.imag), dim=-1)


# Every two values of two settings meet in the kernel; the definition knows nothing of head dims.
CASES = [
    pytest.param(ops.rotate_, d, dtype, bool(i & 1), bool(i & 2), id=f"triton-D{d}-{str(dtype)[6:]}-{i % 4}")
    for i, (d, dtype) in enumerate(itertools.product(HEAD_DIMS, DTYPES))
]
CASES += [
    pytest.param(reference.rotate_, 16, dtype, bool(i & 1), bool(i & 2), id=f"torch-{str(dtype)[6:]}-{i}")
    for dtype, i in itertools.product(DTYPES, range(4))
]


@pytest.mark.parametrize(("rotate_", "head_dim", "dtype", "own", "inverse"), CASES)
def test_rows_are_turned_by_their_angles(rotate_, head_dim, dtype, own, inverse):
    """own: each head has a table of its own; inverse: backward."""
    x = random(2, 5, 3, head_dim, seed=0, dtype=dtype)
    angle = angles(5, 3 if own else 1, head_dim)
    exact = turned(x, -angle if inverse else angle)
    eager = turned(x, -angle if inverse else angle).to(dtype)
    rotate_(x, angle.sin(), angle.cos(), inverse=inverse)
    assert_as_good_as(x, eager, exact)
    if dtype != torch.float32:  # rounded once, but for ties that float32's own error moves
        assert (x != eager).double().mean() < 0.01


@pytest.mark.parametrize("rotate_", IMPLEMENTATIONS)
def test_only_the_rows_of_a_view_are_turned(rotate_):
    qkv = random(2, 9, 3, 4, 32, seed=1)
    before, angle = qkv.clone(), angles(6, 1, 32)
    rotate_(qkv[:, 2:8, 1], angle.sin(), angle.cos())
    wanted = before.clone()
    wanted[:, 2:8, 1] = turned(before[:, 2:8, 1], angle).float()
    torch.testing.assert_close(qkv, wanted)
    untouched = torch.ones_like(qkv, dtype=torch.bool)
    untouched[:, 2:8, 1] = False
    assert torch.equal(qkv[untouched], before[untouched])


def test_definition_writes_to_the_rows_once() -> None:
    writes = []

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            writes.extend([func] * func._schema.is_mutable)
            return func(*args, **(kwargs or {}))

    x, angle = random(2, 4, 3, 16, seed=0), angles(4, 1, 16)
    sin, cos = angle.sin(), angle.cos()
    with Writes():
        reference.rotate_(x, sin, cos)
    assert writes == [torch.ops.aten.copy_.default]


def test_more_rows_than_one_program_holds():
    x, angle = random(3, 197, 2, 16, seed=2), angles(197, 2, 16)
    exact = turned(x, angle)
    ops.rotate_(x, angle.sin(), angle.cos())
    torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-5)


def test_tables_that_are_views_are_those_in_one_piece():
    x, angle = random(2, 5, 3, 16, seed=3), angles(5, 3, 16)
    turned_by_views, sin, cos = x.clone(), angle.sin(), angle.cos()
    ops.rotate_(x, sin, cos)
    ops.rotate_(turned_by_views, *(torch.stack((t, t), -1)[..., 0] for t in (sin, cos)))
    assert torch.equal(turned_by_views, x)


def test_autograd_is_told_of_the_write():
    x = torch.ones(2, 4, 3, 16)
    version = x._version
    ops.rotate_(x, torch.ones(4, 1, 8), torch.ones(4, 1, 8))
    assert x._version > version


def test_no_patches_are_no_work():
    x = torch.ones(2, 0, 3, 16)
    ops.rotate_(x, torch.ones(0, 1, 8), torch.ones(0, 1, 8))
    assert x.shape == (2, 0, 3, 16)


def call(**changed):
    table = torch.ones(4, 1, 8)
    ops.rotate_(**({"x": torch.ones(2, 4, 3, 16), "sin": table, "cos": table} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 4, 3, 16).double()}, "x: got torch.float64"),
        ({"x": torch.ones(2, 4, 48)}, r"x: got shape \(2, 4, 48\)"),
        ({"x": torch.ones(2, 4, 3, 40)}, "head dim: got 40, want one of 16"),
        ({"x": torch.ones(2, 4, 16, 3).transpose(2, 3)}, "x: got stride 3"),
        ({"x": torch.ones(1, 1, 1, 16).expand(178956970, 4, 3, -1)}, "x: got 2147483640 rows, want at most"),
        ({"sin": torch.ones(5, 1, 8)}, r"sin: got shape \(5, 1, 8\), want \(4, 1, 8\)"),
        ({"cos": torch.ones(4, 3, 8)}, r"cos: got shape \(4, 3, 8\), want \(4, 1, 8\)"),
        ({"sin": torch.ones(4, 2, 8)}, r"sin: got shape \(4, 2, 8\), want \(4, 1, 8\)"),
        ({"cos": torch.ones(4, 1, 8).long()}, "cos: got torch.int64"),
    ],
)
def test_error_names_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': x is on cpu, want a CUDA device"):
        call()


def test_custom_op_says_what_it_changes():
    arguments = (random(2, 4, 3, 16, seed=3), torch.ones(4, 1, 8), torch.ones(4, 1, 8), False)
    torch.library.opcheck(
        torch.ops.vpt_fast.rotate_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_builds_have_all_head_dims_and_dtypes():
    builds = ops.builds(90)
    assert len({(build.name, build.config) for build in builds}) == len(builds)
    assert {build.signature["x"] for build in builds} == {"*fp32", "*bf16", "*fp16"}
    assert {build.constexprs["BLOCK_HALF"] for build in builds} == {8, 16, 32, 64}
