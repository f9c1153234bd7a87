"""What vpt_fast.PromptedConvNet is compared with: a border of pixels around the image, on timm's own network.

Names and arguments are those of peers.py. The official code does the same, so it has no peer of its own.
"""

from __future__ import annotations

import torch
from peers import FrozenPeer, dtype_of, initial_head
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn


def image_size(convnet: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels of the images that it was made for, without the border."""
    return tuple(convnet.pretrained_cfg["input_size"][1:])  # type: ignore[index]


def initial_state(
    convnet: nn.Module, num_prompts: int, prompt_type: str, num_classes: int, seed: int = 0
) -> dict[str, Tensor]:
    """Trainable tensors to start from, drawn as the official implementation draws them; float32.

    prompts (1, 3, 2·m, W + 2·m), the rows above and below the image, and prompts_sides (1, 3, H, 2·m), the
    columns left and right of it, pixels in [0, 1]; head.weight (classes, d); head.bias (classes,).
    """
    del prompt_type  # shallow: a border is part of the image
    generator = torch.Generator().manual_seed(seed)
    (height, width), both = image_size(convnet), 2 * num_prompts
    return {
        "prompts": torch.rand(1, 3, both, width + both, generator=generator),
        "prompts_sides": torch.rand(1, 3, height, both, generator=generator),
        **initial_head(num_classes, int(convnet.head_hidden_size), generator),  # type: ignore[call-overload]
    }


class ConcatTimm(FrozenPeer):
    """The border is normalised as images are, laid around each of them, and timm's network runs on the larger
    image. Its weights need no gradient, and its norms are in eval mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, convnet: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__(convnet, state)
        self.prompts = nn.Parameter(state["prompts"].clone())
        self.prompts_sides = nn.Parameter(state["prompts_sides"].clone())
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, self.prompts.new_tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(dtype_of(self.backbone))
        top, bottom = self.border(self.prompts, x).chunk(2, dim=2)
        left, right = self.border(self.prompts_sides, x).chunk(2, dim=3)
        middle = torch.cat([left, x, right], dim=3)
        return self.classify(self.backbone(torch.cat([top, middle, bottom], dim=2)))

    def border(self, prompts: Tensor, x: Tensor) -> Tensor:
        """Pixels in [0, 1], normalised and expanded to all images x (B, 3, H, W), in their dtype."""
        return ((prompts - self.mean) / self.std).to(x.dtype).expand(len(x), -1, -1, -1)


class ConcatCheckpointed(ConcatTimm):
    """The same with timm's own activation checkpointing of the network's stages."""

    def __init__(self, convnet: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__(convnet, state)
        self.backbone.set_grad_checkpointing()


class NoPrompts(FrozenPeer):
    """The bound: the frozen network on the image alone, with backward through all of it.

    Backward goes down to one trained number per channel, which is added to every pixel.
    """

    def __init__(self, convnet: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__(convnet, state)
        self.offset = nn.Parameter(torch.zeros(1, 3, 1, 1, dtype=state["head.bias"].dtype))

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(dtype_of(self.backbone))
        return self.classify(self.backbone(x + self.offset.to(x.dtype)))
