"""Creating timm's model of a name with its weights, published ones or a file's, all of them."""

from __future__ import annotations

import contextlib
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from vpt_fast.backbones import demo  # noqa: F401 - registers vpt_fast_demo with timm
from vpt_fast.backbones.checkpoints import classifiers, load_checkpoint, norm_hint
from vpt_fast.backbones.known import KNOWN, KnownBackbone
from vpt_fast.backbones.sharing import created_once
from vpt_fast.backbones.sources import WEIGHTS_FILE, Source, find_source, said_by_hub

_NORMALIZATIONS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
}

# Those of timm's settings of a model, which an overlay may replace, that say where its weights are.
_SAY_WHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A context in which models are created on the meta device: nothing is computed or allocated."""
    with torch.device("meta"), warnings.catch_warnings():
        # The packaged backbone always loads its weights, which a meta model cannot hold.
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


def require_published(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if the backbone with this name and these timm keyword arguments has no published
    weights. Those of a repository (hf-hub:) are downloaded."""
    source = find_source(name)
    if source is not None:
        source.weights()
        return
    known = KNOWN.get(name)
    if known is not None:
        if known.hub is None:
            raise ValueError(
                f"pretrained: timm's hub does not have the weights of {known.name}; get {known.address} and "
                "pass the file as checkpoint"
            )
        return
    try:
        settings = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that the model does not have
        raise ValueError(f"backbone: got {name!r}: {error}") from None
    is_timms = timm.model_entrypoint(name).__module__.startswith("timm.")
    if not is_timms or names_weights(kwargs):
        return  # a model of another package may have weights, and these arguments may say where they are
    if settings is None or not settings.has_weights:
        raise ValueError(
            f"pretrained: timm has no published weights of {name}; want pretrained=False, or a checkpoint"
        )


def overlay_of(known: KnownBackbone) -> dict[str, Any]:
    """The fields of timm's description of the weights that specify the images' normalisation."""
    mean, std = _NORMALIZATIONS[known.normalization]
    return {"mean": mean, "std": std}


def create(
    name: str, source: Source | None, pretrained: bool, kwargs: dict[str, Any], file: str | None
) -> nn.Module:
    """The model of this name, or the one that models share. file: a checkpoint, or a source's weights."""
    written = None if file is None else (file, os.stat(file).st_mtime_ns)
    key = (name, repr(source), pretrained, repr(sorted(kwargs.items())), written)
    return created_once(key, lambda: _build(name, source, pretrained, kwargs, file))


def _build(
    name: str, source: Source | None, pretrained: bool, kwargs: dict[str, Any], file: str | None
) -> nn.Module:
    strict = bool(kwargs.get("pretrained_strict", True))
    if source is not None:
        # timm reads config.json, but not the weights: it would go on without those that are missing.
        model = timm.create_model(source.name, num_classes=0, **kwargs)
        try:
            if file is not None:
                load_checkpoint(model, file, strict=strict)
        except ValueError as error:
            argument = "pretrained: " if pretrained else "checkpoint: "
            raise ValueError(argument + str(error).removeprefix("checkpoint: ")) from None
        return model
    known = KNOWN.get(name)
    if known is None:
        with _downloading(name):
            if pretrained and timm.model_entrypoint(name).__module__.startswith("timm."):
                if strict:
                    _require_place(name, kwargs)
                _download(name, kwargs)
                if strict:
                    return _with_all_weights(name, kwargs)
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        if file is not None:
            load_checkpoint(model, file, strict=strict)
        return model
    if pretrained:
        file = _from_hub(known)
    arguments = {"pretrained_cfg_overlay": overlay_of(known), **known.arguments, **kwargs}
    model = timm.create_model(known.timm_name, num_classes=0, **arguments)
    if file is not None:
        load_checkpoint(model, file, may_lack=known.may_lack, leaves_out=known.leaves_out, strict=strict)
    return model


_STRICT = (
    "want other arguments, or pretrained_strict=False to keep initial values where weights are missing and "
    "to ignore weights without a place"
)


