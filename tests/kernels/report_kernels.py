"""A small kernel to report on, in configurations without a fault."""

import triton
import triton.language as tl
from vpt_fast.kernels.build import Build


@triton.jit
def product_kernel(a, b, c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x = tl.load(a + rows[:, None] * BLOCK_K + k[None, :])
    y = tl.load(b + k[:, None] * BLOCK_N + columns[None, :])
    tl.store(c + rows[:, None] * BLOCK_N + columns[None, :], tl.dot(x, y))


def product(config, block_m, block_n, *, wgmma, block_k=16, num_warps=4, divisible=("a", "b", "c"), **more):
    return Build(
        kernel=product_kernel,
        config=config,
        signature={"a": "*fp16", "b": "*fp16", "c": "*fp32"},
        constexprs={"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
        divisible=divisible,
        num_warps=num_warps,
        num_stages=1,
        wgmma=wgmma,
        **more,
    )


def builds(arch):
    return [
        product("64x32", 64, 32, wgmma=True),
        product("16x32", 16, 32, wgmma=False),
        product("64x32 unaligned", 64, 32, wgmma=True, divisible=()),
    ]
