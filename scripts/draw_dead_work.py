"""Draws docs/engine/dead-work.png: what each block computes for which token, and the total work.

python scripts/draw_dead_work.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from vpt_fast.files import replacing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import flops  # noqa: E402

MODEL, NUM_CLASSES, BATCH = "vit_base_patch16_224", 100, 64
NUM_PROMPTS = (1, 25, 50, 100, 150, 200)

ROWS = ("CLS", "patches", "prompts")
OPERATIONS = ("norm", "Q", "K, V", "attention", "projection", "MLP")
NOTHING, ONCE, EVERY = 0, 1, 2  # not computed; once for the batch; for every image
SHADES = {NOTHING: "white", ONCE: "#9ecae1", EVERY: "#225ea8"}
WORDS = {EVERY: "for every image", ONCE: "once for the batch", NOTHING: "left out"}

Cells = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""By row: what is computed in forward and in backward, by operation."""

_ALL, _NONE = (EVERY,) * 6, (NOTHING,) * 6
_PROMPTS = ((ONCE, NOTHING, ONCE, NOTHING, NOTHING, NOTHING),) * 2
_KEYS_ALONE = ((EVERY, NOTHING, EVERY, NOTHING, NOTHING, NOTHING),) * 2
_AFTER_KEYS = (NOTHING, NOTHING, NOTHING, EVERY, EVERY, EVERY)

CONCATENATION: Cells = {row: (_ALL, _ALL) for row in ROWS}
ENGINE: dict[str, Cells] = {
    "first block": {"CLS": (_ALL, _AFTER_KEYS), "patches": (_ALL, _AFTER_KEYS), "prompts": _PROMPTS},
    "blocks between": {"CLS": (_ALL, _ALL), "patches": (_ALL, _ALL), "prompts": _PROMPTS},
    "last block": {"CLS": (_ALL, _ALL), "patches": _KEYS_ALONE, "prompts": _PROMPTS},
}


def draw_cells(axes: Axes, cells: Cells, title: str, *, names: bool) -> None:
    """A square for each row and operation: its upper half is forward, its lower half backward."""
    for y, row in enumerate(ROWS):
        for half, shades in enumerate(cells[row]):
            for x, shade in enumerate(shades):
                axes.add_patch(
                    Rectangle(
                        (x + 0.05, y + 0.08 + 0.43 * half), 0.9, 0.4, facecolor=SHADES[shade],
                        edgecolor="#888888", linewidth=0.6, hatch="////" if shade == NOTHING else None,
                    )
                )  # fmt: skip
    axes.set_xlim(0, len(OPERATIONS))
    axes.set_ylim(len(ROWS), 0)
    axes.set_xticks([x + 0.5 for x in range(len(OPERATIONS))], OPERATIONS, rotation=35, ha="right")
    axes.set_yticks([y + 0.5 for y in range(len(ROWS))], ROWS if names else [""] * len(ROWS))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def work() -> dict[str, list[float]]:
    """GFLOP an image of a training step, forward and backward, for each of NUM_PROMPTS."""
    with torch.device("meta"):
        shape = flops.shape_of(timm.create_model(MODEL, num_classes=0))
    scale = 1e-9 / BATCH
    return {
        "concatenation": [scale * flops.concatenation(shape, m, BATCH, NUM_CLASSES) for m in NUM_PROMPTS],
        "vpt_fast": [scale * flops.essential(shape, m, "deep", BATCH, NUM_CLASSES) for m in NUM_PROMPTS],
        "no prompts at all": [scale * flops.no_prompts(shape, BATCH, NUM_CLASSES)] * len(NUM_PROMPTS),
    }


def draw(path: Path) -> None:
    figure = Figure(figsize=(14, 3.6), layout="constrained", dpi=110)
    *panels, curves = figure.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.2))
    titles = {"concatenation, every block": CONCATENATION}
    titles |= {f"vpt_fast, {block}": cells for block, cells in ENGINE.items()}
    for axes, (title, cells) in zip(panels, titles.items(), strict=True):
        draw_cells(axes, cells, title, names=axes is panels[0])
    legend = [
        Patch(
            facecolor=SHADES[shade],
            edgecolor="#888888",
            hatch="////" if shade == NOTHING else None,
            label=text,
        )
        for shade, text in WORDS.items()
    ]
    figure.legend(
        handles=legend, loc="outside lower left", ncols=3, frameon=False,
        title="deep prompts; upper half of a square: forward, lower half: backward", alignment="left",
    )  # fmt: skip
    styles = ({"linestyle": "--", "marker": "s"}, {"linestyle": "-", "marker": "o"}, {"linestyle": ":"})
    for (name, values), style in zip(work().items(), styles, strict=True):
        curves.plot(NUM_PROMPTS, values, label=name, color="black", markersize=4, **style)
    curves.set_ylim(0)
    curves.set_xlabel("prompts in a block")
    curves.set_title("GFLOP an image, ViT-B/16, a step")
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def main(out: Annotated[Path, typer.Option(help="PNG file.")] = ROOT / "docs/engine/dead-work.png") -> None:
    """Draw what is computed."""
    draw(out)
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
