"""How kernels are best launched on this GPU: times every candidate beside the recorded launch. One command:

    python benchmarks/tune.py

launches attention's kernels, and the GEMMs with an activation, at the shapes of ViT-B/16, L/16 and H/14 with
each of the tiles, warps and stages below, prints a table for each and writes
results/tune-<device>-<date>.json as it goes. Kernels are built first, by as many processes as there are
cores, 16 at most. The same command resumes an interrupted run; `--fresh` starts again. Attention at other
shapes, such as those of SO400M/14 and of giants, is a command too:

    python benchmarks/tune.py --kernels forward,grad_q,grad_kv --head-dim 72,88 --num-heads 16

The launches recorded in `kernels` are changed by hand, if a candidate is correct and faster beyond the spread
of its rounds (green): nothing is searched at run time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import attention
import operations
import torch
import typer
from measure import first_line
from operations import DTYPES, ERROR_BELOW, Settings, number
from reports import Fresh, listed
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kernels

MOST_BUILDERS = 16  # processes, each with a CUDA context and a kernel's inputs on the GPU

Launch = dict[str, Any]
"""Tiles, warps, stages and registers, as the kernel is launched with them."""


@dataclass
class Row:
    """One launch of one kernel at one shape. Times are of the whole call that launches the kernel.

    exact: whether its result is correct. error: why it did not run.
    """

    kernel: str
    shape: str
    launch: Launch
    recorded: bool
    exact: bool = False
    ms: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    ratio: float | None = None  # speed relative to the recorded launch
    error: str | None = None

    @property
    def case(self) -> tuple[str, str]:
        return self.kernel, self.shape


class Target(NamedTuple):
    """A kernel at a shape, and how to launch it differently.

    module, function: the function that chooses its launch, which is replaced while a candidate runs.
    of_launch: converts a launch to what that function returns.
    recorded: the current launch.
    call: what is timed. error: the relative error of its result, from float64.
    """

    kernel: str
    shape: str
    module: Any
    function: str
    of_launch: Callable[[Launch], Any]
    recorded: Launch
    candidates: list[Launch]
    call: Callable[[], object]
    error: Callable[[], float]


def described(case: attention.Shape | kernels.Case) -> str:
    """A `Row.shape`."""
    names = ("batch_size", "num_tokens", "num_prompts", "num_heads", "head_dim", "width")
    return ", ".join(f"{name} {getattr(case, name)}" for name in names if hasattr(case, name))


def launches(**choices: tuple[int | None, ...]) -> list[Launch]:
    """Every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def area(launch: Launch) -> int:
    return launch["BLOCK_M"] * launch["BLOCK_N"]


# Larger tiles' accumulators leave no registers for the rest. On sm_90 a matmul's first dimension has 64 rows
# or more: the queries, and for dK and dV the keys, where fewer queries waste less of the last tile.
ATTENTION_LAUNCHES = [
    launch
    for launch in launches(
        BLOCK_M=(32, 64, 128),
        BLOCK_N=(32, 64, 128),
        num_warps=(4, 8),
        num_stages=(2, 3),
        maxnreg=(None, 128),  # so few that two programs of eight warps fit on an SM
    )
    if area(launch) <= 128 * 64 and (launch["maxnreg"] is None or launch["num_warps"] == 8)
]
LINEAR_LAUNCHES = [
    {**launch, "BLOCK_K": 64, "GROUP": 8}
    for launch in launches(
        BLOCK_M=(64, 128, 256), BLOCK_N=(64, 128, 256), num_warps=(4, 8), num_stages=(3, 4)
    )
    if 64 * 128 <= area(launch) <= 4096 * launch["num_warps"]
]
DELAYS = (0, 1500, 3000, 6000)  # nanoseconds between the starts of two programs on an SM


def tma_launches() -> list[Launch]:
    """Candidates for the GEMMs with descriptors."""
    from vpt_fast.kernels.mlp import gemm

    found = []
    for launch in LINEAR_LAUNCHES:
        delays = DELAYS if gemm._programs_per_sm(launch) == 2 else (0,)
        found += [{**launch, "DELAY": delay} for delay in delays]
    return found


# Columns of a tile, and the depth and the number of stages that shared memory has room for beside it.
SPECIALIZED_STAGES = ((256, 64, 3), (256, 32, 6), (128, 64, 5))


