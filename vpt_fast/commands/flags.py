"""What the commands share: flags, including those of the recipe, and error handling."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.text import Text, TextType

from vpt_fast.data_names import PREFIXES, is_factory_name
from vpt_fast.failures import (
    OutOfMemory,
    SavingFailed,
    TrainingDiverged,
    find_cause,
    is_out_of_memory,
    said_of_memory,
)
from vpt_fast.files import remove_unfinished
from vpt_fast.sweeps.entries import SWEEP_FILE
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run_files import RunFiles
from vpt_fast.training.setting_values import read_yaml


def _path(text: str) -> Path:
    if not text:
        raise typer.BadParameter("it is '', to a path the working directory; name it '.' if that is meant")
    return Path(text)


# For options that name an output path: an empty value, as from an unset shell variable, is refused.
PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}

DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceFlag = Annotated[
    str | None,
    typer.Option(help="Device, such as cpu or cuda:0.", show_default="cuda if available, else cpu"),
]
WorkersFlag = Annotated[
    int | None, typer.Option(min=0, help="Threads for decoding images.", show_default="all cores")
]
DataRootFlag = Annotated[
    str | None, typer.Option(help="Folder that holds timm data sets.", show_default="the library's own")
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder, or the prompts folder inside it.")
]

SameBackboneFlag = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        help="Where the run's backbone is now, such as local-dir:FOLDER of one that has moved.",
        show_default="where it was in training",
    ),
]

SameCheckpointFlag = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Where the file of the backbone's weights is now.",
        show_default="where it was in training",
        **PATH,
    ),
]


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Ends the program with one red line for errors that a user can fix, and when it is stopped; other
    exceptions are bugs."""
    if debug:
        yield
        return
    try:
        with _terminated_as_by_ctrl_c(), _keeping_ctrl_c():
            yield
    except (TrainingDiverged, OutOfMemory, SavingFailed) as error:
        fail(error, 1)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        fail(error, 2)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        fail(error, 2)
    except BrokenPipeError:
        raise  # the reader of the output has closed it: there is nothing to report
    except OSError as error:  # such as a full disk or a lost file system
        fail(error, 1)
    except (RuntimeError, MemoryError) as error:  # elsewhere than in a step, which says what needs less
        if not is_out_of_memory(error):
            raise
        fail(f"too little memory: {said_of_memory(error)}", 1)
    except KeyboardInterrupt:
        fail("stopped", 130)


@contextlib.contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, as from a cluster, raises KeyboardInterrupt. Training has its own handler, but not while it
    loads the backbone and the images, nor has a sweep between its trials."""
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _keeping_ctrl_c() -> Iterator[None]:
    """Keeps a KeyboardInterrupt from being lost where libraries are interrupted.

    In a finalizer or a callback of a weak reference, Python prints exceptions and drops them, and the work
    would go on: it is sent again, as SIGTERM, since shells have jobs in the background ignore SIGINT. One
    that another error hides (Optuna's UnboundLocalError, when interrupted while it saves the end of a trial)
    is raised in its place.
    """
    old_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # a signal sent from here would be dropped here
        else:
            old_hook(unraisable)

    old_handler = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    sys.unraisablehook = hook
    try:
        yield
    except Exception as error:
        interrupt = find_cause(error, KeyboardInterrupt)
        if interrupt is None:
            raise
        raise interrupt from None
    finally:
        sys.unraisablehook = old_hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks


class NameConsole(Console):
    """rich's console for text with names of files and classes: it takes no `:dog:` in them for an emoji, and
    shows control characters, with which a downloaded file could have the terminal do what it likes, as
    `\\x1b`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text), **settings)


class OutputConsole(NameConsole):
    """Stdout of a command. In a file or a pipe, tables are as wide as they need to be: fitted to the 80
    columns of a terminal that is not there, names would be broken, and grep would not find them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._rule_width = self.width
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = 10_000

    def rule(self, title: TextType = "", **settings: Any) -> None:
        """A line with a title, of a terminal's width everywhere."""
        self.print(Rule(title, **settings), width=self._rule_width)


