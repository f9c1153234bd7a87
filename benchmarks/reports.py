"""What all benchmarks write and read alike: results files, and lists on the command line."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import measure
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)


def default_path(header: dict[str, Any], benchmark: str = "") -> Path:
    """results/[<benchmark>-]<device>-<date>.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return RESULTS / "-".join(filter(None, [benchmark, slug, f"{header['date']}.json"]))


def listed(values: str, known: list[str] | None = None) -> list[str]:
    """The names in a comma-separated flag; typer.BadParameter for none, or for one that is not known."""
    names = [name.strip() for name in values.split(",") if name.strip()]
    unknown = [name for name in names if known is not None and name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"got {values!r}, want a comma-separated list" + (f" of {known}" if known else "")
        )
    return names
