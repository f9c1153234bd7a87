"""What a training step keeps in memory, in closed form.

`kept_bytes` mirrors the tensors that `engine.block` hands to save_for_backward, one term each.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from vpt_fast.engine.block import FrozenBlock


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
    """
    heads = block.spec.num_heads
    attn_dim = heads * block.spec.head_dim
    embed_dim = block.proj_weight.shape[0]
    hidden_dim = block.fc1_weight.shape[0]
    size = dtype.itemsize
    stat = max(size, torch.float32.itemsize)  # of rstd and lse
    num_rows = rows[1] - rows[0]
    fresh_rows = max(rows[1] - max(num_tokens, rows[0]), 0)
    packed = grad_tokens and rows == (0, num_tokens)
    image_keys = grad_tokens or fresh_rows > 0

    total = 0
    if grad_tokens:
        total += batch_size * num_tokens * (embed_dim * size + stat)  # x̂1, rstd1
    if packed:
        total += batch_size * num_tokens * 3 * attn_dim * size  # q, k, v
    else:
        total += batch_size * num_rows * attn_dim * size  # q
        if image_keys:
            total += batch_size * num_tokens * 2 * attn_dim * size  # k, v
    total += batch_size * num_rows * (attn_dim * size + heads * stat)  # out, lse
    total += batch_size * num_rows * (embed_dim * size + stat)  # x̂2, rstd2
    total += batch_size * num_rows * hidden_dim * size  # u
    if prompt_shape is not None:
        copies, m = prompt_shape
        total += copies * m * (embed_dim * size + stat + 2 * attn_dim * size)  # x̂, rstd, k, v
    if block.spec.qk_norm is not None:
        if image_keys:
            total += batch_size * num_rows * heads * stat
        if grad_tokens:
            total += batch_size * num_tokens * heads * stat
        if prompt_shape is not None:
            total += prompt_shape[0] * prompt_shape[1] * heads * stat
    return total


def workspace_bytes(block: FrozenBlock, *, dtype: torch.dtype, batch_size: int, num_rows: int) -> int:
    """An estimate of the temporaries while one block runs backward: the gradients of the MLP's hidden layer
    (two of them), and of attention's packed input and output, beside a few copies of the residual stream."""
    hidden_dim, embed_dim = block.fc1_weight.shape
    attn_dim = block.spec.num_heads * block.spec.head_dim
    per_row = dtype.itemsize * (2 * hidden_dim + 4 * attn_dim) + 4 * torch.float32.itemsize * embed_dim
    return batch_size * num_rows * per_row
