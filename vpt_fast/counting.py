"""Numbers of things in messages: "1 epoch", "1,000 images"."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number with the noun in its singular or plural; `many`: the plural, if it is not `one` + s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
