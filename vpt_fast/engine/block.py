"""The frozen, prompted transformer block as PyTorch sees it: a module, and one `torch.autograd.Function`.

`engine.passes` computes it; here weights, dtypes and gradients are sorted out, once for each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_fast.engine import passes
from vpt_fast.engine.call import Call, Kept, Rotation, Windows
from vpt_fast.engine.contexts import (
    compute_dtype,
    require_first_order,
    require_no_forward_ad,
    require_no_linearize,
    require_no_selective_checkpointing,
    require_no_vmap,
    require_plain_autograd,
    require_single_gradient,
    without_autocast,
)
from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.engine.stream import Stream, require_stream
from vpt_fast.engine.weights import BlockSpec, BlockWeights, require_frozen
from vpt_fast.kernels import Backend
from vpt_fast.kernels.mlp.reference import GATED


class FrozenBlock(nn.Module):
    """A frozen pre-norm transformer block that takes prompts beside its tokens.

    Args:
        spec, weights: from `engine.weights.fold`.
        backend: the implementations of its operations, from `kernels.get_backend`.

    Raises:
        ValueError: a gated activation with a backend that fuses the MLP, or a head dim that the backend does
            not take on any device.
    """

    in_windows = False  # whether tokens attend in windows

    qkv_weight: torch.Tensor
    proj_weight: torch.Tensor
    fc1_weight: torch.Tensor
    fc2_weight: torch.Tensor

    def __init__(self, spec: BlockSpec, weights: BlockWeights, backend: Backend) -> None:
        super().__init__()
        if backend.always_fuses_mlp and spec.activation in GATED:
            raise ValueError(
                f"backend='triton_fused_mlp': got a backbone with the gated activation {spec.activation!r}, "
                "want 'triton'"
            )
        backend.require_head_dim(spec.head_dim, self.in_windows)
        self.spec = spec
        self.backend = backend
        # Parameters and not buffers: DistributedDataParallel broadcasts buffers before every forward pass,
        # and a frozen backbone needs to be sent once.
        for name, weight in weights._asdict().items():
            parameter = None if weight is None else nn.Parameter(weight, requires_grad=False)
            self.register_parameter(name, parameter)

    def hold_weights_in(self, dtype: torch.dtype) -> None:
        """Rounds the weights to `dtype`, which `spec.require_dtype` allows, permanently, as autocast does in
        every call, forward and backward; float64 weights stay, as they do under autocast."""
        for name in BlockWeights._fields:
            weight = getattr(self, name)
            if weight is not None and weight.dtype != torch.float64:
                weight.data = weight.data.to(dtype)

    def require_operations(self, device: torch.device) -> None:
        """Raises ValueError if the backend, or attention that was chosen by name, does not support this
        device in the current compute dtype (the weights' own, or autocast's)."""
        dtype = compute_dtype(device.type, self.qkv_weight.dtype)
        self.backend.require_operations(device, dtype, self.spec.head_dim, self.in_windows)

    def runs_kernels(self, device: torch.device) -> bool:
        """Whether its operations on this device are Triton's kernels."""
        dtype = compute_dtype(device.type, self.qkv_weight.dtype)
        return self.backend.ops(device, dtype, self.spec.head_dim, self.in_windows).name != "torch"

    def windows(self, num_tokens: int) -> Windows | None:
        """The windows that these N tokens attend in; None where every token attends to every other."""
        del num_tokens
        return None

    @property
    def num_windows(self) -> int:
        """W."""
        return 1

    def rows_computed(self, rows: tuple[int, int], num_tokens: int) -> tuple[int, int]:
        """The half-open range of rows that are computed where `rows` are read."""
        del num_tokens
        return rows

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
        """The block's output for the rows that are read.

        Args:
            stream: (B, N, d), the residual stream.
            prompts: (1, m, d) where they are the same for every image, (B, m, d) where they differ, or None.
            rows: half-open range of the rows to compute, out of the N tokens followed by the m prompts.
            policy: what is kept for backward.
            rotation: rotary positions, where the block has them.
            key_value: prompts are (1 or B, m, 2·H·D), the keys of all heads and then the values, as attention
                takes them: past query-key normalisation. They are no rows that can be computed.

        Returns:
            (B, R, d), with an update.

        Raises:
            ValueError: a weight requires a gradient, or does not survive in the matmuls' dtype; or a hook has
                made the stream one that `require_stream` refuses.
        """
        require_stream(stream)
        require_no_selective_checkpointing()
        weights = self._weights()
        base, update = stream
        grad_tokens = stream.differentiable.requires_grad and torch.is_grad_enabled()
        grad_prompts = prompts is not None and prompts.requires_grad and torch.is_grad_enabled()
        is_kept = grad_tokens or grad_prompts
        # No codes where no backward reads them.
        call = self._call(stream, rows, policy if is_kept else MemoryPolicy(), grad_tokens, key_value)
        prompts = _wide(prompts, base.dtype)
        if is_kept:
            require_plain_autograd()
            return Stream(
                *_FrozenBlockFunction.apply(
                    base, update, prompts, call, *(rotation or _NO_ROTATION), *weights
                )
            )
        require_no_linearize()
        if prompts is not None:
            require_no_vmap()
        if call.ops.name != "torch":
            require_no_forward_ad()
        with without_autocast(base.device.type):
            output, _ = passes.forward(stream, prompts, rotation, weights.to(call.dtype), call, keep=False)
        return output

    @torch.no_grad()
    def attention_probabilities(
        self,
        stream: Stream,
        prompts: torch.Tensor | None,
        rows: tuple[int, int],
        rotation: Rotation | None,
        *,
        key_value: bool,
    ) -> torch.Tensor:
        """The probabilities that attention's softmax forms for the rows, which `forward` never holds.

        Args: as of `forward`; `rows` of the N tokens only.

        Returns:
            (B, H, R, m + N), at least float32: over the prompts, then over the tokens.
        """
        require_stream(stream)
        call = self._call(stream, rows, MemoryPolicy(), grad_tokens=False, key_value=key_value)
        weights, prompts = self._weights().to(call.dtype), _wide(prompts, stream.base.dtype)
        with without_autocast(stream.base.device.type):
            return passes.attention_probabilities(stream, prompts, rotation, weights, call)

    def _weights(self) -> BlockWeights:
        weights = BlockWeights(*(getattr(self, name) for name in BlockWeights._fields))
        require_frozen(*weights)
        return weights

    def _call(
        self,
        stream: Stream,
        rows: tuple[int, int],
        policy: MemoryPolicy,
        grad_tokens: bool,
        key_value: bool,
    ) -> Call:
        """What a call computes; raises ValueError if weights do not survive in the matmuls' dtype."""
        device, num_tokens = stream.base.device, stream.num_tokens
        dtype = compute_dtype(device.type, self.qkv_weight.dtype)
        self.spec.require_dtype(dtype)
        is_gated = self.spec.activation in GATED
        # Before the minima below: torch 2.11's compiler fails if a size turns out to be known after them.
        is_whole = rows == (0, num_tokens)
        return Call(
            spec=self.spec,
            ops=self.backend.ops(device, dtype, self.spec.head_dim, self.in_windows, is_gated),
            image=slice(min(rows[0], num_tokens), min(rows[1], num_tokens)),
            fresh=slice(max(rows[0] - num_tokens, 0), max(rows[1] - num_tokens, 0)),
            packed=grad_tokens and is_whole,
            dtype=dtype,
            grad_tokens=grad_tokens,
            grad_dtype=stream.differentiable.dtype,
            policy=policy,
            windows=self.windows(num_tokens),
            key_value=key_value,
        )


