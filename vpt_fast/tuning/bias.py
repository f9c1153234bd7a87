"""BiasTuning trains the biases of a backbone; PromptAndBiasTuning, PromptAndBiasSwinTuning and
PromptAndBiasConvNetTuning also train prompts, of a vision transformer, a Swin and a ConvNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.layers import linear_parts, require_no_hooks
from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind
from vpt_fast.backbones.timm_swin import check_swin, prompted_attention_branch
from vpt_fast.backbones.timm_vit import Positions
from vpt_fast.convnet import border_prompts
from vpt_fast.prompts import PromptConfig, drop, init_bound, pad_image, refuse_settings, split_sets
from vpt_fast.swin import POOLS
from vpt_fast.tuning.timm_blocks import TimmClassifier


class BiasTuning(TimmClassifier):
    """Trains every bias of a vision transformer, Swin or ConvNet, and the head: BitFit (Ben Zaken et al.,
    ACL 2022).

    A bias's gradient is a sum of output gradients, so nothing is kept besides what the gradient of the
    residual stream needs.

    Args and errors are those of `TimmClassifier`.
    """

    kinds: tuple[Kind, ...] = (VIT, SWIN, CONVNET)

    def __init__(self, backbone: str | nn.Module, num_classes: int, **settings: Any) -> None:
        super().__init__(backbone, num_classes, **settings)
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
        self._freeze_what_is_not_read()


class _PromptAndBiasTuning(BiasTuning):
    """Common base for vision transformers and Swins, whose prompts are tokens."""

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        num_prompts: int,
        *,
        prompt_dropout: float = 0.0,
        prompt_dropout_per: str = "image",
        **settings: Any,
    ) -> None:
        prompt_settings = PromptConfig(
            num_prompts, prompt_dropout=prompt_dropout, prompt_dropout_per=prompt_dropout_per
        )
        super().__init__(backbone, num_classes, **settings)
        self.prompt_settings = prompt_settings
        self._make_prompts(num_prompts)

    def _make_prompts(self, num_prompts: int) -> None:
        """Creates `prompts`."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        names = ("num_prompts", "prompt_dropout", "prompt_dropout_per")
        return {**super()._options(), **{name: getattr(self.prompt_settings, name) for name in names}}


class PromptAndBiasTuning(_PromptAndBiasTuning):
    """Trains deep prompts in every block, every bias of the vision transformer, and the head: VPT + bias of
    the VPT paper.

    Only the prompts' keys and values are computed, once for all images where the prompts are the same. What
    else concatenation computes for prompts affects neither the loss nor any bias's gradient.

    Args:
        backbone, num_classes, settings: see `TimmClassifier`.
        num_prompts: m: prompts of each block, initialised as `prompts.init_bound` says.
        prompt_dropout, prompt_dropout_per: see `prompts.PromptConfig`.

    Attributes:
        prompts: (L, m, d).

    Raises:
        ValueError: as `TimmClassifier`, and for prompt settings out of range.
    """

    kinds = (VIT,)

    def _make_prompts(self, num_prompts: int) -> None:
        for index, block in enumerate(self.backbone.timm_blocks):
            _check_read_attention(block, f"backbone: blocks.{index}")
        bound = init_bound(self.patch_size, self.embed_dim)
        shape = (self.num_blocks, num_prompts, self.embed_dim)
        self.prompts = nn.Parameter(torch.empty(shape, device=self.backbone.device).uniform_(-bound, bound))

    def _outputs(self, x: torch.Tensor, positions: Positions, wanted: Sequence[int]) -> list[torch.Tensor]:
        sets = split_sets(self.prompts.to(x.dtype))  # L of (1, m, d)
        outputs = []
        for index, prompts in enumerate(sets[: wanted[-1] + 1]):
            prompts = drop(prompts, self.prompt_settings, x.shape[0], training=self.training)
            vit, block = self.backbone, self.backbone.timm_blocks[index]
            update = vit.prompted_attention_branch(block, x, prompts, positions[index])
            x = x + block.drop_path1(update)
            x = x + block.drop_path2(vit.mlp_branch(block, x))
            if index in wanted:
                outputs.append(x)
        return outputs

    def _num_kept_beside(self) -> int:
        # Every image's copy of the prompts' keys and values.
        block: Any = self.backbone.timm_blocks[0]
        return self.num_blocks * 2 * self.prompts.shape[1] * block.attn.proj.in_features


