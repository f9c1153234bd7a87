"""The GPU resources that kernels use, read from machine code that is built ahead of time, without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from vpt_fast.kernels.build import Build

# Bytes of shared memory available to one program; neither a build nor its machine code enforces it. Builds
# for sm_80 also run on sm_86, sm_89 and sm_120, which have the least: 99 KiB.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
# Columns of tensor memory available to one program, and to all programs on an SM together (sm_100 only).
TMEM_LIMIT = 512
# What the programs on an SM share: registers, allocated to a thread in units of 8, and threads. The SM's
# shared memory is one program's limit plus 1 KiB; every program takes 1 KiB beyond what it requests.
REGISTERS, REGISTER_UNIT = 65_536, 8
THREADS = {80: 1536, 90: 2048, 100: 2048}
SHARED_OVERHEAD = 1024

# Registers and stack of a function, as cuobjdump prints them.
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
# Captures the instruction's name in "        /*0070*/              @!P0 STL.64 [R1+0x8], R4 ;".
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# The instruction that waits for wgmma; an operation in Triton's IR that is compiled to one or more wgmma.
WGMMA_WAIT = "WARPGROUP.DEPBAR.LE"
PRODUCT = re.compile(r"ttng\.warp_group_dot ")
WIDTH = re.compile(r"[US]?(8|16|32|64|128|256)")


@dataclass(frozen=True)
class Resources:
    """Resources of one build.

    Attributes:
        registers: per thread.
        spill_bytes: bytes that a thread stores to local memory (STL), counted in the machine code. That is
            the "spill stores" of ptxas -v to the byte, except that a local array (such as that of sin's range
            reduction) counts too; no kernel here should have one. The stack size would say less, since one
            slot serves many spills.
        shared_bytes: shared memory of one program.
        programs: how many of them fit on an SM at once; while one waits, the others work.
        tmem_columns: tensor memory of one program; 0 except on sm_100.
        wgmma, tcgen05, mma_sync: matrix instructions in its code: of sm_90 (HGMMA), of sm_100 (UTCHMMA) and
            of every architecture (HMMA). Matmuls in float32 ("ieee") use none of them.
        serialized: whether every wgmma is waited for before the next is issued, although a matmul has
            several: ptxas does so if it has to move accumulators in between, and says it in a remark only.
        global_loads: number of loads from global memory by width in bits, per thread; TMA loads are not
            counted.

    What is counted in the machine code is None, and spill_bytes 0, if that was not read.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    tmem_columns: int
    wgmma: int | None = None
    tcgen05: int | None = None
    mma_sync: int | None = None
    serialized: bool | None = None
    global_loads: dict[int, int] | None = None

    def problems(self, build: Build, arch: int) -> list[str]:
        """Why it should not be launched on `arch`; empty if it is clean."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[arch]:
            found.append(f"shared memory {self.shared_bytes} over {SHARED_LIMIT[arch]} bytes")
        if self.tmem_columns > TMEM_LIMIT:
            found.append(f"tensor memory {self.tmem_columns} over {TMEM_LIMIT} columns")
        if arch == 90 and build.wgmma and not self.wgmma:
            found.append("no wgmma")
        return found


def measure(build: Build, arch: int, *, quick: bool = False) -> Resources:
    """Compiles for sm_`arch` (80, 90 or 100) and reads the resources that the build uses.

    Args:
        build, arch: what to compile.
        quick: do not read the machine code, which takes as long as compiling, unless it may show a problem:
            where a function has a stack, there may be spills, and where wgmma is wanted it has to be there.

    Raises:
        RuntimeError: Triton's interpreter is on, under which nothing is compiled.
    """
    compiled = compile_build(build, arch)
    registers, stack = read_usage(compiled)
    shared_bytes = compiled.metadata.shared
    tmem_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    programs = count_programs(arch, 32 * build.num_warps, registers, shared_bytes, tmem_columns)
    if quick and not stack and not (arch == 90 and build.wgmma):
        return Resources(registers, 0, shared_bytes, programs, tmem_columns)
    instructions = read_code(compiled)
    count: Counter[str] = Counter()
    spill_bytes = 0
    global_loads: Counter[int] = Counter()
    for instruction, times in instructions.items():
        opcode = instruction.partition(".")[0]
        count[opcode] += times
        if opcode == "STL":
            spill_bytes += times * width(instruction) // 8
        elif opcode in ("LDG", "LDGSTS"):
            global_loads[width(instruction)] += times
    return Resources(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=shared_bytes,
        programs=programs,
        tmem_columns=tmem_columns,
        wgmma=count["HGMMA"],
        tcgen05=count["UTCHMMA"],
        mma_sync=count["HMMA"],
        serialized=(
            instructions.get(WGMMA_WAIT, 0) >= count["HGMMA"] > len(PRODUCT.findall(compiled.asm["ttgir"]))
        ),
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


def compile_build(build: Build, arch: int) -> Any:
    """Triton's compiled kernel, for sm_`arch`."""
    if triton.knobs.runtime.interpret or not isinstance(build.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{build.kernel.__name__}: kernels are not compiled under Triton's interpreter; "
            "want TRITON_INTERPRET unset before triton is imported"
        )
    arg_names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel,
        signature={name: build.signature.get(name, "constexpr") for name in arg_names},
        constexprs=dict(build.constexprs),
        attrs={(arg_names.index(name),): [["tt.divisibility", 16]] for name in build.divisible},
    )
    options = dict(num_warps=build.num_warps, num_stages=build.num_stages, maxnreg=build.max_registers)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read_usage(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    listing = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    usage = {name: (int(registers), int(stack)) for name, registers, stack in USAGE.findall(listing)}
    if compiled.metadata.name not in usage:
        raise RuntimeError(f"cuobjdump shows no registers of {compiled.metadata.name}: {listing[:500]!r}")
    return usage[compiled.metadata.name]


def read_code(compiled: Any) -> dict[str, int]:
    """How often each instruction (``"STL.64"``) occurs in the machine code.

    Disassembling takes as long as compiling, so the result is stored beside the code in Triton's cache.
    """
    cache = get_cache_manager(compiled.hash)
    file = cache.get_file("instruction-counts.json")
    if file is None:
        found = Counter(INSTRUCTION.findall(cuobjdump(compiled.asm["cubin"], "--dump-sass")))
        file = cache.put(json.dumps(found), "instruction-counts.json", binary=False)
    return json.loads(Path(file).read_text())


def cuobjdump(cubin: bytes, what: str) -> str:
    """What cuobjdump prints of a cubin with this flag."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        result = subprocess.run([tool, what, str(file)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{tool} exited with {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def width(instruction: str) -> int:
    """Bits that a load or store moves: LDG.E.128, STL.S16; 32 if the name does not say."""
    widths = [int(m[1]) for part in instruction.split(".") if (m := WIDTH.fullmatch(part))]
    return widths[-1] if widths else 32
