"""FlashAttention backends on a CUDA device, against concatenation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vpt_fast.kernels.prompted_attention.flash import FLASH_BACKENDS, get_flash

pytestmark = pytest.mark.gpu

# R, N, m, batch dimension of the prompts, H, D
SHAPES = {
    "N197_m50_D64": (197, 197, 50, 1, 3, 64),
    "N257_m7_D80": (257, 257, 7, 1, 2, 80),
    "per_image": (197, 197, 50, 4, 2, 64),
    "no_prompts": (61, 61, 0, 1, 2, 32),
    "one_row_read": (1, 197, 10, 1, 2, 64),
    "few_rows_read": (5, 197, 1, 1, 2, 128),
}
BATCH = 4


def backend(name: str) -> tuple[Any, Any]:
    """What `get_flash` gives; a package that this machine lacks is the one reason to skip."""
    try:
        return get_flash(name)
    except ValueError as missing:
        pytest.skip(str(missing))


def make_inputs(shape: str, dtype: torch.dtype) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """q, k, v, prompt_k, prompt_v as views of packed tensors, and grad_out."""
    rows, tokens, m, prompt_batch, heads, dim = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    q, k, v = normal(BATCH, tokens, 3, heads, dim).unbind(2)
    q /= dim**0.5  # the softmax scale, which the block folds into q's projection
    packed = torch.stack((q, k, v), dim=2).to(dtype)
    q, k, v = packed.unbind(2)
    prompts = normal(prompt_batch, m, 2, heads, dim).to(dtype).unbind(2) if m else (None, None)
    return [q[:, :rows], k, v, *prompts], normal(BATCH, rows, heads, dim).to(dtype)


def concatenation(
    inputs: list[torch.Tensor | None], grad_out: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Everything by autograd, in `dtype`."""
    leaves = [None if x is None else x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    q, k, v, prompt_k, prompt_v = leaves
    if prompt_k is not None:
        k, v = (torch.cat((p.expand(BATCH, -1, -1, -1), x), 1) for p, x in ((prompt_k, k), (prompt_v, v)))
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    out = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    out.backward(grad_out.to(dtype))
    found = {"out": out.detach(), "lse": scores.double().logsumexp(-1).detach()}
    grads = zip(("q", "k", "v", "prompt_k", "prompt_v"), leaves, strict=True)
    return found | {name: x.grad for name, x in grads if x is not None}


def flash(name: str, inputs: list[torch.Tensor | None], grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    attention, attention_backward = backend(name)
    out, lse = attention(*inputs)
    grads = attention_backward(grad_out, *inputs, out, lse, need_q=True, need_kv=True)
    found = {"out": out, "lse": lse, "q": grads.q}
    found |= dict(zip("kv", grads.kv.unbind(2), strict=True))
    if grads.prompt_kv is not None:
        found |= dict(zip(("prompt_k", "prompt_v"), grads.prompt_kv.unbind(2), strict=True))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in FLASH_BACKENDS if name != "sdpa_cpu"])
def test_error_is_at_most_that_of_eager(name: str, shape: str, dtype: torch.dtype) -> None:
    inputs, grad_out = make_inputs(shape, dtype)
    actual = flash(name, inputs, grad_out)
    exact = concatenation(inputs, grad_out, torch.float64)
    eager = concatenation(inputs, grad_out, dtype)
    assert (actual["lse"].dtype, actual["lse"].shape) == (torch.float32, exact["lse"].shape)
    assert (actual["lse"] - exact["lse"]).abs().max() < 1e-2
    for key in exact.keys() - {"lse"}:
        ours, theirs = ((x[key].double() - exact[key]).norm() for x in (actual, eager))
        assert ours <= 1.25 * theirs, f"{key}: {ours:.2e}, eager {theirs:.2e}"


@pytest.mark.parametrize("name", [name for name in FLASH_BACKENDS if name not in ("sdpa_cpu", "sdpa_cudnn")])
def test_repeats_bit_for_bit(name: str) -> None:
    inputs, grad_out = make_inputs("N197_m50_D64", torch.bfloat16)
    first, second = (flash(name, inputs, grad_out) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", [name for name in FLASH_BACKENDS if name != "sdpa_cpu"])
def test_prompts_alone_are_what_they_are_beside_the_rest(name: str) -> None:
    inputs, grad_out = make_inputs("N197_m50_D64", torch.bfloat16)
    attention, attention_backward = backend(name)
    out, lse = attention(*inputs)
    packed = attention_backward(grad_out, *inputs, out, lse, need_q=True, need_kv=True, packed=True)
    inputs[1] = inputs[2] = None  # the image's keys and values
    alone = attention_backward(grad_out, *inputs, out, lse, need_q=False, need_kv=False)
    assert (alone.qkv, alone.q, alone.kv, packed.q, packed.kv) == (None,) * 5
    assert packed.qkv.shape == (BATCH, 197, 3, 3, 64)
    difference = (alone.prompt_kv.double() - packed.prompt_kv.double()).norm()
    assert difference < 1e-2 * packed.prompt_kv.double().norm()
