"""LoRATuning: low-rank updates of attention's matrices or a ConvNet's layers, by peft."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.tuned_model import check_count
from vpt_fast.tuning.timm_blocks import TimmClassifier

# In a block: the query, key and value projections, packed or separate, and attention's output projection.
_ATTENTION = r"(.+\.)?\d+\.attn\.(qkv|[qkv]_proj|proj)"


def plain_layers(backbone: WholeBackbone) -> list[str]:
    """The names of a ConvNet's layers for which peft's update is W + B A: nn.Linear, and nn.Conv2d with zero
    padding and no groups or dilation, but no subclasses. The stem (timm's first parameter group) is left out.

    peft makes A and B instances of the layer's own class: if that standardises its weights, as in NFNets, the
    update is not B A. It also drops dilation, and cannot merge the update of a grouped convolution.
    """
    _, *behind = backbone.parameter_groups()
    weights = {name for group in behind for name in group}
    return [
        name
        for name, module in backbone.stem.named_modules()
        if f"{name}.weight" in weights and _is_plain(module)
    ]


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return type(module) is nn.Linear


class LoRATuning(TimmClassifier):
    """Trains low-rank updates W + B A of the attention matrices of a frozen vision transformer or Swin, or of
    a ConvNet's linear layers and convolutions, and the head (Hu et al., ICLR 2022).

    peft inserts the updates and initialises them: A random, B at zero. Their scale is 1 (peft's lora_alpha is
    the rank), and they have no dropout. Where timm has one qkv matrix, queries, keys and values share an A.

    For a convolution, A is a convolution with the same kernel, stride and padding to `rank` channels, and B a
    1x1 convolution. In a ConvNet only `plain_layers` are updated; all others stay frozen.

    Args:
        backbone, num_classes, settings: see `TimmClassifier`.
        rank: r: rows of A, columns of B.

    Raises:
        ValueError: as `TimmClassifier`, for a rank out of range, for a ConvNet without `plain_layers`, and
            if peft is not installed.
    """

    kinds = (VIT, SWIN, CONVNET)
    added_to_backbone = re.compile(r"\.lora_[AB]\.")

    def __init__(self, backbone: str | nn.Module, num_classes: int, rank: int = 8, **settings: Any) -> None:
        rank = check_count("rank", rank)
        if importlib.util.find_spec("peft") is None:
            raise ValueError("method lora needs the package peft; pip install peft")
        import peft  # an optional dependency

        super().__init__(backbone, num_classes, **settings)
        network, targets = self.backbone, _ATTENTION
        if rank > network.embed_dim:
            raise ValueError(f"rank: got {rank}, want at most the backbone's width, {network.embed_dim}")
        self.rank = rank
        if isinstance(network, WholeBackbone) and not isinstance(network.stem, SwinTransformer):
            names = plain_layers(network)
            if not names:
                got = repr(backbone) if isinstance(backbone, str) else f"a {type(backbone).__name__}"
                raise ValueError(
                    f"backbone: got {got}, which has no plain nn.Linear or nn.Conv2d (no subclass, groups or "
                    "dilation) behind its stem; want one that has, as lora updates these alone"
                )
            # One pattern for all: peft would match a list of names as suffixes.
            targets = "|".join(re.escape(f"stem.{name}") for name in names)
        for module in network.modules():
            if isinstance(module, (EvaAttention, BeitAttention)):
                # Otherwise it reads qkv's weight directly and bypasses peft's wrapper.
                module.qkv_bias_separate = True
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        peft.inject_adapter_in_model(config, network)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "rank": self.rank}

    def _num_kept_beside(self) -> int:
        # The inputs of qkv's A, of both B, and of proj's A (attention's output with concatenated heads).
        attn: Any = self.backbone.timm_blocks[0].attn
        per_token = self.embed_dim + attn.proj.in_features + 2 * self.rank
        return self.num_blocks * self.backbone.num_tokens * per_token
