"""Prompted attention alone: our kernels beside FlashAttention on the concatenated sequence. One command:

    python benchmarks/attention.py

times forward and backward at the shapes of ViT-B/16, L/16 and H/14, prints a table for each shape and writes
results/attention-<device>-<date>.json as it goes. Libraries are timed twice: from our tensors, with the
concatenation (and in backward the splitting) that they need, and from tensors that are concatenated already.
FlashAttention's backward is timed in its deterministic mode, with which vpt_fast trains so that runs repeat
bit for bit; its default mode, which may be faster, is not timed. cuDNN has no such mode. On a CPU, PyTorch's
own implementations are compared, at small sizes. An implementation whose output or gradients are wrong is
marked, and not compared with. The same command resumes an interrupted run; `--fresh` starts again. A sweep is
one command too:

    python benchmarks/attention.py --head-dim 64,80 --num-tokens 197,577 --num-heads 12 --num-prompts 10,100
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import operations
import torch
import typer
from measure import first_line
from operations import DTYPES, ERROR_BELOW, Settings, Work, number
from reports import Fresh, listed, positive_numbers
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from vpt_fast.kernels import get_backend
from vpt_fast.kernels.prompted_attention import reference
from vpt_fast.kernels.prompted_attention.flash import FLASH_BACKENDS

OURS = ("triton", "torch")
ON_A_GPU = ("triton", *(name for name in FLASH_BACKENDS if name != "sdpa_cpu"))
ON_A_CPU = ("torch", "sdpa_cpu")
CHECKED_IMAGES = 2

# Tokens, heads, head dim of ViT-B/16, L/16 and H/14
MODELS = [(197, 12, 64), (197, 16, 64), (257, 16, 80)]


@dataclass(frozen=True)
class Shape:
    """B images of N tokens (and as many queries), m shared prompts, H heads of D."""

    batch_size: int
    num_tokens: int
    num_prompts: int
    num_heads: int
    head_dim: int

    def forward(self, dtype: torch.dtype) -> Work:
        """Operations of Q Kᵀ and P V; bytes of q, k, v, out, lse and, once, the prompts' k and v."""
        queries, prompts, lse = self._sizes(dtype)
        return Work(bytes=4 * queries + 2 * prompts + lse, flops=2 * self._product())

    def backward(self, dtype: torch.dtype) -> Work:
        """Operations of Q Kᵀ, dO Vᵀ, dS K, dSᵀ Q, Pᵀ dO; bytes of dO, q, k, v, out, lse, the prompts' k and
        v, and all gradients."""
        queries, prompts, lse = self._sizes(dtype)
        return Work(bytes=8 * queries + 4 * prompts + lse, flops=5 * self._product())

    def _sizes(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Bytes of q, of the prompts' k, and of lse."""
        of_a_token = self.num_heads * self.head_dim * dtype.itemsize
        tokens = self.batch_size * self.num_tokens
        return tokens * of_a_token, self.num_prompts * of_a_token, tokens * self.num_heads * 4

    def _product(self) -> int:
        keys = self.num_tokens + self.num_prompts
        return 2 * self.batch_size * self.num_heads * self.num_tokens * keys * self.head_dim


@dataclass
class Row:
    """One implementation at one shape; what is not known is None.

    Times are medians over rounds, with the fastest and the slowest round.

    forward, backward: from our layout to our layout, including all copies. concatenated: a library that is
    given concatenated keys and values, and leaves their gradients concatenated. Ratios: speed relative to the
    fastest correct library, with its concatenation and without it.
    """

    batch_size: int
    num_tokens: int
    num_prompts: int
    num_heads: int
    head_dim: int
    impl: str
    exact: bool = False
    forward_ms: float | None = None
    forward_ms_min: float | None = None
    forward_ms_max: float | None = None
    backward_ms: float | None = None
    backward_ms_min: float | None = None
    backward_ms_max: float | None = None
    concatenated_forward_ms: float | None = None
    concatenated_forward_ms_min: float | None = None
    concatenated_forward_ms_max: float | None = None
    concatenated_backward_ms: float | None = None
    concatenated_backward_ms_min: float | None = None
    concatenated_backward_ms_max: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    forward_gb_per_second: float | None = None
    backward_gb_per_second: float | None = None
    forward_share_of_bound: float | None = None
    backward_share_of_bound: float | None = None
    forward_ratio: float | None = None
    backward_ratio: float | None = None
    forward_ratio_to_concatenated: float | None = None
    backward_ratio_to_concatenated: float | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    error: str | None = None

    @property
    def case(self) -> Shape:
        return Shape(**{field.name: getattr(self, field.name) for field in fields(Shape)})

    @property
    def contender(self) -> str:
        return self.impl


Functions = tuple[Callable[..., Any], Callable[..., Any]]


def functions_of(name: str) -> Functions:
    """Forward and backward; ValueError if they are not available here."""
    ops = (get_backend(name) if name in OURS else get_backend("torch", name)).other
    return ops.attention, ops.attention_backward


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as views of one packed projection, prompt_k, prompt_v, and dO."""
    generator = torch.Generator(device).manual_seed(0)
    b, n, m = shape.batch_size, shape.num_tokens, shape.num_prompts
    h, d = shape.num_heads, shape.head_dim

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    qkv = random(b, n, 3, h, d)
    qkv[:, :, 0] *= d**-0.5
    return *qkv.unbind(2), *random(1, m, 2, h, d).unbind(2), random(b, n, h, d)


def run_backward(functions: Functions, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> Any:
    *given, grad = inputs
    return functions[1](grad, *given, out, lse, need_q=True, need_kv=True, packed=True)


def errors(functions: Functions, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the output and of the worst gradient, from float64 on the first images."""
    first = tuple(t[:CHECKED_IMAGES] for t in inputs)
    wide = tuple(t.double() for t in first)
    out, lse = functions[0](*first[:-1])
    grads = run_backward(functions, first, out, lse)
    exact_out, exact_lse = reference.attention(*wide[:-1])
    exact = run_backward((reference.attention, reference.attention_backward), wide, exact_out, exact_lse)
    return (
        operations.worst_error([out, lse], [exact_out, exact_lse]),
        operations.worst_error(
            [*grads.qkv.unbind(2), *grads.prompt_kv.unbind(2)],
            [*exact.qkv.unbind(2), *exact.prompt_kv.unbind(2)],
        ),
    )


def make_calls(
    name: str, functions: Functions, inputs: tuple[Tensor, ...]
) -> dict[str, Callable[[], object]]:
    """The calls that are timed for one implementation, by the field of its row."""
    forward, backward = functions
    out, lse = forward(*inputs[:-1])
    calls = {
        "forward_ms": lambda: forward(*inputs[:-1]),
        "backward_ms": lambda: run_backward(functions, inputs, out, lse),
    }
    if name in FLASH_BACKENDS:
        q, k, v, prompt_k, prompt_v, grad = inputs
        keys, values = (
            torch.cat((prompts.expand(len(x), -1, -1, -1), x), dim=1)
            for prompts, x in ((prompt_k, k), (prompt_v, v))
        )
        calls["concatenated_forward_ms"] = lambda: forward(q, keys, values, None, None)
        # Libraries always compute dK and dV; not asking for them only leaves out the copies that split them.
        calls["concatenated_backward_ms"] = partial(
            backward, grad, q, keys, values, None, None, out, lse, need_q=True, need_kv=False
        )
    return calls


def measure_shape(shape: Shape, names: Iterable[str], settings: Settings) -> list[Row]:
    """One row for each implementation."""
    rows = {name: Row(**asdict(shape), impl=name) for name in names}
    calls: dict[str, Callable[[], object]] = {}
    inputs = make_inputs(shape, settings.dtype, settings.device)
    for name, row in rows.items():
        try:
            functions = functions_of(name)
            found = errors(functions, inputs)
            prepared = {
                f"{name} {field}": operations.prepare(call, settings.device)
                for field, call in make_calls(name, functions, inputs).items()
            }
        except Exception as failure:  # a package that is missing, a kernel that does not build, out of memory
            row.error = first_line(failure)
            continue
        calls |= prepared
        row.exact = max(found) < ERROR_BELOW[settings.dtype]
        row.output_error, row.gradient_error = map(operations.finite, found)
    for key, times in settings.times(calls).items():
        name, field = key.split()
        for suffix, seconds in zip(("", "_min", "_max"), times, strict=True):
            setattr(rows[name], field + suffix, seconds * 1e3)
    for row in rows.values():
        fill_rates(row, settings)
    compare(list(rows.values()))
    return list(rows.values())


def fill_rates(row: Row, settings: Settings) -> None:
    shape, dtype = row.case, settings.dtype
    for part, work in (("forward", shape.forward(dtype)), ("backward", shape.backward(dtype))):
        milliseconds = getattr(row, f"{part}_ms")
        if milliseconds is not None:
            setattr(row, f"{part}_tflops", work.flops / milliseconds / 1e9)
            setattr(row, f"{part}_gb_per_second", work.bytes / milliseconds / 1e6)
            setattr(row, f"{part}_share_of_bound", settings.bounds.share(work, milliseconds / 1e3))


def compare(rows: list[Row]) -> None:
    """Fills in the correct rows' speed relative to the fastest correct library."""
    libraries = [row for row in rows if row.exact and row.impl in FLASH_BACKENDS]
    for part, row in itertools.product(("forward", "backward"), rows):
        own = getattr(row, f"{part}_ms")
        for other, ratio in (
            (f"{part}_ms", f"{part}_ratio"),
            (f"concatenated_{part}_ms", f"{part}_ratio_to_concatenated"),
        ):
            times = [getattr(library, other) for library in libraries]
            if row.exact and times:
                setattr(row, ratio, min(times) / own)


def make_table(rows: list[Row]) -> Table:
    first = rows[0]
    sizes = f"B {first.batch_size}, N {first.num_tokens}, m {first.num_prompts}"
    table = Table(
        title=f"{sizes}, H {first.num_heads}, D {first.head_dim}", box=box.SIMPLE, caption_justify="left"
    )
    table.add_column("implementation", no_wrap=True)
    for part in ("forward", "backward"):
        for column in (f"{part} ms", "TFLOP/s", "GB/s", "of bound", "× best", "× best, no concat"):
            table.add_column(column, justify="right")
    table.add_column("error", justify="right")

    def cells(row: Row, part: str, concatenated: bool) -> list[str]:
        if concatenated:
            return [number(getattr(row, f"concatenated_{part}_ms"), ".3f"), *[""] * 5]
        forms = {"ms": ".3f", "tflops": ".2f", "gb_per_second": ".1f", "share_of_bound": ".0%"}
        forms |= {"ratio": ".2f", "ratio_to_concatenated": ".2f"}
        return [number(getattr(row, f"{part}_{name}"), form) for name, form in forms.items()]

    for row in rows:
        is_finite = row.output_error is not None and row.gradient_error is not None
        worst = max(row.output_error, row.gradient_error) if is_finite else None
        error = operations.verdict(row.error, row.exact, worst)
        style = "" if row.exact else "red"
        parts = [*cells(row, "forward", False), *cells(row, "backward", False)]
        table.add_row(row.impl, *parts, error, style=style)
        if row.concatenated_forward_ms is not None:
            parts = [*cells(row, "forward", True), *cells(row, "backward", True)]
            table.add_row("  concatenated already", *parts, "", style=style)
    table.caption = operations.failures({row.impl: row.error for row in rows})
    return table


def choose_shapes(
    on_gpu: bool, num_tokens: str, num_heads: str, head_dim: str, num_prompts: str, batch_size: str
) -> list[Shape]:
    """The models' shapes; or all combinations of what is given, the rest as in ViT-B/16."""
    models = MODELS if on_gpu else MODELS[:1]
    if num_tokens or num_heads or head_dim:
        models = list(
            itertools.product(
                positive_numbers("num-tokens", num_tokens or "197"),
                positive_numbers("num-heads", num_heads or "12"),
                positive_numbers("head-dim", head_dim or "64"),
            )
        )
    batches = positive_numbers("batch-size", batch_size or ("64" if on_gpu else "2"))
    prompts = positive_numbers("num-prompts", num_prompts)
    return [Shape(b, n, m, h, d) for (n, h, d), m, b in itertools.product(models, prompts, batches)]


def main(
    num_prompts: Annotated[str, typer.Option(help="m, comma-separated")] = "50,100,200",
    num_tokens: Annotated[str, typer.Option(help="N, comma-separated; default: the models'")] = "",
    num_heads: Annotated[str, typer.Option(help="H, comma-separated; default: the models'")] = "",
    head_dim: Annotated[str, typer.Option(help="D, comma-separated; default: the models'")] = "",
    batch_size: Annotated[str, typer.Option(help="images, comma-separated; default by device")] = "",
    implementations: Annotated[
        str,
        typer.Option(help=f"comma-separated, of {', '.join((*OURS, *FLASH_BACKENDS))}; default by device"),
    ] = "",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; default by device")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after warm-up")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: results/attention-<device>-<date>.json")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Measure prompted attention, forward and backward.

    The exit status is 1 if our kernels are wrong, or fail though there is memory enough.
    """
    on_gpu = operations.choose_device(device).type == "cuda"
    default = ",".join(ON_A_GPU if on_gpu else ON_A_CPU)
    names = listed("implementations", implementations or default, (*OURS, *FLASH_BACKENDS))
    shapes = choose_shapes(on_gpu, num_tokens, num_heads, head_dim, num_prompts, batch_size)
    console = Console()
    console.width = max(console.width, 200)  # a table cut to a pipe's 80 columns says nothing
    settings, report = operations.start(
        "attention", Row, console,
        device=device, dtype=dtype, repeats=repeats, output=output, asked=shapes, fresh=fresh,
    )  # fmt: skip
    console.print(f"{len(shapes)} shapes, of each {len(names)} implementations, forward and backward.")
    console.print(report.describe(), soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        for shape in progress.track(shapes, description="shapes"):
            there = [row for row in report.rows_of(shape) if row.impl in names]
            if len(there) < len(names):  # the whole shape again, so that compared rows ran in turns
                there = measure_shape(shape, report.contenders(shape, names), settings)
                report.replace(shape, there)
            console.print(make_table(there))
    console.print(f"written: {report.path}")
    operations.end_with(report.rows, console)


if __name__ == "__main__":
    typer.run(main)
