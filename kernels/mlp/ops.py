"""The MLP's activation, forward and backward, in Triton.

Signatures and semantics are those of `reference`. Leading dimensions may have any strides; the last one is
contiguous. Arithmetic is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import DTYPES, MAX_PROGRAMS, TYPE_NAMES, Launch, cdiv, next_power_of_2
from vpt_fast.kernels.mlp.jit import (
    activate_backward_kernel,
    activate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)
from vpt_fast.kernels.mlp.reference import ACTIVATIONS, GATED
from vpt_fast.kernels.rows import Rows, leading_rows
from vpt_fast.kernels.torch_op import mark_changed, torch_op

ELEMENTWISE = tuple(kind for kind in ACTIVATIONS if kind not in GATED)
MAX_PACKED_WIDTH = 8192
"""Largest width of a gated unit whose derivatives are packed: one program finds the scales of a row."""
# 16 elements per thread, 8 at a time: 16-byte accesses in 16-bit dtypes. A gated unit has 8 of each half.
_NUM_WARPS, _BLOCK, _GATED_BLOCK = 4, 2048, 1024


def check_kind(kind: str, wanted: tuple[str, ...]) -> None:
    """ValueError for an activation that is not one of `wanted`."""
    if kind not in wanted:
        raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, wanted))}")


def _packed_launch(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a whole gated row, eight elements of each half per thread."""
    block = max(_GATED_BLOCK, next_power_of_2(width))
    return block, block // 256


@once_per_layout
def _forward_launch(kind: str, pack: bool, *, u: torch.Tensor) -> Launch:
    """Raises ValueError for what the kernel does not take."""
    check_kind(kind, ACTIVATIONS)
    require_device(u=u)
    require_dtype(DTYPES, u=u.dtype)
    if kind not in GATED:
        return _elementwise_launch(activate_kernel, kind, u=u)
    if u.shape[-1] % 2:
        raise ValueError(f"u: got width {u.shape[-1]}, want an even one: gate before value")
    width = u.shape[-1] // 2
    if pack and width > MAX_PACKED_WIDTH:
        raise ValueError(f"u: got width 2 x {width}, want at most 2 x {MAX_PACKED_WIDTH} to pack")
    block, num_warps = _packed_launch(width) if pack else (_GATED_BLOCK, _NUM_WARPS)
    return _launch(swiglu_kernel, u.device, leading_rows(u=u), width, BLOCK=block, num_warps=num_warps)


@once_per_layout
def _backward_launch(
    kind: str, *, grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None
) -> Launch:
    """Raises ValueError for what the kernel does not take."""
    check_kind(kind, ACTIVATIONS)
    gated = kind in GATED
    require_device(grad=grad, kept=kept, scale=scale)
    require_dtype(DTYPES, grad=grad.dtype)
    require_shape((*grad.shape[:-1], grad.shape[-1] * (2 if gated else 1)), kept=kept)
    if not gated:
        if scale is not None:
            raise ValueError(f"scale: got one of shape {tuple(scale.shape)} for {kind!r}, want None")
        require_dtype((*DTYPES, torch.uint8), kept=kept.dtype)
        return _elementwise_launch(activate_backward_kernel, kind, grad=grad, kept=kept)
    if scale is not None:
        require_dtype((torch.float32,), scale=scale.dtype)
        require_shape((*grad.shape[:-1], 2), scale=scale)
    require_dtype(DTYPES if scale is None else (torch.int8,), kept=kept.dtype)
    rows, width = leading_rows(grad=grad, kept=kept), grad.shape[-1]
    return _launch(swiglu_backward_kernel, grad.device, rows, width, BLOCK=_GATED_BLOCK, num_warps=_NUM_WARPS)


def _elementwise_launch(kernel: Any, kind: str, **inputs: torch.Tensor) -> Launch:
    rows, width = _rows_and_width(**inputs)
    device = next(iter(inputs.values())).device
    one_row = rows.num_rows == 1
    return _launch(
        kernel, device, rows, width, KIND=kind, BLOCK=_BLOCK, ONE_ROW=one_row, num_warps=_NUM_WARPS
    )


def _launch(kernel: Any, device: torch.device, rows: Rows, width: int, **options: Any) -> Launch:
    """A kernel for every block of every row."""
    block = options["BLOCK"]
    programs = rows.num_rows * cdiv(width, block)
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"u: got {rows.num_rows} rows of {width}, want at most {MAX_PROGRAMS} blocks of {block}"
        )
    strides = (stride for of_tensor in rows.strides for stride in of_tensor)
    return Launch(kernel, device, programs, width, *rows.sizes[1:], *strides, **options)


def _rows_and_width(**tensors: torch.Tensor) -> tuple[Rows, int]:
    """Rows and their width; tensors that are all contiguous, of one shape, count as a single row."""
    first = next(iter(tensors.values()))
    if all(tensor.is_contiguous() for tensor in tensors.values()):
        return leading_rows(**{name: tensor.view(1, -1) for name, tensor in tensors.items()}), first.numel()
    return leading_rows(**tensors), first.shape[-1]


