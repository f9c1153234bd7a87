"""The kernel of report_kernels, each time with another fault, and one with an array in local memory."""

import triton
import triton.language as tl
from report_kernels import product
from triton.language.extra import libdevice
from vpt_fast.kernels.build import Build


@triton.jit
def sine_kernel(a):
    elements = a + tl.arange(0, 128)
    tl.store(elements, libdevice.sin(tl.load(elements)))


def builds(arch):
    return [
        product("spills", 256, 128, wgmma=False, num_warps=1),
        Build(sine_kernel, "array", {"a": "*fp64"}, {}, ("a",), num_warps=4, num_stages=1, wgmma=False),
        product("no wgmma", 16, 32, wgmma=True),
        product("serialized", 128, 128, wgmma=True, block_k=64, max_registers=152),
        product("too many registers", 128, 128, wgmma=True, programs=4),
        product("too much shared memory", 64, 512, wgmma=False, block_k=512, num_warps=8),
        product("does not compile", 48, 32, wgmma=False),
    ]