class PromptAndBiasSwinTuning(_PromptAndBiasTuning):
    """Trains deep prompts in every window of every block, every bias of a Swin, and the head: VPT + bias of
    the VPT paper, with prompts as in `PromptedSwin`. Relative position bias tables stay frozen.

    Only the prompts' keys and values are computed, once for all windows and images where the prompts are the
    same. What else concatenation computes for prompts does not affect the loss, except in the last block if
    the head reads their outputs.

    Args:
        backbone, num_classes, settings: see `TimmClassifier`; `pool` as for `PromptedSwin`.
        num_prompts: m: prompts of each block, initialised as `prompts.init_bound` says.
        prompt_dropout, prompt_dropout_per: see `prompts.PromptConfig`.

    Attributes:
        prompts: a tensor (blocks, m, d) per stage.

    Raises:
        ValueError: as `TimmClassifier`, and for prompt settings out of range.
    """

    kinds = (SWIN,)
    pools_of_whole = POOLS

    def _make_prompts(self, num_prompts: int) -> None:
        swin: Any = self.backbone.stem
        check_swin(swin)
        for index, stage in enumerate(swin.layers):
            for place, block in enumerate(stage.blocks):
                where = f"backbone: layers.{index}.blocks.{place}"
                _check_read_attention(block, where)
                linear_parts(block.attn.qkv, f"{where}.attn.qkv")
        stages = [(len(stage.blocks), int(stage.blocks[0].dim)) for stage in swin.layers]
        bound = init_bound(self.patch_size, stages[0][1])  # for all stages, as in `PromptedSwin`
        self.prompts = nn.ParameterList(
            torch.empty(depth, num_prompts, width, device=self.backbone.device).uniform_(-bound, bound)
            for depth, width in stages
        )

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        self._check_images(images)
        network: Any = self.backbone
        swin = network.stem
        x = swin.patch_embed(network.cast(images))  # (B, height, width, d)
        for stage, prompts in zip(swin.layers, self.prompts, strict=True):
            x = stage.downsample(x)
            for block, own in zip(stage.blocks, split_sets(prompts), strict=True):
                x = self._run_swin_block(block, x, own, is_last=block is swin.layers[-1].blocks[-1])
        return swin.forward_head(swin.norm(x), pre_logits=True).to(self._feature_dtype)

    def _run_swin_block(
        self, block: Any, x: torch.Tensor, prompts: torch.Tensor, *, is_last: bool
    ) -> torch.Tensor:
        """Tokens (B, height, width, d) and prompts (1, m, d) to tokens; in the last block, to the R rows that
        the head reads (B, 1, R, d)."""
        size = x.shape[1:3]
        prompts = drop(prompts.to(x.dtype), self.prompt_settings, x.shape[0], training=self.training)
        reads_prompts = is_last and self.pool != "image"
        update = prompted_attention_branch(block, x, prompts, reads_prompts=reads_prompts)
        x = x.flatten(1, 2)
        if reads_prompts:
            x = torch.cat((x, prompts.expand(x.shape[0], -1, -1)), dim=1)
        x = x + block.drop_path1(update)
        if is_last and self.pool == "prompts":
            x = x[:, -prompts.shape[1] :]
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
        return x.unsqueeze(1) if is_last else x.unflatten(1, size)


def _check_read_attention(block: Any, where: str) -> None:
    """Raises ValueError for hooks of the block or its attention, which prompted attention does not call."""
    require_no_hooks(block, where, below=False)
    require_no_hooks(block.attn, f"{where}.attn")


class PromptAndBiasConvNetTuning(BiasTuning):
    """Trains prompts that are a border of pixels around the image, every bias of the ConvNet, and the head:
    VPT + bias of the VPT paper, with prompts as in `PromptedConvNet`.

    Args:
        backbone, num_classes: see `TimmClassifier`.
        num_prompts: m: pixels of border on each side.
        settings: see `TimmClassifier`; other settings of `prompts.PromptConfig` must have their default
            values.

    Attributes:
        prompts, prompts_sides: as in `PromptedViT` with ``pad``.

    Raises:
        ValueError: as `TimmClassifier`, for prompt settings out of range, and for a backbone that does not
            accept images of the size with the border.
    """

    kinds = (CONVNET,)

    def __init__(
        self, backbone: str | nn.Module, num_classes: int, num_prompts: int, **settings: Any
    ) -> None:
        prompt_settings = PromptConfig(num_prompts, "shallow", prompt_location="pad")
        refuse_settings(settings, "a ConvNet, whose prompts are pixels")
        super().__init__(backbone, num_classes, **settings)
        self.prompt_settings = prompt_settings
        network: Any = self.backbone
        self.prompts, self.prompts_sides = border_prompts(network, prompt_settings.border)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "num_prompts": self.prompt_settings.num_prompts}

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        self._check_images(images)
        images = pad_image(images, self.prompts, self.prompts_sides, self.prompt_settings.border)
        return self.backbone(images).to(self._feature_dtype)
