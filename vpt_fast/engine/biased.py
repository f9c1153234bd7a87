"""Blocks that add a bias by relative position to attention's scores (Bao et al., BEiT, ICLR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.call import Rotation, Windows
from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockSpec, BlockWeights, require_frozen
from vpt_fast.kernels import Backend
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias


class FrozenBiasedBlock(FrozenBlock):
    """A frozen block with a bias on the scores of the image's tokens, and none on those of or with prompts:
    attention in windows, with one window that holds all tokens.

    Args:
        spec, weights, backend: as for `FrozenBlock`.
        relative_bias: `WindowBias.bias` of the image's tokens. Prompts among the block's N tokens, which an
            earlier block computed, come behind these.
    """

    in_windows = True

    relative_bias: torch.Tensor

    def __init__(
        self, spec: BlockSpec, weights: BlockWeights, backend: Backend, *, relative_bias: torch.Tensor
    ) -> None:
        super().__init__(spec, weights, backend)
        self.relative_bias = nn.Parameter(relative_bias, requires_grad=False)

    def windows(self, num_tokens: int) -> Windows:
        require_frozen(self.relative_bias)
        num_placed = self.relative_bias.shape[1]
        return Windows(WindowBias(self.relative_bias, None), num_behind=num_tokens - num_placed)

    def rows_computed(self, rows: tuple[int, int], num_tokens: int) -> tuple[int, int]:
        """Attention in windows has the rows of all tokens, or of none."""
        start, stop = rows
        return rows if start >= num_tokens else (0, max(stop, num_tokens))

    def forward(
        self,
        stream: Stream,
        prompts: torch.Tensor | None,
        rows: tuple[int, int],
        policy: MemoryPolicy,
        rotation: Rotation | None = None,
        *,
        key_value: bool = False,
    ) -> Stream:
        computed = self.rows_computed(rows, stream.num_tokens)
        output = super().forward(stream, prompts, computed, policy, rotation, key_value=key_value)
        if computed == rows:
            return output
        wanted = slice(rows[0] - computed[0], rows[1] - computed[0])
        return Stream(*(None if part is None else part[:, wanted] for part in output))

    def attention_probabilities(
        self, stream: Stream, prompts: torch.Tensor | None, rows: tuple[int, int], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        computed = self.rows_computed(rows, stream.num_tokens)
        found = super().attention_probabilities(stream, prompts, computed, *args, **kwargs)
        return found[:, :, rows[0] : rows[1]]
