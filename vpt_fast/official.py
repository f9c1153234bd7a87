"""Importing and exporting prompts in the format of the official code (KMnP/vpt).

"Official settings" are the fields of MODEL.PROMPT in its configuration. Its files hold a whole model under
"model" (`enc.transformer.prompt_embeddings`, `head.last_layer.weight`, ..., with its frozen backbone), or the
prompts alone (`prompt_epN.pth`, with "shallow_prompt" and "deep_prompt" as arrays).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vpt_fast.backbones.checkpoints import read_tensors
from vpt_fast.backbones.resolve import SWIN, VIT, kind_among, resolve_backbone
from vpt_fast.backbones.sources import finding_sources_once
from vpt_fast.engine.plan import Read
from vpt_fast.files import replacing
from vpt_fast.model import PromptedViT
from vpt_fast.swin import PromptedSwin

VIT_ENCODERS = ("sup", "mae", "mocov3")  # the official code's classes of ViTs

DEFAULTS: dict[str, Any] = {
    "NUM_TOKENS": None,  # taken from the tensors
    "LOCATION": "prepend",
    "INITIATION": "random",
    "CLSEMB_FOLDER": "",
    "CLSEMB_PATH": "",
    "PROJECT": -1,
    "DEEP": False,
    "NUM_DEEP_LAYERS": None,
    "REVERSE_DEEP": False,
    "DEEP_SHARED": False,
    "FORWARD_DEEP_NOEXPAND": False,
    "VIT_POOL_TYPE": "original",
    "DROPOUT": 0.0,
    "SAVE_FOR_EACH_EPOCH": False,
}
_TOKEN_LOCATIONS = ("prepend", "add", "add-1")  # locations that may be deep or projected
_LOCATIONS = {
    "prepend": "prepend",
    "add": "add",
    "add-1": "add-1",
    "prepend-pixel": "prepend-pixel",
    "prepend-pixel-gaussian": "prepend-pixel",  # only its initialisation differs
    "pad": "pad",
    "below": "concat-channel",
}
_POOLS = {"img_pool": "image", "prompt_pool": "prompts", "imgprompt_pool": "image_and_prompts"}
_STAGE = "deep_prompt_embeddings_"  # followed by the index of a Swin's stage
_PATCH_EMBEDDING = "backbone.stem.patch_embed.proj"  # trained with concat-channel

# Numbers of dimensions of the official trained tensors, by their names without a stage's index.
_DIMS = {
    "prompt_embeddings": (3, 4),  # 4 in pixel space
    "prompt_embeddings_tb": (4,),
    "prompt_embeddings_lr": (4,),
    "deep_prompt_embeddings": (3,),
    "prompt_proj.weight": (2,),
    "head.last_layer.weight": (2,),
}

# The types in a pickled NumPy array, under the module names before and since NumPy 2.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_ARRAY_TYPES = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64")),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]

# Frozen tensors that identify a backbone: timm's name, and the official names after "enc.".
_FROZEN = {
    "cls_token": ("transformer.embeddings.cls_token", "cls_token"),
    "norm.weight": ("transformer.encoder.encoder_norm.weight", "norm.weight"),
}


class Unmapped(ValueError):
    """Official settings or tensors without a counterpart here, or which the official code gets wrong."""


def mapped_settings(
    prompt: Mapping[str, Any], *, encoder: str, depth: int, num_prompts: int
) -> dict[str, Any]:
    """The keyword arguments of PromptedViT or PromptedSwin that correspond to official settings.

    Args:
        prompt: official settings; missing ones have the official defaults.
        encoder: ``"sup"``, ``"mae"``, ``"mocov3"`` or ``"swin"``.
        depth: blocks of the backbone.
        num_prompts: number of prompts in the trained tensors.

    Raises:
        Unmapped: settings without a counterpart, with the reason.
    """
    unknown = sorted(prompt.keys() - DEFAULTS.keys())
    if unknown:
        raise Unmapped(f"unknown prompt settings {unknown}; known: {sorted(DEFAULTS)}")
    prompt = DEFAULTS | dict(prompt)
    location, deep, pool = prompt["LOCATION"], prompt["DEEP"], prompt["VIT_POOL_TYPE"]
    if location == "prepend-pixel-imgnettransform":
        raise Unmapped(f"LOCATION {location}: PromptedViT takes the strip's pixels as they are")
    if location not in _LOCATIONS:
        raise Unmapped(f"LOCATION {location!r}; known: {sorted(_LOCATIONS)}")
    if pool != "original" and pool not in _POOLS:
        raise Unmapped(f"VIT_POOL_TYPE {pool!r}; known: original, {', '.join(_POOLS)}")
    if prompt["INITIATION"] not in ("random", "final-cls", "cls-nolastl", "cls-nofirstl"):
        raise Unmapped(f"INITIATION {prompt['INITIATION']!r} is none of the official ones")
    if prompt["NUM_TOKENS"] not in (None, num_prompts):
        raise Unmapped(f"NUM_TOKENS {prompt['NUM_TOKENS']} but the trained tensors have {num_prompts}")
    if pool != "original" and location != "prepend":
        raise Unmapped(f"VIT_POOL_TYPE {pool} with LOCATION {location}: the official code refuses it")
    dropout = {"prompt_dropout": prompt["DROPOUT"]} if prompt["DROPOUT"] else {}
    if encoder != "sup":
        return dropout | _mapped_other_settings(prompt, encoder, num_prompts)

    if deep and location not in _TOKEN_LOCATIONS:
        raise Unmapped(f"DEEP with LOCATION {location}: the official code has no deep prompts there")
    if not deep and (prompt["REVERSE_DEEP"] or prompt["FORWARD_DEEP_NOEXPAND"]):
        raise Unmapped("REVERSE_DEEP and FORWARD_DEEP_NOEXPAND need DEEP")

    settings: dict[str, Any] = dropout | {
        "num_prompts": None if location in ("add", "add-1") else num_prompts,
        "prompt_type": "deep" if deep else "shallow",
        "prompt_location": _LOCATIONS[location],
        "pool": _POOLS.get(pool),
    }
    if location in _TOKEN_LOCATIONS and prompt["PROJECT"] > -1:
        settings["prompt_project"] = prompt["PROJECT"]
    return settings | _mapped_deep_settings(prompt, depth) if deep else settings


def _mapped_deep_settings(prompt: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """What `mapped_settings` adds or replaces for deep prompts in a supervised ViT."""
    first, location, pool = prompt["NUM_DEEP_LAYERS"], prompt["LOCATION"], prompt["VIT_POOL_TYPE"]
    if first is not None and not 1 <= first <= depth:
        raise Unmapped(f"NUM_DEEP_LAYERS {first} of {depth} blocks")
    if prompt["REVERSE_DEEP"]:
        if first is None:
            raise Unmapped("REVERSE_DEEP needs NUM_DEEP_LAYERS")
        if location == "prepend":
            raise Unmapped(
                "REVERSE_DEEP with LOCATION prepend: the official code slices off prompts that were never "
                "inserted, so it loses the first num_prompts patches"
            )
        return {"prompt_layers": -first, "prompt_shared": False}  # this path ignores it

    drop = prompt["FORWARD_DEEP_NOEXPAND"]
    if drop and location != "prepend":
        raise Unmapped(f"FORWARD_DEEP_NOEXPAND with LOCATION {location}: the official code refuses it")
    settings: dict[str, Any] = {} if first is None else {"prompt_layers": first}
    settings["prompt_shared"] = prompt["DEEP_SHARED"] and not drop  # the NOEXPAND path ignores it, too
    settings["after_prompts"] = "drop" if drop else "flow"
    if drop and first is not None and first < depth:
        if pool in ("img_pool", "prompt_pool"):
            raise Unmapped(
                f"FORWARD_DEEP_NOEXPAND with {pool}: the official code counts num_prompts rows that are "
                "gone, so it pools the wrong patches"
            )
        if pool == "imgprompt_pool":  # no prompt is left: all tokens but CLS are patches
            settings["pool"] = "image"
    return settings


def _mapped_other_settings(prompt: Mapping[str, Any], encoder: str, num_prompts: int) -> dict[str, Any]:
    """`mapped_settings` for MAE, MoCo v3 and Swin. Besides the number of prompts and dropout, the official
    code reads only DEEP and LOCATION there, and for MAE VIT_POOL_TYPE; it ignores the rest, except the
    settings of a Swin's other prompts. MAE and Swin pool prompts by default."""
    if encoder == "swin" and (prompt["NUM_DEEP_LAYERS"] or prompt["PROJECT"] > -1 or prompt["DEEP_SHARED"]):
        raise Unmapped("NUM_DEEP_LAYERS, PROJECT and DEEP_SHARED: PromptedSwin has no such prompts")
    if prompt["LOCATION"] != "prepend":
        raise Unmapped(f"LOCATION {prompt['LOCATION']} with {encoder}: the official code refuses it")
    pool = _POOLS.get(prompt["VIT_POOL_TYPE"], "image_and_prompts") if encoder == "mae" else None
    return {
        "num_prompts": num_prompts,
        "prompt_type": "deep" if prompt["DEEP"] else "shallow",
        "pool": pool,
    }


