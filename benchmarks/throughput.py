"""Training throughput and memory of vpt_fast beside what one would otherwise write. One command:

    python benchmarks/throughput.py

measures a sensible setting for the device at hand, prints a table and writes results/<device>-<date>.json
next to this file. `--help` lists the flags. Every implementation starts from the same weights and the same
trainable tensors; one whose gradients are not those of concatenation in float64 is marked and not ranked.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import measure
import peers
import timm
import torch
import typer
from implementations import (
    BOUNDS,
    EXACT_BELOW,
    IMPLEMENTATIONS,
    ON_A_CPU,
    ON_A_GPU,
    Setting,
    Start,
    make_start,
    random_batch,
)
from measure import MIB, Contender
from reports import default_path, listed, make_header, write_report
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

CHECK_BATCH = 2  # images of the float64 gradient check


@dataclass
class Row:
    """One line of the results; what is not known is None. Times are medians over steps, per step."""

    model: str
    num_prompts: int
    batch_size: int
    prompt_type: str
    dtype: str
    image_size: int
    impl: str
    memory: str | None  # the memory policy of vpt_fast
    exact: bool
    rank: int | None  # among exact implementations of the same model, by images per second
    images_per_second: float | None
    images_per_second_min: float | None
    images_per_second_max: float | None
    forward_ms: float | None
    backward_ms: float | None
    optimizer_ms: float | None
    repeats: int
    peak_mib: float | None
    peak_reserved_mib: float | None
    kept_mib_per_image: float | None
    essential_tflops: float | None
    share_of_ceiling: float | None
    gradient_error: float | None
    error: str | None


def check_gradients(contenders: list[Contender], start: Start) -> None:
    """Fills in every contender's gradient error, from concatenation (the bound: from itself) in float64."""
    device = start.state["prompts"].device
    images, labels = random_batch(start.vit, CHECK_BATCH, device)
    vit = copy.deepcopy(start.vit).double()
    state = {name: tensor.double() for name, tensor in start.state.items()}
    expected: dict[type, dict[str, Tensor]] = {}
    for contender in contenders:
        build = peers.NoPrompts if contender.name in BOUNDS else peers.ConcatTimm
        if build not in expected:
            exact = build(vit, state).double().to(device)
            expected[build] = measure.gradients(Contender("float64", exact, exact), images.double(), labels)
        try:
            actual = measure.gradients(contender, images, labels)
            contender.gradient_error = measure.gradient_error(actual, expected[build])
        except Exception as failure:
            contender.error = f"{type(failure).__name__}: {failure}".splitlines()[0]


def make_row(contender: Contender, start: Start, repeats: int) -> Row:
    setting, totals = start.setting, [times.total for times in contender.times]
    median = measure.median_times(contender.times) if totals else None
    speeds = sorted(setting.batch_size / total for total in totals)
    error = contender.gradient_error
    has_parts = median is not None and not contender.graphed

    def mib(count: int | None, per: int = 1) -> float | None:
        return None if count is None else count / MIB / per

    return Row(
        model=setting.model,
        num_prompts=setting.num_prompts,
        batch_size=setting.batch_size,
        prompt_type=setting.prompt_type,
        dtype=setting.dtype,
        image_size=start.vit.patch_embed.img_size[0],
        impl=contender.name,
        memory=getattr(contender.model, "memory", None),
        exact=error is not None and error <= EXACT_BELOW[setting.dtype],
        rank=None,
        images_per_second=statistics.median(speeds) if speeds else None,
        images_per_second_min=speeds[0] if speeds else None,
        images_per_second_max=speeds[-1] if speeds else None,
        forward_ms=median.forward * 1e3 if has_parts else None,
        backward_ms=median.backward * 1e3 if has_parts else None,
        optimizer_ms=median.optimizer * 1e3 if has_parts else None,
        repeats=repeats,
        peak_mib=mib(contender.peak_bytes),
        peak_reserved_mib=mib(contender.peak_reserved_bytes),
        kept_mib_per_image=mib(contender.kept_bytes, setting.batch_size),
        essential_tflops=None,
        share_of_ceiling=None,
        gradient_error=error if error is None or error < float("inf") else None,
        error=contender.error,
    )


def rank(rows: list[Row]) -> list[Row]:
    """Numbers the rows of one setting by speed, fastest first; not wrong ones, failed ones or bounds."""
    for row in rows:
        row.rank = None
    able = [row for row in rows if row.exact and row.images_per_second is not None and row.impl not in BOUNDS]
    able.sort(key=lambda row: row.images_per_second or 0.0, reverse=True)
    for place, row in enumerate(able, start=1):
        row.rank = place
    return rows


