"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

MOST_RESERVED = 2**30  # bytes that a process may hold on to; to reserve so few anew takes no time


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that take most memory come first, all to the first of the processes that share the tests, so
    that it runs one after the other, and before those beside it that compile models take most of theirs."""
    items.sort(key=lambda item: item.get_closest_marker("large") is None)


@pytest.fixture(autouse=True)
def room_for_others() -> Iterator[None]:
    """Gives memory back after a test that took much: a dozen processes test beside each other, and beside
    what the benchmarks compile, on a GPU of 80 GB. The allocator would keep 8 GiB of a test's to the end."""
    yield
    if torch.cuda.memory_reserved() > MOST_RESERVED:
        torch.cuda.empty_cache()
