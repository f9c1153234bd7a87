"""fc1 with its activation, and the gradient through fc2 with the activation's derivative, as one GEMM each.

This saves the round trip through memory of the pre-activation (forward) or of the gradient of the
activation's output (backward). `dispatch.fused_mlp_pays` says where it beats a library's GEMM followed by the
kernels in `ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.checks import once_per_layout, require_device, require_dtype, require_shape
from vpt_fast.kernels.launch import DTYPES, MAX_PROGRAMS, TYPE_NAMES, Launch, arch_of, cdiv, num_sms
from vpt_fast.kernels.mlp.descriptors import Block, DescriptorLaunch, Plan, row_stride
from vpt_fast.kernels.mlp.gemm_jit import (
    linear_activate_backward_kernel,
    linear_activate_backward_tma_kernel,
    linear_activate_kernel,
    linear_activate_tma_kernel,
)
from vpt_fast.kernels.mlp.ops import ELEMENTWISE, check_kind
from vpt_fast.kernels.rows import MAX_ROWS, Rows, leading_rows, require_contiguous_rows
from vpt_fast.kernels.torch_op import torch_op


def _config(dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """Tiles, warps and stages of the kernels that use pointers.

    Three stages of 16-bit tiles take 96 KiB, so two programs fit on an SM of sm_90 and the epilogue of one
    overlaps with the main loop of the other; not in backward from u, whose 165 registers (Triton 3.8) leave
    room for one. float32 has no tensor cores at full precision, and unaligned operands are loaded element by
    element, each with its own address: both need small tiles, or registers spill; without alignment, on
    sm_120, eight warps too.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    if not aligned:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def _tma_config() -> dict[str, int]:
    """The same for the kernels that use descriptors, in 16 bits. Two programs per SM here too: larger tiles,
    with one, were slower on an H200. DELAY, in ns, is about what an epilogue takes, judged from its
    instructions: not timed yet; benchmarks/tune.py tries other delays, and none."""
    return {**_config(torch.bfloat16, aligned=True), "DELAY": 3000}


SPECIALIZED = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_stages": 3}
"""The same for kernels whose warpgroups do different work (`gemm_specialized`), on sm_90. Not timed yet:
only benchmarks/tune.py and tests put it in the place of `_tma_config`'s."""


# Half of the programs start later only if each has at least this many tiles, to win back the delay.
_TILES_TO_DELAY = 8

# Bytes of shared memory that each of two programs on an SM may have, on sm_90 and sm_100.
_SHARED_OF_TWO = 228 * 1024 // 2 - 1024


