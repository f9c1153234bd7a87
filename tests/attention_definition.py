"""Prompted attention in plain PyTorch of any precision, and the kernels held against it in float64."""

from __future__ import annotations

import torch
from definitions import relative_error
from vpt_fast.kernels.prompted_attention import ops


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(
    size: tuple[int, ...], shared: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor | None, ...]:
    """q, k, v, prompt_k, prompt_v of (B, R, N, m, H, D), scores of deviation 1: views of packed projections,
    as the block has them."""
    b, r, n, m, h, d = size
    q = random(b, r, h, d, seed=1) * d**-0.5
    kv = random(b, n, 2, h, d, seed=2)
    prompt_kv = random(1 if shared else b, m, 2, h, d, seed=3) if m else None
    if r == n:
        q, k, v = torch.cat((q.unsqueeze(2), kv), dim=2).to(device, dtype).unbind(2)
    else:
        q, (k, v) = q.to(device, dtype), kv.to(device, dtype).unbind(2)
    return q, k, v, *((None, None) if prompt_kv is None else prompt_kv.to(device, dtype).unbind(2))


def definition(q, k, v, prompt_k, prompt_v):
    """O and lse by concatenation, in the inputs' dtype."""
    if prompt_k is not None:
        k = torch.cat((prompt_k.expand(q.shape[0], -1, -1, -1), k), dim=1)
        v = torch.cat((prompt_v.expand(q.shape[0], -1, -1, -1), v), dim=1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def leaves(tensors, dtype: torch.dtype):
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def assert_no_worse(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """The error is at most 1.25 times that of eager in the same dtype. The floor, where eager happens to be
    nearly exact: one rounding of the result in 16 bits, a few of the intermediates in float32."""
    assert actual.shape == exact.shape, what
    floor = torch.finfo(actual.dtype).eps * (0.5 if actual.dtype.itemsize == 2 else 8)
    ours, theirs = relative_error(actual, exact), relative_error(eager, exact)
    assert ours <= 1.25 * max(theirs, floor), f"{what}: error {ours:.2e}, eager {theirs:.2e}"


def assert_forward_and_backward(given: tuple[torch.Tensor | None, ...], keep_out: bool = True) -> None:
    """O, lse and every gradient are as good as eager's in the same dtype. keep_out: backward is given O."""
    q = given[0]
    grad = random(*q.shape, seed=9).to(q)

    def with_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        own = leaves(given, dtype)
        out, lse = definition(*own)
        wanted = [t for t in own if t is not None]
        return [out, lse, *torch.autograd.grad(out, wanted, grad.to(dtype))]

    exact, eager = with_gradients(torch.float64), with_gradients(q.dtype)
    out, lse = ops.attention(*given)
    kept = out if keep_out else None
    grads = ops.attention_backward(grad, *given, kept, lse, need_q=True, need_kv=True)
    actual = [out, lse, grads.q, *grads.kv.unbind(2)]
    if grads.prompt_kv is not None:
        actual += grads.prompt_kv.unbind(2)
    names = ["out", "lse", "dq", "dk", "dv", "dk_p", "dv_p"][: len(actual)]
    for name, *values in zip(names, actual, eager, exact, strict=True):
        assert_no_worse(*values, name)
