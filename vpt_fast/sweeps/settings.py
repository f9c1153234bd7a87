"""What a sweep searches and how: `Sweep`, the paper's grids, and the settings to search as text."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpt_fast.data.tasks import find_task
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.training.setting_values import yaml_value

# The grids of the paper's appendix and of KMnP/vpt, for SGD and for AdamW.
SGD_RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
FGVC_RATES = SGD_RATES[:-1]
WEIGHT_DECAYS = (0.01, 0.001, 0.0001, 0.0)
ADAMW_RATES = (5e-3, 1e-3, 5e-4, 1e-4)
SEEDS = (42, 44, 82, 100, 800)  # of the final runs

SAMPLERS = ("grid", "tpe", "random")
PRUNERS = ("none", "median", "hyperband")
SET_BY_SWEEP = ("train_on", "test")
NOT_SEARCHED = ("task", "train_on", "val_fraction", "backbone_arg", "seed")

Params = dict[str, Any]  # settings that are searched: name to value


def default_axes(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """The paper's grid for a recipe's optimizer: setting -> values."""
    if recipe.chosen_optimizer == "adamw":
        return {"base_lr": ADAMW_RATES}
    is_fgvc = False
    if recipe.task not in (None, SEGMENTATION):
        is_fgvc = find_task(recipe.task).suite == "fgvc"
    return {"base_lr": FGVC_RATES if is_fgvc else SGD_RATES, "weight_decay": WEIGHT_DECAYS}


def parse_axis(text: str, settings: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """Parses `KEY=A,B,C` to a setting of the recipe and its values; `;` separates values that contain commas.

    Raises:
        ValueError: an unknown setting, one that cannot be searched, or a value that the recipe refuses.
    """
    name, equals, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    parts = [part.strip() for part in listed.split(";" if ";" in listed else ",")]
    if not equals or not all(parts):
        raise ValueError(f"over is {text!r}; it must be KEY=A,B,C")
    field = next((f for f in dataclasses.fields(Recipe) if f.name == name), None)
    if field and (name in NOT_SEARCHED or not field.metadata["result"]):
        raise ValueError(f"over is {text!r}; {name} cannot be searched")
    values: list[Any] = []
    for part in parts:
        value: Any = yaml_value("over", text, part)
        if isinstance(value, list) or value is None:
            raise ValueError(f"over is {text!r}, whose value {part!r} is none that can be searched")
        recipe = Recipe.from_dict({**settings, name: value})  # its error names what is wrong
        value = getattr(recipe, name)
        values.append(part if isinstance(value, list) else value)
    return name, tuple(dict.fromkeys(values))


@dataclass(frozen=True)
class Sweep:
    """What to search and how, and the seeds of the final runs.

    Attributes:
        settings: of the recipe, shared by all runs, as `Recipe.from_dict` takes them.
        axes: setting -> values to search; {} searches nothing: `settings` are final.
        seeds: of the final runs.
        sampler: "grid" tries every combination; "tpe" or "random" (Optuna's) choose `trials` of them.
        trials: number of trials, for "tpe" and "random". Settings that the sampler chooses again count as a
            trial, as in Optuna, and are not trained again.
        pruner: "none", or Optuna's "median" or "hyperband", which end trials with a low val accuracy early.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """

    settings: dict[str, Any]
    axes: dict[str, tuple[Any, ...]]
    seeds: tuple[int, ...] = SEEDS
    sampler: str = "grid"
    trials: int | None = None
    pruner: str = "none"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("a sweep needs optuna, which is not installed; pip install optuna")
        for name, value, known in (("sampler", self.sampler, SAMPLERS), ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if (self.trials is None) != (self.sampler == "grid") or (self.trials is not None and self.trials < 1):
            wanted = "left out with sampler grid, and at least 1 with the others"
            raise ValueError(f"trials is {self.trials} with sampler {self.sampler}; it must be {wanted}")
        if not self.seeds or min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds):
            raise ValueError(
                f"seeds is {list(self.seeds)}; it must be one or more, each at least 0, and no two the same"
            )
        if self.settings.get("task") == SEGMENTATION:
            raise ValueError("task is segmentation, which no sweep searches; train it setting by setting")
        for name in SET_BY_SWEEP:
            if name in self.settings:
                raise ValueError(f"{name} is given; a sweep sets it itself: val for the search, then test")
        if not self.axes and "seed" in self.settings:
            raise ValueError(
                f"seed is given as {self.settings['seed']} with nothing to search; seeds name it"
            )
        for name, values in self.axes.items():
            if not values or len({*values}) < len(values):
                raise ValueError(
                    f"axes: got {list(values)} for {name}, want one or more values, and no two the same"
                )
            if name in self.settings:
                raise ValueError(
                    f"{name} is given as {self.settings[name]} and searched over too; leave out one of them "
                    "(--over names what to search instead)"
                )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "a sweep does not run under torchrun; start the same command several times instead"
            )
        for point in self.points():
            self.recipe(**point)
        for seed in self.seeds:
            self.recipe(**{**self.points()[0], "seed": seed})

    def points(self) -> list[Params]:
        """Every combination, in the axes' order."""
        return [
            dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())
        ]

    @property
    def first_recipe(self) -> Recipe:
        """The recipe of the first combination, for what all of them share."""
        return self.recipe(**self.points()[0])

    def recipe(self, **changes: Any) -> Recipe:
        defaults: dict[str, Any] = {"tensorboard": False}
        if self.pruner == "none":
            defaults["eval_every"] = 0  # before the last epoch only a pruner reads a trial's val accuracy
        return Recipe.from_dict({**defaults, **self.settings, **changes})

    @property
    def num_trials(self) -> int:
        if not self.axes:
            return 0
        return len(self.points()) if self.trials is None else self.trials

    def to_dict(self) -> dict[str, Any]:
        """What sweep.yaml holds."""
        values = dataclasses.asdict(self)
        return {
            **values,
            "axes": {name: list(axis) for name, axis in self.axes.items()},
            "seeds": list(self.seeds),
        }

    def identity(self) -> dict[str, Any]:
        """All that the results depend on."""
        recipe = self.first_recipe.to_dict()
        fields = dataclasses.fields(Recipe)
        kept = {f.name: recipe[f.name] for f in fields if f.metadata["result"] and f.name not in self.axes}
        return {**self.to_dict(), "settings": kept}

    def study_name(self, inputs: Mapping[str, str | None]) -> str:
        """The same for the same sweep with the same `digest_inputs`, wherever the files are."""
        text = json.dumps([self.identity(), inputs], sort_keys=True)
        return f"vpt-fast-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def parse_axes(texts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Parses each text with `parse_axis`; also raises ValueError for a duplicate setting.

    A searched backbone comes first: no setting's values can be checked without a backbone.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for text in sorted(texts, key=lambda text: text.partition("=")[0].strip() != "backbone"):
        name, values = parse_axis(text, {**first_backbone(axes), **settings})
        if name in axes:
            raise ValueError(
                f"over is {text!r}, and {name} is searched already; name all values in one --over"
            )
        axes[name] = values
    return axes


def first_backbone(axes: Mapping[str, Sequence[Any]]) -> Params:
    """A setting that a recipe cannot be without, if it is searched: its first value."""
    return {"backbone": axes["backbone"][0]} if "backbone" in axes else {}
