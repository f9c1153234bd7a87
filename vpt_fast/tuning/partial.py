"""Training the last blocks of a backbone: PartialTuning for a vision transformer, PartialNetworkTuning for a
Swin or ConvNet."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT
from vpt_fast.backbones.split import Split, split_network
from vpt_fast.backbones.timm_vit import size_of
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.engine import cost
from vpt_fast.engine.plan import Read
from vpt_fast.tuned_model import check_count
from vpt_fast.tuning.folded import FoldedClassifier
from vpt_fast.tuning.timm_blocks import TimmClassifier, timm_block_bytes


class PartialTuning(FoldedClassifier):
    """Trains the last k blocks of a vision transformer, the final norm and the head: partial-k in Table 1 of
    the VPT paper.

    The blocks before them run frozen, without autograd. Their output, the residual stream before the first
    trained block, is always at least float32, so that caching it across epochs loses no precision. An
    attention-pool head stays frozen.

    Args:
        backbone, num_classes, settings: see `LinearProbe`; the backbone is a vision transformer, and `dtype`,
            `backend` and `attention` are those of its frozen blocks.
        num_tuned_blocks: k, from 1 to the number of blocks.

    Raises:
        ValueError: as `LinearProbe`, and for more blocks than the backbone has.
    """

    kinds = (VIT,)

    def __init__(
        self, backbone: str | TimmViT, num_classes: int, num_tuned_blocks: int = 1, **settings: Any
    ) -> None:
        self.num_tuned_blocks = check_count("num_tuned_blocks", num_tuned_blocks)  # read by the base class
        super().__init__(backbone, num_classes, **settings)

    def _check_model(self, model: Any) -> None:
        if self.num_tuned_blocks > len(model.blocks):
            raise ValueError(
                f"num_tuned_blocks: got {self.num_tuned_blocks}, and the backbone has {len(model.blocks)} "
                "blocks"
            )

    def _unfreeze(self, model: Any) -> None:
        for module in (*self.backbone.timm_blocks, self.backbone.stem.norm, self.backbone.stem.fc_norm):
            module.requires_grad_(True)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "num_tuned_blocks": self.num_tuned_blocks}

    @property
    def feature_shape(self) -> tuple[int, ...]:
        return (self.backbone.num_tokens, self.embed_dim)

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the tokens before the first trained block (B, N, d)."""
        self._check_images(images)
        return self.backbone.run_folded(images, Read.TOKENS)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens before the first trained block (B, N, d), of images of the model's own size, to logits
        (B, num_classes)."""
        return self.head(self._run_trained(features, self.image_size))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self._run_trained(self.frozen_features(images), size_of(images))

    def _run_trained(self, x: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Tokens before the first trained block (B, N, d) to the head's input (B, `num_features`)."""
        self.backbone.require_batch(x)
        x, positions = self.backbone.for_timm_blocks(x), self.backbone.timm_positions(image_size)
        for block, position in zip(self.backbone.timm_blocks, positions, strict=True):
            x = block(x, **position)
        return self._features_of_tokens(x, self._reads)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """An estimate."""
        kept, workspace = timm_block_bytes(self.backbone, trains_weights=True)
        return cost.TrainingBytes(
            weights=self._weight_bytes(),
            kept=batch_size * kept * len(self.backbone.timm_blocks),
            workspace=max(self.backbone.folded_workspace(batch_size), batch_size * workspace),
        )


class PartialNetworkTuning(TimmClassifier):
    """Trains the last k blocks of a Swin or ConvNet, the layers after them, and the head: partial-k in Tables
    4 and 5 of the VPT paper.

    The layers before them run without autograd and without dropout. If what is trained reads one tensor of
    theirs (`split.split_network`), that tensor can be cached across epochs. In training the BatchNorms of
    what is trained normalise by the batch and update their statistics, which are saved too; those of the
    layers before keep theirs.

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm SwinTransformer or ConvNet, which is not
            changed.
        num_classes: outputs of the head.
        num_tuned_blocks: k, at least 1; see `WholeBackbone.last_blocks` for what counts as a block.
        settings: see `TimmClassifier`.

    Raises:
        ValueError: as `TimmClassifier`, and for more blocks than the backbone has.
    """

    trains_weights = True
    kinds = (SWIN, CONVNET)

    def __init__(
        self, backbone: str | nn.Module, num_classes: int, num_tuned_blocks: int = 1, **settings: Any
    ) -> None:
        num_tuned_blocks = check_count("num_tuned_blocks", num_tuned_blocks)
        super().__init__(backbone, num_classes, **settings)
        self.num_tuned_blocks = num_tuned_blocks
        assert isinstance(self.backbone, WholeBackbone)
        for parameter in self.backbone.last_blocks(num_tuned_blocks):
            parameter.requires_grad_(True)
        self.backbone.move_trained_norms()

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "num_tuned_blocks": self.num_tuned_blocks}

    def train(self, mode: bool = True) -> PartialNetworkTuning:
        """Sets the mode of what is trained; what is frozen stays in eval mode."""
        super().train(mode)
        for module in self.backbone.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.train(False)
        return self

    @cached_property
    def _split(self) -> Split | None:
        network: Any = self.backbone
        image = torch.empty(1, network.in_chans, *self.image_size, device="meta")
        return split_network(network.stem, network.cast(image))

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        return None if self._split is None else self._split.shape

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the input of the first trained layer (B, *`feature_shape`), in
        the dtype in which the network computes it."""
        self._check_images(images)
        network: Any = self.backbone
        return self._require_split().run_frozen(network.stem, network.cast(images))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Input of the first trained layer (B, *`feature_shape`) to logits (B, num_classes)."""
        network: Any = self.backbone
        feature_map = self._require_split().run_trained(network.stem, features)
        return self.head(network.pooled(feature_map).to(self._feature_dtype))

    def _require_split(self) -> Split:
        if self._split is None:
            raise NotImplementedError(
                f"num_tuned_blocks: got {self.num_tuned_blocks}, and of this "
                f"{type(self.backbone.stem).__name__} these blocks read more than one tensor of the layers "
                "before them, so there are no frozen features"
            )
        return self._split

    def _stored(self) -> dict[str, torch.Tensor]:
        network: Any = self.backbone
        statistics = {
            f"backbone.{norm}.{name}": buffer
            for norm in sorted(network.moving_norms)
            for name, buffer in network.get_submodule(norm).named_buffers()
        }
        return {**super()._stored(), **statistics}
