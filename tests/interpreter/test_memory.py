"""Each fault that a GPU may have and Triton's interpreter has not is found, and nothing else."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, at < size), at < size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_what_is_in_bounds_is_allowed(dtype: torch.dtype) -> None:
    source, target = torch.arange(50).to(dtype), torch.zeros(50, dtype=dtype)
    copy_kernel[(4,)](source, target, 50, BLOCK=16)
    assert torch.equal(source, target)


def test_program_may_write_over_what_it_alone_has_read() -> None:
    x = torch.arange(32.0)
    copy_kernel[(2,)](x, x, 32, BLOCK=16)
    assert torch.equal(x, torch.arange(32.0))


@pytest.mark.parametrize("side", ["source", "target"])
def test_address_past_the_end_of_a_tensor(side: str) -> None:
    tensors = {"source": torch.zeros(64), "target": torch.zeros(64), side: torch.zeros(49)}
    with pytest.raises(
        Exception, match=rf"program 4 accesses 1 addresses beside its tensors, 0 bytes past.*{side}"
    ):
        copy_kernel[(4,)](*tensors.values(), 50, BLOCK=16)


def test_address_past_the_end_of_a_view() -> None:
    with pytest.raises(
        Exception, match="accesses 1 addresses beside its tensors, 0 bytes past the end of target"
    ):
        copy_kernel[(4,)](torch.zeros(64), torch.zeros(64)[:49], 50, BLOCK=16)


@triton.jit
def read_kernel(x, index):
    tl.store(x, tl.load(x + tl.load(index)))


def test_address_in_memory_that_the_process_may_not_read() -> None:
    with pytest.raises(Exception, match="program 1 accesses 1 addresses beside its tensors"):
        read_kernel[(1,)](torch.zeros(1), torch.tensor([-(2**44)]))


@triton.jit
def move_kernel(x, source, target):
    """Each program moves an element of x: from and to an index of its own."""
    program = tl.program_id(0)
    tl.store(x + tl.load(target + program), tl.load(x + tl.load(source + program)))


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ([0, 2], [2, 3], "program 2 reads what was written by program 1 in x"),
        ([0, 2], [1, 0], "program 2 writes over what was read by program 1 in x"),
        ([0, 0, 2], [3, 4, 0], "program 3 writes over what was read by others in x"),
        ([0, 1], [3, 3], "program 2 writes over what was written by program 1 in x"),
    ],
)
def test_race_of_two_programs(source: list[int], target: list[int], fault: str) -> None:
    with pytest.raises(Exception, match=fault):
        move_kernel[(len(source),)](torch.zeros(8), torch.tensor(source), torch.tensor(target))


@triton.jit
def twice_kernel(x, READ: tl.constexpr):
    tl.store(x, 1.0)
    if READ:
        tl.store(x + 1, tl.load(x))
    else:
        tl.store(x, 2.0)


@pytest.mark.parametrize(
    ("read", "fault"),
    [(True, "reads what was written by itself"), (False, "writes over what was written by itself")],
)
def test_race_of_two_threads_of_one_program(read: bool, fault: str) -> None:
    with pytest.raises(Exception, match=f"program 1 {fault}"):
        twice_kernel[(1,)](torch.zeros(2), READ=read)


@triton.jit
def fold_kernel(x, values):
    at = tl.arange(0, 16)
    tl.store(x + at % 8, tl.load(values + at))


def test_two_values_for_one_element() -> None:
    with pytest.raises(Exception, match="program 1 writes two values to one element of x"):
        fold_kernel[(1,)](torch.zeros(8), torch.arange(16.0))


def test_one_value_twice_for_one_element_is_allowed() -> None:
    x = torch.zeros(8)
    fold_kernel[(1,)](x, torch.arange(8.0).repeat(2))
    assert torch.equal(x, torch.arange(8.0))


@triton.jit
def sum_kernel(x, total, size):
    at = tl.arange(0, 16)
    tl.store(total, tl.sum(tl.load(x + at, at < size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_elements_without_a_value_are_unknown(dtype: torch.dtype) -> None:
    total = torch.zeros(1, dtype=dtype)
    sum_kernel[(1,)](torch.ones(16, dtype=dtype), total, 15)
    assert total.isnan()


@triton.jit
def copy_tile_kernel(source, target):
    target.store([tl.program_id(0) * 16, 0], source.load([tl.program_id(0) * 16, 0]))


def test_race_by_descriptors() -> None:
    x, y = torch.zeros(32, 16), torch.zeros(32, 16)
    tile = [16, 16]
    copy_tile_kernel[(3,)](TensorDescriptor.from_tensor(x, tile), TensorDescriptor.from_tensor(y, tile))
    bottom = TensorDescriptor.from_tensor(x[16:], tile)
    with pytest.raises(Exception, match="program 2 reads what was written by program 1"):
        copy_tile_kernel[(2,)](TensorDescriptor.from_tensor(x, tile), bottom)


@triton.jit
def hint_kernel(x, first, ALIGNED: tl.constexpr, CONTIGUOUS: tl.constexpr):
    at = tl.load(first) + tl.arange(0, 16)
    if CONTIGUOUS:
        at = tl.max_contiguous(at, CONTIGUOUS)
    pointers = x + at * 4
    if ALIGNED:
        pointers = tl.multiple_of(pointers, ALIGNED)
    tl.store(pointers, 1.0)


@pytest.mark.parametrize(("aligned", "contiguous"), [(0, 0), (16, 16)])
def test_true_hints_are_allowed(aligned: int, contiguous: int) -> None:
    x = torch.zeros(64)
    hint_kernel[(1,)](x, torch.zeros(1, dtype=torch.int32), ALIGNED=aligned, CONTIGUOUS=contiguous)
    assert x.sum() == 16


@triton.jit
def fold_with_hint_kernel(x):
    at = tl.max_contiguous(tl.arange(0, 16) % 8, 16)
    tl.store(x + at, 1.0)


def test_false_hints() -> None:
    with pytest.raises(Exception, match="the hint tt.contiguity = 16 is false"):
        fold_with_hint_kernel[(1,)](torch.zeros(64))
    with pytest.raises(Exception, match="the hint tt.divisibility = 32 is false"):
        hint_kernel[(1,)](torch.zeros(64), torch.zeros(1, dtype=torch.int32), ALIGNED=32, CONTIGUOUS=0)