def specialized_launches() -> list[Launch]:
    """Candidates for the same GEMMs by kernels whose warpgroups do different work, on sm_90."""
    from vpt_fast.kernels.mlp import gemm

    return [
        {**gemm.SPECIALIZED, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": group, "num_stages": num_stages}
        for (block_n, block_k, num_stages), group in itertools.product(SPECIALIZED_STAGES, (4, 8, 16))
    ]


ATTENTION_KERNELS = {"forward": "forward_tiles", "grad_q": "grad_q_tiles", "grad_kv": "grad_kv_tiles"}
LINEAR_KERNELS = ("linear_activate", "linear_activate_backward")
KERNELS = (*ATTENTION_KERNELS, *LINEAR_KERNELS)


def attention_targets(shape: attention.Shape, names: list[str], settings: Settings) -> list[Target]:
    """Forward, and backward with the launch of dQ, or that of dK and dV, replaced."""
    from vpt_fast.kernels.launch import arch_of
    from vpt_fast.kernels.prompted_attention import ops

    inputs = attention.make_inputs(shape, settings.dtype, settings.device)
    functions = (ops.attention, ops.attention_backward)

    @cache
    def backward() -> Callable[[], object]:
        """Runs the recorded forward, which may not build here, and then is each launch's error."""
        return attention.make_calls("triton", functions, inputs)["backward_ms"]

    sizes = (shape.head_dim, shape.num_tokens, arch_of(settings.device))
    return [
        Target(
            kernel=name,
            shape=described(shape),
            module=ops,
            function=ATTENTION_KERNELS[name],
            of_launch=lambda launch: ops.Tiles(*launch.values()),
            recorded=getattr(ops, ATTENTION_KERNELS[name])(settings.dtype, *sizes).launch,
            candidates=[
                launch for launch in ATTENTION_LAUNCHES if name == "grad_kv" or launch["BLOCK_M"] >= 64
            ],
            call=partial(ops.attention, *inputs[:-1]) if name == "forward" else lambda: backward()(),
            error=lambda: max(attention.errors(functions, inputs)),
        )
        for name in names
    ]


def linear_targets(case: kernels.Case, settings: Settings) -> list[Target]:
    """A GEMM with GELU or its derivative."""
    from vpt_fast.kernels.launch import arch_of
    from vpt_fast.kernels.mlp import gemm

    by_descriptors = gemm.has_descriptors(settings.device, settings.dtype)
    specialized = specialized_launches() if arch_of(settings.device) == 90 else []
    inputs = kernels.make_inputs(case, settings.dtype, settings.device)
    fused = kernels.implementation(kernels.OURS, case, settings.dtype)
    return [
        Target(
            kernel=case.op,
            shape=described(case),
            module=gemm,
            function="_tma_config" if by_descriptors else "_config",
            of_launch=dict,
            recorded=gemm._tma_config() if by_descriptors else gemm._config(settings.dtype, aligned=True),
            candidates=[*specialized, *tma_launches()] if by_descriptors else LINEAR_LAUNCHES,
            call=partial(fused, *inputs[0], *inputs[1]),
            error=partial(kernels.check, fused, case, inputs),
        )
    ]


@contextmanager
def launched(target: Target, launch: Launch) -> Iterator[None]:
    """Inside, the target's kernel is launched this way."""
    from vpt_fast.kernels.checks import forget_layouts

    recorded = getattr(target.module, target.function)
    setattr(target.module, target.function, lambda *_, **__: target.of_launch(launch))
    forget_layouts()
    try:
        yield
    finally:
        setattr(target.module, target.function, recorded)
        forget_layouts()


def build(group: Callable[[], list[Target]], part: int, parts: int) -> None:
    """Launches one of `parts` shares of the group's candidates, so that Triton's cache holds their builds.
    Failures are reported when they are measured."""
    for target in group():
        for launch in [target.recorded, *target.candidates][part::parts]:
            with launched(target, launch), suppress(Exception):
                target.call()


def build_all(groups: list[Callable[[], list[Target]]], processes: int, progress: Progress) -> None:
    """Builds the candidates of all groups in parallel: a build takes a second or more, and one core."""
    if not groups:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(build, group, part, processes) for group in groups for part in range(processes)]
        for job in progress.track(as_completed(jobs), total=len(jobs), description="builds"):
            job.result()


