"""LoRATuning: low-rank updates of attention's matrices, through peft."""

from __future__ import annotations

import importlib.util
from typing import Any

from timm.models.eva import EvaAttention
from torch import nn

from vpt_fast.backbones.resolve import SWIN, VIT
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.tuning.timm_blocks import TimmClassifier

# In a block; the projections to queries, keys and values, packed or apart, and attention's output projection.
_TARGETS = r"(.+\.)?\d+\.attn\.(qkv|[qkv]_proj|proj)"


def require_peft() -> None:
    """Raises ValueError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("method lora needs the package peft; pip install peft, or vpt_fast[lora]")


class LoRATuning(TimmClassifier):
    """W + B A trained for attention's matrices of a frozen vision transformer or Swin (Hu et al., ICLR 2022),
    and the head.

    peft puts the updates in and starts them: A random, B at zero. Their scale is 1 (peft's lora_alpha is the
    rank), and they have no dropout. Where qkv is one matrix in timm, queries, keys and values share an A.

    Args:
        rank: r: rows of A, columns of B.
        The others are those of `TimmClassifier`.

    Raises:
        ValueError: as `TimmClassifier`, for a rank out of range, and where peft is not installed.
    """

    kinds = (VIT, SWIN)

    def __init__(self, backbone: str | nn.Module, num_classes: int, rank: int = 8, **settings: Any) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: got {rank!r}, want a whole number from 1")
        require_peft()
        import peft  # an optional dependency

        super().__init__(backbone, num_classes, **settings)
        self.rank = rank
        is_whole = isinstance(self.backbone, WholeBackbone)
        blocks: Any = self.backbone.stem.layers if is_whole else self.backbone.blocks
        for module in blocks.modules():
            if isinstance(module, EvaAttention):
                # Else it reads qkv's weight, past what peft puts around the layer.
                module.qkv_bias_separate = True
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS)
        peft.inject_adapter_in_model(config, blocks)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "rank": self.rank}

    def _num_kept_beside(self) -> int:
        # The inputs of qkv's A, of both B and of proj's A: attention's output with its heads side by side.
        attn: Any = self.backbone.timm_blocks[0].attn
        per_token = self.embed_dim + attn.proj.in_features + 2 * self.rank
        return self.num_blocks * self.backbone.num_tokens * per_token
