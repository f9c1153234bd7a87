"""Plots of runs, readable in greyscale: curves also differ in dashes and markers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vpt_fast.files import replacing

Rows = Sequence[Mapping[str, Any]]

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "#c0392b", "linestyle": "--", "marker": "s"},
    {"color": "#7fb3d5", "linestyle": "-.", "marker": "^"},
    {"color": "#7d8c2f", "linestyle": ":", "marker": "D"},
    {"color": "#6c3483", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#999999", "linestyle": "-", "marker": "x"},
    {"color": "#ca6f1e", "linestyle": (0, (1, 3)), "marker": "P"},
    {"color": "#1a5276", "linestyle": (0, (8, 3)), "marker": "*"},
)
MOST_IN_LEGEND = 20  # classes
LONGEST_NAME = 10  # letters in a line below a group of bars
SCENE = 408  # pixels: the side of a square scene; others are drawn with its area
OVERLAY = 153  # of 255: how much of a class's colour is laid over an image


def plot_curves(rows: Rows, path: Path) -> None:
    """Loss and accuracy of training and validation, and the learning rate, by epoch."""
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
    loss, accuracy, lr = figure.subplots(1, 3)
    evaluated = [row for row in rows if row["val_loss"] is not None]  # none if val was trained on
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        lines = {"train": (rows, f"train_{name}")}
        if evaluated:
            lines["val"] = (evaluated, f"val_{name}")
            if name == "accuracy" and "val_miou" in rows[0]:  # of a segmenter
                lines["val mIoU"] = (evaluated, "val_miou")
        _lines(axes, lines, name)
        axes.legend(frameon=False)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    _lines(lr, {"lr": (rows, "lr")}, "learning rate")
    _save(figure, path)


def plot_comparison(runs: Mapping[str, Rows], test_accuracy: Mapping[str, float], path: Path) -> None:
    """Several runs, by name: validation accuracy and training loss over the fraction of each run's epochs,
    and test accuracy."""
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


def plot_ablation(
    lines: Mapping[str, Mapping[Any, tuple[float, float | None]]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """Accuracy against the varied setting; `lines`: line -> {value: (mean, standard deviation or None)}.

    Numeric values are drawn as curves, on a logarithmic axis if they span more than a factor of 30; other
    values as groups of bars, each group centred on its name. Bars of error are one standard deviation.

    Raises ValueError for more lines than there are styles.
    """
    if len(lines) > len(STYLES):
        raise ValueError(f"lines: got {len(lines)}, want at most {len(STYLES)}, which can be told apart")
    values = list(dict.fromkeys(value for line in lines.values() for value in line))
    is_numeric = all(isinstance(value, int | float) for value in values)
    inches = 6.4 if is_numeric else max(6.4, 2.4 + 1.1 * len(values))  # room for the names
    figure = Figure(figsize=(inches, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    for i, ((name, line), style) in enumerate(zip(lines.items(), STYLES, strict=False)):
        means = [mean for mean, _ in line.values()]
        errors = [math.nan if deviation is None else deviation for _, deviation in line.values()]
        if is_numeric:
            axes.errorbar(list(line), means, errors, label=name, markersize=5, capsize=3, **style)
        else:
            width = 0.8 / len(lines)
            places = []
            for value in line:
                group = [other for other in lines if value in lines[other]]
                places.append(values.index(value) + (group.index(name) - (len(group) - 1) / 2) * width)
            hatch = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")[i]
            axes.bar(
                places, means, width, yerr=errors, label=name, hatch=hatch, facecolor=style["color"],
                edgecolor="white", ecolor="#888888", capsize=3,  # grey shows on a black bar too
            )  # fmt: skip
    if is_numeric:
        if min(values) > 0 and max(values) / min(values) > 30:
            axes.set_xscale("log")
        axes.set_xticks(values, labels=[f"{value:g}" for value in values])
        axes.minorticks_off()
    else:
        # In lines, since neighbouring names would run into each other.
        names = [textwrap.fill(str(value).replace("_", " "), LONGEST_NAME) for value in values]
        axes.set_xticks(range(len(values)), labels=names)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    has_errors = any(deviation is not None for line in lines.values() for _, deviation in line.values())
    axes.set_ylabel(f"{y_label} (mean ± std)" if has_errors else y_label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(lines) > 1 and is_numeric:
        axes.legend(frameon=False)
    elif len(lines) > 1:  # bars leave no free space inside the axes
        figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def plot_embedding(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: Path, *, title: str
) -> None:
    """Points (n, 2) in the colours and markers of their classes, given by labels (n,) into `classes`; with a
    legend for up to `MOST_IN_LEGEND` classes."""
    figure = Figure(figsize=(6.4, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    colors = colormaps["turbo"].resampled(max(2, len(classes)))
    markers = "os^DvP*X<>"
    has_legend = len(classes) <= MOST_IN_LEGEND
    drawn = []
    for index in range(len(classes)) if has_legend else np.unique(labels).tolist():
        of_class = points[labels == index]
        drawn.append(axes.scatter(
            of_class[:, 0], of_class[:, 1], s=14, color=colors(index), alpha=0.8, linewidths=0,
            marker=markers[index % len(markers)],
        ))  # fmt: skip
    axes.set_title(title, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    if has_legend:
        _class_legend(figure, drawn, classes)
    _save(figure, path)


def _class_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend with the names as they are: matplotlib would leave out those that begin with an underscore and
    take what is between two dollars for mathematics, if need be broken."""
    legend = figure.legend(handles, ["class"] * len(names), loc="outside right center", frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def class_colors(num_classes: int) -> np.ndarray:
    """A colour for each class (num_classes, 3) uint8: hues spaced by the golden ratio, so that the first few
    differ most, and three levels of brightness, which are visible in greyscale too."""
    index = np.arange(num_classes)
    value = np.array([0.95, 0.7, 0.45])[index % 3]
    hsv = np.stack([index * 0.618034 % 1, np.full(num_classes, 0.75), value], axis=1)
    return np.rint(255 * hsv_to_rgb(hsv)).astype(np.uint8)


def plot_segmentation(
    scenes: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], classes: Sequence[str], path: Path
) -> None:
    """A row for each scene: its image (h, w, 3) uint8, then the image overlaid with each of its named masks
    (h, w) uint8 of class indices. The legend shows up to `MOST_IN_LEGEND` classes that occur, the largest
    first. Pixels whose index is not a class are not coloured."""
    colors = class_colors(len(classes))
    palette = np.zeros((256, 4), np.uint8)
    palette[: len(classes)] = np.insert(colors, 3, OVERLAY, axis=1)
    rows, total = [], np.zeros(256, np.int64)
    for image, masks in scenes:
        plain = Image.fromarray(image)
        rows.append([plain, *(_overlaid(plain, mask, palette) for mask in masks.values())])
        for mask in masks.values():
            total += np.bincount(mask.ravel(), minlength=256)
    order = [i for i in np.argsort(-total[: len(classes)], kind="stable") if total[i]][:MOST_IN_LEGEND]

    headings = ("image", *scenes[0][1])
    gap, line, heading_line = 16, 26, 40
    text, heading = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in (17, 20))
    height, width = scenes[0][0].shape[:2]
    aspect = math.sqrt(width / height)
    size = max(round(SCENE * aspect), 80), max(round(SCENE / aspect), 1)  # no narrower than a heading
    across, down = size[0] + gap, size[1] + gap
    legend = gap + across * len(headings)  # where it begins
    end = legend + 2 * line + math.ceil(max((text.getlength(classes[i]) for i in order), default=0))
    bottom = heading_line + max(down * len(rows), line * len(order))
    picture = Image.new("RGB", (end + gap, bottom), "white")
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(headings):
        middle = gap + across * column + size[0] / 2
        draw.text((middle, heading_line / 2), name, "black", heading, anchor="mm")
        for row, shown in enumerate(rows):
            # This filter averages where it shrinks, and keeps pixels as they are where it enlarges.
            fitted = ImageOps.pad(shown[column], size, Image.Resampling.BOX, color="white")
            picture.paste(fitted, (gap + across * column, heading_line + down * row))
    for row, i in enumerate(order):
        top = heading_line + line * row
        draw.rectangle((legend, top, legend + 1.5 * line, top + 0.6 * line), tuple(colors[i].tolist()))
        draw.text((legend + 2 * line, top + 0.3 * line), classes[i], "black", text, anchor="lm")
    with replacing(path) as temporary:
        # The default level, 6, takes three times as long for files that are a tenth smaller.
        picture.save(temporary, format="PNG", compress_level=3)


def _overlaid(image: Image.Image, mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """`image` with each pixel's colour in the palette (256, 4), RGBA, laid over it."""
    colored = Image.fromarray(mask)
    colored.putpalette(palette.tobytes(), "RGBA")
    colored = colored.convert("RGBA")
    overlaid = image.copy()
    overlaid.paste(colored, mask=colored)
    return overlaid


def _lines(axes: Axes, lines: Mapping[str, tuple[Rows, str]], title: str, *, as_share: bool = False) -> None:
    """Draws curves by epoch, or by the fraction of each run's epochs."""
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
