"""What all benchmarks share: results files, and lists on the command line."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import measure
import timm
import torch
import typer

from vpt_fast.files import remove_unfinished, write_json

RESULTS = Path(__file__).parent / "results"

Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="measure again what the file holds of this run, and replace a file that holds another run's; "
        "without it the same command goes on with the file",
    ),
]
"""The flag of every benchmark that writes a `Report`."""


def make_header(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the day: what every results file begins with."""
    return {
        "device": measure.device_name(device),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "timm": installed_version("timm"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "date": datetime.date.today().isoformat(),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_own(path: Path, row_type: type) -> dict[str, Any] | None:
    """The report in `path`, None where there is no file.

    Args:
        row_type: the dataclass of this benchmark's rows.

    Raises:
        typer.BadParameter: a file that this benchmark did not write, which it would destroy.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"output: {path} is not JSON ({error}), want a report or no file") from None
    known = {field.name for field in fields(row_type)}
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() <= known for row in rows):
        raise typer.BadParameter(f"output: got {path}, want a report of this benchmark or no file")
    return report


class Report:
    """A results file that grows case by case, a case being rows that are compared and so run in turns.

    A case whose rows are in the file is not measured again, so that the same command goes on with what an
    interrupted one has left. With `fresh` the cases that are asked for are, and leave the file at once; its
    other cases stay.

    Args:
        path: from `output_path`.
        header: the machine, versions, day and settings of this run. A file of another day is gone on with,
            and keeps its date.
        row_type: the dataclass of its rows, whose property `case` is hashable.
        asked: the cases that this run is to measure.
        fresh: whether those in the file are measured again.

    Raises:
        typer.BadParameter: without `fresh`, a file of another machine, or of other versions or settings.

    Attributes:
        rows: all that the file holds.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], row_type: type, asked: Iterable[Hashable], fresh: bool
    ) -> None:
        self.path = path
        self._once, self.rows, self._dropped = dict(header), list[Any](), list[Any]()
        self._asked = {*asked}
        found = read_own(path, row_type)
        if found is None:
            return
        different = [name for name in header if name != "date" and found.get(name) != header[name]]
        if different and not fresh:
            there = ", ".join(f"{name} {found.get(name)!r}, here {header[name]!r}" for name in different)
            raise typer.BadParameter(
                f"output: got {path}, which holds another run's rows ({there}); want another file, or "
                "--fresh to replace this one"
            )
        rows = [] if different else [row_type(**row) for row in found.pop("rows")]
        for row in rows:
            (self._dropped if fresh and row.case in self._asked else self.rows).append(row)
        if self.rows:
            self._once = found
        if different or self._dropped:
            # Not later: without the flag, an interrupted run would go on with what it was to replace.
            self.write() if self.rows else path.unlink()

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What the file states once for all rows, such as the device's bounds; measured if it does not."""
        if self._once.get(name) is None:
            self._once[name] = measure()
        return self._once[name]

    def rows_of(self, case: Hashable) -> list[Any]:
        return [row for row in self.rows if row.case == case]

    def contenders(self, case: Hashable, wanted: Sequence[Any]) -> list[Any]:
        """Whom to measure at a case: `wanted`, and which else it was measured of, by `row.contender`."""
        there = (row.contender for row in (*self.rows, *self._dropped) if row.case == case)
        return list(dict.fromkeys([*wanted, *there]))

    def replace(self, case: Hashable, rows: list[Any]) -> None:
        """Puts the case's rows into the file."""
        self.rows = [row for row in self.rows if row.case != case] + rows
        self.write()

    def write(self) -> None:
        write_json(self.path, {**self._once, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def describe(self) -> str:
        """Where results go, and how many are there already."""
        there = sum(row.case in self._asked for row in self.rows)
        if there:
            rows = f"{there} row{'s' if there > 1 else ''} of {self._once['date']}"
            return f"{self.path} has {rows} already, which --fresh measures again."
        return f"What is done stands in {self.path}; the same command goes on with it."


def output_path(output: Path | None, header: dict[str, Any], row_type: type, benchmark: str) -> Path:
    """What was asked for, else results/<benchmark>-<device>-<date>.json. Its folder is made.

    Args:
        row_type: the dataclass of this benchmark's rows.

    Raises:
        typer.BadParameter: nothing can be written there, or a file is there that `read_own` refuses.
    """
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    path = output or RESULTS / f"{benchmark}-{device}-{header['date']}.json"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        remove_unfinished(path)  # which a run that was killed left, and would be read as results
    except OSError as error:
        raise typer.BadParameter(f"output: got {path}, want a file that can be written: {error}") from None
    read_own(path, row_type)
    return path


def one_of(flag: str, value: str, known: Iterable[str]) -> str:
    """The value; typer.BadParameter for one that is not known, and for a list."""
    if value not in known:
        raise typer.BadParameter(f"{flag}: got {value!r}, want one of {', '.join(known)}")
    return value


def require_model(flag: str, name: str) -> None:
    """Raises typer.BadParameter for a model that timm does not have, with or without a tag."""
    if not timm.is_model(name):
        raise typer.BadParameter(f"{flag}: got {name!r}, want timm's name of a model")


def listed(flag: str, values: str, known: Iterable[str] | None = None) -> list[str]:
    """The names in a comma-separated flag, each once; typer.BadParameter for none, or for one that is not
    known."""
    names = list(dict.fromkeys(name.strip() for name in values.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter(f"{flag}: got {values!r}, want a comma-separated list")
    for name in names if known is not None else []:
        one_of(flag, name, known)
    return names


def positive_numbers(flag: str, values: str) -> list[int]:
    """The numbers in a comma-separated flag, each once; typer.BadParameter unless all are at least 1."""
    names = listed(flag, values)
    for name in names:
        if not (name.isdecimal() and int(name) > 0):
            raise typer.BadParameter(f"{flag}: got {name!r}, want numbers of at least 1, comma-separated")
    return list(dict.fromkeys(int(name) for name in names))
