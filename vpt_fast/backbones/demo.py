"""The packaged backbone: `timm.create_model("vpt_fast_demo")`, a ViT for 32x32 images.

Its entry point always loads the weights, from demo.safetensors beside this file, without network access and
whatever `pretrained` says. scripts/pretrain_demo_backbone.py produces them and a training log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS = Path(__file__).with_name("demo.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "vpt_fast_demo": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": IMAGENET_INCEPTION_MEAN,
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


def demo_metadata() -> dict[str, str]:
    """The metadata of demo.safetensors: sizes, num_parameters, accuracy (%), held_out_images, epochs."""
    with safe_open(WEIGHTS, framework="pt") as file:
        return file.metadata()


@register_model
def vpt_fast_demo(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """The packaged ViT in fp32, with its weights. kwargs: of timm's VisionTransformer.

    With num_classes > 0 the classifier is initialised at random: the file has none.
    """
    metadata = demo_metadata()
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    sizes = {name: int(metadata[name]) for name in names}
    return build_model_with_cfg(
        VisionTransformer,
        "vpt_fast_demo",
        pretrained=True,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**sizes, "num_classes": 0, **kwargs},
    )
