"""Training by every method, from the recipe to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal

import pytest
import torch
from rich.console import Console
from runs import interrupt_at_step, require_equal, trained

from vpt_fast import LinearProbe, load_pretrained
from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.data.resident import ResidentImages
from vpt_fast.training import features, loop, report
from vpt_fast.training.classification import Classification, CrossEntropy, class_weights
from vpt_fast.training.loop import train
from vpt_fast.training.method_rules import METHODS, parse_method
from vpt_fast.training.methods import build_model, model_settings
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.step import TrainStep

ALL = [name.replace("K", "2") for name in METHODS if name not in ("vpt-deep", "vpt-shallow")]
WITH_FROZEN_FEATURES = [
    pytest.param("linear", {}, id="linear"),
    pytest.param("mlp-2", {}, id="mlp-2"),
    pytest.param("partial-1", {}, id="partial-1"),
    pytest.param("vpt-deep", dict(num_prompts=2, prompt_layers=-1), id="prompts in the last block"),
]


@pytest.fixture
def small(color_images):
    """Recipes of two epochs of one step, by method."""

    def make(method: str, **settings) -> Recipe:
        size = {"img_size": 64, "patch_size": 16} if method == "sidetune" else {}
        settings = dict(epochs=2, warmup_epochs=0, batch_size=27, backbone_arg=size) | settings
        return Recipe(
            data=str(color_images),
            backbone="train_test_vit",
            method=method,
            pretrained=False,
            tensorboard=False,
            device="cpu",
            **settings,
        )

    return make


@pytest.mark.parametrize("method", [*ALL, "vpt-deep"])
def test_rule_of_a_method_and_its_class_agree_on_whether_the_backbone_is_stored(method):
    recipe = Recipe(data="", backbone="train_test_vit", method=method, pretrained=False)
    model, _ = model_settings(recipe.resolved(num_train_images=1, device_type="cpu"))
    assert model.stores_backbone == parse_method(method).rule.stores_backbone


@pytest.mark.parametrize(
    ("weights", "published"),
    [({"pretrained": True}, True), ({"checkpoint": "vit.npz"}, True), ({"pretrained": False}, False)],
    ids=str,
)
def test_side_network_starts_from_published_weights_beside_a_backbone_that_does(weights, published):
    recipe = Recipe(data="", backbone="train_test_vit", method="sidetune", **weights)
    _, settings = model_settings(recipe.resolved(num_train_images=1, device_type="cpu"))
    assert settings["side_pretrained"] is published


@pytest.mark.parametrize("method", ALL)
def test_going_on_equals_an_uninterrupted_run_that_is_saved_whole(small, tmp_path, monkeypatch, method):
    recipe = small(method)
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert len(train(recipe, tmp_path / "parts").metrics) == 1
    parts = train(recipe, tmp_path / "parts")
    require_equal(whole, parts)
    saved = load_pretrained(tmp_path / "parts" / "prompts").trainable_state_dict()
    assert saved.keys() == trained(parts).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained(parts).items())


@pytest.mark.parametrize("method", ALL)
def test_training_lowers_the_loss(small, tmp_path, method):
    recipe = small(method, epochs=6, batch_size=9)
    recipe = dataclasses.replace(recipe, optimizer="adamw", base_lr=0.1)
    metrics = train(recipe, tmp_path / "run").metrics
    assert metrics[-1]["train_loss"] < 0.9 * metrics[0]["train_loss"]


@pytest.mark.parametrize(("method", "settings"), WITH_FROZEN_FEATURES)
def test_features_computed_once_give_what_training_through_the_model_does(
    small, tmp_path, monkeypatch, method, settings
):
    once = train(small(method, **settings), tmp_path / "once")
    monkeypatch.setattr(loop, "caches_features", lambda *arguments: False)
    through = train(small(method, **settings), tmp_path / "through")
    for name, tensor in trained(through).items():
        torch.testing.assert_close(trained(once)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "settings"), WITH_FROZEN_FEATURES)
def test_frozen_part_runs_once_for_each_image_without_augmentation(
    small, tmp_path, monkeypatch, method, settings
):
    seen = []
    original = FrozenViT.embed

    def embed(self, images):
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(FrozenViT, "embed", embed)
    train(small(method, **settings), tmp_path / "run")
    assert sum(seen) == 27 + 9
    seen.clear()
    train(small(method, augment="flip", **settings), tmp_path / "augmented")
    assert sum(seen) == 2 * (27 + 9)


def test_cached_features_go_by_the_order_of_the_batches_that_they_replace(small, tmp_path, monkeypatch):
    made, original = [], Classification.batches

    def batches(*arguments, train):
        made.append(train)
        return original(*arguments, train=train)

    monkeypatch.setattr(Classification, "batches", batches)
    train(small("linear", test=True), tmp_path / "run")
    assert made == [True, False, False]  # train, val and test; others would hold the pixels again


def test_pixels_are_not_kept_on_the_device_for_frozen_features(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ResidentImages, "to", None)
    assert train(small("linear"), tmp_path / "run").is_finished


def test_pixels_that_are_kept_are_not_decoded_again_for_frozen_features(small, tmp_path, monkeypatch):
    monkeypatch.setattr("vpt_fast.data.batches.load_image", None)
    assert train(small("linear", workers=0), tmp_path / "run").is_finished


def test_frozen_features_of_images_that_are_not_to_be_kept_are_read_from_the_files(
    small, tmp_path, monkeypatch
):
    kept = train(small("linear"), tmp_path / "kept")
    monkeypatch.setattr("vpt_fast.data.batches.load_resident", None)
    require_equal(kept, train(small("linear", resident="off", workers=0), tmp_path / "off"))


def test_frozen_features_are_announced_with_their_cost_and_counted(small, tmp_path, monkeypatch):
    counted = []

    @contextlib.contextmanager
    def computing_features(*arguments):
        with report.computing_features(*arguments):
            yield counted.append

    monkeypatch.setattr(features, "computing_features", computing_features)
    console = Console(file=io.StringIO(), width=200)
    train(small("partial-1"), tmp_path / "run", console=console)
    # Of each image the class token's and 16 patches' 32 floats.
    said = "frozen features of 36 images once, 78.3 kB on cpu"
    assert "; read once\n" in console.file.getvalue()
    assert all(f"\nepoch {epoch}/2  lr " in console.file.getvalue() for epoch in (1, 2))
    assert said in console.file.getvalue() and 36 * 17 * 32 * 4 == 78_336
    assert sum(counted) == 36


@pytest.fixture
def ctrl_c_interrupts():
    """Ctrl-C is not ignored, as it is in tests that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_interrupts_the_computation_of_frozen_features(
    small, tmp_path, monkeypatch, ctrl_c_interrupts
):
    seen = []

    def frozen_features(self, images):
        seen.append(len(images))
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "frozen_features", frozen_features)
        with pytest.raises(KeyboardInterrupt):
            train(small("linear"), tmp_path / "run")
    assert len(seen) == 1 and not (tmp_path / "run").exists()
    assert train(small("linear"), tmp_path / "run").is_finished


