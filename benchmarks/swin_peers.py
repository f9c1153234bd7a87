"""What vpt_fast.PromptedSwin is compared with: prompts concatenated in every window, on timm's own layers.

Names and arguments are those of peers.py. Prompts come after the tokens, since attention does not depend on
the order. A prompt has an output in each window, and their mean over the image's windows is the prompt's
output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peers import FrozenPeer, dtype_of, image_size, initial_head, prompt_bound
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ConcatCheckpointed",
    "ConcatReference",
    "ConcatTimm",
    "NoPrompts",
    "image_size",
    "initial_state",
]


def initial_state(
    swin: SwinTransformer, num_prompts: int, prompt_type: str, num_classes: int, seed: int = 0
) -> dict[str, Tensor]:
    """Trainable tensors to start from, drawn as the official implementation draws them; float32.

    prompts.i (blocks, m, d) for stage i, when shallow prompts.0 (1, m, d) alone; head.weight (classes, d);
    head.bias (classes,).
    """
    generator = torch.Generator().manual_seed(seed)
    bound = prompt_bound(swin.patch_embed.patch_size, swin.embed_dim)
    stages = [(len(stage.blocks), num_prompts, stage.blocks[0].dim) for stage in swin.layers]
    if prompt_type == "shallow":
        stages = [(1, *stages[0][1:])]
    prompts = [torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in stages]
    named = {f"prompts.{index}": tensor for index, tensor in enumerate(prompts)}
    return {**named, **initial_head(num_classes, swin.num_features, generator)}


class FrozenSwin(FrozenPeer):
    """Base of those for a Swin."""

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, (B, height, width, d)."""
        with torch.no_grad():
            return self.backbone.patch_embed(images.to(dtype_of(self.backbone)))


