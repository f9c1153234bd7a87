"""The help of every command, in narrow terminals too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.commands.help import WIDEST


def commands(of: Any, name: str, parent: Any = None) -> Iterator[Any]:
    """The contexts of a command and of those below it."""
    context = typer.Context(of, info_name=name, parent=parent)
    yield context
    if isinstance(of, TyperGroup):
        for below, each in of.commands.items():
            yield from commands(each, below, context)


CONTEXTS = [*commands(get_command(app), "vpt-fast")]
in_terminals = pytest.mark.parametrize("columns", [60, 80, 250])


def shown(context: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return re.sub(r"\x1b\[\d*m", "", context.command.get_help(context))


def shown_parameters(context: Any) -> list[Any]:
    return [each for each in context.command.get_params(context) if not getattr(each, "hidden", False)]


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_commands_of_these_tests_are_those_of_the_application() -> None:
    paths = {context.command_path for context in CONTEXTS}
    assert {"vpt-fast", "vpt-fast train", "vpt-fast data check", "vpt-fast plot tsne"} <= paths


@in_terminals
def test_help_is_no_wider_than_the_terminal_or_than_is_easy_to_read(columns, monkeypatch) -> None:
    for context in CONTEXTS:
        for line in shown(context, columns, monkeypatch).splitlines():
            is_example = line.startswith("    vpt-fast")  # in one piece, to be copied
            assert is_example or len(line) <= min(columns, WIDEST), (context.command_path, line)


@in_terminals
def test_help_breaks_no_flag_and_no_choice(columns, monkeypatch) -> None:
    for context in CONTEXTS:
        text = shown(context, columns, monkeypatch)
        lines = re.sub(r"\|\n +", "|", text).splitlines()
        for parameter in shown_parameters(context):
            name, _ = parameter.get_help_record(context)
            if parameter.param_type_name == "option":
                assert any(line.startswith(f"  {name}") for line in lines), (context.command_path, name)


@in_terminals
def test_help_has_every_text_with_its_default(columns, monkeypatch) -> None:
    for context in CONTEXTS:
        text = words(shown(context, columns, monkeypatch))
        for parameter in shown_parameters(context):
            assert words(parameter.help) in text, (context.command_path, parameter.name)
            if isinstance(parameter.show_default, str):
                assert re.search(rf"\[default: {re.escape(parameter.show_default)}[];]", text), parameter.name


def test_help_of_train_has_its_groups_in_order(monkeypatch) -> None:
    (train,) = (context for context in CONTEXTS if context.info_name == "train")
    titles = re.findall(r"^\w+(?=:$)", shown(train, 80, monkeypatch), re.MULTILINE)
    assert titles == ["Options", "Data", "Model", "Prompts", "Optimisation", "Run"]


def test_help_has_arguments_by_their_names_alone_in_a_section_before_the_options(monkeypatch) -> None:
    (evaluate,) = (context for context in CONTEXTS if context.info_name == "eval")
    text = shown(evaluate, 80, monkeypatch)
    assert "\n\nArguments:\n  RUN  Run folder" in text and text.index("Arguments:") < text.index("Options:")


@pytest.mark.parametrize(
    ("command", "refused"), [("sweep", []), ("ablate", ["--method"])], ids=["sweep", "ablate"]
)
def test_help_of_sweeps_has_no_flag_that_they_refuse(command, refused, monkeypatch) -> None:
    (context,) = (each for each in CONTEXTS if each.info_name == command)
    flags = re.findall(r"^  (--[\w-]+)", shown(context, 80, monkeypatch), re.MULTILINE)
    assert "--backbone" in flags
    assert not {*refused, "--train-on", "--test", "--ignore-zero", "--aux-weight"} & {*flags}


def test_an_example_in_help_keeps_its_lines(monkeypatch) -> None:
    (sweep,) = (context for context in CONTEXTS if context.info_name == "sweep")
    example = "vpt-fast sweep --data vtab-1k --task vtab/cifar \\\n        --backbone sup_vitb16_imagenet21k"
    assert f"\n    {example}\n" in shown(sweep, 60, monkeypatch)


def test_a_wrong_flag_s_error_breaks_no_path(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/a/folder" * 12
    assert path in CliRunner().invoke(app, ["backbones", path]).stderr
