"""What vpt_fast is compared with: visual prompts by concatenation, and the bounds on either side of it.

Every peer reads a timm VisionTransformer, Eva or Beit; swin_peers.py and convnet_peers.py have those of other
backbones, by the same names. Peers that concatenate share its frozen weights and train `prompts` and `head`,
so that one set of trainable tensors fits all of them. Nothing here imports vpt_fast.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ViT = VisionTransformer | Eva | Beit


def with_shared_weights(backbone: nn.Module) -> Any:
    """A copy of the modules that holds the very same parameters, frozen and in eval mode."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    twin = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})
    return twin.requires_grad_(False).eval()


def image_size(vit: ViT) -> tuple[int, int]:
    """(height, width) in pixels of the images that it takes."""
    return tuple(vit.patch_embed.img_size)


def initial_state(
    vit: ViT, num_prompts: int, prompt_type: str, num_classes: int, seed: int = 0
) -> dict[str, Tensor]:
    """Trainable tensors to start from, drawn as the official implementation draws them; float32.

    prompts (prompted blocks, m, d), one block when shallow; head.weight (classes, d); head.bias (classes,).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = len(vit.blocks) if prompt_type == "deep" else 1
    bound = prompt_bound(vit.patch_embed.patch_size, vit.embed_dim)
    prompts = torch.empty(blocks, num_prompts, vit.embed_dim).uniform_(-bound, bound, generator=generator)
    return {"prompts": prompts, **initial_head(num_classes, vit.embed_dim, generator)}


def prompt_bound(patch_size: tuple[int, int], width: int) -> float:
    """The bound of the uniform distribution that prompts are drawn from."""
    return math.sqrt(6 / (3 * math.prod(patch_size) + width))


def initial_head(num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """head.weight (classes, d) and head.bias (classes,)."""
    head = torch.empty(num_classes, width)
    return {
        "head.weight": nn.init.kaiming_normal_(head, a=0, mode="fan_out", generator=generator),
        "head.bias": torch.full((num_classes,), -math.log(99.0)),
    }


def make_head(state: dict[str, Tensor]) -> nn.Linear:
    head = nn.Linear(state["head.weight"].shape[1], len(state["head.bias"]), dtype=state["head.bias"].dtype)
    head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
    return head


def pools_first_token(vit: ViT) -> bool:
    """Whether the head reads one row of the last block, so that the final norm is needed on it alone."""
    return getattr(vit, "attn_pool", None) is None and vit.global_pool == "token"


def pooled(vit: ViT, x: Tensor) -> Tensor:
    """Tokens after the final norm (B, N, d), or the first alone, to the features (B, d)."""
    if isinstance(vit, Beit):
        x = x[:, 0] if vit.global_pool == "token" else x[:, vit.num_prefix_tokens :].mean(1)
    else:
        x = vit.pool(x)
    return vit.fc_norm(x)


def position_tables(vit: ViT, num_more: int) -> list[dict[str, Tensor]]:
    """What each block takes beside an image's tokens with `num_more` behind them that have no position: an
    Eva's angles, zero for those, or a Beit's bias, zero for them too; nothing for a VisionTransformer."""
    if isinstance(vit, Beit) and vit.blocks[0].attn.relative_position_bias_table is not None:
        biases = [block.attn._get_rel_pos_bias() for block in vit.blocks]  # (1, H, N, N)
        return [{"shared_rel_pos_bias": F.pad(bias, (0, num_more, 0, num_more))} for bias in biases]
    if not isinstance(vit, Eva) or vit.rope is None:
        return [{}] * len(vit.blocks)
    angles = vit.rope.get_embed(shape=vit.patch_embed.grid_size)  # (P, 2 D), or (L, H, P, 2 D)
    sin, cos = (part.to(dtype_of(vit)) for part in angles.chunk(2, dim=-1))
    rows = (0, 0, 0, num_more)
    angles = torch.cat([F.pad(sin, rows), F.pad(cos, rows, value=1.0)], dim=-1)
    return [{"rope": table} for table in (angles if vit.rope_mixed else [angles] * len(vit.blocks))]


def dtype_of(backbone: nn.Module) -> torch.dtype:
    """The dtype of its weights."""
    return next(backbone.parameters()).dtype


class FrozenPeer(nn.Module):
    """Base of the peers that train nothing of the backbone: the backbone, and a head in float32 or more.

    Args:
        backbone: a timm model of any kind; read, not modified; its weights are shared.
        state: from `initial_state`.
    """

    def __init__(self, backbone: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = with_shared_weights(backbone)
        self.head = make_head(state)

    def train(self, mode: bool = True) -> FrozenPeer:
        super().train(mode)
        self.backbone.eval()
        return self

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features.to(self.head.weight.dtype))


class FrozenViT(FrozenPeer):
    """Base of those for a ViT, whose blocks run on its tokens and `num_more` behind them."""

    def __init__(self, vit: ViT, state: dict[str, Tensor], num_more: int) -> None:
        super().__init__(vit, state)
        # Formed once, since they are the same in every step.
        self.positions = []
        for index, tables in enumerate(position_tables(self.backbone, num_more)):
            for name, table in tables.items():
                self.register_buffer(f"{name}_{index}", table.detach(), persistent=False)
            self.positions.append({name: f"{name}_{index}" for name in tables})
        if isinstance(vit, Eva):
            self.backbone.rope = None
        if isinstance(vit, Beit):
            for block in self.backbone.blocks:
                block.attn.relative_position_bias_table = None

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, (B, N, d)."""
        vit = self.backbone
        with torch.no_grad():
            x = vit.patch_embed(images.to(dtype_of(vit)))
            if isinstance(vit, Beit):
                x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
                return x if vit.pos_embed is None else x + vit.pos_embed
            x = vit._pos_embed(x)
            return vit.norm_pre(x[0] if isinstance(vit, Eva) else x)

    def run_block(self, index: int, x: Tensor) -> Tensor:
        tables = {name: getattr(self, buffer) for name, buffer in self.positions[index].items()}
        return self.backbone.blocks[index](x, **tables)


