"""TimmClassifier, the base class of models that run timm's own modules, and estimates of their memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.layers import dtype_of
from vpt_fast.backbones.resolve import VIT, Kind, kind_among, resolve_backbone
from vpt_fast.backbones.timm_vit import FrozenViT, Position, Positions, size_of
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.backbones.vit import frozen_vit
from vpt_fast.classifier import TunedClassifier, check_arguments
from vpt_fast.engine import cost
from vpt_fast.engine.contexts import compute_dtype


class TimmClassifier(TunedClassifier):
    """A model that runs a copy of timm's own modules, in at least float32; subclasses unfreeze what they
    train.

    Autograd keeps neither the inputs of frozen linear layers nor anything before the first trained tensor.

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm model of one of the class's `kinds`
            (VisionTransformer, Eva or Beit, if not said otherwise), which is not changed.
        num_classes: outputs of the head.
        pool: None for the backbone's own pooling; for a vision transformer also ``"cls"`` or ``"image"``.
        pretrained: load the published weights (only with a name).
        checkpoint: load the weights from this file instead (only with a name), see docs/backbones.md.
        timm_kwargs: passed to timm.create_model (only with a name). Dropout is active in training.

    Raises:
        ValueError: an argument out of range, or a part of the backbone that is not supported.
    """

    # Whether the blocks' matrices are trained, so that their inputs are kept.
    trains_weights = False
    kinds: tuple[Kind, ...] = (VIT,)  # supported backbones
    # Values of `pool` besides None for a Swin or ConvNet.
    pools_of_whole: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        pool: str | None = None,
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        check_arguments(num_classes, pool)
        dtype = timm_kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and dtype.itemsize < torch.float32.itemsize:
            # timm would round the weights, but products would be in float32 all the same.
            raise ValueError(
                f"dtype: got {dtype} with {type(self).__name__}, whose modules run in float32 or more; want "
                "autocast for products of 16 bits"
            )
        kind = kind_among(backbone, self.kinds)
        model, origin = resolve_backbone(backbone, pretrained, timm_kwargs, checkpoint=checkpoint, kind=kind)
        if kind is not VIT:
            whole = WholeBackbone(model)
            whole.check_pool(pool, self.pools_of_whole)
            super().__init__(whole, origin, num_classes, pool=pool)
            return
        dtype = torch.promote_types(dtype_of(model, default=torch.float32), torch.float32)
        frozen = frozen_vit(model, dtype, timm_blocks=len(model.blocks))
        super().__init__(frozen, origin, num_classes, pool=pool)
        self._reads = frozen.head_reads_of_image(pool)

    def train(self, mode: bool = True) -> TimmClassifier:
        """Sets the mode of timm's modules, those before the blocks too: dropout is active in training."""
        super().train(mode)
        if isinstance(self.backbone, FrozenViT):
            self.backbone.stem.train(mode)
        return self

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        self._check_images(images)
        if isinstance(self.backbone, WholeBackbone):
            return self.backbone(images).to(self._feature_dtype)
        (x,) = self._block_outputs(images, (self.num_blocks - 1,))
        return self._features_of_tokens(x, self._reads)

    def patch_tokens(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        self._check_blocks(blocks)
        self._check_images(images)
        outputs = self._block_outputs(images, blocks)
        return [self._patches(x, x.shape[1]) for x in outputs]

    def _block_outputs(self, images: torch.Tensor, wanted: Sequence[int]) -> list[torch.Tensor]:
        positions = self.backbone.timm_positions(size_of(images))
        return self._outputs(self.backbone.for_timm_blocks(self.backbone.embed(images)), positions, wanted)

    def _outputs(self, x: torch.Tensor, positions: Positions, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Tokens (B, N, d) before the first block to those after each block in `wanted`.

        Args:
            x: the tokens.
            positions: each block's other arguments, from `FrozenViT.timm_positions`.
            wanted: indices of blocks, in ascending order; no later block runs.
        """
        self.backbone.require_batch(x)
        outputs = []
        for index in range(wanted[-1] + 1):
            x = self._run_block(index, x, positions[index])
            if index in wanted:
                outputs.append(x)
        return outputs

    def _run_block(self, index: int, x: torch.Tensor, position: Position) -> torch.Tensor:
        """One block: tokens (B, N, d) to tokens (B, N, d)."""
        return self.backbone.timm_blocks[index](x, **position)

    def _freeze_what_is_not_read(self) -> None:
        """Freezes the attention-pool head if another pooling replaces it: it would get no gradient."""
        attn_pool = getattr(self.backbone.stem, "attn_pool", None)  # a Swin or ConvNet has none
        if self.pool is not None and attn_pool is not None:
            attn_pool.requires_grad_(False)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """An estimate."""
        if isinstance(self.backbone, WholeBackbone):
            return self._counted_training_bytes(batch_size)
        kept, workspace = timm_block_bytes(self.backbone, trains_weights=self.trains_weights)
        return cost.TrainingBytes(
            weights=self._weight_bytes(),
            kept=batch_size * (kept * self.num_blocks + self._num_kept_beside() * torch.float32.itemsize),
            workspace=batch_size * workspace,
        )

    def _num_kept_beside(self) -> int:
        """Values that the method keeps per image besides what the blocks keep, over all blocks."""
        return 0


def timm_block_bytes(vit: FrozenViT, *, trains_weights: bool) -> tuple[int, int]:
    """Estimated bytes per image that one of timm's blocks keeps for backward, and of its temporaries, in the
    compute dtype, for a block with something trained in or below it.

    Args:
        vit: its last block stands for all.
        trains_weights: whether the blocks' matrices are trained.
    """
    block: Any = vit.timm_blocks[-1]
    dtype = compute_dtype(vit.device.type, block.attn.proj.weight.dtype)
    wide = max(dtype.itemsize, torch.float32.itemsize)
    embed_dim, attn_dim = vit.embed_dim, block.attn.proj.in_features
    activated = block.mlp.fc2.in_features
    is_gated = hasattr(block.mlp, "fc1_g") or block.mlp.fc1.out_features != activated
    # Attention's query, key, value and output; the activation's input; for a gate, both factors too.
    narrow = 4 * attn_dim + activated * (4 if is_gated else 1)
    # Query and key after norm or rotation; the projected ones are alive too, in one tensor with the value.
    if block.attn.qkv is not None and (vit.is_rotary or not isinstance(block.attn.q_norm, nn.Identity)):
        narrow += 2 * attn_dim
    if not isinstance(block.attn.norm, nn.Identity):
        narrow += attn_dim
    if not isinstance(block.mlp.norm, nn.Identity):
        narrow += activated
    if trains_weights:  # the inputs of qkv, proj, fc1 and fc2, and of LayerScale
        narrow += 2 * embed_dim + attn_dim + activated
        narrow += embed_dim * vit.num_layer_scales(block)
    # The residual stream before both norms, their means and deviations, and the rows' log-sum-exp.
    per_token = narrow * dtype.itemsize + (2 * embed_dim + 4 + block.attn.num_heads) * wide
    # Gradients of the hidden layer and of attention's tensors, and a few copies of the residual stream.
    workspace = (2 * activated + 4 * attn_dim) * dtype.itemsize + 4 * embed_dim * wide
    return vit.num_tokens * per_token, vit.num_tokens * workspace
