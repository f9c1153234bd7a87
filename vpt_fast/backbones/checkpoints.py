"""Loading weights into a timm model, from the files that backbones' authors publish and from timm's own.

timm converts names and interpolates position embeddings. This module checks what timm does not: every tensor
of the model must be in the file and fit; nothing in the file may be left over except what the format is known
to hold besides a backbone; and only tensors and plain values are unpickled.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vpt_fast.failures import is_out_of_memory

# MAE's fine-tuned files hold their command line, in an object that runs no code.
_PLAIN_TYPES = (argparse.Namespace,)

# JAX ViT .npz: timm's name after blocks.N. to the name after Transformer/encoderblock_N/.
_JAX_BLOCK = {
    "norm1": "LayerNorm_0",
    "attn.qkv": "MultiHeadDotProductAttention_1",
    "attn.proj": "MultiHeadDotProductAttention_1/out",
    "norm2": "LayerNorm_2",
    "mlp.fc1": "MlpBlock_3/Dense_0",
    "mlp.fc2": "MlpBlock_3/Dense_1",
}
_JAX_OUTSIDE = {  # outside the blocks, where shapes are the same
    "cls_token": "cls",
    "patch_embed.proj.bias": "embedding/bias",
    "norm.weight": "Transformer/encoder_norm/scale",
    "norm.bias": "Transformer/encoder_norm/bias",
}
_JAX_POSITIONS = "Transformer/posembed_input/pos_embedding"
_JAX_LEFT_OUT = ("head/", "pre_logits/")  # classifiers
_JAX_PREFIX = "opt/target/"  # in files that include the optimizer's state


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    may_lack: tuple[str, ...] = (),
    leaves_out: tuple[str, ...] = (),
    strict: bool = True,
) -> None:
    """Load the weights in a file into a model, except its classifier.

    Formats: the JAX ViT's .npz; .pth and .pth.tar of MAE, MoCo v3 (pre-training, linear probe), Swin,
    ConvNeXt, torchvision's ResNet and timm's own; .safetensors. Position embeddings, and Swin's relative
    position bias tables, are interpolated to the model's image size as timm does.

    Args:
        model: built by timm with num_classes=0.
        path: the file.
        may_lack: prefixes of the model's tensors that may be missing in the file; they are left unchanged.
        leaves_out: prefixes (in timm's names) of tensors in the file to ignore, besides the format's own.
        strict: False: any tensor may be missing or left over, except in an .npz file.

    Raises:
        ValueError: a file that cannot be read, is damaged or holds objects that would have to be unpickled,
            or weights of another architecture; the message names the first tensor that does not fit.
    """
    path = Path(path)
    if path.suffix == ".npz":
        _load_jax(model, path)
        return
    state = _backbone_state(read_tensors(path), path)
    _check_patch_size(state, model, path)
    state = _converted(state, model, path)
    heads = classifiers(model)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    for name, tensor in wanted.items():
        if name not in state:
            # Older torchvision files lack BatchNorm's num_batches_tracked, which inference does not use.
            if not strict or name.startswith(may_lack) or name.endswith(".num_batches_tracked"):
                continue
            raise _misfit(path, model, f"it lacks {name}{norm_hint(name)}")
        _check_shape(name, tuple(state[name].shape), tuple(tensor.shape), path, model)
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise _misfit(path, model, f"{name} is of {state[name].dtype}, want floating-point numbers")
    for name in state:
        if strict and name not in wanted and not name.startswith(leaves_out):
            raise _misfit(path, model, f"it holds {name}, which the model has no place for")
    try:
        model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    except RuntimeError as error:  # of a quantised tensor, or one without values
        raise _misfit(path, model, " ".join(str(error).split())) from None


def read_tensors(path: Path, also: Iterable[Any] = ()) -> dict[str, Any]:
    """The content of a .pth or .safetensors file. Only tensors, plain values and the types in `also` (as for
    torch.serialization.safe_globals) are unpickled.

    Raises:
        ValueError: the file is damaged, holds other objects, or is not a mapping.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([*_PLAIN_TYPES, *also]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"checkpoint: {path} is damaged, or none") from None
        raise ValueError(
            f"checkpoint: {path} holds an object of {refused[1]}; only tensors and plain values are read, "
            "since unpickling anything else can run code"
        ) from None
    except Exception as error:  # torch's unpickler may raise anything on a damaged or unrelated file
        if is_out_of_memory(error):
            raise
        raise ValueError(f"checkpoint: {path} is damaged, or none: {_first_line(error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, want a mapping of names")
    _require_names(content, path)
    return dict(content)


def _require_names(content: Mapping[Any, Any], path: Path) -> None:
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"checkpoint: {path} holds something under {name!r}, want names")


