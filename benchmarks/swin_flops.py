"""The closed forms of flops.py, by the same names, for a Swin transformer with prompts in every window.

Where windows reach past the image, attention includes the positions that hold no token in all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flops import FLASH_BACKWARD, Product, product
from timm.models.swin_transformer import SwinTransformer


@dataclass(frozen=True)
class Stage:
    """Blocks of one width.

    Attributes:
        blocks: how many.
        num_tokens: of the image, H·W.
        num_windows, window_area: W windows of T positions.
        width: d of the tokens.
        attention_width: of queries, keys and values, over all heads.
        mlp_weights: entries in one block's MLP matrices.
    """

    blocks: int
    num_tokens: int
    num_windows: int
    window_area: int
    width: int
    attention_width: int
    mlp_weights: int

    @property
    def num_places(self) -> int:
        return self.num_windows * self.window_area


@dataclass(frozen=True)
class Shape:
    """What determines how much a Swin computes; patch_values: numbers in one patch."""

    stages: tuple[Stage, ...]
    patch_values: int


def shape_of(swin: SwinTransformer) -> Shape:
    """Read from a model, which may be on the meta device."""
    stages = []
    for layer in swin.layers:
        block = layer.blocks[0]
        size, window = block.input_resolution, block.window_size
        stages.append(
            Stage(
                blocks=len(layer.blocks),
                num_tokens=math.prod(size),
                num_windows=math.prod(math.ceil(a / b) for a, b in zip(size, window, strict=True)),
                window_area=math.prod(window),
                width=block.dim,
                attention_width=block.attn.qkv.out_features // 3,
                mlp_weights=sum(weight.numel() for weight in block.mlp.parameters() if weight.dim() == 2),
            )
        )
    embed = swin.patch_embed
    return Shape(tuple(stages), embed.proj.in_channels * math.prod(embed.patch_size))


def block_products(shape: Shape, batch_size: int) -> list[Product]:
    """The four matmuls of every block on B images without prompts, one after the other."""
    found = []
    for stage in shape.stages:
        rows, d, a = batch_size * stage.num_places, stage.width, stage.attention_width
        hidden = stage.mlp_weights // (2 * d)
        tokens = batch_size * stage.num_tokens
        found += [(rows, d, 3 * a), (rows, a, d), (tokens, d, hidden), (tokens, hidden, d)] * stage.blocks
    return found


def essential(shape: Shape, num_prompts: int, prompt_type: str, batch_size: int, num_classes: int) -> int:
    """What exact prompt tuning needs, as for a ViT: prompts are keys and values in all windows, once for the
    batch; their outputs are averaged before the projection, if they are read at all; of the four copies in
    patch merging one is computed. Arguments as of `flops.essential`."""
    b, m, index = batch_size, num_prompts, 0
    num_blocks = sum(stage.blocks for stage in shape.stages)
    total = _around(shape, b, num_classes)
    for number, stage in enumerate(shape.stages):
        d, a, places, area = stage.width, stage.attention_width, stage.num_places, stage.window_area
        flows = prompt_type == "shallow"
        if number > 0:
            merged = product(b * places, 2 * d, d) + flows * product(b * m, d // 2, d)
            total += 2 * merged  # forward and backward
        for _ in range(stage.blocks):
            is_first, is_last = index == 0, index == num_blocks - 1
            sets = b if flows and not is_first else 1  # of m prompts that are projected
            fresh = m if flows or is_last else 0  # prompts whose output is read
            rows, queries = places + fresh, b * stage.num_windows * (area + fresh)
            image, entering = product(b * places, d, 3 * a), product(sets * m, d, 2 * a)
            asking = product(sets * fresh, d, a)
            after = product(b * rows, a, d) + 2 * b * rows * stage.mlp_weights
            total += image + entering + asking + 2 * product(queries, a, m + area) + after  # forward
            total += after + entering + asking  # backward
            if is_first:
                total += 4 * product(b * places, a, m)  # S, dP, dK, dV over the prompts' columns alone
                asked = b * stage.num_windows * fresh
                # S, dP, dQ over all columns, and dK, dV over the prompts'
                total += 3 * product(asked, a, m + area) + 2 * product(asked, a, m)
            else:
                total += image + 5 * product(queries, a, m + area)  # S, dP, dQ, dK, dV
            index += 1
    return total


def concatenation(shape: Shape, num_prompts: int, prompt_type: str, batch_size: int, num_classes: int) -> int:
    """What `swin_peers.ConcatTimm` does: every block on all positions and all windows' prompts, and backward
    through all of it."""
    return _ordinary(shape, num_prompts, prompt_type == "shallow", batch_size, num_classes)


def no_prompts(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `swin_peers.NoPrompts` does."""
    return _ordinary(shape, 0, False, batch_size, num_classes)


