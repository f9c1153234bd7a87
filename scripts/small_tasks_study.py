"""The paper's protocol on the small tasks: search on val, then train five seeds on train and val, and test.

    python scripts/small_tasks.py tasks --photographs cifar10-train-jpg.tar.gz
    python scripts/small_tasks_study.py tasks runs/small-tasks            # takes hours; repeat to resume

Six methods are tuned on every task, VPT-Deep from two starts of its prompts. Several processes may share the
work, each with its own tasks (`--tasks digits,shape_position`). When they are done, `--docs docs` adds the
results to docs/small-tasks/results.json, draws comparison.png beside it, and puts the table into
docs/small-tasks.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from page_text import markdown_table, replace_block
from rich.console import Console

from vpt_fast.files import write, write_json
from vpt_fast.sweeps.settings import Sweep
from vpt_fast.sweeps.sweep import run_sweep
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.plots import plot_ablation

MARKER = "small tasks"
TASKS = ("digits", "photo_turn", "shape_position", "shape_count")

# As tuned for the demo on digits: AdamW and small batches, since there is no time for the standard recipe's
# 100 epochs of SGD; label smoothing and weight decay against memorising 800 images.
COMMON: dict[str, Any] = dict(
    backbone="vpt_fast_demo",
    optimizer="adamw",
    label_smoothing=0.1,
    weight_decay=0.03,
    warmup_epochs=0,
)
TRAINED: dict[str, Any] = dict(epochs=24, batch_size=16)
PROMPTS: dict[str, Any] = dict(prompt_dropout=0.0, **TRAINED)

# Each row's settings, with `method` where that is not its name, and base learning rates to search, spaced by
# factors of three to four. All are larger than usual, since 1,200 steps have to train the head too, at the
# same rate. The linear probe computes its features once, so that there is time for more epochs.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "linear": (dict(epochs=100, batch_size=128), (0.01, 0.03, 0.1, 0.3, 1.0)),
    "bias": (TRAINED, (0.08, 0.3, 1.2)),
    "adapter": (TRAINED, (0.04, 0.16, 0.64)),
    "vpt-shallow": (dict(num_prompts=10, **PROMPTS), (0.25, 1.0, 4.0)),
    "vpt-deep": (dict(num_prompts=20, **PROMPTS), (0.25, 1.0, 4.0)),
    "vpt-deep from tokens": (
        dict(method="vpt-deep", prompt_init="tokens", num_prompts=20, **PROMPTS),
        (0.25, 1.0, 4.0),
    ),
    "full": (TRAINED, (0.004, 0.016, 0.064)),
}


def plan(tasks: Path, task: str, method: str) -> Sweep:
    settings, rates = METHODS[method]
    common = dict(data=str(tasks / task), method=method, **COMMON)
    return Sweep({**common, **settings}, {"base_lr": rates})


def collect(out: Path, tasks: list[str], methods: list[str]) -> dict[str, Any]:
    """The contents of a results file in docs/small-tasks, from the sweeps' folders.

    Raises:
        typer.BadParameter: a sweep is not finished.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        found[task] = {}
        for method in methods:
            path = out / task / method / "results.json"
            results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            if not results.get("finished"):
                raise typer.BadParameter(
                    f"{path.parent} is not finished; the same command without --docs goes on"
                )
            found[task][method] = {
                "settings": {key: value for key, value in results["settings"].items() if key != "data"},
                "val_accuracies": {
                    trial["params"]["base_lr"]: trial["val_accuracy"] for trial in results["trials"]
                },
                "base_lr": results["best"]["params"]["base_lr"],
                "test_accuracies": results["final"]["accuracies"],
                "mean": results["final"]["mean"],
                "standard_deviation": results["final"]["standard_deviation"],
                "stored_parameters": results["parameters"]["trained"],
            }
    return {"torch": torch.__version__, "tasks": found}


def common_methods(results: dict[str, Any]) -> list[str]:
    """The methods that have results on every task."""
    return [method for method in METHODS if all(method in found for found in results["tasks"].values())]


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a row for each method, columns for each task and the mean; the best method in
    bold."""
    tasks, methods = results["tasks"], common_methods(results)
    means = {method: sum(task[method]["mean"] for task in tasks.values()) / len(tasks) for method in methods}

    def shown(value: float, values: Iterable[float]) -> str:
        return f"**{value:.1%}**" if value == max(values) else f"{value:.1%}"

    lines = [["method", *(name.replace("_", " ") for name in tasks), "mean", "stored for a task"]]
    for method in methods:
        line = [method]
        for found in tasks.values():
            mean = shown(found[method]["mean"], [each["mean"] for each in found.values()])
            line.append(f"{mean} ± {found[method]['standard_deviation']:.1%}")
        stored = [found[method]["stored_parameters"] for found in tasks.values()]
        mean = shown(means[method], means.values())
        lines.append([*line, mean, f"{min(stored):,} to {max(stored):,}"])
    return markdown_table(lines)


def write_docs(results: dict[str, Any], docs: Path) -> None:
    """Writes the results file, keeping the results of other tasks and methods in it, the plot, and the table
    in docs/small-tasks.md."""
    folder, page = docs / "small-tasks", docs / "small-tasks.md"
    file = folder / "results.json"
    if file.exists():
        tasks = json.loads(file.read_text())["tasks"]
        for task, found in results["tasks"].items():
            tasks[task] = {**tasks.get(task, {}), **found}
        results = {**results, "tasks": tasks}
    text = replace_block(page, page.read_text(), MARKER, table(results))
    folder.mkdir(exist_ok=True)
    write_json(file, results, indent=1)
    draw(results, folder / "comparison.png")
    write(page, text.encode())


def draw(results: dict[str, Any], file: Path) -> None:
    lines = {
        method: {
            name.replace("_", " "): (found[method]["mean"], found[method]["standard_deviation"])
            for name, found in results["tasks"].items()
        }
        for method in common_methods(results)
    }
    plot_ablation(
        lines, file, title="five seeds, trained on 1,000 images", x_label="", y_label="test accuracy"
    )


def main(
    tasks: Annotated[Path, typer.Argument(help="What small_tasks.py wrote.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the sweeps.")],
    only: Annotated[str, typer.Option("--tasks", help="Of these tasks, comma-separated.")] = ",".join(TASKS),
    methods: Annotated[str, typer.Option(help="These methods, comma-separated.")] = ",".join(METHODS),
    docs: Annotated[
        Path | None,
        typer.Option(help="Train nothing; write what was found into this folder.", file_okay=False),
    ] = None,
) -> None:
    """Work through what is not done yet. Ctrl-C stops; the same command goes on."""
    console = Console()
    chosen, compared = only.split(","), methods.split(",")
    for method in compared:
        if method not in METHODS:
            raise typer.BadParameter(f"methods: got {method!r}, want some of {', '.join(METHODS)}")
    for task in chosen:
        if task not in TASKS:
            raise typer.BadParameter(f"tasks: got {task!r}, want some of {', '.join(TASKS)}")
        if not (tasks / task).is_dir():
            raise typer.BadParameter(
                f"tasks: got {task}, and there is no folder {tasks / task}; small_tasks.py writes it"
                + (" with --photographs" if task == "photo_turn" else "")
            )
    if docs is not None:
        write_docs(collect(out, chosen, compared), docs)
        return
    for task in chosen:
        cache = TrainingCache()
        for method in compared:
            console.rule(f"{task}, {method}")
            sweep = plan(tasks, task, method)
            if not run_sweep(sweep, out / task / method, console=console, cache=cache)["finished"]:
                raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
