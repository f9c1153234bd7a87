"""Rotation of queries and keys by their positions, in Triton.

Signature and semantics are those of `reference`. Leading dimensions of x may have any strides; the last one
is contiguous. Arithmetic is in float32.
"""

from __future__ import annotations

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import DTYPES, TYPE_NAMES, Launch, cdiv, next_power_of_2
from vpt_fast.kernels.prompted_attention import HEAD_DIMS
from vpt_fast.kernels.rotation.jit import rotate_kernel
from vpt_fast.kernels.rows import leading_rows
from vpt_fast.kernels.torch_op import mark_changed, torch_op

_NUM_WARPS = 4


def _config(half: int) -> dict[str, int]:
    """Eight elements of each half per thread: one 16-byte access in 16-bit dtypes."""
    block_half = next_power_of_2(half)
    return {"HALF": half, "BLOCK_ROWS": 1024 // block_half, "BLOCK_HALF": block_half}


@once_per_layout
def _launch(inverse: bool, *, x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> Launch:
    """Raises ValueError for what the kernel does not take."""
    require_device(x=x, sin=sin, cos=cos)
    require_dtype(DTYPES, x=x.dtype, sin=sin.dtype, cos=cos.dtype)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (images, patches, heads, head dim)")
    _, num_patches, num_heads, head_dim = x.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dim: got {head_dim}, want one of {', '.join(map(str, HEAD_DIMS))}")
    half = head_dim // 2
    table_heads = sin.shape[1] if sin.ndim == 3 and sin.shape[1] == num_heads else 1
    require_shape((num_patches, table_heads, half), sin=sin, cos=cos)
    rows = leading_rows(x=x)
    config = _config(half)
    return Launch(
        rotate_kernel,
        x.device,
        cdiv(rows.num_rows, config["BLOCK_ROWS"]),
        rows.num_rows,
        num_patches,
        num_heads,
        table_heads,
        *rows.sizes[1:],
        *rows.strides[0],
        INVERSE=inverse,
        **config,
        num_warps=_NUM_WARPS,
    )


@torch_op("rotate_", mutates_args=("x",))
def _rotate_(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, inverse: bool) -> None:
    sin, cos = sin.contiguous(), cos.contiguous()  # as the kernel reads them
    _launch(inverse, x=x, sin=sin, cos=cos)(x, sin, cos)
    mark_changed(x)


@torch.library.register_fake("vpt_fast::rotate_")
def _(x, sin, cos, inverse):
    return None


def rotate_(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, *, inverse: bool = False) -> None:
    """`reference.rotate_` in one pass over x."""
    _rotate_(x, sin, cos, inverse)


def builds(arch: int) -> list[Build]:
    """Every head dim in bfloat16, forward; the other dtypes, and backward, at one.

    `arch` (80, 90, 100) makes no difference here.
    """
    found = [_build(torch.bfloat16, head_dim, inverse=False) for head_dim in HEAD_DIMS]
    found += [_build(dtype, 64, inverse=False) for dtype in (torch.float16, torch.float32)]
    return [*found, _build(torch.bfloat16, 64, inverse=True)]


def _build(dtype: torch.dtype, head_dim: int, *, inverse: bool) -> Build:
    odd = ["num_rows", "num_patches", "num_heads", "table_heads", "size1", "size2"]
    if head_dim % 16:
        odd.append("x_stride2")  # heads of 72 are 72 elements apart
    return Build.of(
        rotate_kernel,
        f"{TYPE_NAMES[dtype]} D{head_dim}{' inverse' if inverse else ''}",
        {"x": f"*{TYPE_NAMES[dtype]}", "sin": "*fp32", "cos": "*fp32"},
        {"INVERSE": inverse, **_config(head_dim // 2)},
        odd=odd,
        num_warps=_NUM_WARPS,
    )
