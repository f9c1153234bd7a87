"""What a block keeps for backward, by name, and which of these policies fits the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MemoryPolicy:
    """What is kept between forward and backward.

    compact: x̂ before the MLP and the activation's derivative in 8 bits; of attention only its x̂ and
        log-sum-exp: backward recomputes queries, keys and values (one more matmul) and does without the
        output. Forward is exact; gradients carry the rounding of the codes.
    recompute_mlp: the MLP's pre-activation is recomputed in backward (one more fc1). Exact.
    recompute_block: only the block's inputs are kept; forward runs again in backward. Exact.
    """

    compact: bool = False
    recompute_mlp: bool = False
    recompute_block: bool = False

    def recomputes_qkv(self, grad_tokens: bool) -> bool:
        """Whether backward recomputes queries, keys and values from x̂1: where x̂1 is kept anyway, for the
        tokens' gradient."""
        return self.compact and grad_tokens

    def recomputes_prompt_kv(self, num_sets: int, key_value: bool) -> bool:
        """Whether backward recomputes the keys and values of `num_sets` sets of prompts, unless the prompts
        are (`key_value`) keys and values themselves. Those of a single set, which all images share, are too
        few to be worth a matmul."""
        return self.compact and num_sets > 1 and not key_value

    def keeps_out(self, grad_tokens: bool, needs_out: bool) -> bool:
        """Whether attention's output is kept: if a norm on it or attention's backward needs it, or where
        queries, keys and values are kept. Without it, backward needs all keys for every row, which it
        otherwise does only where the tokens' gradient is wanted."""
        return needs_out or not self.recomputes_qkv(grad_tokens)


POLICIES = {
    "exact": MemoryPolicy(),
    "compact": MemoryPolicy(compact=True),
    "recompute_mlp": MemoryPolicy(recompute_mlp=True),
    "recompute": MemoryPolicy(recompute_block=True),
}
"""By name, the fastest first."""

MEMORY = ("auto", *POLICIES)

# Share of the free memory; the rest is for the allocator's rounding, the optimizer and cuBLAS's workspace.
_USABLE_SHARE = 0.9


def check_memory(memory: str) -> None:
    """Raises ValueError for a name that is not in `MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, want one of {', '.join(map(repr, MEMORY))}")


def choose_policy(step_bytes: Callable[[str], int], dtype: torch.dtype, free: int | None) -> str:
    """The name of the fastest policy whose step fits.

    ``"compact"`` is a candidate for 16-bit matmuls only: their own rounding hides that of the codes, which in
    float32 would be by far the largest error.

    Args:
        step_bytes: bytes that a training step takes under the policy of this name.
        dtype: of the matmuls.
        free: bytes that are free, or None where that is not known, which gives ``"exact"``.

    Returns:
        A name in `POLICIES`; the smallest, ``"recompute"``, where none fits.
    """
    if free is None:
        return "exact"
    for name, policy in POLICIES.items():
        if policy.compact and dtype.itemsize > 2:
            continue
        if step_bytes(name) <= free * _USABLE_SHARE:
            return name
    return "recompute"
