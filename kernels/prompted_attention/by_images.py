"""The definition applied to a few images at a time: what `backend="torch"` runs.

The scores of a whole batch would be its largest tensors by far: 2.5 GB for 64 images of 729 tokens with 100
prompts and 16 heads, twice in backward. Those of a few images can fit a CPU's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from vpt_fast.kernels.prompted_attention import reference, window_reference
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads, num_rows_of
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias

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
    num_scores = q.shape[1] * (num_rows_of(prompt_k) + k.shape[1])
    return _forward(reference.attention, num_scores, q, k, v, prompt_k, prompt_v)


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    **wanted: bool,
) -> AttentionGrads:
    """`reference.attention_backward`. Gradients of shared prompts are rounded to q's dtype for each part of
    the batch, and the parts are summed in at least float32."""
    num_scores = q.shape[1] * (num_rows_of(prompt_k) + num_rows_of(k))
    run = reference.attention_backward
    return _backward(run, num_scores, grad_out, q, k, v, prompt_k, prompt_v, out, lse, **wanted)


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
    """`window_reference.window_attention`."""
    run = partial(window_reference.window_attention, bias=bias, num_fresh=num_fresh)
    return _forward(run, _window_scores(q, k, prompt_k, bias, num_fresh), q, k, v, prompt_k, prompt_v)


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
    **wanted: bool,
) -> AttentionGrads:
    """`window_reference.window_attention_backward`; prompts' gradients as in `attention_backward`."""
    run = partial(window_reference.window_attention_backward, bias=bias, num_fresh=num_fresh)
    num_scores = _window_scores(q, k, prompt_k, bias, num_fresh)
    return _backward(run, num_scores, grad_out, q, k, v, prompt_k, prompt_v, out, lse, **wanted)


def _forward(
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    num_scores: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """num_scores: of an image and head."""
    batch, at_once = q.shape[0], _images_at_once(q, num_scores)
    if at_once >= batch:
        return run(q, k, v, prompt_k, prompt_v)
    results: tuple[torch.Tensor, ...] = ()
    for images in _shares(batch, at_once):
        parts = run(
            q[images], k[images], v[images], _prompts_of(prompt_k, images), _prompts_of(prompt_v, images)
        )
        results = results or tuple(part.new_empty(batch, *part.shape[1:]) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[images] = part
    out, lse = results
    return out, lse


def _backward(
    run: Callable[..., AttentionGrads],
    num_scores: int,
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
    """num_scores: of an image and head."""
    wanted = dict(need_q=need_q, need_kv=need_kv, packed=packed)
    batch, at_once = q.shape[0], _images_at_once(q, num_scores)
    if at_once >= batch:
        return run(grad_out, q, k, v, prompt_k, prompt_v, out, lse, **wanted)
    shared = prompt_k is not None and prompt_k.shape[0] == 1
    grads = name_grads(empty_grads(q, k, None if shared else prompt_k, **wanted), **wanted)
    totals: list[torch.Tensor] = []
    for images in _shares(batch, at_once):
        share = run(
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


def _window_scores(
    q: torch.Tensor, k: torch.Tensor | None, prompt_k: torch.Tensor | None, bias: WindowBias, num_fresh: int
) -> int:
    """The scores of an image and head, in all windows."""
    window_size, num_tokens = bias.bias.shape[1], q.shape[1] - num_fresh
    num_windows = (num_tokens if k is None else k.shape[1]) // window_size
    num_keys = num_rows_of(prompt_k) + (0 if k is None else window_size)
    return (num_tokens + num_windows * num_fresh) * num_keys


def images_at_once(device: torch.device, num_scores: int) -> int:
    """Images to process at a time, with `num_scores` each."""
    most = SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ELSEWHERE)
    return max(1, most // max(1, num_scores))


def _images_at_once(q: torch.Tensor, num_scores: int) -> int:
    """`images_at_once`; under a compiler or tracer all, since batches may have other sizes. num_scores: of an
    image and head."""
    batch, _, num_heads, _ = q.shape
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return batch
    return images_at_once(q.device, num_heads * num_scores)


def _shares(batch: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, batch, at_once))


def _of(x: torch.Tensor | None, images: slice) -> torch.Tensor | None:
    return None if x is None else x[images]


def _prompts_of(prompts: torch.Tensor | None, images: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[0] == 1 else prompts[images]
