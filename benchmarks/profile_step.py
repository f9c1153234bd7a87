"""Where the time of a training step goes: kernel by kernel, and how long the device waits. One command:

    python benchmarks/profile_step.py --model vit_large_patch16_224 --num-prompts 100

prints what a step spends in matrix products, attention, normalisation, activations and the rest, the kernels
that take longest, and how long the host needs to launch them, and writes
results/profile-<implementation>[-<memory>]-<setting>-<device>-<date>.json. A step takes longer under the
profiler than alone, so throughput is measured by throughput.py.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from implementations import (
    EXACT_BELOW,
    IMPLEMENTATIONS,
    Setting,
    family_of,
    make_start,
    random_batch,
    require_built,
    require_possible,
)
from measure import Contender
from operations import choose_device
from reports import make_header, one_of, output_path, require_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vpt_fast.engine.policy import MEMORY, POLICIES
from vpt_fast.files import write_json

WARM_UP = 3

# What a kernel (on a CPU an operator of PyTorch's) is for, by its name; the first match counts.
KINDS = {
    "attention": r"attention|terms_kernel|grad_q_kernel|grad_kv_kernel|flash|fmha|sdpa|window|"
    r"(?<!log_)softmax(?!_warp_\w+<[^>]*, true, )",  # the loss has a log-softmax
    "normalisation": r"normalize|layer_?norm|rms_?norm",
    "activation": r"(?<!linear_)activate|swiglu|gelu|silu",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|splitk|linear_activate|aten::(_?addmm|b?mm|baddbmm|linear)",
    "copies": r"copy|memcpy|memset|fill|cat|clone|contiguous|to_",
}
OTHER = "other"


@dataclass(frozen=True)
class Entry:
    """A kernel, or on a CPU an operation, of one step. ms: of all its calls in a step."""

    name: str
    kind: str
    calls: float
    ms: float


def kind_of(name: str) -> str:
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return OTHER


def profile_steps(contender: Contender, batch: tuple[Any, Any], steps: int) -> tuple[list[Entry], float]:
    """What runs on the batch's device in a step, on average, the longest first; and the milliseconds that a
    step takes under the profiler, including the device's idle time."""
    device = batch[0].device
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP + contender.steps_to_settle):
        contender.step(*batch)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            contender.step(*batch)
        _wait(device)
        seconds = time.perf_counter() - start
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type != wanted or event.is_user_annotation:
            continue
        calls[event.key] += event.count
        microseconds[event.key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    entries = [
        Entry(name, kind_of(name), calls[name] / steps, spent / 1e3 / steps)
        for name, spent in microseconds.items()
        if spent > 0
    ]
    return sorted(entries, key=lambda entry: -entry.ms), 1e3 * seconds / steps


def host_ms(contender: Contender, batch: tuple[Any, Any], steps: int) -> float:
    """Milliseconds for which the host is busy with a step if the device is idle before it, the median of
    `steps`: a GPU's step cannot take less. On a CPU, the step itself."""
    found = []
    for _ in range(steps):
        _wait(batch[0].device)
        start = time.perf_counter()
        contender.step(*batch)
        found.append(1e3 * (time.perf_counter() - start))
    _wait(batch[0].device)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_kind(entries: list[Entry]) -> dict[str, float]:
    """Milliseconds of a step by kind, the longest first."""
    total: dict[str, float] = defaultdict(float)
    for entry in entries:
        total[entry.kind] += entry.ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def make_tables(entries: list[Entry], step_ms: float, most: int) -> list[Table]:
    busy = sum(entry.ms for entry in entries)
    kinds = Table(title="a step", box=box.SIMPLE)
    longest = Table(title="what takes longest", box=box.SIMPLE)
    for table, column in ((kinds, "kind"), (longest, "kernel or operation")):
        table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=90)
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
    longest.add_column("calls", justify="right")
    longest.add_column("kind")
    for kind, ms in by_kind(entries).items():
        kinds.add_row(kind, f"{ms:.3f}", f"{ms / step_ms:.1%}")
    idle = max(0.0, step_ms - busy)
    kinds.add_row("nothing runs", f"{idle:.3f}", f"{idle / step_ms:.1%}", end_section=True)
    kinds.add_row("step", f"{step_ms:.3f}", "")
    for entry in entries[:most]:
        longest.add_row(
            entry.name, f"{entry.ms:.3f}", f"{entry.ms / step_ms:.1%}", f"{entry.calls:g}", entry.kind
        )
    return [kinds, longest]


def main(
    model: Annotated[str, typer.Option(help="timm's name")] = "vit_base_patch16_224",
    num_prompts: Annotated[
        int, typer.Option(min=0, help="m, or pixels of a ConvNet's border", show_default="100, or 10")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="images", show_default="64; 4 on a CPU")] = 0,
    implementation: Annotated[str, typer.Option(help="as of throughput.py")] = "vpt_fast",
    memory: Annotated[str, typer.Option(help=f"of vpt_fast: {', '.join(MEMORY)}")] = "exact",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or amp", show_default="bfloat16; float32 on a CPU")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="under the profiler")] = 5,
    most: Annotated[int, typer.Option(min=1, help="kernels to print")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file, replaced if it is there; default: results/profile-...-<date>.json"),
    ] = None,
) -> None:
    """Profile training steps."""
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    one_of("implementation", implementation, IMPLEMENTATIONS)
    one_of("memory", memory, MEMORY)
    require_model("model", model)
    family = family_of(model)
    setting = Setting(
        model=model,
        num_prompts=num_prompts or family.num_prompts,
        batch_size=batch_size or (64 if on_gpu else 4),
        prompt_type=family.prompt_types[0],
        dtype=one_of("dtype", dtype or ("bfloat16" if on_gpu else "float32"), EXACT_BELOW),
    )
    require_possible(setting, [implementation], [memory] if memory in POLICIES else [])
    has_policies = implementation.startswith("vpt_fast")
    if memory != "exact" and not has_policies:
        raise typer.BadParameter(f"memory: got {memory!r} with {implementation}, which has no policies")
    header = {**make_header(where), **asdict(setting), "implementation": implementation, "memory": memory}
    name = "-".join(["profile", implementation, *([memory] if has_policies else []), setting.slug])
    path = output_path(output, header, Entry, name)
    console = Console()
    console.width = max(console.width, 140)
    start = make_start(setting, where)
    contender = require_built(implementation, start)
    if has_policies:
        contender.model.memory = memory
    console.print(
        f"{implementation}, {model}, m {setting.num_prompts}, batch {setting.batch_size}, {setting.dtype}: "
        f"{WARM_UP + contender.steps_to_settle} steps of warm-up, {steps} under the profiler, {steps} without"
    )
    with console.status("steps"):
        batch = random_batch(start, setting.batch_size, where)
        entries, step_ms = profile_steps(contender, batch, steps)
        host = host_ms(contender, batch, steps)
    for table in make_tables(entries, step_ms, most):
        console.print(table)
    console.print(f"The host is busy with a step for {host:.3f} ms, without the profiler.")
    rows = [asdict(entry) for entry in entries]
    found = {"step_ms": step_ms, "host_ms": host, "kinds_ms": by_kind(entries), "rows": rows}
    write_json(path, {**header, **found}, indent=1)
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
