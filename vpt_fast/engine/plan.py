"""Which rows each block has to compute.

The sequence a block works on is its N image-side tokens (CLS and registers first, then patches) followed by
its prompts. An output that neither the next block nor, after the last, the head reads is dead work.
`plan_blocks` decides this once, when the model is built; `row_range` turns a decision into indices for the
sizes at hand, which may change from batch to batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class Read(Enum):
    """The rows that are read. Prefix tokens are CLS, a distillation token and registers."""

    CLS = "the CLS token"
    PREFIX = "prefix tokens"
    PATCHES = "patches"
    TOKENS = "prefix tokens and patches"
    PROMPTS = "prompts"
    PATCHES_AND_PROMPTS = "patches and prompts"
    TOKENS_AND_PROMPTS = "prefix tokens, patches and prompts"

    @property
    def prompts(self) -> bool:
        return self in (Read.PROMPTS, Read.PATCHES_AND_PROMPTS, Read.TOKENS_AND_PROMPTS)


@dataclass(frozen=True)
class BlockPlan:
    """One block's share of the work.

    prompt_index: which set of prompts enters this block as keys and values, or None.
    prompts_in: whether prompts are in its input as ordinary tokens.
    read: the rows of its output that are read.
    """

    prompt_index: int | None
    prompts_in: bool
    read: Read


def plan_blocks(
    num_blocks: int, prompted: Collection[int], after_prompts: str, head_reads: Read
) -> tuple[BlockPlan, ...]:
    """One plan per block.

    Args:
        num_blocks: L.
        prompted: indices of the blocks that have prompts of their own.
        after_prompts: what a block without prompts of its own gets after one with prompts: ``"flow"``: the
            prompts' outputs, as ordinary tokens; ``"drop"``: no prompts.
        head_reads: the rows that the head reads after the last block.

    Raises:
        ValueError: the head reads prompts and there are none after the last block.
    """
    order = {block: index for index, block in enumerate(sorted(prompted))}
    flows = after_prompts == "flow"
    plans = []
    prompts_in = False
    for block in range(num_blocks):
        own = block in order
        present = own or prompts_in
        last = block == num_blocks - 1
        # Prompts that the next block replaces by its own are discarded: their rows need no output.
        goes_on = present and flows and not last and block + 1 not in order
        if last:
            if head_reads.prompts and not present:
                raise ValueError(
                    f"pool: the head reads {head_reads.value}, and no prompts reach the end of the last block"
                )
            read = head_reads
        else:
            read = Read.TOKENS_AND_PROMPTS if goes_on else Read.TOKENS
        plans.append(BlockPlan(order.get(block), prompts_in and not own, read))
        prompts_in = goes_on
    return tuple(plans)


def row_range(read: Read, num_tokens: int, num_prefix: int, num_prompts: int) -> tuple[int, int]:
    """The half-open range of rows, counted over num_tokens image-side tokens and then num_prompts prompts."""
    starts = {Read.PATCHES: num_prefix, Read.PATCHES_AND_PROMPTS: num_prefix, Read.PROMPTS: num_tokens}
    stops = {Read.CLS: 1, Read.PREFIX: num_prefix}
    stop = stops.get(read, num_tokens + (num_prompts if read.prompts else 0))
    return starts.get(read, 0), stop
