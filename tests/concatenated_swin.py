"""The plain definition of prompts in a Swin transformer, written to be read and trusted, not to be fast.

Every window's sequence is the prompts and then its tokens, timm's own layers run on all of them, and autograd
does everything else. Images of a batch never meet. Nothing here imports vpt_fast.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn


class ConcatenatedSwin(nn.Module):
    """A frozen timm SwinTransformer with prompts in every window.

    The settings are those of vpt_fast.PromptedSwin. The trainable tensors start at zero: take them from
    another model with `load_trainables`.
    """

    def __init__(
        self,
        swin: SwinTransformer,
        num_classes: int,
        num_prompts: int,
        prompt_type: str = "deep",
        *,
        prompt_dropout: float = 0.0,
        prompt_dropout_per: str = "image",
        pool: str | None = None,
    ) -> None:
        super().__init__()
        self.swin = copy.deepcopy(swin).eval().requires_grad_(False)
        self.is_deep, self.pool_type = prompt_type == "deep", pool or "image_and_prompts"
        self.dropout, self.dropout_per = prompt_dropout, prompt_dropout_per
        sets = [(len(stage.blocks), num_prompts, stage.blocks[0].dim) for stage in swin.layers]
        if not self.is_deep:
            sets = [(1, *sets[0][1:])]
        self.prompts = nn.ParameterList([torch.zeros(shape) for shape in sets])
        self.head = nn.Linear(swin.num_features, num_classes)

    def train(self, mode: bool = True) -> ConcatenatedSwin:
        super().train(mode)
        self.swin.eval()
        return self

    @torch.no_grad()
    def load_trainables(self, state: Mapping[str, Tensor]) -> ConcatenatedSwin:
        """Copies tensors by name; both sides must hold the same names and shapes."""
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        assert own.keys() == state.keys()
        for name, parameter in own.items():
            assert parameter.shape == state[name].shape, name
            parameter.copy_(state[name])
        return self

    def forward(self, images: Tensor) -> Tensor:
        x, prompts = self.outputs(images)
        tokens = x.flatten(1, 2)
        rows = {"image": (tokens,), "prompts": (prompts,), "image_and_prompts": (tokens, prompts)}
        return self.head(torch.cat(rows[self.pool_type], dim=1).mean(dim=1))

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, height, width, d) and the prompts (B, m, d) after the final norm."""
        x = self.swin.patch_embed(images)  # (B, height, width, d)
        prompts = self.dropped(self.prompts[0][0], len(x))  # (B, m, d)
        for i, stage in enumerate(self.swin.layers):
            if i > 0:
                x = stage.downsample(x)
                if not self.is_deep:
                    merge = stage.downsample
                    prompts = merge.reduction(merge.norm(torch.cat((prompts,) * 4, dim=-1)))
            for j, block in enumerate(stage.blocks):
                if self.is_deep and (i, j) != (0, 0):
                    prompts = self.dropped(self.prompts[i][j], len(x))
                x, prompts = self.block(block, x, prompts)
        return self.swin.norm(x), self.swin.norm(prompts)

    def dropped(self, prompts: Tensor, batch_size: int) -> Tensor:
        prompts = prompts.unsqueeze(0)
        if self.dropout_per == "image":
            prompts = prompts.expand(batch_size, -1, -1)
        return F.dropout(prompts, self.dropout, self.training).expand(batch_size, -1, -1)

    def block(self, block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, height, width, d) and prompts (B, m, d) through one of timm's blocks."""
        attended, prompts_attended = self.attend(block, block.norm1(x), block.norm1(prompts))
        x, prompts = x + attended, prompts + prompts_attended
        return x + block.mlp(block.norm2(x)), prompts + block.mlp(block.norm2(prompts))

    def attend(self, block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, dim = x.shape
        (window_h, window_w), shift = block.window_size, block.shift_size
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        padded = x.shape[1:3]
        windows = window_partition(x, block.window_size).flatten(1, 2)  # (B·W, T, d)
        num_windows = len(windows) // batch
        m = prompts.shape[1]
        sequence = torch.cat((prompts.repeat_interleave(num_windows, dim=0), windows), dim=1)
        attn = block.attn
        qkv = attn.qkv(sequence).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B·W, H, m + T, D)
        scores = attn.scale * (q @ k.transpose(-1, -2))
        scores[..., m:, m:] += attn._get_rel_pos_bias()  # of prompts it is zero, as the mask is
        if block.attn_mask is not None:
            scores[..., m:, m:] += block.attn_mask.repeat(batch, 1, 1).unsqueeze(1)
        out = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = window_reverse(out[:, m:].unflatten(1, (window_h, window_w)), block.window_size, *padded)
        x = torch.roll(x[:, :height, :width], shifts=tuple(shift), dims=(1, 2))
        return x, out[:, :m].unflatten(0, (batch, num_windows)).mean(dim=1)
