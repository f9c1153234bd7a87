"""Plots of throughput against the number of prompts and the batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import plots
import pytest
import typer
from matplotlib.axes import Axes
from typer.testing import CliRunner

HEADER = {"device": "AMD EPYC, 2 threads", "torch": "2.14", "date": "2026-11-23", "dtype": "bfloat16"}


def row(impl: str, num_prompts: int, batch_size: int = 8, **values: Any) -> dict[str, Any]:
    return {
        "model": "test_vit", "prompt_type": "deep", "image_size": 32, "dtype": "bfloat16", "impl": impl,
        "memory": "exact" if impl.startswith("vpt_fast") else None, "exact": True,
        "num_prompts": num_prompts, "batch_size": batch_size, "images_per_second": 1e3 / num_prompts,
        "images_per_second_min": 0.9e3 / num_prompts, "images_per_second_max": 1.2e3 / num_prompts,
        "peak_mib": None, "kept_mib_per_image": 2.0 + num_prompts, **values,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """A sweep over prompts and one over batch sizes, which share a setting."""
    names = ["vpt_fast", "concat_timm", "concat_reference", "no_prompts"]
    return [row(name, m, b) for m, b in [(1, 8), (10, 8), (100, 8), (10, 16)] for name in names]


def run(tmp_path: Path, those: list[dict[str, Any]]) -> Any:
    results = tmp_path / "run.json"
    results.write_text(json.dumps({**HEADER, "rows": those}))
    app = typer.Typer()
    app.command()(plots.main)
    return CliRunner().invoke(app, [str(results), "--output", str(tmp_path / "pictures")])


def test_every_sweep_is_a_picture(tmp_path: Path) -> None:
    result = run(tmp_path, rows())
    assert result.exit_code == 0, result.output
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "run-test_vit-deep-10-prompts-by-batch-size.png",
        "run-test_vit-deep-batch-8-by-prompts.png",
    ]
    for path in pictures:
        picture = matplotlib.image.imread(path)[..., :3]  # (height, width, RGB)
        assert picture.shape[:2] == (600, 1440) and picture.std() > 0.05


def test_lines_differ_in_more_than_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(f"vpt_fast_{i}" for i in range(4)), *(f"concat_{i}" for i in range(7))]
    names += ["no_prompts", "linear_probe", "full_finetuning"]
    looks: dict[str, tuple[str, str]] = {}
    errorbar = Axes.errorbar

    def recorded(self: Axes, *args: Any, **kwargs: Any) -> Any:
        looks[kwargs["label"]] = (kwargs["linestyle"], kwargs["marker"])
        return errorbar(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", recorded)
    run(tmp_path, [row(name, m) for m in (1, 10) for name in names])
    assert looks.keys() == set(names)
    assert len(set(looks.values())) == len(names)


def test_wrong_and_failed_rows_are_not_drawn_but_named() -> None:
    wrong = [row("vpt_fast", m, memory="compact", exact=False) for m in (1, 10, 100)]
    failed = [row("concat_large", m, images_per_second=None) for m in (1, 10, 100)]
    found = {sweep.axis: sweep for sweep in plots.sweeps([*rows(), *wrong, *failed])}
    assert set(found["num_prompts"].left_out) == {"vpt_fast, compact", "concat_large"}
    assert all(row["exact"] and row["images_per_second"] for row in found["num_prompts"].rows)


@pytest.mark.parametrize("peak, drawn", [(None, "kept"), (100.0, "peak")], ids=["cpu", "gpu"])
def test_memory_is_the_peak_where_there_is_one(
    peak: float | None, drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "_finish", lambda axes, title, sweep: titles.append(title))
    run(tmp_path, [row("vpt_fast", m, peak_mib=peak) for m in (1, 10)])
    assert drawn in titles[1]


@pytest.mark.parametrize(
    "those",
    [[row("vpt_fast", 10), row("concat_timm", 10)], [{"impl": "vpt_fast", "exact": True, "measured": None}]],
    ids=["one_setting", "of_recipe"],
)
def test_results_without_a_sweep_are_refused(those: list[dict[str, Any]], tmp_path: Path) -> None:
    result = run(tmp_path, those)
    assert result.exit_code == 2
    assert "--num-prompts" in result.output
