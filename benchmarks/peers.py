"""What vpt_fast is compared with: visual prompts by concatenation, and the bounds on either side of it.

Every peer reads a timm VisionTransformer; swin_peers.py and convnet_peers.py have those of other backbones,
by the same names. Peers that concatenate share its frozen weights and train `prompts` and `head`, so that one
set of trainable tensors fits all of them. Nothing here imports vpt_fast.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def with_shared_weights(backbone: nn.Module) -> Any:
    """A copy of the modules that holds the very same parameters, frozen and in eval mode."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    twin = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})
    return twin.requires_grad_(False).eval()


def image_size(vit: VisionTransformer) -> tuple[int, int]:
    """(height, width) in pixels of the images that it takes."""
    return tuple(vit.patch_embed.img_size)


def initial_state(
    vit: VisionTransformer, num_prompts: int, prompt_type: str, num_classes: int, seed: int = 0
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


def pools_first_token(vit: VisionTransformer) -> bool:
    """Whether the head reads one row of the last block, so that the final norm is needed on it alone."""
    return vit.attn_pool is None and vit.global_pool == "token"


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
    """Base of those for a ViT."""

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, (B, N, d)."""
        with torch.no_grad():
            x = self.backbone.patch_embed(images.to(dtype_of(self.backbone)))
            return self.backbone.norm_pre(self.backbone._pos_embed(x))


class Concatenation(FrozenViT):
    """Base of the concatenating peers: a frozen ViT, with prompts in float32 or more."""

    def __init__(self, vit: VisionTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(vit, state)
        self.prompts = nn.Parameter(state["prompts"].clone())

    def block_prompts(self, block: int, x: Tensor) -> Tensor:
        """The prompts of one block for every image of x (B, .., d), in its dtype: (B, m, d)."""
        return self.prompts[block].to(x.dtype).expand(len(x), -1, -1)


class ConcatReference(Concatenation):
    """As in the official code: prompts after the prefix tokens, attention from separate operations."""

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
        for i, block in enumerate(self.backbone.blocks):
            if i < len(self.prompts):
                x = torch.cat([x[:, :num_tokens], self.block_prompts(i, x)], dim=1)  # (B, N + m, d)
            x = self.run_block(block, x)
        x = x[:, :1] if pools_first_token(self.backbone) else x[:, :num_tokens]
        return self.classify(self.backbone.fc_norm(self.backbone.pool(self.backbone.norm(x))))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


class ConcatCheckpointed(ConcatTimm):
    """The same with activation checkpointing: each block's input is kept, and the block runs again in
    backward. Nothing in a frozen block is random, so no RNG state is saved and restored."""

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)


class NoPrompts(FrozenViT):
    """The bound: the frozen ViT at its own length, with backward through every block and no prompt at all.

    Backward goes down to one trained vector, which is added to every token; it costs next to nothing.
    """

    def __init__(self, vit: VisionTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(vit, state)
        self.offset = nn.Parameter(torch.zeros(vit.embed_dim, dtype=state["prompts"].dtype))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = self.backbone.blocks(x + self.offset.to(x.dtype))
        x = x[:, :1] if pools_first_token(self.backbone) else x
        return self.classify(self.backbone.fc_norm(self.backbone.pool(self.backbone.norm(x))))


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