def _backbone_state(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors under the authors' names, without modules that were only used in training."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            _require_names(content, path)
            break
    state = clean_state_dict(content)  # without DistributedDataParallel's "module."
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"checkpoint: {path} holds no state dict: {name} is a {type(value).__name__}")
    encoder = "base_encoder."
    if any(name.startswith(encoder) for name in state):  # MoCo v3, as pre-trained
        beside = ("momentum_encoder.", "predictor.")
        state = {n.removeprefix(encoder): t for n, t in state.items() if not n.startswith(beside)}
    elif "decoder_embed.weight" in state:  # MAE with its decoder
        state = {n: t for n, t in state.items() if n != "mask_token" and not n.startswith("decoder_")}
    return state


def _converted(state: dict[str, torch.Tensor], model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The tensors under timm's names, with interpolated position embeddings."""
    convert = _converter(model)
    if convert is None:
        return state

    def failure(part: dict[str, torch.Tensor]) -> Exception | None:
        try:
            convert(dict(part), model)
        except (KeyError, AttributeError, RuntimeError, AssertionError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return error
        return None

    error = failure(state)
    if error is None:
        return convert(dict(state), model)
    # timm's converters assume the right architecture: find the first tensor that this one fails on.
    culprit = next((name for name, tensor in state.items() if failure({name: tensor})), None)
    where = "" if culprit is None else f"{culprit} does not fit: "
    raise _misfit(path, model, f"{where}{_first_line(error)}")


def _converter(model: nn.Module) -> Callable[..., dict[str, torch.Tensor]] | None:
    """timm's function that converts names and interpolates position embeddings, as it is called for a model
    of this name; None if there is none."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    if convert is not vision_transformer.checkpoint_filter_fn:
        return convert
    # timm selects these by the model's name, in functions that also build the model.
    if "flexi" in name:
        return partial(convert, interpolation="bilinear", antialias=False)
    if "radio" in name:
        corners = any(each in name for each in vision_transformer._RADIO_ALIGN_CORNERS)
        return partial(convert, interpolation="bilinear", antialias=False, align_corners=corners)
    if timm.is_model(name) and timm.model_entrypoint(name).__module__ == "timm.models.deit":
        return partial(convert, adapt_layer_scale=True)
    return convert


def norm_hint(missing: str) -> str:
    """What an error message adds if tensors that it names as missing are those of a norm after pooling."""
    if "fc_norm." not in missing:
        return ""
    return (
        " (the norm that timm puts after a mean of tokens, in place of the final one; to keep that one pass "
        "fc_norm=False, to an Eva use_fc_norm=False)"
    )


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors, in timm's names."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _check_patch_size(state: Mapping[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    # timm would resample the kernel, which makes it a different model from the one that was trained.
    name = "patch_embed.proj.weight"
    kernel, own = state.get(name), model.state_dict().get(name)
    if kernel is not None and own is not None and kernel.ndim == 4 and kernel.shape[2:] != own.shape[2:]:
        _check_shape(name, tuple(kernel.shape), tuple(own.shape), path, model)


def _check_shape(
    name: str, got: tuple[int, ...], want: tuple[int, ...], path: Path, model: nn.Module
) -> None:
    if got != want:
        raise _misfit(path, model, f"{name} has shape {got}, want {want}")


def _misfit(path: Path, model: nn.Module, why: str) -> ValueError:
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return ValueError(f"checkpoint: {path} does not fit {name}: {why}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _load_jax(model: nn.Module, path: Path) -> None:
    if not isinstance(model, VisionTransformer):
        raise _misfit(path, model, "an .npz file holds a Vision Transformer")
    shapes = _npz_shapes(path)
    check_jax_shapes(model, shapes, path)
    try:
        model.load_pretrained(str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is damaged: {_first_line(error)}") from None


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every array in an .npz file, read from the headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, _, dtype = read(file)
                if dtype.hasobject:
                    raise ValueError(f"{member} holds Python objects, which are not read")
                shapes[member.removesuffix(".npy")] = shape
    except Exception as error:  # Python's zipfile and tokenizer, too, raise what they like
        raise ValueError(f"checkpoint: {path} is damaged, or no .npz file: {_first_line(error)}") from None
    return shapes


def check_jax_shapes(vit: VisionTransformer, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Checks that arrays with these names and shapes are this model's weights in the layout of the JAX ViT
    (google-research/vision_transformer).

    Raises:
        ValueError: an array is missing, has another shape or is left over; the message names the first one.
    """
    prefix = _JAX_PREFIX if f"{_JAX_PREFIX}cls" in shapes else ""
    wanted: dict[str, tuple[int, ...] | None] = {}
    for name, tensor in vit.state_dict().items():
        if not name.startswith("head."):
            wanted |= _jax_arrays(name, tuple(tensor.shape), vit, path)
    for name, want in wanted.items():
        if prefix + name not in shapes:
            raise _misfit(path, vit, f"it lacks {prefix}{name}")
        got = shapes[prefix + name]
        if want is None:  # position embeddings, of any number
            want = (1, got[1] if len(got) == 3 else 1, vit.embed_dim)
        _check_shape(prefix + name, got, want, path, vit)
    for name in shapes:
        inner = name.removeprefix(prefix)
        beside = inner.startswith(_JAX_LEFT_OUT) or (prefix and not name.startswith(prefix))
        if inner not in wanted and not beside:
            raise _misfit(path, vit, f"it holds {name}, which the model has no place for")


def _jax_arrays(
    name: str, shape: tuple[int, ...], vit: VisionTransformer, path: Path
) -> dict[str, tuple[int, ...] | None]:
    """Name to shape of the arrays that make up one of the model's tensors; None if the number of positions is
    arbitrary."""
    if name == "pos_embed":
        return {_JAX_POSITIONS: None}
    if name == "patch_embed.proj.weight":
        return {"embedding/kernel": (*shape[2:], shape[1], shape[0])}
    if name in _JAX_OUTSIDE:
        return {_JAX_OUTSIDE[name]: shape}
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[2] not in _JAX_BLOCK:
        raise _misfit(path, vit, f"its format has no counterpart of {name}{norm_hint(name)}")
    index, module, part = found.groups()
    where = f"Transformer/encoderblock_{index}/{_JAX_BLOCK[module]}"
    dim = vit.embed_dim
    num_heads: int = vit.blocks[int(index)].attn.num_heads  # type: ignore[assignment, union-attr]
    heads = (num_heads, dim // num_heads)
    if module == "attn.qkv":
        array, size = ("kernel", (dim, *heads)) if part == "weight" else ("bias", heads)
        return {f"{where}/{each}/{array}": size for each in ("query", "key", "value")}
    if module == "attn.proj" and part == "weight":
        return {f"{where}/kernel": (*heads, dim)}
    if part == "bias":
        return {f"{where}/bias": shape}
    if len(shape) == 1:
        return {f"{where}/scale": shape}
    return {f"{where}/kernel": shape[::-1]}
