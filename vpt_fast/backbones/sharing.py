"""What models that are built one after the other share: the backbone, and what was made of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.architecture import fingerprint


@dataclass
class SharedBackbone:
    """The last backbone that was created.

    key: what it was created from; None if there is none.
    after: the state of torch's generator after its creation.
    made: what has been made of it: kind to key and value.
    """

    key: Hashable = None
    model: nn.Module | None = None
    after: torch.Tensor | None = None
    made: dict[str, tuple[Hashable, Any]] = field(default_factory=dict)


_sharing: ContextVar[tuple[SharedBackbone, Hashable] | None] = ContextVar("shared_backbone", default=None)


@contextlib.contextmanager
def sharing_backbones(shared: SharedBackbone, treatment: Hashable = None) -> Iterator[None]:
    """A context in which models take their backbone from `shared` if it is the one that they ask for.

    Randomly initialised weights depend on torch's generator and advance it; both the weights and the
    generator's state afterwards are the same as without this.

    Args:
        treatment: names all that will be done to frozen blocks of models built here: casts, moves to a
            device. Models with the same one share the blocks too; None: each has its own.
    """
    token = _sharing.set((shared, treatment))
    try:
        yield
    finally:
        _sharing.reset(token)


def created_once(key: Hashable, create: Callable[[], nn.Module]) -> nn.Module:
    """The backbone that `create` returns; in a context of `sharing_backbones`, of an earlier call with this
    key. It may depend on torch's generator besides."""
    if (sharing := _sharing.get()) is None:
        return create()
    shared, _ = sharing
    key = (key, bytes(torch.get_rng_state().numpy()))
    if key != shared.key:
        shared.key = shared.model = shared.after = None  # freed before the next one is created
        shared.made = {}
        model = create()
        shared.key, shared.model, shared.after = key, model, torch.get_rng_state()
    torch.set_rng_state(shared.after)
    return shared.model


def fingerprint_once(backbone: nn.Module) -> str:
    """This backbone's `fingerprint`; where models share it, what an earlier call returned."""
    return _made(backbone, "fingerprint", None, lambda: fingerprint(backbone))


def blocks_made_once(
    backbone: nn.Module, settings: Hashable, make: Callable[[], list[nn.Module]]
) -> list[nn.Module]:
    """The frozen blocks with these settings that `make` returns, which only reads this backbone; where models
    share it and treat the blocks alike, those of an earlier call. The blocks of one set of settings are held
    at a time."""
    sharing = _sharing.get()
    treatment = None if sharing is None else sharing[1]
    if treatment is None:
        return make()
    return _made(backbone, "blocks", (settings, treatment), make)


def _made(backbone: nn.Module, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
    sharing = _sharing.get()
    if sharing is None or sharing[0].model is not backbone:
        return make()
    made = sharing[0].made
    if kind not in made or made[kind][0] != key:
        made.pop(kind, None)  # freed before the next ones are made
        made[kind] = key, make()
    return made[kind][1]
