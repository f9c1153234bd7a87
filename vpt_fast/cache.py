"""What several runs of one process share: backbones that were loaded, images that were decoded, features."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from vpt_fast.backbones.resolve import sharing_backbones

KEPT = 4  # of a kind: train and val of a search, train+val and test of the runs that follow it

_Value = TypeVar("_Value")


class TrainingCache:
    """Handed to `vpt_fast.loop.train` for run after run, it spares them what they would all load or compute.

    A run's results do not depend on it. Of a kind of things the `kept` that were used last are held in
    memory; 0 holds nothing.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._values: dict[str, OrderedDict[Hashable, Any]] = {}
        self._backbones: dict[Hashable, Any] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """What is held under `key`, else what `make` gives."""
        if not self._kept:
            return make()
        values = self._values.setdefault(kind, OrderedDict())
        if key not in values:
            values[key] = make()
            if len(values) > self._kept:
                values.popitem(last=False)
        values.move_to_end(key)
        return values[key]

    @contextlib.contextmanager
    def backbones(self) -> Iterator[None]:
        """Models built within it take their backbone from here."""
        with sharing_backbones(self._backbones) if self._kept else contextlib.nullcontext():
            yield
