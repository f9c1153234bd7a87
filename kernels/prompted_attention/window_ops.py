"""Prompted attention in windows in Triton, with the signatures and semantics of `window_reference`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import MAX_ALONG_AXIS, Launch, arch_of, cdiv
from vpt_fast.kernels.prompted_attention import WINDOW_HEAD_DIMS
from vpt_fast.kernels.prompted_attention.jit import (
    attention_forward_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    terms_kernel,
)
from vpt_fast.kernels.prompted_attention.ops import (
    Inputs,
    Tiles,
    attention_backward,
    check_lse,
    check_shapes,
    check_tensors,
    empty_per_image,
    empty_terms,
    grad_kv_launch,
    grad_pointers,
    make_build,
    packed_strides,
    strides,
    sum_over_images,
    tail_rows,
)
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads, num_rows_of
from vpt_fast.kernels.prompted_attention.window_reference import BIAS_COLUMNS, WindowBias
from vpt_fast.kernels.torch_op import torch_op

# As in `ops`: no spills and, on sm_90, wgmma. A tile of 64 rows holds a window of 7x7 tokens, three of them
# one of 12x12. The bias takes registers, so forward and dQ have tiles of 32 keys, and forward has a third
# stage on sm_90 alone, and in float32 eight warps for heads of 64, which spill with four on sm_120.


def forward_tiles(dtype: torch.dtype, head_dim: int, arch: int) -> Tiles:
    """Tiles of the forward pass on sm_`arch` (80, 90, 100)."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8 if head_dim > 32 else 4, 1)
    return Tiles(64, 32, 8 if arch == 80 and head_dim > 32 else 4, 3 if arch == 90 else 2)


def grad_q_tiles(dtype: torch.dtype, head_dim: int, arch: int) -> Tiles:
    """Tiles of dQ, and of the terms from the scores, which have the same operands."""
    if dtype == torch.float32:
        return Tiles(16, 32, 4, 1)
    return Tiles(64, 32, 8 if arch == 80 and head_dim > 32 else 4, 3)


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
        return attention_backward(
            grad_out, q, None, None, prompt_k, prompt_v, out, lse, need_q=False, need_kv=False
        )
    grads = _window_attention_backward(
        grad_out, q, k, v, prompt_k, prompt_v, out, lse, *bias, num_fresh, need_q, need_kv, packed
    )
    return name_grads(grads, need_q=need_q, need_kv=need_kv, packed=packed)


class _Sizes(NamedTuple):
    """window_size: tokens of a window, T. num_windows: of an image, W. num_rows: rows of a window that are
    wanted, T or 0, plus f."""

    window_size: int
    num_windows: int
    num_rows: int


def _check(
    num_fresh: int, *, bias: torch.Tensor, regions: torch.Tensor | None, **tensors: torch.Tensor | None
) -> _Sizes:
    q, k = tensors["q"], tensors["k"]
    require_device(**tensors, bias=bias, regions=regions)
    if q.shape[3] not in WINDOW_HEAD_DIMS:
        wanted = ", ".join(map(str, WINDOW_HEAD_DIMS))
        raise ValueError(f"head dim: got {q.shape[3]} in windows, want one of {wanted}")
    check_tensors(**tensors)
    window_size = bias.shape[1]
    columns = cdiv(window_size, BIAS_COLUMNS) * BIAS_COLUMNS
    require_shape((q.shape[2], window_size, columns), bias=bias)
    num_windows = k.shape[1] // window_size
    if k.shape[1] != num_windows * window_size or num_windows == 0:
        raise ValueError(f"k: got {k.shape[1]} rows, want one or more windows of {window_size}")
    if num_windows * q.shape[2] > MAX_ALONG_AXIS:
        raise ValueError(f"k: got {num_windows} windows of {q.shape[2]} heads, want {MAX_ALONG_AXIS} at most")
    num_tokens = q.shape[1] - num_fresh
    if num_tokens not in (0, k.shape[1]):
        raise ValueError(
            f"q: got {q.shape[1]} rows, {num_fresh} of them prompts', want those of all {k.shape[1]} tokens "
            "beside, or none"
        )
    if regions is not None:
        require_dtype((torch.int32,), regions=regions.dtype)
        require_shape((num_windows, window_size), regions=regions)
    return _Sizes(window_size, num_windows, num_tokens // num_windows + num_fresh)


@once_per_layout
def _forward_launch(num_fresh: int, **tensors: torch.Tensor | None) -> tuple[Launch, _Sizes]:
    window_size, num_windows, num_rows = sizes = _check(num_fresh, **tensors)
    inputs = Inputs(**tensors)
    check_shapes(inputs)
    q = inputs.q
    batch, _, num_heads, head_dim = q.shape
    num_prompts = num_rows_of(inputs.prompt_k)
    tiles = forward_tiles(q.dtype, head_dim, arch_of(q.device))
    launch = Launch(
        attention_forward_kernel,
        q.device,
        (cdiv(num_rows, tiles.block_m), num_windows * num_heads, batch),
        *inputs.strides,
        num_heads,
        num_rows,
        num_prompts,
        num_prompts + window_size,
        num_windows,
        num_fresh,
        **inputs.flags,
        **tiles.launch,
    )
    return launch, sizes


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
    launch, sizes = _forward_launch(
        num_fresh, q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v, bias=bias, regions=regions
    )
    batch, _, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, num_heads, sizes.num_windows * sizes.num_rows), dtype=torch.float32)
    fresh_out = _fresh(q, sizes.num_windows, num_fresh)
    launch(*Inputs(q, k, v, prompt_k, prompt_v, bias, regions).pointers, out, lse, fresh_out)
    if num_fresh:
        out[:, -num_fresh:] = fresh_out.mean(1)
    return out, lse


