"""What got faster or slower between two results files of the same benchmark:

    python benchmarks/compare.py OLD.json NEW.json

Rows are matched by what was measured. A change counts if the ranges of the two files, smallest to largest of
the repetitions, do not overlap; else it is within noise. With `--fail-below 0.95` the exit status is 1 if a
row's speed fell below that ratio, beyond noise, or if a row of both files is wrong or failed in the new one
alone. Rows that only one file has are listed, and count for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

IDENTITY = (
    "model", "prompt_type", "num_prompts", "batch_size", "image_size", "op", "kind", "codes", "width",
    "num_tokens", "num_heads", "head_dim", "dtype", "impl", "memory", "pixels", "workers",
    "implementation", "name",  # of a profile
    "kernel", "shape", "launch",  # of tune.py
)  # fmt: skip
"""The fields of a row that say what was measured."""
HIGHER_IS_BETTER = "images_per_second"

Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Measurement:
    """A median, and the smallest and largest of its repetitions where the file has them."""

    median: float
    low: float | None
    high: float | None

    @property
    def has_spread(self) -> bool:
        return self.low is not None and self.high is not None

    def overlaps(self, other: Measurement) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Change:
    """One measurement in both files.

    Attributes:
        ratio: speed of the new one relative to the old one; above 1 is faster.
        verdict: "faster", "slower" or "within noise"; with "?" where a file has no spread, so that noise is
            not known.
    """

    key: Key
    metric: str
    old: Measurement
    new: Measurement
    ratio: float
    verdict: str

    @property
    def beyond_noise(self) -> bool:
        return self.verdict != "within noise"


@dataclass(frozen=True)
class Comparison:
    """All changes; the rows that only one file has; and those of both that only one measured correctly, with
    the other's reason."""

    changes: list[Change]
    only_old: list[Key]
    only_new: list[Key]
    broken: list[tuple[Key, str]]
    mended: list[tuple[Key, str]]


def read_report(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is not a JSON object with a device and a list of rows.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; want a results file") from None
    if not isinstance(report, dict) or "device" not in report or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path}: has no device and rows; want a results file of a benchmark")
    return report


def flat_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report. Those of recipe.py hold their measurements one level down, and the report's
    end-to-end rows are a list of their own."""
    rows = [{**row, **(row.get("measured") or {})} for row in report["rows"]]
    return rows + report.get("end_to_end", [])


def keyed_rows(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The rows by what they measured.

    Raises:
        ValueError: two rows measured the same.
    """
    found: dict[Key, dict[str, Any]] = {}
    common = {name: report.get(name) for name in IDENTITY}  # some files state a part once, for all rows
    for row in flat_rows(report):
        fields = {**common, **row}
        fields["launch"] = str(fields["launch"]) if fields["launch"] else None  # a dict, as hashable text
        key = tuple((name, fields[name]) for name in IDENTITY if fields.get(name) is not None)
        if key in found:
            raise ValueError(f"two rows of {label(key)}")
        found[key] = row
    return found


def label(key: Key) -> str:
    return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in key)


def measurements(row: dict[str, Any]) -> Iterator[tuple[str, Measurement]]:
    """What a row measured, by the field's name."""
    for name, value in row.items():
        if HIGHER_IS_BETTER in row:
            measured = name == HIGHER_IS_BETTER  # and not its parts, in ms
        else:
            measured = name == "ms" or name.endswith("_ms")
        if measured and value is not None:
            yield name, Measurement(value, row.get(f"{name}_min"), row.get(f"{name}_max"))


def failure(row: dict[str, Any]) -> str | None:
    """Why a row's times are not valid; None if they are."""
    if row.get("error"):
        return row["error"]
    if row.get("exact") is False:
        return "wrong results"
    return None if any(measurements(row)) else "not measured"


