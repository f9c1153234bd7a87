"""Attention in plain PyTorch for a few images at a time is that of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_definition import inputs, random
from vpt_fast.kernels.prompted_attention import by_images, reference

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
    for name in ("attention", "attention_backward"):
        original = getattr(reference, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            found.append(args[0].shape[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(by_images.reference, name, counted)
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
