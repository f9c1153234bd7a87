"""The demo: three ways to tune one frozen backbone for handwritten digits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vpt_fast.data.digits import export_digits
from vpt_fast.files import read_json, remove_unfinished, write_json
from vpt_fast.training.inference import LoadedRun, evaluate_run
from vpt_fast.training.loop import train
from vpt_fast.training.plots import plot_comparison
from vpt_fast.training.recipe import Recipe

SEED = 42
NAMES = {"linear": "linear probe", "vpt-shallow": "VPT-Shallow", "vpt-deep": "VPT-Deep"}


def demo_recipes(digits: Path) -> list[Recipe]:
    """The recipes of the three methods, which differ in epochs, base learning rate and prompts.

    The standard recipe is 100 epochs of SGD. The demo has time for as many epochs of the linear probe, whose
    features are computed once, but only for 13 with prompts; hence small batches, AdamW, no warm-up and no
    prompt dropout. 800 digits are few enough to be memorised; label smoothing and weight decay counteract
    that for all three methods.

    Base learning rates were chosen by val accuracy, with ties going to the smaller one, from 0.25, 0.5, 1, 2
    and 4 for the linear probe, 1 and 2 for VPT-Shallow, and 0.5, 1, 1.5 and 2 for VPT-Deep; the number of
    deep prompts from 10 and 20.
    """
    common: dict[str, Any] = dict(
        data=str(digits),
        backbone="vpt_fast_demo",
        optimizer="adamw",
        label_smoothing=0.1,
        weight_decay=0.03,
        warmup_epochs=0,
        batch_size=16,
        tensorboard=False,
        seed=SEED,
    )
    prompts: dict[str, Any] = dict(epochs=13, base_lr=2.0, prompt_dropout=0.0)
    return [
        Recipe(method="linear", epochs=100, base_lr=0.25, **common),
        Recipe(method="vpt-shallow", num_prompts=10, **prompts, **common),
        Recipe(method="vpt-deep", num_prompts=20, **prompts, **common),
    ]


def run_demo(out: Path, *, console: Console, fresh: bool = False) -> bool:
    """Trains what is not trained yet, then prints the table; returns False if it was stopped before.

    Raises what :func:`vpt_fast.training.loop.train` raises.
    """
    digits = out / "digits"
    console.print(f"1,797 handwritten digits: {digits}")
    export_digits(digits, seed=SEED)
    results_file, plot = out / "results.json", out / "comparison.png"
    remove_unfinished(results_file, plot)
    if fresh:  # else, after a kill, the old results would pass for those of the new runs
        results_file.unlink(missing_ok=True)
    known = read_json(results_file) if results_file.exists() else {}
    results: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    stop = threading.Event()
    for recipe in demo_recipes(digits):
        name, run = NAMES[recipe.method], out / recipe.method
        console.rule(name)
        result = train(recipe, run, console=console, fresh=fresh, stop=stop)
        if stop.is_set():  # maybe too late to stop this run
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
                "epochs": recipe.epochs,
                "stored_parameters": result.facts["parameters"]["trained"],
                "test_accuracy": evaluate_run(LoadedRun.load(run), digits, "test").evaluation.accuracy,
                "images_per_second": images / seconds,
                "run": str(run),
            }
    plot_comparison(curves, {name: found["test_accuracy"] for name, found in results.items()}, plot)
    write_json(results_file, results)

    folder = Column("run folder", overflow="fold")  # a truncated path is useless
    table = Table("method", "epochs", "stored parameters", "test accuracy", "images/s", folder)
    for name, found in results.items():
        table.add_row(
            name,
            str(found["epochs"]),
            f"{found['stored_parameters']:,}",
            f"{found['test_accuracy']:.1%}",
            f"{found['images_per_second']:,.0f}",
            found["run"],
        )
    console.rule("one backbone, trained on photographs; accuracy on 797 test images")
    console.print(table)
    console.print(f"plot: {plot}")
    return True
