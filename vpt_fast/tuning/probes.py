"""LinearProbe and MLPProbe: a classifier on the features of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.layers import dtype_of
from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.engine import cost
from vpt_fast.engine.plan import Read
from vpt_fast.tuned_model import check_count
from vpt_fast.tuning.folded import FoldedClassifier


class LinearProbe(FoldedClassifier):
    """A linear head on the features of a frozen vision transformer, Swin or ConvNet.

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm VisionTransformer, Eva, Beit,
            SwinTransformer or ConvNet of a family in `resolve.CONVNET`, whose weights are used as they are
            and which is not changed.
        num_classes: outputs of the head.
        pool: None for the backbone's own pooling; ``"cls"`` (vision transformers) or ``"image"`` (these and
            Swins).
        dtype: of the frozen weights; None for the backbone's own.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"triton_fused_mlp"``, see `kernels.get_backend`;
            for a ConvNet ``"auto"`` or ``"torch"``.
        attention: ``"auto"`` or a FlashAttention implementation by name, see `kernels.get_backend`; for a
            Swin or ConvNet ``"auto"``.
        pretrained: load the published weights (only with a name).
        checkpoint: load the weights from this file instead (only with a name), see docs/backbones.md.
        timm_kwargs: passed to timm.create_model (only with a name).

    Raises:
        ValueError: an argument out of range, or a part of the backbone that is not supported.
    """

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the pooled features (B, `num_features`)."""
        return super().image_features(images)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, `num_features`) to logits (B, num_classes)."""
        return self.head(features)

    def patch_tokens(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        if not isinstance(self.backbone, FrozenViT):
            return super().patch_tokens(images, blocks)
        self._check_blocks(blocks)
        self._check_images(images)
        outputs = self.backbone.folded_outputs(images, blocks, Read.PATCHES)
        return [*(self._patches(x, x.shape[1]) for x in outputs[:-1]), outputs[-1]]

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.frozen_features(images)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """In the model's own dtype."""
        kept = batch_size * self._num_kept() * self._feature_dtype.itemsize
        return cost.TrainingBytes(
            weights=self._weight_bytes(), kept=kept, workspace=self.backbone.folded_workspace(batch_size)
        )

    def _num_kept(self) -> int:
        """Values kept for backward per image."""
        return self.num_features


class MLPProbe(LinearProbe):
    """A multi-layer perceptron on the features of a frozen backbone: mlp-k in Table 1 of the VPT paper.

    It has k linear layers. With d the width of the features, all but the last map d to d dimensions, have
    d² + d parameters each, and are followed by a ReLU.

    Args:
        num_layers: k, at least 1, which is a linear probe.
        backbone, num_classes, settings: see `LinearProbe`.

    Attributes:
        hidden: the first k - 1 layers. Their weights are initialised from He's normal distribution (He et
            al., 2015), their biases at zero.
        head: nn.Linear, the last layer.

    Raises:
        ValueError: as `LinearProbe`.
    """

    def __init__(
        self,
        backbone: str | TimmViT | SwinTransformer,
        num_classes: int,
        num_layers: int = 3,
        **settings: Any,
    ) -> None:
        num_layers = check_count("num_layers", num_layers)
        super().__init__(backbone, num_classes, **settings)
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            linear = nn.Linear(self.num_features, self.num_features, device=self.backbone.device)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
        self.num_layers = num_layers
        self.hidden = nn.Sequential(*layers)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "num_layers": self.num_layers}

    @property
    def _feature_dtype(self) -> torch.dtype:
        return dtype_of(self.hidden, default=super()._feature_dtype)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, `num_features`) to logits (B, num_classes)."""
        return self.head(self.hidden(features))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.frozen_features(images))

    def _num_kept(self) -> int:
        return self.num_layers * self.num_features  # a ReLU and the next layer keep the same tensor
