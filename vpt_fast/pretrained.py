"""Loading whatever kind of model a folder holds."""

from __future__ import annotations

import os
from typing import Any

from vpt_fast.backbones.timm_eva import TimmViT
from vpt_fast.classifier import TunedModel, read_pretrained
from vpt_fast.convnet import PromptedConvNet
from vpt_fast.model import PromptedViT
from vpt_fast.segmenter import PromptedSegmenter
from vpt_fast.swin import PromptedSwin
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.bias import (
    BiasTuning,
    PromptAndBiasConvNetTuning,
    PromptAndBiasSwinTuning,
    PromptAndBiasTuning,
)
from vpt_fast.tuning.cls_token import ClsTokenTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.lora import LoRATuning
from vpt_fast.tuning.partial import PartialNetworkTuning, PartialTuning
from vpt_fast.tuning.probes import LinearProbe, MLPProbe
from vpt_fast.tuning.side import SideTuning

MODELS: dict[str, type[TunedModel]] = {
    model.__name__: model
    for model in (
        PromptedViT,
        PromptedSwin,
        PromptedConvNet,
        PromptedSegmenter,
        LinearProbe,
        MLPProbe,
        PartialTuning,
        PartialNetworkTuning,
        SideTuning,
        ClsTokenTuning,
        FullTuning,
        BiasTuning,
        PromptAndBiasTuning,
        PromptAndBiasSwinTuning,
        PromptAndBiasConvNetTuning,
        AdapterTuning,
        LoRATuning,
    )
}


def load_pretrained(
    path: str | os.PathLike[str], backbone: str | TimmViT | None = None, **overrides: Any
) -> TunedModel:
    """Build the saved model in a folder or hub repository again, of whichever class it is.

    Args and errors are those of `PromptedViT.from_pretrained`.
    """
    settings, _ = read_pretrained(path)
    kind = settings["model"]
    if kind not in MODELS:
        raise ValueError(f"{path}: holds a {kind!r}, want one of {', '.join(MODELS)}")
    return MODELS[kind].from_pretrained(path, backbone, **overrides)
