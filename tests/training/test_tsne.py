"""t-SNE of a run: which features it is of, and of which images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.training import loop, plots, tsne
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.tsne import embed_run
from vpt_fast.tuning.probes import LinearProbe


def test_seed_that_t_sne_cannot_take_is_refused_by_name(tmp_path) -> None:
    arguments = ["plot", "tsne", str(tmp_path), "--data", "x", "--seed", str(2**32)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "Invalid value for '--seed'" in done.stderr


def test_tsne_is_of_what_the_head_reads(settings, tmp_path, monkeypatch) -> None:
    drawn, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    result = loop.train(Recipe(**settings), tmp_path / "run")
    arguments = ["plot", "tsne", str(result.path), "--data", settings["data"], "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "tsne-val.png").is_file()
    found = embed_run(result.path, settings["data"], "val", device="cpu")
    (axes,) = drawn[-1].axes
    points = np.concatenate([group.get_offsets() for group in axes.collections])
    assert sorted(map(tuple, points.tolist())) == sorted(map(tuple, found.points.tolist()))
    assert len(axes.collections) == len(found.classes)


@pytest.fixture
def features(monkeypatch) -> np.ndarray:
    """(9, 2): those of 9 images, of the classes 0 to 8, instead of a run's; t-SNE gives them back."""
    found = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    loaded = SimpleNamespace(model=object.__new__(LinearProbe), labels=SimpleNamespace(classes="abcdefghi"))
    monkeypatch.setattr(tsne.LoadedRun, "load", lambda *_, **options: loaded)
    monkeypatch.setattr(tsne, "open_split", lambda *_, **options: (None, ()))
    monkeypatch.setattr(tsne, "read_features", lambda *_: (found, np.arange(9)))
    monkeypatch.setattr(tsne, "TSNE", lambda **options: SimpleNamespace(fit_transform=lambda given: given))
    return found


def test_tsne_of_a_large_split_is_of_some_images_by_seed(features, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "MOST_IMAGES", 5)
    found, again, other = (embed_run("run", "x", "val", seed=seed) for seed in (1, 1, 2))
    assert len({*found.labels.tolist()}) == 5 and np.array_equal(found.points, features[found.labels])
    assert np.array_equal(found.labels, again.labels) and not np.array_equal(found.labels, other.labels)


def test_tsne_of_all_images_of_a_small_split(features, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "MOST_IMAGES", 9)
    assert np.array_equal(embed_run("run", "x", "val").labels, np.arange(9))


def test_tsne_reads_the_run_and_its_data_from_where_it_is_told(features, monkeypatch) -> None:
    asked, loaded = [], tsne.LoadedRun.load()
    monkeypatch.setattr(
        tsne.LoadedRun, "load", lambda *given, **options: asked.append((given, options)) or loaded
    )
    monkeypatch.setattr(
        tsne, "open_split", lambda *given, **options: asked.append((given, options)) or (None, ())
    )
    ours = {"backbone": "b", "checkpoint": Path("c")}
    where = {"workers": 2, "data_root": "d", "console": Console(quiet=True)}
    embed_run("run", "x", "val", device="cpu", **ours, **where)
    assert asked == [(("run", "cpu"), ours), ((loaded, "x", "val"), where)]


def test_tsne_of_two_images_is_refused(features, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "read_features", lambda *_: (features[:2], np.arange(2)))
    with pytest.raises(ValueError, match="split val of x has 2 images; t-SNE needs at least 3"):
        embed_run("run", "x", "val")
