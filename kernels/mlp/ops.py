"""The MLP's activation, forward and backward, in Triton.

The functions have the signatures and the meaning of their twins in `reference`. Leading dimensions may have
any strides; the last one is contiguous. Arithmetic is in float32.
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
from vpt_fast.kernels.mlp.jit import (
    activate_backward_kernel,
    activate_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)
from vpt_fast.kernels.mlp.reference import ACTIVATIONS, PACKED
from vpt_fast.kernels.rows import Rows, leading_rows
from vpt_fast.kernels.torch_op import mark_changed, torch_op

ELEMENTWISE = tuple(kind for kind in ACTIVATIONS if kind not in PACKED)
MAX_PACKED_WIDTH = 8192
"""Of a gated unit whose derivatives are packed: its row of scales is found in one program."""
MAX_PROGRAMS = 2**31 - 1  # along the first axis of a grid
_BLOCK = 2048  # with 4 warps sixteen elements to a thread: 16-byte accesses, of 8-bit codes too
_GATED_BLOCK = 1024


def check_kind(kind: str, wanted: tuple[str, ...]) -> None:
    """ValueError for an activation that is not one of `wanted`."""
    if kind not in wanted:
        raise ValueError(f"activation: got {kind!r}, want one of {', '.join(map(repr, wanted))}")


def _packed_launch(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a whole gated row, eight elements of each half to a thread."""
    block = max(_GATED_BLOCK, next_power_of_2(width))
    return block, block // 256


@once_per_layout
def _forward_rows(kind: str, pack: bool, *, u: torch.Tensor) -> tuple[Rows, int]:
    """Rows of u and their width in the output; raises ValueError for what the kernel does not take."""
    check_kind(kind, ACTIVATIONS)
    require_device(u=u)
    require_dtype(DTYPES, u=u.dtype)
    if kind != "swiglu":
        return _rows_and_width(u=u)
    if u.shape[-1] % 2:
        raise ValueError(f"u: got width {u.shape[-1]}, want an even one: gate before value")
    width = u.shape[-1] // 2
    if pack and width > MAX_PACKED_WIDTH:
        raise ValueError(f"u: got width 2 x {width}, want at most 2 x {MAX_PACKED_WIDTH} to pack")
    return leading_rows(u=u), width


@once_per_layout
def _backward_rows(
    kind: str, *, grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Rows, int]:
    """Rows of grad and kept, and grad's width; raises ValueError for what the kernel does not take."""
    check_kind(kind, ACTIVATIONS)
    gated = kind == "swiglu"
    require_device(grad=grad, kept=kept, scale=scale)
    require_dtype(DTYPES, grad=grad.dtype)
    require_shape((*grad.shape[:-1], grad.shape[-1] * (2 if gated else 1)), kept=kept)
    if scale is not None and not gated:
        raise ValueError(f"scale: got one of shape {tuple(scale.shape)} for {kind!r}, want None")
    if scale is not None:
        require_dtype((torch.float32,), scale=scale.dtype)
        require_shape((*grad.shape[:-1], 2), scale=scale)
    if not gated:
        require_dtype((*DTYPES, torch.uint8), kept=kept.dtype)
        return _rows_and_width(grad=grad, kept=kept)
    require_dtype(DTYPES if scale is None else (torch.int8,), kept=kept.dtype)
    return leading_rows(grad=grad, kept=kept), grad.shape[-1]


def _rows_and_width(**tensors: torch.Tensor) -> tuple[Rows, int]:
    """A contiguous tensor, or several of one shape, is a single row."""
    first = next(iter(tensors.values()))
    if all(tensor.is_contiguous() for tensor in tensors.values()):
        return leading_rows(**{name: tensor.view(1, -1) for name, tensor in tensors.items()}), first.numel()
    return leading_rows(**tensors), first.shape[-1]


def _grid(rows: Rows, width: int, block: int) -> tuple[int]:
    programs = rows.num_rows * cdiv(width, block)
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"u: got {rows.num_rows} rows of {width}, want at most {MAX_PROGRAMS} blocks of {block}"
        )
    return (programs,)


