"""t-SNE of a run: which features it is of, and of which images."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.data import decode
from vpt_fast.data.images import ImageList
from vpt_fast.training import loop, plots, tsne
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.tsne import embed_run


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
    preprocessing = SimpleNamespace(for_evaluation=lambda: "preprocessing")
    loaded = SimpleNamespace(preprocessing=preprocessing, labels=SimpleNamespace(classes="abcdefghi"))
    images = ImageList(tuple(Path(f"{i}.png") for i in range(9)), tuple(range(9)), tuple("abcdefghi"))
    monkeypatch.setattr(tsne.LoadedRun, "load", lambda *_, **options: loaded)
    monkeypatch.setattr(tsne, "list_split", lambda *_, **options: images)

    def read_features(run, preprocessing, images, *_) -> tuple[np.ndarray, np.ndarray]:
        return found[list(images.labels)], np.array(images.labels)

    monkeypatch.setattr(tsne, "read_features", read_features)
    monkeypatch.setattr(tsne, "TSNE", lambda **options: SimpleNamespace(fit_transform=lambda given: given))
    return found


def test_tsne_of_a_large_split_decodes_no_more_images_than_it_shows(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "MOST_IMAGES", 5)
    result = loop.train(Recipe(**settings), tmp_path / "run")
    read, decode_image = [], decode.decode_image
    monkeypatch.setattr(decode, "decode_image", lambda item: read.append(item) or decode_image(item))
    found = embed_run(result.path, settings["data"], "val", device="cpu")
    assert len(found.points) == len(set(read)) == len(read) == 5


def test_tsne_leaves_out_and_names_images_that_cannot_be_decoded(settings, images, tmp_path) -> None:
    result = loop.train(Recipe(**{**settings, "data": str(images)}), tmp_path / "run")
    for image in (images / "val" / "red").iterdir():  # all of a class
        image.write_bytes(b"")
    console = Console(file=io.StringIO(), width=500)
    found = embed_run(result.path, images, "val", device="cpu", console=console)
    assert sorted(found.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert "3 images cannot be read and will be left out" in console.file.getvalue()


def test_tsne_of_a_large_split_is_of_some_images_by_seed(features, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "MOST_IMAGES", 5)
    found, again, other = (embed_run("run", "x", "val", seed=seed) for seed in (1, 1, 2))
    assert len({*found.labels.tolist()}) == 5 and np.array_equal(found.points, features[found.labels])
    assert np.array_equal(found.labels, again.labels) and not np.array_equal(found.labels, other.labels)


def test_tsne_of_all_images_of_a_small_split(features, monkeypatch) -> None:
    monkeypatch.setattr(tsne, "MOST_IMAGES", 9)
    assert np.array_equal(embed_run("run", "x", "val").labels, np.arange(9))


def test_tsne_reads_the_run_and_its_data_from_where_it_is_told(features, monkeypatch) -> None:
    asked, loaded, images = [], tsne.LoadedRun.load(), tsne.list_split()
    read = tsne.read_features
    for where, name, answer in (
        (tsne.LoadedRun, "load", lambda *_, **options: loaded),
        (tsne, "list_split", lambda *_, **options: images),
        (tsne, "read_features", read),
    ):
        monkeypatch.setattr(
            where, name, lambda *a, answer=answer, **k: asked.append((a, k)) or answer(*a, **k)
        )
    ours = {"backbone": "b", "checkpoint": Path("c")}
    where = {"data_root": "d", "console": Console(quiet=True)}
    embed_run("run", "x", "val", device="cpu", workers=2, **ours, **where)
    reading = (loaded, "preprocessing", images, "val", 2, where["console"])
    assert asked == [(("run", "cpu"), ours), ((loaded, "x", "val"), where), (reading, {})]


def test_tsne_of_two_images_is_refused(features, monkeypatch) -> None:
    two = tsne.list_split().select([0, 1])
    monkeypatch.setattr(tsne, "list_split", lambda *_, **options: two)
    with pytest.raises(ValueError, match="split val of x has 2 images; t-SNE needs at least 3"):
        embed_run("run", "x", "val")
