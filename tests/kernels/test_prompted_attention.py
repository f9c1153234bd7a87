"""Prompted attention's kernels, in Triton's interpreter, against float64 autograd on the joined sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_definition import assert_forward_and_backward, inputs, random
from vpt_fast.kernels.checks import forget_layouts
from vpt_fast.kernels.launch import Launch
from vpt_fast.kernels.prompted_attention import HEAD_DIMS, ops, reference

pytestmark = pytest.mark.usefixtures("nan_empty")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# B, R, N, m, H, D: ragged tiles, one row, one key, no prompts, a seam inside a tile and at its edge; 63 keys,
# one less than whole tiles; and few enough rows beside whole tiles for a smaller one: 1, 16, or one too many.
# Rows of 48, 72, 88, 104 and 112 elements are narrower than their tiles.
SIZES = [
    (1, 1, 1, 1, 1, 16),
    (2, 7, 7, 5, 2, 32),
    (2, 37, 37, 50, 2, 64),
    (1, 1, 197, 7, 1, 64),
    (2, 33, 33, 0, 1, 80),
    (1, 40, 65, 32, 2, 80),
    (2, 19, 19, 13, 1, 96),
    (1, 70, 70, 64, 1, 128),
    (1, 130, 130, 100, 1, 16),
    (1, 65, 65, 3, 2, 64),
    (1, 80, 80, 5, 1, 80),
    (1, 145, 20, 5, 1, 32),
    (2, 19, 19, 13, 2, 48),
    (2, 37, 37, 26, 2, 72),
    (1, 1, 33, 7, 2, 72),
    (2, 19, 19, 0, 2, 88),
    (2, 21, 21, 9, 2, 104),
    (1, 70, 20, 3, 1, 112),
]
CASES = [
    pytest.param((b, r, n, m, h, d), shared, id=f"B{b}_R{r}_N{n}_m{m}_H{h}_D{d}-{name}")
    for b, r, n, m, h, d in SIZES
    for name, shared in {"shared": True, "per_image": False}.items()
    if shared or (b > 1 and m)  # else it is the same case again
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("size", "shared"), CASES)
def test_forward_and_backward(size: tuple[int, ...], shared: bool, dtype: torch.dtype) -> None:
    assert_forward_and_backward(inputs(size, shared, dtype))


SIZE = (2, 21, 21, 42, 2, 64)  # as there, one key less than whole tiles


def backward(given, grad, *, keep_out: bool = True, image: bool = True, **wanted):
    out, lse = ops.attention(*given)
    q, k, v, prompt_k, prompt_v = given
    keys = (k, v) if image else (None, None)
    return ops.attention_backward(
        grad, q, *keys, prompt_k, prompt_v, out if keep_out else None, lse, **wanted
    )


@pytest.fixture
def case():
    given = inputs(SIZE, True, torch.float32)
    return given, random(*given[0].shape, seed=9).float()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_packed_gradients_are_the_others_in_one_tensor(head_dim: int) -> None:
    given = inputs((*SIZE[:-1], head_dim), True, torch.float32)
    grad = random(*given[0].shape, seed=9).float()
    apart = backward(given, grad, need_q=True, need_kv=True)
    packed = backward(given, grad, need_q=True, need_kv=True, packed=True)
    assert packed.q is None and packed.kv is None
    assert torch.equal(packed.qkv, torch.cat((apart.q.unsqueeze(2), apart.kv), dim=2))
    assert torch.equal(packed.prompt_kv, apart.prompt_kv)


def test_gradients_without_the_output_are_the_same(case) -> None:
    kept = backward(*case, need_q=True, need_kv=True)
    formed = backward(*case, need_q=True, need_kv=True, keep_out=False)
    for actual, expected in ((formed.q, kept.q), (formed.kv, kept.kv), (formed.prompt_kv, kept.prompt_kv)):
        assert_same(actual, expected)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["triton", "torch"])
def test_without_the_output_an_error_of_lse_only_scales_the_gradients(implementation) -> None:
    """P = exp(S - lse) is then wrong by one factor per row, as it is by rounding where scores are large."""
    given = inputs((2, 7, 7, 5, 2, 32), True, torch.float32)
    grad = random(*given[0].shape, seed=9).float()
    _, lse = implementation.attention(*given)
    exact, scaled = (
        implementation.attention_backward(grad, *given, None, of_rows, need_q=True, need_kv=True)
        for of_rows in (lse, lse - math.log(2))
    )
    for actual, expected in ((scaled.q, exact.q), (scaled.kv, exact.kv), (scaled.prompt_kv, exact.prompt_kv)):
        assert_same(actual, 2 * expected)


def test_prompts_alone_need_no_image_keys(case) -> None:
    every = backward(*case, need_q=True, need_kv=True)
    alone = backward(*case, need_q=False, need_kv=False, image=False)
    assert (alone.qkv, alone.q, alone.kv) == (None, None, None)
    assert_same(alone.prompt_kv, every.prompt_kv)


def test_queries_and_prompts_without_image_keys_gradients(case) -> None:
    every = backward(*case, need_q=True, need_kv=True)
    some = backward(*case, need_q=True, need_kv=False)
    assert some.kv is None
    assert_same(some.q, every.q)
    assert_same(some.prompt_kv, every.prompt_kv)


def test_nothing_wanted_gives_nothing() -> None:
    given = inputs((1, 3, 3, 0, 1, 16), True, torch.float32)
    assert backward(given, given[0], need_q=False, need_kv=False) == (None, None, None, None)


def test_rows_of_a_slice_of_a_longer_sequence() -> None:
    """q, grad_out, out and lse as the block passes them for a part of its rows."""
    given = inputs(SIZE, True, torch.float32)
    q, k, v, prompt_k, prompt_v = given
    grad = random(*q.shape, seed=9).float()
    out, lse = ops.attention(*given)
    part = slice(2, 19)
    actual = ops.attention_backward(
        grad[:, part], q[:, part], k, v, prompt_k, prompt_v, out[:, part], lse[:, :, part],
        need_q=True, need_kv=False,
    )  # fmt: skip
    expected = ops.attention_backward(
        grad[:, part].contiguous(), q[:, part].contiguous(), k, v, prompt_k, prompt_v,
        out[:, part].contiguous(), lse[:, :, part].contiguous(), need_q=True, need_kv=False,
    )  # fmt: skip
    assert torch.equal(actual.q, expected.q) and torch.equal(actual.prompt_kv, expected.prompt_kv)


def test_strides_of_dimensions_of_one_may_be_any() -> None:
    q, *rest = inputs((1, 1, 3, 0, 1, 16), True, torch.float32)
    out, lse = ops.attention(q, *rest)
    odd, odd_lse = q.as_strided(q.shape, (3, 5, 7, 1)), lse.as_strided(lse.shape, (3, 5, 7))
    assert torch.equal(ops.attention(odd, *rest)[0], out)
    grads, expected = (
        ops.attention_backward(t, t, *rest, out, of_rows, need_q=True, need_kv=True)
        for t, of_rows in ((odd, odd_lse), (q, lse))
    )
    assert torch.equal(grads.q, expected.q) and torch.equal(grads.kv, expected.kv)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_builds_promise_the_compiler_nothing_that_launches_do_not_keep(head_dim, monkeypatch) -> None:
    launched: list[tuple[str, str]] = []  # kernel, stride that is no multiple of 16 elements

    class Recorded(Launch):
        def __init__(self, kernel, device, grid, *scalars, **options) -> None:
            super().__init__(kernel, device, grid, *scalars, **options)
            names = kernel.arg_names[-len(scalars) - len(self._constexprs) :][: len(scalars)]
            assert (names[0], names[-1]) in {("stride_gb", "num_fresh"), ("stride_qb", "num_fresh")}
            odd = [name for name, value in zip(names, scalars, strict=True) if value % 16]
            launched.extend((kernel.__name__, name) for name in odd if name.startswith("stride_"))

        def __call__(self, *pointers) -> None:
            pass

    monkeypatch.setattr(ops, "Launch", Recorded)
    forget_layouts()
    given = inputs((2, 4, 4, 2, 16, head_dim), True, torch.float16)
    backward(given, given[0], need_q=True, need_kv=True, packed=True)
    backward(given, given[0], need_q=True, need_kv=False, keep_out=False)
    forget_layouts()
    builds = [build for build in ops.builds(90) if build.constexprs["D"] == head_dim]
    promised = {(build.name, name) for build in builds for name in build.divisible}
    assert launched and not promised.intersection(launched)


def test_every_kernel_takes_the_sizes_in_one_order() -> None:
    wanted = list(ops.Sizes._fields)
    for kernel in (
        ops.attention_forward_kernel, ops.terms_kernel, ops.grad_q_kernel, ops.grad_kv_kernel
    ):  # fmt: skip
        assert [name for name in kernel.arg_names if name in wanted] == wanted


# Of keys past the end, whose gradients are not stored.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_scores_of_any_size_give_finite_results(case, scale: float) -> None:
    """All of a row's are far above 0, or all far below, where e^-lse is infinite."""
    (q, k, v, prompt_k, prompt_v), grad = case
    given = (q.abs() * scale, k.abs(), v, prompt_k.abs(), prompt_v)
    out, lse = ops.attention(*given)
    grads = ops.attention_backward(grad, *given, out, lse, need_q=True, need_kv=True)
    for t in (out, lse, grads.q, grads.kv, grads.prompt_kv):
        assert t.isfinite().all()


