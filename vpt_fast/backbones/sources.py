"""Backbones outside timm's registry: folders and repositories that timm names local-dir:... and hf-hub:...

timm's own functions read the name and config.json. Weights are only read from safetensors, while timm goes on
to files that have to be unpickled.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, load_model_config_from_hf, parse_model_name
from timm.models._hub import download_from_hf, load_model_config_from_path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_HUB, _FOLDER = "hf-hub", "local-dir"
_SAVING = "timm.models.save_for_hf(model, folder, safe_serialization=True)"


@dataclass(frozen=True)
class Source:
    """A folder or a repository with timm's config.json.

    Attributes:
        kind: "local-dir" or "hf-hub".
        place: a folder's absolute path, or a repository's owner/name, with @revision if one was given.
        architecture: the name of the timm model.
        settings: timm's description of the weights.
        arguments: keyword arguments of the timm model, besides the architecture's own.
    """

    kind: str
    place: str
    architecture: str
    settings: PretrainedCfg
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """What `timm.create_model` takes, from any working directory."""
        return f"{self.kind}:{self.place}"

    @property
    def image_size(self) -> Any:
        """The size of the images, as timm's img_size gives it: one number, or height and width."""
        return self.arguments.get("img_size") or self.settings.input_size[1:]

    def weights(self) -> str:
        """The path of the weights, which are downloaded unless they are cached.

        Raises:
            ValueError: there are none in safetensors, or they cannot be downloaded.
        """
        try:
            if self.kind == _FOLDER:
                path = os.path.join(self.place, WEIGHTS_FILE)
                if not os.path.isfile(path):
                    raise EntryNotFoundError(path)  # huggingface_hub before 1.0 wants a message
                return path
            return str(download_from_hf(self.place, WEIGHTS_FILE))
        except (EntryNotFoundError, OSError) as error:
            # What lacks in the cache while there is no network is not known to lack on the hub.
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise ValueError(
                    f"pretrained: {self.name} has no {WEIGHTS_FILE}, and nothing else is read, such as "
                    "pytorch_model.bin: unpickling it can run code; want it as safetensors "
                    f"({_SAVING}), or pretrained=False"
                ) from None
            raise ValueError(
                f"pretrained: {WEIGHTS_FILE} of {self.name} cannot be downloaded: {said_by_hub(error)}"
            ) from error


_found: ContextVar[dict[str, Source | None] | None] = ContextVar("found_sources", default=None)


@contextlib.contextmanager
def finding_sources_once() -> Iterator[None]:
    """A context in which `find_source` reads a folder, or asks the hub, once for each name: for building one
    model, which looks its backbone up several times. Later, what was found may have changed."""
    if _found.get() is not None:
        yield
        return
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def find_source(backbone: str) -> Source | None:
    """The folder or repository that a backbone's name stands for; None if the name has no such prefix.

    Raises:
        ValueError: an unknown prefix, a path or repository without one, a folder or repository that cannot be
            read, or one without the config.json that timm writes.
    """
    found = _found.get()
    if found is None:
        return _read_source(backbone)
    if backbone not in found:
        found[backbone] = _read_source(backbone)
    return found[backbone]


def _read_source(backbone: str) -> Source | None:
    """Implements `find_source`."""
    try:
        kind, place = parse_model_name(backbone)
    except ValueError as error:
        raise ValueError(f"backbone: got {backbone!r}: {error}") from None
    if kind is None:
        return None
    if kind == _FOLDER:
        place = os.path.abspath(place)  # a saved model may be loaded from another working directory
        if not os.path.isfile(os.path.join(place, CONFIG_FILE)):
            lacks = f"has no {CONFIG_FILE}" if os.path.isdir(place) else "is no folder"
            raise ValueError(
                f"backbone: got {backbone!r}, and {place} {lacks}; want a folder with {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}, as {_SAVING} writes it"
            )
    try:
        read = load_model_config_from_path if kind == _FOLDER else load_model_config_from_hf
        settings, architecture, arguments = read(place)
        described = PretrainedCfg(**settings)
        if not isinstance(architecture, str) or not isinstance(arguments, dict):
            raise TypeError(f"architecture is {architecture!r}, model_args is {arguments!r}")
    except (EntryNotFoundError, HFValidationError, OSError) as error:
        raise ValueError(
            f"backbone: got {backbone!r}, whose {CONFIG_FILE} cannot be read: {said_by_hub(error)}; want the "
            "owner/name of a repository on the Hugging Face hub that holds a timm model"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise ValueError(
            f"backbone: got {backbone!r}, whose {CONFIG_FILE} is not what timm writes "
            f"({type(error).__name__}: {error}); want that of {_SAVING}"
        ) from error
    if not timm.is_model(architecture):
        raise ValueError(
            f"backbone: got {backbone!r}, whose {CONFIG_FILE} names the architecture {architecture!r}; want "
            f"the name of a timm model{close_names(architecture)}"
        )
    return Source(kind, place, architecture, described, arguments)


def local_folder(backbone: str) -> Path | None:
    """The absolute path of the folder of a local-dir: name, which may not exist; None for any other name."""
    kind, place = parse_model_name(backbone) if ":" in backbone else (None, "")
    return Path(place).absolute() if kind == _FOLDER else None


def repository(backbone: str) -> str | None:
    """owner/name of the repository of an hf-hub: name; None for any other name."""
    kind, place = parse_model_name(backbone) if ":" in backbone else (None, "")
    return place.partition("@")[0] if kind == _HUB else None


def said_by_hub(error: Exception) -> str:
    """What huggingface_hub says of a failed request, without the hints that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).removesuffix(".") or type(error).__name__


def close_names(name: str, *more: str) -> str:
    """A hint that error messages add: timm models, and names in `more`, that are spelled like this one."""
    close = difflib.get_close_matches(name, [*more, *timm.list_models()], n=3)
    return f"; close names: {', '.join(close)}" if close else ""
