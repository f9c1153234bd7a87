"""Prompted window attention, forward and backward, in plain PyTorch: the definition.

Every window of T tokens attends to its own tokens and to the prompts, which all windows share. With
K = [K_P; K_W] and V = [V_P; V_W], prompt rows before the window's, per image, window and head:

    S = Q Kᵀ + [0, bias]   (the softmax scale is folded into Q's frozen projection)
    P = softmax(S)         lse = log Σ exp(S)
    O = P V

The bias is the relative position bias, and -100 where two tokens of a shifted window come from different
sides of the image (Liu et al., Swin Transformer, ICCV 2021, sec. 3.2). To and from prompts it is zero. A
prompt whose output is read has a row in every window; its output is the mean over the windows.

All sums are computed in at least float32, whatever the tensors' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, delta_of_scores, num_rows_of

# What timm and the original authors add to the scores of tokens that must not see each other. An integer: of
# a float torch.compile(dynamic=True) makes a symbol, and fails where two blocks share it.
MASKED = -100

# Rows of the bias are padded to a multiple of this many columns, so that kernels load whole vectors.
BIAS_COLUMNS = 16


class WindowBias(NamedTuple):
    """What attention in windows adds to the scores.

    bias: (H, T, T'), relative position bias of query and key, in at least float32; T' is T rounded up to a
        multiple of `BIAS_COLUMNS`, and columns past T are zero.
    regions: (W, T) int32, the side of the image that each token of each window comes from, or None where the
        windows are not shifted: tokens of different regions do not see each other.
    """

    bias: torch.Tensor
    regions: torch.Tensor | None


def pad_bias(bias: torch.Tensor, num_more: int = 0) -> torch.Tensor:
    """`WindowBias.bias` of a relative position bias (H, T, T or more columns), which is zero for `num_more`
    tokens behind these."""
    num_tokens = bias.shape[1]
    columns = num_tokens + num_more + -(num_tokens + num_more) % BIAS_COLUMNS
    return F.pad(bias[..., :num_tokens], (0, columns - num_tokens, 0, num_more)).contiguous()


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    bias: WindowBias,
    *,
    num_fresh: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and lse for the query rows `q`. W windows of T tokens, N = W·T.

    Args:
        q: (B, R, H, D), the rows whose output is wanted: all N tokens, window by window, or none of them, and
            then `num_fresh` prompts.
        k, v: (B, N, H, D), keys and values of the tokens, window by window.
        prompt_k, prompt_v: (1 or B, m, H, D), or None where the block has no prompts.
        bias: what is added to the scores.
        num_fresh: number of prompts among the rows.

    Returns:
        O (B, R, H, D) in q's dtype, for prompts the mean over the windows; and lse in at least float32, (B,
        H, R - num_fresh + W·num_fresh): of the tokens, then of the prompts, window by window.
    """
    scores = _scores(q, k, prompt_k, bias, num_fresh)  # (B, W, H, T + f, m + T)
    values = _extend(prompt_v, v, scores.shape[1])
    row_max = scores.amax(-1, keepdim=True)
    weights = scores.sub_(row_max).exp_()  # softmax without its denominator
    row_sum = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, values).div_(row_sum)  # (B, W, H, T + f, D)
    lse = (row_max + row_sum.log()).squeeze(-1)
    rows = lse.shape[-1] - num_fresh
    lse = torch.cat([part.transpose(1, 2).flatten(2) for part in (lse[..., :rows], lse[..., rows:])], dim=-1)
    return _rows_first(out[..., :rows, :], out[..., rows:, :].mean(1), q.dtype), lse


