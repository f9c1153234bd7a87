"""What a sweep searches: the paper's grids, settings to search as text, and sweeps that cannot be."""

from __future__ import annotations

import pytest

from vpt_fast.commands import sweeps as commands
from vpt_fast.sweeps.settings import SEEDS, Sweep, default_axes, parse_axes, parse_axis
from vpt_fast.training.recipe import Recipe


def test_commands_have_the_paper_s_seeds():
    assert commands.parse_seeds(commands.SEEDS) == SEEDS == (42, 44, 82, 100, 800)


def test_a_seed_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"seeds is \[1, 2, 1\]; .* no two the same"):
        Sweep({"data": "x", "backbone": "y"}, {}, commands.parse_seeds("1,2,1"))


RATES = (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
DECAYS = (0.01, 0.001, 0.0001, 0)


@pytest.mark.parametrize(
    ("settings", "axes"),
    [
        ({}, {"base_lr": RATES, "weight_decay": DECAYS}),
        ({"method": "linear", "task": "fgvc/cub"}, {"base_lr": RATES[:-1], "weight_decay": DECAYS}),
        ({"method": "full", "task": "vtab/cifar"}, {"base_lr": (0.005, 0.001, 0.0005, 0.0001)}),
        ({"optimizer": "adamw"}, {"base_lr": (0.005, 0.001, 0.0005, 0.0001)}),
    ],
)
def test_default_grid_is_the_papers(settings, axes):
    assert default_axes(Recipe(data="x", backbone="y", **settings)) == axes


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("base-lr=5e-4,1", ("base_lr", (5e-4, 1.0))),
        ("num_prompts=1,10,10", ("num_prompts", (1, 10))),
        ("prompt_layers=0,1;-1", ("prompt_layers", ("0,1", -1))),
        ("optimizer=sgd,adamw", ("optimizer", ("sgd", "adamw"))),
    ],
)
def test_axes_are_parsed_as_the_recipe_parses(text, axis):
    assert parse_axis(text, {"data": "x", "backbone": "y"}) == axis


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bace_lr=1", "close names: base_lr"),
        ("base_lr=fast", "base_lr is 'fast'"),
        ("base_lr", "must be KEY=A,B,C"),
        ("base_lr=1,,2", "must be KEY=A,B,C"),
        ("num_prompts=5,null", "whose value 'null' is none that can be searched"),
        ("prompt_layers=[0];[1]", r"whose value '\[0\]' is none that can be searched"),
        ("seed=1,2", "seed cannot be searched"),
        ("workers=1,2", "workers cannot be searched"),
        ("base_lr={1", "over is 'base_lr={1', whose value '{1' is not YAML"),
    ],
)
def test_axes_that_cannot_be_searched_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_axis(text, {"data": "x", "backbone": "y"})


def test_setting_searched_twice_is_refused():
    with pytest.raises(ValueError, match="'base-lr=2', and base_lr is searched already"):
        parse_axes(["base_lr=1", "base-lr=2"], {"data": "x", "backbone": "y"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(sampler="annealing"), "sampler is 'annealing'"),
        (dict(sampler="tpe", trials=0), "trials is 0 with sampler tpe"),
        (dict(seeds=(1, 2**64)), "seed is 18446744073709551616"),
        (dict(pruner="axe"), "pruner is 'axe'"),
        (dict(sampler="tpe"), "trials is None with sampler tpe"),
        (dict(trials=3), "trials is 3 with sampler grid"),
        (dict(seeds=()), "seeds is"),
        (dict(seeds=(1, 1)), r"seeds is \[1, 1\]; it must be .* no two the same"),
        (dict(axes={"base_lr": ()}), r"axes: got \[\] for base_lr, want one or more values"),
        (dict(axes={"base_lr": (0.5, 0.5)}), r"axes: got \[0.5, 0.5\] for base_lr, want .* no two the same"),
        (dict(axes={"epochs": (1, 2)}), "epochs is given as 2 and searched over too"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(settings, changes, reason):
    with pytest.raises(ValueError, match=reason):
        Sweep(**{"settings": settings, "axes": {}, **changes})


def test_seed_of_a_sweep_that_searches_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="seed is given as 3 with nothing to search; seeds name it"):
        Sweep({**settings, "seed": 3}, {})
    assert Sweep({**settings, "seed": 3}, {"base_lr": (0.5, 1.0)}).first_recipe.seed == 3


def test_sweep_is_the_same_whatever_the_order_of_its_axes(settings):
    axes = [("base_lr", (0.5, 1.0)), ("weight_decay", (0.0, 0.1))]
    names = {Sweep(settings, dict(order)).study_name({}) for order in (axes, axes[::-1])}
    assert len(names) == 1


def test_missing_optuna_is_named(settings, monkeypatch):
    monkeypatch.setattr("vpt_fast.sweeps.settings.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optuna, which is not installed; pip install optuna"):
        Sweep(settings, {})
