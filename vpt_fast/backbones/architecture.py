"""Which backbone it is: a fingerprint of its weights, and a record of what it computes besides them. Both are
saved with a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

# Attributes of timm's and PyTorch's modules that change what the same weights compute.
_ATTRIBUTES = (
    "num_heads", "scale", "window_size", "shift_size", "gate_last",  # attention and MLP
    "rotate_half", "temperature", "grid_offset", "grid_indexing", "max_res", "in_pixels",  # rotary positions
    "ref_feat_shape", "min_period", "max_period", "normalize_coords", "mrope_section",
    "grid_type", "linear_bands",
    "global_pool", "pool_type", "pool_include_prefix", "no_embed_class",
    "kernel_size", "stride", "padding", "padding_mode", "dilation", "ceil_mode",  # convolutions and pooling
    "count_include_pad", "filt_size", "pad_mode",
    "add_maxpool", "has_skip", "no_skip", "residual", "shortcut", "use_shortcut",  # blocks of ConvNets
    "negative_slope",  # of an activation
    "eps", "alpha", "beta", "gamma", "attn_gain",  # of standardised weights, and of networks without norms
)  # fmt: skip
CLASSIFIERS = ("head", "head_dist")  # of timm's models; only DeiT's distilled ones have the second
POOLING = ("global_pool", "pool_include_prefix")  # of a whole model, in its record
_POOLS = {nn.AvgPool2d: "avg", nn.MaxPool2d: "max"}
_NORMS = ("rms", "batch", "group", "layer")
_ACTIVATIONS = {"gelutanh": "gelu_tanh", "quickgelu": "quick_gelu", "swish": "silu"}

# Recorded of whole modules: if only one of two backbones has such a field, they differ. Attributes may just
# have come with another version of timm.
_OF_MODULES = ("norm", "activation", "num_heads", "pool")


def fingerprint(model: nn.Module, classifiers: Sequence[str] = CLASSIFIERS) -> str:
    """SHA-256 of the names, shapes and float32 values of all weights except those of the modules
    `classifiers`; on the meta device, where there are no values, of names and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.partition(".")[0] in classifiers:
            continue
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if not weight.is_meta:
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def architecture(model: nn.Module, classifiers: Sequence[str] = CLASSIFIERS) -> dict[str, Any]:
    """The settings of a timm model that change its output but not its weights' names, shapes or values.

    Args:
        model: the model to read.
        classifiers: the modules that are left out.

    Returns:
        A module's path without the numbers of blocks, and a setting's name (blocks.attn.num_heads), to its
        value as JSON holds it: one value if all these modules have it, else a list in their order. A norm's
        is its kind and eps. ``rotary`` is the kind of rotary positions, null if there are none. Paths of
        classes are left out, since versions of timm move them.
    """
    found: dict[str, list[Any]] = {"rotary": [_rotary(model)]}
    for path, module in model.named_modules():
        if path.partition(".")[0] in classifiers:
            continue
        settings = {
            name: getattr(module, name) for name in _present(module) if _is_plain(getattr(module, name))
        }
        if hasattr(module, "kernel_size") and hasattr(module, "padding"):
            settings["same_padding"] = _is_padded_by_size(module)
        if pool := next((kind for layer, kind in _POOLS.items() if isinstance(module, layer)), None):
            settings["pool"] = pool
        if norm := _norm(module):
            settings["norm"] = norm
            settings.pop("eps", None)  # the norm's value has it
            for name in ("num_groups", "groups"):  # the latter of timm's EvoNorm
                if hasattr(module, name):
                    settings["num_groups"] = getattr(module, name)
        elif activation := _activation(path, module):
            settings["activation"] = activation
        parts = [part for part in path.split(".") if part and not part.isdigit()]
        for name, value in settings.items():
            found.setdefault(".".join([*parts, name]), []).append(json.loads(json.dumps(value)))
    return {
        name: values[0] if all(value == values[0] for value in values) else values
        for name, values in found.items()
    }


def differences(saved: dict[str, Any], got: dict[str, Any], unread: Collection[str] = ()) -> list[str]:
    """The fields not in `unread` in which two records of `architecture` differ, each with both values."""
    return [
        f"{name} was {saved.get(name)} and is {got.get(name)}"
        for name in sorted((saved.keys() | got.keys()) - {*unread})
        if (name in saved and name in got) or name.rpartition(".")[2] in _OF_MODULES
        if not _is_same(saved.get(name), got.get(name))
    ]


def _present(module: nn.Module) -> list[str]:
    """Those of `_ATTRIBUTES` that it has. As nn.Module takes long to say that it lacks one, only those that
    it may have are asked for; all where the class finds some itself (peft's)."""
    kind = type(module)
    if kind.__getattr__ is not nn.Module.__getattr__:
        return [name for name in _ATTRIBUTES if hasattr(module, name)]
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return [name for name in _ATTRIBUTES if (name in own or hasattr(kind, name)) and hasattr(module, name)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, (int, float)) and isinstance(other, (int, float)) and math.isclose(one, other)
    return bool(one == other)


def _is_padded_by_size(module: nn.Module) -> bool:
    """Whether a layer is one of timm's whose padding depends on the image's size. Their `padding` is 0."""
    named = type(module).__name__.endswith("Same")
    return bool(getattr(module, "dynamic_padding", getattr(module, "same_pad", named)))


def _norm(module: nn.Module) -> tuple[str, float | None] | None:
    """Kind and eps of a norm, with or without an affine; None for any other module."""
    called = type(module).__name__.lower()
    if "norm" not in called or not hasattr(module, "eps"):
        return None
    eps: Any = module.eps
    return next((kind for kind in _NORMS if kind in called), called), eps


def _rotary(model: nn.Module) -> str | None:
    """The kind of a model's rotary positions; None if it has none."""
    prefix, called = "RotaryEmbedding", (type(module).__name__ for module in model.modules())
    return next((name.removeprefix(prefix).lower() for name in called if name.startswith(prefix)), None)


def _activation(path: str, module: nn.Module) -> str | None:
    """The name of an activation; None for any other module."""
    home = type(module).__module__
    is_torchs = home == "torch.nn.modules.activation" and not isinstance(module, nn.Softmax)
    is_timms = home.startswith("timm.layers.activations")
    if not (is_torchs or is_timms or path.rpartition(".")[2].startswith("act")) or list(module.children()):
        return None
    called = type(module).__name__.lower().removesuffix("me")  # timm's memory-efficient ones
    if getattr(module, "approximate", "none") == "tanh":
        called += "_tanh"
    return _ACTIVATIONS.get(called, called)