def to_our_names(
    official: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Renames the official trained tensors to PromptedViT's or PromptedSwin's names.

    Args:
        official: by their names after ``enc.`` and ``transformer.``; those of the head may be missing.
        settings: from `mapped_settings`.

    Raises:
        Unmapped: a tensor without a counterpart.
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in official.items()}
    ours = {}
    for part in ("weight", "bias"):
        if f"head.last_layer.{part}" in tensors:
            ours[f"head.{part}"] = tensors.pop(f"head.last_layer.{part}")
    stages = sorted(name for name in tensors if name.startswith(_STAGE))
    if stages:  # a Swin: "prompt_embeddings" is the first block's, the others are by stage
        first, *others = (tensors.pop(name) for name in stages)
        sets = [torch.cat((tensors.pop("prompt_embeddings"), first)), *others]
        ours |= {f"prompts.{stage}": prompts for stage, prompts in enumerate(sets)}
    location = settings.get("prompt_location", "prepend")
    shallow = tensors.pop("prompt_embeddings", None)
    deep = tensors.pop("deep_prompt_embeddings", None)
    if settings.get("prompt_shared") or settings["prompt_type"] == "shallow":
        deep = None  # in the file, but never used
    sets = [tensor for tensor in (shallow, deep) if tensor is not None]  # REVERSE_DEEP has no shallow ones
    if sets:
        ours["prompts"] = torch.cat(sets)
    if location == "pad":
        ours["prompts"] = tensors.pop("prompt_embeddings_tb")
        ours["prompts_sides"] = tensors.pop("prompt_embeddings_lr")
    if location == "concat-channel":
        for part in ("weight", "bias"):
            ours[f"{_PATCH_EMBEDDING}.{part}"] = tensors.pop(f"embeddings.patch_embeddings.{part}")
    projection = {part: tensors.pop(f"prompt_proj.{part}", None) for part in ("weight", "bias")}
    if "prompt_project" in settings:  # with a location in pixel space the official projection is never used
        ours |= {f"prompt_projection.{part}": t for part, t in projection.items() if t is not None}
    if tensors:
        raise Unmapped(f"tensors without a counterpart: {sorted(tensors)}")
    return ours


