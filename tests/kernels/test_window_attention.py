"""Prompted attention in windows, the definition and its kernels in Triton's interpreter, against float64
autograd on every window's joined sequence."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import relative_error
from vpt_fast.kernels.prompted_attention import window_ops, window_reference
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias
from window_attention_definition import (
    NAMES,
    Case,
    Size,
    assert_forward_and_backward,
    computed,
    defined,
    make_case,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# B, W, T, m, f, H, D: windows of 7x7 and 12x12, one window, one token, no prompts, prompts that are read, one
# key less than a tile.
# Images share their prompts in every other case.
SIZES = [
    Size(1, 1, 49, 50, 0, 1, 32),
    Size(2, 2, 9, 7, 7, 1, 32),
    Size(2, 2, 17, 1, 0, 1, 64),
    Size(1, 3, 6, 0, 0, 2, 32),
    Size(1, 2, 33, 40, 40, 1, 64),
    Size(2, 1, 1, 1, 1, 1, 32, is_shifted=False),
    Size(2, 2, 12, 19, 3, 1, 32, is_shifted=False),
    Size(2, 3, 10, 7, 7, 1, 32, reads_tokens=False),
    Size(1, 1, 144, 7, 0, 1, 32),
]
PLAIN, MIXED = Size(2, 2, 9, 7, 0, 1, 32), SIZES[1]
CASES = [
    pytest.param(size, index % 2 == 0, dtype, id=f"{size}-{name}")
    for index, size in enumerate(SIZES)
    for name, dtype in DTYPES.items()
    if size.tokens < 100 or dtype == torch.float16  # float32's tiles are small, and many
]


@pytest.mark.parametrize(("size", "is_shared", "dtype"), CASES)
def test_forward_and_backward(size: Size, is_shared: bool, dtype: torch.dtype) -> None:
    assert_forward_and_backward(window_ops, make_case(size, is_shared, dtype))


@pytest.mark.parametrize("keep_out", [True, False], ids=["with_out", "without_out"])
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "per_image"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plain_pytorch_equals_the_definition(size: Size, is_shared: bool, keep_out: bool) -> None:
    case = make_case(size, is_shared, torch.float64)
    actual, expected = computed(window_reference, case, keep_out), defined(case.to(torch.float64))
    for name, ours, exact in zip(NAMES, actual, expected, strict=False):
        assert relative_error(ours, exact) < 1e-12, name


@pytest.mark.parametrize("size", [PLAIN, MIXED], ids=str)
def test_gradients_without_the_output_are_as_good(size: Size) -> None:
    assert_forward_and_backward(window_ops, make_case(size, True, torch.float32), keep_out=False)


@pytest.mark.parametrize("implementation", [window_ops, window_reference], ids=["triton", "torch"])
def test_without_the_output_an_error_of_lse_only_scales_the_gradients(implementation) -> None:
    """P = exp(S - lse) is then wrong by one factor per row, as it is by rounding where scores are large."""
    case = make_case(MIXED, True, torch.float32)
    _, lse = implementation.window_attention(*case.tensors, case.bias, num_fresh=case.num_fresh)
    exact, scaled = (
        implementation.window_attention_backward(
            case.grad, *case.tensors, None, of_rows, case.bias, num_fresh=case.num_fresh, need_q=True,
            need_kv=True,
        )
        for of_rows in (lse, lse - math.log(2))
    )  # fmt: skip
    for actual, expected in ((scaled.q, exact.q), (scaled.kv, exact.kv), (scaled.prompt_kv, exact.prompt_kv)):
        assert_same(actual, 2 * expected)


def backward(case: Case, *, keep_out: bool = True, tokens: bool = True, **wanted: bool):
    out, lse = window_ops.window_attention(*case.tensors, case.bias, num_fresh=case.num_fresh)
    q, k, v, prompt_k, prompt_v = case.tensors
    keys = (k, v) if tokens else (None, None)
    return window_ops.window_attention_backward(
        case.grad, q, *keys, prompt_k, prompt_v, out if keep_out else None, lse, case.bias,
        num_fresh=case.num_fresh, **wanted,
    )  # fmt: skip


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_packed_gradients_are_the_others_in_one_tensor() -> None:
    case = make_case(PLAIN, True, torch.float32)
    apart = backward(case, need_q=True, need_kv=True)
    packed = backward(case, need_q=True, need_kv=True, packed=True)
    assert packed.q is None and packed.kv is None
    assert torch.equal(packed.qkv, torch.cat((apart.q.unsqueeze(2), apart.kv), dim=2))
    assert torch.equal(packed.prompt_kv, apart.prompt_kv)


def test_prompts_alone_need_no_keys_of_tokens() -> None:
    case = make_case(PLAIN, True, torch.float32)
    every = backward(case, need_q=True, need_kv=True)
    alone = backward(case, need_q=False, need_kv=False, tokens=False)
    assert (alone.qkv, alone.q, alone.kv) == (None, None, None)
    assert_same(alone.prompt_kv, every.prompt_kv)


def test_queries_and_prompts_without_the_keys_gradients() -> None:
    case = make_case(MIXED, True, torch.float32)
    every = backward(case, need_q=True, need_kv=True)
    some = backward(case, need_q=True, need_kv=False)
    assert some.kv is None
    assert torch.equal(some.q, every.q) and torch.equal(some.prompt_kv, every.prompt_kv)


@pytest.mark.parametrize("size", [PLAIN, MIXED], ids=str)
def test_keys_without_the_queries_gradients(size: Size) -> None:
    case = make_case(size, True, torch.float32)
    every = backward(case, need_q=True, need_kv=True)
    some = backward(case, need_q=False, need_kv=True)
    assert some.q is None
    assert_same(some.kv, every.kv)
    assert_same(some.prompt_kv, every.prompt_kv)


def test_part_of_the_rows_as_the_block_passes_them() -> None:
    """The first prompted block gives prompts' rows alone, as slices of longer tensors."""
    case = make_case(MIXED, True, torch.float32)
    out, lse = window_ops.window_attention(*case.tensors, case.bias, num_fresh=case.num_fresh)
    q, *keys = case.tensors
    first = q.shape[1] - case.num_fresh

    def part(copy) -> tuple[torch.Tensor, torch.Tensor]:
        grads = window_ops.window_attention_backward(
            copy(case.grad[:, first:]), copy(q[:, first:]), *keys, copy(out[:, first:]),
            copy(lse[:, :, first:]), case.bias, num_fresh=case.num_fresh, need_q=True, need_kv=False,
        )  # fmt: skip
        return grads.q, grads.prompt_kv

    for sliced, copied in zip(part(lambda t: t), part(torch.Tensor.contiguous), strict=True):
        assert torch.equal(sliced, copied)


