"""How the kernels of `gemm_specialized_jit` are launched. This imports Gluon, which Triton may still change;
so `gemm` imports this only where it launches these kernels or builds them ahead of time."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from vpt_fast.kernels.mlp.descriptors import Block, Plan
from vpt_fast.kernels.mlp.gemm_specialized_jit import (
    linear_activate_backward_specialized_kernel,
    linear_activate_specialized_kernel,
)

WARPS = 4  # of a warpgroup; a program has three of them
# Registers of a thread when a program begins: those of an SM, 65,536, for 384 threads, in units of 8. The
# warpgroups then divide them. In those that multiply, each thread holds 128 sums. The first, which loads too,
# gets what the others leave, 200. With fewer for the one that finishes, some activation's build spills in
# Triton 3.6, 3.8 or 3.9.
REGISTERS, MULTIPLY_REGISTERS, FINISH_REGISTERS = 168, 168, 136
COLUMNS = 64  # of a tile that are finished at a time: 128 bytes, a whole row of swizzled shared memory

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def _layout(dtype: torch.dtype, block: Block) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


def plan(is_backward: bool, config: dict[str, int], kind: str) -> Plan:
    """How the kernel is launched, for forward or backward. config: `gemm.SPECIALIZED`, or another such."""
    m, n, k = (config[f"BLOCK_{side}"] for side in "MNK")
    if is_backward:
        kernel = linear_activate_backward_specialized_kernel
        blocks: list[Block | None] = [(m, k), (k, n), None, None]
    else:
        kernel = linear_activate_specialized_kernel
        blocks = [(m, k), (n, k), None, None, None, None]
    options = {
        "KIND": kind,
        "COLUMNS": COLUMNS,
        "GROUP": config["GROUP"],
        "STAGES": config["num_stages"],
        "MULTIPLY_REGISTERS": MULTIPLY_REGISTERS,
        "FINISH_REGISTERS": FINISH_REGISTERS,
        "num_warps": WARPS,
        "maxnreg": REGISTERS,
    }
    return Plan(kernel, blocks, 1, options, TensorDescriptor, _layout)
