"""PromptedSegmenter: semantic segmentation by a head on the patch tokens of a tuned vision transformer.

The head is SETR's progressive upsampling (Zheng et al., CVPR 2021), as in the VPT paper's ADE20k experiments.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vpt_fast.backbones.architecture import POOLING
from vpt_fast.backbones.layers import on_meta
from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.classifier import PromptedClassifier, TunedClassifier, is_rising
from vpt_fast.engine import cost
from vpt_fast.model import PromptedViT
from vpt_fast.tuned_model import TunedModel, check_count
from vpt_fast.tuning.bias import BiasTuning, PromptAndBiasTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.probes import LinearProbe

# Classes that compute the patch tokens, by the method that trains them.
ENCODERS: dict[str, type[TunedClassifier]] = {
    "vpt-deep": PromptedViT,
    "vpt+bias": PromptAndBiasTuning,
    "linear": LinearProbe,
    "bias": BiasTuning,
    "full": FullTuning,
}

# The blocks that auxiliary heads read, as fractions of the depth: 10, 15 and 20 of ViT-L's 24.
_AUX_SHARES = (10 / 24, 15 / 24, 20 / 24)
_CLASSIFIER_STD = 0.01
_MOST_GROUPS = 32  # GroupNorm's default in its paper


class UpsamplingHead(nn.Module):
    """SETR-PUP: patch tokens to logits at the image's size, by stages that each consist of a 3×3 convolution,
    a norm, a ReLU and bilinear upsampling, and by a 1×1 convolution.

    All stages upsample by about the same factor: 2 for four stages and patches of 16 pixels. The output has
    exactly the image's size, whatever the patch size.

    Args:
        embed_dim: d of the tokens.
        num_classes: C.
        channels: output channels of each stage.
        num_stages: number of stages.
        device: of the parameters.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, channels: int, num_stages: int, device: torch.device
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, device=device)
        stages = []
        for index in range(num_stages):
            conv = nn.Conv2d(
                channels if index else embed_dim, channels, 3, padding=1, bias=False, device=device
            )
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            # Not SETR's BatchNorm: the gradients of micro-batches, or of processes, would no longer add up to
            # that of the whole batch.
            norm = nn.GroupNorm(math.gcd(_MOST_GROUPS, channels), channels, device=device)
            stages.append(nn.Sequential(conv, norm, nn.ReLU(inplace=True)))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Conv2d(channels, num_classes, 1, device=device)
        nn.init.normal_(self.classifier.weight, std=_CLASSIFIER_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, tokens: torch.Tensor, grid: tuple[int, int], image_size: tuple[int, int]
    ) -> torch.Tensor:
        """Tokens (B, N, d) of a grid of (rows, columns) = N patches to logits (B, C, H, W)."""
        x = self.norm(tokens.to(self.norm.weight.dtype))
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, d, rows, columns)
        for index, stage in enumerate(self.stages):
            if index:
                share = index / len(self.stages)
                size = [round(p * (n / p) ** share) for p, n in zip(grid, image_size, strict=True)]
                x = F.interpolate(x, size, mode="bilinear")
            x = stage(x)
        # The 1×1 convolution comes before the last upsampling, where there are fewer pixels: the two commute,
        # since the weights of an interpolation sum to 1.
        logits = self.classifier(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.interpolate(logits.to(wide), image_size, mode="bilinear")


class PromptedSegmenter(TunedModel):
    """Semantic segmentation: a vision transformer tuned by visual prompts or another method, and a trained
    SETR-PUP head on its patch tokens.

    The head reads the last block's patch tokens. In training, auxiliary heads read those of earlier blocks;
    they have two stages for patches of 16 pixels. No head reads the CLS token, prompts or the final norm's
    output: each has its own trained LayerNorm. ``"vpt-deep"`` and ``"linear"`` run the engine's blocks, the
    other methods timm's own.

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm VisionTransformer, Eva or Beit, which is
            not changed. With a name, ``img_size=512`` among the settings resamples the position embedding as
            timm does.
        num_classes: C.
        method: what is trained besides the heads: ``"vpt-deep"``: deep prompts; ``"vpt+bias"``: deep prompts
            and every bias of the backbone; ``"linear"``: nothing; ``"bias"``: every bias of the backbone;
            ``"full"``: the whole backbone.
        head_channels: output channels of the heads' stages.
        aux_blocks: indices from 0 of the blocks that auxiliary heads read; None for those at 10/24, 15/24
            and 20/24 of the depth (as in SETR on ViT-L), () for none.
        pretrained, checkpoint: see `PromptedViT`.
        settings: arguments of the method's class in `ENCODERS`, such as num_prompts, prompt_dropout, dtype,
            memory; the others are passed to timm.create_model (only with a name).

    Attributes:
        encoder: the model that computes the patch tokens, of the method's class, without its linear head.
        head: UpsamplingHead.
        aux_heads: an UpsamplingHead for each of aux_blocks.

    Raises:
        ValueError: an argument out of range, a method without segmentation, or a part of the backbone that
            is not supported; the message names it.
    """

    hub_task = "image-segmentation"

    def __init__(
        self,
        backbone: str | TimmViT,
        num_classes: int,
        method: str = "vpt-deep",
        *,
        head_channels: int = 256,
        aux_blocks: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        num_classes = check_count("num_classes", num_classes)
        if method not in tuple(ENCODERS):
            raise ValueError(f"method: got {method!r}, want one of {', '.join(map(repr, ENCODERS))}")
        head_channels = check_count("head_channels", head_channels)
        for name, wanted in (("pool", None), ("prompt_type", "deep"), ("prompt_location", "prepend")):
            if settings.get(name, wanted) != wanted:
                raise ValueError(f"{name}: got {settings[name]!r} with a segmenter, want {wanted!r}")
        constructor: Any = ENCODERS[method]
        encoder: TunedClassifier = constructor(
            # One class and this pooling are for the linear head, which is removed below.
            backbone, 1, pretrained=pretrained, checkpoint=checkpoint, **{**settings, "pool": "image"},
        )  # fmt: skip
        vit = encoder.backbone
        _check_patches(vit)
        num_blocks, last = encoder.num_blocks, encoder.num_blocks - 1
        if aux_blocks is None:
            aux_blocks = sorted({max(round(share * num_blocks), 1) - 1 for share in _AUX_SHARES} - {last})
        if not is_rising(aux_blocks, last):
            raise ValueError(
                f"aux_blocks: got {aux_blocks!r}, want rising block indices below {last}, the last block, "
                "which the head reads"
            )
        super().__init__(encoder._backbone_config)
        encoder.head = nn.Identity()  # type: ignore[assignment]
        for module in (vit.stem.norm, vit.stem.fc_norm, vit.stem.attn_pool):
            if module is not None:
                module.requires_grad_(False)  # the heads do not read its output
        self.encoder = encoder
        self.method, self.num_classes = method, num_classes
        self.head_channels, self.aux_blocks = head_channels, tuple(aux_blocks)
        self.stores_backbone = encoder.stores_backbone

        enlarged = math.log2(max(vit.patch_size))

        def head(most: int) -> UpsamplingHead:
            """A head whose stages upsample by a factor of at most `most`."""
            stages = max(math.ceil(enlarged / math.log2(most)), 1)
            return UpsamplingHead(vit.embed_dim, num_classes, head_channels, stages, vit.device)

        self.head = head(2)
        self.aux_heads = nn.ModuleList(head(4) for _ in self.aux_blocks)
        if isinstance(encoder, PromptedClassifier):
            encoder.bytes_beside = sum(self._head_bytes())

    @property
    def backbone(self) -> FrozenViT:  # type: ignore[override]
        return self.encoder.backbone

    @property
    def unread_settings(self) -> tuple[str, ...]:
        return POOLING

    @property
    def memory(self) -> str:
        """What the encoder keeps for backward, see `PromptedViT`; may be changed at any time."""
        return self.encoder.memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self.encoder.memory = memory

    @property
    def undecayed(self) -> tuple[str, ...]:  # type: ignore[override]
        aux = [f"aux_heads.{index}" for index in range(len(self.aux_blocks))]
        return tuple(f"{head}.classifier.bias" for head in ("head", *aux))

    def _options(self) -> dict[str, Any]:
        own = {
            "method": self.method,
            "head_channels": self.head_channels,
            "aux_blocks": list(self.aux_blocks),
        }
        return {**self.encoder._options(), **own}

    @classmethod
    def stores_backbone_with(cls, options: dict[str, Any]) -> bool:
        # Of a method that there is not, the constructor says so.
        method = options.get("method")
        return any(encoder.stores_backbone for name, encoder in ENCODERS.items() if name == method)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Normalised images (B, C, H, W) to logits (B, num_classes, H, W); in training to a tuple of these
        and each auxiliary head's logits, in the order of `aux_blocks`.

        Raises:
            ValueError: images of the wrong shape.
        """
        aux_blocks = self.aux_blocks if self.training else ()
        *aux, last = self.encoder.patch_tokens(images, (*aux_blocks, self.num_blocks - 1))
        size, patch = images.shape[-2:], self.patch_size
        if torch.jit.is_tracing():  # there they are tensors, which round() does not take
            size = torch.Size(map(int, size))
        grid = size[0] // patch[0], size[1] // patch[1]
        logits = self.head(last, grid, size)
        if not self.training:
            return logits
        return (
            logits,
            *(head(tokens, grid, size) for head, tokens in zip(self.aux_heads, aux, strict=True)),
        )

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """The encoder's own estimate, plus what heads and cross entropy keep, counted on the meta device in
        the heads' dtype (under autocast it is less)."""
        sizes = self._head_bytes()
        kept, workspace = batch_size * sum(sizes), self.backbone.folded_workspace(batch_size)
        if self.method != "linear":
            encoder = self.encoder._training_bytes(batch_size)
            workspace = encoder["workspace"]
            # With a memory policy, it counts the heads among what is beside its blocks.
            kept = encoder["kept"] + (0 if isinstance(self.encoder, PromptedClassifier) else kept)
        return cost.TrainingBytes(
            weights=self._weight_bytes(),
            kept=kept,
            workspace=max(workspace, 2 * batch_size * max(sizes)),
        )

    @torch.inference_mode(False)  # in inference mode autograd saves nothing that could be counted
    def _head_bytes(self) -> list[int]:
        """Bytes of each tensor that heads and loss keep for backward, for one image of the model's size."""
        vit, size = self.backbone, self.image_size
        grid = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        heads = on_meta(nn.ModuleList([self.head, *self.aux_heads]))
        dtype = torch.promote_types(self.head.norm.weight.dtype, torch.float32)
        labels = torch.empty(1, *size, dtype=torch.int64, device="meta")
        with cost.counting_kept(heads) as kept_sizes:
            for head in heads:
                tokens = torch.empty(1, math.prod(grid), vit.embed_dim, dtype=dtype, device="meta")
                F.cross_entropy(head(tokens, grid, size), labels)
        return kept_sizes()


def _check_patches(vit: FrozenViT) -> None:
    """Raises ValueError for a backbone whose tokens are not a grid of patches."""
    if vit.pads_images:
        raise ValueError("backbone: dynamic_img_pad pads images, and a segmenter needs whole patches")
    if not isinstance(vit.stem.patch_drop, nn.Identity | None):
        raise ValueError("backbone: patch_drop_rate leaves patches out, and a segmenter needs all of them")
