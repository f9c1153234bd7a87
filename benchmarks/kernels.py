"""A block's operations except attention, alone: our kernels beside PyTorch, eager and compiled. One command:

    python benchmarks/kernels.py

times them at the shapes of ViT-B/16, L/16 and H/14, each beside its definition in PyTorch, the same compiled,
and the least time that its memory traffic and matmuls can take on this device; prints a table for each shape
and writes results/kernels-<device>-<date>.json as it goes. Layer norm and GELU are measured at every shape,
the other kinds at the first; `--kinds` names kinds to measure at every shape. A wrong implementation is
marked, and not compared with. The same command resumes an interrupted run; `--fresh` starts again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import operations
import torch
import typer
from measure import first_line
from operations import DTYPES, ERROR_BELOW, Settings, Work, number
from reports import Fresh, listed
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from vpt_fast.kernels import get_backend
from vpt_fast.kernels.dispatch import TORCH_OPS, Ops
from vpt_fast.kernels.mlp.reference import CODE_OF_ZERO, CODES_PER_UNIT, GATED

IMPLEMENTATIONS = ("triton", "torch", "compiled", "library_triton")
OURS = "triton"
NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu", "quick_gelu", "swiglu")
ROTATIONS = ("rotary",)
KINDS = (*NORMS, *ACTIVATIONS, *ROTATIONS)
AT_EVERY_SHAPE = ("layer", "gelu")
MLP_RATIO = 4
MOST_HEAD_DIM = 64  # that of rotary ViTs, DINOv3's H too
EPS = 1e-6
CODES_ERROR_BELOW = 1e-3  # where float32 and float64 round differently, codes differ by one

# Tokens and width of ViT-B/16, L/16 and H/14
MODELS = ["197x768", "197x1024", "257x1280"]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    op: a key of `OPERATIONS`. kind: of the norm, the activation or the positions. codes: whether what
    backward needs is kept in 8 bits (forward), or read in 8 bits (backward). Tensors are (B, N, width); the
    MLP's pre-activation is 4 times as wide, for SwiGLU gate and value together.
    """

    op: str
    kind: str
    codes: bool
    batch_size: int
    num_tokens: int
    width: int

    @property
    def rows(self) -> int:
        return self.batch_size * self.num_tokens

    @property
    def hidden(self) -> int:
        """Width of the pre-activation u."""
        return MLP_RATIO * self.width

    @property
    def heads(self) -> tuple[int, int]:
        """Heads and their dimension."""
        head_dim = min(self.width, MOST_HEAD_DIM)
        return self.width // head_dim, head_dim

    @property
    def activated(self) -> int:
        """Width of the activation's output."""
        return self.hidden // 2 if self.kind in GATED else self.hidden


class Operation(NamedTuple):
    """How one operation gets its inputs, is run and is counted.

    inputs(case, dtype, random): tensors whose first dimension is the batch, and those that all images share.
    run(ops, case, dtype, *inputs): with one implementation's operations.
    work(case, itemsize): the least work that it takes.
    fused(case, dtype, *inputs): as one GEMM with its epilogue, or None if it has no GEMM.
    codes: whether it is measured without codes, with them, or both.
    """

    kinds: tuple[str, ...]
    inputs: Callable[..., tuple[list[Tensor], list[Tensor]]]
    run: Callable[..., Any]
    work: Callable[[Case, int], Work]
    fused: Callable[..., Any] | None = None
    codes: tuple[bool, ...] = (False, True)


# Inputs. The residual stream is float32, whatever the matmuls' dtype; its gradient is in the latter.


def normalize_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    return [random(case.batch_size, case.num_tokens, case.width)], []


def add_normalize_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    shape = (case.batch_size, case.num_tokens, case.width)
    return [random(*shape), random(*shape).to(dtype)], []


def normalize_backward_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    shape = (case.batch_size, case.num_tokens, case.width)
    x_hat, rstd, codes, scale = TORCH_OPS.normalize(random(*shape), EPS, case.kind, dtype, pack=case.codes)
    kept = [codes, rstd, scale] if case.codes else [x_hat, rstd]
    return [random(*shape).to(dtype), random(*shape).to(dtype), *kept], []


