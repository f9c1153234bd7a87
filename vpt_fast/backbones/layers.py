"""Checks that a layer's weights determine what it computes, so that the engine may read them and not call it.

A subclass, a wrapper (peft's), a hook or a replaced forward computes something else, which the engine would
silently drop; so all of these raise. Parametrisations and pruning only change the weight, which is allowed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from timm.layers import PatchEmbed
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vpt_fast.engine.weights import LinearParts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils.weight_norm import WeightNorm

_Module = TypeVar("_Module", bound=nn.Module)

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def class_name(module: Any) -> str:
    """The qualified name of the module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def dtype_of(*modules: nn.Module | None, default: torch.dtype) -> torch.dtype:
    """The dtype of the first parameter in the modules, which their input must have; `default` if none has
    any."""
    for module in modules:
        for each in () if module is None else module.modules():
            # nn.DataParallel's replicas have no parameters, but tensors where these were.
            for parameter in getattr(each, "_former_parameters", each._parameters).values():
                if parameter is not None:
                    return parameter.dtype
    return default


def is_of_peft(module: Any) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def require_plain(layer: Any, kind: type[nn.Module], where: str) -> None:
    """Raises ValueError unless the layer's class is `kind` itself (not a subclass), before parametrisation.

    Args:
        layer: the layer.
        kind: a class of torch.nn.
        where: the layer's path in the backbone.
    """
    if parametrize.type_before_parametrizations(layer) is not kind:
        raise ValueError(
            f"{where} is a {class_name(layer)}, which is not supported; want torch.nn.{kind.__name__}"
            + merge_hint(layer)
        )


def merge_hint(layer: Any) -> str:
    """A hint that error messages add for a layer of peft's."""
    return " (peft's updates merged into it first: merge_and_unload())" if is_of_peft(layer) else ""


def linear_parts(linear: Any, where: str) -> LinearParts:
    """The weight and bias of an nn.Linear.

    Raises:
        ValueError: a layer of another class, which may compute something else.
    """
    require_plain(linear, nn.Linear, where)
    return LinearParts(current(linear, "weight"), current(linear, "bias"))


def current(layer: nn.Module, name: str) -> Any:
    """A parameter's value in the layer's next call. Pruning and the older weight_norm compute it in a hook;
    until then the attribute holds the last call's value, which an optimizer step or a loaded state outdates.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(layer)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(layer)
    return getattr(layer, name)


def own_call(module: nn.Module) -> str | None:
    """What a call of the module runs besides its class's forward; None if nothing."""
    if "forward" in vars(module):
        return "forward of its own"
    for attribute, label in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            if not _computes_weight(hook):
                return label
    return None


def is_read(layer: nn.Module) -> bool:
    """Whether a call of the layer would only use its weights as they are, without any hook."""
    return own_call(layer) is None and not layer._forward_pre_hooks


def copied(module: _Module, *left_out: nn.Module) -> _Module:
    """A deep copy, with nn.Identity in place of some of its modules.

    Weights that pruning has computed are results in autograd's graph, which PyTorch does not copy. The copy's
    own are computed when it is called.
    """
    memo: dict[int, Any] = {id(each): nn.Identity() for each in left_out}
    for each in module.modules():
        for value in vars(each).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def on_meta(module: _Module) -> _Module:
    """A copy on the meta device that calls no hooks, except those that compute a weight."""
    memo: dict[int, Any] = {}  # what to copy instead: a hook may hold anything, and not all can be copied
    for each in module.modules():
        for attribute in _HOOKS:
            hooks = getattr(each, attribute)
            memo[id(hooks)] = OrderedDict((k, hook) for k, hook in hooks.items() if _computes_weight(hook))
    # Not by moving the copy, which PyTorch refuses among fake tensors.
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def _computes_weight(hook: Any) -> bool:
    return isinstance(hook, (prune.BasePruningMethod, WeightNorm))


def require_no_hooks(module: nn.Module, where: str, *, below: bool = True) -> None:
    """Raises ValueError for a module with hooks or a replaced forward.

    Args:
        module: the module.
        where: the module's path in the backbone.
        below: check its submodules too.
    """
    for name, found in module.named_modules() if below else (("", module),):
        label = own_call(found)
        if label is not None:
            path = where + (f".{name}" if name else "")
            raise ValueError(
                f"{path} has a {label}, which would not run: its weights are read, and it is not called; "
                "want it without"
            )


def require_plain_weights(model: nn.Module) -> None:
    """Raises ValueError for weights that have no values of their own to fold: torchao's quantised ones, or
    shares of fully_shard's (DTensor)."""
    for name, weight in model.state_dict().items():
        if is_traceable_wrapper_subclass(weight):
            raise ValueError(
                f"backbone: {name} is a {class_name(weight)}, as quantize_ and fully_shard make it; want a "
                "plain tensor: the model before that"
            )


def require_images(batch: torch.Tensor, what: str) -> None:
    """Raises ValueError for a batch of 0, with which timm's reshaping of tensors fails.

    Args:
        batch: any tensor with the batch's size first.
        what: those of timm's modules that reshape, in the plural.
    """
    if batch.shape[0] == 0:
        raise ValueError(f"images: got a batch of 0, and {what} take none; want 1 or more")


def require_embedding(embedding: Any) -> None:
    """Raises ValueError for a patch embedding that is not timm's PatchEmbed with one convolution. A hybrid
    one contains a network with BatchNorm, whose widths and strides do not match the patches."""
    if not isinstance(embedding, PatchEmbed) or type(embedding).forward is not PatchEmbed.forward:
        raise ValueError(
            f"backbone: patch_embed is a {class_name(embedding)}, which is not supported; want timm's "
            "PatchEmbed, one convolution"
        )
    if not isinstance(embedding.proj, nn.Conv2d):
        raise ValueError(
            f"backbone: patch_embed.proj is a {class_name(embedding.proj)}, which is not supported; want "
            f"torch.nn.Conv2d{merge_hint(embedding.proj)}"
        )


def require_usual_scale(attn: Any, head_dim: int, where: str) -> None:
    """Raises ValueError for attention whose scores are scaled by another factor than head_dim**-0.5."""
    scale = getattr(attn, "scale", head_dim**-0.5)
    if isinstance(scale, torch.Tensor) or not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise ValueError(f"{where}.scale: got {scale}, want head_dim**-0.5 = {head_dim**-0.5:.6g}")
