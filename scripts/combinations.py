"""Write docs/combinations.md: which methods and prompt settings work on which kinds of backbones.

    python scripts/combinations.py

Every combination is built, as in `vpt-fast train`, on a small backbone of the kind; if that raises, it is not
supported. `tests/scripts/test_combinations.py` trains a step of each supported one, and checks the error
message of each other one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from page_text import markdown_table

from vpt_fast.backbones.sharing import SharedBackbone, sharing_backbones
from vpt_fast.files import write
from vpt_fast.prompts import LOCATIONS
from vpt_fast.training.method_rules import METHODS
from vpt_fast.training.methods import build_model
from vpt_fast.training.recipe import Recipe
from vpt_fast.tuned_model import TunedModel

PAGE = Path("docs/combinations.md")
NUM_CLASSES = 3
NUM_PROMPTS = 8  # for "pad": the borders on both sides add up to a whole number of patches


@dataclass(frozen=True)
class BackboneKind:
    """A kind of backbone, and a small example of it.

    label: heading of its column. called: its name in error messages. prompts: settings that it needs for
    prompts.
    """

    label: str
    called: str
    name: str
    arguments: dict[str, Any]
    prompts: dict[str, Any] = field(default_factory=dict)


_VIT = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
_SWIN = dict(img_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
_RESNET = dict(img_size=64, stem_width=8, channels=[8, 8, 16, 16])
_CONVNEXT = dict(img_size=64, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16])
KINDS = (
    BackboneKind("ViT", "VisionTransformer", "vit_tiny_patch16_224", _VIT),
    BackboneKind("DINOv3, EVA", "Eva", "vit_small_patch16_dinov3", _VIT),
    BackboneKind("BEiT", "Beit", "beit_base_patch16_224", _VIT),
    BackboneKind("Swin", "SwinTransformer", "swin_tiny_patch4_window7_224", _SWIN),
    BackboneKind("ConvNeXt", "ConvNet", "convnext_atto", _CONVNEXT, dict(prompt_location="pad")),
    BackboneKind("ConvNet", "ConvNet", "resnet10t", _RESNET, dict(prompt_location="pad")),
)

METHOD_ROWS = tuple(method.replace("-K", "-1") for method in METHODS)
PROMPTED = ("vpt-deep", "vpt-shallow")
SETTING_ROWS: tuple[dict[str, Any], ...] = (
    *(dict(prompt_location=location) for location in LOCATIONS),
    *(dict(prompt_layers=layers) for layers in (1, -1, [0, 1])),
    dict(after_prompts="drop"),
    dict(prompt_shared=True),
    dict(prompt_project=4),
    dict(prompt_dropout=0.1, prompt_dropout_per="image"),
    dict(prompt_dropout=0.1, prompt_dropout_per="batch"),
    *(dict(pool=pool) for pool in ("cls", "image", "prompts", "image_and_prompts")),
    *(dict(dtype=dtype) for dtype in ("bfloat16", "float64")),
    dict(residual_dtype="bfloat16"),
    dict(backend="torch"),
    dict(attention="sdpa_cpu"),
    *(dict(memory=memory) for memory in ("auto", "exact", "compact", "recompute_mlp", "recompute")),
)


@dataclass(frozen=True)
class Combination:
    """A method with settings on a kind of backbone."""

    method: str
    kind: BackboneKind
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method} {self.kind.label} {setting_text(self.settings)}".strip()

    def build(self) -> TunedModel:
        """The model, with random weights.

        Raises:
            ValueError: the combination is not supported.
        """
        settings = dict(self.settings)
        if self.method in PROMPTED:
            added = settings.get("prompt_location") in ("add", "add-1")
            settings = {
                "num_prompts": None if added else NUM_PROMPTS,
                "prompt_dropout": 0.0,
                **self.kind.prompts,
            } | settings
        recipe = Recipe(
            data="",
            backbone=self.kind.name,
            method=self.method,
            pretrained=False,
            backbone_arg=self.kind.arguments,
            **settings,
        )
        return build_model(recipe.resolved(num_train_images=2, device_type="cpu"), NUM_CLASSES)


def combinations() -> Iterator[Combination]:
    """The combinations of all cells of the page, kind by kind."""
    for kind in KINDS:
        for method in METHOD_ROWS:
            yield Combination(method, kind)
        for settings in SETTING_ROWS:
            for method in PROMPTED:
                yield Combination(method, kind, settings)


def build_all() -> dict[str, tuple[Combination, TunedModel | ValueError]]:
    """Every combination by name, with its model or the error."""
    built: dict[str, tuple[Combination, TunedModel | ValueError]] = {}
    with sharing_backbones(SharedBackbone()):
        for combination in combinations():
            result: TunedModel | ValueError
            torch.manual_seed(0)  # so that all share one backbone, which is built once
            try:
                result = combination.build()
            except ValueError as error:
                result = error
            built[combination.name] = (combination, result)
    return built


def setting_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def page(built: dict[str, tuple[Combination, TunedModel | ValueError]]) -> str:
    """The text of docs/combinations.md."""

    def works(method: str, kind: BackboneKind, settings: dict[str, Any]) -> bool:
        return not isinstance(built[Combination(method, kind, settings).name][1], ValueError)

    header = tuple(kind.label for kind in KINDS)
    by_method = [
        (f"`{method}`", *("yes" if works(method, kind, {}) else "no" for kind in KINDS))
        for method in METHOD_ROWS
    ]
    by_setting = []
    for settings in SETTING_ROWS:
        cells = []
        for kind in KINDS:
            types = [m.removeprefix("vpt-") for m in PROMPTED if works(m, kind, settings)]
            cells.append(", ".join(types) or "no")
        by_setting.append((f"`{setting_text(settings)}`", *cells))
    return f"""# What works on which backbone

Which tuning methods, and which settings of prompts, work on which kind of backbone.

- ViT is timm's `VisionTransformer` ([prompts.md](prompts.md)).
- DINOv3 and EVA are timm's `Eva`, with rotary positions ([backbones.md](backbones.md)).
- BEiT is timm's `Beit`, with a relative position bias ([backbones.md](backbones.md)).
- Swin is `SwinTransformer` ([swin.md](swin.md)).
- ConvNeXt also stands for MetaNeXt (InceptionNeXt), and ConvNet for the other families
  ([convnets.md](convnets.md)); a ResNet is built for it. RepVGG and MobileOne, in which several convolutions
  read the image, do not support `concat-channel`.

`python scripts/combinations.py` writes this page by building every combination on a small backbone of each
kind. `tests/scripts/test_combinations.py` trains a step of each combination that works and checks that each
of the others raises an error that names both sides.

## Methods

`--method` with its own defaults ([methods.md](methods.md)). On a ConvNet, prompts have
`prompt_location=pad`.

{markdown_table([("method", *header), *by_method])}

## Settings of prompted models

Which of `vpt-deep` and `vpt-shallow` support each setting ([prompts.md](prompts.md)). All other settings are
the defaults, except `prompt_location=pad` on a ConvNet.

{markdown_table([("setting", *header), *by_setting])}
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help should not rewrite the page
    write(Path(__file__).parents[1] / PAGE, page(build_all()).encode())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
