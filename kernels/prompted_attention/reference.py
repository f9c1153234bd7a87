"""Prompted attention, forward and backward, in plain PyTorch: the definition.

With K = [K_P; K_I] and V = [V_P; V_I], prompt rows before image rows, per image and head:

    S = Q Kᵀ         (the softmax scale is folded into Q's frozen projection)
    P = softmax(S)   lse = log Σ exp(S)
    O = P V

All sums are computed in at least float32, whatever the tensors' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and lse for the query rows `q`.

    Args:
        q: (B, R, H, D), the rows whose output is wanted.
        k, v: (B, N, H, D), keys and values of the image-side tokens.
        prompt_k, prompt_v: (1 or B, m, H, D), or None where the block has no prompts.

    Returns:
        O (B, R, H, D) in q's dtype, and lse (B, H, R) in at least float32.
    """
    queries, keys, values = _heads_first(q), _extend(prompt_k, k), _extend(prompt_v, v)
    scores = torch.matmul(queries, keys.transpose(-1, -2))  # (B, H, R, m + N)
    row_max = scores.amax(-1, keepdim=True)
    weights = scores.sub_(row_max).exp_()  # softmax without its denominator
    row_sum = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, values).div_(row_sum)  # (B, H, R, D)
    lse = (row_max + row_sum.log()).squeeze(-1)
    return out.transpose(1, 2).to(q.dtype), lse


def probabilities(
    q: torch.Tensor, k: torch.Tensor, prompt_k: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """P (B, H, R, m + N), in at least float32, of `attention` with the same arguments; bias: (H, N, N or
    more), for the scores of all N tokens, which R then are, or None."""
    scores = torch.matmul(_heads_first(q), _extend(prompt_k, k).transpose(-1, -2))
    if bias is not None:
        scores[..., num_rows_of(prompt_k) :] += bias[..., : k.shape[1]]
    return scores.softmax(-1)


def num_rows_of(x: torch.Tensor | None) -> int:
    """Rows of (B, rows, H, D); 0 of a tensor that is absent."""
    return 0 if x is None else x.shape[1]


class AttentionGrads(NamedTuple):
    """Gradients of `attention`'s inputs, in their dtype; None where one is not wanted."""

    qkv: torch.Tensor | None  # (B, N, 3, H, D), or else
    q: torch.Tensor | None  # (B, R, H, D)
    kv: torch.Tensor | None  # (B, N, 2, H, D)
    prompt_kv: torch.Tensor | None  # (1 or B, m, 2, H, D)


def empty_grads(
    q: torch.Tensor,
    k: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    *,
    need_q: bool,
    need_kv: bool,
    packed: bool,
) -> list[torch.Tensor]:
    """Empty tensors for the gradients that are wanted, in the order of `AttentionGrads`, as operators
    return."""
    batch, num_rows, *heads = q.shape
    shapes: list[tuple[int, ...]] = []
    if packed:
        shapes.append((batch, num_rows, 3, *heads))
    elif need_q:
        shapes.append(q.shape)
    if need_kv and not packed:
        assert k is not None
        shapes.append((batch, k.shape[1], 2, *heads))
    if prompt_k is not None:
        shapes.append((prompt_k.shape[0], prompt_k.shape[1], 2, *heads))
    return [q.new_empty(shape) for shape in shapes]


def name_grads(grads: list[torch.Tensor], *, need_q: bool, need_kv: bool, packed: bool) -> AttentionGrads:
    """These gradients by name."""
    left = iter(grads)
    return AttentionGrads(
        qkv=next(left) if packed else None,
        q=next(left) if need_q and not packed else None,
        kv=next(left) if need_kv and not packed else None,
        prompt_kv=next(left, None),
    )


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    need_q: bool,
    need_kv: bool,
    packed: bool = False,
) -> AttentionGrads:
    """Gradients of `attention`, only those that are wanted.

    With δ = rowsum(dO ∘ O):  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - δ),  dQ = dS K,  dK = dSᵀ Q.
    Prompt gradients are always computed if there are prompts; those of shared prompts (batch dimension 1)
    are summed over the batch. With neither `need_q` nor `need_kv` (the first prompted block) only the
    prompts' columns of S are computed, and `k` and `v` may be None.

    Args:
        grad_out: dO (B, R, H, D).
        q, k, v, prompt_k, prompt_v: as given to `attention`.
        out, lse: as it returned them. Without `out`, δ is computed from the scores (`delta_of_scores`), which
        needs all keys.
        need_q: compute dQ.
        need_kv: compute dK and dV of the image-side tokens.
        packed: return dQ, dK and dV as one tensor; requires `need_q`, `need_kv` and R = N.
    """
    m = num_rows_of(prompt_k)
    queries, grad = _heads_first(q), _heads_first(grad_out)
    all_keys = need_q or need_kv or out is None
    if all_keys:
        keys, values = _extend(prompt_k, k), _extend(prompt_v, v)
    else:  # only the prompts' columns: the rows' lse already holds the sum over all keys
        batch = q.shape[0]
        keys = _heads_first(prompt_k).expand(batch, -1, -1, -1)
        values = _heads_first(prompt_v).expand(batch, -1, -1, -1)

    probabilities = torch.matmul(queries, keys.transpose(-1, -2)).sub_(lse.unsqueeze(-1)).exp_()
    grad_scores = torch.matmul(grad, values.transpose(-1, -2))
    if out is None:
        delta = delta_of_scores(probabilities, grad_scores)  # (B, H, R, 1)
    else:
        delta = (grad * _heads_first(out)).sum(-1, keepdim=True)
    grad_scores.sub_(delta).mul_(probabilities)

    grad_q = torch.matmul(grad_scores, keys) if need_q else None  # (B, H, R, D)
    first, last = (0, keys.shape[2]) if need_kv else (0, m)  # columns whose gradient is wanted
    grad_k = torch.matmul(grad_scores[..., first:last].transpose(-1, -2), queries)
    grad_v = torch.matmul(probabilities[..., first:last].transpose(-1, -2), grad)

    grad_prompt_kv = None
    if prompt_k is not None:
        parts = [g[:, :, :m] for g in (grad_k, grad_v)]
        if prompt_k.shape[0] == 1:
            parts = [g.sum(0, keepdim=True) for g in parts]
        grad_prompt_kv = _rows_first(parts, q.dtype)
    image_kv = [g[:, :, m:] for g in (grad_k, grad_v)]
    if packed:
        return AttentionGrads(_rows_first([grad_q, *image_kv], q.dtype), None, None, grad_prompt_kv)
    return AttentionGrads(
        qkv=None,
        q=_rows_first([grad_q], q.dtype).squeeze(2) if need_q else None,
        kv=_rows_first(image_kv, q.dtype) if need_kv else None,
        prompt_kv=grad_prompt_kv,
    )


