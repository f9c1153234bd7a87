"""vpt-fast sweep, ablate, table and plot: searches, and comparisons of many runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from vpt_fast.commands.flags import (
    PATH,
    DataRootFlag,
    DebugFlag,
    DeviceFlag,
    LastingConsole,
    RunArgument,
    SameBackboneFlag,
    SameCheckpointFlag,
    WorkersFlag,
    fail,
    given_settings,
    one_line_errors,
    require_data,
    require_place,
    require_run,
    with_recipe_flags,
)
from vpt_fast.commands.help import CommandApp
from vpt_fast.counting import counted
from vpt_fast.files import write
from vpt_fast.sweeps.entries import LEFT_OUT, read_entries
from vpt_fast.sweeps.settings import SEEDS as PAPERS_SEEDS
from vpt_fast.sweeps.settings import SET_BY_SWEEP, Sweep, default_axes, first_backbone, parse_axes
from vpt_fast.sweeps.tables import format_table
from vpt_fast.training.recipe import SEGMENTATION_KNOBS, Recipe

# Modules that import torch are imported by the commands that need them, so that --help answers at once.

PANEL = "Sweep"

ConfigFlag = Annotated[
    Path | None,
    typer.Option(help="YAML file with settings of train; flags override it.", rich_help_panel="Run"),
]
OverFlag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B,C",
        help="Search these values of a setting instead of the default grid; may be repeated. Use semicolons "
        "between values that contain commas.",
        rich_help_panel=PANEL,
        show_default="the method's grid",
    ),
]
SamplerFlag = Annotated[
    Literal["grid", "tpe", "random"],
    typer.Option(
        help="Try every combination (grid), or --trials of them with an Optuna sampler.",
        rich_help_panel=PANEL,
    ),
]
TrialsFlag = Annotated[
    int | None,
    typer.Option(
        help="Number of trials; required for tpe and random. As in Optuna, settings that the sampler chooses "
        "again count as a trial; they are not trained again.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
PrunerFlag = Annotated[
    Literal["none", "median", "hyperband"],
    typer.Option(help="Optuna pruner that stops weak trials early.", rich_help_panel=PANEL),
]
SEEDS = ",".join(map(str, PAPERS_SEEDS))
REFUSED = (*SET_BY_SWEEP, *SEGMENTATION_KNOBS)  # settings that no sweep takes


@partial(with_recipe_flags, hidden=REFUSED)
def sweep(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Sweep folder.",
            rich_help_panel="Run",
            show_default="runs/sweep-DATA-BACKBONE-METHOD",
            **PATH,
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
            help="URL of an Optuna storage shared by several machines.",
            rich_help_panel=PANEL,
            show_default="a file in the sweep folder",
        ),
    ] = None,
    debug: DebugFlag = False,
    **flags: Any,
) -> None:
    """Search settings on val, then train with the best ones on several seeds, and test.

    The best trial has the highest val accuracy after the last epoch; ties
    go to the smaller base_lr. Ctrl-C stops; the same command resumes. To use
    several GPUs, start it once per GPU (--device).

        vpt-fast sweep --data vtab-1k --task vtab/cifar \\
            --backbone sup_vitb16_imagenet21k
    """
    with one_line_errors(debug):
        settings = given_settings(config, flags)
        final_seeds = parse_seeds(seeds)
        axes = parse_axes(over or (), settings)
        recipe = Recipe.from_dict({**first_backbone(axes), **settings})
        axes = axes or default_axes(recipe)
        plan = Sweep(settings, axes, final_seeds, sampler, trials, pruner)
        from vpt_fast.sweeps.sweep import default_sweep_folder, run_sweep

        folder = out or default_sweep_folder(recipe)
        console = LastingConsole()
        found = run_sweep(plan, folder, storage=storage, console=console)
    if not found["finished"]:
        tried = len(found["trials"])
        console.print(
            f"Stopped with {counted(tried, 'combination')} tried; the same command goes on from there."
        )
        raise typer.Exit(130)
    if best := found["best"]:
        chosen = ", ".join(f"{name} {value}" for name, value in best["params"].items())
        trials, tried = found["num_trials"], len(found["trials"])
        # A sampler may choose one again.
        repeats = "" if tried == trials else f" of {counted(tried, 'combination')}"
        console.print(
            f"best of {counted(trials, 'trial')}{repeats}: {chosen}; val accuracy {best['val_accuracy']:.2%}"
        )
    final = found["final"]
    deviation = final["standard_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.2%} (standard deviation, n - 1)"
    count = len(final["accuracies"])
    lost = f", {len(final['diverged'])} more diverged" if final["diverged"] else ""
    runs = f"{counted(count, 'run')}{lost}, {final['note']}"
    if final["mean"] is None:
        fail(f"every final run diverged: {'; '.join(dict.fromkeys(final['diverged'].values()))}", 1)
    console.print(f"{final['split']} accuracy {final['mean']:.2%}{spread}; {runs}; folder {folder}")


@partial(with_recipe_flags, hidden=(*REFUSED, "method"))
def ablate(
    name: Annotated[
        Literal["length", "depth", "location", "output", "data-size"],
        typer.Argument(metavar="ABLATION", help="length, depth, location, output or data-size."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Ablation folder.",
            rich_help_panel="Run",
            show_default="runs/ablation-NAME-DATA-BACKBONE",
            **PATH,
        ),
    ] = None,
    config: ConfigFlag = None,
    methods: Annotated[
        str, typer.Option(help="Methods to compare, comma-separated.", show_default="by ablation")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the runs at each point.")] = SEEDS,
    search: Annotated[
        bool, typer.Option("--sweep", help="Search the method's grid at each point first, as sweep does.")
    ] = False,
    debug: DebugFlag = False,
    **flags: Any,
) -> None:
    """Run one of the paper's ablations and plot the accuracies.

    Prompt length (Fig. 6), depth (Fig. 7), location (Fig. 5), what the head
    reads (output, Fig. 8), or the fraction of the training images
    (data-size, Fig. 3). Flags of train apply to every point. Ctrl-C stops;
    the same command resumes.

        vpt-fast ablate length --data vtab-1k --task vtab/cifar \\
            --backbone sup_vitb16_imagenet21k
    """
    with one_line_errors(debug):
        settings = given_settings(config, flags)
        final_seeds = parse_seeds(seeds)
        from vpt_fast.sweeps.ablations import default_ablation_folder, plan_ablation, run_ablation

        listed = [part.strip() for part in methods.split(",") if part.strip()]
        points = plan_ablation(name, settings, methods=listed, seeds=final_seeds, search=search)
        folder = out or default_ablation_folder(name, points)
        console = LastingConsole()
        found = run_ablation(name, points, folder, console=console)
    if not found["finished"]:
        console.print(
            f"Stopped after {counted(len(found['points']), 'point')}; the same command goes on from there."
        )
        raise typer.Exit(130)
    shown = Table("line", "value", "accuracy", "standard deviation")
    for row in found["points"]:
        deviation = row["standard_deviation"]
        lost = f", {len(row['diverged'])} diverged" if row["diverged"] else ""
        shown.add_row(
            row["line"],
            str(row["value"]),
            "diverged" if row["mean"] is None else f"{row['mean']:.2%}{lost}",
            "" if deviation is None else f"{deviation:.2%}",
        )
    console.print(shown)
    console.print(f"picture: {folder / 'ablation.png'}")


plot_app = CommandApp(help="Plot a run.")


@plot_app.callback()
def plot() -> None:
    """Plot a run."""


@plot_app.command()
def tsne(
    run: RunArgument,
    data: Annotated[str, typer.Option(help="Images, as for train.")],
    split: Annotated[Literal["val", "test"], typer.Option(help="Split to plot.")] = "val",
    data_root: DataRootFlag = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG file.", show_default="RUN/tsne-SPLIT.png", **PATH)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of t-SNE.")] = 0,
    workers: WorkersFlag = None,
    backbone: SameBackboneFlag = None,
    checkpoint: SameCheckpointFlag = None,
    device: DeviceFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Plot the head's input features of a split with t-SNE, coloured by class (Fig. 9)."""
    with one_line_errors(debug):
        path = out or run / f"tsne-{split}.png"
        require_run(run)
        require_data(data)
        require_place(path)
        from vpt_fast.training.plots import plot_embedding
        from vpt_fast.training.tsne import embed_run

        console = LastingConsole()
        found = embed_run(
            run, data, split, seed=seed, backbone=backbone, checkpoint=checkpoint, device=device,
            workers=workers, data_root=data_root, console=console,
        )  # fmt: skip
        title = f"{run.name}: t-SNE of {len(found.points)} {split} images"
        plot_embedding(found.points, found.labels, found.classes, path, title=title)
    console.print(f"picture: {path}")


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in a comma-separated list; `Sweep` refuses those that it cannot use, such as one named twice.

    Raises ValueError for anything but whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"seeds is {text!r}; it must be whole numbers with commas between them") from None


def table(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Sweep folders, run folders, or folders of these.")
    ],
    form: Annotated[
        Literal["markdown", "csv", "latex"], typer.Option("--format", help="Output format.")
    ] = "markdown",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="printed", **PATH)] = None,
    debug: DebugFlag = False,
) -> None:
    """Tabulate runs like the paper's Table 1, beside the published numbers."""
    with one_line_errors(debug):
        if out is not None:
            require_place(out)
        entries, notes = read_entries(runs)
        text = format_table(entries, notes, form)
        for note in notes:
            if note.endswith(LEFT_OUT):  # here too: CSV has no notes, and the table may go to a file
                typer.echo(note, err=True)
        if out is not None:
            write(out, text.encode())
    if out is None:
        typer.echo(text, nl=False)
