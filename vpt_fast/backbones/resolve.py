"""From a backbone's name, or an instance, to a timm model and a record of where it came from."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vpt_fast.backbones.creation import create, names_weights, overlay_of, require_published
from vpt_fast.backbones.known import KNOWN
from vpt_fast.backbones.layers import class_name, require_plain_weights
from vpt_fast.backbones.sources import Source, close_names, find_source, repository


@dataclass(frozen=True)
class Kind:
    """Classes of timm models, the modules in which timm defines them, and their name in messages."""

    model: type[nn.Module] | tuple[type[nn.Module], ...]
    modules: tuple[str, ...]
    label: str


VIT = Kind(
    (VisionTransformer, Eva, Beit),
    ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva", "timm.models.beit"),
    "VisionTransformer, Eva or Beit",
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

_KINDS = (VIT, SWIN, CONVNET)


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


def require_name(backbone: str) -> None:
    """Raises ValueError for the name of no backbone. Those of folders and repositories pass, which
    `resolve_backbone` reads: that may take a download."""
    if ":" not in backbone:
        _require_model(backbone, _timm_name(backbone, None))


def _require_model(backbone: str, timm_name: str) -> None:
    if not timm.is_model(timm_name):
        hint = close_names(backbone, *KNOWN)
        raise ValueError(f"backbone: got {backbone!r}, want the name of a timm model{hint}")


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
    if origin.name is None or not origin.pretrained or names_weights(origin.kwargs):
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
            divide, keyword arguments with an instance, an instance with quantised or sharded weights, both
            pretrained and a checkpoint, published weights that timm's hub does not have, a folder or
            repository that cannot be read or is not timm's, or weights that do not fit, lack a tensor of the
            model, or hold one that it has no place for.
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
        require_plain_weights(backbone)
        return backbone, Origin(None, False, {})
    if not isinstance(backbone, str):
        raise ValueError(f"backbone: got a {class_name(backbone)}, want a timm name or a timm {wanted}")
    source = find_source(backbone)
    timm_name = _timm_name(backbone, source)
    _require_model(backbone, timm_name)
    if source and "pretrained_cfg" in kwargs:
        raise ValueError(
            f"pretrained_cfg: got one with backbone {backbone!r}, which has its own; want "
            "pretrained_cfg_overlay, or none"
        )
    if not is_supported(timm_name, kind):
        if is_supported(timm_name, *_KINDS):
            raise ValueError(f"backbone: {backbone!r} is not a timm {wanted}, the one kind supported here")
        others = ", ".join(other.label for other in _KINDS if other is not kind)
        raise ValueError(
            f"backbone: {backbone!r} is not a timm {wanted}, nor of another supported kind ({others})"
        )
    path = None if checkpoint is None else os.fspath(checkpoint)
    if pretrained and source:
        path = source.weights()
    elif pretrained:
        require_published(backbone, kwargs)
    build_kwargs = _with_image_size(kwargs, backbone, source, border, kind)
    model = create(backbone, source, pretrained, build_kwargs, path)
    if not isinstance(model, kind.model):
        raise ValueError(f"backbone: {backbone!r} is a {type(model).__name__}, want a timm {wanted}")
    if "img_size" in build_kwargs:
        _require_whole_patches(model, to_2tuple(build_kwargs["img_size"]), border)
    # The absolute path: a saved model may be loaded from another working directory.
    recorded = None if checkpoint is None else os.path.abspath(checkpoint)
    name = source.name if source else backbone
    return model, Origin(name, pretrained, dict(kwargs), checkpoint=recorded)


def _with_image_size(
    kwargs: dict[str, Any], backbone: str, source: Source | None, border: int, kind: Kind
) -> dict[str, Any]:
    """The keyword arguments of a named backbone for timm.create_model, with a border added to img_size.

    Raises ValueError for a border around a model whose image size timm does not know.
    """
    kwargs, known = dict(kwargs), KNOWN.get(backbone)
    if kind is CONVNET and "img_size" in kwargs:  # its constructor takes no size, only its description does
        size = to_2tuple(kwargs.pop("img_size"))
        channels = source.settings.input_size[0] if source else 3
        kwargs["pretrained_cfg_overlay"] = {
            **(overlay_of(known) if known else {}),
            **kwargs.get("pretrained_cfg_overlay", {}),
            "input_size": (kwargs.get("in_chans", channels), *size),
        }
    if border:
        size = kwargs.get("img_size") or (source.image_size if source else None)
        settings = timm.get_pretrained_cfg(_timm_name(backbone, source))
        if size is None and settings is None:
            raise ValueError(f"img_size: timm knows no default for {backbone!r}, and a border needs one")
        height, width = to_2tuple(size or settings.input_size[1:])
        kwargs["img_size"] = (height + 2 * border, width + 2 * border)
    return kwargs


def _require_whole_patches(model: Any, size: tuple[int, int], border: int) -> None:
    """Raises ValueError if the model's patch size does not divide the image size, which includes the border,
    and it does not pad images."""
    patch = model.patch_embed.patch_size
    if not model.patch_embed.dynamic_img_pad and (size[0] % patch[0] or size[1] % patch[1]):
        with_border = f" (with a border of {border} pixels on each side)" if border else ""
        raise ValueError(
            f"img_size: got {size[0]}x{size[1]}{with_border}, want a multiple of the patch size "
            f"{patch[0]}x{patch[1]}"
        )


def is_supported(timm_name: str, *kinds: Kind) -> bool:
    """Whether a timm model may be of one of these kinds.

    Decided by the name of its module alone, before any weights are downloaded. Models that others have
    registered with timm pass here and are checked when they are created.
    """
    module = timm.models.model_entrypoint(timm_name).__module__
    return any(module in kind.modules for kind in kinds) or not module.startswith("timm.")
