"""What all benchmarks share: results files, and lists on the command line."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import measure
import timm
import torch
import typer

RESULTS = Path(__file__).parent / "results"


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


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes the report as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)


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


def resumed(path: Path, header: dict[str, Any], row_type: type) -> dict[str, Any] | None:
    """The report in `path` if it has all of `header`: the machine, versions, day and settings of this run.

    None where there is no file, or another run's, which this one replaces. Raises as `read_own`.
    """
    report = read_own(path, row_type)
    if report is None or any(report.get(name) != value for name, value in header.items()):
        return None
    return report


def default_path(header: dict[str, Any], benchmark: str = "") -> Path:
    """results/[<benchmark>-]<device>-<date>.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return RESULTS / "-".join(filter(None, [benchmark, slug, f"{header['date']}.json"]))


def output_path(output: Path | None, header: dict[str, Any], row_type: type, benchmark: str = "") -> Path:
    """Where results go: what was asked for, else `default_path`. Its folder is made.

    Args:
        row_type: the dataclass of this benchmark's rows.

    Raises:
        typer.BadParameter: nothing can be written there, or a file is there that `read_own` refuses.
    """
    path = output or default_path(header, benchmark)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
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
