"""Normalisation over the last dimension, forward and backward, in Triton.

The functions have the signatures and the meaning of their twins in `reference`. Leading dimensions may have
any strides; the last one is contiguous. Sums run in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import (
    on_device,
    once_per_layout,
    require_device,
    require_dtype,
    require_shape,
)
from vpt_fast.kernels.launch import DTYPES, TYPE_NAMES, cdiv, next_power_of_2
from vpt_fast.kernels.normalization.jit import normalize_backward_kernel, normalize_kernel
from vpt_fast.kernels.normalization.reference import KINDS
from vpt_fast.kernels.rows import Rows, leading_rows
from vpt_fast.kernels.torch_op import torch_op

MAX_WIDTH = 8192
_MAX_ROWS = 2**31 - 2**11  # row numbers are 32 bits wide, the last program's rows beyond the end too


def _config(d: int) -> dict[str, int]:
    """Sixteen elements to a thread: two loads of 16 bytes each where an element has two."""
    block_d = max(16, next_power_of_2(d))
    return {
        "BLOCK_ROWS": max(1, 2048 // block_d),
        "BLOCK_D": block_d,
        "num_warps": max(4, block_d // 512),
    }


@once_per_layout
def _forward_rows(dtype: torch.dtype, kind: str, **inputs: torch.Tensor) -> Rows:
    """Of x, or of residual and update; raises ValueError for what the kernel does not take."""
    first = next(iter(inputs.values()))
    require_device(**inputs)
    require_dtype(DTYPES, **{name: tensor.dtype for name, tensor in inputs.items()}, dtype=dtype)
    require_shape(first.shape, **inputs)
    rows = leading_rows(**inputs)
    _check(kind, rows.num_rows, first.shape[-1])
    return rows


@once_per_layout
def _backward_rows(
    dtype: torch.dtype,
    kind: str,
    *,
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Rows:
    """Of grad, x_hat and residual, or grad again; raises ValueError for what the kernel does not take."""
    require_device(grad=grad, x_hat=x_hat, rstd=rstd, scale=scale, residual=residual)
    require_dtype(DTYPES, grad=grad.dtype, dtype=dtype)
    require_dtype(DTYPES if scale is None else (torch.int8,), x_hat=x_hat.dtype)
    require_dtype((torch.float32,), rstd=rstd.dtype)
    require_shape(grad.shape, x_hat=x_hat, residual=residual)
    require_shape((*grad.shape[:-1], 1), rstd=rstd, scale=scale)
    if scale is not None:
        require_dtype((torch.float32,), scale=scale.dtype)
    if residual is not None:
        require_dtype(DTYPES, residual=residual.dtype)
    rows = leading_rows(grad=grad, x_hat=x_hat, residual=grad if residual is None else residual)
    _check(kind, rows.num_rows, grad.shape[-1])
    return rows


def _check(kind: str, num_rows: int, d: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(map(repr, KINDS))}")
    if not 1 <= d <= MAX_WIDTH:
        raise ValueError(f"width: got {d}, want 1 to {MAX_WIDTH}")
    if num_rows > _MAX_ROWS:
        raise ValueError(f"rows: got {num_rows}, want at most {_MAX_ROWS}")


def _stat(x: torch.Tensor) -> torch.Tensor:
    """A number a row: (..., 1) of float32."""
    return torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def _outputs(
    x: torch.Tensor, dtype: torch.dtype, pack: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x̂, rstd, codes, scale; what is not wanted has no elements."""
    x_hat = torch.empty(x.shape, dtype=dtype, device=x.device)
    codes = torch.empty(x.shape if pack else (0,), dtype=torch.int8, device=x.device)
    scale = _stat(x) if pack else torch.empty(0, dtype=torch.float32, device=x.device)
    return x_hat, _stat(x), codes, scale


def _launch_forward(
    rows: Rows,
    x: torch.Tensor,
    update: torch.Tensor | None,
    hidden: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float,
    kind: str,
) -> None:
    x_hat, rstd, codes, scale = outputs
    d = x.shape[-1]
    if rows.num_rows == 0:
        return
    config = _config(d)
    with on_device(x):
        normalize_kernel[(cdiv(rows.num_rows, config["BLOCK_ROWS"]),)](
            x,
            update,
            hidden,
            x_hat,
            rstd,
            codes if codes.numel() else None,
            scale if codes.numel() else None,
            rows.num_rows,
            d,
            *rows.sizes[1:],
            *rows.strides[0],
            *rows.strides[-1],
            eps,
            LAYER=kind == "layer",
            **config,
        )


