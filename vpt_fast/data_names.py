"""What the setting `data` may name. Known without torch, so that a command refuses a folder that is not there
before it imports what it needs to train."""

from __future__ import annotations

from pathlib import Path

PREFIXES = ("torch", "hfds", "hfids", "wds", "tfds")
"""Of the names that timm's factory gives data sets, such as torch/cifar10."""


def is_factory_name(data: str) -> bool:
    """Whether `data` is a name such as torch/cifar10 and not a folder."""
    prefix, slash, name = data.partition("/")
    return prefix in PREFIXES and bool(slash and name) and not Path(data).is_dir()
