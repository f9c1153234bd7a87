"""BiasTuning: the biases of a backbone. PromptAndBiasTuning: deep prompts too, of a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind
from vpt_fast.backbones.timm_eva import TimmViT
from vpt_fast.backbones.timm_vit import Positions
from vpt_fast.prompts import PromptConfig, drop, init_bound
from vpt_fast.tuning.timm_blocks import TimmClassifier


class BiasTuning(TimmClassifier):
    """Every bias of a vision transformer, Swin or ConvNet trained, and the head: BitFit (Ben Zaken et al.,
    ACL 2022).

    A bias's gradient is a sum of output gradients, so that nothing is kept beside what the gradient of the
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


class PromptAndBiasTuning(BiasTuning):
    """Deep prompts in every block and every bias of the vision transformer trained: VPT + bias of the VPT
    paper.

    Prompts are keys and values, for all images at once where they are the same, and nothing else of them is
    computed: what concatenation computes beside has no part in the loss, nor in any bias's gradient.

    Args:
        num_prompts: m, prompts of each block; the standard start, see `prompts.init_bound`.
        prompt_dropout, prompt_dropout_per: see `prompts.PromptConfig`.
        The others are those of `TimmClassifier`.

    Attributes:
        prompts: (L, m, d).

    Raises:
        ValueError: as `TimmClassifier`, and for prompt settings out of range.
    """

    kinds = (VIT,)

    def __init__(
        self,
        backbone: str | TimmViT,
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
        bound = init_bound(self.patch_size, self.embed_dim)
        shape = (self.num_blocks, num_prompts, self.embed_dim)
        self.prompts = nn.Parameter(torch.empty(shape, device=self.backbone.device).uniform_(-bound, bound))

    def _options(self) -> dict[str, Any]:
        names = ("num_prompts", "prompt_dropout", "prompt_dropout_per")
        return {**super()._options(), **{name: getattr(self.prompt_settings, name) for name in names}}

    def _outputs(self, x: torch.Tensor, positions: Positions, wanted: Sequence[int]) -> list[torch.Tensor]:
        p = self.prompt_settings.prompt_dropout if self.training else 0.0
        sets = self.prompts.to(x.dtype).unsqueeze(1).unbind(0)  # L of (1, m, d)
        outputs = []
        for index, prompts in enumerate(sets[: wanted[-1] + 1]):
            prompts = drop(prompts, p, self.prompt_settings.prompt_dropout_per, x.shape[0])
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
