"""Prompted attention in windows in Triton, with the signatures and semantics of `window_reference`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import MAX_ALONG_AXIS, Launch, arch_of, cdiv
from vpt_fast.kernels.prompted_attention import WINDOW_HEAD_DIMS, ops
from vpt_fast.kernels.prompted_attention.jit import (
    attention_forward_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    terms_kernel,
)
from vpt_fast.kernels.prompted_attention.ops import Inputs, Tiles
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads
from vpt_fast.kernels.prompted_attention.window_reference import BIAS_COLUMNS, WindowBias
from vpt_fast.kernels.torch_op import torch_op

# As in `ops`: no spills and, on sm_90, wgmma. A tile of 64 rows holds a window of 7x7 tokens, three of them
# one of 12x12. The bias takes registers, so forward and dQ have tiles of 32 keys, and forward has a third
# stage on sm_90 alone, and in float32 eight warps for heads of 64, which spill with four on sm_120.


def forward_tiles(dtype: torch.dtype, head_dim: int, arch: int) -> Tiles:
    """Tiles of the forward pass on sm_`arch` (80, 90, 100)."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8 if head_dim > 32 else 4, 1)
    num_warps, num_stages = 8 if arch == 80 and head_dim > 32 else 4, 3 if arch == 90 else 2
    return Tiles(64, 32, num_warps, num_stages, _max_registers(head_dim, arch))


def grad_q_tiles(dtype: torch.dtype, head_dim: int, arch: int) -> Tiles:
    """Tiles of dQ, and of the terms from the scores, which have the same operands."""
    if dtype == torch.float32:
        return Tiles(16, 32, 4, 1)
    return Tiles(64, 32, 8 if arch == 80 and head_dim > 32 else 4, 3, _max_registers(head_dim, arch))


def _max_registers(head_dim: int, arch: int) -> int | None:
    """On sm_100 ptxas spills some registers of heads of 32 to fit one more program; with a maximum, though it
    is higher than that, it does not."""
    return 128 if arch == 100 and head_dim == 32 else None


def grad_kv_tiles(dtype: torch.dtype, arch: int) -> Tiles:
    """Tiles of dK and dV, in whose matmuls the keys are the first dimension."""
    if dtype == torch.float32:
        return Tiles(16, 32, 4, 1)
    return Tiles(32, 32 if arch == 80 else 64, 4, 3)


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
    """See `window_reference.window_attention`. float32, bfloat16 or float16; head dims in
    `WINDOW_HEAD_DIMS`; lse is float32.

    Raises:
        ValueError: a tensor's dtype, device, head dim, layout or number of rows is not supported.
    """
    return _window_attention(q, k, v, prompt_k, prompt_v, *bias, num_fresh)


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
    """See `window_reference.window_attention_backward`. Bitwise reproducible.

    Raises:
        ValueError: as `window_attention`; or the tokens' keys are needed and not given.
    """
    if k is None and (need_q or need_kv or out is None or num_fresh):
        raise ValueError("k: got None, and the gradients that are wanted need the tokens' keys")
    if packed and not (need_q and need_kv and num_fresh == 0 and q.shape[1] == k.shape[1]):
        raise ValueError("packed: wanted without all of dQ, dK and dV, or with other queries than tokens'")
    if not (need_q or need_kv or num_fresh) and out is not None:
        # Prompts have no bias, so for their keys all windows are one sequence of rows.
        return ops.attention_backward(
            grad_out, q, None, None, prompt_k, prompt_v, out, lse, need_q=False, need_kv=False
        )
    grads = _window_attention_backward(
        grad_out, q, k, v, prompt_k, prompt_v, out, lse, *bias, num_fresh, need_q, need_kv, packed
    )
    return name_grads(grads, need_q=need_q, need_kv=need_kv, packed=packed)


def _check(
    num_fresh: int, *, bias: torch.Tensor, regions: torch.Tensor | None, **tensors: torch.Tensor | None
) -> None:
    q, k = tensors["q"], tensors["k"]
    if q.shape[3] not in WINDOW_HEAD_DIMS:
        wanted = ", ".join(map(str, WINDOW_HEAD_DIMS))
        raise ValueError(f"head dim: got {q.shape[3]} in windows, want one of {wanted}")
    ops.check_tensors(**tensors)
    require_device(q=q, bias=bias, regions=regions)
    window_size = bias.shape[1]
    columns = cdiv(window_size, BIAS_COLUMNS) * BIAS_COLUMNS
    require_shape((q.shape[2], window_size, columns), bias=bias)
    num_windows = k.shape[1] // window_size
    if k.shape[1] != num_windows * window_size or num_windows == 0:
        raise ValueError(f"k: got {k.shape[1]} rows, want one or more windows of {window_size}")
    if num_windows * q.shape[2] > MAX_ALONG_AXIS:
        raise ValueError(f"k: got {num_windows} windows of {q.shape[2]} heads, want {MAX_ALONG_AXIS} at most")
    if q.shape[1] - num_fresh not in (0, k.shape[1]):
        raise ValueError(
            f"q: got {q.shape[1]} rows, {num_fresh} of them prompts', want those of all {k.shape[1]} tokens "
            "beside, or none"
        )
    if regions is not None:
        require_dtype((torch.int32,), regions=regions.dtype)
        require_shape((num_windows, window_size), regions=regions)