def _empty_forward(u: torch.Tensor, kind: str, pack: bool) -> list[torch.Tensor]:
    """a; with `pack` also codes and, for a gated unit, scale."""
    if kind not in GATED:
        return [u.new_empty(u.shape), *_empty_codes(u, pack)]
    outputs = [u.new_empty((*u.shape[:-1], u.shape[-1] // 2))]
    if pack:
        scale = u.new_empty((*u.shape[:-1], 2), dtype=torch.float32)
        outputs += [u.new_empty(u.shape, dtype=torch.int8), scale]
    return outputs


def _empty_codes(u: torch.Tensor, pack: bool) -> list[torch.Tensor]:
    return [u.new_empty(u.shape, dtype=torch.uint8)] if pack else []


@torch_op("activate")
def _activate(u: torch.Tensor, kind: str, pack: bool) -> list[torch.Tensor]:
    launch = _forward_launch(kind, pack, u=u)
    outputs = _empty_forward(u, kind, pack)
    if pack:
        launch(u, *outputs)
    else:
        launch(u, *outputs, *((None, None) if kind in GATED else (None,)))
    return outputs


@torch.library.register_fake("vpt_fast::activate")
def _(u, kind, pack):
    return _empty_forward(u, kind, pack)


@torch_op("activate_", mutates_args=("u",))
def _activate_(u: torch.Tensor, kind: str, pack: bool) -> list[torch.Tensor]:
    check_kind(kind, ELEMENTWISE)
    if not u.is_contiguous():
        raise ValueError(f"u: got strides {u.stride()} of {tuple(u.shape)}, want a contiguous one")
    launch = _forward_launch(kind, pack, u=u)
    codes = _empty_codes(u, pack)
    launch(u, u, *(codes or (None,)))
    mark_changed(u)
    return codes


@torch.library.register_fake("vpt_fast::activate_")
def _(u, kind, pack):
    return _empty_codes(u, pack)


@torch_op("activate_backward")
def _activate_backward(
    grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> torch.Tensor:
    scale = None if scale is None else scale.contiguous()  # as the kernel reads it
    launch = _backward_launch(kind, grad=grad, kept=kept, scale=scale)
    grad_u = grad.new_empty(kept.shape)
    launch(grad, kept, *((scale,) if kind in GATED else ()), grad_u)
    return grad_u


@torch.library.register_fake("vpt_fast::activate_backward")
def _(grad, kept, scale, kind):
    return grad.new_empty(kept.shape)


@torch_op("activate_backward_", mutates_args=("grad",))
def _activate_backward_(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    check_kind(kind, ELEMENTWISE)
    if not grad.is_contiguous():
        raise ValueError(f"grad: got strides {grad.stride()} of {tuple(grad.shape)}, want a contiguous one")
    _backward_launch(kind, grad=grad, kept=kept, scale=None)(grad, kept, grad)
    mark_changed(grad)


@torch.library.register_fake("vpt_fast::activate_backward_")
def _(grad, kept, kind):
    return None


def activate(
    u: torch.Tensor, kind: str, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.activate` in one pass over u."""
    a, codes, scale = (*_activate(u, kind, pack), None, None)[:3]
    return a, codes, scale


def activate_(u: torch.Tensor, kind: str, *, pack: bool = False) -> torch.Tensor | None:
    """`reference.activate_` in one pass over u."""
    codes = _activate_(u, kind, pack)
    return codes[0] if pack else None


def activate_backward(
    grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """`reference.activate_backward` in one pass over its inputs."""
    return _activate_backward(grad, kept, scale, kind)


def activate_backward_(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    """`reference.activate_backward_` in one pass over its inputs."""
    _activate_backward_(grad, kept, kind)


def builds(arch: int) -> list[Build]:
    """Every activation in bfloat16, GELU and SwiGLU in the other dtypes; `arch` makes no difference here."""
    found = []
    for kind in ELEMENTWISE:
        found += _elementwise_builds(torch.bfloat16, kind)
    for dtype in (torch.float16, torch.float32):
        found += _elementwise_builds(dtype, "gelu")
    for dtype in DTYPES:
        found += _gated_builds(dtype)
    return found


def _elementwise_builds(dtype: torch.dtype, kind: str) -> list[Build]:
    """Forward with codes and backward without, the longer variants, for many rows and for one row."""
    floats = f"*{TYPE_NAMES[dtype]}"
    forward = {"u": floats, "a": floats, "codes": "*u8"}
    backward = {"grad": floats, "kept": floats, "grad_u": floats}
    found = []
    for one_row in (False, True):
        config = f"{TYPE_NAMES[dtype]} {kind}{' one row' if one_row else ''}"
        # Triton specialises on integers that are 1, as they are for a single row.
        constexprs = {"KIND": kind, "BLOCK": _BLOCK, "ONE_ROW": one_row}
        constexprs |= {"size1": 1, "size2": 1} if one_row else {}
        found += [
            _build(activate_kernel, f"{config} codes", forward, constexprs, _NUM_WARPS),
            _build(activate_backward_kernel, config, backward, constexprs, _NUM_WARPS),
        ]
    return found


def _gated_builds(dtype: torch.dtype) -> list[Build]:
    """Without codes, and with codes for the widest supported row."""
    name, floats = TYPE_NAMES[dtype], f"*{TYPE_NAMES[dtype]}"
    forward = {"u": floats, "a": floats, "codes": None, "scale": None}
    backward = {"grad": floats, "kept": floats, "scale": None, "grad_u": floats}
    of_codes = {"codes": "*i8", "scale": "*fp32"}
    from_codes = {"kept": "*i8", "scale": "*fp32"}
    whole_row, num_warps = _packed_launch(MAX_PACKED_WIDTH)
    block = {"BLOCK": _GATED_BLOCK}
    return [
        _build(swiglu_kernel, name, forward, block, _NUM_WARPS),
        _build(swiglu_kernel, f"{name} codes", forward | of_codes, {"BLOCK": whole_row}, num_warps),
        _build(swiglu_backward_kernel, name, backward, block, _NUM_WARPS),
        _build(swiglu_backward_kernel, f"{name} codes", backward | from_codes, block, _NUM_WARPS),
    ]


def _build(
    kernel: Any, config: str, pointers: dict[str, str | None], constexprs: dict[str, Any], num_warps: int
) -> Build:
    return Build.of(kernel, config, pointers, constexprs, odd=("size1", "size2"), num_warps=num_warps)