@torch_op("normalize")
def _normalize(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _forward_rows(dtype, kind, x=x)
    outputs = _outputs(x, dtype, pack)
    _launch_forward(rows, x, None, None, outputs, eps, kind)
    return outputs


@torch.library.register_fake("vpt_fast::normalize")
def _(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, dtype, pack)


@torch_op("add_normalize")
def _add_normalize(
    residual: torch.Tensor, update: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _forward_rows(dtype, kind, residual=residual, update=update)
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    outputs = _outputs(residual, dtype, pack)
    _launch_forward(rows, residual, update, hidden, outputs, eps, kind)
    return hidden, *outputs


@torch.library.register_fake("vpt_fast::add_normalize")
def _(
    residual: torch.Tensor, update: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    return hidden, *_outputs(residual, dtype, pack)


@torch_op("normalize_backward")
def _normalize_backward(
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    kind: str,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows = _backward_rows(dtype, kind, grad=grad, x_hat=x_hat, rstd=rstd, scale=scale, residual=residual)
    dx = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    d = grad.shape[-1]
    if rows.num_rows == 0:
        return dx
    config = _config(d)
    with on_device(grad):
        normalize_backward_kernel[(cdiv(rows.num_rows, config["BLOCK_ROWS"]),)](
            grad,
            x_hat,
            rstd.contiguous(),
            None if scale is None else scale.contiguous(),
            residual,
            dx,
            rows.num_rows,
            d,
            *rows.sizes[1:],
            *rows.strides[0],
            *rows.strides[1],
            *rows.strides[2],
            LAYER=kind == "layer",
            **config,
        )
    return dx


@torch.library.register_fake("vpt_fast::normalize_backward")
def _(
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    kind: str,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(grad.shape, dtype=dtype, device=grad.device)


def normalize(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.normalize` in one pass over x."""
    x_hat, rstd, codes, scale = _normalize(x, eps, kind, dtype, pack)
    return (x_hat, rstd, codes, scale) if pack else (x_hat, rstd, None, None)


def add_normalize(
    residual: torch.Tensor,
    update: torch.Tensor,
    eps: float,
    kind: str,
    dtype: torch.dtype,
    *,
    pack: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.add_normalize` in one pass over both."""
    hidden, x_hat, rstd, codes, scale = _add_normalize(residual, update, eps, kind, dtype, pack)
    return (hidden, x_hat, rstd, codes, scale) if pack else (hidden, x_hat, rstd, None, None)


def normalize_backward(
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    kind: str,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`reference.normalize_backward` in one pass over all that it reads."""
    return _normalize_backward(grad, x_hat, rstd, scale, kind, residual, dtype or rstd.dtype)


# One width of every class that the launcher makes a difference for: rows to a program, warps, ragged or not.
_BUILD_WIDTHS = (64, 768, 1280, 3072, 8192)


def builds(arch: int) -> list[Build]:
    """Both kernels at every class of widths in bfloat16, and in the other dtypes at one.

    `arch` (80, 90, 100) makes no difference here. Forward is built with all that it can do, the addition and
    the codes; backward with a residual, from x̂ and from codes.
    """
    cases = [(d, torch.bfloat16) for d in _BUILD_WIDTHS] + [(768, torch.float16), (768, torch.float32)]
    found = []
    for d, dtype in cases:
        name = f"{TYPE_NAMES[dtype]} d{d}"
        found.append(_forward_build(name, d, dtype))
        found.append(_backward_build(name, d, dtype, packed=False))
        found.append(_backward_build(f"{name} codes", d, dtype, packed=True))
    return found


def _forward_build(config: str, d: int, dtype: torch.dtype) -> Build:
    in_dtype = f"*{TYPE_NAMES[dtype]}"
    strides = [f"{name}_stride{dim}" for name in ("x", "update") for dim in range(3)]
    pointers = {
        "x": "*fp32",
        "update": in_dtype,
        "hidden": "*fp32",
        "x_hat": in_dtype,
        "rstd": "*fp32",
        "codes": "*i8",
        "scale": "*fp32",
    }
    return _build(normalize_kernel, config, pointers, strides, {"eps": "fp32"}, {}, _config(d))


def _backward_build(config: str, d: int, dtype: torch.dtype, *, packed: bool) -> Build:
    in_dtype = f"*{TYPE_NAMES[dtype]}"
    strides = [f"{name}_stride{dim}" for name in ("grad", "x_hat", "residual") for dim in range(3)]
    pointers = {"grad": in_dtype, "x_hat": "*i8" if packed else in_dtype, "rstd": "*fp32"}
    if packed:
        pointers["scale"] = "*fp32"
    pointers |= {"residual": in_dtype, "dx": in_dtype}
    absent = {} if packed else {"scale": None}
    return _build(normalize_backward_kernel, config, pointers, strides, {}, absent, _config(d))


def _build(
    kernel: Any,
    config: str,
    pointers: dict[str, str],
    strides: list[str],
    scalars: dict[str, str],
    absent: dict[str, None],
    launch: dict[str, int],
) -> Build:
    """In the kernel's order: pointers, numbers of rows and columns, strides, other scalars."""
    integers = ["num_rows", "d", "size1", "size2", *strides]
    return Build(
        kernel=kernel,
        config=config,
        signature={**pointers, **dict.fromkeys(integers, "i32"), **scalars},
        constexprs={
            **absent,
            "LAYER": True,
            "BLOCK_ROWS": launch["BLOCK_ROWS"],
            "BLOCK_D": launch["BLOCK_D"],
        },
        divisible=(*pointers, "d", *strides),
        num_warps=launch["num_warps"],
        num_stages=3,
        wgmma=False,
    )
