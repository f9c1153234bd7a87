"""FullTuning trains all weights of a backbone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.tuning.timm_blocks import TimmClassifier


class FullTuning(TimmClassifier):
    """Fine-tunes a whole vision transformer, Swin or ConvNet, and the head.

    All weights are saved, so loading needs no published ones. In training BatchNorms normalise by the batch
    and update their statistics, which are saved too.

    Args and errors are those of `TimmClassifier`.
    """

    stores_backbone = True
    trains_weights = True
    kinds = (VIT, SWIN, CONVNET)

    def __init__(self, backbone: str | nn.Module, num_classes: int, **settings: Any) -> None:
        super().__init__(backbone, num_classes, **settings)
        self.backbone.requires_grad_(True)
        if isinstance(self.backbone, WholeBackbone):
            self.backbone.move_trained_norms()
        self._freeze_what_is_not_read()

    def _num_kept_beside(self) -> int:
        """The pixels, which are the patch embedding's input."""
        return self.backbone.in_chans * math.prod(self.backbone.image_size)

    def _stored(self) -> dict[str, torch.Tensor]:
        buffers = {name for name, _ in self.named_buffers()}
        kept = {name: t for name, t in self.state_dict(keep_vars=True).items() if name in buffers}
        return {**super()._stored(), **kept}