@torch.library.register_fake("vpt_fast::window_attention")
def _(q, k, v, prompt_k, prompt_v, bias, regions, num_fresh):
    num_windows = k.shape[1] // bias.shape[1]
    num_statistics = q.shape[1] + (num_windows - 1) * num_fresh
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], num_statistics), dtype=torch.float32)


class _BackwardLaunches(NamedTuple):
    """The launches that are needed, in this order; the prompts' gradients have their own
    (`_prompts_launch`)."""

    sizes: _Sizes
    terms: Launch | None
    grad_q: Launch | None
    grad_kv: Launch | None


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
    sizes = _check(num_fresh, grad_out=grad_out, **tensors, out=out)
    window_size, num_windows, num_rows = sizes
    inputs = Inputs(**tensors)
    check_shapes(inputs, grad_out=grad_out, out=out)
    q, flags = inputs.q, inputs.flags
    batch, rows, num_heads, head_dim = q.shape
    num_prompts = num_rows_of(inputs.prompt_k)
    sequences = (num_windows * num_heads, batch)
    check_lse(q, lse, num_windows * num_rows)
    arch = arch_of(q.device)
    all_strides = (*strides(grad_out), *inputs.strides, *strides(out), lse.stride(0), lse.stride(1))
    numbers = (num_heads, num_rows, num_prompts, num_prompts + window_size, num_windows, num_fresh)

    terms = grad_q = grad_kv = None
    if not (out is not None and need_q):
        tiles = grad_q_tiles(q.dtype, head_dim, arch)
        terms = Launch(
            terms_kernel, q.device, (cdiv(num_rows, tiles.block_m), *sequences), *all_strides, *numbers,
            **flags, HAS_OUT=out is not None, **tiles.launch,
        )  # fmt: skip
    if need_q:
        tiles = grad_q_tiles(q.dtype, head_dim, arch)
        grad_strides = packed_strides(rows, 3 if packed else 1, num_heads, head_dim)
        grad_q = Launch(
            grad_q_kernel, q.device, (cdiv(num_rows, tiles.block_m), *sequences), *all_strides, *grad_strides,
            *numbers, **flags, HAS_OUT=out is not None, **tiles.launch,
        )  # fmt: skip
    if need_kv:
        alone = inputs._replace(prompt_k=None, prompt_v=None)  # a window's tokens, without prompts
        tiles = grad_kv_tiles(q.dtype, arch)
        grad_strides = packed_strides(num_rows_of(inputs.k), 3 if packed else 2, num_heads, head_dim)
        grad_kv = Launch(
            grad_kv_kernel, q.device, (cdiv(window_size, tiles.block_n), *sequences), *strides(grad_out),
            *alone.strides, *grad_strides, num_heads, num_rows, 0, window_size, num_windows,
            num_fresh, **alone.flags, IMAGE=True, TAIL=tail_rows(tiles, head_dim, num_rows),
            **tiles.launch,
        )  # fmt: skip
    return _BackwardLaunches(sizes, terms, grad_q, grad_kv)


