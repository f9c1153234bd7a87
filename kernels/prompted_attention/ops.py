"""Prompted attention in Triton, with the signatures and semantics of `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import DTYPES, MAX_ALONG_AXIS, TYPE_NAMES, Launch, arch_of, cdiv
from vpt_fast.kernels.prompted_attention import HEAD_DIMS
from vpt_fast.kernels.prompted_attention.jit import (
    SIZES,
    attention_forward_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    terms_kernel,
)
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads, num_rows_of
from vpt_fast.kernels.rows import require_contiguous_rows
from vpt_fast.kernels.torch_op import torch_op


class Tiles(NamedTuple):
    """BLOCK_M query rows by BLOCK_N keys, and how they are launched.

    max_registers: per thread; None leaves the number to ptxas.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


# The tables below were chosen by what Triton 3.6, 3.8 and 3.9 compile: no spills; wgmma on sm_90; two or more
# programs per SM, so that one works while another waits; few instructions per score; and three stages, since
# with two the copy of a tile is waited for as soon as it is issued. In the last block few rows are read (CLS
# alone): a tile of 16 wastes least. On sm_90 those of ViT-B and ViT-H (D 64 and 80, m = 100, bfloat16) were
# then timed on an H200 beside all candidates of benchmarks/tune.py: none was worth a change. Those of sm_80
# and sm_100 have not been timed. Some head dims have a limit on registers that is higher than what
# ptxas takes by itself: to fit one more program on an SM, it would spill.


def forward_tiles(dtype: torch.dtype, head_dim: int, num_rows: int, arch: int) -> Tiles:
    """Tiles of the forward pass on sm_`arch` (80, 90, 100)."""
    if dtype == torch.float32:  # no tensor cores: the operands of every matmul are in registers
        limit = 128 if head_dim in (48, 72, 80, 88) else None
        if head_dim > 64:
            return Tiles(16, 32, 8 if head_dim > 96 else 4, 1, limit)
        return Tiles(16, 16, 4, 1, limit) if num_rows <= 16 else Tiles(32, 32, 8, 1, limit)
    if num_rows <= 16:
        return Tiles(16, 64, 4, 3)
    if arch == 80 and head_dim > 96:
        return Tiles(64, 32, 4, 3)
    widest_in_128_rows = {80: 32, 90: 64, 100: 128}[arch]
    if (num_rows <= 64 and head_dim <= 64) or head_dim > widest_in_128_rows:
        return Tiles(64, 64, 4, 3)
    # Left to itself, on sm_90 ptxas takes up to five more, which leaves no room for a second program; and on
    # sm_103 for 16 it takes 80, and spills.
    return Tiles(128, 64, 8, 3, 128 if arch == 90 or (arch == 100 and head_dim == 16) else None)


def grad_q_tiles(dtype: torch.dtype, head_dim: int, num_rows: int, arch: int) -> Tiles:
    """Tiles of dQ, and of the terms from the scores, which have the same operands."""
    if dtype == torch.float32:
        limit = {48: 176, 88: 128}.get(head_dim)
        return Tiles(16, 16, 8, 1, limit) if head_dim > 64 else Tiles(16, 32, 4, 1, limit)
    if num_rows <= 16:
        return Tiles(16, 32, 4, 3, 80 if arch == 80 and head_dim in (104, 112) else None)
    if arch == 80:
        return Tiles(64, 32, 4, 3)
    if head_dim > 64:
        # On sm_90 a third stage would take the shared memory of a third program.
        if arch == 90:
            return Tiles(64, 64, 4, 2)
        return Tiles(128, 32, 8, 3, 128 if head_dim == 80 else None)
    return Tiles(64, 64, 4, 3) if num_rows <= 64 else Tiles(128, 64, 8, 3)


