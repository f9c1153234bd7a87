"""FoldedClassifier, the base class of the methods beside prompts whose frozen blocks run on the engine."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind, kind_among, resolve_backbone
from vpt_fast.classifier import FrozenClassifier, check_arguments


class FoldedClassifier(FrozenClassifier):
    """A model of a backbone's name or an instance, whose frozen blocks are folded and run on the engine.

    Args and errors are those of `LinearProbe`, with a backbone of one of the class's `kinds`.
    """

    kinds: tuple[Kind, ...] = (VIT, SWIN, CONVNET)  # supported backbones
    # How many of the last blocks are trained, and stay timm's own.
    num_tuned_blocks = 0

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        pool: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        check_arguments(num_classes, pool, dtype, backend, attention)
        kind = kind_among(backbone, self.kinds)
        model, origin = resolve_backbone(backbone, pretrained, timm_kwargs, checkpoint=checkpoint, kind=kind)
        self._check_model(model)
        super().__init__(
            model,
            origin,
            num_classes,
            pool=pool,
            dtype=dtype,
            backend=backend,
            attention=attention,
            timm_blocks=self.num_tuned_blocks,
        )
        self._reads = self.backbone.head_reads_of_image(pool)
        self._unfreeze(model)

    def _check_model(self, model: Any) -> None:
        """Raises ValueError for a timm model that the method cannot tune, before any block is folded."""

    def _unfreeze(self, model: Any) -> None:
        """Makes those tensors of `backbone` trainable that the method trains.

        model: the timm model that the backbone was made of, whose weights have not been rounded.
        """

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        self._check_images(images)
        return self._features(self.backbone.run_folded(images, self._reads))
