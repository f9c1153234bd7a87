"""Prompted attention alone: our kernels beside FlashAttention on the concatenated sequence. One command:

    python benchmarks/attention.py

times forward and backward at the shapes of ViT-B/16, L/16 and H/14, each implementation with the
concatenation that it needs, prints a table and writes results/attention-<device>-<date>.json. On a CPU it
compares PyTorch's own, at small sizes. One whose output or gradients are wrong is marked, not compared with.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import measure
import torch
import typer
from reports import default_path, listed, make_header, write_report
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vpt_fast.kernels import ATTENTION, get_backend
from vpt_fast.kernels.prompted_attention import reference

OURS = "vpt_fast"
ERROR_BELOW = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """One image's N tokens (as many queries), m shared prompts, H heads of D, for B images."""

    batch_size: int
    num_tokens: int
    num_prompts: int
    num_heads: int
    head_dim: int

    @property
    def forward_flops(self) -> int:
        keys = self.num_tokens + self.num_prompts
        return 4 * self.batch_size * self.num_heads * self.num_tokens * keys * self.head_dim


@dataclass
class Row:
    """One line of the results. Times are medians over rounds, ms; concatenation included."""

    batch_size: int
    num_tokens: int
    num_prompts: int
    num_heads: int
    head_dim: int
    impl: str
    exact: bool
    forward_ms: float | None
    backward_ms: float | None
    forward_tflops: float | None
    backward_tflops: float | None
    forward_ratio: float | None  # speed relative to the best of the others
    backward_ratio: float | None
    output_error: float | None
    gradient_error: float | None
    error: str | None


Functions = tuple[Callable[..., Any], Callable[..., Any]]


def implementations(names: list[str], device: torch.device) -> tuple[dict[str, Functions], dict[str, str]]:
    """Forward and backward by name, and why others are not there."""
    found: dict[str, Functions] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            backend = get_backend("auto", "auto" if name == OURS else name)
        except ValueError as error:
            missing[name] = str(error)
            continue
        ops = backend.ops(device.type, torch.float32, 64)
        found[name] = ops.attention, ops.attention_backward
    return found, missing


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as views of one packed projection, prompt_k, prompt_v, and dO."""
    generator = torch.Generator().manual_seed(0)
    b, n, m = shape.batch_size, shape.num_tokens, shape.num_prompts
    h, d = shape.num_heads, shape.head_dim

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    qkv = random(b, n, 3, h, d)
    qkv[:, :, 0] *= d**-0.5
    return *qkv.unbind(2), *random(1, m, 2, h, d).unbind(2), random(b, n, h, d)


def run_backward(functions: Functions, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> Any:
    *given, grad = inputs
    return functions[1](grad, *given, out, lse, need_q=True, need_kv=True, packed=True)


def errors(functions: Functions, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the output and of the worst gradient, from float64 on the first image."""
    first = tuple(t[:1] for t in inputs)
    wide = tuple(t.double() for t in first)
    out, lse = functions[0](*first[:-1])
    grads = run_backward(functions, first, out, lse)
    exact_out, exact_lse = reference.attention(*wide[:-1])
    exact = run_backward((reference.attention, reference.attention_backward), wide, exact_out, exact_lse)

    def error(actual: Tensor, expected: Tensor) -> float:
        return float((actual.double() - expected).norm() / expected.norm())

    parts = [*zip(grads.qkv.unbind(2), exact.qkv.unbind(2), strict=True)]
    parts += [*zip(grads.prompt_kv.unbind(2), exact.prompt_kv.unbind(2), strict=True)]
    return error(out, exact_out), max(error(*part) for part in parts)


