"""vpt-fast backbones, and the page that its table stands in."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from vpt_fast.backbones.known import KNOWN, table
from vpt_fast.commands.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


def test_the_pages_table_is_that_of_the_code() -> None:
    header, *body = table()
    for line in (header, *body):
        assert "| " + " | ".join(line) + " |\n" in PAGE.read_text()


def test_the_command_prints_every_name_and_address() -> None:
    result = CliRunner().invoke(app, ["backbones", "--addresses"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output and known.address in result.output for name, known in KNOWN.items())
    assert result.output.count("not in timm") == sum(not known.hub for known in KNOWN.values())


def test_every_name_is_whole_in_80_columns() -> None:
    output = CliRunner().invoke(app, ["backbones"], env={"COLUMNS": "80"}).output
    for name, known in KNOWN.items():
        assert all(text in output for text in (name, known.timm_name, known.file))
    assert max(map(len, output.splitlines())) <= 80


def test_as_json_a_backbone_has_all_of_its_columns() -> None:
    rows = json.loads(CliRunner().invoke(app, ["backbones", "--json"]).output)
    assert rows[0]["name"] == "sup_vitb16_imagenet21k"
    assert rows[0]["address"].endswith("/imagenet21k/ViT-B_16.npz")
    assert len(rows) == len(KNOWN)
