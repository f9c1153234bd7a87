"""Loading a saved model of any class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vpt_fast.backbones.vit import TimmViT
from vpt_fast.convnet import PromptedConvNet
from vpt_fast.model import PromptedViT
from vpt_fast.saved_model import read_pretrained
from vpt_fast.segmenter import PromptedSegmenter
from vpt_fast.swin import PromptedSwin
from vpt_fast.tuned_model import TunedModel
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
    """Rebuild a saved model of any class, from a folder or a repository on the Hugging Face hub.

    Args:
        path: a folder that `save_pretrained` wrote, or owner/name of a repository, with @revision (a branch,
            tag or commit) or without.
        backbone: the backbone to use, if the saved one has no timm name or comes from elsewhere.
        overrides: settings that replace the saved ones, see `PromptedViT.from_pretrained`.

    Raises:
        FileNotFoundError: it lacks a file, or there is neither such a folder nor such a repository.
        TypeError: an override that the class does not have.
        ValueError: it holds an unknown class, or says where to download weights from or to, or the
            backbone's weights or architecture are missing or not those that the model was trained on.
    """
    settings, tensors = read_pretrained(path)
    return class_of(settings, path).rebuild(settings, tensors, path, backbone, **overrides)


def class_of(settings: Mapping[str, Any], path: str | os.PathLike[str]) -> type[TunedModel]:
    """The class of the saved model in `path`, whose settings `read_pretrained` gave.

    Raises:
        ValueError: an unknown class.
    """
    kind = settings["model"]
    if kind not in MODELS:
        raise ValueError(f"{path}: holds a {kind!r}, want one of {', '.join(MODELS)}")
    return MODELS[kind]
