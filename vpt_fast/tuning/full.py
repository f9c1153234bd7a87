"""FullTuning: all weights of a vision transformer."""

from __future__ import annotations

from typing import Any

from vpt_fast.backbones.timm_eva import TimmViT
from vpt_fast.tuning.timm_blocks import TimmClassifier


class FullTuning(TimmClassifier):
    """Fine-tuning of the whole vision transformer and the head.

    All weights are stored, so a saved model needs no published ones again.

    Args and errors are those of `TimmClassifier`.
    """

    stores_backbone = True
    trains_weights = True

    def __init__(self, backbone: str | TimmViT, num_classes: int, **settings: Any) -> None:
        super().__init__(backbone, num_classes, **settings)
        self.backbone.requires_grad_(True)
        self._freeze_what_is_not_read()
