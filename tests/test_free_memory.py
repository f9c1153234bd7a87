"""How much memory is free, in a container too."""

from __future__ import annotations

import os

import torch

from vpt_fast import free_memory
from vpt_fast.free_memory import free_bytes


def test_free_bytes_of_this_machine_are_less_than_it_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) < total


def test_free_bytes_of_a_container_are_what_its_control_group_leaves(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(free_memory, "_CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 300000\n")
    assert free_bytes(torch.device("cpu")) == 1_300_000


def test_free_bytes_of_a_container_without_a_limit_are_the_machines(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(free_memory, "_CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 1_300_000


def test_free_bytes_of_a_gpu_are_those_after_unused_memory_is_given_back(monkeypatch) -> None:
    free = [1000]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(5000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 9000))
    assert free_bytes(torch.device("cuda")) == 5000


def test_free_bytes_of_an_unknown_device_are_unknown() -> None:
    assert free_bytes(torch.device("meta")) is None
