"""What a training step keeps in memory, in closed form.

`kept_bytes` mirrors the tensors that `engine.block` hands to save_for_backward, one term each.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.kernels.mlp.reference import PACKED


class TrainingBytes(TypedDict):
    """Bytes of a training step. weights: all parameters, and gradient and momentum of the trained ones.
    kept: for backward, exact for the blocks. workspace: temporaries of the largest block, an estimate."""

    weights: int
    kept: int
    workspace: int


def kept_bytes(
    block: FrozenBlock,
    *,
    dtype: torch.dtype,
    batch_size: int,
    num_tokens: int,
    rows: tuple[int, int],
    prompt_shape: tuple[int, int] | None,
    grad_tokens: bool,
    policy: MemoryPolicy,
    residual_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that one call of a block keeps for backward.

    Args:
        block: the block.
        dtype: of its matrix products.
        batch_size: B.
        num_tokens: N, the tokens in its input.
        rows: the half-open range of rows that it computes.
        prompt_shape: (1 or B, m) of the prompts that enter it, or None.
        grad_tokens: whether anything below it is trained.
        policy: what is kept.
        residual_dtype: of the residual stream; None for float32 or more.
    """
    heads = block.spec.num_heads
    attn_dim = heads * block.spec.head_dim
    embed_dim = block.proj_weight.shape[0]
    hidden_dim = block.fc1_weight.shape[0]
    activated_dim = block.fc2_weight.shape[1]
    size = dtype.itemsize
    stat = max(size, torch.float32.itemsize)  # of rstd and lse
    num_rows = rows[1] - rows[0]
    fresh_rows = max(rows[1] - max(num_tokens, rows[0]), 0)
    packed = grad_tokens and rows == (0, num_tokens)
    image_keys = grad_tokens or fresh_rows > 0

    copies, m = prompt_shape or (0, 0)

    if policy.recompute_block:  # the inputs; prompts that all images share are the parameter itself
        residual = stat if residual_dtype is None else residual_dtype.itemsize
        return (batch_size * num_tokens * residual + (copies * m if copies > 1 else 0) * stat) * embed_dim

    def x_hat(num: int, packed: bool, width: int = embed_dim) -> int:
        """x̂ and rstd of `num` rows; packed with a scale."""
        return num * (width + 2 * stat if packed else width * size + stat)

    total = 0
    if grad_tokens:
        total += x_hat(batch_size * num_tokens, policy.pack)
    if packed:
        total += batch_size * num_tokens * 3 * attn_dim * size  # q, k, v
    else:
        total += batch_size * num_rows * attn_dim * size  # q
        if image_keys:
            total += batch_size * num_tokens * 2 * attn_dim * size  # k, v
    total += batch_size * (num_rows + (block.num_windows - 1) * fresh_rows) * heads * stat  # lse
    if not policy.pack or not grad_tokens or block.backend.needs_out:
        total += batch_size * num_rows * attn_dim * size  # out
    total += x_hat(batch_size * num_rows, policy.pack)
    if policy.pack:
        is_gated = block.spec.activation in PACKED
        total += batch_size * num_rows * (hidden_dim + (2 * stat if is_gated else 0))  # derivative
    elif not policy.recompute_mlp:
        total += batch_size * num_rows * hidden_dim * size  # u
    if block.spec.mlp_norm is not None and not policy.recompute_mlp:
        total += x_hat(batch_size * num_rows, policy.pack, activated_dim)
    if prompt_shape is not None:
        total += x_hat(copies * m, policy.pack and copies > 1) + copies * m * 2 * attn_dim * size
    if block.spec.qk_norm is not None:
        if image_keys:
            total += batch_size * num_rows * heads * stat
        if grad_tokens:
            total += batch_size * num_tokens * heads * stat
        if prompt_shape is not None:
            total += prompt_shape[0] * prompt_shape[1] * heads * stat
    return total


def workspace_bytes(
    block: FrozenBlock, *, dtype: torch.dtype, batch_size: int, num_rows: int, policy: MemoryPolicy
) -> int:
    """An estimate of the temporaries while one block runs backward: the gradients of the MLP's hidden layer
    (before and behind the activation, unless that is part of a product), and of attention's packed input and
    output, beside a few copies of the residual stream; and whatever of the block is formed again."""
    hidden_dim, embed_dim = block.fc1_weight.shape
    attn_dim = block.spec.num_heads * block.spec.head_dim
    num_hidden = 1 if block.backend.fuses_mlp else 2
    per_row = dtype.itemsize * (num_hidden * hidden_dim + 4 * attn_dim)
    per_row += 4 * torch.float32.itemsize * embed_dim
    if policy.recompute_mlp or policy.recompute_block:
        per_row += dtype.itemsize * hidden_dim  # u
    if policy.recompute_block:
        per_row += dtype.itemsize * (2 * embed_dim + 4 * attn_dim)  # x̂1, x̂2, q, k, v, out
    return batch_size * num_rows * per_row
