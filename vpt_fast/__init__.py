"""Exact visual prompt tuning without the dead work.

    model = vpt_fast.PromptedViT("vit_base_patch16_224", num_classes=200, num_prompts=50, pretrained=True)

tunes prompts through a frozen vision transformer (Jia et al., ECCV 2022) with the results of concatenating
them to the sequence, at about the cost of a ViT without prompts.
"""

from importlib.metadata import version

from vpt_fast.backbones import demo as _demo  # registers vpt_fast_demo with timm
from vpt_fast.convnet import PromptedConvNet
from vpt_fast.graphed import GraphedStep
from vpt_fast.model import PromptedViT
from vpt_fast.pretrained import load_pretrained
from vpt_fast.segmenter import PromptedSegmenter
from vpt_fast.swin import PromptedSwin
from vpt_fast.tuning.probes import LinearProbe

__version__ = version("vpt_fast")
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

del _demo, version
