"""Copies of whole timm networks; as it is, a WholeBackbone, for methods that train timm's own modules."""

from __future__ import annotations

from typing import Any

import timm.data
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import group_parameters
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.architecture import architecture, fingerprint
from vpt_fast.backbones.layers import copied, dtype_of, require_images


def pooling_of(network: nn.Module) -> str:
    """timm's name of a network's own pooling: that of its pooling layer, if it has one."""
    layers = [m.pool_type for m in network.modules() if isinstance(m, SelectAdaptivePool2d)]
    return layers[-1] if layers else network.global_pool  # type: ignore[return-value]


class CopiedNetwork(nn.Module):
    """A copy of a timm Swin or ConvNet without its classifier, and what identifies the network.

    Args:
        model: the model to copy, which is not changed.

    Attributes:
        stem: the copy.
        first_name: the name of its first convolution.

    Raises:
        ValueError: a model without pooling, whose features would be a map.
    """

    takes_any_size = False
    pads_images = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        if pooling_of(model) == "":
            raise ValueError(
                f"backbone: got a {type(model).__name__} with global_pool='', which gives no feature vector; "
                "want another, such as 'avg'"
            )
        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(model)
        self.stem = stem = copied(model)
        stem.reset_classifier(0)
        self.fingerprint = fingerprint(stem, classifiers=())
        self.architecture = architecture(stem, classifiers=())
        self.num_parameters = sum(p.numel() for p in stem.parameters())
        convolutions = ((name, m) for name, m in stem.named_modules() if isinstance(m, nn.Conv2d))
        self.first_name, first = next(convolutions)
        self.in_chans, self._first_kernel = first.in_channels, tuple(first.kernel_size)

    @property
    def device(self) -> torch.device:
        return next(self.stem.parameters()).device

    @property
    def embed_dim(self) -> int:
        """The number of features that the classifier reads."""
        return self.stem.head_hidden_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels: for a Swin, the size that its windows are for; for a ConvNet, img_size
        or the size in timm's description of the weights."""
        embedding = getattr(self.stem, "patch_embed", None)
        # A FasterNet has a patch embedding without img_size.
        return tuple(getattr(embedding, "img_size", self.data_config["input_size"][1:]))

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of the first convolution's kernel."""
        return self._first_kernel  # type: ignore[return-value]

    def cast(self, images: torch.Tensor) -> torch.Tensor:
        """Images in the dtype of the first layer's weights."""
        return images.to(dtype_of(self.stem, default=images.dtype))


def _keep_running_stats() -> None:
    """A BatchNorm's `reset_running_stats` where the statistics stay: `torch.optim.swa_utils.update_bn` would
    begin them anew, and no batch would form them."""


class WholeBackbone(CopiedNetwork):
    """A copy of a timm Swin or ConvNet without its classifier, in timm's own modules and at least float32.

    Every parameter has requires_grad False until a method unfreezes it. Dropout is active in training.
    BatchNorms normalise by their own statistics, which stay, in training too, except those of `moving_norms`.

    Attributes:
        moving_norms: names of the BatchNorms that in training normalise by the batch, and update their
            statistics.

    Args:
        model: the model to copy, which is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        first = self.stem.get_submodule(self.first_name)
        self.stem.to(torch.promote_types(first.weight.dtype, torch.float32))
        self.moving_norms: frozenset[str] = frozenset()
        for _, norm in self._batch_norms():
            norm.reset_running_stats = _keep_running_stats  # type: ignore[assignment]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> WholeBackbone:
        """Sets the mode of everything except BatchNorms that keep their statistics, which stay in eval
        mode."""
        super().train(mode)
        for name, norm in self._batch_norms():
            if name not in self.moving_norms:
                norm.train(False)
        return self

    def move_trained_norms(self) -> None:
        """Makes `moving_norms` those of which nothing is frozen."""
        self.moving_norms = frozenset(
            name for name, norm in self._batch_norms() if all(p.requires_grad for p in norm.parameters())
        )
        for name in self.moving_norms:
            vars(self.get_submodule(name)).pop("reset_running_stats", None)

    def _batch_norms(self) -> list[tuple[str, nn.Module]]:
        return [
            (name, m) for name, m in self.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]

    def parameter_groups(self) -> list[list[str]]:
        """The names of the network's parameters by timm's groups (`group_matcher`, as for layer-wise learning
        rates), in the network's order: the stem, the blocks, the layers after them."""
        groups = group_parameters(self.stem, self.stem.group_matcher(coarse=False))
        return [groups[index] for index in sorted(groups)]

    def last_blocks(self, k: int) -> list[nn.Parameter]:
        """The parameters of the last k blocks and of all layers after them.

        A block is one of `parameter_groups`: a residual block with the downsampling before it, or in other
        networks a cell or a convolution. A group without matrices, such as a norm, belongs to the block
        before it.

        Raises:
            ValueError: the backbone has fewer blocks.
        """
        blocks: list[list[nn.Parameter]] = []
        for group in self.parameter_groups():
            parameters = [self.stem.get_parameter(name) for name in group]
            if blocks and all(p.ndim < 2 for p in parameters):
                blocks[-1] += parameters
            else:
                blocks.append(parameters)
        if k > len(blocks):
            raise ValueError(f"num_tuned_blocks: got {k}, and the backbone has {len(blocks)} blocks")
        return [parameter for block in blocks[-k:] for parameter in block]

    def check_pool(self, pool: str | None, pools: tuple[str, ...]) -> None:
        """Raises ValueError unless `pool` is None or one of `pools`."""
        if pool not in (None, *pools):
            wanted = " or ".join(["None", *map(repr, pools)])
            raise ValueError(
                f"pool: got {pool!r} with a {type(self.stem).__name__} that is trained; want {wanted}"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) to features (B, d).

        Raises ValueError for a batch of 0 with a Swin.
        """
        if isinstance(self.stem, SwinTransformer):
            require_images(images, "timm's own blocks of a SwinTransformer")
        return self.pooled(self.stem.forward_features(self.cast(images)))

    def pooled(self, feature_map: torch.Tensor) -> torch.Tensor:
        """The last feature map to features (B, d)."""
        return self.stem.forward_head(feature_map, pre_logits=True)
