"""Normalisation over the last dimension, forward and backward, in Triton.

Signatures and semantics are those of `reference`. Leading dimensions may have any strides; the last one is
contiguous. Sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import DTYPES, TYPE_NAMES, Launch, cdiv, next_power_of_2
from vpt_fast.kernels.normalization.jit import normalize_backward_kernel, normalize_kernel
from vpt_fast.kernels.normalization.reference import KINDS
from vpt_fast.kernels.rows import leading_rows
from vpt_fast.kernels.torch_op import torch_op

MAX_WIDTH = 8192


def _config(d: int) -> dict[str, int]:
    """Sixteen elements per thread: two 16-byte loads in 16-bit dtypes."""
    block_d = max(16, next_power_of_2(d))
    return {
        "BLOCK_ROWS": max(1, 2048 // block_d),
        "BLOCK_D": block_d,
        "num_warps": max(4, block_d // 512),
    }


@once_per_layout
def _forward_launch(eps: float, kind: str, dtype: torch.dtype, pack: bool, **inputs: torch.Tensor) -> Launch:
    """inputs: x, whose strides then stand in for update's, or residual and update. Raises ValueError for what
    the kernel does not take."""
    first = next(iter(inputs.values()))
    require_device(**inputs)
    require_dtype(DTYPES, **{name: tensor.dtype for name, tensor in inputs.items()}, dtype=dtype)
    require_shape(first.shape, **inputs)
    rows = leading_rows(**inputs)
    d = first.shape[-1]
    _check(kind, d)
    config = _config(d)
    return Launch(
        normalize_kernel,
        first.device,
        cdiv(rows.num_rows, config["BLOCK_ROWS"]),
        rows.num_rows,
        d,
        *rows.sizes[1:],
        *rows.strides[0],
        *rows.strides[-1],
        eps,
        LAYER=kind == "layer",
        **config,
    )


@once_per_layout
def _backward_launch(
    kind: str,
    dtype: torch.dtype,
    *,
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Launch:
    """Without a residual, grad's strides stand in. Raises ValueError for what the kernel does not take."""
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
    d = grad.shape[-1]
    _check(kind, d)
    config = _config(d)
    return Launch(
        normalize_backward_kernel,
        grad.device,
        cdiv(rows.num_rows, config["BLOCK_ROWS"]),
        rows.num_rows,
        d,
        *rows.sizes[1:],
        *rows.strides[0],
        *rows.strides[1],
        *rows.strides[2],
        LAYER=kind == "layer",
        **config,
    )


def _check(kind: str, d: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(map(repr, KINDS))}")
    if not 1 <= d <= MAX_WIDTH:
        raise ValueError(f"width: got {d}, want 1 to {MAX_WIDTH}")


def _outputs(x: torch.Tensor, dtype: torch.dtype, pack: bool) -> list[torch.Tensor]:
    """x̂ and rstd, and with `pack` codes and scale."""
    stat = (*x.shape[:-1], 1)
    outputs = [x.new_empty(x.shape, dtype=dtype), x.new_empty(stat, dtype=torch.float32)]
    if pack:
        outputs += [x.new_empty(x.shape, dtype=torch.int8), x.new_empty(stat, dtype=torch.float32)]
    return outputs


_NOT_PACKED = (None, None)


@torch_op("normalize")
def _normalize(x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool) -> list[torch.Tensor]:
    launch = _forward_launch(eps, kind, dtype, pack, x=x)
    outputs = _outputs(x, dtype, pack)
    launch(x, None, None, *outputs, *(() if pack else _NOT_PACKED))
    return outputs


@torch.library.register_fake("vpt_fast::normalize")
def _(x, eps, kind, dtype, pack):
    return _outputs(x, dtype, pack)


@torch_op("add_normalize")
def _add_normalize(
    residual: torch.Tensor, update: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, pack: bool
) -> list[torch.Tensor]:
    launch = _forward_launch(eps, kind, dtype, pack, residual=residual, update=update)
    hidden = residual.new_empty(residual.shape)
    outputs = _outputs(residual, dtype, pack)
    launch(residual, update, hidden, *outputs, *(() if pack else _NOT_PACKED))
    return [hidden, *outputs]


@torch.library.register_fake("vpt_fast::add_normalize")
def _(residual, update, eps, kind, dtype, pack):
    return [residual.new_empty(residual.shape), *_outputs(residual, dtype, pack)]


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
    # As the kernel reads them; what a block keeps is contiguous already and not copied.
    rstd, scale = rstd.contiguous(), None if scale is None else scale.contiguous()
    launch = _backward_launch(kind, dtype, grad=grad, x_hat=x_hat, rstd=rstd, scale=scale, residual=residual)
    dx = grad.new_empty(grad.shape, dtype=dtype)
    launch(grad, x_hat, rstd, scale, residual, dx)
    return dx


@torch.library.register_fake("vpt_fast::normalize_backward")
def _(grad, x_hat, rstd, scale, kind, residual, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)


def normalize(
    x: torch.Tensor, eps: float, kind: str, dtype: torch.dtype, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.normalize` in one pass over x."""
    outputs = _normalize(x, eps, kind, dtype, pack)
    return (*outputs, *(() if pack else _NOT_PACKED))


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
    outputs = _add_normalize(residual, update, eps, kind, dtype, pack)
    return (*outputs, *(() if pack else _NOT_PACKED))


def normalize_backward(
    grad: torch.Tensor,
    x_hat: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    kind: str,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`reference.normalize_backward` in one pass over its inputs."""
    return _normalize_backward(grad, x_hat, rstd, scale, kind, residual, dtype or rstd.dtype)


# One width for every case that the launcher distinguishes: rows per program, warps, ragged or not.
_BUILD_WIDTHS = (64, 768, 1280, 3072, 8192)


def builds(arch: int) -> list[Build]:
    """Both kernels at all `_BUILD_WIDTHS` in bfloat16, and at one width in the other dtypes.

    `arch` (80, 90, 100) makes no difference here. Forward is built with all its options, the addition and the
    codes; backward with a residual, from x̂ and from codes.
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
    pointers = {
        "x": "*fp32",
        "update": in_dtype,
        "hidden": "*fp32",
        "x_hat": in_dtype,
        "rstd": "*fp32",
        "codes": "*i8",
        "scale": "*fp32",
    }
    return _build(normalize_kernel, config, pointers, d)


def _backward_build(config: str, d: int, dtype: torch.dtype, *, packed: bool) -> Build:
    in_dtype = f"*{TYPE_NAMES[dtype]}"
    pointers = {
        "grad": in_dtype,
        "x_hat": "*i8" if packed else in_dtype,
        "rstd": "*fp32",
        "scale": "*fp32" if packed else None,
        "residual": in_dtype,
        "dx": in_dtype,
    }
    return _build(normalize_backward_kernel, config, pointers, d)


def _build(kernel: Any, config: str, pointers: dict[str, str | None], d: int) -> Build:
    blocks = _config(d)
    num_warps = blocks.pop("num_warps")
    constexprs = {"LAYER": True, **blocks}
    odd = ("num_rows", "size1", "size2")
    return Build.of(kernel, config, pointers, constexprs, odd=odd, floats=("eps",), num_warps=num_warps)
