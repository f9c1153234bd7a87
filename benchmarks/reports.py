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


def resumed(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The report in `path` if it has all of `header`: the machine, versions, day and settings of this run.

    None where there is no file, or another run's.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"output: {path} is not JSON ({error}), want a report or no file") from None
    is_same = isinstance(report, dict) and all(report.get(name) == value for name, value in header.items())
    return report if is_same else None


def default_path(header: dict[str, Any], benchmark: str = "") -> Path:
    """results/[<benchmark>-]<device>-<date>.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return RESULTS / "-".join(filter(None, [benchmark, slug, f"{header['date']}.json"]))


def output_path(output: Path | None, header: dict[str, Any], benchmark: str = "") -> Path:
    """Where results go: what was asked for, else `default_path`. Its folder is made.

    Raises:
        typer.BadParameter: nothing can be written there.
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
    return path


def one_of(flag: str, value: str, known: Iterable[str]) -> str:
    """The value; typer.BadParameter for one that is not known, and for a list."""
    if value not in known:
        raise typer.BadParameter(f"{flag}: got {value!r}, want one of {', '.join(known)}")
    return value


def require_model(name: str) -> None:
    """Raises typer.BadParameter for a --model that timm does not have, and for a list."""
    if not timm.is_model(name):
        raise typer.BadParameter(f"model: got {name!r}, want timm's name of one")


def listed(values: str, known: list[str] | None = None) -> list[str]:
    """The names in a comma-separated flag, each once; typer.BadParameter for none, or for one that is not
    known."""
    names = list(dict.fromkeys(name.strip() for name in values.split(",") if name.strip()))
    unknown = [name for name in names if known is not None and name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"got {values!r}, want a comma-separated list" + (f" of {known}" if known else "")
        )
    return names


def positive_numbers(values: str) -> list[int]:
    """The numbers in a comma-separated flag, each once; typer.BadParameter unless all are at least 1."""
    names = listed(values)
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise typer.BadParameter(f"got {values!r}, want a comma-separated list of numbers of at least 1")
    return list(dict.fromkeys(int(name) for name in names))