class Concatenation(FrozenViT):
    """Base of the concatenating peers: a frozen ViT, with prompts in float32 or more."""

    def __init__(self, vit: ViT, state: dict[str, Tensor]) -> None:
        super().__init__(vit, state, num_more=state["prompts"].shape[1])
        self.prompts = nn.Parameter(state["prompts"].clone())

    def block_prompts(self, block: int, x: Tensor) -> Tensor:
        """The prompts of one block for every image of x (B, .., d), in its dtype: (B, m, d)."""
        return self.prompts[block].to(x.dtype).expand(len(x), -1, -1)


class ConcatReference(Concatenation):
    """As in the official code: prompts after the prefix tokens, attention from separate operations. Of a
    VisionTransformer alone, as in that code."""

    def __init__(self, vit: VisionTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(vit, state)
        for block in self.backbone.blocks:
            block.attn.fused_attn = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        prefix, m, held = self.backbone.num_prefix_tokens, self.prompts.shape[1], 0
        for i, block in enumerate(self.backbone.blocks):
            if i < len(self.prompts):
                x = torch.cat([x[:, :prefix], self.block_prompts(i, x), x[:, prefix + held :]], dim=1)
                held = m
            x = block(x)
        x = self.backbone.norm(x)  # (B, N + m, d)
        x = torch.cat([x[:, :prefix], x[:, prefix + held :]], dim=1)
        return self.classify(self.backbone.fc_norm(self.backbone.pool(x)))


class ConcatTimm(Concatenation):
    """As a good engineer writes it today: fused attention, and the final norm only on rows that are read.

    Prompts come last, since attention does not depend on the order: adding them is one concatenation, and
    removing them is a view.
    """

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        num_tokens = x.shape[1]
        for i in range(len(self.backbone.blocks)):
            if i < len(self.prompts):
                x = torch.cat([x[:, :num_tokens], self.block_prompts(i, x)], dim=1)  # (B, N + m, d)
            x = self.run_block(i, x)
        x = x[:, :1] if pools_first_token(self.backbone) else x[:, :num_tokens]
        return self.classify(pooled(self.backbone, self.backbone.norm(x)))


class ConcatCheckpointed(ConcatTimm):
    """The same with activation checkpointing: each block's input is kept, and the block runs again in
    backward. Nothing in a frozen block is random, so no RNG state is saved and restored."""

    def run_block(self, index: int, x: Tensor) -> Tensor:
        return checkpoint(super().run_block, index, x, use_reentrant=False, preserve_rng_state=False)


class NoPrompts(FrozenViT):
    """The bound: the frozen ViT at its own length, with backward through every block and no prompt at all.

    Backward goes down to one trained vector, which is added to every token; it costs next to nothing.
    """

    def __init__(self, vit: ViT, state: dict[str, Tensor]) -> None:
        super().__init__(vit, state, num_more=0)
        self.offset = nn.Parameter(torch.zeros(vit.embed_dim, dtype=state["prompts"].dtype))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = x + self.offset.to(x.dtype)
        for i in range(len(self.backbone.blocks)):
            x = self.run_block(i, x)
        x = x[:, :1] if pools_first_token(self.backbone) else x
        return self.classify(pooled(self.backbone, self.backbone.norm(x)))


class LinearProbe(FrozenPeer):
    """The lower bound, of any backbone: a head on its frozen features, no backward through any block."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images.to(dtype_of(self.backbone)))
        return self.classify(features)


class FullFineTuning(nn.Module):
    """The upper bound, of any backbone: every weight is trained, in float32 or more, in a copy of its own. In
    eval mode, so that no block is left out at random and BatchNorm keeps its statistics.

    Args:
        backbone: a timm model; read, not modified.
        state: from `initial_state`, of which the head alone is taken.
    """

    def __init__(self, backbone: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        self.head = make_head(state)

    def train(self, mode: bool = True) -> FullFineTuning:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images.to(dtype_of(self.backbone)))
        return self.head(features.to(self.head.weight.dtype))
