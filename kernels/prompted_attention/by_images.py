"""The definition applied to a few images at a time: what `backend="torch"` runs.

The scores of a whole batch would be its largest tensors by far: 2.5 GB for 64 images of 729 tokens with 100
prompts and 16 heads, twice in backward. Those of a few images can fit a CPU's caches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vpt_fast.kernels.prompted_attention import reference
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads, num_rows_of

# Scores, in elements. In float32 4 MiB on a CPU, to fit its caches, and 512 MiB on other devices, to save
# memory.
SCORES_AT_ONCE = {"cpu": 2**20}
SCORES_AT_ONCE_ELSEWHERE = 2**27


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.attention`."""
    batch, num_rows, num_heads, _ = q.shape
    at_once = _images_at_once(q, num_rows_of(prompt_k) + k.shape[1])
    if at_once >= batch:
        return reference.attention(q, k, v, prompt_k, prompt_v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, num_heads, num_rows), dtype=torch.promote_types(q.dtype, torch.float32))
    for images in _shares(batch, at_once):
        out[images], lse[images] = reference.attention(
            q[images], k[images], v[images], _prompts_of(prompt_k, images), _prompts_of(prompt_v, images)
        )
    return out, lse


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
    """`reference.attention_backward`. Gradients of shared prompts are rounded to q's dtype for each part of
    the batch, and the parts are summed in at least float32."""
    wanted = dict(need_q=need_q, need_kv=need_kv, packed=packed)
    batch = q.shape[0]
    at_once = _images_at_once(q, num_rows_of(prompt_k) + num_rows_of(k))
    if at_once >= batch:
        return reference.attention_backward(grad_out, q, k, v, prompt_k, prompt_v, out, lse, **wanted)
    shared = prompt_k is not None and prompt_k.shape[0] == 1
    grads = name_grads(empty_grads(q, k, None if shared else prompt_k, **wanted), **wanted)
    totals: list[torch.Tensor] = []
    for images in _shares(batch, at_once):
        share = reference.attention_backward(
            grad_out[images], q[images], _of(k, images), _of(v, images), _prompts_of(prompt_k, images),
            _prompts_of(prompt_v, images), _of(out, images), lse[images], **wanted,
        )  # fmt: skip
        if shared:
            totals.append(share.prompt_kv)
            share = share._replace(prompt_kv=None)
        for whole, part in zip(grads, share, strict=True):
            if whole is not None:
                whole[images] = part
    if shared:
        total = torch.stack(totals).sum(0, dtype=lse.dtype).to(q.dtype)
        grads = grads._replace(prompt_kv=total)
    return grads


def _images_at_once(q: torch.Tensor, num_keys: int) -> int:
    """Images to process at a time; under a compiler or tracer all, since batches may have other sizes."""
    batch, num_rows, num_heads, _ = q.shape
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return batch
    most = SCORES_AT_ONCE.get(q.device.type, SCORES_AT_ONCE_ELSEWHERE)
    return max(1, most // max(1, num_rows * num_heads * num_keys))


def _shares(batch: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, batch, at_once))


def _of(x: torch.Tensor | None, images: slice) -> torch.Tensor | None:
    return None if x is None else x[images]


def _prompts_of(prompts: torch.Tensor | None, images: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[0] == 1 else prompts[images]
