"""Converting a timm SwinTransformer: the frozen blocks, and everything before, between and after them.

Variants of timm's that are not supported raise; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import nn

from vpt_fast.backbones.architecture import architecture
from vpt_fast.backbones.layers import (
    class_name,
    copied,
    dtype_of,
    linear_parts,
    on_meta,
    require_embedding,
    require_no_hooks,
    require_usual_scale,
)
from vpt_fast.backbones.parts import mlp_parts, norm_parts
from vpt_fast.backbones.patches import as_input, as_product
from vpt_fast.backbones.sharing import blocks_made_once, fingerprint_once
from vpt_fast.engine import cost
from vpt_fast.engine.contexts import compute_dtype
from vpt_fast.engine.plan import Read
from vpt_fast.engine.policy import POLICIES, MemoryPolicy
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockParts, fold, require_frozen
from vpt_fast.engine.windows import (
    FrozenMerge,
    FrozenWindowBlock,
    Move,
    merge_order,
    raster_order,
    relative_bias,
)
from vpt_fast.kernels import Backend, get_backend
from vpt_fast.kernels.prompted_attention.by_images import images_at_once


class FrozenSwin(nn.Module):
    """A timm SwinTransformer with frozen, folded blocks and no classifier.

    The given model is read and not changed. Every parameter has requires_grad False, and the module stays in
    eval mode whatever `train` is called with. Images must have the model's own size.

    Args:
        swin: the model to read.
        dtype: of the frozen weights; None for the model's own.
        backend: see `kernels.get_backend`.
        attention: ``"auto"``.

    Attributes:
        blocks: all stages' blocks, in order.

    Raises:
        ValueError: an attention implementation chosen by name (none supports a bias), or a part of the model
            that is not supported; the message names it.
    """

    num_prefix_tokens = 0
    takes_any_size = False
    pads_images = False

    def __init__(
        self,
        swin: SwinTransformer,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if attention != "auto":
            raise ValueError(
                f"attention: got {attention!r} with a SwinTransformer, whose windows add a bias to the "
                "scores, which it does not take; want 'auto'"
            )
        operations = get_backend(backend, attention)
        check_swin(swin)
        require_embedding(swin.patch_embed)
        require_no_hooks(swin.layers, "backbone: layers")
        # A deep copy of everything except stages and classifier.
        self.stem: Any = copied(swin, swin.layers, swin.head)
        if dtype is not None:
            self.stem.to(dtype)
        stem: Any = self.stem
        stem.patch_embed.proj = as_product(stem.patch_embed.proj)
        stages: Any = swin.layers
        self.stages = tuple((len(stage.blocks), int(stage.blocks[0].dim)) for stage in stages)
        blocks = blocks_made_once(
            swin,
            (dtype, backend),
            lambda: [
                _window_block(block, f"layers.{index}.blocks.{place}", dtype, operations)
                for index, stage in enumerate(stages)
                for place, block in enumerate(stage.blocks)
            ],
        )
        # ModuleLists, annotated with what they contain.
        self.blocks: list[FrozenWindowBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self._enter: list[nn.Module] = nn.ModuleList(  # type: ignore[assignment]
            self._make_entries(stages, dtype, operations)
        )
        last = self.blocks[-1]
        self._leave = _move(last.order, raster_order(last.size)).to(self.device)
        self.requires_grad_(False)
        self.eval()
        self.fingerprint = fingerprint_once(swin)
        self.architecture = architecture(swin)
        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(swin)
        self.num_parameters = sum(
            p.numel() for name, p in swin.named_parameters() if not name.startswith("head.")
        )

    def _make_entries(
        self, stages: Iterable[SwinTransformerStage], dtype: torch.dtype | None, backend: Backend
    ) -> list[nn.Module]:
        """For each block, the module that reorders the preceding output into the block's order, with patch
        merging at a new stage."""
        device = self.device
        entries: list[nn.Module] = []
        index, order, size = 0, raster_order(self.blocks[0].size), self.blocks[0].size
        for number, stage in enumerate(stages):
            for place in range(len(stage.blocks)):
                block = self.blocks[index]
                if place == 0 and index > 0:
                    merging: Any = stage.downsample
                    where = f"backbone: layers.{number}.downsample"
                    entry: nn.Module = FrozenMerge(
                        norm_parts(merging.norm, f"{where}.norm"),
                        linear_parts(merging.reduction, f"{where}.reduction"),
                        Move(order, merge_order(size, block.order)),
                        dtype,
                        backend,
                        block.spec.head_dim,
                    )
                else:
                    entry = _move(order, block.order)
                entries.append(entry.to(device))
                index, order, size = index + 1, block.order, block.size
        return entries

    def train(self, mode: bool = True) -> FrozenSwin:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.stem.patch_embed.proj.weight.device

    @property
    def trains_embedding(self) -> bool:
        """Whether any parameter that the tokens before the first block depend on requires a gradient."""
        return any(p.requires_grad for p in self.stem.patch_embed.parameters())

    @property
    def num_tokens(self) -> int:
        """N of the first stage, including window positions that hold no token."""
        return self.blocks[0].num_tokens

    @property
    def embed_dim(self) -> int:
        """The width of the last stage, which the head reads."""
        return self.stages[-1][1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the windows are for."""
        return tuple(self.stem.patch_embed.img_size)

    @property
    def in_chans(self) -> int:
        return self.stem.patch_embed.proj.in_channels

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.stem.patch_embed.patch_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> tokens (B, N, d) in row-major order, in at least float32."""
        x = self.stem.patch_embed(as_input(images, self.stem.patch_embed.proj)).flatten(1, 2)
        return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()

    def enter(
        self, index: int, stream: Stream, prompts: torch.Tensor | None, policy: MemoryPolicy
    ) -> tuple[Stream, torch.Tensor | None]:
        """Brings the stream (B, N, d), and prompts (B, m, d) that flow on, from the previous output to the
        input of block `index`: in the block's order, and merged if it is the first of a later stage."""
        entry = self._enter[index]
        if not isinstance(entry, FrozenMerge):
            return entry(stream), prompts
        require_frozen(*entry.parameters())
        return entry(stream, policy), None if prompts is None else entry.reduce(prompts, policy)

    def kept_on_entering(
        self, index: int, batch_size: int, num_prompts: int, dtype: torch.dtype, policy: MemoryPolicy
    ) -> int:
        """Bytes that `enter` keeps for backward: if it merges, the normalised rows with one statistic each,
        or their 8-bit codes with a scale too."""
        if not isinstance(self._enter[index], FrozenMerge):
            return 0
        stat = torch.promote_types(dtype, torch.float32).itemsize
        num_tokens, width = self.blocks[index].num_tokens, self.blocks[index - 1].proj_weight.shape[0]
        size, per_row = (1, 2 * stat) if policy.compact else (dtype.itemsize, stat)
        return batch_size * (
            num_tokens * (4 * width * size + per_row) + num_prompts * (width * size + per_row)
        )

    def leave(self, stream: Stream) -> torch.Tensor:
        """The last block's output to the image's tokens (B, N, d) in row-major order."""
        return self._leave(stream).sum()

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        """Applies the final norm to rows (B, R, d) of the last block's output."""
        return _normalized(self.stem.norm, rows)

    def features(self, rows: torch.Tensor, pool: str | None) -> torch.Tensor:
        """The rows (B, R, d) of the last block's output that `pool` reads, to features (B, d): the mean of
        the normalised rows, whatever `pool` is."""
        del pool
        return self.normalize(rows).mean(dim=1)

    def features_bytes(self, num_rows: int, pool: str | None) -> int:
        """Bytes that `features` keeps for backward of one image with `num_rows` rows, counted on the meta
        device in the norm's own dtype."""
        del pool
        norm = on_meta(self.stem.norm)
        dtype = torch.promote_types(self.blocks[0].qkv_weight.dtype, torch.float32)
        return cost.kept_of_rows(
            lambda rows: _normalized(norm, rows).mean(dim=1),
            (1, num_rows, self.embed_dim),
            dtype,
            norm,
        )

    def head_reads_of_image(self, pool: str | None) -> Read:
        """The rows that `pool` reads in a model without prompts.

        Raises:
            ValueError: a pool whose tokens this model does not have.
        """
        if pool not in (None, "image"):
            raise ValueError(
                f"pool: got {pool!r}, and a SwinTransformer without prompts has none but image tokens; want "
                "None or 'image'"
            )
        return Read.PATCHES

    def run_folded(self, images: torch.Tensor, last: Read) -> torch.Tensor:
        """Runs images (B, C, height, width) through all blocks, without prompts, and returns the last one's
        output (B, N', d')."""
        del last  # always all rows, see head_reads_of_image
        policy, stream = POLICIES["exact"], Stream(self.embed(images))
        for index, block in enumerate(self.blocks):
            stream, _ = self.enter(index, stream, None, policy)
            stream = block(stream, None, (0, block.num_tokens), policy)
        return self.leave(stream)

    def folded_inputs(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Runs images (B, C, height, width) through all blocks, without prompts; yields the tokens (B, N, d)
        that enter each of them, in any order."""
        policy, stream = POLICIES["exact"], Stream(self.embed(images))
        for index, block in enumerate(self.blocks):
            stream, _ = self.enter(index, stream, None, policy)
            yield stream.sum()[:, (block.order >= 0).to(self.device)]
            stream = block(stream, None, (0, block.num_tokens), policy)

    def folded_workspace(self, batch_size: int) -> int:
        """Bytes of temporaries while a block runs and nothing is kept for backward."""
        return max(
            self._scores_bytes(block, batch_size, 0, 0)
            + cost.BlockCall(
                block=block,
                dtype=compute_dtype(self.device.type, block.qkv_weight.dtype),
                batch_size=batch_size,
                num_tokens=block.num_tokens,
                rows=(0, block.num_tokens),
                policy=None,
            ).forward_bytes()
            for block in self.blocks
        )

    def workspace_bytes(self, call: cost.BlockCall) -> int:
        """The workspace of a call of one of the blocks, and the temporaries of window attention."""
        assert isinstance(call.block, FrozenWindowBlock)
        num_prompts = 0 if call.prompt_shape is None else call.prompt_shape[1]
        num_fresh = max(call.rows[1] - call.num_tokens, 0)
        scores = self._scores_bytes(call.block, call.batch_size, num_prompts, num_fresh)
        return scores + call.workspace_bytes()

    def _scores_bytes(
        self, block: FrozenWindowBlock, batch_size: int, num_prompts: int, num_fresh: int
    ) -> int:
        """Bytes of window attention's temporaries, in at least float32: three times the scores of the images
        that plain PyTorch takes at a time; in kernels, the outputs in each window of the `num_fresh` prompts
        whose output is read."""
        dtype = compute_dtype(self.device.type, block.qkv_weight.dtype)
        heads, head_dim = block.spec.num_heads, block.spec.head_dim
        ops = block.backend.ops(self.device, dtype, head_dim, in_windows=True)
        if ops.forms_window_scores:
            per_window = block.num_tokens // block.num_windows + num_prompts
            per_image = block.num_windows * heads * per_window**2
            numbers = 3 * per_image * min(batch_size, images_at_once(self.device, per_image))
        else:
            numbers = batch_size * block.num_windows * num_fresh * heads * head_dim
        return numbers * torch.promote_types(dtype, torch.float32).itemsize


def _normalized(norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return norm(rows.to(dtype_of(norm, default=rows.dtype)))


def _move(current: torch.Tensor, wanted: torch.Tensor) -> nn.Module:
    # Equal orders need a move too if they have positions without a token: it stops the gradient there, since
    # the block takes constant keys and values at such positions.
    if torch.equal(current, wanted) and bool((wanted >= 0).all()):
        return nn.Identity()
    return Move(current, wanted)


def check_swin(swin: SwinTransformer) -> None:
    """Raises ValueError for an unsupported part; the message names it."""
    for method in ("forward_features", "forward_head"):
        if getattr(type(swin), method) is not getattr(SwinTransformer, method):
            raise ValueError(f"backbone: {type(swin).__name__} has its own {method}, which is not supported")
    require_no_hooks(swin, f"backbone: {type(swin).__name__}", below=False)
    if swin.dynamic_img_size:
        raise ValueError(
            "backbone: a SwinTransformer with dynamic_img_size=True or strict_img_size=False is not "
            "supported; want one that is built for its img_size"
        )
    if swin.global_pool != "avg":
        raise ValueError(f"backbone: global_pool={swin.global_pool!r} is not supported, want 'avg'")
    stages: Any = swin.layers
    for index, stage in enumerate(stages):
        wanted = nn.Identity if index == 0 else PatchMerging
        if type(stage.downsample) is not wanted:
            raise ValueError(
                f"backbone: layers.{index}.downsample is a {class_name(stage.downsample)}, which is not "
                f"supported; want {wanted.__name__}"
            )
        for place, block in enumerate(stage.blocks):
            for part, known in (
                (block, SwinTransformerBlock),
                (getattr(block, "attn", None), WindowAttention),
            ):
                if type(part) is not known:
                    raise ValueError(
                        f"backbone: layers.{index}.blocks.{place} has a {class_name(part)}, which is not "
                        f"supported; want timm's {known.__name__}"
                    )
            attn = block.attn
            head_dim = attn.qkv.out_features // (3 * attn.num_heads)
            require_usual_scale(attn, head_dim, f"backbone: layers.{index}.blocks.{place}.attn")


def prompted_attention_branch(
    block: Any, x: torch.Tensor, prompts: torch.Tensor, *, reads_prompts: bool
) -> torch.Tensor:
    """What one of timm's blocks adds after attention, computed by its own modules, if each window also
    attends to prompts. Prompts have no relative position bias and no mask; a prompt's output is the mean over
    its image's windows.

    Args:
        block: a SwinTransformerBlock whose relative position bias table is frozen.
        x: tokens (B, height, width, d).
        prompts: (1 or B, m, d).
        reads_prompts: whether prompts' outputs are read; otherwise only their keys and values are computed.

    Returns:
        (B, N, d), for the tokens in row-major order; with `reads_prompts` followed by the prompts:
        (B, N + m, d).
    """
    attn = block.attn
    windows = _in_windows(block, block.norm1(x))  # (B, W, T, d)
    prompt_rows = block.norm1(prompts).unsqueeze(1)  # (1 or B, 1, m, d)
    batch_size, num_windows, num_tokens, _ = windows.shape
    layer = linear_parts(attn.qkv, "backbone: attn.qkv")
    attn_dim = layer.weight.shape[0] // 3
    heads = (attn.num_heads, attn_dim // attn.num_heads)

    def project(rows: torch.Tensor, part: slice) -> Sequence[torch.Tensor]:
        """The queries, keys or values that this part of the projection gives, (B, W, H, rows, D) each."""
        bias = None if layer.bias is None else layer.bias[part]
        y = F.linear(rows, layer.weight[part], bias).unflatten(-1, (-1, *heads)).transpose(2, 4)
        return y.expand(batch_size, num_windows, -1, -1, -1, -1).unbind(3)

    # Queries are projected separately: as views of one packed tensor they would keep keys and values alive
    # after these have been concatenated.
    reading = (windows, prompt_rows) if reads_prompts else (windows,)
    queries = [q for rows in reading for q in project(rows, slice(attn_dim))]
    keys, values = zip(
        *(project(rows, slice(attn_dim, None)) for rows in (windows, prompt_rows)), strict=True
    )
    # Windows and heads in one dimension, so that one bias serves every image.
    q, k, v = (torch.cat(parts, dim=3).flatten(1, 2) for parts in (queries, keys, values))
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)  # (H, T, T)
    bias = bias.expand(num_windows, -1, -1, -1)
    if block.attn_mask is not None:
        bias = bias + block.attn_mask.unsqueeze(1)
    bias = F.pad(bias, (0, k.shape[2] - num_tokens, 0, q.shape[2] - num_tokens))
    bias = bias.flatten(0, 1).unsqueeze(0).to(q.dtype)  # (1, W·H, T or T + m, T + m)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    out = out.unflatten(1, (num_windows, -1)).transpose(2, 3).flatten(3)  # (B, W, T or T + m, H·D)
    update = _out_of_windows(block, out[:, :, :num_tokens], x.shape[1], x.shape[2])
    if reads_prompts:  # averaged before the projection, which is linear
        update = torch.cat((update, out[:, :, num_tokens:].mean(dim=1)), dim=1)
    return attn.proj_drop(attn.proj(update))


def _in_windows(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Tokens (B, height, width, d), shifted and padded with zeros, to each window's tokens (B, W, T, d)."""
    shift, window = block.shift_size, block.window_size
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
    num_windows = x.shape[1] // window[0] * (x.shape[2] // window[1])
    return window_partition(x, window).flatten(1, 2).unflatten(0, (-1, num_windows))


def _out_of_windows(block: Any, windows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `_in_windows`: (B, W, T, d) to (B, height·width, d)."""
    shift, window = block.shift_size, block.window_size
    windows = windows.flatten(0, 1).unflatten(1, tuple(window))
    x = window_reverse(windows, window, height + -height % window[0], width + -width % window[1])
    x = x[:, :height, :width]
    if any(shift):
        x = torch.roll(x, tuple(shift), (1, 2))
    return x.flatten(1, 2)


def _window_block(block: Any, name: str, dtype: torch.dtype | None, backend: Backend) -> FrozenWindowBlock:
    where = f"backbone: {name}"
    attn = block.attn
    parts = BlockParts(
        num_heads=attn.num_heads,
        norm1=norm_parts(block.norm1, f"{where}.norm1"),
        qkv=linear_parts(attn.qkv, f"{where}.attn.qkv"),
        q_norm=None,
        k_norm=None,
        attn_norm=None,
        proj=linear_parts(attn.proj, f"{where}.attn.proj"),
        scale1=None,
        norm2=norm_parts(block.norm2, f"{where}.norm2"),
        **mlp_parts(block.mlp, f"{where}.mlp"),
        scale2=None,
    )
    spec, weights = fold(parts, dtype)
    bias = relative_bias(attn.relative_position_bias_table, attn.relative_position_index)
    heads = (spec.num_heads, spec.head_dim)
    if parts.qkv.bias is None:
        pad_kv = bias.new_zeros(2, *heads)
    else:
        pad_kv = parts.qkv.bias.detach().unflatten(0, (3, *heads))[1:].clone()
    return FrozenWindowBlock(
        spec,
        weights,
        backend,
        relative_bias=bias.to(torch.promote_types(weights.qkv_weight.dtype, torch.float32)),
        pad_kv=pad_kv,
        size=tuple(block.input_resolution),
        window=tuple(block.window_size),
        shift=tuple(block.shift_size),
    )
