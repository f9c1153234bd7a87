"""vpt-fast sweep, table and ablate: settings by search, and many runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from vpt_fast.flags import DebugFlag, one_line_errors, with_recipe_flags
from vpt_fast.recipe import Recipe, read_yaml

# Modules that import torch are imported by the commands that need them, so that --help answers at once.

PANEL = "Sweep"

ConfigFlag = Annotated[
    Path | None, typer.Option(help="YAML file of these settings; flags go over it.", rich_help_panel="Run")
]
OverFlag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B,C",
        help="Search these values of a setting instead of the recipe's grid; may be repeated. A semicolon "
        "parts values that hold commas.",
        rich_help_panel=PANEL,
        show_default="base_lr and weight_decay, by method",
    ),
]
SamplerFlag = Annotated[
    Literal["grid", "tpe", "random"],
    typer.Option(help="Every combination, or as many as --trials of them, by Optuna.", rich_help_panel=PANEL),
]
TrialsFlag = Annotated[
    int | None,
    typer.Option(help="Trials of tpe and random.", rich_help_panel=PANEL, show_default="all of the grid"),
]
PrunerFlag = Annotated[
    Literal["none", "median", "hyperband"],
    typer.Option(help="Whether trials that are behind are ended early, by Optuna.", rich_help_panel=PANEL),
]
SEEDS = "42,44,82,100,800"  # the paper's


@with_recipe_flags
def sweep(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Sweep folder.", rich_help_panel="Run", show_default="runs/sweep-DATA-BACKBONE-METHOD"
        ),
    ] = None,
    config: ConfigFlag = None,
    over: OverFlag = None,
    sampler: SamplerFlag = "grid",
    trials: TrialsFlag = None,
    pruner: PrunerFlag = "none",
    seeds: Annotated[str, typer.Option(help="Seeds of the final runs.", rich_help_panel=PANEL)] = SEEDS,
    storage: Annotated[
        str | None,
        typer.Option(
            help="URL of an Optuna storage that several machines share.",
            rich_help_panel=PANEL,
            show_default="a file in the sweep folder",
        ),
    ] = None,
    debug: DebugFlag = False,
    **flags: Any,
) -> None:
    """Search settings on val, then train with the best ones and several seeds and test.

    The best trial has the highest val accuracy after the last epoch; ties go to the smaller base_lr. Ctrl-C
    stops; the same command goes on. Started several times, on several GPUs (--device), it is shared.

    [bold]vpt-fast sweep --data vtab-1k --task vtab/cifar --backbone vit_base_patch16_224_in21k[/]
    """
    with one_line_errors(debug):
        from vpt_fast.sweep import Sweep, default_axes, default_sweep_folder, parse_axis, run_sweep

        settings = given_settings(config, flags)
        recipe = Recipe.from_dict(settings)
        axes = dict(parse_axis(text, settings) for text in over) if over else default_axes(recipe)
        plan = Sweep(settings, axes, parse_seeds(seeds), sampler, trials, pruner)
        folder = out or default_sweep_folder(recipe)
        found = run_sweep(plan, folder, storage=storage, console=Console())
    console = Console()
    if not found["finished"]:
        console.print(f"Stopped after {len(found['trials'])} trials; the same command goes on from there.")
        raise typer.Exit(130)
    if best := found["best"]:
        chosen = ", ".join(f"{name} {value}" for name, value in best["params"].items())
        console.print(
            f"best of {len(found['trials'])} trials: {chosen}; val accuracy {best['val_accuracy']:.2%}"
        )
    final = found["final"]
    deviation = final["standard_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.2%} (standard deviation, n - 1)"
    runs = f"{len(final['accuracies'])} runs, {final['note']}"
    console.print(f"{final['split']} accuracy {final['mean']:.2%}{spread}; {runs}; folder {folder}")


def given_settings(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration file and, over it, the flags that were given."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    return {**(read_yaml(config) if config else {}), **given}


def parse_seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"seeds is {text!r}; it must be whole numbers with commas between them") from None


def table(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Sweep folders, run folders, or folders of these.")
    ],
    form: Annotated[
        Literal["markdown", "csv", "latex"], typer.Option("--format", help="Of the text.")
    ] = "markdown",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="printed")] = None,
    debug: DebugFlag = False,
) -> None:
    """Accuracies by task and group, as in the paper's Table 1, beside the published ones."""
    with one_line_errors(debug):
        from vpt_fast.run import write
        from vpt_fast.tables import format_table, read_entries

        text = format_table(*read_entries(runs), form)
        if out is not None:
            write(out, text.encode())
    if out is None:
        typer.echo(text, nl=False)
