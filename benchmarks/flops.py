"""Floating-point operations of one training step, in closed form: those needed, and those done.

Matmuls, including attention's, are counted, with two operations for each multiply-add; norms, activations and
softmax are not. A step is forward and backward on B images, without the optimizer.
`tests/benchmarks/test_flops.py` compares every form with operations counted while the implementation runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

Product = tuple[int, int, int]  # rows, inputs, outputs

FLASH_BACKWARD = 5 / 2  # S, dP, dQ, dK, dV against forward's S and P V: probabilities are recomputed


def product(rows: int, inputs: int, outputs: int) -> int:
    """Operations of a matrix (rows, inputs) times one (inputs, outputs)."""
    return 2 * rows * inputs * outputs


@dataclass(frozen=True)
class Shape:
    """What determines how much a ViT computes.

    Attributes:
        blocks: how many.
        num_patches, num_prefix: tokens of an image, and before them (CLS, registers).
        num_read: rows of the last block that the head reads: CLS, or all that are pooled.
        width: d of the tokens.
        attention_width: of queries, keys and values, over all heads.
        mlp_weights: entries in one block's MLP matrices.
        mlp_hidden: inputs of its second matrix; of a gated MLP's first they are half of the outputs.
        patch_values: numbers in one patch.
    """

    blocks: int
    num_patches: int
    num_prefix: int
    num_read: int
    width: int
    attention_width: int
    mlp_weights: int
    mlp_hidden: int
    patch_values: int

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches


def shape_of(vit: VisionTransformer | Eva | Beit) -> Shape:
    """Read from a model, which may be on the meta device.

    Raises:
        ValueError: a model that pools by attention, whose operations these forms do not have.
    """
    if getattr(vit, "attn_pool", None) is not None:  # a Beit has none
        raise ValueError("vit: got a model that pools by attention, want one that pools its tokens")
    block, embed = vit.blocks[0], vit.patch_embed
    if vit.global_pool == "token":
        num_read = 1
    else:
        is_whole = getattr(vit, "pool_include_prefix", False)
        num_read = embed.num_patches + (vit.num_prefix_tokens if is_whole else 0)
    return Shape(
        blocks=len(vit.blocks),
        num_patches=embed.num_patches,
        num_prefix=vit.num_prefix_tokens,
        num_read=num_read,
        width=vit.embed_dim,
        attention_width=block.attn.proj.in_features,
        mlp_weights=sum(weight.numel() for weight in block.mlp.parameters() if weight.dim() == 2),
        mlp_hidden=block.mlp.fc2.in_features,
        patch_values=embed.proj.in_channels * math.prod(embed.patch_size),
    )


def block_products(shape: Shape, batch_size: int) -> list[Product]:
    """The four matmuls of a block on B images without prompts, one after the other: queries, keys and values;
    the projection; and the MLP's two."""
    rows, d, a = batch_size * shape.num_tokens, shape.width, shape.attention_width
    hidden = shape.mlp_hidden
    first = shape.mlp_weights // d - hidden
    return [(rows, d, 3 * a), (rows, a, d), (rows, d, first), (rows, hidden, d)]


def essential(shape: Shape, num_prompts: int, prompt_type: str, batch_size: int, num_classes: int) -> int:
    """What exact prompt tuning needs; vpt_fast does no more under the memory policy "exact".

    Prompts are keys and values, once for the batch. Blocks compute the rows that are read later: all tokens;
    if shallow, the first block's prompts as well; in the last block only the rows that the head reads.
    Nothing is trained below the first block, so its backward computes the prompts' gradients alone.

    Args:
        shape: of the model.
        num_prompts: m, for each prompted block.
        prompt_type: "deep": every block has m of its own; "shallow": only the first has, and they flow on.
        batch_size: B.
        num_classes: of the head.
    """
    total, b, m = 0, batch_size, num_prompts
    d, a = shape.width, shape.attention_width
    for block in range(shape.blocks):
        is_first, is_last = block == 0, block == shape.blocks - 1
        enters = m if is_first or prompt_type == "deep" else 0  # prompts that this block projects
        tokens = shape.num_tokens + (m if prompt_type == "shallow" and not is_first else 0)
        fresh = m if prompt_type == "shallow" and is_first and not is_last else 0  # those that are read later
        rows = shape.num_read if is_last else tokens  # tokens that are read later
        keys, all_rows = tokens + enters, rows + fresh
        attended = product(b * all_rows, a, d) + 2 * b * all_rows * shape.mlp_weights
        projected = product(enters, d, 2 * a) + product(fresh, d, a)
        image = product(b * tokens, d, 2 * a) + product(b * rows, d, a)
        total += image + projected + 2 * product(b * all_rows, a, keys) + attended  # forward
        total += attended + projected  # backward
        if is_first:
            total += 4 * product(b * rows, a, m)  # S, dP, dK, dV over the prompts' columns alone
            total += 3 * product(b * fresh, a, keys) + 2 * product(b * fresh, a, m)
        else:
            total += 5 * product(b * all_rows, a, keys) + image  # S, dP, dQ, dK, dV
    return total + _patch_embedding(shape, b) + 3 * product(b, d, num_classes)


def concatenation(shape: Shape, num_prompts: int, batch_size: int, num_classes: int) -> int:
    """What `peers.ConcatTimm` does, deep or shallow: every block runs on all tokens and prompts, and backward
    goes through all of it. Arguments as of `essential`."""
    return _ordinary(shape, shape.num_tokens + num_prompts, batch_size, num_classes)


def no_prompts(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `peers.NoPrompts` does."""
    return _ordinary(shape, shape.num_tokens, batch_size, num_classes)


def linear_probe(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What vpt_fast.LinearProbe does: forward, with the last block's output on the rows that are read, and
    the gradient of the head's weight."""
    b, n, d, a = batch_size, shape.num_tokens, shape.width, shape.attention_width
    total = _patch_embedding(shape, b) + 2 * product(b, d, num_classes)
    for block in range(shape.blocks):
        rows = shape.num_read if block == shape.blocks - 1 else n
        total += product(b * n, d, 2 * a) + product(b * rows, d, a) + 2 * product(b * rows, a, n)
        total += product(b * rows, a, d) + 2 * b * rows * shape.mlp_weights
    return total


def full_finetuning(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `peers.FullFineTuning` does: beside every input's gradient, every weight's."""
    b, n = batch_size, shape.num_tokens
    weights = shape.blocks * _linears(shape, b * n) + _patch_embedding(shape, b)
    return _ordinary(shape, n, b, num_classes) + weights


def _ordinary(shape: Shape, num_tokens: int, batch_size: int, num_classes: int) -> int:
    """Forward, and all inputs' gradients, of a ViT on `num_tokens` tokens whose head alone is trained."""
    rows = batch_size * num_tokens
    attention = 2 * product(rows, shape.attention_width, num_tokens)
    blocks = shape.blocks * (2 * _linears(shape, rows) + attention + int(FLASH_BACKWARD * attention))
    return blocks + _patch_embedding(shape, batch_size) + 3 * product(batch_size, shape.width, num_classes)


def _linears(shape: Shape, rows: int) -> int:
    """Forward through one block's matrices."""
    return product(rows, shape.width, 4 * shape.attention_width) + 2 * rows * shape.mlp_weights


def _patch_embedding(shape: Shape, batch_size: int) -> int:
    return product(batch_size * shape.num_patches, shape.patch_values, shape.width)
