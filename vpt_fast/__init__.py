"""Exact visual prompt tuning without the dead work.

    model = vpt_fast.PromptedViT("vit_base_patch16_224", num_classes=200, num_prompts=50, pretrained=True)

tunes prompts on a frozen vision transformer (Jia et al., ECCV 2022). The results equal those of concatenating
the prompts to the sequence, at about the cost of a ViT without prompts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt_fast.convnet import PromptedConvNet
    from vpt_fast.graphed import GraphedStep
    from vpt_fast.model import PromptedViT
    from vpt_fast.pretrained import load_pretrained
    from vpt_fast.segmenter import PromptedSegmenter
    from vpt_fast.swin import PromptedSwin
    from vpt_fast.tuning.probes import LinearProbe

    __version__: str

__all__ = [
    "GraphedStep",
    "LinearProbe",
    "PromptedConvNet",
    "PromptedSegmenter",
    "PromptedSwin",
    "PromptedViT",
    "__version__",
    "load_pretrained",
]

# Imported on first access, as the version is read: importing torch and timm takes seconds, and
# `vpt-fast --help` needs neither.
_MODULES = {
    "GraphedStep": "graphed",
    "LinearProbe": "tuning.probes",
    "PromptedConvNet": "convnet",
    "PromptedSegmenter": "segmenter",
    "PromptedSwin": "swin",
    "PromptedViT": "model",
    "load_pretrained": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("vpt_fast")
    elif name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
