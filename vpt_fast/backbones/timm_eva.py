"""Converting a timm Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary positions.

Queries and keys of the patches are rotated according to their positions; those of CLS, registers and prompts
are not. Variants of timm's that are not supported raise; nothing is approximated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

from vpt_fast.backbones.layers import linear_parts, require_images
from vpt_fast.backbones.parts import (
    check_attention,
    mlp_parts,
    norm_parts,
    optional_norm_parts,
    qkv_parts,
)
from vpt_fast.backbones.timm_vit import (
    FrozenViT,
    GammaBlocks,
    Position,
    Positions,
    check_ends,
    check_methods,
)
from vpt_fast.engine.call import Rotation
from vpt_fast.engine.weights import BlockParts, LinearParts, NormParts, require_frozen

_MAX_TABLES = 16  # tables to cache, as for several image sizes in multi-scale training

_ROPES = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)


class FrozenEva(GammaBlocks, FrozenViT):
    """A timm Eva with frozen, folded blocks and no classifier. Args and errors are those of `FrozenViT`.

    Attributes:
        rope: timm's rotary position module; None if the model has none or does not need it any more.
        sin, cos: of the angles at the model's own image size, (1 or blocks, P, 1 or H, D/2), for the folded
            blocks; None without rotary positions or folded blocks.
    """

    rope: Any
    sin: torch.Tensor | None
    cos: torch.Tensor | None

    def __init__(
        self,
        vit: Eva,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        if timm_blocks == len(vit.blocks):
            _check_training(vit)
        super().__init__(vit, dtype, backend, attention, timm_blocks, residual_dtype)  # type: ignore[arg-type]
        # Held outside the stem, which then returns tokens only and computes no unused rotary positions; in at
        # least float32 whatever `dtype` is: at large coordinates a rounded frequency gives wrong angles.
        self.stem.rope = None
        wide = torch.promote_types(vit.patch_embed.proj.weight.dtype, torch.float32)
        self.rope = copy.deepcopy(vit.rope)
        self.reorders_keys = not vit.blocks[0].attn.rotate_half
        self.sin = self.cos = None
        self._tables: dict[Hashable, tuple[torch.Tensor, ...]] = {}
        if self.rope is not None:
            self.rope.to(wide).requires_grad_(False).eval()
            for block in self.folded_blocks:
                block.backend.require_head_dim(block.spec.head_dim, is_rotary=True)
            if self.num_folded:
                # Parameters and not buffers: see `FrozenBlock`.
                sin, cos = (nn.Parameter(table, requires_grad=False) for table in self._angles(self._grid()))
                self.sin, self.cos = sin, cos
            if not timm_blocks and not self.takes_any_size:
                self.rope = None  # not needed any more, and its tables are buffers

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FrozenEva:
        """Moves rotary positions to a device too, but does not cast them to a 16-bit dtype."""

        def widely(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.itemsize >= torch.float32.itemsize:
                return moved
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))

        # Cached tables are dropped only if they move: a captured CUDA graph reads them at their address.
        if any(widely(table) is not table for tables in self._tables.values() for table in tables):
            self._tables.clear()
        for child in self.children() if recurse else ():
            child._apply(widely if child is self.rope else fn)
        return super()._apply(widely, recurse=False)

    @property
    def is_rotary(self) -> bool:
        return self.rope is not None or self.sin is not None

    @staticmethod
    def _check(vit: Any) -> None:
        check_methods(vit, Eva)
        check_ends(vit)
        if vit.rope is not None and type(vit.rope) not in _ROPES:
            raise ValueError(
                f"backbone: rope is a {type(vit.rope).__name__}, which is not supported; want timm's "
                + " or ".join(kind.__name__ for kind in _ROPES)
            )

    @staticmethod
    def _block_parts(block: Any, index: int) -> BlockParts:
        where = f"backbone: blocks.{index}"
        if type(block) is not EvaBlock:
            raise ValueError(
                f"{where} is a {type(block).__name__}, which is not supported; want timm's EvaBlock"
            )
        attn = block.attn
        check_attention(attn, (EvaAttention, AttentionRope), f"{where}.attn")
        if getattr(attn, "num_kv_groups", 1) > 1:
            raise ValueError(
                f"{where}.attn has {attn.num_kv_heads} heads of keys for {attn.num_heads} of queries "
                "(num_kv_heads), which is not supported"
            )
        qkv = qkv_parts(attn, f"{where}.attn")
        q_norm = optional_norm_parts(attn.q_norm, f"{where}.attn.q_norm")
        k_norm = optional_norm_parts(attn.k_norm, f"{where}.attn.k_norm")
        if not attn.rotate_half:
            # The engine rotates i and i + D/2 together. Reordering a head's dimensions does not change the
            # products of queries and keys, as long as both have the same order.
            qkv = _reordered(qkv, attn.num_heads)
            q_norm, k_norm = (_reordered_norm(norm) for norm in (q_norm, k_norm))
        return BlockParts(
            num_heads=attn.num_heads,
            norm1=norm_parts(block.norm1, f"{where}.norm1"),
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            attn_norm=optional_norm_parts(attn.norm, f"{where}.attn.norm"),
            proj=linear_parts(attn.proj, f"{where}.attn.proj"),
            scale1=block.gamma_1,
            norm2=norm_parts(block.norm2, f"{where}.norm2"),
            **mlp_parts(block.mlp, f"{where}.mlp"),
            scale2=block.gamma_2,
        )

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        tokens, _ = self.stem._pos_embed(x)
        return tokens

    @property
    def _pools_prefix_tokens(self) -> bool:
        return self.stem.attn_pool is not None

    def _rope_parameters(self) -> list[nn.Parameter]:
        return [] if self.rope is None else list(self.rope.parameters())

    def _grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in patches of an image of this size; None for the model's own image size."""
        return self.stem.patch_embed.dynamic_feat_size(image_size or self.image_size)

    def _timm_angles(self, grid: tuple[int, int]) -> torch.Tensor:
        """timm's sines and cosines, concatenated: (P, 2D), or per block and head (L, H, P, 2D)."""
        return self.rope.get_embed(shape=grid)

    def _kept(
        self, name: str, make: Callable[[tuple[int, int]], tuple[torch.Tensor, ...]], grid: tuple[int, int]
    ) -> tuple[torch.Tensor, ...]:
        """`make(grid)`, cached: timm creates DINOv3's tables on the CPU, and copying them to a GPU
        synchronises, which a CUDA graph does not allow. Tables of frequencies that are parameters, which may
        change, are not cached."""
        # While compiling or tracing, sizes and tensors are symbolic.
        if self._rope_parameters() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return make(grid)
        key = (name, grid, self.device)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                made = make(grid)
            # Not cached: fake tensors (FakeTensorMode), and tensors made during a capture, which have no
            # values until the replay. No entry is evicted, since a captured graph may read it.
            is_real = all(type(table) is torch.Tensor for table in made) and not _is_capturing()
            if not is_real or len(self._tables) >= _MAX_TABLES:
                return made
            if self.device.type == "cuda":  # first complete: another thread may read it on another stream
                torch.cuda.current_stream(self.device).synchronize()
            self._tables[key] = made
        return self._tables[key]

    def _angles(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """sin and cos (1 or L, P, 1 or H, D/2)."""
        tables = self._timm_angles(grid).detach()
        tables = tables.transpose(1, 2) if tables.ndim == 4 else tables.unsqueeze(1).unsqueeze(0)
        sin, cos = tables.chunk(2, dim=-1)
        # timm holds each angle twice, once for each of the two dimensions that it rotates.
        half = sin.shape[-1] // 2
        once = slice(half) if _pairs_halves(self.rope) else slice(0, None, 2)
        return sin[..., once].contiguous(), cos[..., once].contiguous()

    def keys_as_folded(self, prompts: torch.Tensor) -> torch.Tensor:
        if not self.reorders_keys:
            return prompts
        keys, values = prompts.chunk(2, dim=-1)
        heads = keys.unflatten(-1, (-1, self.folded_blocks[0].spec.head_dim))
        return torch.cat((_evens_first(heads).flatten(-2), values), dim=-1)

    def rotations(self, image_size: tuple[int, int]) -> Sequence[Rotation | None]:
        if self.sin is None or self.cos is None:
            return super().rotations(image_size)
        require_frozen(self.sin, self.cos, *self._rope_parameters())
        sin, cos = self.sin, self.cos
        if image_size != self.image_size:
            sin, cos = self._kept("engine", self._angles, self._grid(image_size))
        own = len(sin) > 1  # whether every block has its own table
        return [
            Rotation(sin[index * own], cos[index * own], self.num_prefix_tokens)
            for index in range(self.num_folded)
        ]

    def require_batch(self, x: torch.Tensor) -> None:
        if isinstance(self.timm_blocks[0].attn, EvaAttention):
            require_images(x, "timm's own blocks of an Eva")

    def timm_positions(self, image_size: tuple[int, int]) -> Positions:
        if self.rope is None:
            return super().timm_positions(image_size)
        grid = self._grid(image_size)
        (angles,) = self._kept("timm", lambda grid: (self._timm_angles(grid),), grid)
        by_block = angles[self.num_folded :] if angles.ndim == 4 else [angles] * len(self.timm_blocks)
        return [{"rope": angles} for angles in by_block]

    @staticmethod
    def _turn(
        attn: Any, q: torch.Tensor, k: torch.Tensor, position: Position
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not position:
            return q, k
        start, half = attn.num_prefix_tokens, attn.rotate_half

        def turned(rows: torch.Tensor) -> torch.Tensor:
            patches = apply_rot_embed_cat(rows[:, :, start:], position["rope"], half=half)
            return torch.cat((rows[:, :, :start], patches), dim=2).type_as(rows)

        return turned(q), turned(k)


def _check_training(vit: Eva) -> None:
    """Raises ValueError for settings that drop patches or change positions in training."""
    if vit.patch_drop is not None:
        raise ValueError("patch_drop_rate: dropping patches in training is not supported with an Eva; want 0")
    if vit.rope is not None and vit.rope.aug_active:
        raise ValueError(
            "rope_shift_coords, rope_jitter_coords, rope_rescale_coords: moving positions in training is not "
            "supported; want None"
        )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _pairs_halves(rope: Any) -> bool:
    """Whether a head's dimensions i and i + D/2 are rotated together, rather than 2i and 2i + 1."""
    return getattr(rope, "rotate_half", isinstance(rope, RotaryEmbeddingMRope))


def _evens_first(heads: torch.Tensor) -> torch.Tensor:
    """A head's dimensions (.., D) in the order 0, 2, .., 1, 3, .."""
    return heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _reordered(qkv: LinearParts, num_heads: int) -> LinearParts:
    """The projection with the dimensions of each head's queries and keys in that order."""
    order = torch.arange(qkv.weight.shape[0], device=qkv.weight.device)
    queries, keys, values = order.view(3, num_heads, -1)
    order = torch.cat((_evens_first(queries), _evens_first(keys), values)).flatten()
    return LinearParts(qkv.weight[order], None if qkv.bias is None else qkv.bias[order])


def _reordered_norm(norm: NormParts | None) -> NormParts | None:
    if norm is None:
        return None
    weight, bias = (None if t is None else _evens_first(t) for t in (norm.weight, norm.bias))
    return NormParts(norm.kind, norm.eps, weight, bias)
