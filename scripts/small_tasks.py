"""Write four small tasks of different kinds for the packaged backbone, each 800 + 200 training images.

    python scripts/small_tasks.py tasks --photographs cifar10-train-jpg.tar.gz

As in VTAB-1k, there are natural images, and structured tasks whose labels are positions and counts. Each is a
folder with train/ (800), val/ (200) and test/ of class folders, 32x32 PNGs:

    digits         10 classes: the handwritten digits that scikit-learn ships (real scans)
    photo_turn      4 classes: the quarter turns by which a photograph was rotated (real ones that the
                    backbone was not trained on; only with --photographs, the archive that holds them)
    shape_position  8 classes: the eighth of the range of horizontal positions that a shape's centre lies in
    shape_count     6 classes: the number of shapes, 1 to 6

Shapes are drawn like dSprites: white on black, with random kind, size, position and orientation.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw
from pretrain_demo_backbone import Recipe, read_archive, split_photographs

from vpt_fast.data.digits import export_digits

SPLITS = {"train": 800, "val": 200, "test": 1000}
SIZE = 32
FINE = 8  # shapes are drawn this much larger and downsampled, for smooth edges
NUM_POSITIONS = 8
MOST_SHAPES = 6
QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

Labelled = tuple[Image.Image, int]


def arrow() -> np.ndarray:
    """Corners (n, 2) in the unit circle, as of every shape."""
    return np.array([(1.0, 0.0), (-0.7, 0.7), (-0.3, 0.0), (-0.7, -0.7)])


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([y, x], axis=1) / 17


def egg() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    return np.stack([np.cos(t), 0.55 * np.sin(t) * (1 - 0.35 * np.cos(t))], axis=1)


SHAPES: tuple[Callable[[], np.ndarray], ...] = (arrow, heart, egg)


def draw(shapes: list[tuple[int, float, float, float, float]]) -> Image.Image:
    """Draws shapes (kind, x, y, radius, angle in radians), in units of the image's side, on black."""
    side = SIZE * FINE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for kind, x, y, radius, turn in shapes:
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        corners = (SHAPES[kind]() @ rotation * radius + (x, y)) * side
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGB")


def shape_position(rng: np.random.Generator, label: int) -> Image.Image:
    x = 0.15 + 0.7 * (label + rng.random()) / NUM_POSITIONS
    y, radius = rng.uniform(0.15, 0.85), rng.uniform(0.1, 0.15)
    return draw([(int(rng.integers(len(SHAPES))), x, y, radius, rng.uniform(0, 2 * math.pi))])


def shape_count(rng: np.random.Generator, label: int) -> Image.Image:
    """Shapes in different cells of a 3 by 3 grid, so that none covers another."""
    shapes = []
    for cell in rng.choice(9, size=label + 1, replace=False).tolist():
        x, y = ((place + rng.uniform(0.4, 0.6)) / 3 for place in (cell % 3, cell // 3))
        turn = rng.uniform(0, 2 * math.pi)
        shapes.append((int(rng.integers(len(SHAPES))), x, y, rng.uniform(0.07, 0.12), turn))
    return draw(shapes)


# The numbers in the seeds are those with which the study's images were drawn.
DRAWN: dict[str, tuple[int, int, Callable[[np.random.Generator, int], Image.Image]]] = {
    "shape_position": (0, NUM_POSITIONS, shape_position),
    "shape_count": (2, MOST_SHAPES, shape_count),
}
"""Name -> a number in the seed, the number of classes, and a function that draws an image of a class."""


def drawn_images(name: str, split: str, seed: int) -> Iterator[Labelled]:
    """A split of a drawn task, with the classes as balanced as possible."""
    number, num_classes, image_of = DRAWN[name]
    rng = np.random.default_rng([seed, number, list(SPLITS).index(split)])
    for i in range(SPLITS[split]):
        yield image_of(rng, i % num_classes), i % num_classes


def turned_photographs(held_out: np.ndarray, seed: int) -> dict[str, list[Labelled]]:
    """Rotates photographs (n, 32, 32, 3); each is in one split only, with one rotation."""
    order = iter(np.random.default_rng(seed).permutation(len(held_out)).tolist())
    found: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    for split, count in SPLITS.items():
        for i in range(count):
            photograph = Image.fromarray(held_out[next(order)])
            quarter = QUARTERS[i % len(QUARTERS)]
            turned = photograph if quarter is None else photograph.transpose(quarter)
            found[split].append((turned, i % len(QUARTERS)))
    return found


def write_task(folder: Path, splits: dict[str, Iterator[Labelled]]) -> None:
    """Writes the folder completely or not at all; an existing one is left as it is."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        for split, images in splits.items():
            for i, (image, label) in enumerate(images):
                path = new / split / str(label) / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        os.rename(new, folder)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the tasks' folders.")],
    photographs: Annotated[
        Path | None,
        typer.Option(help="The archive that the backbone was trained from.", exists=True, dir_okay=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the splits, and of all that is drawn.")] = 0,
) -> None:
    """Write the tasks that are not there yet."""
    if photographs is not None:
        out.mkdir(parents=True, exist_ok=True)
        images, _, _ = read_archive(photographs, out / "photographs.safetensors")
        held_out, _ = split_photographs(len(images), Recipe(), seed=0)  # the backbone's training seed
        if len(held_out) < (wanted := sum(SPLITS.values())):
            raise typer.BadParameter(
                f"photographs: got {photographs} with {len(images)}, want {wanted} or more: the CIFAR-10 "
                "training images"
            )
        pixels = images[held_out].permute(0, 2, 3, 1).numpy()
        splits = turned_photographs(pixels, seed)
        write_task(out / "photo_turn", {split: iter(found) for split, found in splits.items()})
    export_digits(out / "digits", seed=seed)
    for name in DRAWN:
        write_task(out / name, {split: drawn_images(name, split, seed) for split in SPLITS})
    names = sorted(path.name for path in out.iterdir() if path.is_dir())
    typer.echo(f"{out}: {', '.join(names)}")


if __name__ == "__main__":
    typer.run(main)
