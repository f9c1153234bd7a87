"""The kernel of report_kernels, each time with another fault."""

from report_kernels import product


def builds(arch):
    return [
        product("spills", 256, 128, wgmma=False, num_warps=1),
        product("no wgmma", 16, 32, wgmma=True),
        product("too much shared memory", 64, 512, wgmma=False, block_k=512, num_warps=8),
        product("does not compile", 48, 32, wgmma=False),
    ]
