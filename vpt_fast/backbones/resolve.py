"""From a backbone's name, or an instance, to a timm model and a record of where it came from."""

from __future__ import annotations

import contextlib
import importlib
import os
import textwrap
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.layers import to_2tuple
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.overrides import TorchFunctionMode

from vpt_fast.backbones import demo  # noqa: F401 - registers vpt_fast_demo with timm
from vpt_fast.backbones.checkpoints import classifiers, load_checkpoint, norm_hint
from vpt_fast.backbones.known import KNOWN, KnownBackbone
from vpt_fast.backbones.layers import class_name
from vpt_fast.backbones.sources import (
    WEIGHTS_FILE,
    Source,
    close_names,
    find_source,
    repository,
    said_by_hub,
)

# Keyword arguments of timm that may say where weights are.
_SAY_WHERE = {"pretrained_cfg", "pretrained_cfg_overlay"}
# Those of its settings of a model, which an overlay may replace, that do.
_SAY_WHERE_IN_SETTINGS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


@dataclass(frozen=True)
class Kind:
    """Classes of timm models, the modules in which timm defines them, and their name in messages."""

    model: type[nn.Module] | tuple[type[nn.Module], ...]
    modules: tuple[str, ...]
    label: str


VIT = Kind(
    (VisionTransformer, Eva),
    ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"),
    "VisionTransformer or Eva",
)
SWIN = Kind(SwinTransformer, ("timm.models.swin_transformer",), "SwinTransformer")


def _convnets(**classes: str) -> Kind:
    """The Kind of ConvNets. classes: a module of timm.models to the class of its networks."""
    modules = {f"timm.models.{module}": name for module, name in classes.items()}
    found = [getattr(importlib.import_module(module), name) for module, name in modules.items()]
    return Kind(tuple(dict.fromkeys(found)), tuple(modules), "ConvNet")


# Networks whose last feature map is (B, C, H, W), and which call their convolutions as modules.
CONVNET = _convnets(
    byobnet="ByobNet", convmixer="ConvMixer", convnext="ConvNeXt", cspnet="CspNet", densenet="DenseNet",
    dla="DLA", dpn="DPN", efficientnet="EfficientNet", fasternet="FasterNet", ghostnet="GhostNet",
    hardcorenas="MobileNetV3", hgnet="HighPerfGpuNet", hrnet="HighResolutionNet",
    inception_next="MetaNeXt", inception_resnet_v2="InceptionResnetV2", inception_v3="InceptionV3",
    inception_v4="InceptionV4", mobilenetv3="MobileNetV3", nasnet="NASNetALarge", nfnet="NormFreeNet",
    pnasnet="PNASNet5Large", rdnet="RDNet", regnet="RegNet", repghost="RepGhostNet", repvit="RepVit",
    res2net="ResNet", resnest="ResNet", resnet="ResNet", resnetv2="ResNetV2", rexnet="RexNet",
    selecsls="SelecSls", senet="SENet", sknet="ResNet", starnet="StarNet", vgg="VGG",
    vovnet="VovNet", xception="Xception", xception_aligned="XceptionAligned",
)  # fmt: skip


def kind_of(backbone: Any) -> Kind:
    """SWIN or CONVNET for one of these, by name or as an instance; VIT for anything else.

    Raises ValueError for a folder or repository that `find_source` refuses.
    """
    if not isinstance(backbone, str):
        return next((kind for kind in (SWIN, CONVNET) if isinstance(backbone, kind.model)), VIT)
    name = _timm_name(backbone, find_source(backbone))
    if not timm.is_model(name):
        return VIT
    module = timm.models.model_entrypoint(name).__module__
    return next((kind for kind in (SWIN, CONVNET) if module in kind.modules), VIT)


def kind_among(backbone: Any, kinds: tuple[Kind, ...]) -> Kind:
    """`kind_of`, or the first of `kinds` if that is none of them, so that `resolve_backbone` refuses it."""
    kind = kind_of(backbone)
    return kind if kind in kinds else kinds[0]


def _timm_name(backbone: str, source: Source | None) -> str:
    """The timm model that a name stands for; `source`: from `find_source`."""
    known = KNOWN.get(backbone)
    return source.architecture if source else known.timm_name if known else backbone


@dataclass(frozen=True)
class Origin:
    """Where a backbone came from: its name, or None for an instance, with a folder's absolute path in it;
    whether published weights were loaded; the keyword arguments passed to timm; and the file that its weights
    were read from."""

    name: str | None
    pretrained: bool
    kwargs: dict[str, Any]
    checkpoint: str | None = field(default=None, kw_only=True)

    @property
    def prompted_pool(self) -> str | None:
        """The default pooling of a prompted model: the paper's choice for this backbone, or None for the
        backbone's own."""
        known = KNOWN.get(self.name or "")
        return known.pool if known and "global_pool" not in self.kwargs else None


