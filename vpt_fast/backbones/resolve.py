"""From a backbone's name, or an instance, to a timm model and a record of where it came from."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import timm
import torch
from timm.layers import to_2tuple
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vpt_fast.backbones import demo  # noqa: F401 - registers vpt_fast_demo with timm
from vpt_fast.backbones.checkpoints import load_checkpoint
from vpt_fast.backbones.known import KNOWN, KnownBackbone
from vpt_fast.backbones.layers import class_name


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
    """SWIN or CONVNET for one of these, by name or as an instance; VIT for anything else."""
    if not isinstance(backbone, str):
        return next((kind for kind in (SWIN, CONVNET) if isinstance(backbone, kind.model)), VIT)
    known = KNOWN.get(backbone)
    name = known.timm_name if known else backbone
    if not timm.is_model(name):
        return VIT
    module = timm.models.model_entrypoint(name).__module__
    return next((kind for kind in (SWIN, CONVNET) if module in kind.modules), VIT)


@dataclass(frozen=True)
class Origin:
    """Where a backbone came from: its name, or None for an instance; whether published weights were loaded;
    the keyword arguments passed to timm; and the file that its weights were read from."""

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
        backbone: a timm name, with or without a pretrained tag, a name in `known.KNOWN`, or an instance.
        pretrained: load the published weights (only with a name).
        kwargs: passed to timm.create_model (only with a name).
        border: pixels to add on each side of a named model's image size.
        checkpoint: load the weights from this file, see `checkpoints.load_checkpoint` (only with a name, and
            instead of `pretrained`).
        kind: the kind that the model must have.

    Returns:
        The timm model, and where it came from.

    Raises:
        ValueError: no such model in timm, a model of another kind, an img_size that the patch size does not
            divide, keyword arguments with an instance, both pretrained and a checkpoint, published weights
            that timm's hub does not have, or a checkpoint that does not fit.
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
    known = KNOWN.get(backbone)
    timm_name = known.timm_name if known else backbone
    if not timm.is_model(timm_name):
        close = difflib.get_close_matches(backbone, [*KNOWN, *timm.list_models()], n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"backbone: got {backbone!r}, want the name of a timm model{hint}")
    if not is_supported(timm_name, kind):
        raise ValueError(f"backbone: {backbone!r} is not a timm {wanted}, the one kind supported here")
    if pretrained:
        require_published(backbone, kwargs)
    build_kwargs = dict(kwargs)
    if kind is CONVNET and "img_size" in kwargs:  # its constructor takes no size, only its description does
        size = to_2tuple(build_kwargs.pop("img_size"))
        build_kwargs["pretrained_cfg_overlay"] = {
            **(known.pretrained_cfg_overlay if known else {}),
            **kwargs.get("pretrained_cfg_overlay", {}),
            "input_size": (kwargs.get("in_chans", 3), *size),
        }
    if border:
        size, settings = kwargs.get("img_size"), timm.get_pretrained_cfg(timm_name)
        if size is None and settings is None:
            raise ValueError(f"img_size: timm knows no default for {backbone!r}, and a border needs one")
        height, width = to_2tuple(size or settings.input_size[1:])
        build_kwargs["img_size"] = (height + 2 * border, width + 2 * border)
    vit = _create(backbone, pretrained, build_kwargs, None if checkpoint is None else os.fspath(checkpoint))
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
    path = None if checkpoint is None else os.path.abspath(checkpoint)
    return vit, Origin(backbone, pretrained, dict(kwargs), checkpoint=path)


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
    weights."""
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
    if not is_timms or {"pretrained_cfg", "pretrained_cfg_overlay"} & kwargs.keys():
        return  # a model of another package may have weights, and these arguments may say where they are
    if settings is None or not settings.has_weights:
        raise ValueError(
            f"pretrained: timm has no published weights of {name}; want pretrained=False, or a checkpoint"
        )


def _create(name: str, pretrained: bool, kwargs: dict[str, Any], checkpoint: str | None) -> nn.Module:
    shared = _shared.get()
    if shared is None:
        return _build(name, pretrained, kwargs, checkpoint)
    file = None if checkpoint is None else (checkpoint, os.stat(checkpoint).st_mtime_ns)
    key = (name, pretrained, repr(sorted(kwargs.items())), file, bytes(torch.get_rng_state().numpy()))
    if key not in shared:
        shared.clear()
        vit = _build(name, pretrained, kwargs, checkpoint)
        shared[key] = (vit, torch.get_rng_state())
    vit, state = shared[key]
    torch.set_rng_state(state)
    return vit


def _build(name: str, pretrained: bool, kwargs: dict[str, Any], checkpoint: str | None) -> nn.Module:
    known = KNOWN.get(name)
    if known is None:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        return model
    if pretrained:
        checkpoint = _from_hub(known)
    arguments = {"pretrained_cfg_overlay": known.pretrained_cfg_overlay, **known.arguments, **kwargs}
    model = timm.create_model(known.timm_name, num_classes=0, **arguments)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, may_lack=known.may_lack, leaves_out=known.leaves_out)
    return model


def _from_hub(known: KnownBackbone) -> str:
    """The path of timm's copy of the weights, downloaded unless it is cached."""
    assert known.hub is not None
    return huggingface_hub.hf_hub_download(known.hub, "model.safetensors")
