"""Draws what throughput.py measured, against the number of prompts and against the batch size:

    python benchmarks/throughput.py --num-prompts 1,10,50,100,200 --output sweep.json
    python benchmarks/plots.py sweep.json

writes one PNG for every model and sweep in the file, beside it. Readable in grey: lines differ in their
dashes and markers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from compare import read_report
from implementations import BOUNDS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from measure import label
from rich.console import Console

from vpt_fast.files import replacing

Rows = Sequence[Mapping[str, Any]]

AXES = {"num_prompts": "prompts", "batch_size": "batch size"}
# What a sweep holds fixed, beside the other axis.
FIXED = ("model", "prompt_type", "image_size")
COLORS = {"vpt_fast": "black", "concat": "#c0392b", "bound": "#7fb3d5"}
DASHES = {"vpt_fast": "-", "concat": "--", "bound": ":"}
MARKERS = "os^DvP*X<>hd"


@dataclass(frozen=True)
class Sweep:
    """Rows of one model that differ only in one number and in the implementation.

    Attributes:
        axis: a key of `AXES`.
        other: the value at which the other axis is held.
        rows: correct rows that have a speed.
        left_out: the labels of implementations that have none.
    """

    axis: str
    other: int
    rows: Rows
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """Part of a file's name."""
        fixed = f"batch-{self.other}" if self.axis == "num_prompts" else f"{self.other}-prompts"
        by = AXES[self.axis].replace(" ", "-")
        return f"{self.rows[0]['model']}-{self.rows[0]['prompt_type']}-{fixed}-by-{by}"


def sweeps(rows: Rows) -> Iterator[Sweep]:
    """Every sweep of at least two values in a report's rows."""
    for axis, other in itertools.permutations(AXES):

        def fixed(row: Mapping[str, Any], other: str = other) -> tuple[Any, ...]:
            return tuple(row[field] for field in (*FIXED, other))

        for key, group in itertools.groupby(sorted(rows, key=fixed), key=fixed):
            those = list(group)
            drawn = [row for row in those if row["exact"] and row["images_per_second"] is not None]
            if len({row[axis] for row in drawn}) > 1:
                missing = dict.fromkeys(map(label_of, those))
                for row in drawn:
                    missing.pop(label_of(row), None)
                yield Sweep(axis, key[-1], drawn, tuple(missing))


def label_of(row: Mapping[str, Any]) -> str:
    return label(row["impl"], row["memory"])


def kind_of(implementation: str) -> str:
    """A key of `COLORS`."""
    if implementation in BOUNDS:
        return "bound"
    return "vpt_fast" if implementation.startswith("vpt_fast") else "concat"


def draw(sweep: Sweep, report: Mapping[str, Any], path: Path) -> None:
    """Images/s with their range, and memory: the peak, or what is kept where there is no peak (on a CPU)."""
    has_peak = any(row["peak_mib"] is not None for row in sweep.rows)
    memory, memory_title = ("peak_mib", "peak memory, MiB")
    if not has_peak:
        memory, memory_title = "kept_mib_per_image", "kept for backward, MiB an image"
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    kinds: dict[str, int] = {}  # how many lines there are of each
    for name in dict.fromkeys(map(label_of, sweep.rows)):
        points = sorted((row for row in sweep.rows if label_of(row) == name), key=lambda row: row[sweep.axis])
        kind = kind_of(points[0]["impl"])
        nth = kinds[kind] = kinds.get(kind, -1) + 1
        style: dict[str, Any] = {
            "color": COLORS[kind],
            "linestyle": DASHES[kind],
            "marker": MARKERS[nth % len(MARKERS)],
            "markersize": 6,
            "markerfacecolor": COLORS[kind] if kind == "vpt_fast" else "white",
        }
        x = [row[sweep.axis] for row in points]
        speed = [row["images_per_second"] for row in points]
        low = [row["images_per_second"] - row["images_per_second_min"] for row in points]
        high = [row["images_per_second_max"] - row["images_per_second"] for row in points]
        own = points[0]["dtype"]  # some implementations have one of their own
        text = name if own == report["dtype"] else f"{name}, {own}"
        left.errorbar(x, speed, yerr=(low, high), label=text, capsize=3, elinewidth=0.8, **style)
        kept = [(row[sweep.axis], row[memory]) for row in points if row[memory] is not None]
        right.plot([place for place, _ in kept], [mib for _, mib in kept], **style)
    for axes, title in ((left, "images/s, median and range"), (right, memory_title)):
        _finish(axes, title, sweep)
    first = sweep.rows[0]
    fixed = f"batch {sweep.other}" if sweep.axis == "num_prompts" else f"{sweep.other} prompts"
    figure.suptitle(
        f"{first['model']}, {first['prompt_type']}, {fixed}; "
        f"{report['device']}, torch {report['torch']}, {report['date']}"
    )
    note = f"wrong or failed, not drawn: {'; '.join(sweep.left_out)}" if sweep.left_out else None
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title=note)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _finish(axes: Axes, title: str, sweep: Sweep) -> None:
    values = sorted({row[sweep.axis] for row in sweep.rows})
    if sweep.axis == "batch_size":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, labels=[str(value) for value in values])
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel(AXES[sweep.axis])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)


def main(
    results: Annotated[Path, typer.Argument(help="a file that throughput.py wrote")],
    output: Annotated[Path | None, typer.Option(help="folder; default: that of the results")] = None,
) -> None:
    """Draw images/s and memory against the number of prompts and against the batch size."""
    try:
        report = read_report(results)
    except ValueError as error:
        raise typer.BadParameter(f"results: {error}") from None
    # Rows of other benchmarks lack some of these fields.
    rows = [row for row in report["rows"] if row.keys() >= {*FIXED, *AXES}]
    found = list(sweeps(rows))
    if not found:
        raise typer.BadParameter(
            f"results: {results} has no right rows with two numbers of prompts or two batch sizes; "
            "want a run such as --num-prompts 1,10,50,100,200"
        )
    folder = output or results.parent
    folder.mkdir(parents=True, exist_ok=True)
    for sweep in found:
        path = folder / f"{results.stem}-{sweep.name}.png"
        draw(sweep, report, path)
        Console().print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
