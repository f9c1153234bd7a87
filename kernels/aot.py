"""The GPU resources that kernels use, read from builds made ahead of time, without a GPU."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.launch import ROUNDING

# Bytes of shared memory available to one program; neither a build nor its machine code enforces it. sm_80
# has 163 KiB, and shares its tiles with the GPUs that have the least.
SHARED_LIMIT = {
    **dict.fromkeys((80, 86, 89, 120), 101_376),
    **dict.fromkeys((90, 100, 103), 232_448),
}
# Columns of tensor memory available to one program, and to all programs on an SM together (sm_100, sm_103).
TMEM_LIMIT = 512
# What the programs on an SM share: registers, allocated to a thread in units of 8, and threads. The SM's
# shared memory is one program's limit plus 1 KiB; every program takes 1 KiB beyond what it requests.
REGISTERS, REGISTER_UNIT = 65_536, 8
THREADS = {**dict.fromkeys((80, 86, 89, 120), 1536), **dict.fromkeys((90, 100, 103), 2048)}
SHARED_OVERHEAD = 1024

LOG_FILE = "ptxas.log"  # in Triton's cache
# In the log of ptxas -v: registers and bytes of stack and of spill stores per thread, and the remark that it
# waits for every wgmma before it issues the next.
REGISTERS_USED = re.compile(r"Used (\d+) registers")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
SERIALIZED = "wgmma.mma_async instructions are serialized"
# In PTX: matrix instructions, each of which is one in machine code too; loads from global memory, in
# elements of so many bits, and copies to shared memory, in bytes.
WGMMA, TCGEN05, MMA_SYNC = (
    re.compile(rf"\b{name}\b") for name in (r"wgmma\.mma_async", r"tcgen05\.mma", r"mma\.sync")
)
LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (\w+)")


@dataclass(frozen=True)
class Resources:
    """Resources of one build.

    Attributes:
        registers: per thread.
        stack_bytes: local memory of a thread: what it spills, and arrays that it cannot keep in registers
            (such as that of sin's range reduction).
        spill_bytes: bytes that a thread stores to local memory for lack of registers. A slot of the stack
            serves many of these stores.
        shared_bytes: shared memory of one program.
        programs: how many of them fit on an SM at once; while one waits, the others work.
        tmem_columns: tensor memory of one program; 0 except on sm_100 and sm_103.
        wgmma, tcgen05, mma_sync: matrix instructions in its code: of sm_90 (HGMMA), of sm_100 (UTCHMMA) and
            of every architecture (HMMA). Matmuls in float32 ("ieee") use none of them.
        serialized: whether every wgmma is waited for before the next is issued; ptxas does so if it has to
            move accumulators in between.
        global_loads: number of loads from global memory by width in bits, per thread; TMA loads are not
            counted.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    tmem_columns: int
    wgmma: int
    tcgen05: int
    mma_sync: int
    serialized: bool
    global_loads: dict[int, int]

    def problems(self, build: Build, arch: int) -> list[str]:
        """Why it should not be launched on `arch`; empty if it is clean."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        elif self.stack_bytes:
            found.append(f"keeps {self.stack_bytes} bytes in local memory")
        if self.shared_bytes > SHARED_LIMIT[arch]:
            found.append(f"shared memory {self.shared_bytes} over {SHARED_LIMIT[arch]} bytes")
        if self.tmem_columns > TMEM_LIMIT:
            found.append(f"tensor memory {self.tmem_columns} over {TMEM_LIMIT} columns")
        if arch == 90 and 0 < self.programs < build.programs:
            found.append(f"{self.programs} programs on an SM, want {build.programs}")
        if arch == 90 and build.wgmma and not self.wgmma:
            found.append("no wgmma")
        if self.serialized:
            found.append("serialized wgmma")
        return found


def measure(build: Build, arch: int) -> Resources:
    """Compiles for sm_`arch`, one of `SHARED_LIMIT`, and reads the resources that the build uses.

    They are read from its PTX and from what the assembler says of it. Disassembling the machine code would
    tell the same, and takes as long as compiling.

    Raises:
        RuntimeError: Triton's interpreter is on, under which nothing is compiled.
    """
    compiled, log = compile_build(build, arch)
    used, stack = REGISTERS_USED.search(log), STACK.search(log)
    if used is None or stack is None:
        raise RuntimeError(f"ptxas does not say what {build.name} uses: {log[:500]!r}")
    registers, stack_bytes, spill_bytes = int(used[1]), int(stack[1]), int(stack[2])
    shared_bytes = compiled.metadata.shared
    tmem_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    ptx = compiled.asm["ptx"]
    global_loads = Counter(int(length or 1) * int(bits) for length, bits in LOAD.findall(ptx))
    global_loads.update(8 * int(size, 0) for size in COPY.findall(ptx))
    return Resources(
        registers=registers,
        stack_bytes=stack_bytes,
        spill_bytes=spill_bytes,
        shared_bytes=shared_bytes,
        programs=count_programs(
            arch, 32 * compiled.metadata.num_warps, registers, shared_bytes, tmem_columns
        ),
        tmem_columns=tmem_columns,
        wgmma=len(WGMMA.findall(ptx)),
        tcgen05=len(TCGEN05.findall(ptx)),
        mma_sync=len(MMA_SYNC.findall(ptx)),
        serialized=SERIALIZED in log,
        global_loads=dict(sorted(global_loads.items())),
    )


def count_programs(arch: int, threads: int, registers: int, shared_bytes: int, tmem_columns: int) -> int:
    """How many programs with these resources fit on one SM of sm_`arch` at once."""
    registers += -registers % REGISTER_UNIT
    limits = [
        THREADS[arch] // threads,
        REGISTERS // (registers * threads),
        (SHARED_LIMIT[arch] + SHARED_OVERHEAD) // (shared_bytes + SHARED_OVERHEAD),
    ]
    if tmem_columns:
        limits.append(TMEM_LIMIT // tmem_columns)
    return min(limits)


def compile_build(build: Build, arch: int) -> tuple[Any, str]:
    """Triton's compiled kernel for sm_`arch`, and the log of `ptxas -v`."""
    if triton.knobs.runtime.interpret or not isinstance(build.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{build.kernel.__name__}: kernels are not compiled under Triton's interpreter; "
            "want TRITON_INTERPRET unset before triton is imported"
        )
    arg_names = build.kernel.arg_names
    source_type: Any = ASTSource
    if build.kernel.is_gluon():
        from triton.experimental.gluon import _runtime

        source_type = _runtime.GluonASTSource
    source = source_type(
        fn=build.kernel,
        signature={name: build.signature.get(name, "constexpr") for name in arg_names},
        constexprs=dict(build.constexprs),
        attrs={(arg_names.index(name),): [["tt.divisibility", 16]] for name in build.divisible},
    )
    options = dict(num_warps=build.num_warps, maxnreg=build.max_registers, **ROUNDING)
    if build.num_stages is not None:
        options["num_stages"] = build.num_stages

    def compile_and_log() -> tuple[Any, str]:
        # Triton prints the log, and drops it.
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        return compiled, log.getvalue()

    # The log is kept beside the build in Triton's cache. A build that a launch has put there has none.
    compiled, log = compile_and_log()
    cache = get_cache_manager(compiled.hash)
    file = cache.get_file(LOG_FILE)
    if not log and file is not None:
        return compiled, Path(file).read_text()
    if not log:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            compiled, log = compile_and_log()
    cache.put(log, LOG_FILE, binary=False)
    return compiled, log