def hub_repository(origin: Origin) -> str | None:
    """owner/name of the repository on the Hugging Face hub that has the backbone's weights; None if they came
    from elsewhere."""
    if origin.name is None or not origin.pretrained or _SAY_WHERE & origin.kwargs.keys():
        return None
    if ":" in origin.name:
        return repository(origin.name)
    known = KNOWN.get(origin.name)
    if known is not None:
        return known.hub
    settings = timm.get_pretrained_cfg(origin.name)
    return (settings and settings.hf_hub_id) or None


def resolve_backbone(
    backbone: str | nn.Module,
    pretrained: bool,
    kwargs: dict[str, Any],
    border: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    kind: Kind = VIT,
) -> tuple[Any, Origin]:
    """Creates the backbone that a user names, or checks a given instance.

    Args:
        backbone: a timm name, with or without a pretrained tag or as local-dir:folder or hf-hub:owner/name
            (`sources.find_source`), a name in `known.KNOWN`, or an instance.
        pretrained: load the published weights (only with a name).
        kwargs: passed to timm.create_model (only with a name). With timm's pretrained_strict=False, weights
            may lack tensors of the model, which keep their initial values, and hold others.
        border: pixels to add on each side of a named model's image size.
        checkpoint: load the weights from this file, see `checkpoints.load_checkpoint` (only with a name, and
            instead of `pretrained`).
        kind: the kind that the model must have.

    Returns:
        The timm model, and where it came from.

    Raises:
        ValueError: no such model in timm, a model of another kind, an img_size that the patch size does not
            divide, keyword arguments with an instance, both pretrained and a checkpoint, published weights
            that timm's hub does not have, a folder or repository that cannot be read or is not timm's, or
            weights that do not fit, lack a tensor of the model, or hold one that it has no place for.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(
            f"pretrained: got True beside checkpoint {os.fspath(checkpoint)!r}, which has the weights; want "
            "one of the two"
        )
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ValueError(f"checkpoint: {os.fspath(checkpoint)} is no file")
    wanted = kind.label
    if isinstance(backbone, kind.model):
        if pretrained or kwargs or checkpoint is not None:
            given = ["pretrained"] * pretrained + ["checkpoint"] * (checkpoint is not None) + sorted(kwargs)
            raise ValueError(
                f"{', '.join(given)}: only with a backbone's name; this backbone is built already and its "
                "weights are used as they are"
            )
        return backbone, Origin(None, False, {})
    if not isinstance(backbone, str):
        raise ValueError(f"backbone: got a {class_name(backbone)}, want a timm name or a timm {wanted}")
    known, source = KNOWN.get(backbone), find_source(backbone)
    timm_name = _timm_name(backbone, source)
    if not timm.is_model(timm_name):
        hint = close_names(backbone, *KNOWN)
        raise ValueError(f"backbone: got {backbone!r}, want the name of a timm model{hint}")
    if source and "pretrained_cfg" in kwargs:
        raise ValueError(
            f"pretrained_cfg: got one with backbone {backbone!r}, which has its own; want "
            "pretrained_cfg_overlay, or none"
        )
    if not is_supported(timm_name, kind):
        raise ValueError(f"backbone: {backbone!r} is not a timm {wanted}, the one kind supported here")
    path = None if checkpoint is None else os.fspath(checkpoint)
    if pretrained and source:
        path = source.weights()
    elif pretrained:
        require_published(backbone, kwargs)
    build_kwargs = dict(kwargs)
    if kind is CONVNET and "img_size" in kwargs:  # its constructor takes no size, only its description does
        size = to_2tuple(build_kwargs.pop("img_size"))
        channels = source.settings.input_size[0] if source else 3
        build_kwargs["pretrained_cfg_overlay"] = {
            **(known.pretrained_cfg_overlay if known else {}),
            **kwargs.get("pretrained_cfg_overlay", {}),
            "input_size": (kwargs.get("in_chans", channels), *size),
        }
    if border:
        size = kwargs.get("img_size") or (source.image_size if source else None)
        settings = timm.get_pretrained_cfg(timm_name)
        if size is None and settings is None:
            raise ValueError(f"img_size: timm knows no default for {backbone!r}, and a border needs one")
        height, width = to_2tuple(size or settings.input_size[1:])
        build_kwargs["img_size"] = (height + 2 * border, width + 2 * border)
    vit = _create(backbone, source, pretrained, build_kwargs, path)
    if not isinstance(vit, kind.model):
        raise ValueError(f"backbone: {backbone!r} is a {type(vit).__name__}, want a timm {wanted}")
    embedding: Any = getattr(vit, "patch_embed", None)
    if "img_size" in build_kwargs and not embedding.dynamic_img_pad:
        size, patch = to_2tuple(build_kwargs["img_size"]), embedding.patch_size
        if size[0] % patch[0] or size[1] % patch[1]:
            with_border = f" (with a border of {border} pixels on each side)" if border else ""
            raise ValueError(
                f"img_size: got {size[0]}x{size[1]}{with_border}, want a multiple of the patch size "
                f"{patch[0]}x{patch[1]}"
            )
    # The absolute path: a saved model may be loaded from another working directory.
    recorded = None if checkpoint is None else os.path.abspath(checkpoint)
    name = source.name if source else backbone
    return vit, Origin(name, pretrained, dict(kwargs), checkpoint=recorded)


def is_supported(timm_name: str, *kinds: Kind) -> bool:
    """Whether a timm model may be of one of these kinds.

    Decided by the name of its module alone, before any weights are downloaded. Models that others have
    registered with timm pass here and are checked when they are created.
    """
    module = timm.models.model_entrypoint(timm_name).__module__
    return any(module in kind.modules for kind in kinds) or not module.startswith("timm.")


def table() -> list[tuple[str, ...]]:
    """`KNOWN` as rows of text; the first is the header."""
    header = ("name", "trained", "timm name", "normalisation", "file", "timm has it", "tuned here")
    return [
        header,
        *(
            (
                known.name,
                known.objective,
                known.timm_name,
                known.normalization,
                known.file,
                "yes" if known.hub else "no",
                "yes" if is_supported(known.timm_name, VIT, SWIN, CONVNET) else "no",
            )
            for known in KNOWN.values()
        ),
    ]


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A context in which models are created on the meta device: nothing is computed or allocated."""
    with torch.device("meta"), warnings.catch_warnings():
        # The packaged backbone always loads its weights, which a meta model cannot hold.
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        yield