def grad_kv_tiles(dtype: torch.dtype, head_dim: int, num_rows: int, arch: int) -> Tiles:
    """Tiles of dK and dV, in whose matmuls the keys are the first dimension."""
    if dtype == torch.float32:
        limit = 128 if head_dim in (88, 128) else None
        return Tiles(16, 32, 8 if head_dim > 64 else 4, 1, limit)
    if num_rows <= 16:
        limit = 128 if arch == 100 and head_dim == 48 else None  # as for more rows
        return Tiles(16, 64, 8 if head_dim > 64 and arch != 90 else 4, 1, limit)
    if arch == 80:
        if head_dim <= 64:
            return Tiles(64, 64 if head_dim <= 32 else 32, 4, 3)
        if head_dim <= 80:
            return Tiles(16, 64, 4, 3)
        # With 64 keys, 88 and 96 need a limit on registers on sm_80, with which they spill on sm_86.
        return Tiles(16 if head_dim <= 96 else 32, 32, 4, 3)
    if arch == 90:
        # Left to itself, ptxas takes 255 registers for 104, and under Triton 3.6 spills all the same.
        return Tiles(64 if 16 < head_dim <= 80 else 32, 64, 4, 3, 248 if head_dim > 96 else None)
    # Left to itself, ptxas takes 80 registers for 48 and 64, to which Triton 3.6 has it spill.
    return Tiles(64, 64, 8 if head_dim > 32 else 4, 3, 128 if head_dim in (48, 64) else None)


_TAIL = 16  # rows of the smallest tile that tensor cores take


def tail_rows(tiles: Tiles, head_dim: int, num_rows: int) -> int:
    """Rows of a smaller tile for what is left after whole tiles of `block_m`, such as CLS beside n x n
    patches. 0 if nothing is left, or too much for it, or if ptxas would not have the registers for both."""
    if head_dim > 96 and tiles.block_m < 64:  # under Triton 3.9, both spill
        return 0
    return _TAIL if 0 < num_rows % tiles.block_m <= _TAIL < tiles.block_m else 0


