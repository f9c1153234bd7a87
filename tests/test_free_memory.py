"""How much memory is free, in a container too."""

from __future__ import annotations

import os

import pytest
import torch

from vpt_fast import free_memory
from vpt_fast.free_memory import free_bytes


def test_free_bytes_of_this_machine_are_less_than_it_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) < total


@pytest.mark.parametrize(("left", "expected"), [(1_300_000, 1_300_000), (2**60, None), (None, None)])
def test_free_bytes_are_no_more_than_control_groups_leave(left, expected, monkeypatch) -> None:
    monkeypatch.setattr(free_memory, "memory_left", lambda: left)
    monkeypatch.setattr(free_memory, "_available", lambda: 2**30)
    assert free_bytes(torch.device("cpu")) == (expected or 2**30)


def test_free_bytes_of_a_gpu_are_those_after_unused_memory_is_given_back(monkeypatch) -> None:
    free = [1000]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(5000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 9000))
    assert free_bytes(torch.device("cuda")) == 5000


def test_free_bytes_of_an_unknown_device_are_unknown() -> None:
    assert free_bytes(torch.device("meta")) is None