class _Written(TorchFunctionMode):
    """A context that records the tensors that are copied into."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, torch.Tensor] = {}  # alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self._tensors[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._tensors


def _with_all_weights(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model of timm's registry with the weights that timm loads.

    For a model with another number of classes, as ours always are, timm goes on with whatever tensors have
    the same names, and tells nobody of those that are missing. Left-over ones it logs.

    Raises:
        ValueError: the weights do not fit, or lack a tensor of the model.
    """
    with _Written() as written:
        try:
            model: Any = timm.create_model(name, pretrained=True, num_classes=0, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            why = textwrap.shorten(str(error).partition("\n")[2], 300, placeholder=" ...")
            wanted = "want other arguments" if "size mismatch" in why else _STRICT
            where = f"pretrained: the weights of {_call(name, kwargs)} do not fit"
            raise ValueError(f"{where}: {why}{norm_hint(why)}; {wanted}") from None
    heads = classifiers(model)
    missing = [
        each
        for each, tensor in model.state_dict(keep_vars=True).items()
        if tensor not in written and not each.startswith(heads) and not each.endswith("num_batches_tracked")
    ]
    if not missing:
        return model
    lacking = f"pretrained: the weights of {_call(name, kwargs)} lack {_listed(missing)}"
    if model.pretrained_cfg["tag"] == "fcmae" and all(each.startswith("head.norm.") for each in missing):
        # Published so, and timm takes them so: there is nothing else to ask for.
        warnings.warn(f"{lacking}, the final norm, which keeps its initial weight 1 and bias 0", stacklevel=2)
        return model
    raise ValueError(f"{lacking}{norm_hint(lacking)}; {_STRICT}")


def _require_place(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if a model of timm's registry has parameters that these arguments leave out, such as
    the blocks after the sixth with depth=6. Its published weights hold them all: nothing is downloaded.

    Weights that the arguments themselves name may be those of another architecture, and are not checked.
    """
    if not kwargs or names_weights(kwargs):
        return
    with without_values():
        published, model = (timm.create_model(name, num_classes=0, **given) for given in ({}, kwargs))
    own = dict(model.named_parameters())
    left_out = [each for each, _ in published.named_parameters() if each not in own]
    if left_out:
        instead = " ".join(own.keys() - dict(published.named_parameters()).keys())
        raise ValueError(
            f"pretrained: {_call(name, kwargs)} has no place for {_listed(left_out)} of the weights"
            f"{norm_hint(instead)}; {_STRICT}"
        )


def names_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether these arguments of timm, and not the model's name alone, say where weights are."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    return "pretrained_cfg" in kwargs or bool(_SAY_WHERE & overlay.keys())


def names_url(kwargs: Mapping[str, Any]) -> bool:
    """Whether these arguments of timm name an address that it downloads weights from. The file takes its name
    from there."""
    settings = (kwargs.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay"))
    return any(isinstance(each, Mapping) and each.get("url") for each in settings)


def _download(name: str, kwargs: Mapping[str, Any]) -> None:
    """Downloads the weights of a model of timm's registry before timm does, unless they are cached, or the
    repository is known to have no such file.

    timm takes a hub that cannot be reached for a repository without model.safetensors and asks for its other
    files, each with half a minute of huggingface_hub's retries.
    """
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.hf_hub_id or settings.hf_hub_filename or names_weights(kwargs):
        return
    repository, _, revision = settings.hf_hub_id.partition("@")
    place: dict[str, Any] = {"revision": revision or None, "cache_dir": kwargs.get("cache_dir")}
    if huggingface_hub.try_to_load_from_cache(repository, WEIGHTS_FILE, **place) is not None:
        return
    try:
        huggingface_hub.hf_hub_download(repository, WEIGHTS_FILE, **place)
    except LocalEntryNotFoundError:  # the hub cannot be reached
        raise
    except EntryNotFoundError:  # the repository has other files, which timm knows
        pass


def _call(name: str, kwargs: Mapping[str, Any]) -> str:
    """The model and its arguments as text, without mappings, which may hold weights."""
    plain = {key: value for key, value in kwargs.items() if not isinstance(value, Mapping)}
    keywords = ", ".join(f"{key}={value!r}" for key, value in plain.items())
    return f"{name} with {keywords}" if keywords else name


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _from_hub(known: KnownBackbone) -> str:
    """The path of timm's copy of the weights, downloaded unless it is cached."""
    with _downloading(known.name):
        return huggingface_hub.hf_hub_download(known.hub, WEIGHTS_FILE)


@contextlib.contextmanager
def _downloading(name: str) -> Iterator[None]:
    """Turns the hub's errors into a ValueError that names the model."""
    try:
        yield
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise ValueError(
            f"pretrained: the weights of {name} cannot be downloaded: {said_by_hub(error)}; if you have "
            "them in a file, pass it as checkpoint"
        ) from error
