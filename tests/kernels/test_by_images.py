"""Attention in plain PyTorch for a few images at a time is that of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_definition import inputs, random
from vpt_fast.kernels.prompted_attention import by_images, reference, window_reference
from window_attention_definition import Size, make_case

pytestmark = pytest.mark.usefixtures("nan_empty")

BATCH = 5
SIZE = (BATCH, 7, 7, 3, 2, 16)  # B, R, N, m, H, D
PROMPTS = {"shared": True, "of_each_image": False}
WANTED = {
    "packed": dict(need_q=True, need_kv=True, packed=True),
    "apart": dict(need_q=True, need_kv=True),
    "queries": dict(need_q=True, need_kv=False),
    "prompts": dict(need_q=False, need_kv=False),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two images at a time; and how many images each call of the definition was given."""
    _, num_rows, num_keys, num_prompts, num_heads, _ = SIZE
    monkeypatch.setitem(by_images.SCORES_AT_ONCE, "cpu", 2 * num_rows * num_heads * (num_keys + num_prompts))
    found: list[int] = []
    for module, prefix in ((reference, ""), (window_reference, "window_")):
        for name in (f"{prefix}attention", f"{prefix}attention_backward"):
            original = getattr(module, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                found.append(args[0].shape[0])
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, counted)
    return found


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    if expected is None:
        assert actual is None
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", PROMPTS.values(), ids=PROMPTS)
def test_forward_is_that_of_the_whole_batch(shared: bool, calls: list[int]) -> None:
    given = inputs(SIZE, shared, torch.float64)
    expected = reference.attention(*given)
    calls.clear()
    for actual, wanted in zip(by_images.attention(*given), expected, strict=True):
        assert_same(actual, wanted)
    assert calls == [2, 2, 1]


def test_forward_without_prompts_is_that_of_the_whole_batch(calls: list[int]) -> None:
    given = inputs((BATCH, 10, 10, 0, 2, 16), True, torch.float64)
    for actual, wanted in zip(by_images.attention(*given), reference.attention(*given), strict=True):
        assert_same(actual, wanted)
    assert calls[0] < BATCH


def test_backward_without_prompts_is_that_of_the_whole_batch(calls: list[int]) -> None:
    given = inputs((BATCH, 10, 10, 0, 2, 16), True, torch.float64)
    out, lse = reference.attention(*given)
    arguments, wanted = (random(*out.shape, seed=9), *given, out, lse), dict(need_q=True, need_kv=True)
    expected = reference.attention_backward(*arguments, **wanted)
    calls.clear()
    for actual, gradient in zip(by_images.attention_backward(*arguments, **wanted), expected, strict=True):
        assert_same(actual, gradient)
    assert calls[0] < BATCH


@pytest.mark.parametrize("keeps_out", [True, False], ids=["out", "no_out"])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("shared", PROMPTS.values(), ids=PROMPTS)
def test_backward_is_that_of_the_whole_batch(
    shared: bool, wanted: dict[str, bool], keeps_out: bool, calls: list[int]
) -> None:
    given = inputs(SIZE, shared, torch.float64)
    out, lse = reference.attention(*given)
    arguments = (random(*out.shape, seed=9), *given, out if keeps_out else None, lse)
    expected = reference.attention_backward(*arguments, **wanted)
    calls.clear()
    for actual, gradient in zip(by_images.attention_backward(*arguments, **wanted), expected, strict=True):
        assert_same(actual, gradient)
    assert calls == [2, 2, 1]


def test_prompts_alone_need_no_image_keys(calls: list[int]) -> None:
    q, k, v, prompt_k, prompt_v = inputs((BATCH, 40, 40, 3, 2, 16), True, torch.float64)
    out, lse = reference.attention(q, k, v, prompt_k, prompt_v)
    arguments = (random(*out.shape, seed=9), q, None, None, prompt_k, prompt_v, out, lse)
    wanted = dict(need_q=False, need_kv=False)
    expected = reference.attention_backward(*arguments, **wanted)
    calls.clear()
    assert_same(by_images.attention_backward(*arguments, **wanted).prompt_kv, expected.prompt_kv)
    assert calls == [1] * BATCH


def test_an_image_with_more_scores_than_are_wanted_is_taken_alone(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(by_images.SCORES_AT_ONCE, "cpu", 1)
    by_images.attention(*inputs(SIZE, True, torch.float64))
    assert calls == [1] * BATCH


WINDOWS = {  # B, W, T, m, f, H, D
    "tokens": Size(BATCH, 2, 3, 2, 0, 2, 16),
    "tokens_and_prompts": Size(BATCH, 2, 3, 2, 2, 2, 16),
    "prompts_alone": Size(BATCH, 2, 3, 2, 2, 2, 16, reads_tokens=False),
    "without_prompts": Size(BATCH, 2, 3, 0, 0, 2, 16),
    "one_window": Size(BATCH, 1, 5, 2, 0, 2, 16, is_shifted=False),
}


@pytest.mark.parametrize("keeps_out", [True, False], ids=["out", "no_out"])
@pytest.mark.parametrize("need_kv", [True, False], ids=["all", "queries"])
@pytest.mark.parametrize("shared", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("size", WINDOWS.values(), ids=WINDOWS)
def test_attention_in_windows_is_that_of_the_whole_batch(
    size: Size,
    shared: bool,
    need_kv: bool,
    keeps_out: bool,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = size.windows * (size.tokens * size.reads_tokens + size.fresh)
    scores = rows * (size.tokens + size.prompts) * size.heads
    monkeypatch.setitem(by_images.SCORES_AT_ONCE, "cpu", 2 * scores)
    case = make_case(size, shared, torch.float64)
    options = dict(num_fresh=case.num_fresh)
    out, lse = window_reference.window_attention(*case.tensors, case.bias, **options)
    given = (case.grad, *case.tensors, out if keeps_out else None, lse, case.bias)
    options |= dict(need_q=True, need_kv=need_kv)
    gradients = window_reference.window_attention_backward(*given, **options)
    calls.clear()
    found = by_images.window_attention(*case.tensors, case.bias, num_fresh=case.num_fresh)
    for actual, expected in zip(found, (out, lse), strict=True):
        assert_same(actual, expected)
    for actual, expected in zip(
        by_images.window_attention_backward(*given, **options), gradients, strict=True
    ):
        assert_same(actual, expected)
    assert calls == 2 * [2, 2, 1]


@pytest.mark.parametrize("shared", PROMPTS.values(), ids=PROMPTS)
def test_gradients_of_prompts_of_windows_alone_need_no_image_keys(shared: bool, calls: list[int]) -> None:
    case = make_case(WINDOWS["tokens"], shared, torch.float64)
    q, k, v, *prompts = case.tensors
    out, lse = window_reference.window_attention(q, k, v, *prompts, case.bias, num_fresh=0)
    given = (case.grad, q, None, None, *prompts, out, lse, case.bias)
    wanted = dict(num_fresh=0, need_q=False, need_kv=False)
    expected = window_reference.window_attention_backward(*given, **wanted)
    calls.clear()
    assert_same(by_images.window_attention_backward(*given, **wanted).prompt_kv, expected.prompt_kv)
    assert sum(calls) == BATCH
