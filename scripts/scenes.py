"""Draw small scenes with a label for every pixel, and report the results of a segmentation run on them.

    python scripts/scenes.py draw runs/scenes
    vpt-fast train --task segmentation --data runs/scenes --backbone vpt_fast_demo ...
    python scripts/scenes.py report RUN runs/scenes --out docs/segmentation

A scene is sky above ground with a wavy horizon, and on the ground houses (boxes with a gable), trees (three
triangles on a trunk) and balls. Their brightness and colours are random within overlapping ranges, so that
colour alone does not identify a class. The layout is ADE20k's. Pixels along edges have label 255, no class.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw
from scipy import ndimage

CLASSES = ("sky", "ground", "house", "tree", "ball")
SKY, GROUND, HOUSE, TREE, BALL = range(len(CLASSES))
NO_CLASS = 255
HEIGHT, WIDTH = 64, 96  # pixels
FINE = 4  # scenes are drawn this much larger and downsampled, for smooth edges
SHOWN = 4  # validation images in the report's plot

app = typer.Typer(no_args_is_help=True, add_completion=False)


def draw_scene(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """An RGB image, and its labels (HEIGHT, WIDTH) uint8."""
    height, width = HEIGHT * FINE, WIDTH * FINE
    x = np.linspace(0, 1, width)
    level = np.full(width, rng.uniform(0.35, 0.65))  # the horizon, in units of the image's height
    for n in (1, 2, 3):
        level += rng.uniform(-0.06, 0.06) * np.sin(2 * math.pi * (n * x + rng.random()))
    is_ground = np.arange(height)[:, None] / height >= level
    shade = np.linspace(0, 1, height)[:, None, None]
    sky = rng.uniform((70, 110, 150), (170, 190, 250)) + 50 * shade
    ground = rng.uniform((70, 80, 40), (170, 170, 120)) - 30 * shade
    pixels = np.where(is_ground[..., None], ground, sky)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    labels = Image.fromarray(np.where(is_ground, GROUND, SKY).astype(np.uint8))
    pens = ImageDraw.Draw(picture), ImageDraw.Draw(labels)

    def polygon(corners: list[tuple[float, float]], kind: int, color: np.ndarray) -> None:
        """Fills a polygon in image and labels; corners are in pixels of the downsampled image."""
        scaled = [(px * FINE, py * FINE) for px, py in corners]
        pens[0].polygon(scaled, fill=tuple(int(c) for c in color))
        pens[1].polygon(scaled, fill=kind)

    for kind in rng.permutation([HOUSE, TREE, BALL, *rng.choice([HOUSE, TREE, BALL], rng.integers(0, 3))]):
        left, size = rng.uniform(0, WIDTH - 16), rng.uniform(14, 26)
        foot = level[min(int((left + size / 2) * FINE), width - 1)] * HEIGHT + rng.uniform(2, 14)
        color = rng.uniform((60, 40, 40), (230, 200, 200))
        if kind == HOUSE:
            top, middle = foot - 0.7 * size, left + size / 2
            walls = [(left, foot), (left, top), (left + size, top), (left + size, foot)]
            polygon(walls, HOUSE, color)
            polygon([(left, top), (middle, top - 0.4 * size), (left + size, top)], HOUSE, 0.6 * color)
        elif kind == TREE:
            green, middle = rng.uniform((20, 70, 20), (110, 170, 100)), left + size / 2
            trunk = [
                (middle - 1.5, foot),
                (middle - 1.5, foot - 6),
                (middle + 1.5, foot - 6),
                (middle + 1.5, foot),
            ]
            polygon(trunk, TREE, rng.uniform((60, 40, 20), (110, 80, 50)))
            for i in range(3):
                base, half = foot - 5 - 0.28 * size * i, size * (0.4 - 0.09 * i)
                polygon(
                    [(middle - half, base), (middle, base - 0.55 * size), (middle + half, base)], TREE, green
                )
        else:
            radius = size / 3
            center = np.array([left + radius, foot - radius])
            angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
            circle = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            polygon([*map(tuple, center + circle)], BALL, color)
            polygon([*map(tuple, center - radius / 4 + circle / 2)], BALL, np.minimum(1.25 * color, 255))
    image = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float64)
    image += rng.normal(0, 6, image.shape)
    found = np.asarray(labels)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    is_edge = ndimage.maximum_filter(found, 2) != ndimage.minimum_filter(found, 2)
    return (
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)),
        np.where(is_edge, NO_CLASS, found).astype(np.uint8),
    )


def write_scenes(out: Path, counts: dict[str, int], seed: int) -> None:
    """Writes the folder completely or not at all; an existing one is left as it is."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        for index, (split, count) in enumerate(counts.items()):
            images, masks = new / "images" / split, new / "annotations" / split
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(count):
                image, labels = draw_scene(np.random.default_rng((seed, index, i)))
                image.save(images / f"{i:04d}.jpg", quality=95)
                Image.fromarray(labels).save(masks / f"{i:04d}.png")
        (new / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        os.rename(new, out)


@app.command()
def draw(
    out: Annotated[Path, typer.Argument(help="Folder for the scenes.")],
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 200,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the scenes, where they are not there yet."""
    counts = {"training": train, "validation": val}
    write_scenes(out, counts, seed)
    found = {split: len([*(out / "images" / split).glob("*.jpg")]) for split in counts}
    if found != counts:
        raise typer.BadParameter(
            f"out: got {out}, where there are {found['training']} and {found['validation']} scenes already, "
            f"want {train} and {val}; choose another folder, or remove it"
        )
    typer.echo(f"{out}: {train} and {val} scenes of {', '.join(CLASSES)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A finished segmentation run.")],
    data: Annotated[Path, typer.Argument(help="The scenes that it was trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and scenes.png.")],
) -> None:
    """Scores at one scale and at several, and a picture of the first validation images."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    from vpt_fast.data.scenes import open_scenes, read_scene
    from vpt_fast.files import write_json
    from vpt_fast.training.inference import LoadedRun
    from vpt_fast.training.plots import plot_segmentation
    from vpt_fast.training.run import RunFolder
    from vpt_fast.training.scene_inference import evaluate_scene_run
    from vpt_fast.training.segmentation import most_likely

    begun = RunFolder(run).read()
    if begun is None:
        raise typer.BadParameter(f"run: got {run}, which is no run folder (there is no config.yaml)")
    loaded = LoadedRun.load(run)
    made = loaded.scene_preprocessing
    results: dict[str, Any] = {
        "backbone": begun.recipe.backbone,
        "method": begun.recipe.method,
        "epochs": begun.recipe.epochs,
        "trained_parameters": begun.facts["parameters"]["trained"],
        "train_images": begun.facts["data"]["train"]["images"],
        "single_scale": evaluate_scene_run(loaded, data).to_dict(),
        "multi_scale": evaluate_scene_run(loaded, data, multi_scale=True).to_dict(),
    }
    scenes = open_scenes(data, ignore_zero=loaded.labels.ignore_zero).val
    rows = []
    for index in range(min(SHOWN, len(scenes))):
        image, mask = read_scene(scenes, index)
        found = most_likely(loaded.model, pil_to_tensor(image).to(loaded.device), made).cpu()
        rows.append((np.asarray(image), {"mask": mask, "found": found.numpy().astype(np.uint8)}))
    out.mkdir(parents=True, exist_ok=True)
    plot_segmentation(rows, scenes.classes, out / "scenes.png")
    write_json(out / "results.json", results)
    typer.echo(f"{out}: mIoU {results['single_scale']['miou']:.2%}, {results['multi_scale']['miou']:.2%}")


if __name__ == "__main__":
    app()
