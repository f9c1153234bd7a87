"""What --help prints, and the application whose commands print it: `CommandApp`.

typer's own help is a table. In 80 columns, its columns for names and types leave 20 for the help, cut long
names short, and break choices inside words.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns; longer lines are hard to read
NARROWEST = 40
_NAMES = re.compile(r"^\s*[a-zA-Z][\w-]*|--[\w-]+")

Row = tuple[str, str]  # a name with the form of its value, and its help

# Which package has typer's commands and contexts differs between its versions, so they have no type here.


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_text(self, ctx))


class _Group(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_text(self, ctx))


class CommandApp(typer.Typer):
    """A typer application with the help of this module. What is wrong with a command's flags is printed
    without typer's box too, in which paths are broken."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=_Group,
            no_args_is_help=True,
            add_completion=False,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=_Command, **settings)


def help_text(command: Any, context: Any) -> str:
    """Usage, description, and one section each for arguments, options outside panels, every panel in the
    order of its options, and commands; in lines for the terminal.

    The description is wrapped, except for paragraphs that are indented: examples, to be copied.
    """
    width = max(min(shutil.get_terminal_size().columns, WIDEST), NARROWEST)
    usage = " ".join(["Usage:", context.command_path, *command.collect_usage_pieces(context)])
    blocks = [_wrapped(usage, width)]
    for paragraph in _paragraphs(command):
        blocks.append(paragraph.splitlines() if paragraph.startswith(" ") else _wrapped(paragraph, width))
    for title, rows in _sections(command, context).items():
        if rows:
            blocks.append([typer.style(f"{title}:", bold=True), *_definitions(rows, width)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _sections(command: Any, context: Any) -> dict[str, list[Row]]:
    sections: dict[str, list[Row]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is None:  # it is hidden
            continue
        name, help = record
        help = help.replace(r"\[", "[")  # some versions of typer escape it, as for rich
        if parameter.param_type_name == "argument":
            sections["Arguments"].append((name.split()[0], help))  # without its type in Python
        else:
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            sections.setdefault(panel, []).append((name, help))
    commands = getattr(command, "commands", {})
    sections["Commands"] = [(name, _paragraphs(each)[0]) for name, each in commands.items()]
    return sections


def _paragraphs(command: Any) -> list[str]:
    return inspect.cleandoc(command.help).split("\n\n")


def _definitions(rows: list[Row], width: int) -> list[str]:
    """Each name with its help beside it, if all names are short or every help fits into the line; else
    beneath it."""
    longest = max(len(name) for name, _ in rows)
    beside = [_help(help, width, " " * (longest + 4)) for _, help in rows]
    if longest <= width // 5 or all(len(lines) == 1 for lines in beside):
        for (name, _), lines in zip(rows, beside, strict=True):
            lines[0] = _bold(f"  {name:{longest + 2}}") + lines[0].lstrip()
        return [line for lines in beside for line in lines]
    return [line for name, help in rows for line in (*_name(name, width), *_help(help, width, " " * 6))]


def _bold(name: str) -> str:
    return _NAMES.sub(lambda found: typer.style(found[0], bold=True), name)


def _name(name: str, width: int) -> list[str]:
    """A flag and its choices; long ones go on below the first."""
    indent = " " * (len("  ") + name.rfind(" ") + len(" <"))
    lines = ["  "]
    for part in re.split(r"(?<=\|)", name):
        if len(lines[-1] + part) > width:
            lines.append(indent)
        lines[-1] += part
    return [_bold(lines[0]), *lines[1:]]


def _help(help: str, width: int, indent: str) -> list[str]:
    """The lines of a help text; its `[default: ...]` is broken only if it has no room in one line."""
    text, found, notes = help.rpartition("  [")
    lines = _wrapped(text if found else help, width, indent)
    if not found:
        return lines
    notes = re.sub(r"(?<=^.)default: \((.*)\)(?=[];])", r"default: \1", f"[{notes}")  # typer's brackets
    if len(f"{lines[-1]} {notes}") <= width:
        lines[-1] += f" {notes}"
    elif len(indent + notes) <= width:
        lines.append(indent + notes)
    else:
        return _wrapped(f"{text} {notes}", width, indent)
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    lines = textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,  # as in --num-prompts
    )
    return lines or [""]