def to_official_names(
    ours: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The inverse of `to_our_names`: trained tensors under the official names, without prefix.

    Raises:
        Unmapped: a tensor without a counterpart, such as one of the backbone's that was unfrozen.
    """
    known: tuple[str, ...] = ("head.", "prompts", "prompt_projection.")
    if settings["prompt_location"] == "concat-channel":
        known = (*known, f"{_PATCH_EMBEDDING}.")
    if others := sorted(name for name in ours if not name.startswith(known)):
        raise Unmapped(f"{', '.join(others)}: trained here; the official code loads its own backbone instead")
    tensors = dict(ours)
    official = {f"head.last_layer.{part}": tensors.pop(f"head.{part}") for part in ("weight", "bias")}
    if "prompts.0" in tensors:
        first = tensors.pop("prompts.0")
        official["prompt_embeddings"] = first[:1]
        if settings["prompt_type"] == "deep":
            official[f"{_STAGE}0"] = first[1:]
        for name, prompts in tensors.items():
            official[name.replace("prompts.", _STAGE)] = prompts
        return official
    prompts = tensors.pop("prompts")
    layers = settings.get("prompt_layers")
    if settings["prompt_location"] == "pad":
        official["prompt_embeddings_tb"] = prompts
        official["prompt_embeddings_lr"] = tensors.pop("prompts_sides")
    elif isinstance(layers, int) and layers < 0:
        official["deep_prompt_embeddings"] = prompts
    else:
        official["prompt_embeddings"] = prompts[:1]
        if settings["prompt_type"] == "deep" and not settings.get("prompt_shared"):
            official["deep_prompt_embeddings"] = prompts[1:]
    for name, tensor in tensors.items():
        name = name.replace(_PATCH_EMBEDDING, "embeddings.patch_embeddings")
        official[name.replace("prompt_projection", "prompt_proj")] = tensor
    return official


@finding_sources_once()
def import_prompts(
    path: str | os.PathLike[str],
    backbone: str | VisionTransformer | SwinTransformer,
    *,
    prompt: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    **timm_kwargs: Any,
) -> PromptedViT | PromptedSwin:
    """Builds a model with prompts (and head, if the file has one) that the official code trained.

    Args:
        path: a file with the whole model, or prompt_epN.pth, which has no head: a new one is initialised.
        backbone, pretrained, checkpoint, timm_kwargs: the backbone that the prompts were trained on, as for
            PromptedViT.
        prompt: official settings (MODEL.PROMPT). Those that the tensors imply (DEEP, NUM_DEEP_LAYERS,
            REVERSE_DEEP, PROJECT, NUM_TOKENS, a LOCATION in pixel space) or `export_prompts` recorded may be
            left out.
        num_classes: of the new head; None if the file has one.

    Raises:
        Unmapped: settings or tensors without a counterpart here, with the reason.
        ValueError: a file that cannot be read or is for another backbone or method, or shapes that do not
            fit.
    """
    path = Path(path)
    content = read_tensors(path, _ARRAY_TYPES)
    with _naming(path):
        trained, frozen = _split(content, path)
    head = trained.get("head.last_layer.weight")
    if (head is None) == (num_classes is None):
        state = (
            "has no head; say how many classes a new one has" if head is None else "has a head; leave it out"
        )
        raise ValueError(f"num_classes: got {num_classes}, and {path} {state}")
    kind = kind_among(backbone, (VIT, SWIN))
    built, _ = resolve_backbone(backbone, False, timm_kwargs, kind=kind)  # only for its sizes
    if kind is SWIN:
        encoder, depth = "swin", sum(len(stage.blocks) for stage in built.layers)
    elif any(name.startswith("transformer.") for name in trained):
        encoder, depth = "sup", len(built.blocks)
    else:
        encoder = "mocov3" if isinstance(built.fc_norm, nn.Identity) else "mae"
        depth = len(built.blocks)
    is_staged = any(name.startswith(_STAGE) for name in trained)
    if is_staged and kind is not SWIN:
        raise ValueError(f"backbone: {path} holds the prompts of a Swin, by stages; got a ViT")
    _require_form(trained, path)
    with _naming(path):
        told = {"DEEP": is_staged} | _told_settings(trained, depth, built.patch_embed.patch_size[1])
        num_prompts = told.pop("NUM_TOKENS")
        given = {**told, **content.get("prompt", {}), **(prompt or {})}
        settings = mapped_settings(given, encoder=encoder, depth=depth, num_prompts=num_prompts)
        classes = num_classes if head is None else head.shape[0]
    build: Any = PromptedSwin if kind is SWIN else PromptedViT
    model = build(backbone, classes, pretrained=pretrained, checkpoint=checkpoint, **settings, **timm_kwargs)
    with _naming(path):
        _check_frozen(frozen, model.backbone.stem, path)
        tensors = to_our_names(trained, settings)
    if kind is SWIN and "prompts" in tensors:  # shallow: those of the first stage's first block
        tensors["prompts.0"] = tensors.pop("prompts")
    if head is None:
        tensors |= {"head.weight": model.head.weight.detach(), "head.bias": model.head.bias.detach()}
    model.load_trainable_state_dict(tensors)
    return model


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns the various errors of taking a file apart that only looks like the official code's into a
    ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its prompts are not in the form in which the official code writes them ({error!r})"
        ) from error


def export_prompts(
    model: PromptedViT | PromptedSwin, path: str | os.PathLike[str], *, encoder: str | None = None
) -> dict[str, Any]:
    """Write prompts and head in the format of the official code's checkpoints (for its MODEL.WEIGHT_PATH).

    The file has no backbone: the official code loads its own first. Besides "model" it holds the settings
    under "prompt", which the official code ignores.

    Args:
        model: the model to export.
        path: the file; an existing one is replaced completely or not at all.
        encoder: ``"sup"``, ``"mae"`` or ``"mocov3"``: the official class of a ViT. None: ``"mocov3"`` if the
            backbone's name says so, else ``"mae"`` if it has a norm after pooling, else ``"sup"``. None for
            a Swin.

    Returns:
        The official settings (MODEL.PROMPT) that describe the model.

    Raises:
        Unmapped: the official code has no such model, or gets it wrong.
        ValueError: encoder is not one of those named, or as `PromptedViT.storable_state_dict`.
    """
    stem = model.backbone.stem
    wanted = ("swin",) if isinstance(model, PromptedSwin) else VIT_ENCODERS
    if encoder is None and isinstance(model, PromptedSwin):
        encoder = "swin"
    elif encoder is None:
        encoder = "sup" if isinstance(stem.fc_norm, nn.Identity) else "mae"
        if (model.config.backbone.name or "").startswith("mocov3"):
            encoder = "mocov3"
    if encoder not in wanted:
        raise ValueError(f"encoder: got {encoder!r}, want one of {', '.join(map(repr, wanted))}")
    trained, options = model.storable_state_dict(), model.prompt_settings
    prompt = _official_settings(model, encoder)
    num_prompts = int(prompt["NUM_TOKENS"])
    mapped = mapped_settings(prompt, encoder=encoder, depth=model.num_blocks, num_prompts=num_prompts)
    # The official settings, mapped back, must give this very model.
    for name, value in mapped.items():
        own = _own_pool(model) if name == "pool" else getattr(options, name)
        if name == "pool" and value is None:
            value = "cls"
        if name == "prompt_layers":
            own = options.prompted_blocks(model.num_blocks)
            value = replace(options, prompt_layers=value).prompted_blocks(model.num_blocks)
        if own != value:
            raise Unmapped(f"{name} {own!r}: the official code has {value!r} in such a model ({encoder})")
    settings = {"prompt_location": options.prompt_location, **mapped}
    prefix = "enc.transformer." if encoder == "sup" else "enc."
    tensors = {
        (name if name.startswith("head.") else prefix + name): tensor.cpu().clone()
        for name, tensor in to_official_names(trained, settings).items()
    }
    with replacing(path) as temporary, open(temporary, "wb") as file:
        # To a file, not to its path: torch would write the temporary name into the archive.
        torch.save({"model": tensors, "prompt": prompt}, file)
    return prompt


def _own_pool(model: PromptedViT | PromptedSwin) -> str | None:
    """The name of the model's pooling, even if it is the backbone's own; None if it has no name."""
    if isinstance(model, PromptedSwin):
        # "original" stands for CLS on a ViT, and for the mean over patches and prompts on a Swin.
        return "cls" if model.pool in (None, "image_and_prompts") else model.pool
    if model.pool is not None:
        return model.pool
    stem = model.backbone.stem
    if stem.attn_pool is not None or stem.global_pool not in ("token", "avg"):
        return None
    return {Read.CLS: "cls", Read.PATCHES: "image"}.get(model.backbone.head_reads(None))


def _official_settings(model: PromptedViT | PromptedSwin, encoder: str) -> dict[str, Any]:
    """The official settings closest to the model."""
    options, depth = model.prompt_settings, model.num_blocks
    blocks, layers = options.prompted_blocks(depth), None
    k = len(blocks)
    if options.prompt_type == "deep" and k < depth:
        if blocks not in (tuple(range(k)), tuple(range(depth - k, depth))):
            raise Unmapped(f"prompt_layers {list(blocks)}: the official code takes the first or the last k")
        layers = k if blocks[0] == 0 else -k
    if options.prompt_dropout and options.prompt_dropout_per != "image":
        raise Unmapped(f"prompt_dropout_per {options.prompt_dropout_per!r}: the official code's is 'image'")
    pools = {name: official for official, name in _POOLS.items()} | {"cls": "original"}
    pool = pools.get(_own_pool(model) or "")
    if pool is None:
        raise Unmapped("pool None: the official code has no such pooling as the backbone's own")
    drops = options.after_prompts == "drop"
    if drops and layers is not None and pool == "img_pool":
        pool = "imgprompt_pool"  # pools only patches then: no prompt is left
    locations = {ours: official for official, ours in reversed(_LOCATIONS.items())}
    if options.prompt_location not in locations:
        raise Unmapped(f"prompt_location {options.prompt_location!r}: the official code has no such prompts")
    prompt = {
        "NUM_TOKENS": options.num_prompts or model.trainable_state_dict()["prompts"].shape[1],
        "LOCATION": locations[options.prompt_location],
        "DEEP": options.prompt_type == "deep",
        "PROJECT": -1 if options.prompt_project is None else options.prompt_project,
        "NUM_DEEP_LAYERS": None if layers is None else abs(layers),
        "REVERSE_DEEP": layers is not None and layers < 0,
        "DEEP_SHARED": options.prompt_shared,
        "FORWARD_DEEP_NOEXPAND": drops,
        "VIT_POOL_TYPE": pool,
        "DROPOUT": options.prompt_dropout,
    }
    if encoder != "sup":
        for name in ("PROJECT", "NUM_DEEP_LAYERS", "DEEP_SHARED", "FORWARD_DEEP_NOEXPAND"):
            if prompt[name] not in (DEFAULTS[name], False):
                raise Unmapped(
                    f"{name} {prompt[name]!r} with {encoder}: the official code does not look at it"
                )
    return prompt


def _split(content: Mapping[str, Any], path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trained tensors, and the backbone's, both by their names after "enc."."""
    if "shallow_prompt" in content:
        names = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}
        held = {names[n]: content[n] for n in names if n in content}
        for name, value in held.items():
            if not isinstance(value, np.ndarray | torch.Tensor):
                raise _misformed(path, f"{name} is a {type(value).__name__}, want an array")
        return {f"transformer.{name}": torch.as_tensor(value) for name, value in held.items()}, {}
    state = content.get("model")
    if not isinstance(state, Mapping) or not any("prompt_embeddings" in name for name in state):
        raise ValueError(
            f"{path}: holds no prompts, want a file of the official code's with 'model' or prompts"
        )
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise _misformed(path, f"{name} is a {type(value).__name__}, want a tensor")
    trained, frozen = {}, {}
    widened = any(name.endswith("transformer.prompt_embeddings") and t.ndim == 4 for name, t in state.items())
    for name, tensor in state.items():
        name = name.removeprefix("module.").removeprefix("enc.")
        inner = name.removeprefix("transformer.")
        if inner.startswith("head.projection.") or "adapter" in inner or inner.startswith("side"):
            raise Unmapped(
                f"{path}: {name} is trained beside the prompts and has no counterpart in PromptedViT"
            )
        is_patch = widened and inner.startswith("embeddings.patch_embeddings.")
        if is_patch or "prompt_embeddings" in inner or inner.startswith(("prompt_proj.", "head.last_layer.")):
            trained[name] = tensor
        else:
            frozen[name] = tensor
    if widened and not any(
        name.endswith("patch_embeddings.weight") and tensor.shape[1] > 3 for name, tensor in trained.items()
    ):  # prepend-pixel: the patch embedding is the backbone's own, frozen
        moved = [name for name in trained if "embeddings.patch_embeddings." in name]
        frozen |= {name: trained.pop(name) for name in moved}
    return trained, frozen


