"""The residual stream between two blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Stream(NamedTuple):
    """The sum base + update, which the block that reads it computes, in its first norm.

    If there is an update, its gradient is the stream's, and base is a constant to autograd. So gradients go
    from block to block in the dtype of the matmuls, which read them without a cast, while the stream itself
    may be wider.

    base: (B, N, d), in the residual stream's dtype.
    update: (B, N, d), in the dtype of the matmuls: what an MLP adds; None before the first block.
    """

    base: torch.Tensor
    update: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.base.shape[1]

    @property
    def differentiable(self) -> torch.Tensor:
        """The one of the two that gets the stream's gradient."""
        return self.base if self.update is None else self.update

    def sum(self) -> torch.Tensor:
        """(B, N, d), in base's dtype."""
        if self.update is None:
            return self.base
        return (self.base + self.update).to(self.base.dtype)

    def split(self, num_fresh: int) -> tuple[Stream, Stream]:
        """All rows but the last `num_fresh`, and those last ones."""
        # split, not two slices: its backward is one cat
        sizes = (self.num_tokens - num_fresh, num_fresh)
        updates = (None, None) if self.update is None else self.update.split(sizes, dim=1)
        first, last = map(Stream, self.base.split(sizes, dim=1), updates)
        return first, last


def require_stream(stream: Any) -> None:
    """Raises ValueError for what a forward hook of a block may return in place of its stream: anything else,
    or a base whose gradient would be dropped."""
    if type(stream) is not Stream:
        raise ValueError(
            f"stream: got a {type(stream).__name__} from the block before, as of a forward hook; want a "
            "vpt_fast.engine.stream.Stream, such as Stream(tokens)"
        )
    if stream.update is not None and stream.base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "stream: got a base that requires a gradient beside an update, which alone would get one; want "
            "Stream(tokens), or the change added to the update"
        )