def change(key: Key, metric: str, old: Measurement, new: Measurement) -> Change:
    ratio = new.median / old.median if metric == HIGHER_IS_BETTER else old.median / new.median
    direction = "faster" if ratio > 1 else "slower"
    if not (old.has_spread and new.has_spread):
        return Change(key, metric, old, new, ratio, f"{direction}?" if ratio != 1 else "within noise")
    return Change(key, metric, old, new, ratio, "within noise" if old.overlaps(new) else direction)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Compares everything that either file measured.

    Raises:
        ValueError: two rows of one file measured the same, or no row of one is in the other.
    """
    before, after = keyed_rows(old), keyed_rows(new)
    if not before.keys() & after.keys():
        raise ValueError("the files have no row in common, want two of the same benchmark and settings")
    result = Comparison(
        [], [key for key in before if key not in after], [key for key in after if key not in before], [], []
    )
    for key in (key for key in before if key in after):
        was, now = failure(before[key]), failure(after[key])
        if was is not None or now is not None:
            if was is None:
                result.broken.append((key, now))
            elif now is None:
                result.mended.append((key, was))
            continue
        earlier = dict(measurements(before[key]))
        result.changes.extend(
            change(key, metric, earlier[metric], measured)
            for metric, measured in measurements(after[key])
            if metric in earlier
        )
    return result


def make_table(changes: list[Change]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("row")
    table.add_column("measured", no_wrap=True)
    for column in ("old", "new", "speed, new / old"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"faster": "green", "slower": "red"}
    for found in changes:
        table.add_row(
            label(found.key),
            found.metric,
            f"{found.old.median:.4g}",
            f"{found.new.median:.4g}",
            f"{found.ratio:.3f}",
            found.verdict,
            style=styles.get(found.verdict.rstrip("?"), ""),
        )
    return table


def describe(report: dict[str, Any]) -> str:
    versions = (f"{name} {report[name]}" for name in ("torch", "triton", "timm", "cuda") if report.get(name))
    return ", ".join([report["device"], *versions, str(report.get("date", "no date"))])


def main(
    old: Annotated[Path, typer.Argument(help="results file to compare with")],
    new: Annotated[Path, typer.Argument(help="results file to judge")],
    across_devices: Annotated[
        bool, typer.Option("--across-devices", help="compare files of different devices")
    ] = False,
    fail_below: Annotated[
        float | None,
        typer.Option(min=0, help="exit with 1 if a row's speed fell below this part of the old one's"),
    ] = None,
) -> None:
    """Say what got faster or slower beyond noise."""
    try:
        reports = read_report(old), read_report(new)
        compared = compare(*reports)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    devices = [report["device"] for report in reports]
    if devices[0] != devices[1] and not across_devices:
        raise typer.BadParameter(
            f"the files are of {devices[0]!r} and {devices[1]!r}, want one device; "
            "--across-devices compares them all the same"
        )
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    for name, report in zip(("old", "new"), reports, strict=True):
        console.print(f"{name}: {describe(report)}", markup=False)
    if compared.changes:
        console.print(make_table(compared.changes))
    if any(found.verdict.endswith("?") for found in compared.changes):
        console.print("?: a file has no smallest and largest value of it, so noise is not known")
    for title, keys in (("only in old", compared.only_old), ("only in new", compared.only_new)):
        for key in keys:
            console.print(f"{title}: {label(key)}", markup=False)
    for title, rows in (("no longer measured", compared.broken), ("measured now; before", compared.mended)):
        for key, reason in rows:
            console.print(f"{title}: {label(key)}: {reason}", markup=False)
    counts = [
        f"{sum(found.verdict.rstrip('?') == verdict for found in compared.changes)} {verdict}"
        for verdict in ("faster", "slower", "within noise")
    ]
    console.print(", ".join(counts))
    if fail_below is not None:
        slower = [found for found in compared.changes if found.beyond_noise and found.ratio < fail_below]
        if slower or compared.broken:
            console.print(
                f"{len(slower)} below {fail_below:g} of the old speed, "
                f"{len(compared.broken)} no longer measured"
            )
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
