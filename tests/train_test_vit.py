"""A backbone small enough to be trained in seconds, by a name of timm's."""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs({"train_test_vit": {"input_size": (3, 16, 16), "num_classes": 0}})


@register_model
def train_test_vit(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The same random weights every time, so that a saved run finds its backbone again."""
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model_with_cfg(
            VisionTransformer, "train_test_vit", pretrained=False, **{**sizes, **kwargs}
        )
