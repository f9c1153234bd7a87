"""Pictures of runs, readable in grey: curves differ in their dashes and markers too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vpt_fast.files import replacing

Rows = Sequence[Mapping[str, Any]]

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "#c0392b", "linestyle": "--", "marker": "s"},
    {"color": "#7fb3d5", "linestyle": "-.", "marker": "^"},
    {"color": "#7d8c2f", "linestyle": ":", "marker": "D"},
)


def plot_curves(rows: Rows, path: Path) -> None:
    """Loss and accuracy of training and validation, and the learning rate, by epoch."""
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
    loss, accuracy, lr = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        lines = {"train": (rows, f"train_{name}")}
        if rows[0][f"val_{name}"] is not None:  # trained on the validation images too
            lines["val"] = (rows, f"val_{name}")
        _lines(axes, lines, name)
        axes.legend(frameon=False)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    _lines(lr, {"lr": (rows, "lr")}, "learning rate")
    _save(figure, path)


def plot_comparison(runs: Mapping[str, Rows], test_accuracy: Mapping[str, float], path: Path) -> None:
    """Several runs, by name: validation accuracy and training loss over each run's epochs, however many they
    are, and test accuracy."""
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
    val, loss, test = figure.subplots(1, 3)
    accuracies = {name: (rows, "val_accuracy") for name, rows in runs.items()}
    _lines(val, accuracies, "validation accuracy", as_share=True)
    val.yaxis.set_major_formatter(PercentFormatter(1.0))
    val.legend(frameon=False)
    losses = {name: (rows, "train_loss") for name, rows in runs.items()}
    _lines(loss, losses, "training loss", as_share=True)
    loss.set_yscale("log")
    colors = [style["color"] for style in STYLES]
    bars = test.barh(list(test_accuracy), list(test_accuracy.values()), color=colors[: len(test_accuracy)])
    test.bar_label(bars, labels=[f"{value:.1%}" for value in test_accuracy.values()], padding=3)
    test.set_xlim(0, 1.15)
    test.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    test.xaxis.set_major_formatter(PercentFormatter(1.0))
    test.set_title("test accuracy")
    test.invert_yaxis()
    test.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _lines(axes: Axes, lines: Mapping[str, tuple[Rows, str]], title: str, *, as_share: bool = False) -> None:
    """By epoch, or by the share of each line's epochs."""
    for (name, (rows, key)), style in zip(lines.items(), STYLES, strict=False):
        epochs = [(row["epoch"] + 1) / (len(rows) if as_share else 1) for row in rows]
        every = max(1, len(rows) // 10)
        axes.plot(epochs, [row[key] for row in rows], label=name, markersize=4, markevery=every, **style)
    axes.set_title(title)
    axes.set_xlabel("share of the epochs" if as_share else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=not as_share))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