def measure_target(target: Target, settings: Settings) -> list[Row]:
    """A row for each launch, the recorded one first; all that run are timed in turns."""
    others = [launch for launch in target.candidates if launch != target.recorded]
    rows, calls = [], {}
    # A hundred graphs' results would not fit into a GPU's memory.
    pool = torch.cuda.graph_pool_handle() if settings.device.type == "cuda" else None
    for launch in (target.recorded, *others):
        row = Row(target.kernel, target.shape, launch, recorded=launch == target.recorded)
        rows.append(row)
        try:
            with launched(target, launch):
                row.exact = target.error() < ERROR_BELOW[settings.dtype]
                calls[len(rows) - 1] = operations.prepare(target.call, settings.device, pool)
        except Exception as failure:  # more shared memory or registers than the device has
            row.error = first_line(failure)
    times = settings.times({str(index): call for index, call in calls.items()})
    for index, seconds in times.items():
        row = rows[int(index)]
        row.ms, row.ms_min, row.ms_max = (1e3 * value for value in seconds)
    for row in rows:
        if row.ms is not None and rows[0].ms is not None:
            row.ratio = rows[0].ms / row.ms
    return rows


def make_table(rows: list[Row], most: int = 8) -> Table:
    """The recorded launch, and the fastest of the others that are correct."""
    recorded, *others = rows
    fastest = sorted((row for row in others if row.exact and row.ms is not None), key=lambda row: row.ms)
    table = Table(title=f"{recorded.kernel}: {recorded.shape}", box=box.SIMPLE, caption_justify="left")
    for column in ("launch", "ms", "min", "max", "× recorded"):
        table.add_column(column, justify="left" if column == "launch" else "right", no_wrap=True)
    for row in (recorded, *fastest[:most]):
        launch = " ".join(f"{key}={value}" for key, value in row.launch.items())
        is_faster = not row.recorded and recorded.ms_min is not None and row.ms_max < recorded.ms_min
        table.add_row(
            f"{launch} (recorded)" if row.recorded else launch,
            *(number(value, ".4f") for value in (row.ms, row.ms_min, row.ms_max)),
            number(row.ratio, ".2f"),
            style="green" if is_faster else "" if row.exact else "red",
        )
    failed = sum(row.error is not None for row in rows)
    wrong = sum(row.error is None and not row.exact for row in rows)
    table.caption = f"{len(rows)} launches; {failed} do not run here, {wrong} are wrong"
    if recorded.error is not None:
        table.caption += f"; {operations.failures({'the recorded one': recorded.error})}"
    return table


def main(
    names: Annotated[
        str, typer.Option("--kernels", help=f"comma-separated, of {', '.join(KERNELS)}")
    ] = ",".join(KERNELS),
    num_prompts: Annotated[str, typer.Option(help="m, comma-separated")] = "100",
    num_tokens: Annotated[
        str, typer.Option(help="attention's N, comma-separated; default: the models'")
    ] = "",
    num_heads: Annotated[str, typer.Option(help="attention's H, comma-separated; default: the models'")] = "",
    head_dim: Annotated[str, typer.Option(help="attention's D, comma-separated; default: the models'")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="images")] = 64,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after warm-up")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: results/tune-<device>-<date>.json")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Time how kernels could be launched."""
    wanted = listed("kernels", names, KERNELS)
    shapes = attention.choose_shapes(True, num_tokens, num_heads, head_dim, num_prompts, str(batch_size))
    console = Console()
    console.width = max(console.width, 120)
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here, and nothing else is tuned")
    cases = [
        kernels.Case(name, "gelu", False, batch_size, *map(int, model.split("x")))
        for name, model in itertools.product(wanted, kernels.MODELS)
        if name in LINEAR_KERNELS
    ]
    of_attention = [name for name in wanted if name in ATTENTION_KERNELS]
    asked = [(name, described(shape)) for name, shape in itertools.product(of_attention, shapes)]
    asked += [(case.op, described(case)) for case in cases]
    settings, report = operations.start(
        "tune", Row, console,
        device="cuda", dtype=dtype, repeats=repeats, output=output, asked=asked, fresh=fresh,
    )  # fmt: skip
    console.print(f"{len(asked)} kernels at a shape, of each the recorded launch and others.")
    console.print(report.describe(), soft_wrap=True)
    groups: list[Callable[[], list[Target]]] = []
    if of_attention:
        groups += [partial(attention_targets, shape, of_attention, settings) for shape in shapes]
    groups += [partial(linear_targets, case, settings) for case in cases]
    with Progress(console=console, transient=True) as progress:
        left = [group for group in groups if any(not report.rows_of((t.kernel, t.shape)) for t in group())]
        build_all(left, min(len(os.sched_getaffinity(0)), MOST_BUILDERS), progress)
        for group in progress.track(groups, description="shapes"):
            for target in group():
                case = (target.kernel, target.shape)
                there = report.rows_of(case)
                if not there:
                    there = measure_target(target, settings)
                    report.replace(case, there)
                console.print(make_table(there))
    console.print(f"written: {report.path}")


if __name__ == "__main__":
    typer.run(main)
