"""AdapterTuning: a small bottleneck after every MLP of a vision transformer, Swin, ConvNeXt or MetaNeXt."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.inception_next import MetaNeXtBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import nn
from torch.nn import functional as F

from vpt_fast.backbones.layers import dtype_of, require_no_hooks
from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind
from vpt_fast.backbones.timm_vit import Position
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.tuned_model import check_count
from vpt_fast.tuning.timm_blocks import TimmClassifier

_INIT_STD = 0.02  # of the down projection, as in a ViT's linear layers


class Adapter(nn.Module):
    """x + up(gelu(down(x))) (Houlsby et al., 2019): down projects from d to d // r dimensions, up back to d.

    up is initialised at zero, so that the adapter starts as the identity, and down's weight from N(0, 0.02²):
    with both at zero, neither weight would ever get a gradient.
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


class MapAdapter(Adapter):
    """An Adapter applied at every position of a feature map (B, d, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class AdapterTuning(TimmClassifier):
    """Trains one adapter in every block of a frozen vision transformer, Swin, ConvNeXt or MetaNeXt, and the
    head. The adapter follows the MLP, and its LayerScale if there is one, and precedes the residual addition
    (Pfeiffer et al., 2020).

    Args:
        backbone, num_classes, settings: see `TimmClassifier`.
        reduction: r: the adapter's inner width is d // r, with d the width of its stage. The VPT paper chose
            8, 64 or 256 per task.

    Attributes:
        adapters: an Adapter for each block of a vision transformer. In a Swin they are the blocks'
            ``mlp[1]``, in a ConvNet ``drop_path[0]``.

    Raises:
        ValueError: as `TimmClassifier`, for a reduction out of range, and for a ConvNet whose blocks have no
            MLP.
    """

    kinds: tuple[Kind, ...] = (VIT, SWIN, CONVNET)
    added_to_backbone = re.compile(r"\.(mlp\.1|drop_path\.0)\.(down|up)\.")

    def __init__(
        self,
        backbone: str | TimmViT | SwinTransformer | nn.Module,
        num_classes: int,
        reduction: int = 8,
        **settings: Any,
    ) -> None:
        reduction = check_count("reduction", reduction)
        super().__init__(backbone, num_classes, **settings)
        is_whole = isinstance(self.backbone, WholeBackbone)
        is_swin = isinstance(self.backbone.stem, SwinTransformer)
        blocks = _blocks_with_mlp(self.backbone.stem) if is_whole else []
        widths = [width for _, width in blocks] if is_whole else [self.embed_dim] * self.num_blocks
        if reduction > min(widths):
            raise ValueError(f"reduction: got {reduction}, want at most the backbone's width {min(widths)}")
        self.reduction = reduction
        # In the dtype of timm's blocks, which may be float64.
        placed: Any = dict(device=self.backbone.device, dtype=dtype_of(self.backbone, default=torch.float32))
        if not is_whole:
            for index, vit_block in enumerate(self.backbone.timm_blocks):  # only their parts are called
                require_no_hooks(vit_block, f"backbone: blocks.{index}", below=False)
            self.adapters = nn.ModuleList(Adapter(width, reduction, **placed) for width in widths)
        for block, width in blocks:
            if is_swin:
                block.mlp = nn.Sequential(block.mlp, Adapter(width, reduction, **placed))
            else:  # the block itself scales the MLP's output, then passes it to drop_path
                block.drop_path = nn.Sequential(MapAdapter(width, reduction, **placed), block.drop_path)

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


def _blocks_with_mlp(network: nn.Module) -> list[tuple[Any, int]]:
    """The residual blocks of a Swin or ConvNet that end in an MLP, in the network's order, each with its
    output width.

    Raises ValueError if there are none.
    """
    classes = (SwinTransformerBlock, ConvNeXtBlock, MetaNeXtBlock)
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, classes)]
    if not blocks:
        raise ValueError(
            f"backbone: got a {type(network).__name__}, a ConvNet whose blocks have no MLP for an adapter to "
            "stand behind; want a ConvNeXt, a MetaNeXt (InceptionNeXt), a Swin or a vision transformer"
        )
    return [(block, len(block.mlp.fc2.weight)) for block in blocks]  # fc2 may be a 1x1 convolution