def _misformed(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path}: its prompts are not in the form in which the official code writes them: {why}"
    )


def _require_form(trained: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises ValueError for a trained tensor of a kind or shape that the official code does not write."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in trained.items()}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            kind = "without values" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
            raise _misformed(path, f"{name} is {kind}, want dense floating-point numbers")
        dims = _DIMS.get(name.rstrip("_0123456789"), ())
        if dims and tensor.ndim not in dims:
            wanted = " or ".join(map(str, dims))
            raise _misformed(path, f"{name} has shape {tuple(tensor.shape)}, want {wanted} dimensions")
    shallow = tensors.get("prompt_embeddings")
    for name in ("deep_prompt_embeddings", f"{_STAGE}0"):
        if shallow is not None and name in tensors and tensors[name].shape[1:] != shallow.shape[1:]:
            raise _misformed(
                path,
                f"{name} has shape {tuple(tensors[name].shape)} and prompt_embeddings "
                f"{tuple(shallow.shape)}, want the same but for the first dimension",
            )
    if "head.last_layer.bias" in tensors and "head.last_layer.weight" not in tensors:
        raise _misformed(path, "it holds head.last_layer.bias without head.last_layer.weight")


def _told_settings(trained: Mapping[str, torch.Tensor], depth: int, patch_width: int) -> dict[str, Any]:
    """The official settings that the tensors' presence and shapes imply."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in trained.items()}
    deep, prompts = tensors.get("deep_prompt_embeddings"), tensors.get("prompt_embeddings")
    told: dict[str, Any] = {}
    if "prompt_embeddings_tb" in tensors:
        return {"LOCATION": "pad", "NUM_TOKENS": tensors["prompt_embeddings_tb"].shape[2] // 2}
    if prompts is not None and prompts.ndim == 4:
        if "embeddings.patch_embeddings.weight" in tensors:
            return {"LOCATION": "below", "NUM_TOKENS": prompts.shape[1]}
        return {"LOCATION": "prepend-pixel", "NUM_TOKENS": prompts.shape[3] // patch_width}
    if "prompt_proj.weight" in tensors:
        told["PROJECT"] = tensors["prompt_proj.weight"].shape[1]
    if deep is not None:
        told["DEEP"] = True
        if prompts is None:
            told |= {"REVERSE_DEEP": True, "NUM_DEEP_LAYERS": deep.shape[0]}
        elif deep.shape[0] + 1 != depth:
            told["NUM_DEEP_LAYERS"] = deep.shape[0] + 1
    first = prompts if prompts is not None else deep
    assert first is not None  # ensured by _split
    return told | {"NUM_TOKENS": first.shape[1]}


def _check_frozen(frozen: Mapping[str, torch.Tensor], vit: VisionTransformer, path: Path) -> None:
    """Raises ValueError if the file holds a backbone other than this one."""
    own = vit.state_dict()
    for name, officials in _FROZEN.items():
        for official in officials:
            if official in frozen and name in own:
                got, want = frozen[official], own[name]
                rtol = max(1e-4, torch.finfo(got.dtype).eps)  # float16 rounds by more
                if got.shape != want.shape or not torch.allclose(got.to(want), want, rtol=rtol, atol=1e-6):
                    raise ValueError(f"backbone: {path} was trained on another one: its {official} differs")