def delta_of_scores(probabilities: torch.Tensor, grad_probabilities: torch.Tensor) -> torch.Tensor:
    """δ = rowsum(P ∘ dP) / rowsum(P), (.., rows, keys) -> (.., rows, 1), with dP = dO Vᵀ.

    The row sum of P = exp(S - lse) is 1 but for the rounding of lse: at scores of 1000 in float32, 1e-4. In a
    row with nearly all of its weight on one key, dP - δ is nearly zero there, and without the division it
    would be off by that part of dP.
    """
    weighted = (probabilities * grad_probabilities).sum(-1, keepdim=True)
    return weighted / probabilities.sum(-1, keepdim=True)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D) -> (B, H, N, D), contiguous for the batched matmuls, in at least float32."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _rows_first(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """n times (B, H, N, D) -> (B, N, n, H, D) in `dtype`."""
    return torch.stack([x.transpose(1, 2).to(dtype) for x in parts], dim=2)


def _extend(prompts: torch.Tensor | None, x: torch.Tensor | None) -> torch.Tensor:
    """Prompt rows before image rows: (1 or B, m, H, D) and (B, N, H, D) -> (B, H, m + N, D)."""
    assert x is not None
    if prompts is None:
        return _heads_first(x)
    # Joined and not written into an empty tensor, which ONNX would do element by element (ScatterND).
    joined = torch.cat((prompts.transpose(1, 2).expand(x.shape[0], -1, -1, -1), x.transpose(1, 2)), dim=2)
    return joined.to(torch.promote_types(x.dtype, torch.float32))
