"""What the pictures of runs show, number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vpt_fast.training import plots
from vpt_fast.training.plots import plot_curves  # the one that draws: fixtures replace the attribute


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, which are not written: that takes most of a second."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def rows_of(epochs: int, **values: float | None) -> list[dict]:
    """Each value rises by an epoch's number; None stays."""
    return [
        {"epoch": epoch} | {name: None if value is None else value + epoch for name, value in values.items()}
        for epoch in range(epochs)
    ]


TRAIN = {"train_loss": 1.0, "train_accuracy": 2.0, "lr": 3.0}


def test_curves_are_the_values_by_epoch(drawn):
    plot_curves(rows_of(2, **TRAIN, val_loss=4.0, val_accuracy=5.0, val_miou=6.0), Path("curves.png"))
    loss, accuracy, lr = map(lines_of, drawn[0].axes)
    assert loss == {"train": ([1, 2], [1, 2]), "val": ([1, 2], [4, 5])}
    assert accuracy == {"train": ([1, 2], [2, 3]), "val": ([1, 2], [5, 6]), "val mIoU": ([1, 2], [6, 7])}
    assert lr == {"lr": ([1, 2], [3, 4])}


def test_curves_of_val_go_by_the_epochs_after_which_it_was_evaluated(drawn):
    rows = rows_of(4, **TRAIN, val_loss=4.0, val_accuracy=5.0)
    for row in (rows[0], rows[2]):
        row.update(val_loss=None, val_accuracy=None)
    plot_curves(rows, Path("curves.png"))
    loss, accuracy, _ = map(lines_of, drawn[0].axes)
    assert loss["val"] == ([2, 4], [5, 7]) and accuracy["val"] == ([2, 4], [6, 8])


def test_curves_of_training_on_val_too_are_of_training_alone(drawn):
    plot_curves(rows_of(2, **TRAIN, val_loss=None, val_accuracy=None), Path("curves.png"))
    assert [list(lines_of(axes)) for axes in drawn[0].axes] == [["train"], ["train"], ["lr"]]


def test_compared_runs_are_by_their_share_of_epochs_with_their_test_accuracies(drawn):
    runs = {
        name: rows_of(epochs, val_accuracy=1.0, train_loss=5.0) for name, epochs in {"a": 2, "b": 4}.items()
    }
    plots.plot_comparison(runs, {"a": 0.25, "b": 0.5}, Path("comparison.png"))
    val, loss, test = drawn[0].axes
    assert lines_of(val) == {"a": ([0.5, 1], [1, 2]), "b": ([0.25, 0.5, 0.75, 1], [1, 2, 3, 4])}
    assert lines_of(loss) == {"a": ([0.5, 1], [5, 6]), "b": ([0.25, 0.5, 0.75, 1], [5, 6, 7, 8])}
    assert [bar.get_width() for bar in test.patches] == [0.25, 0.5]
    assert [label.get_text() for label in test.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in test.texts] == ["25.0%", "50.0%"]


def test_legend_of_points_has_the_names_of_classes_as_they_are(drawn):
    names = ("_wall", r"$\frac{$", "a$b$")
    plots.plot_embedding(np.eye(3, 2), np.arange(3), names, Path("a.png"), title="$\\run$")
    (legend,) = drawn[0].legends
    assert tuple(text.get_text() for text in legend.get_texts()) == names
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_masks_are_laid_over_the_image_where_there_is_a_class(tmp_path, monkeypatch):
    shown, pad = [], plots.ImageOps.pad
    monkeypatch.setattr(
        plots.ImageOps, "pad", lambda image, *a, **k: shown.append(np.asarray(image)) or pad(image, *a, **k)
    )
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    mask = np.array([[1, 1, 0], [255, 1, 0]], np.uint8)
    plots.plot_segmentation([(image, {"found": mask})], ("a", "b", "c"), tmp_path / "scenes.png")
    plain, overlaid = shown
    colors = plots.class_colors(3)
    assert np.array_equal(plain, image) and np.array_equal(overlaid[1, 0], image[1, 0])
    assert np.abs(overlaid[0, 2] - (0.4 * image[0, 2] + 0.6 * colors[0])).max() <= 0.5
    assert np.abs(overlaid[1, 1] - (0.4 * image[1, 1] + 0.6 * colors[1])).max() <= 0.5


def test_scenes_stand_in_rows_of_one_size_in_which_small_pixels_stay_sharp(tmp_path):
    colors = np.diag([200, 100, 50]).astype(np.uint8)
    wide, large = np.repeat(colors[:2], 2, axis=0)[None].repeat(2, 0), np.full((600, 600, 3), colors[2])
    scenes = [(image, {"found": np.full(image.shape[:2], 255, np.uint8)}) for image in (wide, large)]
    plots.plot_segmentation(scenes, ("a", "b"), tmp_path / "scenes.png")
    with Image.open(tmp_path / "scenes.png") as picture:
        of_color = [(np.asarray(picture) == color).all(-1) for color in colors]
    # Of 4 × 2 pixels, drawn twice, each half is a square; so is the second scene, of the same height.
    height = round(plots.SCENE / 2**0.5)
    assert [each.sum() for each in of_color] == pytest.approx([2 * height**2] * 3, rel=0.01)
    left, _, below = (np.flatnonzero(each.any(1)) for each in of_color)
    assert left.max() < below.min() and [len(left), len(below)] == pytest.approx([height, height], abs=1)


def test_legend_has_the_names_of_the_classes_that_occur_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.ImageDraw.ImageDraw, "text", lambda self, xy, text, *a, **k: drawn.append(text))
    names = ("_wall", r"$\frac{$", "does not occur", "a$b$")
    scene = np.zeros((4, 6, 3), np.uint8), {"found": np.array([[0, 0, 0, 1, 1, 3]] * 4, np.uint8)}
    plots.plot_segmentation([scene], names, tmp_path / "a.png")
    assert drawn == ["image", "found", "_wall", r"$\frac{$", "a$b$"]


def test_legend_of_many_classes_is_whole_the_largest_first(tmp_path):
    classes = [str(i) for i in range(30)]
    mask = np.repeat(np.arange(30), np.arange(1, 31)).astype(np.uint8)[None].repeat(60, axis=0)
    image = np.zeros((*mask.shape, 3), np.uint8)
    plots.plot_segmentation([(image, {"found": mask})], classes, tmp_path / "scenes.png")
    with Image.open(tmp_path / "scenes.png") as picture:
        pixels = np.asarray(picture)
    in_legend = np.flip(plots.class_colors(30), 0)[: plots.MOST_IN_LEGEND]
    tops = [np.flatnonzero((pixels == color).all(-1).any(1))[0] for color in in_legend]
    assert tops == sorted(tops) and len(set(tops)) == plots.MOST_IN_LEGEND
