"""Defaults of every command's options are values that the option takes: not all versions of typer ask."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from vpt_fast.commands.cli import app

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if "typer.run(main)" in file.read_text())


def commands(of: typer.Typer) -> Iterator[Callable[..., Any]]:
    """The functions of an application's commands, those of its groups too."""
    yield from (info.callback for info in of.registered_commands if info.callback is not None)
    for group in of.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance)


def wrong_defaults(command: Callable[..., Any]) -> list[str]:
    found = []
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        value = parameter.default
        for option in getattr(hints.get(name), "__metadata__", ()):
            low, high = getattr(option, "min", None), getattr(option, "max", None)
            if not isinstance(value, int | float):
                continue
            if (low is not None and value < low) or (high is not None and value > high):
                found.append(f"{command.__name__}: {name} is {value}, want {low} to {high}")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_of_a_benchmark_are_in_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for script in SCRIPTS:  # peft tries to import a package kernels, and finds ours in the working directory
        monkeypatch.delitem(sys.modules, script, raising=False)
    assert not wrong_defaults(importlib.import_module(name).main)


def test_defaults_of_the_package_commands_are_in_range() -> None:
    every = [*commands(app)]
    assert len(every) > 10
    assert not [wrong for command in every for wrong in wrong_defaults(command)]
