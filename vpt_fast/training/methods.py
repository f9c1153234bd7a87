"""Tuning methods: from a method's name to its model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vpt_fast.backbones.creation import require_published, without_values
from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, kind_of
from vpt_fast.backbones.sources import finding_sources_once
from vpt_fast.failures import is_out_of_memory
from vpt_fast.pretrained import MODELS
from vpt_fast.segmenter import ENCODERS
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.method_rules import ENGINE_KNOBS, parse_method
from vpt_fast.training.precision import autocast
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.tuned_model import TunedModel

# Method -> its class by name in pretrained.MODELS.
_CLASSES = {
    "vpt-deep": "PromptedViT",
    "vpt-shallow": "PromptedViT",
    "vpt+bias": "PromptAndBiasTuning",
    "cls-token": "ClsTokenTuning",
    "linear": "LinearProbe",
    "mlp-K": "MLPProbe",
    "partial-K": "PartialTuning",
    "sidetune": "SideTuning",
    "bias": "BiasTuning",
    "adapter": "AdapterTuning",
    "lora": "LoRATuning",
    "full": "FullTuning",
}

# Classes for backbones other than VisionTransformers, by kind, with the kind's name for messages.
_ANY = {
    **{name: _CLASSES[name] for name in ("linear", "mlp-K", "sidetune", "bias", "lora", "full")},
    "partial-K": "PartialNetworkTuning",
    "adapter": "AdapterTuning",
}
_OTHER_CLASSES = {
    SWIN: (
        "SwinTransformer",
        {
            "vpt-deep": "PromptedSwin",
            "vpt-shallow": "PromptedSwin",
            "vpt+bias": "PromptAndBiasSwinTuning",
            **_ANY,
        },
    ),
    CONVNET: (
        "ConvNet",
        {"vpt-shallow": "PromptedConvNet", "vpt+bias": "PromptAndBiasConvNetTuning", **_ANY},
    ),
}

# Method -> the constructor's keyword for the K in its name.
_COUNTS = {"mlp-K": "num_layers", "partial-K": "num_tuned_blocks"}

# Recipe setting -> keyword of the constructors, where the names differ.
_KEYWORDS = {"adapter_reduction": "reduction", "lora_rank": "rank"}


@finding_sources_once()
def build_model(recipe: Recipe, num_classes: int) -> TunedModel:
    """The model that a resolved recipe trains; random initialisation uses torch's default generator.

    Raises ValueError if there is no such model, its weights are not available, or it does not accept the
    recipe's backbone_arg.
    """
    try:
        constructor, settings = model_settings(recipe)
        with naming_the_backbone(recipe):
            return constructor(
                recipe.backbone,
                num_classes,
                pretrained=recipe.pretrained,
                checkpoint=recipe.checkpoint,
                **settings,
                **recipe.backbone_arg,
            )
    except ValueError as error:
        if (text := _in_settings(str(error), recipe)) == str(error):
            raise
        raise ValueError(text) from error


def build_seeded(recipe: Recipe, num_classes: int, cache: TrainingCache) -> TunedModel:
    """As `build_model`, before training: all random initialisation, also the backbone's, uses the recipe's
    seed. What `loop.train` does to its frozen blocks depends on the recipe's precision and device alone."""
    torch.manual_seed(recipe.seed)
    with cache.sharing_backbones((recipe.precision, recipe.device)):
        return build_model(recipe, num_classes)


def require_operations(recipe: Recipe, model: TunedModel, device: torch.device) -> None:
    """Raises ValueError if kernels cannot be launched on the device, or if attention that was chosen by name
    does not support it or the precision."""
    try:
        with autocast(recipe.precision, device):
            model.require_operations(device)
    except ValueError as error:
        raise ValueError(f"{error} (precision {recipe.precision} on {device})") from None


def _in_settings(text: str, recipe: Recipe) -> str:
    """Rewords a constructor's error about one of its keywords to name the recipe's setting behind it."""
    keyword, _, rest = text.partition(": ")
    if keyword in ("prompt_type", _COUNTS.get(parse_method(recipe.method).name)):
        return f"method is {recipe.method!r}: {rest}"
    if keyword == "img_size" and recipe.prompt_location == "pad":
        return f"num_prompts is {recipe.num_prompts} with prompt_location 'pad': {text}"
    for setting, called in _KEYWORDS.items():
        if keyword == called:
            return f"{setting}: {rest}"
    return text


