"""SideTuning: a small network beside a frozen backbone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torchvision
from torch import nn

from vpt_fast.backbones.layers import dtype_of
from vpt_fast.engine import cost
from vpt_fast.failures import is_out_of_memory
from vpt_fast.tuning.folded import FoldedClassifier

_MIN_SIZE = 63  # pixels: AlexNet's strides leave nothing of smaller images
_SIDE_CHANNELS = 3
_SIDE_FEATURES = 256 * 6 * 6  # after AlexNet's average pool


class SideTuning(FoldedClassifier):
    """A side network trained beside the frozen backbone (Zhang et al., ECCV 2020; the VPT paper's Sidetune).

    The head reads α · backbone(x) + (1 - α) · side(x), where α is the sigmoid of one trained scalar that
    starts at 0. The side network consists of AlexNet's convolutions and average pool (torchvision) and one
    linear layer from their 9216 features to the head's width. Its input is normalised for the backbone.

    Args:
        backbone, num_classes, settings: see `LinearProbe`.
        side_pretrained: initialise the side network with torchvision's ImageNet weights of AlexNet; if they
            cannot be downloaded, it is initialised at random, with a warning.

    Attributes:
        side: nn.Sequential, images to (B, `num_features`).
        alpha: (), α before the sigmoid.

    Raises:
        ValueError: as `LinearProbe`, and for images that are not RGB or are too small for AlexNet.
    """

    def __init__(
        self, backbone: str | nn.Module, num_classes: int, *, side_pretrained: bool = False, **settings: Any
    ) -> None:
        super().__init__(backbone, num_classes, **settings)
        height, width = self.image_size
        if self.backbone.in_chans != _SIDE_CHANNELS or min(height, width) < _MIN_SIZE:
            raise ValueError(
                f"backbone: its images are {self.backbone.in_chans}x{height}x{width}, and the side network, "
                f"an AlexNet, wants {_SIDE_CHANNELS} channels of at least {_MIN_SIZE}x{_MIN_SIZE}"
            )
        device = self.backbone.device
        with torch.device("meta"):  # its classifier, which is not used, has 59 million weights
            alexnet = torchvision.models.alexnet(weights=None)
        convolutions = alexnet.features.to_empty(device=device)
        for layer in convolutions:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        if side_pretrained:
            _load_published_weights(convolutions)
        linear = nn.Linear(_SIDE_FEATURES, self.num_features, device=device)
        self.side = nn.Sequential(convolutions, alexnet.avgpool, nn.Flatten(), linear)
        self.alpha = nn.Parameter(torch.zeros((), device=device))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        base, alpha = super().image_features(images), self.alpha.sigmoid()
        return alpha * base + (1 - alpha) * self.side(images.to(dtype_of(self.side, default=images.dtype)))

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """An estimate."""
        # AlexNet's first convolution has the largest output, kept once for the in-place ReLU and the pool;
        # all other layers together keep about as much again.
        height, width = self.image_size
        first: Any = self.side.get_submodule("0.0")
        per_image = 2 * first.out_channels * (height // first.stride[0]) * (width // first.stride[1])
        per_image += _SIDE_CHANNELS * height * width + 2 * _SIDE_FEATURES + 3 * self.num_features
        return cost.TrainingBytes(
            weights=self._weight_bytes(),
            kept=batch_size * per_image * dtype_of(self.side, default=torch.float32).itemsize,
            workspace=self.backbone.folded_workspace(batch_size),
        )


def _load_published_weights(convolutions: nn.Module) -> None:
    url = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url
    try:
        weights = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        warnings.warn(
            f"the side network starts random: AlexNet's weights cannot be had from {url}: {error}",
            stacklevel=3,
        )
        return
    own = {name.removeprefix("features."): t for name, t in weights.items() if name.startswith("features.")}
    convolutions.load_state_dict(own)
