"""The FrozenViT of any of timm's plain vision transformers."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from vpt_fast.backbones.timm_beit import FrozenBeit
from vpt_fast.backbones.timm_eva import FrozenEva
from vpt_fast.backbones.timm_vit import FrozenViT

TimmViT = VisionTransformer | Eva | Beit
"""The timm models that `frozen_vit` reads."""


def frozen_vit(vit: TimmViT, *args: Any, **settings: Any) -> FrozenViT:
    """The FrozenViT of this model. args, settings: see `FrozenViT`."""
    if isinstance(vit, Eva):
        return FrozenEva(vit, *args, **settings)
    if isinstance(vit, Beit):
        return FrozenBeit(vit, *args, **settings)
    return FrozenViT(vit, *args, **settings)
