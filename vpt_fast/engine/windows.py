"""Blocks whose tokens attend in windows (Liu et al., Swin Transformer, ICCV 2021), and the moves between.

Such a block takes its tokens window by window, so that it is an ordinary block in all else. Between two
blocks, one gather brings the tokens from the first one's order into the second one's: it includes partition,
shift, padding, and patch merging's gather.

An order is a tensor (N,) of the tokens' indices in the image, row by row; -1 where a position holds no token.
Orders are made on the CPU, whatever device a model is built on: tensors on "meta" have no values to look
positions up by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.call import Windows
from vpt_fast.engine.contexts import (
    compute_dtype,
    require_first_order,
    require_no_forward_ad,
    require_plain_autograd,
    without_autocast,
)
from vpt_fast.engine.policy import MemoryPolicy
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockSpec, BlockWeights, LinearParts, NormParts, after_norm
from vpt_fast.kernels import Backend, Ops
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias, pad_bias

Size = tuple[int, int]


def raster_order(size: Size) -> torch.Tensor:
    """The order of an image of (height, width) tokens, row by row."""
    return torch.arange(size[0] * size[1], device="cpu")


def window_order(size: Size, window: Size, shift: Size) -> torch.Tensor:
    """The order of a block's tokens: rolled by `shift`, padded to whole windows, window by window.

    Args:
        size: (height, width) of the image in tokens.
        window, shift: (height, width) in tokens.
    """
    tokens = raster_order(size).view(size)
    tokens = tokens.roll((-shift[0], -shift[1]), dims=(0, 1))
    tokens = F.pad(tokens, (0, -size[1] % window[1], 0, -size[0] % window[0]), value=-1)
    return _partition(tokens, window).flatten()


def window_regions(size: Size, window: Size, shift: Size) -> torch.Tensor | None:
    """`WindowBias.regions` of a block: (W, T), or None where its windows are not shifted."""
    if not any(shift):
        return None
    sides = []
    for length, side, step in zip(size, window, shift, strict=True):
        length += -length % side
        sides.append(torch.arange(length, device="cpu") >= length - step)  # what was rolled around the edge
    regions = 2 * sides[0].int().unsqueeze(1) + sides[1].int().unsqueeze(0)
    return _partition(regions, window)


def merge_order(size: Size, after: torch.Tensor) -> torch.Tensor:
    """The order of the tokens that are merged, in groups of four: (4·N',).

    Args:
        size: (height, width) of the image in tokens, before merging.
        after: (N',), the order of the merged tokens.
    """
    tokens = raster_order(size).view(size)
    tokens = F.pad(tokens, (0, size[1] % 2, 0, size[0] % 2), value=-1)
    height, width = (side // 2 for side in tokens.shape)
    # Column by column, as timm and the original authors concatenate the four.
    fours = tokens.view(height, 2, width, 2).permute(0, 2, 3, 1).reshape(-1, 4)
    return torch.where((after >= 0).unsqueeze(1), fours[after.clamp(min=0)], -1).flatten()


def _partition(x: torch.Tensor, window: Size) -> torch.Tensor:
    """(height, width) -> (W, T)."""
    x = x.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def relative_bias(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`WindowBias.bias` from a table ((2h - 1)·(2w - 1), H) and each token pair's row in it (T, T)."""
    bias = table.detach()[index].permute(2, 0, 1)
    return pad_bias(bias.to(torch.promote_types(table.dtype, torch.float32)))


class FrozenWindowBlock(FrozenBlock):
    """A frozen block whose tokens attend in windows, and to its prompts. It takes tokens in `order`.

    Args:
        spec, weights, backend: as for `FrozenBlock`.
        relative_bias: `WindowBias.bias`.
        pad_kv: (2, H, D), the key and value where windows reach past the image: timm pads the projection's
            input with zeros, so they are its bias.
        size, window, shift: (height, width) in tokens, of the image, a window, and the shift.
    """

    in_windows = True

    relative_bias: torch.Tensor
    regions: torch.Tensor | None
    pads: torch.Tensor | None
    pad_kv: torch.Tensor | None

    def __init__(
        self,
        spec: BlockSpec,
        weights: BlockWeights,
        backend: Backend,
        *,
        relative_bias: torch.Tensor,
        pad_kv: torch.Tensor,
        size: Size,
        window: Size,
        shift: Size,
    ) -> None:
        super().__init__(spec, weights, backend)
        self.size, self.window, self.shift = size, window, shift
        self.order = window_order(size, window, shift)
        pads, device = (self.order < 0).nonzero().squeeze(1), relative_bias.device
        self.relative_bias = _frozen(relative_bias)
        self.register_parameter("pad_kv", _frozen(pad_kv.to(device)) if len(pads) else None)
        for name, table in (
            ("regions", window_regions(size, window, shift)),
            ("pads", pads if len(pads) else None),
        ):
            # Integers are buffers, here and in `Move`, and not Parameters as weights are: averaging a model's
            # (torch.optim.swa_utils.AveragedModel) would round that of a number and itself to the one below.
            self.register_buffer(name, None if table is None else table.to(device))

    @property
    def num_tokens(self) -> int:
        """N: the positions of all windows, including those that hold no token."""
        return len(self.order)

    @property
    def num_windows(self) -> int:
        """W."""
        return len(self.order) // (self.window[0] * self.window[1])

    def windows(self, num_tokens: int) -> Windows:
        del num_tokens
        return Windows(WindowBias(self.relative_bias, self.regions), pads=self.pads, pad_kv=self.pad_kv)


class Move(nn.Module):
    """Brings the stream (B, N, d) from one order into another; positions that hold no token are zero.

    Args:
        current, wanted: the two orders.
    """

    index: torch.Tensor
    index_holes: torch.Tensor | None
    back: torch.Tensor
    back_holes: torch.Tensor | None

    def __init__(self, current: torch.Tensor, wanted: torch.Tensor) -> None:
        super().__init__()
        for name, index in (("index", _places(current, wanted)), ("back", _places(wanted, current))):
            holes = (index < 0).nonzero().squeeze(1)
            self.register_buffer(name, index.clamp(min=0))
            self.register_buffer(f"{name}_holes", holes if len(holes) else None)

    def forward(self, stream: Stream) -> Stream:
        return Stream(*(None if part is None else self._move(part) for part in stream))

    def _move(self, tokens: torch.Tensor) -> torch.Tensor:
        if not (tokens.requires_grad and torch.is_grad_enabled()):
            # As in a block: torch.func's transforms and forward-mode tangents pass plain operations.
            return _gather(tokens, self.index, self.index_holes)
        require_plain_autograd()
        return _MoveFunction.apply(tokens, self.index, self.index_holes, self.back, self.back_holes)


class _MoveFunction(torch.autograd.Function):
    """Backward is a gather, too: autograd's own backward of an index would add into zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        index: torch.Tensor,
        holes: torch.Tensor | None,
        back: torch.Tensor,
        back_holes: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(back, back_holes)
        return _gather(tokens, index, holes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back, back_holes = ctx.saved_tensors
        return _gather(grad, back, back_holes), None, None, None, None


def _gather(x: torch.Tensor, index: torch.Tensor, holes: torch.Tensor | None) -> torch.Tensor:
    moved = x.index_select(1, index)
    return moved if holes is None else moved.index_fill(1, holes, 0)  # not in place: see `_returned`


def _places(current: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The position in the order `current` of each token of `wanted`; -1 where it has none, or is no token."""
    place = torch.full((int(max(current.max(), wanted.max())) + 2,), -1, device="cpu")
    is_token = current >= 0
    place[current[is_token]] = torch.arange(len(current), device="cpu")[is_token]
    return place[wanted]  # place[-1] belongs to no token


class FrozenMerge(nn.Module):
    """Patch merging: the norm of four concatenated neighbours, and a linear layer from 4d to 2d.

    For prompts the four are copies of one prompt, so the norm of one is the norm of the four, and the layer
    is the sum of its four parts: a quarter of the work.

    Args:
        norm, reduction: as stored in a checkpoint; they are folded into one layer.
        move: from the order of the previous stage to the merged tokens' groups of four.
        dtype: of the folded weights; None keeps the layer's own.
        backend, head_dim: it uses the operations of blocks with this head dim.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        norm: NormParts,
        reduction: LinearParts,
        move: Move,
        dtype: torch.dtype | None,
        backend: Backend,
        head_dim: int,
    ) -> None:
        super().__init__()
        folded = after_norm(norm, reduction)
        dtype = dtype or reduction.weight.dtype
        self.norm, self.move = (norm.kind, norm.eps), move
        self.backend, self.head_dim = backend, head_dim
        self.weight = _frozen(folded.weight.to(dtype))  # (2d, 4d)
        self.register_parameter("bias", None if folded.bias is None else _frozen(folded.bias.to(dtype)))

    def forward(self, stream: Stream, policy: MemoryPolicy) -> Stream:
        """The stream (B, N, d) to merged tokens (B, N', 2d), in the order of the next stage."""
        fours = self.move(Stream(stream.sum())).base.unflatten(1, (-1, 4)).flatten(2)  # (B, N', 4d)
        return Stream(self.reduce(fours, policy))

    def reduce(self, x: torch.Tensor, policy: MemoryPolicy) -> torch.Tensor:
        """Groups of four neighbours (B, N', 4d), or prompts (B, m, d), to rows of width 2d."""
        dtype = compute_dtype(x.device.type, self.weight.dtype)
        ops = self.backend.ops(x.device, dtype, self.head_dim, in_windows=True)
        if x.requires_grad and torch.is_grad_enabled():
            require_plain_autograd()
            return _ReduceFunction.apply(x, self.weight, self.bias, self.norm, ops, dtype, policy)
        if ops.name != "torch":
            require_no_forward_ad()
        return _reduced(x, self.weight, self.bias, self.norm, ops, dtype, pack=False)[0]


class _ReduceFunction(torch.autograd.Function):
    """Norm and layer, of four neighbours (..., 4d) or prompts (..., d). Keeps x̂ or its codes, and rstd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: tuple[str, float],
        ops: Ops,
        dtype: torch.dtype,
        policy: MemoryPolicy,
    ) -> torch.Tensor:
        output, x_hat, rstd, codes, scale = _reduced(x, weight, bias, norm, ops, dtype, pack=policy.compact)
        ctx.save_for_backward(weight, x_hat if codes is None else codes, rstd, scale)
        ctx.kind, ctx.ops, ctx.dtype = norm[0], ops, dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        require_first_order()
        weight, x_hat, rstd, scale = ctx.saved_tensors
        with without_autocast(grad.device.type):
            grad_x_hat = grad.to(ctx.dtype) @ _layer(weight, x_hat.shape[-1], ctx.dtype)
            grad_x = ctx.ops.normalize_backward(grad_x_hat, x_hat, rstd, scale, ctx.kind)
        return grad_x, *(None for _ in range(6))


def _reduced(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: tuple[str, float],
    ops: Ops,
    dtype: torch.dtype,
    *,
    pack: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Norm and layer of x in its own dtype, and what `Ops.normalize` returns."""
    kind, eps = norm
    with without_autocast(x.device.type):
        x_hat, rstd, codes, scale = ops.normalize(x, eps, kind, dtype, pack=pack)
        output = F.linear(x_hat, _layer(weight, x.shape[-1], dtype), None if bias is None else bias.to(dtype))
    return _returned(output, x.dtype), x_hat, rstd, codes, scale


def _returned(output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The output of a Function's forward pass, in this dtype.

    Compiled by torch 2.11, a Function silently gets gradients of zero if it returns the very tensor that its
    last operation was given: one that was changed in place, or cast to the dtype that it had.
    """
    return output if output.dtype == dtype else output.to(dtype)


def _layer(weight: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (2d, 4d) as it is for rows of width 4d; for prompts the sum of its four parts, (2d, d)."""
    return (weight if weight.shape[1] == width else weight.unflatten(1, (4, width)).sum(1)).to(dtype)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A Parameter and not a buffer: see `FrozenBlock`."""
    return nn.Parameter(tensor, requires_grad=False)
