"""Converting a timm VisionTransformer: the frozen blocks, and everything before and after them.

Variants of timm's that are not supported raise; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import timm.data
import torch
from timm.layers import LayerScale
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from vpt_fast.backbones.architecture import CLASSIFIERS, architecture
from vpt_fast.backbones.layers import (
    copied,
    dtype_of,
    linear_parts,
    on_meta,
    require_embedding,
    require_images,
    require_no_hooks,
)
from vpt_fast.backbones.parts import (
    check_attention,
    layer_scale,
    mlp_parts,
    norm_parts,
    optional_norm_parts,
    qkv_parts,
)
from vpt_fast.backbones.patches import as_input, as_product
from vpt_fast.backbones.sharing import blocks_made_once, fingerprint_once
from vpt_fast.engine import cost
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.call import Rotation
from vpt_fast.engine.contexts import compute_dtype
from vpt_fast.engine.plan import Read, row_range
from vpt_fast.engine.policy import POLICIES
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockParts, BlockSpec, BlockWeights, LinearParts, fold
from vpt_fast.kernels import Backend, get_backend

# The keyword arguments of one of timm's own blocks, and of several blocks.
Position = dict[str, torch.Tensor]
Positions = Sequence[Position]

# The rows that each pooling averages, after the final norm (Fig. 8).
POOLS = {
    "cls": Read.CLS,
    "image": Read.PATCHES,
    "prompts": Read.PROMPTS,
    "image_and_prompts": Read.PATCHES_AND_PROMPTS,
}


class FrozenViT(nn.Module):
    """A timm VisionTransformer with frozen, folded blocks and no classifier.

    The given model is read and not changed: the blocks' weights are folded copies, the rest is copied.
    Every parameter has requires_grad False. The module stays in eval mode whatever `train` is called with,
    since a frozen backbone has no dropout to enable; only timm's own blocks, and the dropout behind them,
    change mode.

    Args:
        vit: the model to read.
        dtype: of the frozen weights; None for the model's own.
        backend, attention: see `kernels.get_backend`.
        timm_blocks: how many of the last blocks are copies of timm's own and not folded, for methods that
            train them. They and the modules after them are at least float32, whatever `dtype` is.
        residual_dtype: of the residual stream (the tokens between blocks): None for at least float32.

    Raises:
        ValueError: the model has a part that is not supported; the message names it.
    """

    reorders_keys = False  # whether `keys_as_folded` returns another tensor than it is given

    def __init__(
        self,
        vit: VisionTransformer,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        operations = get_backend(backend, attention)
        self._check(vit)
        self.residual_dtype = residual_dtype
        # A deep copy of everything except blocks and classifier.
        self.stem: VisionTransformer = copied(
            vit, vit.blocks, *(module for name, module in vit.named_children() if name in CLASSIFIERS)
        )
        self.stem.requires_grad_(False)
        if dtype is not None:
            self.stem.to(dtype)
        self.stem.patch_embed.proj = as_product(self.stem.patch_embed.proj)
        self.num_folded = len(vit.blocks) - timm_blocks
        folded = blocks_made_once(
            vit, (dtype, backend, attention, self.num_folded), lambda: self._fold(vit, dtype, operations)
        )
        others = list(enumerate(vit.blocks))[self.num_folded :]
        for index, block in others:
            self._block_parts(block, index)  # refuses what is not supported
        blocks = [*folded, *(_at_least_float32(copied(block)) for _, block in others)]
        # A ModuleList, annotated with what it usually contains.
        self.blocks: Sequence[FrozenBlock] = nn.ModuleList(blocks).requires_grad_(False)  # type: ignore
        if timm_blocks:
            for name in ("norm", "attn_pool", "fc_norm"):
                if getattr(vit, name, None) is not None:
                    module = _at_least_float32(copied(getattr(vit, name)))
                    setattr(self.stem, name, module.requires_grad_(False))
        self.eval()
        # Of the given model: folding and dtype do not change which backbone it is.
        self.fingerprint = fingerprint_once(vit)
        self.architecture = architecture(vit)
        self.undecayed: set[str] = vit.no_weight_decay()  # names in timm's model
        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(vit)
        self.num_parameters = sum(
            p.numel() for name, p in vit.named_parameters() if name.partition(".")[0] not in CLASSIFIERS
        )

    def _fold(self, vit: VisionTransformer, dtype: torch.dtype | None, backend: Backend) -> list[nn.Module]:
        """The first `num_folded` blocks, folded."""
        blocks: list[nn.Module] = []
        for index, block in enumerate(vit.blocks[: self.num_folded]):
            parts = self._block_parts(block, index)
            require_no_hooks(block, f"backbone: blocks.{index}")
            blocks.append(self._frozen_block(block, *fold(parts, dtype), backend))
        return blocks

    @staticmethod
    def _frozen_block(block: Any, spec: BlockSpec, weights: BlockWeights, backend: Backend) -> FrozenBlock:
        """The block of the engine for one of timm's, from its folded parts."""
        del block
        return FrozenBlock(spec, weights, backend)

    def train(self, mode: bool = True) -> FrozenViT:
        """Sets the mode of timm's own blocks and of the dropout behind them; everything else stays in eval
        mode."""
        super().train(False)
        if self.timm_blocks:
            for module in (*self.timm_blocks, self.stem.head_drop):
                module.train(mode)
        return self

    @property
    def folded_blocks(self) -> Sequence[FrozenBlock]:
        """The first blocks, which are folded."""
        return self.blocks[: self.num_folded]

    @property
    def timm_blocks(self) -> Sequence[Block]:
        """The last blocks, which are timm's own; there may be none."""
        return self.blocks[self.num_folded :]  # type: ignore[return-value]

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys have rotary positions."""
        return False

    @property
    def device(self) -> torch.device:
        return self.stem.patch_embed.proj.weight.device

    @property
    def trains_embedding(self) -> bool:
        """Whether any parameter that the tokens before the first block depend on requires a gradient."""
        behind = ("norm.", "fc_norm.", "attn_pool.")
        return any(p.requires_grad for name, p in self.stem.named_parameters() if not name.startswith(behind))

    @property
    def embed_dim(self) -> int:
        return self.stem.embed_dim

    def num_features(self, pool: str | None) -> int:
        """The width of `features`: d, or 2 d for both tokens of a distilled model."""
        return self.embed_dim * (self.num_prefix_tokens if self.head_reads(pool) is Read.PREFIX else 1)

    @property
    def num_prefix_tokens(self) -> int:
        return self.stem.num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """N at the model's own image size: prefix tokens and patches."""
        return self.num_prefix_tokens + self.stem.patch_embed.num_patches

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the position embedding is for."""
        return tuple(self.stem.patch_embed.img_size)

    @property
    def in_chans(self) -> int:
        """Channels of the images, without those that prompts add."""
        return self.stem.in_chans

    @property
    def takes_any_size(self) -> bool:
        """Whether images may have a size other than `image_size` (timm's dynamic_img_size)."""
        return not self.stem.patch_embed.strict_img_size

    @property
    def pads_images(self) -> bool:
        """Whether images of any size are padded to whole patches (timm's dynamic_img_pad)."""
        return self.stem.patch_embed.dynamic_img_pad

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.stem.patch_embed.patch_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> tokens before the first block (B, N, d), in `residual_dtype`.

        The residual stream is kept for backward only under the policy "recompute", so float32 costs memory
        only there; it costs time, since every block reads and writes the stream.

        Raises ValueError for a batch of 0 with dynamic_img_size.
        """
        if self.stem.dynamic_img_size:
            require_images(images, "timm's positions for images of any size (dynamic_img_size)")
        x = self.stem.patch_embed(as_input(images, self.stem.patch_embed.proj))
        x = self._norm_pre(self._add_positions(x))
        # Without prefix tokens, nothing has yet copied a convolution's output to channels-last.
        return x.to(self.residual_dtype or torch.promote_types(x.dtype, torch.float32)).contiguous()

    @torch.inference_mode(False)  # in inference mode autograd saves nothing that could be counted
    def embed_bytes(self, *, grad_images: bool) -> int:
        """Bytes that `embed` keeps for backward of one image of the model's own size, counted on the meta
        device in the modules' own dtype. grad_images: whether the image's gradient is wanted."""
        meta = on_meta(self)
        shape = (1, meta.stem.patch_embed.proj.in_channels, *self.image_size)
        images = torch.empty(shape, device="meta", requires_grad=grad_images)
        with cost.counting_kept(meta) as kept_sizes:
            meta.embed(images)
        return sum(kept_sizes())

    def embed_pixel_prompts(self, pixels: torch.Tensor) -> torch.Tensor:
        """Prompts that are a strip of patches: (1, C, p, p·m) -> (1, m, d), without position embedding."""
        patch_embed = self.stem.patch_embed
        x = patch_embed.proj(as_input(pixels, patch_embed.proj)).flatten(2).transpose(1, 2)
        x = self._norm_pre(patch_embed.norm(x))
        return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()

    def keys_as_folded(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompts (.., 2·H·D) that are keys and values, with the dimensions of keys in timm's order, to those
        that a folded block takes."""
        return prompts

    def rotations(self, image_size: tuple[int, int]) -> Sequence[Rotation | None]:
        """Each folded block's rotary positions for an image of this (height, width)."""
        del image_size
        return (None,) * self.num_folded

    def timm_positions(self, image_size: tuple[int, int]) -> Positions:
        """The keyword arguments of each of timm's own blocks for an image of this (height, width)."""
        del image_size
        return ({},) * len(self.timm_blocks)

    def require_batch(self, x: torch.Tensor) -> None:
        """Raises ValueError for a batch (B, N, d) that timm's own blocks do not take."""

    def for_timm_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, d) in the dtype of timm's own blocks: that of `embed`, unless the whole model was
        cast to a 16-bit dtype."""
        return x.to(dtype_of(self.timm_blocks[0], default=x.dtype))

    def run_folded(self, images: torch.Tensor, last: Read) -> torch.Tensor:
        """Runs images (B, C, height, width) through the folded blocks, without prompts. Returns the rows
        (B, R, d) of the last one's output that `last` names."""
        if self.num_folded == 0:
            return self.embed(images)
        return self.folded_outputs(images, (self.num_folded - 1,), last)[0]

    def folded_outputs(self, images: torch.Tensor, wanted: Sequence[int], last: Read) -> list[torch.Tensor]:
        """Runs images (B, C, height, width) through the folded blocks up to the last one in `wanted`, without
        prompts. Returns the output of each block in `wanted`: all tokens (B, N, d), except for the last one,
        of which it returns the rows (B, R, d) that `last` names."""
        stream = Stream(self.embed(images))
        num_tokens, rotations = stream.num_tokens, self.rotations(size_of(images))
        outputs = []
        for index in range(wanted[-1] + 1):
            read = last if index == wanted[-1] else Read.TOKENS
            rows = row_range(read, num_tokens, self.num_prefix_tokens, 0)
            stream = self.folded_blocks[index](stream, None, rows, POLICIES["exact"], rotations[index])
            if index in wanted:
                outputs.append(stream.sum())
        return outputs

    def folded_inputs(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Runs images (B, C, height, width) through the folded blocks, without prompts; yields the tokens
        (B, N, d) that enter each of them."""
        stream = Stream(self.embed(images))
        rows = 0, stream.num_tokens
        for block, rotation in zip(self.folded_blocks, self.rotations(size_of(images)), strict=True):
            yield stream.sum()
            stream = block(stream, None, rows, POLICIES["exact"], rotation)

    def folded_workspace(self, batch_size: int) -> int:
        """Bytes of temporaries while a folded block runs and nothing is kept for backward; 0 if there are no
        folded blocks."""
        return max(
            (
                cost.BlockCall(
                    block=block,
                    dtype=compute_dtype(self.device.type, block.qkv_weight.dtype),
                    batch_size=batch_size,
                    num_tokens=self.num_tokens,
                    rows=(0, self.num_tokens),
                    policy=None,
                    residual_dtype=self.residual_dtype,
                ).forward_bytes()
                for block in self.folded_blocks
            ),
            default=0,
        )

    @staticmethod
    def _check(vit: Any) -> None:
        """Raises ValueError for a model with an unsupported part outside its blocks."""
        if isinstance(vit, VisionTransformerDistilled):
            check_methods(vit, VisionTransformerDistilled)
            _check_distilled(vit)
        else:
            check_methods(vit, VisionTransformer)
        check_ends(vit)

    @staticmethod
    def _block_parts(block: Any, index: int) -> BlockParts:
        where = f"backbone: blocks.{index}"
        if type(block) is not Block:
            raise ValueError(
                f"{where} is a {type(block).__name__}, which is not supported; want timm's Block"
            )
        attn: Any = block.attn
        check_attention(attn, (Attention,), f"{where}.attn")
        return BlockParts(
            num_heads=attn.num_heads,
            norm1=norm_parts(block.norm1, f"{where}.norm1"),
            qkv=linear_parts(attn.qkv, f"{where}.attn.qkv"),
            q_norm=optional_norm_parts(attn.q_norm, f"{where}.attn.q_norm"),
            k_norm=optional_norm_parts(attn.k_norm, f"{where}.attn.k_norm"),
            attn_norm=optional_norm_parts(attn.norm, f"{where}.attn.norm"),
            proj=linear_parts(attn.proj, f"{where}.attn.proj"),
            scale1=layer_scale(block.ls1, f"{where}.ls1"),
            norm2=norm_parts(block.norm2, f"{where}.norm2"),
            **mlp_parts(block.mlp, f"{where}.mlp"),
            scale2=layer_scale(block.ls2, f"{where}.ls2"),
        )

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        """The patch embedding's output to all tokens with position embeddings."""
        return self.stem.patch_drop(self.stem._pos_embed(x))

    @property
    def _pools_prefix_tokens(self) -> bool:
        """Whether the model's own pooling, if it is not CLS, includes CLS and registers."""
        return self.stem.pool_include_prefix

    def attention_branch(self, block: Any, x: torch.Tensor, position: Position) -> torch.Tensor:
        """What one of timm's blocks adds to its input x after attention, before stochastic depth."""
        return self._scale_attention(block, block.attn(block.norm1(x), **position))

    def prompted_attention_branch(
        self, block: Any, x: torch.Tensor, prompts: torch.Tensor, position: Position
    ) -> torch.Tensor:
        """Like `attention_branch`, but x (B, N, d) also attends to prompts (1 or B, m, d), which only have
        keys and values: what timm's attention gives for the rows of x in the concatenated sequence."""
        attn = block.attn
        layer, batch_size = self._qkv_parts(attn), x.shape[0]
        attn_dim = layer.weight.shape[0] // 3
        heads = (attn.num_heads, attn_dim // attn.num_heads)

        def project(rows: torch.Tensor, index: int) -> torch.Tensor:
            """Queries (index 0), keys (1) or values (2), (.., H, rows, D)."""
            part = slice(index * attn_dim, (index + 1) * attn_dim)
            bias = None if layer.bias is None else layer.bias[part]
            return F.linear(rows, layer.weight[part], bias).unflatten(-1, heads).transpose(1, 2)

        x_hat, prompt_x_hat = block.norm1(x), block.norm1(prompts)
        # Separately: as views of one packed tensor, queries, and keys that a norm keeps, would keep the
        # image's keys and values alive after these have been concatenated with the prompts'.
        q, k, v = (project(x_hat, index) for index in range(3))
        prompt_k, prompt_v = (project(prompt_x_hat, index) for index in (1, 2))
        q, k = self._turn(attn, attn.q_norm(q), attn.k_norm(k), position)
        k, v = (
            torch.cat((own.expand(batch_size, -1, -1, -1), images), dim=2)
            for own, images in ((attn.k_norm(prompt_k), k), (prompt_v, v))
        )
        dropout = attn.attn_drop.p if attn.training else 0.0
        bias = self._score_bias(attn, prompts.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout)  # (B, H, N, D)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        return self._scale_attention(block, attn.proj_drop(attn.proj(out)))

    @staticmethod
    def _score_bias(attn: Any, num_prompts: int) -> torch.Tensor | None:
        """What one of timm's blocks adds to its scores, (1, H, N, m + N), or None."""
        del attn, num_prompts
        return None

    @staticmethod
    def _scale_attention(block: Any, update: torch.Tensor) -> torch.Tensor:
        """Applies the block's LayerScale, if it has one."""
        return block.ls1(update)

    @staticmethod
    def _qkv_parts(attn: Any) -> LinearParts:
        return linear_parts(attn.qkv, "backbone: attn.qkv")

    @staticmethod
    def _turn(
        attn: Any, q: torch.Tensor, k: torch.Tensor, position: Position
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies rotary positions, if there are any, to q and k (B, H, N, D)."""
        del attn, position
        return q, k

    def num_layer_scales(self, block: Any) -> int:
        """The number of LayerScales in one of timm's blocks."""
        return sum(isinstance(scale, LayerScale) for scale in (block.ls1, block.ls2))

    def mlp_branch(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """What one of timm's blocks adds after its MLP, before stochastic depth."""
        return block.ls2(block.mlp(block.norm2(x)))

    def _norm_pre(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem.norm_pre(x.to(dtype_of(self.stem.norm_pre, default=x.dtype)))

    def head_reads(self, pool: str | None) -> Read:
        """The rows that `pool` reads; None is the model's own pooling.

        Raises:
            ValueError: a pool whose tokens this model does not have.
        """
        if pool is None:
            if isinstance(self.stem, VisionTransformerDistilled):
                return Read.PREFIX
            if self.stem.attn_pool is None and self.stem.global_pool == "token":
                return Read.CLS
            return Read.TOKENS if self._pools_prefix_tokens else Read.PATCHES
        if pool == "cls" and self.stem.cls_token is None:
            raise ValueError("pool: got 'cls', and this backbone has no CLS token")
        return POOLS[pool]

    def head_reads_of_image(self, pool: str | None) -> Read:
        """`head_reads` for a model without prompts.

        Raises:
            ValueError: a pool whose tokens this model does not have.
        """
        reads = self.head_reads(pool)
        if reads.prompts:
            raise ValueError(f"pool: got {pool!r}, and the model has no prompts; want None, 'cls' or 'image'")
        return reads

    def normalize(self, rows: torch.Tensor) -> torch.Tensor:
        """Applies the final norm to rows (B, R, d) of the last block's output."""
        return self.stem.norm(rows.to(dtype_of(self.stem.norm, default=rows.dtype)))

    def features(self, rows: torch.Tensor, pool: str | None) -> torch.Tensor:
        """The rows (B, R, d) of the last block's output that `head_reads(pool)` names, to features
        (B, `num_features`)."""
        return self._features(self.stem, rows, pool)

    def features_bytes(self, num_rows: int, pool: str | None) -> int:
        """Bytes that `features` keeps for backward of one image with `num_rows` rows, counted on the meta
        device in the modules' own dtype."""
        stem, weights = self.stem, nn.ModuleDict()
        for name in ("norm", "attn_pool", "fc_norm", "head_drop"):
            if getattr(stem, name) is not None:
                weights[name] = on_meta(getattr(stem, name))
        parts = {"attn_pool": None, "global_pool": stem.global_pool, **weights}
        wide = torch.promote_types(dtype_of(self.blocks[0], default=torch.float32), torch.float32)
        dtype = self.residual_dtype or wide
        return cost.kept_of_rows(
            lambda rows: self._features(SimpleNamespace(**parts), rows, pool),
            (1, num_rows, self.embed_dim),
            dtype,
            weights,
        )

    @staticmethod
    def _features(stem: Any, rows: torch.Tensor, pool: str | None) -> torch.Tensor:
        """`features`, of a stem's norms and pooling."""
        x = stem.norm(rows.to(dtype_of(stem.norm, stem.fc_norm, stem.attn_pool, default=rows.dtype)))
        if pool is not None:
            x = x[:, 0] if pool == "cls" else x.mean(dim=1)
        elif stem.attn_pool is not None:
            x = stem.attn_pool(x)
        elif stem.global_pool == "token":
            # timm's distilled models average the logits of two heads, one for each token. One linear layer on
            # half of both tokens is the same function, with the heads' weights side by side.
            x = x[:, 0] if x.shape[1] == 1 else x.flatten(1) / x.shape[1]
        elif stem.global_pool == "avg":
            x = x.mean(dim=1)
        elif stem.global_pool == "max":
            x = x.amax(dim=1)
        else:  # avgmax; _check lets no other through
            x = 0.5 * (x.amax(dim=1) + x.mean(dim=1))
        return stem.head_drop(stem.fc_norm(x))


class GammaBlocks:
    """A FrozenViT's methods for timm's blocks whose LayerScales are vectors gamma_1 and gamma_2, or None."""

    @staticmethod
    def _scale_attention(block: Any, update: torch.Tensor) -> torch.Tensor:
        return update if block.gamma_1 is None else block.gamma_1 * update

    @staticmethod
    def _qkv_parts(attn: Any) -> LinearParts:
        return qkv_parts(attn, "backbone: attn")

    def num_layer_scales(self, block: Any) -> int:
        return (block.gamma_1 is not None) + (block.gamma_2 is not None)

    def mlp_branch(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        update = block.mlp(block.norm2(x))
        return update if block.gamma_2 is None else block.gamma_2 * update


def _at_least_float32(module: nn.Module) -> nn.Module:
    return module.to(torch.promote_types(dtype_of(module, default=torch.float32), torch.float32))


def size_of(images: torch.Tensor) -> tuple[int, int]:
    """(height, width) of images (B, C, height, width)."""
    return images.shape[2], images.shape[3]


def check_methods(vit: nn.Module, timm_class: type[nn.Module]) -> None:
    """Raises ValueError for a subclass of `timm_class` that overrides part of the forward pass."""
    for method in ("forward_features", "_pos_embed", "pool", "forward_head"):  # a Beit lacks two of them
        if getattr(type(vit), method, None) is not getattr(timm_class, method, None):
            raise ValueError(f"backbone: {type(vit).__name__} has its own {method}, which is not supported")


def _check_distilled(vit: VisionTransformerDistilled) -> None:
    """Raises ValueError for separate logits in training, and for settings that timm's distilled models ignore
    or fail with."""
    given = {
        "distilled_training": vit.distilled_training,
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.reg_token is not None,
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"backbone: got a {type(vit).__name__} with {name}, which is not supported; want one without"
            )


def check_ends(vit: Any) -> None:
    """Raises ValueError for an unsupported patch embedding or pooling, a model without blocks, or hooks of
    the model or of its blocks as a whole, neither of which is called."""
    require_no_hooks(vit, f"backbone: {type(vit).__name__}", below=False)
    require_no_hooks(vit.blocks, "backbone: blocks", below=False)
    if len(vit.blocks) == 0:
        raise ValueError(f"backbone: got a {type(vit).__name__} without blocks")
    if getattr(vit, "attn_pool", None) is None and vit.global_pool not in ("token", "avg", "max", "avgmax"):
        raise ValueError(
            f"backbone: global_pool={vit.global_pool!r} gives no feature vector; "
            "want 'token', 'avg', 'max', 'avgmax' or an attention-pool head"
        )
    require_embedding(vit.patch_embed)
