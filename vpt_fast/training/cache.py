"""What several runs in one process share: loaded backbones, decoded images, features."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from vpt_fast.backbones.sharing import SharedBackbone, sharing_backbones

KEPT = 4  # per kind: train and val of a search, train+val and test of the final runs

_Value = TypeVar("_Value")


class TrainingCache:
    """Passed to `loop.train` for several runs, so that what they share is loaded or computed once.

    A run's results do not depend on it. The `kept` most recently used values of each kind are held in memory;
    0 caches nothing, backbones included.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._values: dict[str, OrderedDict[Hashable, Any]] = {}
        self._backbone = SharedBackbone()

    def get(self, kind: str, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The cached value of `key`, or that of `make()`, which is then cached."""
        if not self._kept:
            return make()
        values = self._values.setdefault(kind, OrderedDict())
        if key not in values:
            values[key] = make()
            if len(values) > self._kept:
                values.popitem(last=False)
        values.move_to_end(key)
        return values[key]

    def holds(self, kind: str, key: Hashable) -> bool:
        """Whether `get` has a cached value of `key`."""
        return key in self._values.get(kind, ())

    def sharing_backbones(self, treatment: Hashable) -> contextlib.AbstractContextManager[None]:
        """A context whose models share the backbone; `treatment`: see `backbones.sharing`."""
        return sharing_backbones(self._backbone, treatment) if self._kept else contextlib.nullcontext()