def _programs_per_sm(config: dict[str, int]) -> int:
    """How many programs of a kernel with descriptors an SM is to hold: two if every thread can have 128
    registers, half of them for accumulators, and shared memory suffices for both. The epilogue of one then
    overlaps with the main loop of the other."""
    threads, (m, n, k) = 32 * config["num_warps"], (config[f"BLOCK_{side}"] for side in "MNK")
    shared = 2 * (config["num_stages"] * (m + n) * k + m * n // 2)  # operands, and half a tile of results
    return 2 if threads <= 256 and m * n <= 64 * threads and shared <= _SHARED_OF_TWO else 1


def _aligned(rows: Rows, weight: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Whether sizes, strides and addresses are all multiples of 16, so that Triton uses 16-byte loads."""
    strides = [stride for of_tensor in rows.strides for stride in of_tensor]
    addresses = [tensor.data_ptr() for tensor in (weight, *tensors)]
    return not any(number % 16 for number in (*weight.shape, weight.stride(0), *strides, *addresses))


def has_descriptors(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are moved by descriptors on this device, if their layout allows it."""
    return arch_of(device) >= 90 and dtype.itemsize == 2


def _takes_descriptors(rows: Rows, weight: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Whether aligned tensors are moved by descriptors: only if their rows form a single dimension, and do
    not overlap, as those of an expanded tensor do. CUDA asks for a stride of at least a row."""
    is_matrix = rows.sizes[1:] == (1, 1) and 0 not in weight.shape
    is_apart = all(row_stride(t) >= t.shape[-1] for t in (weight, *tensors))
    return is_matrix and is_apart and has_descriptors(weight.device, weight.dtype)


def _count_tiles(num_rows: int, num_columns: int, config: dict[str, int]) -> int:
    tiles = cdiv(num_rows, config["BLOCK_M"]) * cdiv(num_columns, config["BLOCK_N"])
    if num_columns > MAX_ROWS or tiles > MAX_PROGRAMS:  # columns have int32 indices too
        raise ValueError(f"rows: got {num_rows} x {num_columns} results, more than one launch can number")
    return tiles


def _columns(is_backward: bool, config: dict[str, int], pack: bool) -> int:
    """Columns of a result's tile that the epilogue processes at a time. Its stores pass through shared
    memory; if codes are stored too, half as many columns leave room for a second program."""
    parts = 4 if pack and not is_backward else 2
    return config["BLOCK_N"] // parts


def _plan(is_backward: bool, config: dict[str, int], kind: str, pack: bool, arch: int) -> Plan:
    """How the kernel with descriptors is launched, for forward or backward. pack: whether the derivative is
    kept in 8 bits."""
    if "num_warps" not in config:  # SPECIALIZED, or another candidate of its kind: their warps are fixed
        from vpt_fast.kernels.mlp import gemm_specialized

        return gemm_specialized.plan(is_backward, config, kind)
    m, n, k = (config[f"BLOCK_{side}"] for side in "MNK")
    programs_per_sm, part = _programs_per_sm(config), (m, _columns(is_backward, config, pack))
    # Left to itself, ptxas takes up to 190 registers, depending on Triton's version, which leaves no room for
    # a second program. The limit is for sm_90: on sm_100 it would make backward spill.
    options = {**config, "KIND": kind, "maxnreg": 128 if programs_per_sm == 2 and arch == 90 else None}
    blocks: list[Block | None]
    if is_backward:
        blocks = [(m, k), (k, n), (m, n), part]
        return Plan(linear_activate_backward_tma_kernel, blocks, programs_per_sm, options)
    options["COLUMNS"] = part[1]
    blocks = [(m, k), (n, k), None, part, part, part]
    return Plan(linear_activate_tma_kernel, blocks, programs_per_sm, options)


def _descriptor_launch(plan: Plan, device: torch.device, num_tiles: int, **sizes: int) -> DescriptorLaunch:
    """sizes: the kernel's integers, by name; a stride that a descriptor holds may be among them. Off the GPU
    there is no delay: there is no clock to wait by."""
    programs = min(num_tiles, plan.programs_per_sm * num_sms(device))
    if "DELAY" in plan.options and (num_tiles < _TILES_TO_DELAY * programs or device.type != "cuda"):
        plan = plan._replace(options={**plan.options, "DELAY": 0})
    return DescriptorLaunch(plan, device, programs, tuple(sizes[name] for name in plan.integers))


@once_per_layout
def _forward_launch(
    kind: str, pack: bool, keep: bool, *, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Launch | DescriptorLaunch:
    """Raises ValueError for what the kernel does not take."""
    check_kind(kind, ELEMENTWISE)
    require_device(x=x, weight=weight, bias=bias)
    require_dtype(DTYPES, x=x.dtype)
    require_dtype((x.dtype,), weight=weight.dtype)
    num_columns, depth = weight.shape
    require_shape((*x.shape[:-1], depth), x=x)
    require_shape((num_columns,), bias=bias)
    require_contiguous_rows(weight=weight, bias=bias)
    if bias is not None:
        require_dtype(DTYPES, bias=bias.dtype)
    rows = leading_rows(x=x)
    aligned = _aligned(rows, weight, x)
    by_descriptors = aligned and _takes_descriptors(rows, weight, x)
    config = _tma_config() if by_descriptors else _config(x.dtype, aligned)
    num_tiles = _count_tiles(rows.num_rows, num_columns, config)
    sizes = dict(M=rows.num_rows, N=num_columns, K=depth)
    if by_descriptors:
        plan = _plan(False, config, kind, pack, arch_of(x.device))
        return _descriptor_launch(plan, x.device, num_tiles, **sizes)
    return Launch(
        linear_activate_kernel,
        x.device,
        num_tiles,
        *sizes.values(),
        *rows.sizes[1:],
        *rows.strides[0],
        weight.stride(0),
        KIND=kind,
        EVEN_K=depth % config["BLOCK_K"] == 0,
        **config,
    )


@once_per_layout
def _backward_launch(
    kind: str, *, grad: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor
) -> Launch | DescriptorLaunch:
    """Raises ValueError for what the kernel does not take."""
    check_kind(kind, ELEMENTWISE)
    require_device(grad=grad, weight=weight, kept=kept)
    require_dtype(DTYPES, grad=grad.dtype)
    require_dtype((grad.dtype,), weight=weight.dtype)
    require_dtype((*DTYPES, torch.uint8), kept=kept.dtype)
    depth, num_columns = weight.shape
    require_shape((*grad.shape[:-1], depth), grad=grad)
    require_shape((*grad.shape[:-1], num_columns), kept=kept)
    require_contiguous_rows(weight=weight)
    rows = leading_rows(grad=grad, kept=kept)
    aligned = _aligned(rows, weight, grad, kept)
    takes_descriptors = _takes_descriptors(rows, weight, grad, kept)
    by_descriptors = aligned and kept.dtype != torch.float32 and takes_descriptors
    config = _tma_config() if by_descriptors else _config(grad.dtype, aligned)
    num_tiles = _count_tiles(rows.num_rows, num_columns, config)
    sizes = dict(M=rows.num_rows, N=num_columns, K=depth)
    if by_descriptors:
        plan = _plan(True, config, kind, False, arch_of(grad.device))
        return _descriptor_launch(plan, grad.device, num_tiles, **sizes, kept_stride=row_stride(kept))
    return Launch(
        linear_activate_backward_kernel,
        grad.device,
        num_tiles,
        *sizes.values(),
        *rows.sizes[1:],
        *rows.strides[0],
        *rows.strides[1],
        weight.stride(0),
        KIND=kind,
        EVEN_K=depth % config["BLOCK_K"] == 0,
        **config,
    )


def _empty_forward(x: torch.Tensor, weight: torch.Tensor, pack: bool, keep: bool) -> list[torch.Tensor]:
    """a; with `keep` also u, or codes if packed."""
    shape = (*x.shape[:-1], weight.shape[0])
    outputs = [x.new_empty(shape)]
    if keep:
        outputs.append(x.new_empty(shape, dtype=torch.uint8 if pack else x.dtype))
    return outputs


@torch_op("linear_activate")
def _linear_activate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, pack: bool, keep: bool
) -> list[torch.Tensor]:
    launch = _forward_launch(kind, pack, keep, x=x, weight=weight, bias=bias)
    outputs = _empty_forward(x, weight, pack, keep)
    a, kept = outputs[0], outputs[-1] if keep else None
    launch(x, weight, bias, a, *((None, kept) if pack else (kept, None)))
    return outputs


@torch.library.register_fake("vpt_fast::linear_activate")
def _(x, weight, bias, kind, pack, keep):
    return _empty_forward(x, weight, pack, keep)


@torch_op("linear_activate_backward")
def _linear_activate_backward(
    grad: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, kind: str
) -> torch.Tensor:
    launch = _backward_launch(kind, grad=grad, weight=weight, kept=kept)
    grad_u = grad.new_empty(kept.shape)
    launch(grad, weight, kept, grad_u)
    return grad_u


@torch.library.register_fake("vpt_fast::linear_activate_backward")
def _(grad, weight, kept, kind):
    return grad.new_empty(kept.shape)


def linear_activate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    *,
    pack: bool = False,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """act(x weightᵀ + bias), and what backward needs of it.

    Args:
        x: (..., k), bfloat16, float16 or float32, up to three leading dimensions with any strides.
        weight: (n, k), dtype of x.
        bias: (n,), any of those dtypes, or None.
        kind: an activation that is not gated.
        pack: keep the derivative in 8 bits, as `ops.activate` codes it, not the pre-activation.
        keep: False keeps neither.

    Returns:
        a (..., n) in x's dtype; the pre-activation u (..., n) in x's dtype, or None; codes (..., n), uint8,
        or None. Both a and codes are computed from u in float32.

    Raises:
        ValueError: an activation, dtype, shape, device or stride that it does not take.
    """
    a, kept = (*_linear_activate(x, weight, bias, kind, pack, keep), None)[:2]
    return (a, None, kept) if pack else (a, kept, None)


def linear_activate_backward(
    grad: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, kind: str
) -> torch.Tensor:
    """(grad weight) · act'(u): the pre-activation's gradient from that of the next layer's output.

    Args:
        grad: (..., k), bfloat16, float16 or float32.
        weight: (k, n) of that layer, dtype of grad.
        kept: u (..., n), floating, or codes (..., n), uint8.
        kind: the activation, one that is not gated.

    Returns:
        (..., n) in grad's dtype.

    Raises:
        ValueError: an activation, dtype, shape, device or stride that it does not take.
    """
    return _linear_activate_backward(grad, weight, kept, kind)


def builds(arch: int) -> list[Build]:
    """GELU in bfloat16, with u and with codes, for even and ragged k, and for unaligned tensors; the longest
    variants in other dtypes; on sm_90 and newer also the kernels with descriptors.

    `arch` makes no other difference to the launch than the limit of registers. Other activations change a few
    instructions of the epilogue, and GELU's is the longest.
    """
    bf16 = torch.bfloat16
    found = [_forward_build(bf16, pack, even_k) for even_k in (True, False) for pack in (False, True)]
    found += [_backward_build(bf16, pack, even_k) for even_k in (True, False) for pack in (False, True)]
    for dtype in (torch.float16, torch.float32):
        found += [_forward_build(dtype, True, True), _backward_build(dtype, False, True)]
    for dtype in (bf16, torch.float32):
        found += [_forward_build(dtype, True, False, False), _backward_build(dtype, False, False, False)]
    for config in [_tma_config()] * (arch >= 90) + [SPECIALIZED] * (arch == 90):
        for dtype, pack in ((bf16, False), (bf16, True), (torch.float16, False)):
            found += [_tma_build(is_backward, config, dtype, pack, arch) for is_backward in (False, True)]
    return found


def _forward_build(dtype: torch.dtype, pack: bool, even_k: bool, aligned: bool = True) -> Build:
    floats = f"*{TYPE_NAMES[dtype]}"
    pointers = dict.fromkeys(("x", "weight", "bias", "a"), floats)
    pointers |= {"u": None, "codes": "*u8"} if pack else {"u": floats, "codes": None}
    return _build(linear_activate_kernel, dtype, pack, even_k, aligned, pointers)


def _backward_build(dtype: torch.dtype, pack: bool, even_k: bool, aligned: bool = True) -> Build:
    floats = f"*{TYPE_NAMES[dtype]}"
    pointers = {"grad": floats, "weight": floats, "kept": "*u8" if pack else floats, "grad_u": floats}
    return _build(linear_activate_backward_kernel, dtype, pack, even_k, aligned, pointers)


def _build(
    kernel: Any,
    dtype: torch.dtype,
    pack: bool,
    even_k: bool,
    aligned: bool,
    pointers: dict[str, str | None],
) -> Build:
    config = _config(dtype, aligned)
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    tile = f"{config['BLOCK_M']}x{config['BLOCK_N']}x{config['BLOCK_K']}"
    kept = "codes" if pack else "u"
    remarks = f"{'' if even_k else ' ragged k'}{'' if aligned else ' not aligned'}"
    return Build.of(
        kernel,
        f"{TYPE_NAMES[dtype]} gelu {kept} {tile}{remarks}",
        pointers,
        {"KIND": "gelu", "EVEN_K": even_k, **config},
        odd=("M", "size1", "size2") if aligned else kernel.arg_names,
        num_warps=num_warps,
        num_stages=num_stages,
        wgmma=dtype != torch.float32,
    )


def _tma_build(is_backward: bool, config: dict[str, int], dtype: torch.dtype, pack: bool, arch: int) -> Build:
    plan = _plan(is_backward, config, "gelu", pack, arch)
    absent: tuple[str, ...] = ()
    dtypes = dict.fromkeys(plan.tensors, dtype)
    if is_backward:
        dtypes["kept"] = torch.uint8 if pack else dtype
    else:
        dtypes["codes"] = torch.uint8
        absent = ("u" if pack else "codes",)
    tile = "x".join(str(config[f"BLOCK_{side}"]) for side in "MNK")
    kept = "codes" if pack else "u"
    # Only what is addressed by pointers is specialised for multiples of 16.
    pointers = [name for name, block in zip(dtypes, plan.blocks, strict=True) if block is None]
    multiples = [*pointers, *(name for name in plan.integers if name not in ("M", "K"))] if pointers else []
    divisible = tuple(name for name in multiples if name not in absent)
    return plan.build(f"{TYPE_NAMES[dtype]} gelu {kept} {tile}", dtypes, absent, divisible)
