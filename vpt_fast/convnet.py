"""PromptedConvNet: visual prompt tuning of a frozen ConvNet, with pixels as prompts."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.layers import dtype_of, on_meta
from vpt_fast.backbones.resolve import CONVNET, resolve_backbone
from vpt_fast.backbones.timm_convnet import FrozenConv2d, FrozenConvNet
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.classifier import FrozenClassifier, check_arguments
from vpt_fast.engine import cost
from vpt_fast.engine.plan import Read
from vpt_fast.prompts import IN_IMAGE, PromptConfig, init_bound, pad_image, refuse_settings

MEMORY = ("auto", "exact")

_NEEDS_FLOAT32 = (
    " with prompt_location='concat-channel', whose first convolution is trained, in float32; want float32 "
    "weights, and autocast for products of 16 bits"
)


class PromptedConvNet(FrozenClassifier):
    """A frozen ConvNet tuned by visual prompts in its input (Jia et al., ECCV 2022, sec. 4.3).

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm ConvNet of a family in
            `resolve.CONVNET`, whose weights are used as they are and which is not changed.
        num_classes: outputs of the head.
        num_prompts: m: pixels of border on each side (pad), or extra input channels (concat-channel).
        prompt_type: ``"shallow"``: prompts are part of the image.
        prompt_location: ``"pad"``: a border of pixels around the image; ``"concat-channel"``: extra input
            channels, with the whole first convolution trained.
        pool: None, the backbone's own pooling.
        dtype: of the frozen weights; None for the backbone's own. Prompts and head are at least float32, and
            with concat-channel so is the whole network.
        backend: ``"auto"`` or ``"torch"``.
        attention: ``"auto"``.
        memory: ``"auto"`` or ``"exact"``, which mean the same here.
        pretrained: load the published weights (only with a name).
        checkpoint: load the weights from this file instead (only with a name), see docs/backbones.md.
        timm_kwargs: passed to timm.create_model (only with a name), except img_size, the image's size
            without the border, and the other settings of `prompts.PromptConfig`, which must have their
            default values.

    Attributes:
        prompts, prompts_sides: as in `PromptedViT` for ``pad`` and ``concat-channel``.
        head: nn.Linear, from d features to logits.

    Raises:
        ValueError: an argument out of range, or one that a ConvNet does not have; the message names it.
    """

    backbone: FrozenConvNet  # type: ignore[assignment]

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        num_prompts: int,
        prompt_type: str = "shallow",
        *,
        prompt_location: str = "pad",
        pool: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        memory: str = "exact",
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        # Not a backend or attention by name: what is refused here anyway need not be installed to be told so.
        check_arguments(num_classes, pool, dtype)
        FrozenConvNet.head_reads_of_image(pool)
        _check_memory(memory)
        if prompt_type != "shallow":
            raise ValueError(f"prompt_type: got {prompt_type!r} with a ConvNet, want 'shallow'")
        if prompt_location not in IN_IMAGE:
            raise ValueError(
                f"prompt_location: got {prompt_location!r} with a ConvNet, "
                f"want {' or '.join(map(repr, IN_IMAGE))}"
            )
        if prompt_location == "concat-channel" and dtype is not None and dtype.itemsize < 4:
            raise ValueError(f"dtype: got {dtype}{_NEEDS_FLOAT32}")
        refuse_settings(timm_kwargs, "a ConvNet, whose prompts are pixels")
        settings = PromptConfig(num_prompts, prompt_type, prompt_location=prompt_location)
        model, origin = resolve_backbone(
            backbone, pretrained, timm_kwargs, checkpoint=checkpoint, kind=CONVNET
        )
        own = dtype_of(model, default=torch.float32)
        if prompt_location == "concat-channel" and dtype is None and own.itemsize < 4:
            raise ValueError(f"backbone: got one in {own}{_NEEDS_FLOAT32}")
        super().__init__(
            model, origin, num_classes, pool=pool, dtype=dtype, backend=backend, attention=attention
        )
        self.memory = memory
        self.prompt_settings = settings
        self._make_prompts()

    @property
    def memory(self) -> str:
        """What is kept for backward; both names mean the same here."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        _check_memory(memory)
        self._memory = memory

    def _make_prompts(self) -> None:
        location, m = self.prompt_settings.prompt_location, self.prompt_settings.num_prompts
        (height, width), device = self.image_size, self.backbone.device
        if location == "pad":
            self.prompts, self.prompts_sides = border_prompts(self.backbone, m)
            return
        bound = self._widen_first_convolution(m)
        error = _refusal(self.backbone, self.backbone.in_chans + m, (height, width))
        if error is not None:
            name = self._backbone_config.name
            network = name or f"a {type(self.backbone.stem).__name__}"
            raise ValueError(
                f"prompt_location: got 'concat-channel' with {network}, which takes no {m} more "
                "channels in its first convolution alone, as where several read the image; want 'pad': "
                f"{error}"
            )
        self.prompts = nn.Parameter(torch.empty(1, m, height, width, device=device).uniform_(-bound, bound))

    def _widen_first_convolution(self, extra: int) -> float:
        """Adds `extra` input channels to the first convolution and trains all of it, in at least float32.

        Returns:
            Bound of the uniform distribution that initialises the new weights.
        """
        first = self.backbone.stem.get_submodule(self.backbone.first_name)
        frozen: nn.Conv2d = first.conv if isinstance(first, FrozenConv2d) else first
        if "weight" not in frozen._parameters:
            raise ValueError(
                f"prompt_location: got 'concat-channel' with a backbone whose {self.backbone.first_name} "
                "computes its weight in every call, by a parametrisation or pruning; want it without "
                "(parametrize.remove_parametrizations, prune.remove), or 'pad'"
            )
        trained = copy.deepcopy(frozen)
        trained.in_channels += extra
        bound = init_bound(self.patch_size, frozen.out_channels)
        wide = torch.promote_types(frozen.weight.dtype, torch.float32)
        weight = frozen.weight.to(wide)
        new = weight.new_empty(weight.shape[0], extra, *weight.shape[2:]).uniform_(-bound, bound)
        trained.weight = nn.Parameter(torch.cat((weight, new), dim=1))
        if frozen.bias is not None:
            trained.bias = nn.Parameter(frozen.bias.detach().to(wide, copy=True))
        self.backbone.stem.set_submodule(self.backbone.first_name, trained)
        return bound

    def _options(self) -> dict[str, Any]:
        names = ("num_prompts", "prompt_type", "prompt_location")
        settings = asdict(self.prompt_settings)
        return {**super()._options(), **{name: settings[name] for name in names}}

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self._features(self.forward_features(images))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the last feature map: timm's `forward_features` of images with
        their prompts.

        Returns:
            (B, d', H', W'), in the dtype of the weights or autocast's; with a border, of the image and its
            border.

        Raises:
            ValueError: images of the wrong shape.
        """
        self._check_images(images)
        if self.prompt_settings.prompt_location == "pad":
            images = pad_image(images, self.prompts, self.prompts_sides, self.prompt_settings.border)
        else:
            images = torch.cat((images, self.prompts.expand(images.shape[0], -1, -1, -1)), dim=1)
        return self.backbone.run_folded(images, Read.PATCHES)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        return self._counted_training_bytes(batch_size)


def _check_memory(memory: str) -> None:
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r} with a ConvNet, want {' or '.join(map(repr, MEMORY))}")


def border_prompts(backbone: FrozenConvNet | WholeBackbone, border: int) -> tuple[nn.Parameter, nn.Parameter]:
    """`prompts` and `prompts_sides` for a border of `border` pixels around a ConvNet's images, as
    `prompts.pad_image` takes them; uniform in [0, 1], as in the official code.

    Raises:
        ValueError: the backbone's images are not RGB, or it does not accept their size with the border: some
            accept only multiples of 32 pixels.
    """
    if backbone.in_chans != 3:
        raise ValueError(
            f"prompt_location: got 'pad' with a backbone for {backbone.in_chans} channels; "
            "its border is made of RGB pixels"
        )
    height, width = backbone.image_size
    bordered = height + 2 * border, width + 2 * border
    error = _refusal(backbone, backbone.in_chans, bordered)
    if error is not None:
        raise ValueError(
            f"num_prompts: got {border} with images of {height}x{width}, and the backbone takes none of "
            f"{bordered[0]}x{bordered[1]}, their size with the border: {error}"
        )
    rows = torch.rand(1, 3, 2 * border, width + 2 * border, device=backbone.device)
    sides = torch.rand(1, 3, height, 2 * border, device=backbone.device)
    return nn.Parameter(rows), nn.Parameter(sides)


def _refusal(backbone: FrozenConvNet | WholeBackbone, channels: int, size: tuple[int, int]) -> str | None:
    """The network's error for images with this many channels and this (height, width), found by running it
    on the meta device; None if it accepts them."""
    hollow = on_meta(backbone)
    image = torch.empty(1, channels, *size, device="meta", dtype=dtype_of(hollow, default=torch.float32))
    try:
        with torch.no_grad():
            hollow.stem.forward_features(image)
    except (RuntimeError, AssertionError) as error:
        return str(error) or type(error).__name__
    return None