@once_per_layout
def _forward_launch(num_fresh: int, **tensors: torch.Tensor | None) -> Launch:
    _check(num_fresh, **tensors)
    inputs = Inputs(**tensors, num_fresh=num_fresh)
    ops.check_shapes(inputs)
    return ops.forward_launch(
        inputs, forward_tiles(inputs.q.dtype, inputs.q.shape[3], arch_of(inputs.q.device))
    )


@torch_op("window_attention")
def _window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    bias: torch.Tensor,
    regions: torch.Tensor | None,
    num_fresh: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    bias, regions = _as_read(bias, regions)
    launch = _forward_launch(
        num_fresh, q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v, bias=bias, regions=regions
    )
    out, lse = _empty_forward(q, k, bias, num_fresh)
    fresh_out = _empty_fresh(q, k, bias, num_fresh)
    launch(*Inputs(q, k, v, prompt_k, prompt_v, bias, regions).pointers, out, lse, fresh_out)
    if num_fresh:
        out[:, -num_fresh:] = fresh_out.mean(1)
    return out, lse


@torch.library.register_fake("vpt_fast::window_attention")
def _(q, k, v, prompt_k, prompt_v, bias, regions, num_fresh):
    return _empty_forward(q, k, bias, num_fresh)


def _empty_forward(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, num_fresh: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_statistics = q.shape[1] + (_num_windows(k, bias) - 1) * num_fresh
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], num_statistics), dtype=torch.float32)


def _empty_fresh(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, num_fresh: int) -> torch.Tensor:
    """An empty (B, W, f, H, D) in float32 for the prompts' rows of every window."""
    shape = (q.shape[0], _num_windows(k, bias), num_fresh, *q.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _num_windows(k: torch.Tensor, bias: torch.Tensor) -> int:
    return k.shape[1] // bias.shape[1]


class _BackwardLaunches(NamedTuple):
    """The launches that are needed, in this order. Prompts have no bias, so to their keys all windows are one
    sequence of rows: they have a launch of their own."""

    terms: Launch | None
    grad_q: Launch | None
    grad_kv: Launch | None
    grad_prompts: Launch | None


@once_per_layout
def _backward_launches(
    num_fresh: int,
    need_q: bool,
    need_kv: bool,
    packed: bool,
    *,
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    **tensors: torch.Tensor | None,
) -> _BackwardLaunches:
    _check(num_fresh, grad_out=grad_out, **tensors, out=out)
    inputs = Inputs(**tensors, num_fresh=num_fresh)
    ops.check_shapes(inputs, grad_out=grad_out, out=out)
    q, sizes = inputs.q, inputs.sizes
    _, num_rows, _, head_dim = q.shape
    ops.check_lse(q, lse, sizes.num_windows * sizes.num_rows)
    arch = arch_of(q.device)
    tiles = grad_q_tiles(q.dtype, head_dim, arch)
    terms, grad_q = ops.rows_launches(inputs, grad_out, out, lse, need_q, packed, tiles, tiles)
    grad_kv = grad_prompts = None
    if need_kv:
        grad_kv = ops.grad_kv_launch(_tokens_of(inputs), grad_out, packed, grad_kv_tiles(q.dtype, arch))
    if inputs.prompt_k is not None:
        tiles = ops.grad_kv_tiles(q.dtype, head_dim, num_rows, arch)
        grad_prompts = ops.grad_kv_launch(_prompts_of(inputs), grad_out, False, tiles)
    return _BackwardLaunches(terms, grad_q, grad_kv, grad_prompts)


def _tokens_of(inputs: Inputs) -> Inputs:
    """With the tokens' keys alone."""
    return inputs._replace(prompt_k=None, prompt_v=None)


def _prompts_of(inputs: Inputs) -> Inputs:
    """With the prompts' keys alone, and all windows as one sequence."""
    return Inputs(inputs.q, None, None, inputs.prompt_k, inputs.prompt_v)


@torch_op("window_attention_backward")
def _window_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    bias: torch.Tensor,
    regions: torch.Tensor | None,
    num_fresh: int,
    need_q: bool,
    need_kv: bool,
    packed: bool,
) -> list[torch.Tensor]:
    bias, regions = _as_read(bias, regions)
    # Only the mean of a prompt's outputs is known, and each window's δ needs that window's own output.
    out = None if num_fresh else out
    launches = _backward_launches(
        num_fresh, need_q, need_kv, packed, grad_out=grad_out, out=out, lse=lse, q=q, k=k, v=v,
        prompt_k=prompt_k, prompt_v=prompt_v, bias=bias, regions=regions,
    )  # fmt: skip
    results = empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)
    grads = name_grads(results, need_q=need_q, need_kv=need_kv, packed=packed)
    grad_q, grad_k, grad_v = ops.grad_pointers(q, grads)
    terms = ops.empty_terms(lse)
    inputs = Inputs(q, k, v, prompt_k, prompt_v, bias, regions)
    out = q if out is None else out
    if launches.terms is not None:
        launches.terms(grad_out, *inputs.pointers, out, lse, terms)
    if launches.grad_q is not None:
        grad_fresh = _empty_fresh(q, k, bias, num_fresh)
        launches.grad_q(grad_out, *inputs.pointers, out, lse, terms, grad_q, grad_fresh)
        if num_fresh:
            grad_q[:, -num_fresh:] = grad_fresh.sum(1)
    if launches.grad_kv is not None:
        launches.grad_kv(grad_out, *_tokens_of(inputs).pointers, terms, grad_k, grad_v, q)
    if launches.grad_prompts is not None:
        if num_fresh:
            terms = _over_windows(terms, _num_windows(k, bias), num_fresh)
        per_image = ops.empty_per_image(q, grads.prompt_kv)
        launches.grad_prompts(grad_out, *_prompts_of(inputs).pointers, terms, q, q, per_image)
        ops.sum_over_images(per_image, grads.prompt_kv)
    return results


