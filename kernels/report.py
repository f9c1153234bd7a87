"""Builds every kernel in every configuration that may be launched, and reports the resources of each build.

    python -m vpt_fast.kernels.report --arch 90 [--json FILE] [--filter NAME] [--jobs N]

Needs no GPU. Exits with 1 if a kernel spills registers or keeps arrays in local memory, uses more shared or
tensor memory than a program may have, leaves an SM too little for the programs it should hold at once, lacks
wgmma although its matmuls are large enough for it, waits for each wgmma, or does not compile; its row says
which.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from vpt_fast.kernels.aot import SHARED_LIMIT, measure
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.launch import tables_of

# Each has builds(arch).
MODULES = (
    "vpt_fast.kernels.normalization.ops",
    "vpt_fast.kernels.mlp.ops",
    "vpt_fast.kernels.mlp.gemm",
    "vpt_fast.kernels.prompted_attention.ops",
    "vpt_fast.kernels.prompted_attention.window_ops",
    "vpt_fast.kernels.rotation.ops",
)

COLUMNS = (
    "kernel",
    "config",
    "registers",
    "stack_bytes",
    "spill_bytes",
    "shared_bytes",
    "programs",
    "wgmma",
    "tcgen05",
    "mma_sync",
    "serialized",
    "global_loads",
    "problems",
)
TEXT_COLUMNS = ("kernel", "config", "global_loads", "problems")


def main(argv: Sequence[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vpt_fast.kernels.report",
        description="Builds every kernel ahead of time, with no GPU, and says what each takes of one.",
    )
    parser.add_argument("--arch", type=int, choices=SHARED_LIMIT, required=True, help="90 stands for sm_90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE too")
    parser.add_argument("--filter", default="", metavar="NAME", help="only rows with NAME in them")
    cores = len(os.sched_getaffinity(0))  # of this process, which a cluster may have given a few
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="processes that build")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: got {args.jobs}, want 1 or more")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: no folder {args.json.parent}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that kernels are not compiled; want it unset")

    places = [
        (module, index)
        for module in modules
        for index, build in enumerate(list_builds(module, tables_of(args.arch // 10)))
        if args.filter in f"{build.name} {build.config}"
    ]
    if modules and not places:
        parser.error(f"--filter: no kernel or config has {args.filter!r} in its name")
    rows = build_rows(places, args.arch, args.jobs)
    print(table(rows))
    failed = sum(bool(row["problems"]) for row in rows)
    print(
        f"\n{len(rows)} builds for sm_{args.arch}, {failed} with problems. "
        f"Shared memory of one program: up to {SHARED_LIMIT[args.arch]:,} bytes."
    )
    if args.json:
        write_json(args.json, args.arch, rows)
    return 1 if failed else 0


@functools.cache  # a worker asks anew for every build
def list_builds(module: str, arch: int) -> list[Build]:
    return importlib.import_module(module).builds(arch)


def build_rows(places: Sequence[tuple[str, int]], arch: int, jobs: int) -> list[dict[str, Any]]:
    """One row for each (module, index into its builds), in that order; progress goes to stderr."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def finish(place: tuple[str, int], row: dict[str, Any], seconds: float) -> None:
        rows[place] = row
        state = "".join(f": {problem}" for problem in row["problems"])
        print(
            f"{len(rows)}/{len(places)} {row['kernel']} {row['config']} ({seconds:.1f} s){state}",
            file=sys.stderr,
            flush=True,
        )

    if jobs == 1:
        for place in places:
            finish(place, *build_row(*place, arch))
    else:
        # Workers get a build's index, since kernels cannot be pickled. They are forked from a process that
        # only imports, which takes seconds, as forking is unsafe beside torch's threads in this one. What is
        # imported lives to the end: nothing looks for garbage in it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(dict.fromkeys(module for module, _ in places)))
        with ProcessPoolExecutor(min(jobs, len(places) or 1), context, initializer=gc.freeze) as pool:
            futures: dict[Future, tuple[str, int]] = {
                pool.submit(build_row, *place, arch): place for place in places
            }
            try:
                for future in as_completed(futures):
                    finish(futures[future], *future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [rows[place] for place in places]


def build_row(module: str, index: int, arch: int) -> tuple[dict[str, Any], float]:
    """The row of a module's build number `index`, and the seconds that it took."""
    build = list_builds(module, tables_of(arch // 10))[index]
    row: dict[str, Any] = {
        "kernel": build.name,
        "config": build.config,
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "wgmma_wanted": build.wgmma and arch == 90,
        "shared_limit": SHARED_LIMIT[arch],
    }
    start = time.perf_counter()
    try:
        resources = measure(build, arch)
    except Exception as error:  # whatever the compiler raises is this row's result; others go on
        # Triton's first line says where, the last one why; between them is the kernel's source.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row["problems"] = [" ".join(["does not compile:", type(error).__name__, *lines[:1], *lines[1:][-1:]])]
    else:
        row |= asdict(resources)
        row["problems"] = resources.problems(build, arch)
    return row, time.perf_counter() - start


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, numbers flush right; a row that did not compile has only its problem."""
    cells = [COLUMNS] + [tuple(cell(row.get(column)) for column in COLUMNS) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = []
    for line in cells:
        padded = [
            text.ljust(width) if column in TEXT_COLUMNS else text.rjust(width)
            for column, text, width in zip(COLUMNS, line, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # bits -> loads
        return " ".join(f"{count}x{bits}" for bits, count in value.items()) or "-"
    if isinstance(value, list):
        return "; ".join(value)
    return str(value)


def write_json(path: Path, arch: int, rows: Sequence[dict[str, Any]]) -> None:
    """{"arch", "triton", "torch", "rows"}, under a temporary name first."""
    report = {"arch": arch, "triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
