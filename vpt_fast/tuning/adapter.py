"""AdapterTuning: a small bottleneck behind every MLP of a vision transformer or Swin."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F

from vpt_fast.backbones.resolve import SWIN, VIT
from vpt_fast.backbones.timm_eva import TimmViT
from vpt_fast.backbones.timm_vit import Position, dtype_of
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.classifier import check_count
from vpt_fast.tuning.timm_blocks import TimmClassifier

_INIT_STD = 0.02  # of the down projection, as of a ViT's own linear layers


class Adapter(nn.Module):
    """x + up(gelu(down(x))) (Houlsby et al., 2019), down from d to d // r dimensions and up back to d.

    Up starts at zero, so that the adapter starts as the identity, and down from N(0, 0.02²), so that up has
    a gradient: with both at zero none of the two would ever get one.
    """

    def __init__(self, embed_dim: int, reduction: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, embed_dim // reduction, device=device, dtype=dtype)
        self.up = nn.Linear(embed_dim // reduction, embed_dim, device=device, dtype=dtype)
        nn.init.normal_(self.down.weight, std=_INIT_STD)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(F.gelu(self.down(x)))


class AdapterTuning(TimmClassifier):
    """One adapter in every block of a frozen vision transformer or Swin, behind the MLP and before its
    residual sum (Pfeiffer et al., 2020), and the head. Where the block has a LayerScale, the adapter follows
    it.

    Args:
        reduction: r: the adapter's inner width is d // r, of a Swin for its stage's d. The VPT paper chose 8,
            64 or 256 task by task.
        The others are those of `TimmClassifier`.

    Attributes:
        adapters: an Adapter for each block; a Swin's stand in its blocks, ``mlp[1]``.

    Raises:
        ValueError: as `TimmClassifier`, and for a reduction out of range.
    """

    kinds = (VIT, SWIN)

    def __init__(
        self,
        backbone: str | TimmViT | SwinTransformer,
        num_classes: int,
        reduction: int = 8,
        **settings: Any,
    ) -> None:
        check_count("reduction", reduction)
        super().__init__(backbone, num_classes, **settings)
        swin = self.backbone.stem if isinstance(self.backbone, WholeBackbone) else None
        blocks: list[Any] = [] if swin is None else [block for stage in swin.layers for block in stage.blocks]
        widths = [int(block.dim) for block in blocks] or [self.embed_dim] * self.num_blocks
        if reduction > min(widths):
            raise ValueError(f"reduction: got {reduction}, want at most the backbone's width {min(widths)}")
        self.reduction = reduction
        # In the dtype of timm's blocks, between which they stand: float64 where those are.
        placed: Any = dict(device=self.backbone.device, dtype=dtype_of(self.backbone, default=torch.float32))
        adapters = [Adapter(width, reduction, **placed) for width in widths]
        if swin is None:
            self.adapters = nn.ModuleList(adapters)
        for block, adapter in zip(blocks, adapters, strict=False):
            block.mlp = nn.Sequential(block.mlp, adapter)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "reduction": self.reduction}

    def _run_block(self, index: int, x: torch.Tensor, position: Position) -> torch.Tensor:
        vit = self.backbone
        block, adapter = vit.timm_blocks[index], self.adapters[index]
        x = x + block.drop_path1(vit.attention_branch(block, x, position))
        return x + block.drop_path2(adapter(vit.mlp_branch(block, x)))

    def _num_kept_beside(self) -> int:
        # The inputs of down, gelu and up.
        per_token = self.embed_dim + 2 * (self.embed_dim // self.reduction)
        return self.num_blocks * self.backbone.num_tokens * per_token
