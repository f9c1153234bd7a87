"""What one call of a block has to compute, and what backward needs of it.

Shapes, here and in `engine.passes`: B images, N image-side tokens (CLS, registers, patches), m prompts, R
rows that are read, d width, H heads of D, h MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.engine.weights import BlockSpec
from vpt_fast.kernels import Ops
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias


class Windows(NamedTuple):
    """The windows that a block's tokens attend in. The tokens are ordered window by window, W times T.

    bias: what attention adds to the scores.
    num_behind: tokens behind those of a single window, which attend with them, without a bias.
    pads, pad_kv: where the windows reach past the image, the positions (P,) among the N that hold no token,
        and the key and value (2, H, D) there; else None.
    """

    bias: WindowBias
    num_behind: int = 0
    pads: torch.Tensor | None = None
    pad_kv: torch.Tensor | None = None


class Rotation(NamedTuple):
    """Rotary positions of a block's P patches, see `kernels.rotation.reference`. All other tokens, and all
    prompts, have none.

    sin, cos: (P, 1 or H, D/2), of the angles by which queries and keys are rotated.
    start: index of the first patch among the N tokens.
    """

    sin: torch.Tensor
    cos: torch.Tensor
    start: int


@dataclass(frozen=True)
class Call:
    """What one call of a block has to compute.

    image, fresh: the ranges of the N image-side tokens and of the m prompts whose output is read.
    key_value: prompts are keys and values, not tokens, and none is read.
    dtype: of the matmuls, of what is kept and of the gradient of the block's output.
    grad_tokens: whether anything below is trained. grad_dtype: of the tokens' gradient.
    """

    spec: BlockSpec
    ops: Ops
    image: slice
    fresh: slice
    packed: bool  # every image-side token and no prompt is read, and the tokens' gradient is wanted
    dtype: torch.dtype
    grad_tokens: bool
    grad_dtype: torch.dtype
    policy: MemoryPolicy
    windows: Windows | None  # None: every token attends to every other
    key_value: bool

    @property
    def num_image_rows(self) -> int:
        return self.image.stop - self.image.start

    @property
    def num_fresh_rows(self) -> int:
        return self.fresh.stop - self.fresh.start

    @property
    def keeps_image_keys(self) -> bool:
        """Whether backward needs the image's keys and values: a gradient flows through them into the tokens,
        or into the queries of prompts whose outputs are read."""
        return self.grad_tokens or self.num_fresh_rows > 0


@dataclass(slots=True)
class Kept:
    """What backward needs, and nothing else."""

    # For a block that is recomputed in backward; until then all other fields are None.
    tokens: torch.Tensor | None = None  # (B, N, d), the residual stream's sum
    prompts: torch.Tensor | None = None  # (1 or B, m, d), or (1 or B, m, 2·H·D) if they are keys and values
    x_hat1: torch.Tensor | None = None  # (B, N, d); None where the tokens' gradient is not wanted
    rstd1: torch.Tensor | None = None  # (B, N, 1)
    # Queries, keys and values: None where backward recomputes them.
    qkv: torch.Tensor | None = None  # (B, N, 3, H, D) of a call that is `packed`, else
    q: torch.Tensor | None = None  # (B, R, H, D) and
    kv: torch.Tensor | None = None  # (B, N, 2, H, D), None where no gradient flows through the image's keys
    q_rstd: torch.Tensor | None = None  # (B, R, H, 1), only with query-key normalisation; q, k are then q̂, k̂
    k_rstd: torch.Tensor | None = None  # (B, N, H, 1)
    prompt_x_hat: torch.Tensor | None = None  # (1 or B, m, d); None if prompts are keys and values
    prompt_rstd: torch.Tensor | None = None  # (1 or B, m, 1)
    prompt_kv: torch.Tensor | None = None  # (1 or B, m, 2, H, D)
    prompt_k_rstd: torch.Tensor | None = None  # (1 or B, m, H, 1)
    out: torch.Tensor | None = None  # (B, R, H, D)
    lse: torch.Tensor | None = None  # (B, H, R); in windows a prompt has W of them
    # With scale None x̂ itself, else its int8 codes.
    x_hat2: torch.Tensor | None = None  # (B, R, d)
    scale2: torch.Tensor | None = None  # (B, R, 1)
    rstd2: torch.Tensor | None = None  # (B, R, 1)
    mlp: torch.Tensor | None = None  # (B, R, h): the MLP's pre-activation, or codes of the derivative there
    mlp_scale: torch.Tensor | None = None  # (B, R, 2), of a gated activation's codes
    x_hat3: torch.Tensor | None = None  # (B, R, h), h/2 of a gated activation: only with a norm after it
    scale3: torch.Tensor | None = None  # (B, R, 1)
    rstd3: torch.Tensor | None = None  # (B, R, 1)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def release_mlp(self) -> None:
        """Drops what the MLP's half alone needs. This frees it in a recomputed block: nothing else holds
        it."""
        self.x_hat2 = self.scale2 = self.rstd2 = self.mlp = self.mlp_scale = None
        self.x_hat3 = self.scale3 = self.rstd3 = None