def _wide(prompts: torch.Tensor | None, residual_dtype: torch.dtype) -> torch.Tensor | None:
    """The prompts as passes take them: in the residual stream's dtype, but at least float32, and each in one
    piece, as kernels read rows."""
    if prompts is None:
        return None
    prompts = prompts.to(torch.promote_types(residual_dtype, torch.float32))
    return prompts if prompts.stride(-1) == 1 else prompts.contiguous()


_NO_ROTATION = (None, None, 0)


class _FrozenBlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        update: torch.Tensor | None,
        prompts: torch.Tensor | None,
        call: Call,
        sin: torch.Tensor | None,
        cos: torch.Tensor | None,
        start: int,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rotation = _rotation(sin, cos, start)
        w = BlockWeights(*weights).to(call.dtype)
        with without_autocast(base.device.type):
            output, kept = passes.forward(Stream(base, update), prompts, rotation, w, call, keep=True)
        ctx.call, ctx.start, ctx.has_update = call, start, update is not None
        ctx.mark_non_differentiable(output.base)
        if not torch.compiler.is_compiling():  # Dynamo does not know the method, and drops what is unread
            ctx.set_materialize_grads(False)  # else base's gradient would be written, as zeros
        # Through save_for_backward, so that saved_tensors_hooks see (and may move) every byte. The weights
        # are saved as they were passed: copies cast for autocast would be a second backbone.
        ctx.save_for_backward(sin, cos, *weights, *kept.tensors())
        return output.base, output.update

    @staticmethod
    def backward(ctx: Any, _: None, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        num_weights = len(BlockWeights._fields)
        if grad is None:  # nothing above depends on the block
            return (None,) * (7 + num_weights)
        require_first_order()
        require_single_gradient(grad)
        # Autograd may pass a gradient with any strides, such as a decoder's transposition leaves.
        grad = grad.contiguous()
        call = ctx.call
        sin, cos, *saved = ctx.saved_tensors  # once: every access unpacks all of them
        rotation = _rotation(sin, cos, ctx.start)
        weights = BlockWeights(*saved[:num_weights]).to(call.dtype)
        kept = Kept(*saved[num_weights:])
        run_backward = passes.recompute_backward if call.policy.recompute_block else passes.backward
        with without_autocast(grad.device.type):
            grads = run_backward(grad, kept, rotation, weights, call, ctx.needs_input_grad[2])
        grad_tokens, grad_prompts = grads
        grads = (None, grad_tokens) if ctx.has_update else (grad_tokens, None)
        return *grads, grad_prompts, *(None for _ in range(4 + num_weights))


def _rotation(sin: torch.Tensor | None, cos: torch.Tensor | None, start: int) -> Rotation | None:
    return None if sin is None or cos is None else Rotation(sin, cos, start)