TERMS_TILES = Tiles(32, 64, 4, 1)  # of δ from O: one pass over dO and O, without matmuls


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attention`. float32, bfloat16 or float16; head dims in `HEAD_DIMS`; lse is float32.

    Raises:
        ValueError: a tensor's dtype, device, head dim or layout is not supported.
    """
    return _attention(q, k, v, prompt_k, prompt_v)


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
    """See `reference.attention_backward`. Bitwise reproducible.

    Raises:
        ValueError: as `attention`; or the image's keys are needed and not given.
    """
    if k is None and (need_q or need_kv or out is None):
        raise ValueError("k: got None, and the gradients that are wanted need the image's keys")
    if packed and not (need_q and need_kv and q.shape[1] == k.shape[1]):
        raise ValueError("packed: wanted without all of dQ, dK and dV, or with fewer queries than keys")
    if prompt_k is None and not (need_q or need_kv):
        return AttentionGrads(None, None, None, None)
    grads = _attention_backward(grad_out, q, k, v, prompt_k, prompt_v, out, lse, need_q, need_kv, packed)
    return name_grads(grads, need_q=need_q, need_kv=need_kv, packed=packed)


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Called inside the operators, where tensors have addresses even if the caller is being compiled."""
    require_device(**tensors)
    q = tensors["q"]
    require_dtype(DTYPES, q=q.dtype)
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"head dim: got {q.shape[3]}, want one of {', '.join(map(str, HEAD_DIMS))}")
    if q.shape[0] > MAX_ALONG_AXIS:
        raise ValueError(f"q: got {q.shape[0]} images, want {MAX_ALONG_AXIS} at most")
    for name, t in tensors.items():
        if t is None:
            continue
        require_dtype((q.dtype,), **{name: t.dtype})
        if t.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name}: got (heads, head dim) {tuple(t.shape[2:])}, want {tuple(q.shape[2:])}")
        require_contiguous_rows(**{name: t})
        if sum((n - 1) * stride for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(f"{name}: got strides {t.stride()}, want rows of an image within 2^31 elements")
        in_bytes = [
            stride * t.element_size() for n, stride in zip(t.shape, t.stride()[:3], strict=False) if n > 1
        ]
        # `jit.row_pointers` promises it to the compiler.
        if t.data_ptr() % 16 or any(stride % 16 for stride in in_bytes):
            raise ValueError(
                f"{name}: got strides {t.stride()}, want rows that start at multiples of 16 bytes"
            )


def check_shapes(inputs: Inputs, **of_queries: torch.Tensor | None) -> None:
    """ValueError for keys, values or prompts whose batch or number of rows does not match, since kernels
    would read past their end; and for tensors `of_queries` that are not of q's shape."""
    batch, _, *heads = inputs.q.shape
    require_shape(inputs.q.shape, **of_queries)
    if (inputs.k is None) != (inputs.v is None) or (inputs.prompt_k is None) != (inputs.prompt_v is None):
        raise ValueError("k and v, prompt_k and prompt_v: got one without the other, want both or neither")
    require_shape((batch, num_rows_of(inputs.k), *heads), k=inputs.k, v=inputs.v)
    copies = 1 if inputs.prompt_k is None or inputs.prompt_k.shape[0] == 1 else batch
    rows = num_rows_of(inputs.prompt_k)
    require_shape((copies, rows, *heads), prompt_k=inputs.prompt_k, prompt_v=inputs.prompt_v)


def check_lse(q: torch.Tensor, lse: torch.Tensor, num_statistics: int) -> None:
    """ValueError for a log-sum-exp that is not (B, H, num_statistics) as forward returns it."""
    require_device(q=q, lse=lse)
    require_shape((q.shape[0], q.shape[2], num_statistics), lse=lse)
    require_dtype((torch.float32,), lse=lse.dtype)
    require_contiguous_rows(lse=lse)


def strides(t: torch.Tensor | None, shared: bool = False) -> tuple[int, int, int]:
    """Strides of images, rows and heads; that of images is 0 if all share the tensor.

    Those of dimensions of size 1, which may be anything, are 0 too: rows past the end, which no kernel reads,
    would else start anywhere, and `jit.row_pointers` promises the compiler that all rows are aligned.
    """
    if t is None:
        return 0, 0, 0
    images, rows, heads = (stride if n > 1 else 0 for n, stride in zip(t.shape[:3], t.stride(), strict=False))
    return 0 if shared else images, rows, heads


def prompt_strides(prompts: torch.Tensor | None) -> tuple[int, int, int]:
    return strides(prompts, shared=prompts is not None and prompts.shape[0] == 1)


class Sizes(NamedTuple):
    """The sizes that every kernel takes, in its order. An image is one sequence, or one for each window."""

    num_heads: int
    num_rows: int  # of a sequence
    num_prompts: int
    num_keys: int  # of a sequence: the prompts and the image's
    num_windows: int
    num_fresh: int


class Inputs(NamedTuple):
    """What every kernel reads: q (B, R, H, D), k and v (B, N, H, D), prompt_k and prompt_v (1 or B, m, H, D),
    and in windows the fields of a `WindowBias`, and how many of the R rows are prompts'."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    prompt_k: torch.Tensor | None
    prompt_v: torch.Tensor | None
    bias: torch.Tensor | None = None
    regions: torch.Tensor | None = None
    num_fresh: int = 0

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """q stands in for absent tensors, which no kernel reads."""
        *tensors, _ = self
        return tuple(self.q if t is None else t for t in tensors)

    @property
    def sizes(self) -> Sizes:
        _, num_rows, num_heads, _ = self.q.shape
        num_prompts, num_image = num_rows_of(self.prompt_k), num_rows_of(self.k)
        num_windows = 1 if self.bias is None else num_image // self.bias.shape[1]
        return Sizes(
            num_heads,
            num_rows=(num_rows - self.num_fresh) // num_windows + self.num_fresh,
            num_prompts=num_prompts,
            num_keys=num_prompts + num_image // num_windows,
            num_windows=num_windows,
            num_fresh=self.num_fresh,
        )

    @property
    def strides(self) -> tuple[int, ...]:
        return (
            *strides(self.q), *strides(self.k), *strides(self.v), *prompt_strides(self.prompt_k),
            *prompt_strides(self.prompt_v), 0 if self.bias is None else self.bias.stride(1),
        )  # fmt: skip

    @property
    def flags(self) -> dict[str, Any]:
        """Constexprs: the head dim, and which tensors there are."""
        return dict(
            D=self.q.shape[3],
            PROMPTS=self.prompt_k is not None,
            WINDOWS=self.bias is not None,
            SHIFTED=self.regions is not None,
        )


def _launch(
    kernel: Any, inputs: Inputs, num_tiles: int, all_strides: tuple[int, ...], tiles: Tiles, **flags: Any
) -> Launch:
    """A kernel for so many tiles of every sequence and head."""
    sizes = inputs.sizes
    grid = num_tiles, sizes.num_windows * sizes.num_heads, inputs.q.shape[0]
    return Launch(
        kernel, inputs.q.device, grid, *all_strides, *sizes, **inputs.flags, **flags, **tiles.launch
    )


def forward_launch(inputs: Inputs, tiles: Tiles) -> Launch:
    num_tiles = cdiv(inputs.sizes.num_rows, tiles.block_m)
    return _launch(attention_forward_kernel, inputs, num_tiles, inputs.strides, tiles)


@once_per_layout
def _forward_launch(**tensors: torch.Tensor | None) -> Launch:
    check_tensors(**tensors)
    inputs = Inputs(**tensors, num_fresh=0)
    check_shapes(inputs)
    _, num_rows, _, head_dim = inputs.q.shape
    return forward_launch(inputs, forward_tiles(inputs.q.dtype, head_dim, num_rows, arch_of(inputs.q.device)))


@torch_op("prompted_attention")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    launch = _forward_launch(q=q, k=k, v=v, prompt_k=prompt_k, prompt_v=prompt_v)
    out, lse = _empty_forward(q)
    launch(*Inputs(q, k, v, prompt_k, prompt_v).pointers, out, lse, out)
    return out, lse


def _empty_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_rows, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_heads, num_rows), dtype=torch.float32)


@torch.library.register_fake("vpt_fast::prompted_attention")
def _(q, k, v, prompt_k, prompt_v):
    return _empty_forward(q)


def grad_pointers(q: torch.Tensor, grads: AttentionGrads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV as the kernels write them; q stands in for those that are not wanted."""
    if grads.qkv is not None:
        return grads.qkv.unbind(2)
    grad_k, grad_v = (q, q) if grads.kv is None else grads.kv.unbind(2)
    return q if grads.q is None else grads.q, grad_k, grad_v


def packed_strides(num_rows: int, parts: int, num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Strides of images, rows and heads of one part of (B, rows, parts, H, D); ValueError for more elements
    of an image than int32 numbers, as an image whose parts are separate tensors may have."""
    row = parts * num_heads * head_dim
    if num_rows * row >= 2**31:
        raise ValueError(
            f"packed: got {num_rows} rows of {parts} x {num_heads} x {head_dim} gradients, want those of an "
            "image within 2^31 elements"
        )
    return num_rows * row, row, head_dim


def rows_launches(
    inputs: Inputs,
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    need_q: bool,
    packed: bool,
    tiles: Tiles,
    terms_tiles: Tiles,
) -> tuple[Launch | None, Launch | None]:
    """The launches for the rows' terms and for dQ, those that are needed.

    Given O, the kernel for dQ computes the rows' terms too; without O or dQ they have a kernel of their own.
    """
    _, num_rows, num_heads, head_dim = inputs.q.shape
    has_out = out is not None
    read = (*strides(grad_out), *inputs.strides, *strides(out), lse.stride(0), lse.stride(1))
    terms = grad_q = None
    if not (has_out and need_q):
        num_tiles = cdiv(inputs.sizes.num_rows, terms_tiles.block_m)
        terms = _launch(terms_kernel, inputs, num_tiles, read, terms_tiles, HAS_OUT=has_out)
    if need_q:
        num_tiles = cdiv(inputs.sizes.num_rows, tiles.block_m)
        written = packed_strides(num_rows, 3 if packed else 1, num_heads, head_dim)
        grad_q = _launch(grad_q_kernel, inputs, num_tiles, (*read, *written), tiles, HAS_OUT=has_out)
    return terms, grad_q


def grad_kv_launch(inputs: Inputs, grad_out: torch.Tensor, packed: bool, tiles: Tiles) -> Launch:
    """The launch for dK and dV, and for each image's gradients of the prompts; without the image's keys for
    these alone, since the rows' terms already cover all keys."""
    _, _, num_heads, head_dim = inputs.q.shape
    sizes = inputs.sizes
    written = packed_strides(num_rows_of(inputs.k), 3 if packed else 2, num_heads, head_dim)
    return _launch(
        grad_kv_kernel,
        inputs,
        cdiv(sizes.num_keys, tiles.block_n),
        (*strides(grad_out), *inputs.strides, *written),
        tiles,
        IMAGE=inputs.k is not None,
        TAIL=tail_rows(tiles, head_dim, sizes.num_rows),
    )


class _BackwardLaunches(NamedTuple):
    """The launches that are needed, in this order."""

    terms: Launch | None
    grad_q: Launch | None
    grad_kv: Launch | None


@once_per_layout
def _backward_launches(
    need_q: bool,
    need_kv: bool,
    packed: bool,
    *,
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    **tensors: torch.Tensor | None,
) -> _BackwardLaunches:
    check_tensors(grad_out=grad_out, **tensors, out=out)
    inputs = Inputs(**tensors, num_fresh=0)
    check_shapes(inputs, grad_out=grad_out, out=out)
    q = inputs.q
    _, num_rows, _, head_dim = q.shape
    check_lse(q, lse, num_rows)
    request = q.dtype, head_dim, num_rows, arch_of(q.device)
    tiles = grad_q_tiles(*request)
    terms_tiles = tiles if out is None else TERMS_TILES
    terms, grad_q = rows_launches(inputs, grad_out, out, lse, need_q, packed, tiles, terms_tiles)
    grad_kv = None
    if need_kv or inputs.prompt_k is not None:
        of_keys = inputs if need_kv else inputs._replace(k=None, v=None)
        grad_kv = grad_kv_launch(of_keys, grad_out, packed, grad_kv_tiles(*request))
    return _BackwardLaunches(terms, grad_q, grad_kv)


@torch_op("prompted_attention_backward")
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    need_q: bool,
    need_kv: bool,
    packed: bool,
) -> list[torch.Tensor]:
    launches = _backward_launches(
        need_q, need_kv, packed, grad_out=grad_out, out=out, lse=lse, q=q, k=k, v=v, prompt_k=prompt_k,
        prompt_v=prompt_v,
    )  # fmt: skip
    results = empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)
    grads = name_grads(results, need_q=need_q, need_kv=need_kv, packed=packed)
    grad_q, grad_k, grad_v = grad_pointers(q, grads)
    terms = empty_terms(lse)
    pointers = Inputs(q, k, v, prompt_k, prompt_v).pointers
    out = q if out is None else out
    if launches.terms is not None:
        launches.terms(grad_out, *pointers, out, lse, terms)
    if launches.grad_q is not None:
        launches.grad_q(grad_out, *pointers, out, lse, terms, grad_q, q)
    if launches.grad_kv is not None:
        per_image = empty_per_image(q, grads.prompt_kv)
        launches.grad_kv(grad_out, *pointers, terms, grad_k, grad_v, per_image)
        sum_over_images(per_image, grads.prompt_kv)
    return results


def empty_terms(lse: torch.Tensor) -> torch.Tensor:
    """An empty tensor for the rows' terms, see `jit`."""
    batch, num_heads, num_rows = lse.shape
    return lse.new_empty((batch, num_heads, 2, num_rows))


def empty_per_image(q: torch.Tensor, grad_prompt_kv: torch.Tensor | None) -> torch.Tensor:
    """The tensor for each image's gradient of the prompts: a new one (B, m, 2, H, D) if the images share
    them, else the gradient itself; q if there are none."""
    if grad_prompt_kv is None or grad_prompt_kv.shape[0] != 1:
        return q if grad_prompt_kv is None else grad_prompt_kv
    return q.new_empty((q.shape[0], *grad_prompt_kv.shape[1:]))


def sum_over_images(per_image: torch.Tensor, grad_prompt_kv: torch.Tensor | None) -> None:
    """Sums the gradients of prompts that images share, in a fixed order and in at least float32."""
    if grad_prompt_kv is not None and grad_prompt_kv.shape[0] == 1:
        torch.sum(per_image, 0, keepdim=True, out=grad_prompt_kv)


@torch.library.register_fake("vpt_fast::prompted_attention_backward")
def _(grad_out, q, k, v, prompt_k, prompt_v, out, lse, need_q, need_kv, packed):
    return empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)


def builds(arch: int) -> list[Build]:
    """Every kernel in every configuration that these launchers choose on sm_`arch` (80, 90, 100).

    float16 differs from bfloat16 only in its matmuls' type, so one head dim stands for all; 112 differs from
    104 only in a constant; and six head dims cover all of float32's tiles.
    """
    in_bfloat16 = [head_dim for head_dim in HEAD_DIMS if head_dim != 112]
    requests = [(torch.bfloat16, head_dim, rows) for head_dim in in_bfloat16 for rows in (1, 64, 197)]
    requests += [(torch.float16, 64, 197)]
    in_float32 = (48, 64, 72, 80, 88, 128)
    requests += [(torch.float32, head_dim, rows) for head_dim in in_float32 for rows in (1, 197)]
    found = [build for request in requests for build in _builds_of(*request, arch)]
    unique = {(build.name, build.config): build for build in found}
    return list(unique.values())


def _builds_of(dtype: torch.dtype, head_dim: int, num_rows: int, arch: int) -> list[Build]:
    forward = forward_tiles(dtype, head_dim, num_rows, arch)
    grad_q = grad_q_tiles(dtype, head_dim, num_rows, arch)
    grad_kv = grad_kv_tiles(dtype, head_dim, num_rows, arch)
    tail = tail_rows(grad_kv, head_dim, num_rows)
    rest = f" and {tail} rows" if tail else ""
    return [
        make_build(kernel, dtype, head_dim, tiles, variant, **flags)
        for kernel, tiles, variant, flags in (
            (attention_forward_kernel, forward, "", {}),
            (terms_kernel, TERMS_TILES, "from O", {"HAS_OUT": True}),
            (terms_kernel, grad_q, "from scores", {"HAS_OUT": False}),
            (grad_q_kernel, grad_q, "with O", {"HAS_OUT": True}),
            (grad_q_kernel, grad_q, "with terms", {"HAS_OUT": False}),
            (grad_kv_kernel, grad_kv, f"all keys{rest}", {"IMAGE": True, "TAIL": tail}),
            (grad_kv_kernel, grad_kv, f"prompts{rest}", {"IMAGE": False, "TAIL": tail}),
        )
    ]


def make_build(
    kernel: Any, dtype: torch.dtype, head_dim: int, tiles: Tiles, variant: str, **flags: bool
) -> Build:
    """A kernel as it is launched, with prompts and without windows unless `flags` says otherwise."""
    names = [name for name in kernel.arg_names if not name.isupper()]
    pointers = {n: _type_of(n, TYPE_NAMES[dtype]) for n in names if not n.startswith(("stride_", "num_"))}
    odd = [*SIZES, "stride_lb", "stride_lh"]
    if head_dim % 16:  # the compiler is told of multiples of 16 elements, which heads of 72 are not apart
        odd += [name for name in names if name.startswith("stride_") and name.endswith("h")]
    constexprs = {"D": head_dim, "PROMPTS": True, "WINDOWS": False, "SHIFTED": False, **flags}
    has_products = kernel is not terms_kernel or not flags["HAS_OUT"]
    first_dimension = tiles.block_n if kernel is grad_kv_kernel else tiles.block_m  # of its matmuls
    return Build.of(
        kernel,
        f"{TYPE_NAMES[dtype]} D{head_dim} {tiles.block_m}x{tiles.block_n} {variant}".rstrip(),
        pointers,
        {**constexprs, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n},
        odd=odd,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        max_registers=tiles.max_registers,
        wgmma=dtype != torch.float32 and has_products and first_dimension >= 64,
        programs=1 if dtype == torch.float32 else 2,
    )


def _type_of(name: str, element: str) -> str:
    """Triton's type of a kernel's pointer."""
    if name == "regions":
        return "*i32"
    is_wide = name in ("bias", "lse", "terms", "fresh_out", "grad_fresh")
    return "*fp32" if is_wide else f"*{element}"
