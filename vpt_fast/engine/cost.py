"""What a training step keeps in memory, in closed form.

`BlockCall.kept_bytes` mirrors the fields of `engine.call.Kept`, one term each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import nn

from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.passes import images_at_once
from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.kernels.mlp.reference import GATED


class TrainingBytes(TypedDict):
    """Bytes of a training step. weights: all parameters, and gradient and momentum of the trained ones.
    kept: for backward, exact unless autocast acts outside the blocks too. workspace: what temporaries add at
    the peak, an estimate."""

    weights: int
    kept: int
    workspace: int


@contextmanager
def counting_kept(model: nn.Module) -> Iterator[Callable[[], list[int]]]:
    """Records what autograd keeps for backward inside the context, the model's own tensors excluded.

    Yields:
        A function that returns the bytes of each storage kept so far.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield lambda: [storage.nbytes() for storage in kept.values()]


def kept_of_rows(
    function: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weights: nn.Module,
) -> int:
    """Bytes that a function keeps for backward of rows whose gradient is wanted.

    Args:
        function: called with rows on the meta device.
        shape, dtype: of the rows.
        weights: the modules that it calls, on the meta device.
    """
    with counting_kept(weights) as kept_sizes:
        function(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True))
    return sum(kept_sizes())


class Peak:
    """Adds up what the calls of a step's blocks keep, one after the other, and finds the peak.

    Attributes:
        kept: bytes for backward, of all calls so far.
    """

    def __init__(self) -> None:
        self.kept = 0
        self._most = 0

    def add(self, kept: int, workspace: int) -> None:
        """The next call's kept bytes and workspace. What it keeps is freed after its backward, before the
        calls below run theirs."""
        self.kept += kept
        self._most = max(self._most, self.kept + workspace)

    @property
    def workspace(self) -> int:
        """Bytes that temporaries add at the peak to all that is kept."""
        return max(0, self._most - self.kept)


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One call of a block, and the bytes that it takes.

    block: the block.
    dtype: of its matmuls.
    batch_size: B.
    num_tokens: N, the tokens in its input.
    rows: the half-open range of rows that are read.
    prompt_shape: (1 or B, m) of the prompts that enter it, or None.
    grad_tokens: whether anything below it is trained.
    policy: what is kept; None if nothing is trained, and then only `forward_bytes` is known.
    residual_dtype: of the residual stream; None for float32 or more.
    key_value: whether prompts are keys and values, not tokens.
    prompts_formed: whether prompts that all images share are a new tensor of this call, such as dropout
        returns, and not the parameter itself.
    """

    block: FrozenBlock
    dtype: torch.dtype
    batch_size: int
    num_tokens: int
    rows: tuple[int, int]
    prompt_shape: tuple[int, int] | None = None
    grad_tokens: bool = False
    policy: MemoryPolicy | None
    residual_dtype: torch.dtype | None = None
    key_value: bool = False
    prompts_formed: bool = False

    @property
    def rows_computed(self) -> tuple[int, int]:
        """The half-open range of rows that are computed."""
        return self.block.rows_computed(self.rows, self.num_tokens)

    def kept_bytes(self) -> int:
        """Bytes that the call keeps for backward."""
        block, policy, grad_tokens = self.block, self.policy, self.grad_tokens
        batch_size, num_tokens = self.batch_size, self.num_tokens
        heads = block.spec.num_heads
        attn_dim = heads * block.spec.head_dim
        embed_dim = block.proj_weight.shape[0]
        hidden_dim = block.fc1_weight.shape[0]
        activated_dim = block.fc2_weight.shape[1]
        size = self.dtype.itemsize
        stat = max(size, torch.float32.itemsize)  # of rstd and lse
        first, stop = self.rows_computed
        num_rows, fresh_rows = stop - first, max(stop - max(num_tokens, first), 0)
        image_keys = grad_tokens or fresh_rows > 0
        copies, m = self.prompt_shape or (0, 0)

        if policy.recompute_block:  # tokens and prompts
            residual = _residual_size(self.dtype, self.residual_dtype)
            own = copies * m * (2 * attn_dim if self.key_value else embed_dim)
            is_new = copies > 1 or self.prompts_formed
            return batch_size * num_tokens * embed_dim * residual + (own * stat if is_new else 0)

        def x_hat(num: int, width: int = embed_dim, *, codes: bool = False) -> int:
            """x̂ and rstd of `num` rows; or codes, with a scale."""
            return num * (width + 2 * stat if codes else width * size + stat)

        total = 0
        if grad_tokens:
            total += x_hat(batch_size * num_tokens)
        if not policy.recomputes_qkv(grad_tokens):
            total += batch_size * num_rows * attn_dim * size  # q
            if image_keys:
                total += batch_size * num_tokens * 2 * attn_dim * size  # k, v
            if block.spec.qk_norm is not None:  # rstd of q and k
                total += batch_size * (num_rows * image_keys + num_tokens * grad_tokens) * heads * stat
        total += batch_size * (num_rows + (block.num_windows - 1) * fresh_rows) * heads * stat  # lse
        if policy.keeps_out(grad_tokens, block.backend.needs_out or block.spec.attn_norm is not None):
            total += batch_size * num_rows * attn_dim * size  # out
        total += x_hat(batch_size * num_rows, codes=policy.compact)
        if policy.compact:
            is_gated = block.spec.activation in GATED
            total += batch_size * num_rows * (hidden_dim + (2 * stat if is_gated else 0))  # derivative
        elif not policy.recompute_mlp:
            total += batch_size * num_rows * hidden_dim * size  # u
        if block.spec.mlp_norm is not None and not policy.recompute_mlp:
            total += x_hat(batch_size * num_rows, activated_dim, codes=policy.compact)
        if self.key_value:
            total += copies * m * 2 * attn_dim * size
        elif self.prompt_shape is not None:
            total += x_hat(copies * m)
            if not policy.recomputes_prompt_kv(copies, self.key_value):
                total += copies * m * 2 * attn_dim * size  # k, v
                if block.spec.qk_norm is not None:
                    total += copies * m * heads * stat
        return total

    def forward_bytes(self) -> int:
        """Peak bytes of temporaries while the call runs forward, including its input and output; an estimate,
        as `workspace_bytes` is."""
        block = self.block
        size = self.dtype.itemsize
        wide = _residual_size(self.dtype, self.residual_dtype)
        hidden_dim, embed_dim = block.fc1_weight.shape
        first, stop = self.rows_computed
        num_rows = self.batch_size * (stop - first)
        hidden, activated = num_rows * hidden_dim * size, num_rows * block.fc2_weight.shape[1] * size
        residual, update = num_rows * embed_dim * wide, num_rows * embed_dim * size
        # Attention's output after a norm, beside its projection.
        normalized = 0 if block.spec.attn_norm is None else num_rows * block.proj_weight.shape[1] * size
        # u beside a gated activation's output, which is narrower; others overwrite it. A kept u is not
        # temporary.
        is_gated = block.spec.activation in GATED
        u = hidden if is_gated and self.policy != MemoryPolicy() else 0
        tokens = self.batch_size * self.num_tokens * embed_dim
        return (
            tokens * (wide + size)  # the input: base and update
            + residual  # after attention
            + max(tokens * wide + normalized + update, u + activated, activated + update)
        )

    def workspace_bytes(self) -> int:
        """Peak bytes of temporaries while the call runs forward or backward, including the gradient that
        backward is given and what it recomputes.

        An estimate: up to statistics of rows, it is what the Triton operations allocate; those in plain
        PyTorch have further temporaries, such as attention's scores.
        """
        block, policy, grad_tokens = self.block, self.policy, self.grad_tokens
        batch_size, num_tokens = self.batch_size, self.num_tokens
        size = self.dtype.itemsize
        attn_dim = block.spec.num_heads * block.spec.head_dim
        hidden_dim, embed_dim = block.fc1_weight.shape
        first, stop = self.rows_computed
        num_rows = stop - first
        packed = grad_tokens and (first, stop) == (0, num_tokens)
        copies, m = self.prompt_shape or (0, 0)

        # Gradients of the block's output and input, of all images.
        given, result = batch_size * num_rows * embed_dim * size, batch_size * num_tokens * embed_dim * size
        # The same for the images that backward processes at a time; then the gradients of their MLP's hidden
        # layer, and of attention's output, queries, keys and values.
        images = images_at_once(batch_size, num_tokens) if policy.recompute_block else batch_size
        tokens, grad = images * num_tokens * embed_dim * size, images * num_rows * embed_dim * size
        hidden = images * num_rows * hidden_dim * size
        activated = images * num_rows * block.fc2_weight.shape[1] * size
        out = images * num_rows * attn_dim * size
        qkv = out + images * num_tokens * 2 * attn_dim * size if grad_tokens else 0
        # Prompts that all images share first get a gradient from each image.
        parts = images * m * 2 * attn_dim * size
        prompt_kv = 0 if copies == 1 else parts

        # In the order of `engine.passes.backward`. The gradient of a gated activation's input is wider than
        # that of its output; for other activations one overwrites the other, or a fused GEMM writes the
        # first alone.
        is_gated = block.spec.activation in GATED
        through_activation = hidden + activated if is_gated else activated
        if block.spec.mlp_norm is not None:
            through_activation = max(through_activation, 2 * activated)
        mlp = max(
            (hidden if policy.recompute_mlp else 0) + through_activation,  # with u recomputed
            hidden + grad,  # fc1
            2 * grad,  # the norm before it
        )
        # Recomputed queries, keys and values.
        anew = qkv if policy.recomputes_qkv(grad_tokens) else 0
        anew += parts if policy.recomputes_prompt_kv(copies, self.key_value) else 0
        attention = grad + out + anew + qkv + parts
        if block.spec.attn_norm is not None:
            attention = max(attention, grad + 3 * out)  # its gradients on both sides, and x̂
        if grad_tokens:
            left = 0 if packed else qkv
            attention = max(
                attention,
                grad + qkv + prompt_kv + tokens,  # the projections
                grad + left + prompt_kv + 2 * tokens,  # the norm before them
            )
        if policy.recompute_block:
            prompt_shape = self.prompt_shape and (min(copies, images), m)
            exact = replace(self, batch_size=images, prompt_shape=prompt_shape, policy=MemoryPolicy())
            formed = exact.kept_bytes()
            mlp += formed
            attention += formed - (hidden + grad)  # the MLP's u and x̂ have been freed
        if images < batch_size and grad_tokens:
            given += result
        return max(self.forward_bytes(), given + mlp, given + attention)


def _residual_size(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> int:
    """Bytes of an element of the residual stream."""
    return (residual_dtype or torch.promote_types(dtype, torch.float32)).itemsize
