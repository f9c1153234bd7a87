"""Prompted attention in windows in plain PyTorch of any precision, and implementations held against it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from attention_definition import assert_no_worse, leaves, random
from torch import Tensor
from vpt_fast.kernels.prompted_attention.window_reference import BIAS_COLUMNS, WindowBias

NAMES = ("out", "lse", "dq", "dk", "dv", "dk_p", "dv_p")


class Size(NamedTuple):
    """batch B, windows W of an image, tokens T of a window, prompts m, those whose output is read f."""

    batch: int
    windows: int
    tokens: int
    prompts: int
    fresh: int
    heads: int
    head_dim: int
    reads_tokens: bool = True
    is_shifted: bool = True

    def __str__(self) -> str:
        sizes = "_".join(f"{n}{v}" for n, v in zip("BWTmfHD", self, strict=False))
        return sizes + ("" if self.reads_tokens else "_no_tokens") + ("_shifted" if self.is_shifted else "")


class Case(NamedTuple):
    """Arguments of `window_attention`, and dO."""

    tensors: tuple[Tensor | None, ...]
    bias: WindowBias
    num_fresh: int
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        bias = WindowBias(self.bias.bias.to(torch.promote_types(dtype, torch.float32)), self.bias.regions)
        return Case(tuple(leaves(self.tensors, dtype)), bias, self.num_fresh, self.grad.to(dtype))


def make_case(size: Size, is_shared: bool, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Scores of deviation 1 and a bias of as much. k and v, and q where all rows are tokens', are views of
    packed projections, as the block has them."""
    b, w, t, m, f, h, d, reads_tokens, is_shifted = size
    q = random(b, w * t * reads_tokens + f, h, d, seed=1) * d**-0.5
    kv = random(b, w * t, 2, h, d, seed=2)
    prompt_kv = random(1 if is_shared else b, m, 2, h, d, seed=3) if m else None
    if q.shape[1] == kv.shape[1] and not f:
        q, k, v = torch.cat((q.unsqueeze(2), kv), dim=2).to(device, dtype).unbind(2)
    else:
        q, (k, v) = q.to(device, dtype), kv.to(device, dtype).unbind(2)
    prompts = (None, None) if prompt_kv is None else prompt_kv.to(device, dtype).unbind(2)
    bias = F.pad(random(h, t, t, seed=4).float(), (0, -t % BIAS_COLUMNS)).to(device)
    regions = None
    if is_shifted:
        regions = (random(w, t, seed=5) > 0).int().to(device)
    grad = random(*q.shape, seed=9).to(q)
    return Case((q, k, v, *prompts), WindowBias(bias, regions), f, grad)


def definition(case: Case) -> tuple[Tensor, Tensor]:
    """O and lse by concatenation in every window, in the tensors' dtype."""
    q, k, v, prompt_k, prompt_v = case.tensors
    bias, regions = case.bias
    t, batch = bias.shape[1], len(q)
    num_windows, num_tokens = k.shape[1] // t, q.shape[1] - case.num_fresh

    def windows(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B, W, H, T, D)
        return x.unflatten(1, (num_windows, -1)).transpose(2, 3)

    def in_every_window(x: Tensor) -> Tensor:  # (1 or B, m, H, D) -> (B, W, H, m, D)
        return x.transpose(1, 2).unsqueeze(1).expand(batch, num_windows, -1, -1, -1)

    keys, values = windows(k), windows(v)
    if prompt_k is not None:
        keys = torch.cat((in_every_window(prompt_k), keys), dim=3)
        values = torch.cat((in_every_window(prompt_v), values), dim=3)
    rows = in_every_window(q[:, num_tokens:])
    if num_tokens:
        rows = torch.cat((windows(q[:, :num_tokens]), rows), dim=3)
    scores = rows @ keys.transpose(-1, -2)
    if num_tokens:
        between = bias[..., :t].unsqueeze(0)  # (1, H, T, T)
        if regions is not None:
            between = between - 100.0 * (regions[:, None, :, None] != regions[:, None, None, :])
        scores = scores + F.pad(between.to(scores.dtype), (keys.shape[3] - t, 0, 0, case.num_fresh))
    out = scores.softmax(-1) @ values
    split = num_tokens // num_windows
    of_tokens = out[..., :split, :].transpose(2, 3).flatten(1, 2)
    of_prompts = out[..., split:, :].mean(1).transpose(1, 2)
    lse = [part.transpose(1, 2).flatten(2) for part in scores.logsumexp(-1).tensor_split([split], dim=-1)]
    return torch.cat((of_tokens, of_prompts), dim=1), torch.cat(lse, dim=-1)


def defined(case: Case) -> list[Tensor]:
    """O, lse and the gradients of all tensors that there are, by autograd."""
    out, lse = definition(case)
    wanted = [t for t in case.tensors if t is not None]
    return [out, lse, *torch.autograd.grad(out, wanted, case.grad)]


def computed(ops: Any, case: Case, keep_out: bool = True) -> list[Tensor]:
    """The same by an implementation's forward and backward."""
    tensors = [None if t is None else t.detach() for t in case.tensors]
    out, lse = ops.window_attention(*tensors, case.bias, num_fresh=case.num_fresh)
    grads = ops.window_attention_backward(
        case.grad, *tensors, out if keep_out else None, lse, case.bias, num_fresh=case.num_fresh,
        need_q=True, need_kv=True,
    )  # fmt: skip
    prompts = [] if grads.prompt_kv is None else grads.prompt_kv.unbind(2)
    return [out, lse, grads.q, *grads.kv.unbind(2), *prompts]


def assert_forward_and_backward(ops: Any, case: Case, keep_out: bool = True) -> None:
    """O, lse and every gradient are as good as eager's in the same dtype, from float64."""
    dtype = case.tensors[0].dtype
    exact, eager = defined(case.to(torch.float64)), defined(case.to(dtype))
    actual = computed(ops, case, keep_out)
    for name, *values in zip(NAMES, actual, eager, exact, strict=False):
        assert_no_worse(*values, name)
    assert len(actual) == len(exact)