def test_bias_and_regions_that_are_views_are_those_in_one_piece() -> None:
    case = make_case(Size(1, 2, 9, 7, 0, 2, 32), True, torch.float32)
    views = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in case.bias)
    apart = case._replace(bias=WindowBias(*views))
    for actual, expected in zip(computed(window_ops, apart), computed(window_ops, case), strict=True):
        assert torch.equal(actual, expected)


def test_scores_of_any_size_give_finite_results() -> None:
    case = make_case(MIXED, True, torch.float32)
    q, *rest = case.tensors
    for tensor in computed(window_ops, case._replace(tensors=(q * 1e4, *rest))):
        assert tensor.isfinite().all()


def test_custom_op_tells_the_truth_about_its_outputs() -> None:
    case = make_case(MIXED, True, torch.float32)
    torch.library.opcheck(
        torch.ops.vpt_fast.window_attention, (*case.tensors, *case.bias, case.num_fresh),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


class TestRefusals:
    @staticmethod
    def case(dtype: torch.dtype = torch.float32, head_dim: int = 32) -> Case:
        return make_case(Size(1, 2, 4, 1, 0, 1, head_dim), True, dtype)

    @staticmethod
    def attend(case: Case, num_fresh: int = 0) -> None:
        window_ops.window_attention(*case.tensors, case.bias, num_fresh=num_fresh)

    def test_head_dim(self) -> None:
        with pytest.raises(ValueError, match="head dim: got 16 in windows, want one of 32, 64"):
            self.attend(self.case(head_dim=16))

    def test_float64(self) -> None:
        with pytest.raises(ValueError, match="q: got torch.float64, want one of torch.float32"):
            self.attend(self.case(torch.float64))

    def test_more_windows_than_a_grid_holds(self) -> None:
        case = make_case(Size(1, 2, 4, 1, 0, 2, 32), True, torch.float32)
        rows = torch.zeros(1, 1, 2, 32).expand(-1, 4 * 32768, -1, -1)
        with pytest.raises(ValueError, match="k: got 32768 windows of 2 heads, want 65535 at most"):
            self.attend(case._replace(tensors=(rows, rows, rows, None, None)))

    def test_bias_that_is_not_filled_up(self) -> None:
        case = self.case()
        short = case.bias._replace(bias=case.bias.bias[..., :4])
        with pytest.raises(ValueError, match=r"bias: got shape \(1, 4, 4\), want \(1, 4, 16\)"):
            self.attend(case._replace(bias=short))

    def test_regions_of_other_windows(self) -> None:
        case = self.case()
        other = case.bias._replace(regions=case.bias.regions[:1])
        with pytest.raises(ValueError, match=r"regions: got shape \(1, 4\), want \(2, 4\)"):
            self.attend(case._replace(bias=other))

    def test_rows_that_are_no_whole_windows(self) -> None:
        case = self.case()
        q, k, v, *prompts = case.tensors
        with pytest.raises(ValueError, match="k: got 7 rows, want one or more windows of 4"):
            self.attend(case._replace(tensors=(q[:, :7], k[:, :7], v[:, :7], *prompts)))

    def test_queries_of_some_tokens(self) -> None:
        case = self.case()
        q, *rest = case.tensors
        with pytest.raises(ValueError, match="q: got 5 rows, 1 of them prompts', want those of all 8"):
            self.attend(case._replace(tensors=(q[:, :5], *rest)), num_fresh=1)

    @pytest.mark.parametrize("name", ["v", "prompt_v"])
    def test_values_of_another_number_than_keys(self, name: str) -> None:
        case = self.case()
        given = dict(zip(("q", "k", "v", "prompt_k", "prompt_v"), case.tensors, strict=True))
        given[name] = given[name][:, 1:]
        with pytest.raises(ValueError, match=rf"{name}: got shape .*, want \("):
            self.attend(case._replace(tensors=tuple(given.values())))

    def test_gradient_of_fewer_rows(self) -> None:
        case = self.case()
        with pytest.raises(ValueError, match=r"grad_out: got shape \(1, 7, .*, want \(1, 8, "):
            backward(case._replace(grad=case.grad[:, 1:]), need_q=True, need_kv=True)

    def test_log_sum_exp_in_another_dtype(self) -> None:
        case = self.case()
        out, lse = window_ops.window_attention(*case.tensors, case.bias, num_fresh=0)
        wanted = dict(num_fresh=0, need_q=True, need_kv=True)
        with pytest.raises(ValueError, match=r"torch.float64, want one of torch.float32"):
            window_ops.window_attention_backward(
                case.grad, *case.tensors, out, lse.double(), case.bias, **wanted
            )

    def test_keys_that_are_needed_and_missing(self) -> None:
        for wanted in (dict(need_q=True, need_kv=False), dict(need_q=False, need_kv=False, keep_out=False)):
            with pytest.raises(ValueError, match="k: got None"):
                backward(self.case(), tokens=False, **wanted)

    def test_packed_gradients_of_prompts_rows(self) -> None:
        with pytest.raises(ValueError, match="packed: wanted"):
            backward(make_case(MIXED, True, torch.float32), need_q=True, need_kv=True, packed=True)