def _empty_forward(u: torch.Tensor, kind: str, pack: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, codes, scale; what is not wanted has no elements."""
    gated = kind == "swiglu"
    width = u.shape[-1] // 2 if gated else u.shape[-1]
    return (
        torch.empty(*u.shape[:-1], width, dtype=u.dtype, device=u.device),
        torch.empty(u.shape if pack else (0,), dtype=torch.int8 if gated else torch.uint8, device=u.device),
        torch.empty((*u.shape[:-1], 2) if pack and gated else (0,), dtype=torch.float32, device=u.device),
    )


@torch_op("activate")
def _activate(u: torch.Tensor, kind: str, pack: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = _forward_rows(kind, pack, u=u)
    a, codes, scale = _empty_forward(u, kind, pack)
    _launch_forward(u, a, codes if pack else None, scale if pack else None, kind, rows, width)
    return a, codes, scale


@torch.library.register_fake("vpt_fast::activate")
def _(u: torch.Tensor, kind: str, pack: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_forward(u, kind, pack)


def _empty_codes(u: torch.Tensor, pack: bool) -> torch.Tensor:
    return torch.empty(u.shape if pack else (0,), dtype=torch.uint8, device=u.device)


@torch_op("activate_", mutates_args=("u",))
def _activate_(u: torch.Tensor, kind: str, pack: bool) -> torch.Tensor:
    check_kind(kind, ELEMENTWISE)
    if not u.is_contiguous():
        raise ValueError(f"u: got strides {u.stride()} of {tuple(u.shape)}, want a contiguous one")
    rows, width = _forward_rows(kind, pack, u=u)
    codes = _empty_codes(u, pack)
    _launch_forward(u, u, codes if pack else None, None, kind, rows, width)
    mark_changed(u)
    return codes


@torch.library.register_fake("vpt_fast::activate_")
def _(u: torch.Tensor, kind: str, pack: bool) -> torch.Tensor:
    return _empty_codes(u, pack)


def _launch_forward(
    u: torch.Tensor,
    a: torch.Tensor,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    kind: str,
    rows: Rows,
    width: int,
) -> None:
    """Into a, which is contiguous and, of a kind that is not gated, may be u."""
    if a.numel() == 0:
        return
    block, num_warps = _BLOCK, 4
    if kind == "swiglu":
        block, num_warps = (_GATED_BLOCK, 4) if codes is None else _packed_launch(width)
    grid = _grid(rows, width, block)
    address = (width, *rows.sizes[1:], *rows.strides[0])
    with on_device(u):
        if kind == "swiglu":
            swiglu_kernel[grid](u, a, codes, scale, *address, BLOCK=block, num_warps=num_warps)
        else:
            activate_kernel[grid](u, a, codes, *address, KIND=kind, BLOCK=block, num_warps=num_warps)


@torch_op("activate_backward")
def _activate_backward(
    grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> torch.Tensor:
    rows, width = _backward_rows(kind, grad=grad, kept=kept, scale=scale)
    grad_u = torch.empty(kept.shape, dtype=grad.dtype, device=grad.device)
    _launch_backward(grad, kept, scale, grad_u, kind, rows, width)
    return grad_u


@torch.library.register_fake("vpt_fast::activate_backward")
def _(grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str) -> torch.Tensor:
    return torch.empty(kept.shape, dtype=grad.dtype, device=grad.device)


@torch_op("activate_backward_", mutates_args=("grad",))
def _activate_backward_(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    check_kind(kind, ELEMENTWISE)
    if not grad.is_contiguous():
        raise ValueError(f"grad: got strides {grad.stride()} of {tuple(grad.shape)}, want a contiguous one")
    rows, width = _backward_rows(kind, grad=grad, kept=kept, scale=None)
    _launch_backward(grad, kept, None, grad, kind, rows, width)
    mark_changed(grad)


@torch.library.register_fake("vpt_fast::activate_backward_")
def _(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    return None


def _launch_backward(
    grad: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor | None,
    grad_u: torch.Tensor,
    kind: str,
    rows: Rows,
    width: int,
) -> None:
    """Into grad_u, which is contiguous and, of a kind that is not gated, may be grad."""
    if grad_u.numel() == 0:
        return
    block = _GATED_BLOCK if kind == "swiglu" else _BLOCK
    grid = _grid(rows, width, block)
    address = (width, *rows.sizes[1:], *rows.strides[0], *rows.strides[1])
    with on_device(grad):
        if kind == "swiglu":
            scale = None if scale is None else scale.contiguous()
            swiglu_backward_kernel[grid](grad, kept, scale, grad_u, *address, BLOCK=block, num_warps=4)
        else:
            activate_backward_kernel[grid](grad, kept, grad_u, *address, KIND=kind, BLOCK=block, num_warps=4)


def activate(
    u: torch.Tensor, kind: str, *, pack: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`reference.activate` in one pass over u."""
    a, codes, scale = _activate(u, kind, pack)
    return a, codes if pack else None, scale if pack and kind == "swiglu" else None


def activate_(u: torch.Tensor, kind: str, *, pack: bool = False) -> torch.Tensor | None:
    """`reference.activate_` in one pass over u."""
    codes = _activate_(u, kind, pack)
    return codes if pack else None


def activate_backward(
    grad: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """`reference.activate_backward` in one pass over all that it reads."""
    return _activate_backward(grad, kept, scale, kind)


def activate_backward_(grad: torch.Tensor, kept: torch.Tensor, kind: str) -> None:
    """`reference.activate_backward_` in one pass over all that it reads."""
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
    """With codes forward and without them backward: the longer of each."""
    floats = f"*{TYPE_NAMES[dtype]}"
    config = f"{TYPE_NAMES[dtype]} {kind}"
    constexprs = {"KIND": kind, "BLOCK": _BLOCK}
    forward = {"u": floats, "a": floats, "codes": "*u8"}
    backward = {"grad": floats, "kept": floats, "grad_u": floats}
    return [
        _build(activate_kernel, f"{config} codes", forward, ("u",), constexprs, 4),
        _build(activate_backward_kernel, config, backward, ("grad", "kept"), constexprs, 4),
    ]


def _gated_builds(dtype: torch.dtype) -> list[Build]:
    """With codes, of the widest row that is taken, and without."""
    floats = f"*{TYPE_NAMES[dtype]}"
    name = TYPE_NAMES[dtype]
    forward, codes = {"u": floats, "a": floats}, {"codes": "*i8", "scale": "*fp32"}
    one_row, num_warps = _packed_launch(MAX_PACKED_WIDTH)
    from_u = {"grad": floats, "kept": floats, "grad_u": floats}
    from_codes = {"grad": floats, "kept": "*i8", "scale": "*fp32", "grad_u": floats}
    inputs, block = ("grad", "kept"), {"BLOCK": _GATED_BLOCK}
    return [
        _build(swiglu_kernel, name, forward, ("u",), {"codes": None, "scale": None, **block}, 4),
        _build(swiglu_kernel, f"{name} codes", forward | codes, ("u",), {"BLOCK": one_row}, num_warps),
        _build(swiglu_backward_kernel, name, from_u, inputs, {"scale": None, **block}, 4),
        _build(swiglu_backward_kernel, f"{name} codes", from_codes, inputs, block, 4),
    ]


def _build(
    kernel: Any,
    config: str,
    pointers: dict[str, str],
    inputs: tuple[str, ...],
    constexprs: dict[str, Any],
    num_warps: int,
) -> Build:
    """In the kernel's order: pointers, width and numbers of rows, strides of the inputs."""
    strides = [f"{name}_stride{dim}" for name in inputs for dim in range(3)]
    integers = ["width", "size1", "size2", *strides]
    return Build(
        kernel=kernel,
        config=config,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs=constexprs,
        divisible=(*pointers, "width", *strides),
        num_warps=num_warps,
        num_stages=3,
        wgmma=False,
    )
