"""Markdown of the docs that is made of numbers: tables, paragraphs, and blocks between markers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def number(value: float | None, digits: int = 3) -> str:
    """The value to `digits` significant digits, with thousands separated; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def field(name: str, form: str = "") -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        if value is None or isinstance(value, str):
            return value or ""
        return format(value, form) if form else number(value)

    return show


def percent(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{100 * row[name]:.0f} %"


def spread(name: str) -> Callable[[Row], str]:
    """A median with the smallest and largest beside it, where they are known."""

    def show(row: Row) -> str:
        low, high = row.get(f"{name}_min"), row.get(f"{name}_max")
        ends = f" ({number(low)}–{number(high)})" if low is not None and high is not None else ""
        return number(row.get(name)) + ends

    return show


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """A Markdown table without its empty columns."""
    cells = [[show(row) for _, show in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return markdown_table([[columns[i][0] for i in kept], *([line[i] for i in kept] for line in cells)])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these cells; the first line is its header."""
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def paragraph(*sentences: str) -> str:
    """Prose in lines of at most 120 characters, as the documents have."""
    text = " ".join(sentences)
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def replace_block(path: Path, text: str, marker: str, block: str) -> str:
    """The text with `block` between its two markers.

    Raises:
        ValueError: there are not two.
    """
    line = f"<!-- {marker} -->"
    parts = text.split(line)
    if len(parts) != 3:
        raise ValueError(f"{path}: got {len(parts) - 1} of {line}, want two")
    return f"{parts[0]}{line}\n\n{block}\n\n{line}{parts[2]}"
