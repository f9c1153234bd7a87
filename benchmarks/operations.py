"""What the benchmarks of single operations share: how a call is timed, and the bounds on its speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import typer
from ceilings import large_product
from find_batch import ran_out_of_memory
from reports import Report, make_header, one_of, output_path
from rich.console import Console
from rich.markup import escape
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ERROR_BELOW = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative error, by norm and from float64, of an implementation that counts as right."""

# Larger than any cache: 50 MB on an H100, 126 MB on a B200.
_FLUSH_BYTES = {"cuda": 2**28, "cpu": 2**26}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
_WARM_UP = 3


@dataclass(frozen=True)
class Work:
    """The least work that an operation takes.

    bytes: every input read once and every output written once. flops: of its matmuls.
    """

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Bounds:
    """Measured speed of the device: GB/s of a large copy, TFLOP/s of a large matmul."""

    gb_per_second: float
    tflops: float

    def share(self, work: Work, seconds: float) -> float:
        """The least time for the work, by the tighter of both bounds, divided by the time it took."""
        return max(work.bytes / (self.gb_per_second * 1e9), work.flops / (self.tflops * 1e12)) / seconds


class Times(NamedTuple):
    """Seconds: the median of the rounds, the fastest and the slowest one."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Settings:
    """How a case is measured."""

    device: torch.device
    dtype: torch.dtype  # of the matmuls
    repeats: int
    bounds: Bounds

    def times(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        """Times of calls from `prepare`, by name."""
        samples = 10 if self.device.type == "cuda" else 1
        rounds = time_calls(calls, self.device, repeats=self.repeats, samples=samples)
        return {
            name: Times(statistics.median(seconds), min(seconds), max(seconds))
            for name, seconds in rounds.items()
        }


def start(
    benchmark: str,
    row_type: type,
    console: Console,
    *,
    device: str,
    dtype: str,
    repeats: int,
    output: Path | None,
    asked: Iterable[Hashable],
    fresh: bool,
) -> tuple[Settings, Report]:
    """Reads the flags that these benchmarks share, prints the device, and measures its bounds.

    Args:
        asked: the cases to measure, as of `Report`.

    Raises:
        typer.BadParameter: an unknown or missing device, an unknown dtype, an output that is not a report or
            cannot be written, or that holds another run's rows.
    """
    where = choose_device(device)
    name = one_of("dtype", dtype or ("bfloat16" if where.type == "cuda" else "float32"), DTYPES)
    header = {**make_header(where), "dtype": name, "repeats": repeats}
    report = Report(output_path(output, header, row_type, benchmark), header, row_type, asked, fresh)
    console.print(f"{measure.device_name(where)}, torch {torch.__version__}, {name}")
    if where.type == "cpu":
        console.print("Triton's kernels are not measured on a CPU: `torch` is their definition in PyTorch.")
    with console.status("bounds of the device"):
        found = report.once("bounds", lambda: asdict(measure_bounds(where, DTYPES[name], repeats)))
        bounds = Bounds(**found)
    console.print(f"Bounds: copy {bounds.gb_per_second:.0f} GB/s, product {bounds.tflops:.2f} TFLOP/s.")
    return Settings(where, DTYPES[name], repeats, bounds), report


def choose_device(device: str) -> torch.device:
    """The device of a flag, which may be empty; typer.BadParameter for one that is unknown or missing."""
    one_of("device", device or "cpu", ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device: got 'cuda', and there is no CUDA device here; want cpu")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def measure_bounds(device: torch.device, dtype: torch.dtype, repeats: int) -> Bounds:
    # Unwritten zeros may all be mapped to one page of memory.
    source = torch.full((_COPY_BYTES[device.type],), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = prepare(lambda: target.copy_(source), device)
    seconds = statistics.median(time_calls({"copy": copy}, device, repeats=repeats)["copy"])
    return Bounds(2 * source.nbytes / seconds / 1e9, large_product(device, dtype))


class Replay:
    """A call that was captured in a CUDA graph.

    Replaying it costs the host one launch, whatever is in it, so that a short kernel's time is not that of
    the Python that launches it. The graph holds addresses of the call's tensors, so this keeps them alive.

    Args:
        pool: of torch.cuda.graph_pool_handle(): the memory of the call's results, shared by all that are
            given it, of which each overwrites the others' results; None: memory of its own.
    """

    def __init__(self, call: Callable[[], object], device: torch.device, pool: Any = None) -> None:
        self._call = call
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()

    def __call__(self) -> None:
        self._graph.replay()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """For all captures, which cannot be on the default stream: the allocator gives the memory of one stream
    to no other, and cuBLAS makes a workspace for each."""
    return torch.cuda.Stream(device)


def prepare(call: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """What is timed for a call: the call itself, compiled by a first run; on a GPU its `Replay`."""
    if device.type == "cuda":
        return Replay(call, device, pool)
    call()
    return call


def time_calls(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, samples: int = 1
) -> dict[str, list[float]]:
    """Seconds of single calls with cold caches, the median of `samples` in each of `repeats` rounds.

    All calls take turns in a round. Before each call a buffer larger than the caches is read, so that they
    hold none of the call's data and nothing that is still to be written back; on a GPU that takes long enough
    for the host to queue the call before the device reaches it.

    Args:
        calls: from `prepare`.
    """
    buffer = torch.ones(_FLUSH_BYTES[device.type] // 4, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            watches = []
            for _ in range(samples):
                buffer.sum()
                watches.append(measure.Stopwatch(device))
                watches[-1].mark()
                call()
                watches[-1].mark()
            seconds[name].append(statistics.median(watch.seconds()[0] for watch in watches))
    return seconds


def worst_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error, by norm, of several tensors; infinite where one is missing or NaN."""
    return measure.gradient_error(
        {str(i): tensor for i, tensor in enumerate(actual)},
        {str(i): tensor for i, tensor in enumerate(expected)},
    )


def finite(value: float | None) -> float | None:
    """The value; None for what JSON cannot represent."""
    return value if value is not None and value < float("inf") else None


def number(value: float | None, form: str) -> str:
    """A table's cell."""
    return "" if value is None else format(value, form)


def verdict(failure: str | None, is_right: bool, error: float | None) -> str:
    """A table's cell on whether an implementation is right."""
    return "failed" if failure else ("" if is_right else "WRONG ") + number(error, ".1e")


def end_with(rows: Iterable[Any], console: Console, *, ours: str = "triton") -> None:
    """Ends the command with exit status 1 where our own implementations are wrong, or did not run though
    there was memory enough.

    Args:
        rows: with `impl`, `exact` and `error`.
        ours: what the names of our implementations begin with.
    """
    wrong = [row for row in rows if row.impl.startswith(ours) and not row.exact]
    if any(row.error is None or not ran_out_of_memory(row.error) for row in wrong):
        console.print(f"[red]{ours} failed, or is wrong[/]: see the tables")
        raise typer.Exit(1)


def failures(errors: Mapping[str, str | None]) -> str | None:
    """A table's caption: why implementations failed. Brackets in it are no markup of rich's."""
    return escape("\n".join(f"{name}: {error}" for name, error in errors.items() if error)) or None