def time_all(
    found: dict[str, Functions], inputs: tuple[Tensor, ...], repeats: int, calls: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of one forward and one backward call in each round, all implementations in turn."""
    device = inputs[0].device
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for round_ in range(-1, repeats):  # the first warms up
        for name, functions in found.items():
            out, lse = functions[0](*inputs[:-1])
            watch = measure.Stopwatch(device)
            watch.mark()
            for _ in range(calls):
                functions[0](*inputs[:-1])
            watch.mark()
            for _ in range(calls):
                run_backward(functions, inputs, out, lse)
            watch.mark()
            if round_ >= 0:
                for part, seconds in zip(times[name], watch.seconds(), strict=True):
                    part.append(seconds / calls)
    return times


def measure_shape(
    shape: Shape, names: list[str], dtype: torch.dtype, device: torch.device, repeats: int, calls: int
) -> list[Row]:
    found, failed = implementations(names, device)
    inputs = make_inputs(shape, dtype, device)
    right: dict[str, tuple[float, float]] = {}
    for name, functions in list(found.items()):
        try:
            right[name] = errors(functions, inputs)
        except Exception as failure:  # a kernel that does not build, a library that refuses the shape
            failed[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            del found[name]
    times = time_all(found, inputs, repeats, calls)
    medians = {name: tuple(map(statistics.median, parts)) for name, parts in times.items()}
    others = [
        seconds for name, seconds in medians.items() if name != OURS and max(right[name]) < ERROR_BELOW[dtype]
    ]
    rows = []
    for name in names:
        row = Row(**asdict(shape), impl=name, exact=False, **dict.fromkeys(_EMPTY), error=failed.get(name))
        if name in medians:
            forward, backward = medians[name]
            row.exact = max(right[name]) < ERROR_BELOW[dtype]
            row.output_error, row.gradient_error = right[name]
            row.forward_ms, row.backward_ms = forward * 1e3, backward * 1e3
            row.forward_tflops = shape.forward_flops / forward / 1e12
            row.backward_tflops = 2.5 * shape.forward_flops / backward / 1e12  # five products against two
            if others and row.exact:
                row.forward_ratio = min(other[0] for other in others) / forward
                row.backward_ratio = min(other[1] for other in others) / backward
        rows.append(row)
    return rows


_EMPTY = (
    "forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "forward_ratio", "backward_ratio",
    "output_error", "gradient_error",
)  # fmt: skip


def make_table(rows: list[Row], dtype: torch.dtype) -> Table:
    first = rows[0]
    sizes = f"B {first.batch_size}, N {first.num_tokens}, m {first.num_prompts}"
    heads = f"H {first.num_heads}, D {first.head_dim}, {str(dtype).removeprefix('torch.')}"
    table = Table(title=f"{sizes}, {heads}", box=box.SIMPLE)
    table.add_column("implementation", no_wrap=True)
    for part in ("forward", "backward"):
        for column in (f"{part} ms", "TFLOP/s", "× best other"):
            table.add_column(column, justify="right")
    table.add_column("error", justify="right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            row.impl,
            number(row.forward_ms, ".3f"),
            number(row.forward_tflops, ".1f"),
            number(row.forward_ratio, ".2f"),
            number(row.backward_ms, ".3f"),
            number(row.backward_tflops, ".1f"),
            number(row.backward_ratio, ".2f"),
            row.error or ("" if row.exact else "WRONG ") + number(row.gradient_error, ".1e"),
            style="" if row.exact else "red",
        )
    return table


def main(
    num_prompts: Annotated[str, typer.Option(help="prompts, comma-separated")] = "50,100,200",
    batch_size: Annotated[int, typer.Option(min=0, help="images; 0: by device")] = 0,
    implementations: Annotated[str, typer.Option(help="comma-separated; default by device")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after one of warm-up")] = 5,
    calls: Annotated[int, typer.Option(min=0, help="calls a round; 0: by device")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Measure prompted attention, forward and backward."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    peers = [name for name in ATTENTION if name != "auto" and (name == "sdpa_cpu") != on_gpu]
    names = listed(implementations or ",".join([OURS, *peers]), [OURS, *ATTENTION[1:]])
    # ViT-B/16 (L/16 has 16 heads of the same) and H/14
    images = batch_size or (64 if on_gpu else 2)
    sizes = [(197, 12, 64), (197, 16, 64), (257, 16, 80)] if on_gpu else [(197, 12, 64)]
    console, rows = Console(), list[Row]()
    console.width = max(console.width, 120)
    console.print(f"{measure.device_name(where)}, torch {torch.__version__}")
    report = {**make_header(where), "dtype": str(dtype).removeprefix("torch.")}
    path = output or default_path(report, "attention")
    for (tokens, heads, head_dim), m in itertools.product(sizes, map(int, listed(num_prompts))):
        shape = Shape(images, tokens, m, heads, head_dim)
        new = measure_shape(shape, names, dtype, where, repeats, calls or (20 if on_gpu else 1))
        rows += new
        console.print(make_table(new, dtype))
        write_report({**report, "rows": [asdict(row) for row in rows]}, path)
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
