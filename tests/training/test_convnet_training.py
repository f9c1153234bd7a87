"""Training with a ConvNet: which methods it has, and that each is trained and stored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vpt_fast import load_pretrained
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.training import loop
from vpt_fast.training.loop import train
from vpt_fast.training.methods import build_model
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder
from vpt_fast.training.step import moving_norms, require_batches
from vpt_fast.training.world import World


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vpt-shallow", {"num_prompts": 2, "prompt_location": "pad"}),
        ("linear", {}),
        ("full", {}),
        ("bias", {}),
        ("vpt+bias", {"num_prompts": 2}),
        ("lora", {"lora_rank": 2}),
    ],
)
def test_training_leaves_a_model(method, settings, color_images, tmp_path):
    recipe = Recipe(
        data=str(color_images), backbone="resnet10t", method=method, pretrained=False, epochs=1,
        backbone_arg={"img_size": 32}, warmup_epochs=0, batch_size=8, device="cpu", workers=0,
        tensorboard=False, **settings,
    )  # fmt: skip
    result = train(recipe, tmp_path / "run")
    assert len(result.metrics) == 1
    torch.manual_seed(recipe.seed)  # the backbone's weights are random, drawn first
    loaded = load_pretrained(RunFolder(tmp_path / "run").prompts)
    assert loaded.image_size == (32, 32)
    stored = RunFolder(tmp_path / "run").read().checkpoint.trainable
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.trainable_state_dict().items())


def convnet_recipe(color_images, **settings) -> Recipe:
    return Recipe(
        data=str(color_images), backbone="resnet10t", method="full", pretrained=False, epochs=1,
        backbone_arg={"img_size": 32, "stem_width": 8, "channels": [8, 8, 8, 8]}, warmup_epochs=0,
        device="cpu", workers=0, tensorboard=False, **settings,
    )  # fmt: skip


def test_statistics_of_trained_batch_norms_are_averaged_over_processes_and_stored(
    color_images, tmp_path, monkeypatch
):
    averages = []

    def average(world, tensors):
        for tensor in tensors:
            averages.append(tensor.fill_(len(averages) + 1).clone())

    monkeypatch.setattr(World, "average", average)
    train(convnet_recipe(color_images, batch_size=27), tmp_path / "run")
    stored = RunFolder(tmp_path / "run").read().checkpoint.trainable
    found = [t for name, t in stored.items() if name.endswith(("running_mean", "running_var"))]
    assert averages and all(any(torch.equal(t, mean) for mean in averages) for t in found)


@pytest.mark.parametrize(("method", "moving"), [("full", 15), ("partial-1", 3), ("bias", 0)])
def test_statistics_of_frozen_batch_norms_are_not_averaged(color_images, method, moving):
    recipe = dataclasses.replace(convnet_recipe(color_images), method=method)
    model = build_model(recipe.resolved(num_train_images=27, device_type="cpu"), 3)
    assert len(moving_norms(model.train())) == moving


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_frozen_layers_run_once_for_each_image_without_augmentation(augment, color_images, tmp_path):
    recipe = convnet_recipe(color_images, batch_size=9, augment=augment)
    seen = []
    original = WholeBackbone.cast

    def cast(self, images):
        if images.device.type != "meta":
            seen.append(len(images))
        return original(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeBackbone, "cast", cast)
        train(dataclasses.replace(recipe, method="partial-1", epochs=2), tmp_path / "run")
    assert sum(seen) == (27 + 9) * (1 if augment == "none" else 2)


def test_features_of_frozen_layers_computed_once_give_what_training_through_the_network_does(
    color_images, tmp_path, monkeypatch
):
    recipe = dataclasses.replace(convnet_recipe(color_images, batch_size=9), method="partial-2", epochs=2)
    train(recipe, tmp_path / "once")
    monkeypatch.setattr(loop, "caches_features", lambda *arguments: False)
    train(recipe, tmp_path / "through")
    stored = [RunFolder(tmp_path / name).read().checkpoint.trainable for name in ("once", "through")]
    torch.testing.assert_close(*stored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"batch_size": 13}, {"batch_size": 10, "accumulate": 4}])
def test_image_alone_that_batch_norm_cannot_normalise_is_refused(settings, color_images, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 1.*one of 27 training images is alone"):
        train(convnet_recipe(color_images, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_image_that_is_alone_in_a_process_s_share_of_the_last_batch_is_refused(color_images):
    recipe = convnet_recipe(color_images, batch_size=26).resolved(num_train_images=28, device_type="cpu")
    world = World(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="one of 28 training images over 2 processes is alone"):
        require_batches(recipe, build_model(recipe, 3), 28, world)  # in batches of 13 and 1 in each process
    require_batches(recipe, build_model(recipe, 3), 30, world)


def test_image_alone_is_accepted_where_feature_maps_have_more_pixels(color_images):
    recipe = convnet_recipe(color_images, batch_size=13).resolved(num_train_images=27, device_type="cpu")
    model = build_model(dataclasses.replace(recipe, backbone_arg=recipe.backbone_arg | {"img_size": 64}), 3)
    require_batches(recipe, model, 27, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("method", ["vpt-deep", "cls-token"])
def test_method_that_there_is_not_for_a_convnet_is_named(method):
    recipe = Recipe(data="", backbone="resnet10t", method=method, pretrained=False)
    with pytest.raises(ValueError, match=f"method is '{method}'.*a ConvNet"):
        build_model(recipe, 3)
