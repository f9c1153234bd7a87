"""PromptedSwin: visual prompt tuning of a frozen Swin transformer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.resolve import SWIN, resolve_backbone
from vpt_fast.backbones.timm_swin import FrozenSwin
from vpt_fast.classifier import PromptedClassifier, check_arguments
from vpt_fast.engine import cost
from vpt_fast.engine.policy import MemoryPolicy, check_memory
from vpt_fast.engine.stream import Stream
from vpt_fast.prompts import (
    PromptConfig,
    PromptShapes,
    check_given,
    drop,
    fill_from_tokens,
    init_bound,
    mask_bytes,
    refuse_settings,
    require_sequence,
    require_shape,
    split_sets,
)

POOLS = ("image", "prompts", "image_and_prompts")


class PromptedSwin(PromptedClassifier):
    """A frozen Swin transformer tuned by visual prompts (Jia et al., ECCV 2022).

    Prompts join the tokens of every window, without relative position bias or mask; a prompt's output is the
    mean over its image's windows. Deep prompts are new in every block. Shallow ones enter the first block and
    pass through all others; patch merging concatenates four copies of a prompt. Logits, loss and gradients
    equal those of concatenation in every window, without its unnecessary work (see `engine.windows`). Each
    image is computed on its own, whereas the official code passes the shallow prompts of one image to windows
    of others.

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm SwinTransformer, whose weights are used
            as they are and which is not changed.
        num_classes: outputs of the head.
        num_prompts: m: prompts of each block that gets new ones.
        prompt_type, prompt_dropout, prompt_dropout_per: see `prompts.PromptConfig`.
        pool: the tokens whose mean the head reads, after the final norm: None for ``"image_and_prompts"``,
            as in the official code; ``"image"``; ``"prompts"``.
        dtype, memory: as for `PromptedViT`. Patch merging keeps its normalised input, in 8 bits under
            ``"compact"``, and is never recomputed.
        backend: see `kernels.get_backend`.
        attention: ``"auto"``: no FlashAttention implementation supports the windows' bias.
        pretrained: load the published weights (only with a name).
        checkpoint: load the weights from this file instead (only with a name), see docs/backbones.md.
        timm_kwargs: passed to timm.create_model (only with a name), except the other settings of
            `prompts.PromptConfig`, which must have their default values.

    Attributes:
        prompts: the trained prompts: a tensor (blocks, m, d) per stage; if shallow, one tensor (1, m, d).
        head: nn.Linear, from d features of the last stage to logits.

    Raises:
        ValueError: an argument out of range, a prompt setting that PromptedSwin does not have, or a part of
            the backbone that is not supported; the message names it.
    """

    backbone: FrozenSwin  # type: ignore[assignment]

    def __init__(
        self,
        backbone: str | SwinTransformer,
        num_classes: int,
        num_prompts: int,
        prompt_type: str = "deep",
        *,
        prompt_dropout: float = 0.0,
        prompt_dropout_per: str = "image",
        pool: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        memory: str = "exact",
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        # Not an attention by name: what is refused here anyway need not be installed to be told so.
        check_arguments(num_classes, pool, dtype, backend)
        check_memory(memory)
        if pool not in (None, *POOLS):
            wanted = ", ".join(map(repr, POOLS))
            raise ValueError(f"pool: got {pool!r} with a SwinTransformer, want None or one of {wanted}")
        refuse_settings(
            timm_kwargs,
            "a SwinTransformer, whose prompts are prepended in every window, each block's own or the first's",
        )
        settings = PromptConfig(
            num_prompts=num_prompts,
            prompt_type=prompt_type,
            prompt_dropout=prompt_dropout,
            prompt_dropout_per=prompt_dropout_per,
        )
        swin, origin = resolve_backbone(backbone, pretrained, timm_kwargs, checkpoint=checkpoint, kind=SWIN)
        super().__init__(
            swin,
            origin,
            num_classes,
            pool=pool,
            dtype=dtype,
            backend=backend,
            attention=attention,
            memory=memory,
        )
        self.prompt_settings = settings
        self._is_deep = prompt_type == "deep"
        # As in the official code, the first stage's width gives the bound for all stages.
        bound = init_bound(self.patch_size, self.backbone.stages[0][1])
        stages = self.backbone.stages if self._is_deep else ((1, self.backbone.stages[0][1]),)
        self._prompt_shapes = [(depth, num_prompts, width) for depth, width in stages]
        self.prompts = nn.ParameterList(
            torch.empty(shape, device=self.backbone.device).uniform_(-bound, bound)
            for shape in self._prompt_shapes
        )

    def _options(self) -> dict[str, Any]:
        names = ("num_prompts", "prompt_type", "prompt_dropout", "prompt_dropout_per")
        return {**super()._options(), **{name: getattr(self.prompt_settings, name) for name in names}}

    def forward(self, images: torch.Tensor, prompts: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Normalised images (B, C, H, W) to logits (B, num_classes).

        Args:
            images: (B, C, H, W).
            prompts: used in place of `self.prompts`: a tensor for each of its tensors, of the same shape, or
                (B, *shape) where each image has prompts of its own, see `PromptedViT.forward`. None: the
                model's own.

        Raises:
            ValueError: images or prompts of the wrong shape.
        """
        return self.head(self.image_features(images, prompts))

    def image_features(
        self, images: torch.Tensor, prompts: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """As of every model; `prompts` as for `forward`."""
        tokens, outputs = self._outputs(images, prompts, self._rows(self.num_blocks - 1))
        return self._features(tokens if outputs is None else torch.cat((tokens, outputs), dim=1))

    def forward_features(
        self, images: torch.Tensor, prompts: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the image's tokens after the final norm, without the prompts.

        Like timm's `forward_features` of the backbone, but influenced by the prompts.

        Args: as for `forward`.

        Returns:
            (B, H', W', d), the grid of the last stage, in the residual stream's dtype.

        Raises:
            ValueError: as `forward`.
        """
        last = self.backbone.blocks[-1]
        tokens, _ = self._outputs(images, prompts, (0, last.num_tokens))
        return self.backbone.normalize(tokens).to(tokens.dtype).unflatten(1, last.size)

    @torch.no_grad()
    def init_prompts_from(self, images: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """As of `PromptedViT`. A token of a later stage is of a patch that an earlier one has merged."""
        self._check_images(images)
        for index, (stage, shape) in enumerate(zip(self.prompts, self._prompt_shapes, strict=True)):
            require_shape(stage, shape, f"prompts.{index}")
        sets = [prompts for stage in self.prompts for prompts in stage]
        fill_from_tokens(sets, self.backbone.folded_inputs(images), generator)

    def _outputs(
        self, images: torch.Tensor, given: Sequence[torch.Tensor] | None, last_rows: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs images through all blocks, with the prompts that are given in place of the model's own.
        Returns what is read of the last one's output, its rows `last_rows`: tokens (B, N, d) in row-major
        order, and prompts (B, m, d), None if none are read."""
        self._check_images(images)
        stream = Stream(self.backbone.embed(images))
        batch = images.shape[0]
        sets = self._prompt_sets(given, batch)
        policy = self._policy(batch, self.backbone.num_tokens, None if given is None else sets)
        prompts: torch.Tensor | None = None
        for index, block in enumerate(self.backbone.blocks):
            stream, prompts = self.backbone.enter(index, stream, prompts, policy)
            if index < len(sets):
                prompts = drop(sets[index], self.prompt_settings, batch, training=self.training)
            rows = last_rows if index == self.num_blocks - 1 else self._rows(index)
            num_fresh = rows[1] - block.num_tokens
            stream, prompts = block(stream, prompts, rows, policy), None
            if num_fresh:
                stream, flowed = stream.split(num_fresh)
                prompts = flowed.sum()
                del flowed  # a view, which would keep this block's output alive while the next one runs
        tokens = self.backbone.leave(stream) if stream.num_tokens else stream.sum()
        return tokens, prompts

    def _prompt_sets(self, given: Sequence[torch.Tensor] | None, batch_size: int) -> list[torch.Tensor]:
        """New prompts for each block that gets some: all blocks if deep, else the first; (1, m, d), or
        (B, m, d) where those given are different for each image."""
        stages: Sequence[torch.Tensor] = list(self.prompts)
        for index, (stage, shape) in enumerate(zip(stages, self._prompt_shapes, strict=True)):
            require_shape(stage, shape, f"prompts.{index}")
        if given is not None:
            require_sequence(given, len(stages), f"a sequence of {len(stages)}, as the model's own")
            stages = [
                check_given(stage, own.shape, own, batch_size, f"prompts.{index}")
                for index, (stage, own) in enumerate(zip(given, stages, strict=True))
            ]
        return [prompts for stage in stages for prompts in split_sets(stage)]

    def _rows(self, index: int) -> tuple[int, int]:
        """Half-open range of the rows that are read of a block's output: N tokens, then m prompts."""
        num_tokens, m = self.backbone.blocks[index].num_tokens, self.prompt_settings.num_prompts
        if index < self.num_blocks - 1:
            return 0, num_tokens + (0 if self._is_deep else m)
        return (
            num_tokens if self.pool == "prompts" else 0,
            num_tokens if self.pool == "image" else num_tokens + m,
        )

    def _num_rows_read(self, num_tokens: int, given: PromptShapes | None) -> int:
        del num_tokens, given  # fixed: a Swin has one image size, and m is the model's own
        first, last = self._rows(self.num_blocks - 1)
        block = self.backbone.blocks[-1]
        tokens = 0 if first else math.prod(block.size)  # without those that fill windows up
        return tokens + last - block.num_tokens

    def _step_bytes(
        self,
        batch_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        policy: MemoryPolicy,
        given: PromptShapes | None = None,
    ) -> tuple[int, int]:
        """As of every model; blocks, and the merges between stages."""
        del num_tokens  # fixed: a Swin has one image size
        settings = self.prompt_settings
        m = settings.num_prompts
        num_sets = self.num_blocks if self._is_deep else 1
        shapes = ((1, m),) * num_sets if given is None else given
        peak = cost.Peak()
        for index, block in enumerate(self.backbone.blocks):
            rows, flowed = self._rows(index), index >= num_sets
            per_image = flowed or settings.masks_per_image
            call = cost.BlockCall(
                block=block,
                dtype=dtype,
                batch_size=batch_size,
                num_tokens=block.num_tokens,
                rows=rows,
                prompt_shape=(batch_size, m) if per_image else shapes[index],
                grad_tokens=index > 0 or self.backbone.trains_embedding,
                policy=policy,
                # What flows is an earlier block's output: for a single image it looks like shared prompts.
                prompts_formed=flowed or settings.prompt_dropout > 0.0,
            )
            kept = call.kept_bytes()
            if not flowed:
                kept += mask_bytes(settings, batch_size, (m, block.proj_weight.shape[0]), self.prompts[0])
            kept += self.backbone.kept_on_entering(index, batch_size, m if flowed else 0, dtype, policy)
            peak.add(kept, self.backbone.workspace_bytes(call))
        return peak.kept, peak.workspace