@torch.library.register_fake("vpt_fast::window_attention_backward")
def _(grad_out, q, k, v, prompt_k, prompt_v, out, lse, bias, regions, num_fresh, need_q, need_kv, packed):
    return empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)


def _as_read(bias: torch.Tensor, regions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bias and regions as kernels read them; what a block holds in float32 is not copied."""
    return bias.float().contiguous(), None if regions is None else regions.contiguous()


def _over_windows(terms: torch.Tensor, num_windows: int, num_fresh: int) -> torch.Tensor:
    """The rows' terms as if prompts had one row for all windows, (B, H, 2, N + f).

    Between prompts, S is the same in every window w. With t_w = lse_w + log W, the weights of the mean output
    are

        Σ exp(S - t_w) = exp(S - l),  l = -log Σ exp(-t_w),

    and the sum of the dS_w is exp(S - l) ∘ (dO Vᵀ - Σ δ_w softmax(-t)_w).
    """
    num_tokens = terms.shape[3] - num_windows * num_fresh
    in_windows = terms[..., num_tokens:].unflatten(3, (num_windows, num_fresh))  # (B, H, 2, W, f)
    exponents, deltas = in_windows.unbind(2)
    t = exponents * math.log(2)
    exponent = torch.logsumexp(-t, dim=2) / -math.log(2)
    delta = (deltas * torch.softmax(-t, dim=2)).sum(2)
    return torch.cat((terms[..., :num_tokens], torch.stack((exponent, delta), dim=2)), dim=3)


def builds(arch: int) -> list[Build]:
    """The kernels of windows with prompts, in the configurations that these launchers choose on sm_`arch`
    (80, 90, 100). float16 differs from bfloat16 only in its matmuls' type, and float32's smaller head dim
    from the larger in less work."""
    requests = [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float32, 64)]
    return [
        build
        for request in requests
        for is_shifted in (True, False)
        for build in _builds_of(*request, arch, is_shifted)
    ]


def _builds_of(dtype: torch.dtype, head_dim: int, arch: int, is_shifted: bool) -> list[Build]:
    forward, grad_q = forward_tiles(dtype, head_dim, arch), grad_q_tiles(dtype, head_dim, arch)
    grad_kv = grad_kv_tiles(dtype, arch)
    tail = ops.tail_rows(grad_kv, head_dim, 144)
    windows = "shifted windows" if is_shifted else "windows"
    return [
        ops.make_build(kernel, dtype, head_dim, tiles, variant, WINDOWS=True, SHIFTED=is_shifted, **flags)
        for kernel, tiles, variant, flags in (
            (attention_forward_kernel, forward, windows, {}),
            (terms_kernel, grad_q, f"{windows} from O", {"HAS_OUT": True}),
            (terms_kernel, grad_q, f"{windows} from scores", {"HAS_OUT": False}),
            (grad_q_kernel, grad_q, f"{windows} with O", {"HAS_OUT": True}),
            (grad_q_kernel, grad_q, f"{windows} with terms", {"HAS_OUT": False}),
            (grad_kv_kernel, grad_kv, windows, {"PROMPTS": False, "IMAGE": True, "TAIL": 0}),
            (
                grad_kv_kernel,
                grad_kv,
                f"{windows} and {tail} rows",
                {"PROMPTS": False, "IMAGE": True, "TAIL": tail},
            ),
        )
    ]
