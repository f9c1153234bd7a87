"""What runs of one process share changes no result."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from runs import require_equal

from vpt_fast import PromptedViT
from vpt_fast.backbones import timm_vit
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.training import classification, features, loop, resume
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.run import RunFolder
from vpt_fast.training.world import World

# A backbone whose weights the seed draws.
RANDOM = dict(backbone="test_vit", backbone_arg={"img_size": 32}, pretrained=False)


@pytest.mark.parametrize("method", ["vpt-deep", "linear", "full"])
def test_run_with_a_filled_cache_equals_one_without(recipe, tmp_path, method):
    if method != "vpt-deep":
        recipe = dataclasses.replace(recipe, method=method, num_prompts=None, prompt_dropout=None)
    recipe = dataclasses.replace(recipe, **RANDOM, epochs=2, test=True, base_lr=0.1)
    cache = TrainingCache()
    loop.train(recipe, tmp_path / "before", cache=cache)
    cached = loop.train(recipe, tmp_path / "cached", cache=cache)
    plain = loop.train(recipe, tmp_path / "plain")
    require_equal(plain, cached)
    assert plain.results == cached.results
    assert RunFolder(plain.path).read().facts == RunFolder(cached.path).read().facts


def test_run_in_float32_is_the_same_after_one_whose_weights_were_rounded(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, **RANDOM, epochs=2, base_lr=0.1)
    cache = TrainingCache()
    loop.train(dataclasses.replace(recipe, precision="bf16"), tmp_path / "rounded", cache=cache)
    wide = dataclasses.replace(recipe, precision="fp32")
    require_equal(loop.train(wide, tmp_path / "plain"), loop.train(wide, tmp_path / "cached", cache=cache))


def test_backbone_and_images_are_loaded_and_blocks_folded_once(recipe, tmp_path, monkeypatch):
    built, folded, read = [], [], []
    create, check, fold = timm.create_model, classification.check_images, timm_vit.fold
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: built.append(1) or create(*a, **k))
    monkeypatch.setattr(timm_vit, "fold", lambda *a: folded.append(1) or fold(*a))
    monkeypatch.setattr(classification, "check_images", lambda *a, **k: read.append(1) or check(*a, **k))
    cache = TrainingCache()
    for i, base_lr in enumerate((0.1, 0.2)):
        changed = dataclasses.replace(recipe, base_lr=base_lr, epochs=1, warmup_epochs=0)
        loop.train(changed, tmp_path / str(i), cache=cache)
    depth = len(create(recipe.backbone).blocks)
    assert (len(built), len(folded), len(read)) == (1, depth, 2)  # images: train and val


def test_data_are_listed_once_for_all_parts_of_them(recipe, monkeypatch):
    listed, original = [], classification.open_splits
    monkeypatch.setattr(classification, "open_splits", lambda *a, **k: listed.append(1) or original(*a, **k))
    cache = TrainingCache()
    parts = ({}, {"shots": 2}, {"shots": 4}, {"train_fraction": 0.34})
    problem = classification.Classification()
    found = [problem.open(dataclasses.replace(recipe, **part), cache) for part in parts]
    assert [len(splits.train) for splits in found] == [27, 6, 12, 9] and listed == [1]


def test_part_of_the_images_is_drawn_once_for_all_runs_on_it(recipe, monkeypatch):
    drawn, original = [], classification.take_shots
    monkeypatch.setattr(classification, "take_shots", lambda *a: drawn.append(a[1:]) or original(*a))
    cache, problem = TrainingCache(), classification.Classification()
    parts = [dataclasses.replace(recipe, shots=shots, base_lr=lr) for shots in (2, 4) for lr in (0.1, 0.2)]
    found = [problem.open(part, cache).train for part in parts]
    assert drawn == [(2, recipe.seed), (4, recipe.seed)]
    assert [len(images) for images in found] == [6, 6, 12, 12]


def test_images_are_looked_up_for_their_digests_once(recipe, tmp_path, monkeypatch):
    looked_up, original = [], resume.list_digest
    monkeypatch.setattr(resume, "list_digest", lambda *a: looked_up.append(len(a[1])) or original(*a))
    cache = TrainingCache()
    for i, base_lr in enumerate((0.1, 0.2)):
        changed = dataclasses.replace(recipe, base_lr=base_lr, epochs=1, warmup_epochs=0)
        loop.train(changed, tmp_path / str(i), cache=cache)
    assert looked_up == [27, 9, 6]  # train, val and test


@pytest.mark.parametrize("method", ["vpt-deep", "linear"])
def test_images_in_host_memory_are_let_go_before_the_first_epoch(recipe, tmp_path, monkeypatch, method):
    """Where their pixels are on a GPU, or their features are kept, nothing else needs them."""
    if method == "linear":
        recipe = dataclasses.replace(recipe, method=method, num_prompts=None, prompt_dropout=None)
    read, alive, check = [], [], classification.check_images

    def check_images(*arguments, **options):
        checked = check(*arguments, **options)
        read.append(weakref.ref(checked))
        return checked

    monkeypatch.setattr(classification, "check_images", check_images)
    loop.train(
        recipe, tmp_path / "run", on_epoch=lambda row: alive.extend(images() is not None for images in read)
    )
    assert alive == [False] * 2 * recipe.epochs  # train and val


def test_features_in_the_cache_are_used_however_little_memory_is_free(recipe, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipe, method="linear", num_prompts=None, prompt_dropout=None)
    cache = TrainingCache()
    first = loop.train(recipe, tmp_path / "first", cache=cache)
    used, original = [], loop.feature_batches
    monkeypatch.setattr(loop, "feature_batches", lambda *a: used.append(1) or original(*a))
    monkeypatch.setattr(features, "device_budget", lambda device: 0)
    require_equal(first, loop.train(recipe, tmp_path / "second", cache=cache))
    assert used == [1]
    loop.train(dataclasses.replace(recipe, train_fraction=0.5), tmp_path / "other images", cache=cache)
    assert used == [1]


def test_bytes_of_frozen_features_are_those_of_float32():
    assert features.feature_bytes(SimpleNamespace(feature_shape=(5, 32)), 10) == 4 * 5 * 32 * 10


def test_another_seed_draws_other_random_weights(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, **RANDOM, epochs=1, warmup_epochs=0)
    cache = TrainingCache()
    one, other = (
        loop.train(dataclasses.replace(recipe, seed=seed), tmp_path / str(seed), cache=cache)
        for seed in (1, 2)
    )
    assert one.facts["backbone"]["fingerprint"] != other.facts["backbone"]["fingerprint"]


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"normalization": "none"}, {"pool": "image"}, {"backbone_arg": {"img_size": 32}}],
    ids=str,
)
def test_features_are_not_those_of_an_earlier_run_with_other_settings(recipe, tmp_path, changes):
    linear = dict(method="linear", num_prompts=None, prompt_dropout=None)
    recipe = dataclasses.replace(recipe, **linear, epochs=1, warmup_epochs=0, tensorboard=False)
    cache = TrainingCache()
    loop.train(recipe, tmp_path / "earlier", cache=cache)
    changed = dataclasses.replace(recipe, **changes)
    alone = loop.train(changed, tmp_path / "alone")
    require_equal(alone, loop.train(changed, tmp_path / "later", cache=cache))


LATER = dict(prompt_layers=[1], num_prompts=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_prompts": 5},
        {"prompt_dropout": 0.0},
        {"after_prompts": "drop"},
        {"prompt_project": 4},
        {"prompt_location": "key-value"},
        {"prompt_layers": -1},
    ],
    ids=str,
)
def test_tokens_before_the_first_prompts_are_shared_with_an_earlier_run_of_other_prompts(
    recipe, tmp_path, monkeypatch, changes
):
    recipe = dataclasses.replace(recipe, **LATER, epochs=1, warmup_epochs=0, tensorboard=False)
    cache, computed, original = TrainingCache(), [], features.compute_features
    loop.train(recipe, tmp_path / "earlier", cache=cache)
    changed = dataclasses.replace(recipe, **changes)
    alone = loop.train(changed, tmp_path / "alone")
    monkeypatch.setattr(features, "compute_features", lambda *a: computed.append(1) or original(*a))
    require_equal(alone, loop.train(changed, tmp_path / "later", cache=cache))
    assert not computed


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "test_vit2"},
        {"backbone_arg": {"img_size": 32}},
        {"seed": 1},  # the weights are random
        {"prompt_layers": (2, 3)},
        {"residual_dtype": torch.bfloat16},
        {"dtype": torch.bfloat16},
        {"backend": "torch"},
        {"precision": "bf16"},
        {"image_size": (16, 16)},
        {"mean": (0.0, 0.0, 0.0)},
        {"images": ("a.png",)},
        {"device": "meta"},
    ],
    ids=str,
)
def test_tokens_before_the_first_prompts_are_not_shared_if_anything_about_them_differs(changes):
    def key(
        *,
        backbone="test_vit",
        backbone_arg=None,
        seed=0,
        precision="fp32",
        image_size=(160, 160),
        mean=(0.5, 0.5, 0.5),
        images=("a.png", "b.png"),
        device="cpu",
        **settings,
    ):
        torch.manual_seed(seed)
        settings = {"num_prompts": 3, "prompt_layers": (1, 2, 3), **settings}
        model = PromptedViT(backbone, 3, **settings, **(backbone_arg or {}))
        return features.features_key(
            model,
            ImageList(tuple(map(Path, images)), (0,) * len(images), ("red", "green", "blue")),
            Preprocessing(image_size, mean=mean),
            SimpleNamespace(precision=precision),
            World(0, 1, torch.device(device)),
        )

    assert key() == key() != key(**changes)


@pytest.mark.parametrize("part", [{}, {"shots": 2}, {"train_fraction": 0.5}], ids=str)
def test_another_seed_draws_other_images(recipe, images, part):
    if not part:
        shutil.rmtree(images / "val")  # which is drawn then
    cache, problem = TrainingCache(), classification.Classification()
    one, other = (
        problem.open(dataclasses.replace(recipe, data=str(images), seed=seed, **part), cache)
        for seed in (1, 2)
    )
    assert one.train.items != other.train.items


def test_pixels_are_kept_by_each_run_s_own_setting(recipe):
    cache, problem, made = TrainingCache(), classification.Classification(), Preprocessing((16, 16))
    train, world = problem.open(recipe, cache).train, World(0, 1, torch.device("cpu"))
    kept = [
        problem.check(
            train, made, dataclasses.replace(recipe, resident=resident), world, cache, lambda count: None
        ).resident
        is not None
        for resident in ("off", "host")
    ]
    assert kept == [False, True]


def test_the_things_used_last_are_kept():
    cache, made = TrainingCache(kept=2), []
    for key in (1, 2, 1, 3, 1, 2):
        cache.get("numbers", key, lambda key=key: made.append(key))
    assert made == [1, 2, 3, 2]


def test_on_epoch_sees_each_saved_row_and_may_end_the_run(recipe, tmp_path):
    rows = []

    def on_epoch(row):
        rows.append(row)
        if len(rows) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.train(recipe, tmp_path / "run", on_epoch=on_epoch)
    assert RunFolder(tmp_path / "run").read().metrics == rows