class Concatenation(FrozenSwin):
    """Base of the concatenating peers: a frozen Swin, with prompts in float32 or more, and all of a block
    except the attention in its windows."""

    def __init__(self, swin: SwinTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(swin, state)
        names = [name for name in state if name.startswith("prompts.")]
        self.prompts = nn.ParameterList(nn.Parameter(state[name].clone()) for name in names)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        # (m, d) for each block that has new ones
        sets = [prompts for stage in self.prompts for prompts in stage]
        prompts, index = sets[0], 0
        for stage in self.backbone.layers:
            x = stage.downsample(x)  # (B, height, width, d)
            if index >= len(sets):  # a prompt's four neighbours are four copies of it
                prompts = stage.downsample.reduction(stage.downsample.norm(prompts.repeat(1, 1, 4)))
            size, joined = x.shape[1:3], None
            tokens = x.flatten(1, 2)
            for block in stage.blocks:
                if index < len(sets):
                    prompts, joined = self.block_prompts(sets[index], x), None
                if joined is None:
                    joined = torch.cat([tokens, prompts], dim=1)  # (B, N + m, d)
                joined = self.run_block(block, joined)
                tokens, prompts = joined[:, : tokens.shape[1]], joined[:, tokens.shape[1] :]
                index += 1
            x = tokens.unflatten(1, size)
        return self.classify(self.backbone.norm(joined).mean(dim=1))

    def block_prompts(self, prompts: Tensor, x: Tensor) -> Tensor:
        """The prompts (m, d) of one block for every image of x (B, .., d), in its dtype: (B, m, d)."""
        return prompts.to(x.dtype).expand(len(x), -1, -1)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Tokens and prompts (B, N + m, d) through one of timm's blocks."""
        x = x + self.attend(block, block.norm1(x))
        return x + block.mlp(block.norm2(x))

    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        (height, width), (window_h, window_w) = block.input_resolution, block.window_size
        num_tokens, shift = height * width, block.shift_size
        tokens = x[:, :num_tokens].unflatten(1, (height, width))
        if any(shift):
            tokens = torch.roll(tokens, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        below, right = -height % window_h, -width % window_w
        if below or right:  # a padding of nothing is a copy
            tokens = F.pad(tokens, (0, 0, 0, right, 0, below))
        padded = tokens.shape[1:3]
        windows = window_partition(tokens, block.window_size).flatten(1, 2)  # (B·W, T, d)
        num_windows, area = len(windows) // len(x), windows.shape[1]
        prompts = x[:, num_tokens:].repeat_interleave(num_windows, dim=0)
        qkv = block.attn.qkv(torch.cat([windows, prompts], dim=1))
        qkv = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B·W, H, T + m, D)
        out = self.attention(block, qkv, num_windows).transpose(1, 2).flatten(2)
        out = block.attn.proj(out)  # (B·W, T + m, d)
        tokens = window_reverse(out[:, :area].unflatten(1, block.window_size), block.window_size, *padded)
        tokens = tokens[:, :height, :width]
        if any(shift):
            tokens = torch.roll(tokens, shifts=tuple(shift), dims=(1, 2))
        prompts = out[:, area:].unflatten(0, (len(x), num_windows)).mean(dim=1)
        return torch.cat([tokens.flatten(1, 2), prompts], dim=1)

    def attention(self, block: nn.Module, qkv: Tensor, num_windows: int) -> Tensor:
        """(3, B·W, H, T + m, D) to (B·W, H, T + m, D); to and from prompts there is no bias and no mask."""
        raise NotImplementedError


class ConcatReference(Concatenation):
    """As in the official code: attention from separate operations, and the bias rebuilt every time."""

    def attention(self, block: nn.Module, qkv: Tensor, num_windows: int) -> Tensor:
        q, k, v = qkv.unbind(0)
        num_prompts = q.shape[2] - block.attn.window_area
        grown = (0, num_prompts, 0, num_prompts)  # columns and rows of zeros
        scores = (q * block.attn.scale) @ k.transpose(-2, -1)
        scores = scores + F.pad(block.attn._get_rel_pos_bias(), grown)
        if block.attn_mask is not None:
            mask = F.pad(block.attn_mask, grown).unsqueeze(1)  # (W, 1, T + m, T + m)
            scores = (scores.unflatten(0, (-1, num_windows)) + mask).flatten(0, 1)
        return scores.softmax(dim=-1) @ v


class ConcatTimm(Concatenation):
    """As a good engineer writes it today: fused attention, with bias and mask of each block built once."""

    def __init__(self, swin: SwinTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(swin, state)
        num_prompts = self.prompts[0].shape[1]
        grown = (0, num_prompts, 0, num_prompts)
        for block in (block for stage in self.backbone.layers for block in stage.blocks):
            bias = block.attn._get_rel_pos_bias().detach()  # (1, H, T, T)
            if block.attn_mask is not None:
                bias = (bias + block.attn_mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)  # (1, W·H, T, T)
            block.register_buffer("prompted_bias", F.pad(bias, grown))

    def attention(self, block: nn.Module, qkv: Tensor, num_windows: int) -> Tensor:
        # If windows have masks, they are folded into the heads, since all images have the same masks.
        heads_of = num_windows if block.attn_mask is not None else 1
        q, k, v = qkv.unflatten(1, (-1, heads_of)).flatten(2, 3).unbind(0)  # (.., W·H or H, T + m, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.prompted_bias.to(q.dtype))
        return out.unflatten(1, (heads_of, -1)).flatten(0, 1)


class ConcatCheckpointed(ConcatTimm):
    """The same with activation checkpointing, as for a ViT."""

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(super().run_block, block, x, use_reentrant=False, preserve_rng_state=False)


class NoPrompts(FrozenSwin):
    """The bound: the frozen Swin, with backward through every block and no prompt at all, as for a ViT."""

    def __init__(self, swin: SwinTransformer, state: dict[str, Tensor]) -> None:
        super().__init__(swin, state)
        for block in (block for stage in self.backbone.layers for block in stage.blocks):
            block.attn.fused_attn = True  # timm's own default is separate operations
        self.offset = nn.Parameter(torch.zeros(swin.embed_dim, dtype=state["head.bias"].dtype))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = self.backbone.layers(x + self.offset.to(x.dtype))
        return self.classify(self.backbone.forward_head(self.backbone.norm(x)))
