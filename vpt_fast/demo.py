"""The demo: three ways to teach one frozen backbone handwritten digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vpt_fast.data import export_digits
from vpt_fast.inference import evaluate_run
from vpt_fast.loop import train
from vpt_fast.plots import plot_comparison
from vpt_fast.recipe import Recipe
from vpt_fast.run import write

SEED = 42
EPOCHS = 10
NAMES = {"linear": "linear probe", "vpt-shallow": "VPT-Shallow", "vpt-deep": "VPT-Deep"}


def demo_recipes(digits: Path) -> list[Recipe]:
    """One recipe but for the method and its base learning rate, chosen by val accuracy in runs of 12 epochs.

    Tried: 0.25, 0.5, 1, 2 and 4 for the linear probe; 0.25, 0.5, 1 and 2 for the prompts, whose runs at 2
    were cut off early. A tie goes to the smaller one.

    The standard recipe takes SGD through 100 epochs; the demo has time for a few, so it takes small batches,
    AdamW, no warm-up and no prompt dropout. All methods get the same number of epochs, though a linear
    probe's cost next to nothing, its features being computed once: with 100 of them it gets further.
    """
    common: dict[str, Any] = dict(
        data=str(digits),
        backbone="vpt_fast_demo",
        optimizer="adamw",
        epochs=EPOCHS,
        warmup_epochs=0,
        batch_size=8,
        tensorboard=False,
        seed=SEED,
    )
    prompts: dict[str, Any] = dict(num_prompts=10, prompt_dropout=0.0)
    return [
        Recipe(method="linear", base_lr=2.0, **common),
        Recipe(method="vpt-shallow", base_lr=1.0, **prompts, **common),
        Recipe(method="vpt-deep", base_lr=0.5, **prompts, **common),
    ]


def run_demo(out: Path, *, console: Console, fresh: bool = False) -> bool:
    """Trains what is not trained yet, then prints the table; False when it was stopped on the way.

    Raises what :func:`vpt_fast.loop.train` raises.
    """
    digits = out / "digits"
    console.print(f"1,797 handwritten digits: {digits}")
    export_digits(digits, seed=SEED)
    results_file = out / "results.json"
    known = json.loads(results_file.read_text()) if results_file.exists() and not fresh else {}
    results: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    for recipe in demo_recipes(digits):
        name, run = NAMES[recipe.method], out / recipe.method
        console.rule(name)
        result = train(recipe, run, console=console, fresh=fresh)
        if not result.is_finished:
            console.print(f"Stopped after epoch {len(result.metrics)}; the same command goes on from there.")
            return False
        curves[name] = result.metrics
        if result.new_epochs == 0 and name in known:
            console.print(f"finished before: {run}")
            results[name] = known[name]
        else:
            seconds = sum(row["seconds"] for row in result.metrics)
            images = sum(row["seconds"] * row["images_per_second"] for row in result.metrics)
            results[name] = {
                "stored_parameters": result.facts["parameters"]["trained"],
                "test_accuracy": evaluate_run(run, digits, "test").evaluation.accuracy,
                "images_per_second": images / seconds,
                "run": str(run),
            }
    plot = out / "comparison.png"
    plot_comparison(curves, {name: found["test_accuracy"] for name, found in results.items()}, plot)
    write(results_file, (json.dumps(results, indent=2) + "\n").encode())

    table = Table("method", "stored parameters", "test accuracy", "images/s", "run folder")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['stored_parameters']:,}",
            f"{found['test_accuracy']:.1%}",
            f"{found['images_per_second']:,.0f}",
            found["run"],
        )
    console.rule(f"{EPOCHS} epochs of the same recipe; accuracy on 797 test images")
    console.print(table)
    console.print(f"plot: {plot}")
    return True
