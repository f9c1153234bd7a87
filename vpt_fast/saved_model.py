"""The files of a saved model: config.json, its settings, and model.safetensors, what it trains."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

import vpt_fast
from vpt_fast.backbones.creation import names_url
from vpt_fast.backbones.resolve import Origin
from vpt_fast.backbones.sources import local_folder
from vpt_fast.files import holds, parse_json, remove_unfinished, replacing
from vpt_fast.hub import download_saved

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CACHE_FOLDER = "cache_dir"  # timm's argument


@dataclass(frozen=True)
class BackboneConfig(Origin):
    """A model's backbone: where it came from, the SHA-256 of its weights, and the settings that they do not
    show (`backbones.architecture`)."""

    fingerprint: str
    architecture: dict[str, Any]

    def without_folders(self) -> BackboneConfig:
        """The same for others than whoever has these files: of the path of a folder (local-dir:), a
        checkpoint or timm's ``file`` of weights only the last part."""
        folder = local_folder(self.name or "")
        kwargs = dict(self.kwargs)
        for name in ("pretrained_cfg", "pretrained_cfg_overlay"):
            settings = kwargs.get(name)
            if isinstance(settings, Mapping) and isinstance(settings.get("file"), str):
                kwargs[name] = {**settings, "file": os.path.basename(settings["file"])}
        return replace(
            self,
            name=self.name if folder is None else f"local-dir:{folder.name}",
            kwargs=kwargs,
            checkpoint=None if self.checkpoint is None else os.path.basename(self.checkpoint),
        )

    @property
    def call(self) -> str | None:
        """The name and arguments, as text, if config.json cannot hold the keyword arguments for timm (a class
        of layers, or what `require_harmless` refuses); None if it can."""
        try:
            json.dumps(self.kwargs)
            is_held = not names_url(self.kwargs)
        except (TypeError, ValueError):  # ValueError: a mapping that contains itself
            is_held = False
        if is_held:
            return None
        shown = self.without_folders()  # the text is in whatever is made of the saved model
        weights = f", checkpoint={shown.checkpoint!r}" if shown.checkpoint is not None else ""
        weights = ", pretrained=True" if shown.pretrained else weights
        keywords = "".join(f", {name}={value!r}" for name, value in shown.kwargs.items())
        return f"{shown.name}{weights}{keywords}"


@dataclass(frozen=True)
class ClassifierConfig:
    """What is needed to rebuild a model, besides its trained tensors and backbone.

    options: the other keyword arguments of the class's constructor, as JSON holds them.
    backbone_call: `BackboneConfig.call`; of a model that was loaded with an instance for a backbone, what its
        file recorded.
    """

    model: str  # the class's name
    backbone: BackboneConfig
    num_classes: int
    pool: str | None
    options: dict[str, Any]
    backbone_call: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds. A backbone whose keyword arguments it cannot hold is described like an
        instance, with the `backbone_call` beside it. Where timm keeps downloads is left out: that is of this
        machine, not of the model."""
        backbone = self.backbone
        if backbone.call is not None:
            backbone = replace(backbone, name=None, pretrained=False, kwargs={}, checkpoint=None)
        kwargs = {name: value for name, value in backbone.kwargs.items() if name != CACHE_FOLDER}
        backbone = replace(backbone, kwargs=kwargs)
        settings = asdict(replace(self, backbone=backbone))
        if self.backbone_call is None:
            del settings["backbone_call"]
        return settings


def write_pretrained(
    directory: str | os.PathLike[str], config: ClassifierConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Writes a model's settings and trained tensors to a folder, which is made if it does not exist; each
    file completely or not at all."""
    directory = Path(directory)
    settings = {"vpt_fast_version": vpt_fast.__version__, **config.to_dict()}
    text = (json.dumps(settings, indent=2) + "\n").encode()
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory / CONFIG_FILE, directory / WEIGHTS_FILE)  # of a process that was killed
    with contextlib.ExitStack() as files:
        # Both are complete before the first takes its place: of an earlier model none is left without the
        # other. Those of a run differ from epoch to epoch in the tensors alone.
        if not holds(directory / CONFIG_FILE, text):
            files.enter_context(replacing(directory / CONFIG_FILE)).write_bytes(text)
        weights = files.enter_context(replacing(directory / WEIGHTS_FILE))
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, weights)


def read_pretrained(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and the trained tensors of a saved model, from a folder or a hub repository.

    Raises:
        FileNotFoundError: it lacks a file, or there is neither such a folder nor such a repository.
        ValueError: the settings are not what `save_pretrained` writes.
    """
    folder = Path(path)
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        folder = download_saved(str(path), [CONFIG_FILE, WEIGHTS_FILE])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: has no {name}, want a folder that save_pretrained wrote")
    try:
        settings = parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: holds {settings!r}, want a mapping")
    _check_settings(settings, folder / CONFIG_FILE)
    try:
        return settings, safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: cannot be read: {error}") from None


def require_harmless(arguments: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raises ValueError if the arguments that the config.json in `path` has for a model's constructor say
    where timm downloads a file from, or where to: together, its author could write any file into any folder
    of whoever loads the model."""
    refused = [CACHE_FOLDER] if CACHE_FOLDER in arguments else []
    if names_url(arguments):
        refused.append("the url of weights")
    if refused:
        raise ValueError(
            f"{path}: its {CONFIG_FILE} names {' and '.join(refused)}, and a file may not say what is "
            "downloaded or where to; if you trust it, build the backbone with these and pass it as "
            "backbone=..."
        )


# Types of the values in config.json, and their names in error messages.
_KINDS: dict[Any, str] = {
    str: "text", dict: "a mapping", bool: "true or false", str | None: "text or null",
}  # fmt: skip
_SETTINGS: dict[str, Any] = {"model": str, "backbone": dict, "options": dict, "backbone_call": str}
_BACKBONE: dict[str, Any] = {
    "name": str | None, "pretrained": bool, "kwargs": dict, "checkpoint": str | None, "fingerprint": str,
    "architecture": dict,
}  # fmt: skip


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    """Raises ValueError if config.json does not have the form that `save_pretrained` writes, because another
    version wrote it, say, or someone edited it."""
    for config, where, kinds in ((ClassifierConfig, "", _SETTINGS), (BackboneConfig, "backbone.", _BACKBONE)):
        found = settings[where.rstrip(".")] if where else settings
        missing = {field.name for field in fields(config) if field.default is MISSING} - found.keys()
        if missing:
            raise ValueError(f"{file}: lacks {', '.join(where + name for name in sorted(missing))}")
        for name, kind in kinds.items():
            if name in found and not isinstance(found[name], kind):
                raise ValueError(f"{file}: {where}{name} is {found[name]!r}, want {_KINDS[kind]}")
    unknown = settings["backbone"].keys() - _BACKBONE.keys()
    if unknown:
        raise ValueError(f"{file}: backbone has {', '.join(sorted(unknown))}, want {', '.join(_BACKBONE)}")
