"""Converting a timm Beit: BEiT and BEiT v2, whose attention adds a bias by relative position to the scores.

Variants of timm's that are not supported raise; nothing is approximated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, Block
from torch import nn

from vpt_fast.backbones.layers import class_name, linear_parts, require_images, require_usual_scale
from vpt_fast.backbones.parts import mlp_parts, norm_parts, qkv_parts
from vpt_fast.backbones.timm_vit import FrozenViT, GammaBlocks, check_ends, check_methods
from vpt_fast.engine.biased import FrozenBiasedBlock
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.weights import BlockParts, BlockSpec, BlockWeights
from vpt_fast.engine.windows import relative_bias
from vpt_fast.kernels import Backend


class FrozenBeit(GammaBlocks, FrozenViT):
    """A timm Beit with frozen, folded blocks and no classifier. Prompts have no relative position: no bias is
    added to scores of or with them.

    Args are those of `FrozenViT`.

    Raises:
        ValueError: as `FrozenViT`; or an attention implementation chosen by name, as none takes a bias.
    """

    def __init__(
        self,
        vit: Beit,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        if attention != "auto":
            raise ValueError(
                f"attention: got {attention!r} with a Beit, which adds a bias to the scores that it does not "
                "take; want 'auto'"
            )
        super().__init__(vit, dtype, backend, attention, timm_blocks, residual_dtype)  # type: ignore[arg-type]
        # What is read of other ViTs, and of this one is not there.
        stem: Any = self.stem
        stem.dynamic_img_size, stem.attn_pool, stem.norm_pre = False, None, nn.Identity()
        for block in self.timm_blocks:
            attn: Any = block.attn
            attn.q_norm, attn.k_norm, attn.norm = nn.Identity(), nn.Identity(), nn.Identity()

    @staticmethod
    def _check(vit: Any) -> None:
        check_methods(vit, Beit)
        check_ends(vit)
        if vit.rel_pos_bias is not None:
            raise ValueError(
                "backbone: got a Beit whose blocks share their relative position bias "
                "(use_shared_rel_pos_bias), which is not supported; want use_rel_pos_bias"
            )

    @staticmethod
    def _block_parts(block: Any, index: int) -> BlockParts:
        where = f"backbone: blocks.{index}"
        for part, wanted, name in ((block, Block, where), (block.attn, Attention, f"{where}.attn")):
            if type(part) is not wanted:
                raise ValueError(
                    f"{name} is a {class_name(part)}, which is not supported; want timm's {wanted.__name__}"
                )
        attn = block.attn
        require_usual_scale(attn, attn.proj.in_features // attn.num_heads, f"{where}.attn")
        return BlockParts(
            num_heads=attn.num_heads,
            norm1=norm_parts(block.norm1, f"{where}.norm1"),
            qkv=qkv_parts(attn, f"{where}.attn"),
            q_norm=None,
            k_norm=None,
            attn_norm=None,
            proj=linear_parts(attn.proj, f"{where}.attn.proj"),
            scale1=block.gamma_1,
            norm2=norm_parts(block.norm2, f"{where}.norm2"),
            **mlp_parts(block.mlp, f"{where}.mlp"),
            scale2=block.gamma_2,
        )

    @staticmethod
    def _frozen_block(block: Any, spec: BlockSpec, weights: BlockWeights, backend: Backend) -> FrozenBlock:
        attn = block.attn
        if attn.relative_position_bias_table is None:
            return FrozenBlock(spec, weights, backend)
        bias = relative_bias(attn.relative_position_bias_table, attn.relative_position_index)
        return FrozenBiasedBlock(spec, weights, backend, relative_bias=bias)

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        stem: Any = self.stem
        x = torch.cat((stem.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return stem.pos_drop(x if stem.pos_embed is None else x + stem.pos_embed)

    @property
    def _pools_prefix_tokens(self) -> bool:
        return False

    def require_batch(self, x: torch.Tensor) -> None:
        require_images(x, "timm's own blocks of a Beit")

    @staticmethod
    def _score_bias(attn: Any, num_prompts: int) -> torch.Tensor | None:
        if attn.relative_position_bias_table is None:
            return None
        return F.pad(attn._get_rel_pos_bias(), (num_prompts, 0))
