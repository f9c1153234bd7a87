"""Which backbone is meant: from what a user names, or built, to a timm model and where it came from."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import nn

_VIT_MODULES = ("timm.models.vision_transformer", "timm.models.deit")


@dataclass(frozen=True)
class Origin:
    """Where a backbone came from: timm's name for it, or None for an instance that the user built; whether
    timm's weights were loaded; and the keywords that went to timm."""

    name: str | None
    pretrained: bool
    kwargs: dict[str, Any]


def resolve_backbone(
    backbone: str | VisionTransformer, pretrained: bool, kwargs: dict[str, Any], border: int = 0
) -> tuple[VisionTransformer, Origin]:
    """The VisionTransformer that the user means.

    Args:
        backbone: a timm name, with or without a pretrained tag, or an instance.
        pretrained: load timm's published weights (only with a name).
        kwargs: go to timm.create_model (only with a name).
        border: pixels to add on each side of a named model's image size.

    Raises:
        ValueError: no such model in timm, one that is not a VisionTransformer, an img_size that the patch
            size does not divide, or keywords beside an instance.
    """
    if isinstance(backbone, VisionTransformer):
        if pretrained or kwargs:
            given = ["pretrained"] * pretrained + sorted(kwargs)
            raise ValueError(
                f"{', '.join(given)}: only with a backbone's name; this backbone is built already and its "
                "weights are used as they are"
            )
        return backbone, Origin(None, False, {})
    if not isinstance(backbone, str):
        raise ValueError(f"backbone: got a {type(backbone).__name__}, want a timm name or VisionTransformer")
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"backbone: got {backbone!r}, want the name of a timm model{hint}")
    # Known from the module's name alone, before any weights are downloaded. Models that others register
    # with timm have modules of their own.
    module = timm.models.model_entrypoint(backbone).__module__
    if module.startswith("timm.") and module not in _VIT_MODULES:
        raise ValueError(f"backbone: {backbone!r} is not a timm VisionTransformer, the one kind supported")
    build_kwargs = dict(kwargs)
    if border:
        size, settings = kwargs.get("img_size"), timm.get_pretrained_cfg(backbone)
        if size is None and settings is None:
            raise ValueError(f"img_size: timm knows no default for {backbone!r}, and a border needs one")
        height, width = to_2tuple(size or settings.input_size[1:])
        build_kwargs["img_size"] = (height + 2 * border, width + 2 * border)
    vit = _create(backbone, pretrained, build_kwargs)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"backbone: {backbone!r} is a {type(vit).__name__}, want a timm VisionTransformer")
    if "img_size" in build_kwargs and not vit.patch_embed.dynamic_img_pad:
        size, patch = to_2tuple(build_kwargs["img_size"]), vit.patch_embed.patch_size
        if size[0] % patch[0] or size[1] % patch[1]:
            with_border = f" (with a border of {border} pixels on each side)" if border else ""
            raise ValueError(
                f"img_size: got {size[0]}x{size[1]}{with_border}, want a multiple of the patch size "
                f"{patch[0]}x{patch[1]}"
            )
    return vit, Origin(backbone, pretrained, dict(kwargs))


_Built = tuple[nn.Module, torch.Tensor]  # a backbone, and the state of torch's generator after it was built
_shared: ContextVar[dict[Hashable, _Built] | None] = ContextVar("shared_backbones", default=None)


@contextlib.contextmanager
def sharing_backbones(built: dict[Hashable, _Built]) -> Iterator[None]:
    """Within it, a backbone by name is taken from `built`, which keeps the last one.

    Weights that are drawn at random depend on torch's generator, and what is drawn after them on how far they
    moved it: both are what they would be without.
    """
    token = _shared.set(built)
    try:
        yield
    finally:
        _shared.reset(token)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    shared = _shared.get()
    if shared is None:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    key = (name, pretrained, repr(sorted(kwargs.items())), bytes(torch.get_rng_state().numpy()))
    if key not in shared:
        shared.clear()
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        shared[key] = (vit, torch.get_rng_state())
    vit, state = shared[key]
    torch.set_rng_state(state)
    return vit