class LastingConsole(OutputConsole):
    """Stdout of a long-running command: if its reader closes it (`vpt-fast train ... | head`), further output
    is discarded and the work goes on.

    Brackets in paths are not interpreted as markup, and long lines are not wrapped, so that paths can be
    copied and logs searched.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, soft_wrap=True, **settings)

    def on_broken_pipe(self) -> None:
        discard_output()


def discard_output() -> None:
    """From now on, of the whole process, also what is still buffered: at its exit Python would try again to
    write that, and report that it cannot."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def print_error(error: Exception | str) -> None:
    console = NameConsole(stderr=True, soft_wrap=True)
    console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)


def fail(error: Exception | str, code: int) -> None:
    print_error(error)
    raise typer.Exit(code)


def require_folder(name: str, path: Path) -> None:
    """Raises ValueError if there is no such folder. Commands check this, and the data, before they import
    what takes seconds."""
    if not path.is_dir():
        raise ValueError(f"{name} is {path}, which is no folder")


def require_run(run: Path) -> None:
    """Raises ValueError if there is no such folder, or no run in it."""
    require_folder("RUN", run)
    if not RunFiles(run).is_of_run:
        hint = "; of a sweep, want one of the runs in its final/" if (run / SWEEP_FILE).exists() else ""
        raise ValueError(f"{run} is neither a run folder nor its prompts folder{hint}")


def require_data(data: str) -> None:
    """Raises ValueError if ``data`` is not there and is no name of a data set of timm's, or is a file."""
    path = os.path.expanduser(data) or "."
    if os.path.isfile(path):
        raise ValueError(f"data is {data}, a file; it must be a folder")
    if not os.path.exists(path) and not is_factory_name(data):
        names = ", ".join(f"{prefix}/NAME" for prefix in PREFIXES)
        raise ValueError(f"data is {data}; there is no such folder, and it is none of {names}")


def require_place(out: Path) -> None:
    """Raises ValueError if no file can be written at ``out``; called before the work starts. What a killed
    command left of such a file is removed."""
    if out.is_dir():
        raise ValueError(f"out is {out}, a folder; it must be a file")
    if not out.parent.is_dir():
        raise ValueError(f"out is {out}, and {out.parent} is no folder")
    remove_unfinished(out)


def require_folder_place(out: Path) -> None:
    """Raises ValueError if no folder can be at ``out``; called before the work starts."""
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"out is {out}, and {there} is no folder")


def refuse(run: str, **flags: Any) -> None:
    """Raises ValueError for given flags that this kind of run does not have."""
    if given := [name for name, value in flags.items() if value not in (None, False)]:
        raise ValueError(f"{', '.join(given)}: {run} has no such choice; leave it out")


def with_recipe_flags(command: Callable[..., None], hidden: Collection[str] = ()) -> Callable[..., None]:
    """Gives ``command`` one flag per field of Recipe in place of its ``flags``; a flag left out is None.
    Help does not show the ``hidden`` fields, which the command refuses, each with its reason."""
    hints = get_type_hints(Recipe)
    own = inspect.signature(command, eval_str=True).parameters
    parameters = []
    for field in dataclasses.fields(Recipe):
        name, kind = flag_type(field.name, hints[field.name])
        option = typer.Option(
            name,
            help=field.metadata["help"],
            rich_help_panel=field.metadata["panel"],
            metavar=field.metadata["metavar"],
            show_default=shown_default(field),
            hidden=field.name in hidden,
        )
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own.values() if p.name != "flags"]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def given_settings(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration file, overridden by the flags that were given.

    Raises ValueError if the file cannot be read, or the data or the backbone's weights are not there.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = {**(read_yaml(config) if config else {}), **given}
    if isinstance(data := settings.get("data"), str):  # the recipe refuses what is no text
        require_data(data)
    checkpoint = settings.get("checkpoint")
    if checkpoint and isinstance(checkpoint, str) and not os.path.isfile(checkpoint):
        raise ValueError(f"checkpoint is {checkpoint}, which is no file")
    return settings


def flag_type(name: str, hint: Any) -> tuple[str, Any]:
    """A field's flag and its type for typer; Recipe parses what typer has no type for."""
    flag = "--" + name.replace("_", "-")
    if name == "backbone_arg":
        return flag, list[str]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    if len(kinds) > 1:
        return flag, str
    if kinds[0] is bool:
        return f"{flag}/--no-{flag.removeprefix('--')}", bool
    return flag, kinds[0]


def shown_default(field: dataclasses.Field) -> str | bool:
    if field.metadata["shown"]:
        return field.metadata["shown"]
    if field.default is dataclasses.MISSING:
        return False
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)