def rotate_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    """Queries, as a view of the packed projection, and one table for all heads."""
    heads, head_dim = case.heads
    qkv = random(case.batch_size, case.num_tokens, 3, heads, head_dim).to(dtype)
    angles = random(case.num_tokens, 1, head_dim // 2)
    return [qkv[:, :, 0]], [angles.sin(), angles.cos()]


def activate_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    return [random(case.batch_size, case.num_tokens, case.hidden).to(dtype)], []


def activate_backward_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    grad = random(case.batch_size, case.num_tokens, case.activated).to(dtype)
    return [grad, *_kept(case, dtype, random)], []


def linear_activate_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    weight = random(case.hidden, case.width) * case.width**-0.5
    x = random(case.batch_size, case.num_tokens, case.width)
    return [x.to(dtype)], [weight.to(dtype), random(case.hidden).to(dtype)]


def linear_activate_backward_inputs(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> tuple:
    weight = random(case.width, case.hidden) * case.width**-0.5
    grad = random(case.batch_size, case.num_tokens, case.width).to(dtype)
    return [grad, *_kept(case, dtype, random)], [weight.to(dtype)]


def _kept(case: Case, dtype: torch.dtype, random: Callable[..., Tensor]) -> list[Tensor]:
    """The pre-activation, or its codes and, where they have one, their scale."""
    u = random(case.batch_size, case.num_tokens, case.hidden).to(dtype)
    if not case.codes:
        return [u]
    _, codes, scale = TORCH_OPS.activate(u, case.kind, pack=True)
    return [codes] if scale is None else [codes, scale]


# The operations, with one implementation's `Ops`.


def normalize(ops: Ops, case: Case, dtype: torch.dtype, x: Tensor) -> Any:
    return ops.normalize(x, EPS, case.kind, dtype, pack=case.codes)


def add_normalize(ops: Ops, case: Case, dtype: torch.dtype, residual: Tensor, update: Tensor) -> Any:
    return ops.add_normalize(residual, update, EPS, case.kind, dtype, pack=case.codes)


def normalize_backward(
    ops: Ops,
    case: Case,
    dtype: torch.dtype,
    grad: Tensor,
    residual: Tensor,
    x_hat: Tensor,
    rstd: Tensor,
    scale: Tensor | None = None,
) -> Any:
    return ops.normalize_backward(grad, x_hat, rstd, scale, case.kind, residual, dtype)


def rotate(ops: Ops, case: Case, dtype: torch.dtype, x: Tensor, sin: Tensor, cos: Tensor) -> Any:
    """In place: every call rotates x further."""
    ops.rotate_(x, sin, cos)
    return x


def activate(ops: Ops, case: Case, dtype: torch.dtype, u: Tensor) -> Any:
    return ops.activate(u, case.kind, pack=case.codes)


def activate_backward(
    ops: Ops, case: Case, dtype: torch.dtype, grad: Tensor, kept: Tensor, scale: Tensor | None = None
) -> Any:
    return ops.activate_backward(grad, kept, scale, case.kind)


def linear_activate(ops: Ops, case: Case, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    u = F.linear(x, weight, bias)
    a, codes, _ = ops.activate(u, case.kind, pack=case.codes)
    return a, codes if case.codes else u


def linear_activate_backward(
    ops: Ops, case: Case, dtype: torch.dtype, grad: Tensor, kept: Tensor, weight: Tensor
) -> Any:
    return ops.activate_backward(grad @ weight, kept, None, case.kind)


def fused_linear_activate(case: Case, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    from vpt_fast.kernels.mlp import gemm  # not every platform has Triton

    return gemm.linear_activate(x, weight, bias, case.kind, pack=case.codes)


def fused_linear_activate_backward(
    case: Case, dtype: torch.dtype, grad: Tensor, kept: Tensor, weight: Tensor
) -> Any:
    from vpt_fast.kernels.mlp import gemm

    return gemm.linear_activate_backward(grad, weight, kept, case.kind)


# Bytes: `size` per element in the matmuls' dtype, 4 in float32 and 1 for codes.


def normalize_work(case: Case, size: int) -> Work:
    """x -> x̂, rstd and the codes with their scale."""
    codes = case.rows * (case.width + 4) if case.codes else 0
    return Work(case.rows * (case.width * (4 + size) + 4) + codes)


def add_normalize_work(case: Case, size: int) -> Work:
    """The update is read and the sum written beside what `normalize` does."""
    return Work(normalize_work(case, size).bytes + case.rows * case.width * (size + 4))


def normalize_backward_work(case: Case, size: int) -> Work:
    """dx̂, the residual stream's gradient, rstd and x̂ or its codes with their scale -> dx."""
    x_hat = case.width + 4 if case.codes else case.width * size
    return Work(case.rows * (case.width * 3 * size + 4 + x_hat))


def rotate_work(case: Case, size: int) -> Work:
    """x -> x, and sine and cosine of half a head's dimensions for every token."""
    heads, head_dim = case.heads
    return Work(2 * case.rows * heads * head_dim * size + case.num_tokens * head_dim * 4)


def activate_work(case: Case, size: int) -> Work:
    """u -> a and the derivative's codes."""
    kept = _code_bytes(case) if case.codes else 0
    return Work(case.rows * (case.hidden + case.activated) * size + kept)


def activate_backward_work(case: Case, size: int) -> Work:
    """da and u or the codes -> du."""
    kept = _code_bytes(case) if case.codes else case.rows * case.hidden * size
    return Work(case.rows * (case.activated + case.hidden) * size + kept)


def linear_activate_work(case: Case, size: int) -> Work:
    """x, weight and bias -> a and u or the codes."""
    kept = _code_bytes(case) if case.codes else case.rows * case.hidden * size
    read = case.rows * case.width + case.hidden * (case.width + 1)
    return Work((read + case.rows * case.hidden) * size + kept, _product(case))


def linear_activate_backward_work(case: Case, size: int) -> Work:
    """The gradient of fc2's output, its weight, and u or the codes -> du."""
    kept = _code_bytes(case) if case.codes else case.rows * case.hidden * size
    read = case.rows * case.width + case.hidden * case.width
    return Work((read + case.rows * case.hidden) * size + kept, _product(case))


def _code_bytes(case: Case) -> int:
    """One byte per element; for a gated activation also two float32 scales per row."""
    return case.rows * (case.hidden + (8 if case.kind in GATED else 0))


def _product(case: Case) -> int:
    return 2 * case.rows * case.width * case.hidden


_NOT_GATED = tuple(kind for kind in ACTIVATIONS if kind not in GATED)
OPERATIONS = {
    "normalize": Operation(NORMS, normalize_inputs, normalize, normalize_work),
    "add_normalize": Operation(NORMS, add_normalize_inputs, add_normalize, add_normalize_work),
    "normalize_backward": Operation(
        NORMS, normalize_backward_inputs, normalize_backward, normalize_backward_work
    ),
    "rotate": Operation(ROTATIONS, rotate_inputs, rotate, rotate_work, codes=(False,)),
    "activate": Operation(ACTIVATIONS, activate_inputs, activate, activate_work),
    "activate_backward": Operation(
        ACTIVATIONS, activate_backward_inputs, activate_backward, activate_backward_work
    ),
    "linear_activate": Operation(
        _NOT_GATED, linear_activate_inputs, linear_activate, linear_activate_work, fused_linear_activate
    ),
    "linear_activate_backward": Operation(
        _NOT_GATED,
        linear_activate_backward_inputs,
        linear_activate_backward,
        linear_activate_backward_work,
        fused_linear_activate_backward,
    ),
}


@dataclass
class Row:
    """One implementation of one case; what is not known is None.

    impl: ``triton``: our kernel, for a linear layer the GEMM with its epilogue; ``torch``: the definition;
    ``compiled``: the same by torch.compile; ``library_triton``: PyTorch's GEMM, then our kernel.
    ms: the median over rounds; ms_min, ms_max: the fastest and the slowest round.
    ratio: speed relative to the fastest correct one that is not ``triton``.
    """

    op: str
    kind: str
    codes: bool
    batch_size: int
    num_tokens: int
    width: int
    impl: str
    exact: bool = False
    ms: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    gb_per_second: float | None = None
    tflops: float | None = None
    share_of_bound: float | None = None
    ratio: float | None = None
    relative_error: float | None = None
    error: str | None = None

    @property
    def case(self) -> Case:
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})

    @property
    def contender(self) -> str:
        return self.impl


def implementation(name: str, case: Case, dtype: torch.dtype) -> Callable[..., Any]:
    """What is called on the case's inputs."""
    operation = OPERATIONS[case.op]
    if name == "torch":
        return partial(operation.run, TORCH_OPS, case, dtype)
    if name == "compiled":
        torch._dynamo.reset()  # or else a function fails to compile for its ninth shape
        return torch.compile(partial(operation.run, TORCH_OPS, case, dtype), dynamic=False, fullgraph=True)
    ops = get_backend("triton").other
    if name == OURS and operation.fused is not None:
        return partial(operation.fused, case, dtype)
    return partial(operation.run, ops, case, dtype)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    return OPERATIONS[case.op].inputs(case, dtype, random)


def read(result: Any) -> list[Tensor]:
    """The tensors of a result, with codes and their scale as the numbers that they stand for."""
    tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    for i, codes in enumerate(tensors):
        if codes.dtype == torch.uint8:
            tensors[i] = (codes.double() - CODE_OF_ZERO) / CODES_PER_UNIT
        elif codes.dtype == torch.int8:
            scale = tensors.pop()  # (..., 1), or (..., 2) for two halves
            tensors[i] = codes.unflatten(-1, (scale.shape[-1], -1)).double() * scale.unsqueeze(-1)
    return tensors


def check(call: Callable[..., Any], case: Case, inputs: tuple[list[Tensor], list[Tensor]]) -> float:
    """The worst relative error of a result from float64, on the first image of the batch."""
    batched, shared = inputs
    first = (*(t[:1] for t in batched), *shared)
    wide = (t.double() if t.is_floating_point() else t for t in first)
    expected = OPERATIONS[case.op].run(TORCH_OPS, case, torch.float64, *wide)
    actual = read(call(*batched, *shared))  # the whole batch, as it is timed, so that it is compiled once
    return operations.worst_error((t[:1] for t in actual), read(expected))


def measure_case(case: Case, names: Iterable[str], settings: Settings) -> list[Row]:
    """One row for each implementation that the operation has."""
    dtype, device = settings.dtype, settings.device
    rows = {name: Row(**asdict(case), impl=name) for name in implementations_of(case.op, names)}
    calls: dict[str, Callable[[], object]] = {}
    inputs = make_inputs(case, dtype, device)
    allowed = max(ERROR_BELOW[dtype], CODES_ERROR_BELOW if case.codes else 0.0)
    for name, row in rows.items():
        try:
            call = implementation(name, case, dtype)
            error = check(call, case, inputs)
            calls[name] = operations.prepare(partial(call, *inputs[0], *inputs[1]), device)
        except Exception as failure:  # a kernel that does not build, no compiler, out of memory
            row.error = first_line(failure)
            continue
        row.exact, row.relative_error = error < allowed, operations.finite(error)
    work = OPERATIONS[case.op].work(case, dtype.itemsize)
    for name, times in settings.times(calls).items():
        row = rows[name]
        row.ms, row.ms_min, row.ms_max = (seconds * 1e3 for seconds in times)
        row.gb_per_second = work.bytes / times.median / 1e9
        row.tflops = work.flops / times.median / 1e12 if work.flops else None
        row.share_of_bound = settings.bounds.share(work, times.median)
    compare(list(rows.values()))
    return list(rows.values())


def implementations_of(op: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name != "library_triton" or OPERATIONS[op].fused is not None]


def compare(rows: list[Row]) -> None:
    """Fills in the correct rows' speed relative to the fastest correct one that is not ours."""
    others = [row.ms for row in rows if row.exact and row.impl != OURS]
    for row in rows:
        if row.exact and others:
            row.ratio = min(others) / row.ms


def make_table(rows: list[Row]) -> Table:
    first = rows[0]
    title = f"B {first.batch_size}, N {first.num_tokens}, d {first.width}"
    table = Table(title=title, box=box.SIMPLE, caption_justify="left")
    for column in ("operation", "kind", "codes", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "GB/s", "TFLOP/s", "of bound", "× best other", "error"):
        table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        is_next = i == 0 or row.case != rows[i - 1].case
        table.add_row(
            *((row.op, row.kind, "8 bits" if row.codes else "") if is_next else ("", "", "")),
            row.impl,
            number(row.ms, ".3f"),
            number(row.gb_per_second, ".1f"),
            number(row.tflops, ".2f"),
            number(row.share_of_bound, ".0%"),
            number(row.ratio, ".2f"),
            operations.verdict(row.error, row.exact, row.relative_error),
            style="" if row.exact else "red",
        )
    table.caption = operations.failures({f"{row.op} {row.kind} {row.impl}": row.error for row in rows})
    return table


def choose_cases(shapes: list[tuple[int, int]], batch: int, ops: list[str], kinds: list[str]) -> list[Case]:
    """The kinds that are asked for, at every shape; by default all at the first shape and few at the others.

    Linear layers take seconds to build, so by default they are measured with GELU alone.
    """
    return [
        Case(op, kind, codes, batch, tokens, width)
        for i, (tokens, width) in enumerate(shapes)
        for op in ops
        for kind in OPERATIONS[op].kinds
        if kind in (kinds or (AT_EVERY_SHAPE if i else KINDS))
        and (kinds or kind == "gelu" or OPERATIONS[op].fused is None)
        for codes in OPERATIONS[op].codes
    ]


def parse_shapes(values: str) -> list[tuple[int, int]]:
    """Pairs (tokens, width) from text such as 197x768; typer.BadParameter for anything else."""
    found = []
    for value in listed("shapes", values):
        tokens, _, width = value.partition("x")
        if not (tokens.isdecimal() and width.isdecimal() and int(tokens) > 0 and int(width) > 0):
            raise typer.BadParameter(f"shapes: got {value!r}, want tokens x width, such as 197x768")
        found.append((int(tokens), int(width)))
    return found


def main(
    shapes: Annotated[str, typer.Option(help="tokens x width, comma-separated; default by device")] = "",
    batch_size: Annotated[int, typer.Option(min=0, help="images; 0: by device")] = 0,
    ops: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(OPERATIONS)}; default: all")] = "",
    kinds: Annotated[
        str,
        typer.Option(
            help=f"comma-separated, of {', '.join(KINDS)}; default: all at the first shape, "
            f"{' and '.join(AT_EVERY_SHAPE)} at the others"
        ),
    ] = "",
    implementations: Annotated[
        str, typer.Option(help=f"comma-separated, of {', '.join(IMPLEMENTATIONS)}; default by device")
    ] = "",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; default by device")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after warm-up")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: results/kernels-<device>-<date>.json")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Measure the operations of a block, forward and backward.

    The exit status is 1 if our kernels are wrong, or fail though there is memory enough.
    """
    on_gpu = operations.choose_device(device).type == "cuda"
    default = ",".join(IMPLEMENTATIONS) if on_gpu else "torch"
    names = listed("implementations", implementations or default, IMPLEMENTATIONS)
    cases = choose_cases(
        parse_shapes(shapes or ",".join(MODELS if on_gpu else MODELS[:1])),
        batch_size or (64 if on_gpu else 2),
        listed("ops", ops or ",".join(OPERATIONS), OPERATIONS),
        listed("kinds", kinds, KINDS) if kinds else [],
    )
    if not cases:
        raise typer.BadParameter(f"kinds: got {kinds!r}, want one of {ops!r}'s")
    console = Console()
    console.width = max(console.width, 140)  # a table cut to a pipe's 80 columns says nothing
    settings, report = operations.start(
        "kernels", Row, console,
        device=device, dtype=dtype, repeats=repeats, output=output, asked=cases, fresh=fresh,
    )  # fmt: skip
    console.print(f"{len(cases)} operations, of each up to {len(names)} implementations.")
    console.print(report.describe(), soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("operations", total=len(cases))
        for _, of_shape in itertools.groupby(cases, key=lambda case: (case.num_tokens, case.width)):
            shown: list[Row] = []
            for case in of_shape:
                wanted = implementations_of(case.op, names)
                there = [row for row in report.rows_of(case) if row.impl in wanted]
                if len(there) < len(wanted):  # the whole case again, so that compared rows ran in turns
                    there = measure_case(case, report.contenders(case, wanted), settings)
                    report.replace(case, there)
                shown += there
                progress.advance(task)
            if shown:
                console.print(make_table(shown))
    console.print(f"written: {report.path}")
    operations.end_with(report.rows, console)


if __name__ == "__main__":
    typer.run(main)