def test_images_2_to_the_31_elements_apart() -> None:
    """Three images in 4 GiB of zeros, of which only the pages with them are ever touched. Their stride is an
    int32, and that times their index is not."""
    far = torch.from_numpy(np.zeros(2**31 + 16, np.float16)).as_strided((3, 1, 1, 16), (2**30, 16, 16, 1))
    far.copy_(random(3, 1, 1, 16, seed=1))
    near = far.clone()
    for q, k in ((far, near), (near, far)):
        out, lse = ops.attention(q, k, k, None, None)
        expected, expected_lse = ops.attention(near, near, near, None, None)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        actual = ops.attention_backward(far, q, k, k, None, None, out, lse, need_q=True, need_kv=True)
        wanted = ops.attention_backward(
            near, near, near, near, None, None, out, lse, need_q=True, need_kv=True
        )
        assert torch.equal(actual.q, wanted.q) and torch.equal(actual.kv, wanted.kv)


NAMES = ("q", "k", "v", "prompt_k", "prompt_v")


class TestRefusals:
    def test_head_dim(self) -> None:
        given = inputs((1, 2, 2, 1, 1, 24), True, torch.float32)
        with pytest.raises(ValueError, match="head dim: got 24, want one of 16, 32, 48, 64, 72, 80, "):
            ops.attention(*given)

    def test_more_images_than_a_grid_holds(self) -> None:
        rows = torch.zeros(1, 1, 1, 16).expand(65536, -1, -1, -1)
        with pytest.raises(ValueError, match="q: got 65536 images, want 65535 at most"):
            ops.attention(rows, rows, rows, None, None)

    def test_float64(self) -> None:
        given = inputs((1, 2, 2, 1, 1, 16), True, torch.float64)
        with pytest.raises(ValueError, match="q: got torch.float64, want one of torch.float32"):
            ops.attention(*given)

    def test_two_dtypes(self) -> None:
        q, k, v, *prompts = inputs((1, 2, 2, 1, 1, 16), True, torch.float32)
        with pytest.raises(ValueError, match="k: got torch.float16, want one of torch.float32"):
            ops.attention(q, k.half(), v, *prompts)

    def test_last_dimension_that_is_not_contiguous(self) -> None:
        q, *rest = inputs((1, 2, 2, 1, 1, 16), True, torch.float32)
        with pytest.raises(ValueError, match="q: got stride 2 along the last dimension"):
            ops.attention(torch.cat((q, q), dim=-1)[..., ::2], *rest)

    def test_rows_2_to_the_31_elements_apart(self, case) -> None:
        (q, k, v, *prompts), _ = case
        far = torch.from_numpy(np.zeros(2**31 + 128, np.float32))  # pages that nobody touches
        far = far.as_strided((2, 2, 2, 64), (0, 2**31 - 64, 64, 1))
        with pytest.raises(ValueError, match="k: got strides .* want rows of an image within 2.31"):
            ops.attention(q, far, v, *prompts)

    def test_packed_gradients_of_2_to_the_31_elements(self) -> None:
        num_rows = 2**31 // (3 * 64) + 1
        rows = torch.zeros(1, 1, 1, 64).expand(1, num_rows, 1, 64)  # one row, whose gradients would be many
        given = dict.fromkeys(("grad_out", "q", "k", "v", "out"), rows) | {"prompt_k": None, "prompt_v": None}
        with pytest.raises(ValueError, match=f"packed: got {num_rows} rows of 3 x 1 x 64 gradients"):
            ops._backward_launches(True, True, True, lse=torch.empty(1, 1, num_rows), **given)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_rows_that_are_not_aligned(self, case, name: str) -> None:
        given = dict(zip(NAMES, case[0], strict=True))
        given[name] = torch.zeros(*given[name].shape[:3], 65)[..., :64]
        with pytest.raises(ValueError, match=f"{name}: got .* want rows that start at multiples of 16 bytes"):
            ops.attention(**given)

    def test_rows_whose_first_is_not_aligned(self, case) -> None:
        q, *rest = case[0]
        q = torch.cat((q.new_zeros(2), q.flatten()))[2:].view(q.shape)
        with pytest.raises(ValueError, match="q: got .* want rows that start at multiples of 16 bytes"):
            ops.attention(q, *rest)

    def test_gradient_that_is_not_aligned(self, case) -> None:
        given, grad = case
        grad = torch.zeros(*grad.shape[:3], 65)[..., :64]
        with pytest.raises(ValueError, match="grad_out: got .* want rows that start at multiples of 16"):
            backward(given, grad, need_q=True, need_kv=True)

    @pytest.mark.parametrize("name", ["k", "v", "prompt_v"])
    def test_keys_of_another_number_than_belong_together(self, name: str) -> None:
        given = dict(zip(NAMES, inputs((2, 2, 3, 4, 1, 16), True, torch.float32), strict=True))
        given[name] = given[name][:, 1:] if name != "k" else given[name][:1]
        with pytest.raises(ValueError, match=r"[kv]: got shape .*, want \("):
            ops.attention(**given)

    def test_keys_of_other_heads(self) -> None:
        q, k, v, *prompts = inputs((1, 2, 2, 1, 2, 16), True, torch.float32)
        with pytest.raises(ValueError, match=r"k: got \(heads, head dim\) \(1, 16\), want \(2, 16\)"):
            ops.attention(q, k[:, :, :1], v, *prompts)

    @pytest.mark.parametrize("name", ["v", "prompt_k"])
    def test_keys_or_values_alone(self, name: str) -> None:
        given = dict(zip(NAMES, inputs((1, 2, 2, 1, 1, 16), True, torch.float32), strict=True))
        with pytest.raises(ValueError, match="prompt_k and prompt_v: got one without the other, want both"):
            ops.attention(**given | {name: None})

    def test_prompts_of_another_batch(self) -> None:
        q, k, v, prompt_k, prompt_v = inputs((3, 2, 2, 1, 1, 16), False, torch.float32)
        with pytest.raises(ValueError, match=r"prompt_k: got shape \(2, .*want \(3, "):
            ops.attention(q, k, v, prompt_k[:2], prompt_v[:2])

    def test_log_sum_exp_of_another_shape(self, case) -> None:
        (q, k, v, *prompts), grad_out = case
        out, lse = ops.attention(q, k, v, *prompts)
        with pytest.raises(ValueError, match="lse: got shape"):
            ops.attention_backward(grad_out, q, k, v, *prompts, out, lse[:, :, :1], need_q=True, need_kv=True)

    def test_log_sum_exp_on_another_device(self, case) -> None:
        (q, k, v, *prompts), grad_out = case
        out, lse = ops.attention(q, k, v, *prompts)
        wanted = dict(need_q=True, need_kv=True)
        with pytest.raises(ValueError, match="lse: got a tensor on meta, want cpu like the others"):
            ops.attention_backward(grad_out, q, k, v, *prompts, out, lse.to("meta"), **wanted)

    def test_log_sum_exp_that_is_not_contiguous(self, case) -> None:
        (q, k, v, *prompts), grad_out = case
        out, lse = ops.attention(q, k, v, *prompts)
        apart = lse.repeat_interleave(2, dim=2)[:, :, ::2]
        with pytest.raises(ValueError, match="lse: got stride 2 along the last dimension, want 1"):
            ops.attention_backward(grad_out, q, k, v, *prompts, out, apart, need_q=True, need_kv=True)

    def test_image_keys_that_are_needed_and_missing(self, case) -> None:
        with pytest.raises(ValueError, match="k: got None"):
            backward(*case, need_q=True, need_kv=False, image=False)
        with pytest.raises(ValueError, match="k: got None"):
            backward(*case, need_q=False, need_kv=False, image=False, keep_out=False)

    @pytest.mark.parametrize(
        "wanted", [dict(need_q=True, need_kv=False), dict(need_q=False, need_kv=True)], ids=["q", "kv"]
    )
    def test_packed_gradients_of_which_some_are_not_wanted(self, case, wanted: dict[str, bool]) -> None:
        with pytest.raises(ValueError, match="packed: wanted without all of dQ, dK and dV"):
            backward(*case, **wanted, packed=True)

    def test_packed_gradients_of_fewer_queries_than_keys(self) -> None:
        q, k, v, *prompts = inputs((1, 2, 3, 1, 1, 16), True, torch.float32)
        with pytest.raises(ValueError, match="packed: .* or with fewer queries than keys"):
            backward((q, k, v, *prompts), q, need_q=True, need_kv=True, packed=True)

    def test_cpu_without_the_interpreter(self, case, monkeypatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="q is on cpu, want a CUDA device"):
            ops.attention(*case[0])
