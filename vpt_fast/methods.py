"""The ways to tune: method name to model."""

from __future__ import annotations

from typing import Any

import torch

from vpt_fast.model import LinearProbe, PromptedViT
from vpt_fast.recipe import PROMPT_KNOBS, Recipe

Model = PromptedViT | LinearProbe


def build_model(recipe: Recipe, num_classes: int) -> Model:
    """The model that a resolved recipe trains; what is random in it comes from torch's default generator.

    Raises ValueError when there is no such model, its weights cannot be had, or it does not take the recipe's
    backbone_arg.
    """
    try:
        return _build(recipe, num_classes)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:  # timm's and the hub's ways to say no
        arguments = "".join(f", {name}={value}" for name, value in recipe.backbone_arg.items())
        called = f"{recipe.backbone} (pretrained={recipe.pretrained}{arguments})"
        raise ValueError(f"backbone is {called}, which cannot be built: {error}") from error


def _build(recipe: Recipe, num_classes: int) -> Model:
    names = ("pool", "backend", "attention", "pretrained")
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in names}
    settings["dtype"] = getattr(torch, recipe.dtype) if recipe.dtype else None
    settings |= recipe.backbone_arg
    if recipe.method == "linear":
        return LinearProbe(recipe.backbone, num_classes, **settings)
    settings |= {name: getattr(recipe, name) for name in ("memory", *PROMPT_KNOBS)}
    return PromptedViT(
        recipe.backbone, num_classes, prompt_type=recipe.method.removeprefix("vpt-"), **settings
    )
