"""Patch embedding as one matrix product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vpt_fast.backbones.layers import is_read
from vpt_fast.engine.contexts import compute_dtype


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel size, computed as a matrix product of patches and weights.

    cuDNN has no good kernel for it, and transposes all pixels first. Parameters and their names are the
    convolution's; the result is the same up to the order of summation.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width), of any dtype, to (B, d, rows, columns) in the dtype of the weights or of
        autocast. Unlike a convolution's, the output is channels-last in memory, as tokens need it."""
        height, width = self.kernel_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        patches = images[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        # One pass over the pixels casts them and makes each patch contiguous.
        dtype = compute_dtype(images.device.type, self.weight.dtype)
        patches = patches.permute(0, 2, 4, 1, 3, 5).to(dtype, memory_format=torch.contiguous_format)
        return F.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def as_product(convolution: nn.Conv2d) -> nn.Conv2d:
    """A `PatchProjection` with the convolution's parameters, or the convolution itself if it cannot be one:
    if its windows overlap, say, its weights are standardised first, or it has hooks.
    """
    is_one = (
        type(convolution) is nn.Conv2d
        and is_read(convolution)
        and convolution.stride == convolution.kernel_size
        and not any(convolution._reversed_padding_repeated_twice)  # padding given as numbers or by name
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
    if not is_one:
        return convolution
    with torch.device("meta"):
        projection = PatchProjection(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            bias=convolution.bias is not None,
        )
    projection.weight, projection.bias = convolution.weight, convolution.bias
    return projection.train(convolution.training)


def as_input(pixels: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
    """Pixels in the convolution's dtype; a `PatchProjection` casts them itself."""
    return pixels if isinstance(convolution, PatchProjection) else pixels.to(convolution.weight.dtype)