@once_per_layout
def _prompts_launch(*, grad_out: torch.Tensor, **tensors: torch.Tensor) -> Launch:
    """Prompts have no bias, so for their keys all windows are one sequence of rows."""
    return grad_kv_launch(grad_out, 0, Inputs(k=None, v=None, **tensors))


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
    (_, num_windows, _), *launches = _backward_launches(
        num_fresh, need_q, need_kv, packed, grad_out=grad_out, out=out, lse=lse, q=q, k=k, v=v,
        prompt_k=prompt_k, prompt_v=prompt_v, bias=bias, regions=regions,
    )  # fmt: skip
    launch_terms, launch_grad_q, launch_grad_kv = launches
    results = empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)
    grads = name_grads(results, need_q=need_q, need_kv=need_kv, packed=packed)
    grad_q, grad_k, grad_v = grad_pointers(q, grads)
    terms = empty_terms(lse)
    inputs = Inputs(q, k, v, prompt_k, prompt_v, bias, regions)
    out = q if out is None else out
    if launch_terms is not None:
        launch_terms(grad_out, *inputs.pointers, out, lse, terms)
    if launch_grad_q is not None:
        grad_fresh = _fresh(q, num_windows, num_fresh)
        launch_grad_q(grad_out, *inputs.pointers, out, lse, terms, grad_q, grad_fresh)
        if num_fresh:
            grad_q[:, -num_fresh:] = grad_fresh.sum(1)
    if launch_grad_kv is not None:
        alone = inputs._replace(prompt_k=None, prompt_v=None)
        launch_grad_kv(grad_out, *alone.pointers, terms, grad_k, grad_v, q)
    if prompt_k is not None:
        if num_fresh:
            terms = _over_windows(terms, num_windows, num_fresh)
        launch = _prompts_launch(grad_out=grad_out, q=q, prompt_k=prompt_k, prompt_v=prompt_v)
        per_image = empty_per_image(q, grads.prompt_kv)
        prompts = Inputs(q, None, None, prompt_k, prompt_v)
        launch(grad_out, *prompts.pointers, terms, q, q, per_image)
        sum_over_images(per_image, grads.prompt_kv)
    return results


@torch.library.register_fake("vpt_fast::window_attention_backward")
def _(grad_out, q, k, v, prompt_k, prompt_v, out, lse, bias, regions, num_fresh, need_q, need_kv, packed):
    return empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)


def _as_read(bias: torch.Tensor, regions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bias and regions as kernels read them; what a block holds in float32 is not copied."""
    return bias.float().contiguous(), None if regions is None else regions.contiguous()


def _fresh(q: torch.Tensor, num_windows: int, num_fresh: int) -> torch.Tensor:
    """An empty (B, W, f, H, D) in float32 for the prompts' rows of every window."""
    shape = (q.shape[0], num_windows, num_fresh, *q.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


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
    """The kernels of windows, shifted and with prompts, in the configurations that these launchers choose on
    sm_`arch` (80, 90, 100). float16 differs from bfloat16 only in its matmuls' type, and float32's smaller
    head dim from the larger in less work."""
    requests = [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float32, 64)]
    return [build for request in requests for build in _builds_of(*request, arch)]


def _builds_of(dtype: torch.dtype, head_dim: int, arch: int) -> list[Build]:
    forward, grad_q = forward_tiles(dtype, head_dim, arch), grad_q_tiles(dtype, head_dim, arch)
    grad_kv = grad_kv_tiles(dtype, arch)
    tail = tail_rows(grad_kv, head_dim, 144)
    return [
        make_build(kernel, dtype, head_dim, tiles, variant, WINDOWS=True, SHIFTED=True, **flags)
        for kernel, tiles, variant, flags in (
            (attention_forward_kernel, forward, "windows", {}),
            (terms_kernel, grad_q, "windows from O", {"HAS_OUT": True}),
            (terms_kernel, grad_q, "windows from scores", {"HAS_OUT": False}),
            (grad_q_kernel, grad_q, "windows with O", {"HAS_OUT": True}),
            (grad_q_kernel, grad_q, "windows with terms", {"HAS_OUT": False}),
            (grad_kv_kernel, grad_kv, "windows", {"PROMPTS": False, "IMAGE": True, "TAIL": 0}),
            (
                grad_kv_kernel,
                grad_kv,
                f"windows and {tail} rows",
                {"PROMPTS": False, "IMAGE": True, "TAIL": tail},
            ),
        )
    ]
