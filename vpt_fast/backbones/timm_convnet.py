"""Converting a timm ConvNet into a frozen network that keeps only what the input's gradient needs.

PyTorch's convolution keeps its input even if its weight is frozen, and so does its BatchNorm in eval mode.
Neither is needed for the gradient of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from vpt_fast.backbones.layers import (
    class_name,
    is_of_peft,
    is_read,
    merge_hint,
    on_meta,
    require_no_hooks,
)
from vpt_fast.backbones.timm_whole import CopiedNetwork
from vpt_fast.engine.contexts import require_plain_autograd
from vpt_fast.engine.plan import Read
from vpt_fast.engine.weights import require_frozen


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that is differentiated with respect to its input only, and keeps only its weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
        ctx.save_for_backward(conv.weight)
        ctx.conv, ctx.shape, ctx.dtype = conv, x.shape, x.dtype
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        conv = ctx.conv
        # Under autocast the gradient's dtype is not the weight's.
        grad_input = conv2d_input(
            ctx.shape,
            weight.to(grad.dtype),
            grad,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        return grad_input.to(ctx.dtype), None


class FrozenConv2d(nn.Module):
    """An nn.Conv2d with frozen weight: (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        require_frozen(*self.conv.parameters())
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.conv(x)
        require_plain_autograd()
        return _FrozenConvolution.apply(x, self.conv)


class FrozenBatchNorm2d(nn.Module):
    """nn.BatchNorm2d in eval mode, as a scale and a shift per channel, followed by the activation that timm's
    BatchNorms include: (B, C, H, W) to the same shape."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None, "see _check"
        wide = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = (norm.running_var.detach().to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean.detach() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach()
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act((x * self.scale + self.shift).to(x.dtype))


class FrozenConvNet(CopiedNetwork):
    """A timm ConvNet without its classifier, frozen.

    The given model is read and not changed. Every parameter has requires_grad False, and the module stays in
    eval mode whatever `train` is called with, so BatchNorm's statistics are not updated. These layers stay
    timm's own and keep their inputs: convolutions that recompute their weight in every call, those whose
    padding is given by name or depends on the image's size (timm's tf_ models), and layers with hooks.

    Args:
        model: the model to read: one of `resolve.CONVNET`.
        dtype: of the frozen weights; None for the model's own.
        backend: ``"auto"`` or ``"torch"``.
        attention: ``"auto"``: a ConvNet has no attention.

    Raises:
        ValueError: a backend or attention that ConvNets do not support, or a model that contains layers of
            peft's or BatchNorms without running statistics, or has hooks itself.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
    ) -> None:
        for name, value, wanted in (
            ("backend", backend, ("auto", "torch")),
            ("attention", attention, ("auto",)),
        ):
            if value not in wanted:
                raise ValueError(
                    f"{name}: got {value!r} with a ConvNet; want {' or '.join(map(repr, wanted))}"
                )
        _check(model)
        super().__init__(model)
        if dtype is not None:
            self.stem.to(dtype)
        self.requires_grad_(False)
        for name, module in list(self.stem.named_modules()):
            if not is_read(module):
                continue
            if isinstance(module, nn.BatchNorm2d):
                self.stem.set_submodule(name, FrozenBatchNorm2d(module))
            elif (
                type(module) is nn.Conv2d
                and module.padding_mode == "zeros"
                and not isinstance(module.padding, str)
            ):
                self.stem.set_submodule(name, FrozenConv2d(module))
        self.eval()

    def train(self, mode: bool = True) -> FrozenConvNet:
        """Stays in eval mode."""
        return super().train(False)

    def run_folded(self, images: torch.Tensor, last: Read) -> torch.Tensor:
        """Images (B, C, H, W) to the last feature map (B, C', H', W')."""
        del last  # always all of it: see head_reads_of_image
        return self.stem.forward_features(self.cast(images))

    def features(self, feature_map: torch.Tensor, pool: str | None) -> torch.Tensor:
        """The last feature map to features (B, d), by the backbone's own pooling."""
        del pool  # None: see head_reads_of_image
        return self.stem.forward_head(feature_map, pre_logits=True)

    @staticmethod
    def head_reads_of_image(pool: str | None) -> Read:
        """Raises ValueError unless `pool` is None, the backbone's own pooling."""
        if pool is not None:
            raise ValueError(f"pool: got {pool!r} with a ConvNet, which has no tokens; want None")
        return Read.PATCHES

    def folded_workspace(self, batch_size: int) -> int:
        """Estimated bytes of temporaries in a forward pass: three times the largest feature map."""
        sizes = [0]
        meta = on_meta(self)
        for module in meta.modules():
            if isinstance(module, FrozenConv2d | FrozenBatchNorm2d):
                module.register_forward_hook(lambda _, __, out: sizes.append(out.nbytes))
        images = torch.empty(batch_size, self.in_chans, *self.image_size, device="meta")
        with torch.no_grad():
            meta.run_folded(images, Read.PATCHES)
        return 3 * max(sizes)


def _check(model: nn.Module) -> None:
    """Raises ValueError for layers of peft's, which read the weights of the convolutions that they wrap, for
    BatchNorms that normalise by the batch in eval mode too, by which an image's features would depend on the
    other images, and for hooks of the model as a whole, which is not called."""
    require_no_hooks(model, f"backbone: {type(model).__name__}", below=False)
    for name, module in model.named_modules():
        if is_of_peft(module):
            raise ValueError(
                f"backbone: {name} is a {class_name(module)}, which is not supported; want timm's own layers"
                + merge_hint(module)
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"backbone: {name} is a {class_name(module)} without running statistics; "
                "want track_running_stats=True, with the statistics of the images that it was trained on"
            )