_Built = tuple[nn.Module, torch.Tensor]  # a backbone, and the state of torch's generator after its creation
_shared: ContextVar[dict[Hashable, _Built] | None] = ContextVar("shared_backbones", default=None)


@contextlib.contextmanager
def sharing_backbones(built: dict[Hashable, _Built]) -> Iterator[None]:
    """A context in which a named backbone is taken from the cache `built`, which holds the last one created.

    Randomly initialised weights depend on torch's generator and advance it; both the weights and the
    generator's state afterwards are the same as without the cache.
    """
    token = _shared.set(built)
    try:
        yield
    finally:
        _shared.reset(token)


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
    if not is_timms or _SAY_WHERE & kwargs.keys():
        return  # a model of another package may have weights, and these arguments may say where they are
    if settings is None or not settings.has_weights:
        raise ValueError(
            f"pretrained: timm has no published weights of {name}; want pretrained=False, or a checkpoint"
        )


def _create(
    name: str, source: Source | None, pretrained: bool, kwargs: dict[str, Any], file: str | None
) -> nn.Module:
    """The model of this name, from the cache if there is one. file: a checkpoint, or a source's weights."""
    shared = _shared.get()
    if shared is None:
        return _build(name, source, pretrained, kwargs, file)
    written = None if file is None else (file, os.stat(file).st_mtime_ns)
    state = bytes(torch.get_rng_state().numpy())
    key = (name, repr(source), pretrained, repr(sorted(kwargs.items())), written, state)
    if key not in shared:
        shared.clear()
        vit = _build(name, source, pretrained, kwargs, file)
        shared[key] = (vit, torch.get_rng_state())
    vit, after = shared[key]
    torch.set_rng_state(after)
    return vit


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
    arguments = {"pretrained_cfg_overlay": known.pretrained_cfg_overlay, **known.arguments, **kwargs}
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
    if not kwargs or _names_weights(kwargs):
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


def _names_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether these arguments of timm, and not the model's name alone, say where weights are."""
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    return "pretrained_cfg" in kwargs or bool(_SAY_WHERE_IN_SETTINGS & overlay.keys())


def _download(name: str, kwargs: Mapping[str, Any]) -> None:
    """Downloads the weights of a model of timm's registry before timm does, unless they are cached, or the
    repository is known to have no such file.

    timm takes a hub that cannot be reached for a repository without model.safetensors and asks for its other
    files, each with half a minute of huggingface_hub's retries.
    """
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.hf_hub_id or settings.hf_hub_filename or _names_weights(kwargs):
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
    assert known.hub is not None
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