def linear_probe(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What vpt_fast.LinearProbe does: forward, and the gradient of the head's weight."""
    b, blocks = batch_size, 0
    for stage in shape.stages:
        d, a, rows = stage.width, stage.attention_width, batch_size * stage.num_places
        linears = product(rows, d, 4 * a) + 2 * rows * stage.mlp_weights
        blocks += stage.blocks * (linears + 2 * product(rows, a, stage.window_area))
        blocks += product(rows, 2 * d, d) if stage is not shape.stages[0] else 0
    head = product(b, shape.stages[-1].width, num_classes)
    return _around(shape, b, num_classes) + blocks - head


def full_finetuning(shape: Shape, batch_size: int, num_classes: int) -> int:
    """What `peers.FullFineTuning` does: beside every input's gradient, every weight's. The scores are kept
    and not recomputed, since their bias needs their gradient."""
    b = batch_size
    weights = product(b * shape.stages[0].num_tokens, shape.patch_values, shape.stages[0].width)
    again = 0
    for stage in shape.stages:
        weights += stage.blocks * _linears(stage, 0, b)
        again += stage.blocks * product(b * stage.num_places, stage.attention_width, stage.window_area)
        weights += _merge(stage, b) if stage is not shape.stages[0] else 0
    return _ordinary(shape, 0, False, b, num_classes) + weights - again


def _ordinary(shape: Shape, num_prompts: int, flows: bool, batch_size: int, num_classes: int) -> int:
    """Forward, and the gradients of all inputs, where the head alone is trained."""
    b, m, total = batch_size, num_prompts, _around(shape, batch_size, num_classes)
    for stage in shape.stages:
        sequence = stage.window_area + m
        attention = 2 * product(b * stage.num_windows * sequence, stage.attention_width, sequence)
        total += stage.blocks * (2 * _linears(stage, m, b) + attention + int(FLASH_BACKWARD * attention))
        if stage is not shape.stages[0]:
            copies = product(b * m, 2 * stage.width, stage.width) if flows else 0
            total += 2 * (_merge(stage, b) + copies)
    return total


def _linears(stage: Stage, num_prompts: int, batch_size: int) -> int:
    """Forward through one block's matrices."""
    in_windows = batch_size * (stage.num_places + stage.num_windows * num_prompts)
    rows = batch_size * (stage.num_tokens + num_prompts)
    return product(in_windows, stage.width, 4 * stage.attention_width) + 2 * rows * stage.mlp_weights


def _merge(stage: Stage, batch_size: int) -> int:
    """Forward through the patch merging before a stage."""
    return product(batch_size * stage.num_tokens, 2 * stage.width, stage.width)


def _around(shape: Shape, batch_size: int, num_classes: int) -> int:
    """The patch embedding, and the head forward and backward."""
    first, last = shape.stages[0], shape.stages[-1]
    embedding = product(batch_size * first.num_tokens, shape.patch_values, first.width)
    return embedding + 3 * product(batch_size, last.width, num_classes)
