"""vpt-fast backbones: the names of the paper's backbones and what they stand for."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from vpt_fast.backbones.known import KNOWN, table
from vpt_fast.commands.flags import JsonFlag, OutputConsole


def backbones(
    as_json: JsonFlag = False,
    addresses: Annotated[
        bool, typer.Option("--addresses", help="Also print where each file is published.")
    ] = False,
) -> None:
    """List the backbones of the VPT paper by the names that --backbone takes.

    Every Vision Transformer, Swin and supported ConvNet of timm works too,
    by its timm name, and so does a folder or repository with one:
    local-dir:FOLDER, hf-hub:OWNER/NAME.
    """
    header, *rows = table()
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {**dict(zip(header, row, strict=True)), "address": known.address}
                    for row, known in zip(rows, KNOWN.values(), strict=True)
                ],
                indent=2,
            )
        )
        return
    # Two lines each, so that names are whole, and can be copied, in a terminal of 80 columns.
    shown = Table("name\ntrained, normalisation", "timm name\nfile")
    for name, trained, timm_name, normalization, file, has_weights in rows:
        remarks = ["not in timm"] * (has_weights == "no")
        shown.add_row(f"{name}\n{trained}; {normalization}", "\n".join((timm_name, file, *remarks)))
        shown.add_section()
    console = OutputConsole()
    console.print(shown)
    for known in KNOWN.values() if addresses else ():
        console.print(f"{known.name}: {known.address}", highlight=False, soft_wrap=True)
