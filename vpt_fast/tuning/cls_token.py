"""ClsTokenTuning trains the CLS token of a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.resolve import VIT
from vpt_fast.engine import cost
from vpt_fast.engine.contexts import compute_dtype
from vpt_fast.engine.plan import row_range
from vpt_fast.engine.policy import POLICIES
from vpt_fast.tuning.folded import FoldedClassifier


class ClsTokenTuning(FoldedClassifier):
    """Trains the CLS token that enters the first block, and the head; all blocks are frozen.

    Args and errors are those of `LinearProbe` with a vision transformer; one without a CLS token raises
    ValueError too.
    """

    kinds = (VIT,)

    def _check_model(self, model: Any) -> None:
        if model.cls_token is None:
            raise ValueError("backbone: it has no CLS token to tune")

    def _unfreeze(self, model: Any) -> None:
        wide = torch.promote_types(model.cls_token.dtype, torch.float32)
        token = model.cls_token.detach().to(self.backbone.device, wide, copy=True)
        self.backbone.stem.cls_token = nn.Parameter(token)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """In the compute dtype; before and behind the blocks in the model's own."""
        num_tokens = self.backbone.num_tokens
        read = row_range(self._reads, num_tokens, self.backbone.num_prefix_tokens, 0)
        peak = cost.Peak()
        for index, block in enumerate(self.backbone.blocks):
            call = cost.BlockCall(
                block=block,
                dtype=compute_dtype(self.backbone.device.type, block.qkv_weight.dtype),
                batch_size=batch_size,
                num_tokens=num_tokens,
                rows=read if index == self.num_blocks - 1 else (0, num_tokens),
                grad_tokens=True,
                policy=POLICIES["exact"],
            )
            peak.add(call.kept_bytes(), call.workspace_bytes())
        beside = self.backbone.embed_bytes(grad_images=False) + self._bytes_behind_blocks(read[1] - read[0])
        return cost.TrainingBytes(
            weights=self._weight_bytes(), kept=peak.kept + batch_size * beside, workspace=peak.workspace
        )
