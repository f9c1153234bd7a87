"""The training of the packaged backbone, on a few black pictures and for moments."""

from __future__ import annotations

import functools
import json

import pretrain_demo_backbone as script
import pytest
import typer
from photographs import archive_of
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

TINY = script.Architecture(embed_dim=32, depth=1, num_heads=2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Trains TINY on four of six pictures for these minutes; returns the log."""
    archive = archive_of(tmp_path / "a.tar.gz", *[(32, 32)] * 6)
    monkeypatch.setattr(script, "Architecture", lambda: TINY)
    monkeypatch.setattr(script, "Recipe", functools.partial(script.Recipe, held_out=2, batch_size=4))
    monkeypatch.setattr(script, "WEIGHTS", tmp_path / "weights.safetensors")
    monkeypatch.setattr(script, "LOG", tmp_path / "log.jsonl")

    def train(minutes: float) -> list[dict]:
        script.main(archive, minutes, tmp_path / "work", threads=1, bf16=False, seed=0)
        return [json.loads(line) for line in script.LOG.read_text().splitlines()]

    return train


def test_the_same_command_goes_on_after_the_last_epoch(small):
    first = small(minutes=0.001)
    both = small(minutes=0.002)
    assert both[: len(first)] == first and len(both) > len(first)
    assert [line["epoch"] for line in both] == list(range(1, len(both) + 1))


def test_weights_are_those_of_the_architecture_without_a_classifier(small):
    small(minutes=0.001)
    vit = VisionTransformer(**script.asdict(TINY), num_classes=0)
    vit.load_state_dict(load_file(script.WEIGHTS))


@pytest.mark.parametrize("name", ["a.tar.gz", "b.tar.gz"])
def test_images_of_another_archive_are_not_taken_from_the_cache(tmp_path, name):
    cache = tmp_path / "cache.safetensors"
    script.read_archive(archive_of(tmp_path / "a.tar.gz", (32, 32)), cache)
    images, _, _ = script.read_archive(archive_of(tmp_path / name, (32, 32), (32, 32)), cache)
    assert len(images) == 2


def test_images_are_read_from_the_archive_once(tmp_path, monkeypatch):
    archive, cache = archive_of(tmp_path / "a.tar.gz", (32, 32)), tmp_path / "cache.safetensors"
    script.read_archive(archive, cache)
    monkeypatch.setattr(script.tarfile, "open", None)
    assert len(script.read_archive(archive, cache)[0]) == 1


def test_an_archive_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    archive = archive_of(tmp_path / "a.tar.gz", (32, 32))
    with pytest.raises(typer.BadParameter, match="a.tar.gz with 1, want more than the 2000 that are held"):
        script.main(archive, 1.0, tmp_path / "work", threads=1, bf16=False, seed=0)