def measure_setting(
    setting: Setting,
    implementations: list[str],
    device: torch.device,
    repeats: int,
    steps: int,
    console: Console,
) -> list[Row]:
    """One row for each implementation."""
    start = make_start(setting, device)
    contenders = [IMPLEMENTATIONS[name](name, start) for name in implementations]
    images, labels = random_batch(start.vit, setting.batch_size, device)
    with console.status("gradients against float64") as status:
        check_gradients(contenders, start)
        measure.interleave(contenders, images, labels, repeats=repeats, steps=steps, progress=status.update)
    return rank([make_row(contender, start, repeats) for contender in contenders])


def make_table(rows: list[Row]) -> Table:
    first = rows[0]
    prompts, batch = f"{first.num_prompts} {first.prompt_type} prompts", f"batch {first.batch_size}"
    table = Table(title=f"{first.model}, {prompts}, {batch}, {first.dtype}", box=box.SIMPLE)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for column in ("images/s", "(min–max)", "× concat", "forward", "backward", "optimizer ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("peak MiB", "kept MiB/image"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gradient error", justify="right")
    concat = [row.images_per_second or 0.0 for row in rows if row.impl.startswith("concat") and row.rank]

    def number(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        speed = row.images_per_second
        spread = f"{number(row.images_per_second_min, '.2f')}–{number(row.images_per_second_max, '.2f')}"
        table.add_row(
            "bound" if row.impl in BOUNDS else str(row.rank or ""),
            row.impl,
            number(speed, ".2f"),
            spread if speed else "",
            number(speed / max(concat), ".2f") if concat and speed and row.exact else "",
            number(row.forward_ms),
            number(row.backward_ms),
            number(row.optimizer_ms),
            number(row.peak_mib),
            number(row.kept_mib_per_image),
            row.error or ("" if row.exact else "WRONG ") + number(row.gradient_error, ".1e"),
            style="" if row.exact else "red",
        )
    return table


def make_report(rows: list[Row], device: torch.device) -> dict[str, Any]:
    return {**make_header(device), "ceiling_tflops": None, "rows": [asdict(row) for row in rows]}


def main(
    models: Annotated[str, typer.Option(help="timm names, comma-separated; default by device")] = "",
    num_prompts: Annotated[str, typer.Option(help="prompts per block, comma-separated")] = "100",
    batch_size: Annotated[str, typer.Option(help="images per step, comma-separated; default by device")] = "",
    prompt_type: Annotated[str, typer.Option(help="deep or shallow, comma-separated")] = "deep",
    implementations: Annotated[
        str, typer.Option(help=f"comma-separated, of {', '.join(IMPLEMENTATIONS)}; default by device")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or amp; default by device")] = "",
    image_size: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after one of warm-up")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="steps a round; 0: by device")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: results/<device>-<date>.json")
    ] = None,
) -> None:
    """Measure training throughput and memory; every flag has a default that suits the device."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding alone fails float32's gradient check
    dtype = listed(dtype or ("bfloat16" if on_gpu else "float32"), list(EXACT_BELOW))[0]
    big = "vit_base_patch16_224,vit_large_patch16_224,vit_huge_patch14_224"
    settings = [
        Setting(model, int(m), int(batch), kind, dtype, image_size)
        for model in listed(models or (big if on_gpu else "vit_base_patch16_224"), timm.list_models())
        for kind in listed(prompt_type, ["deep", "shallow"])
        for m in listed(num_prompts)
        for batch in listed(batch_size or ("64" if on_gpu else "8"))
    ]
    names = listed(implementations or ",".join(ON_A_GPU if on_gpu else ON_A_CPU), list(IMPLEMENTATIONS))
    console, rows = Console(), list[Row]()
    console.width = max(console.width, 140)  # a table cut to a pipe's 80 columns says nothing
    console.print(f"{measure.device_name(where)}, torch {torch.__version__}")
    for setting in settings:
        new = measure_setting(setting, names, where, repeats, steps or (10 if on_gpu else 1), console)
        rows += new
        console.print(make_table(new))
        report = make_report(
            rows, where
        )  # after every setting, so that an interrupted run leaves what it has
        path = output or default_path(report)
        write_report(report, path)
        console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