def window_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    bias: WindowBias,
    *,
    num_fresh: int,
    need_q: bool,
    need_kv: bool,
    packed: bool = False,
) -> AttentionGrads:
    """Gradients of `window_attention`, only those that are wanted; formulas and arguments are those of
    `reference.attention_backward`.

    Gradients of prompts are summed over the windows, and over the batch where all images share them. With
    neither `need_q` nor `need_kv` (the first prompted block) only the prompts' columns of S are computed, and
    `k` and `v` may be None; `num_fresh` must then be 0.
    """
    m = num_rows_of(prompt_k)
    window_size = bias.bias.shape[1]
    num_rows = q.shape[1] - num_fresh
    num_windows = (num_rows if k is None else k.shape[1]) // window_size
    queries = _queries(q, num_windows, num_fresh)
    grad = torch.cat((grad_out[:, :num_rows], grad_out[:, num_rows:] / num_windows), dim=1)
    grad = _queries(grad, num_windows, num_fresh)  # (B, W, H, T + f, D)
    if need_q or need_kv or out is None:
        assert v is not None
        probabilities = _scores(q, k, prompt_k, bias, num_fresh)
        keys, values = (_extend(*pair, num_windows) for pair in ((prompt_k, k), (prompt_v, v)))
    else:  # only the prompts' columns: the rows' lse already holds the sum over all keys
        keys, values = (_wide(x.transpose(1, 2)).unsqueeze(1) for x in (prompt_k, prompt_v))
        probabilities = torch.matmul(queries, keys.transpose(-1, -2))
    window_lse = torch.cat(
        [
            part.unflatten(-1, (num_windows, -1)).transpose(1, 2)
            for part in (lse[..., :num_rows], lse[..., num_rows:])
            if part.shape[-1]
        ],
        dim=-1,
    )  # (B, W, H, T + f)
    probabilities.sub_(window_lse.unsqueeze(-1)).exp_()
    grad_scores = torch.matmul(grad, values.transpose(-1, -2))

    # δ = rowsum(dO ∘ O). Only the mean of a prompt's outputs is known, so theirs is from the scores.
    rows = num_rows // num_windows
    known = 0 if out is None else rows
    delta = delta_of_scores(probabilities[..., known:, :], grad_scores[..., known:, :])
    if known:
        known_delta = grad[..., :known, :] * _windows(out[:, :num_rows], num_windows)
        delta = torch.cat((known_delta.sum(-1, keepdim=True), delta), dim=-2)  # (B, W, H, T + f, 1)
    grad_scores.sub_(delta).mul_(probabilities)

    grad_q = None
    if need_q:
        per_window = torch.matmul(grad_scores, keys)  # (B, W, H, T + f, D)
        grad_q = _rows_first(per_window[..., :rows, :], per_window[..., rows:, :].sum(1), q.dtype)
    first, last = (0, keys.shape[-2]) if need_kv else (0, m)  # columns whose gradient is wanted
    grad_k = torch.matmul(grad_scores[..., first:last].transpose(-1, -2), queries)
    grad_v = torch.matmul(probabilities[..., first:last].transpose(-1, -2), grad)

    grad_prompt_kv = None
    if prompt_k is not None:
        parts = [g[..., :m, :].sum(1) for g in (grad_k, grad_v)]  # (B, H, m, D)
        if prompt_k.shape[0] == 1:
            parts = [g.sum(0, keepdim=True) for g in parts]
        grad_prompt_kv = torch.stack([x.transpose(1, 2).to(q.dtype) for x in parts], dim=2)
    if not need_kv:
        return AttentionGrads(qkv=None, q=grad_q, kv=None, prompt_kv=grad_prompt_kv)
    image_kv = [
        g[..., m:, :].transpose(2, 3).flatten(1, 2).to(q.dtype) for g in (grad_k, grad_v)
    ]  # twice (B, N, H, D)
    if packed:
        assert grad_q is not None
        return AttentionGrads(torch.stack([grad_q, *image_kv], dim=2), None, None, grad_prompt_kv)
    return AttentionGrads(qkv=None, q=grad_q, kv=torch.stack(image_kv, dim=2), prompt_kv=grad_prompt_kv)


def _scores(
    q: torch.Tensor, k: torch.Tensor | None, prompt_k: torch.Tensor | None, bias: WindowBias, num_fresh: int
) -> torch.Tensor:
    """S (B, W, H, T + f, m + T), without the T rows if no token's output is wanted."""
    assert k is not None
    window_size = bias.bias.shape[1]
    num_windows = k.shape[1] // window_size
    queries, keys = _queries(q, num_windows, num_fresh), _extend(prompt_k, k, num_windows)
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    if q.shape[1] > num_fresh:
        between_tokens = scores[..., :window_size, -window_size:]  # (B, W, H, T, T)
        between_tokens.add_(bias.bias[..., :window_size])
        if bias.regions is not None:
            apart = bias.regions.unsqueeze(1) != bias.regions.unsqueeze(2)  # (W, T, T)
            between_tokens.add_(apart.unsqueeze(1).to(scores.dtype), alpha=MASKED)
    return scores


def _queries(q: torch.Tensor, num_windows: int, num_fresh: int) -> torch.Tensor:
    """(B, N + f, H, D) -> (B, W, H, T + f, D): each window's own rows, then a copy of the prompts."""
    num_rows = q.shape[1] - num_fresh
    parts = []
    if num_rows:
        parts.append(_windows(q[:, :num_rows], num_windows))
    if num_fresh:
        parts.append(_wide(q[:, num_rows:].transpose(1, 2)).unsqueeze(1).expand(-1, num_windows, -1, -1, -1))
    return torch.cat(parts, dim=-2)


def _extend(prompts: torch.Tensor | None, x: torch.Tensor | None, num_windows: int) -> torch.Tensor:
    """Prompt rows before each window's: (1 or B, m, H, D) and (B, N, H, D) -> (B, W, H, m + T, D)."""
    assert x is not None
    windows = _windows(x, num_windows)
    if prompts is None:
        return windows
    shared = _wide(prompts.transpose(1, 2)).unsqueeze(1)  # (1 or B, 1, H, m, D)
    return torch.cat((shared.expand(*windows.shape[:3], -1, -1), windows), dim=-2)


def _windows(x: torch.Tensor, num_windows: int) -> torch.Tensor:
    """(B, N, H, D) -> (B, W, H, T, D), contiguous for the batched matmuls, in at least float32."""
    return _wide(x.unflatten(1, (num_windows, -1)).transpose(2, 3)).contiguous()


def _rows_first(windows: torch.Tensor, prompts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tokens (B, W, H, T, D) and prompts (B, H, f, D) -> (B, N + f, H, D) in `dtype`."""
    tokens = windows.transpose(2, 3).flatten(1, 2).to(dtype)
    if not prompts.shape[2]:
        return tokens
    return torch.cat((tokens, prompts.transpose(1, 2).to(dtype)), dim=1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