def resolve(recipe: Recipe) -> Recipe:
    return recipe.resolved(num_train_images=27, device_type="cpu")


@pytest.mark.parametrize(
    "method, settings, named",
    [
        ("partial-99", {}, "method is 'partial-99': got 99, and the backbone has 2 blocks"),
        ("adapter", {"adapter_reduction": 999}, "adapter_reduction: got 999, want at most the backbone's"),
        (
            "vpt-shallow",
            {"prompt_location": "pad", "num_prompts": 3},
            "num_prompts is 3 with prompt_location 'pad': img_size: got 22x22 .with a border of 3",
        ),
        (
            "vpt-deep",
            {"prompt_location": "pad", "num_prompts": 2},
            "method is 'vpt-deep': got 'deep' with prompt_location='pad'",
        ),
    ],
)
def test_setting_that_no_model_can_have_is_named_as_the_recipe_names_it(small, method, settings, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        build_model(resolve(small(method, **settings)), 3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_class_weights_weigh_the_images_of_a_step(small, accumulate):
    recipe = small("linear", label_smoothing=0.1, accumulate=accumulate)
    torch.manual_seed(0)
    network, weights = torch.nn.Linear(4, 3), torch.tensor([0.5, 1.0, 3.0])
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    each = torch.nn.functional.cross_entropy(network(x), labels, reduction="none", label_smoothing=0.0)
    smooth = -(network(x).log_softmax(1) * weights).sum(1) / 3
    wanted = (0.9 * weights[labels] * each + 0.1 * smooth).sum()
    (wanted / 6).backward()
    gradient = network.weight.grad.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    objective = CrossEntropy(recipe.label_smoothing, weights)
    step = TrainStep(network, recipe, optimizer, scaler, objective, num_images=6, is_graphed=False)
    loss, _ = step(x, labels)
    torch.testing.assert_close((loss, network.weight.grad), (wanted.detach(), gradient))


def test_gradient_is_clipped_without_the_scale_of_the_loss(small):
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 3)
    start = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    step = TrainStep(
        network, small("linear", clip_grad_norm=1e-3), optimizer, scaler, CrossEntropy(0.0, None),
        num_images=6, is_graphed=False,
    )  # fmt: skip
    step(torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0]))
    moved = torch.cat([(p - q).flatten() for p, q in zip(network.parameters(), start, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_loss_of_16_bit_logits_is_computed_in_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 10).bfloat16(), torch.arange(64) % 10
    loss = CrossEntropy(0.0, None).loss_sum(logits, labels)
    assert loss == torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def test_balanced_class_weights_make_classes_weigh_the_same(small, monkeypatch):
    from vpt_fast.data.images import ImageList, Splits
    from vpt_fast.training.world import World

    labels = (0, 0, 0, 0, 1, 1, 2, 2)
    images = ImageList(tuple(map(str, range(8))), labels, ("a", "b", "c"))
    splits = Splits(images, images, None)
    world = World(0, 1, torch.device("cpu"))
    weights = class_weights(small("linear", class_weights="balanced"), splits, world)
    assert torch.equal(weights, torch.tensor([8 / (3 * 4), 8 / (3 * 2), 8 / (3 * 2)]))
    assert class_weights(small("linear"), splits, world) is None


def test_class_without_an_image_weighs_nothing_so_the_smoothed_loss_is_finite(small):
    from vpt_fast.data.images import ImageList, Splits
    from vpt_fast.training.world import World

    images = ImageList(("0", "1", "2"), (0, 0, 2), ("a", "b", "c", "d"))
    weights = class_weights(
        small("linear", class_weights="balanced"),
        Splits(images, images, None),
        World(0, 1, torch.device("cpu")),
    )
    assert weights.tolist() == [3 / 8, 0.0, 3 / 4, 0.0]  # of 2, no, 1 and no of 3 images
    loss = CrossEntropy(0.1, weights).loss_sum(torch.zeros(3, 4), torch.tensor([0, 0, 2]))
    assert loss.isfinite()