@contextlib.contextmanager
def naming_the_backbone(recipe: Recipe) -> Iterator[None]:
    """Turns the various errors of timm and the hub into a ValueError that names the recipe's backbone; too
    little memory stays what it is."""
    try:
        yield
    except (TypeError, AssertionError, RuntimeError, OSError, ArithmeticError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        arguments = "".join(f", {name}={value}" for name, value in recipe.backbone_arg.items())
        called = f"{recipe.backbone} (pretrained={recipe.pretrained}{arguments})"
        raise ValueError(f"backbone is {called}, which cannot be built: {error}") from error


@finding_sources_once()
def build_model_without_values(recipe: Recipe, num_classes: int) -> TunedModel | None:
    """As `build_model`, on the meta device and without reading weights: a fast check whether there is such a
    model. None for a backbone that cannot be built without values.

    Raises ValueError if there is no such model, or if published weights are wanted and there are none.
    """
    try:
        with without_values():
            model = build_model(replace(recipe, pretrained=False, checkpoint=None), num_classes)
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        model = None  # the error is PyTorch's: a constructor needed actual values
    if recipe.pretrained:  # last, as building has seen to it that there is such a name
        require_published(recipe.backbone, recipe.backbone_arg)
    return model


def model_settings(recipe: Recipe) -> tuple[Callable[..., TunedModel], dict[str, Any]]:
    """The class that a resolved recipe trains, and its keyword arguments except those for timm.

    Raises ValueError for a method that does not exist for the recipe's backbone or task.
    """
    method = parse_method(recipe.method)
    class_name = _CLASSES[method.name]
    kind = kind_of(recipe.backbone)
    if recipe.task == SEGMENTATION:
        if kind is not VIT or method.name not in ENCODERS:
            raise ValueError(
                f"method is {recipe.method!r} with backbone {recipe.backbone!r}, which there is not for task "
                f"segmentation; it must be one of {', '.join(ENCODERS)}, with a VisionTransformer"
            )
        class_name = "PromptedSegmenter"
    elif kind in _OTHER_CLASSES:
        called, classes = _OTHER_CLASSES[kind]
        if method.name not in classes:
            raise ValueError(
                f"method is {recipe.method!r}, which there is not for backbone {recipe.backbone!r}, a "
                f"{called}; it must be one of {', '.join(classes)}"
            )
        class_name = classes[method.name]
    settings: dict[str, Any] = {"pool": recipe.pool}
    if recipe.task == SEGMENTATION:
        settings = {"method": method.name, "head_channels": recipe.head_channels}
    for name in method.rule.knobs:
        settings[_KEYWORDS.get(name, name)] = getattr(recipe, name)
    # No setting of a model, which has seen no images yet.
    if settings.pop("prompt_init", "uniform") == "tokens" and kind is CONVNET:
        raise ValueError(
            f"prompt_init is 'tokens' with backbone {recipe.backbone!r}, a {called}, whose prompts are no "
            "tokens; leave it out"
        )
    for name in ("dtype", "residual_dtype"):
        if settings.get(name):
            settings[name] = getattr(torch, settings[name])
    missing = ["residual_dtype"] if kind in _OTHER_CLASSES else []
    if class_name == "PartialNetworkTuning":
        missing += ENGINE_KNOBS  # it runs timm's own network
    for name in missing:
        if settings.pop(name, None) not in (None, "auto"):
            raise ValueError(
                f"{name} is {getattr(recipe, name)!r}, which there is not for method {recipe.method!r} with "
                f"backbone {recipe.backbone!r}, a {called}; leave it out"
            )
    if method.count is not None:
        settings[_COUNTS[method.name]] = method.count
    if class_name in ("PromptedViT", "PromptedSwin", "PromptedConvNet"):
        settings["prompt_type"] = method.name.removeprefix("vpt-")
    if method.name == "sidetune":
        settings["side_pretrained"] = recipe.pretrained or recipe.checkpoint is not None
    return MODELS[class_name], settings
