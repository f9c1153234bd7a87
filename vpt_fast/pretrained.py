"""Loading whatever kind of model a folder holds."""

from __future__ import annotations

import os
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from vpt_fast.classifier import read_pretrained
from vpt_fast.model import LinearProbe, PromptedViT

MODELS: dict[str, type[PromptedViT] | type[LinearProbe]] = {
    model.__name__: model for model in (PromptedViT, LinearProbe)
}


def load_pretrained(
    path: str | os.PathLike[str], backbone: str | VisionTransformer | None = None, **overrides: Any
) -> PromptedViT | LinearProbe:
    """Build the saved model in a folder or hub repository again, of whichever class it is.

    Args and errors are those of `PromptedViT.from_pretrained`.
    """
    settings, _ = read_pretrained(path)
    kind = settings["model"]
    if kind not in MODELS:
        raise ValueError(f"{path}: holds a {kind!r}, want one of {', '.join(MODELS)}")
    return MODELS[kind].from_pretrained(path, backbone, **overrides)
