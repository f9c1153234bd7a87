"""The kernel of rotary positions, compiled, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from definitions import assert_as_good_as, random
from vpt_fast.kernels.prompted_attention import HEAD_DIMS
from vpt_fast.kernels.rotation import ops, reference

pytestmark = pytest.mark.gpu


# Every kernel is compiled for each dtype and head dim: all of these in bfloat16, two in the others too.
CASES = [pytest.param(head_dim, torch.bfloat16, id=f"D{head_dim}-bf16") for head_dim in HEAD_DIMS]
CASES += [
    pytest.param(head_dim, dtype, id=f"D{head_dim}-{name}")
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32))
    for head_dim in (64, 72)
]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("own", [False, True], ids=["one_table", "table_a_head"])
@pytest.mark.parametrize(("head_dim", "dtype"), CASES)
def test_patches_of_packed_queries_are_turned_by_their_angles(head_dim, own, dtype, inverse) -> None:
    qkv = random(3, 201, 3, 12, head_dim, seed=0, dtype=dtype, device="cuda")
    angle = random(196, 12 if own else 1, head_dim // 2, seed=1, device="cuda")
    exact, eager, untouched = qkv[:, 5:, 0].double(), qkv[:, 5:, 0].clone(), qkv[:, :5].clone()
    reference.rotate_(exact, angle.double().sin(), angle.double().cos(), inverse=inverse)
    reference.rotate_(eager, angle.sin(), angle.cos(), inverse=inverse)
    ops.rotate_(qkv[:, 5:, 0], angle.sin(), angle.cos(), inverse=inverse)
    assert_as_good_as(qkv[:, 5:, 0], eager, exact)
    assert torch.equal(qkv[:, :5], untouched)
