"""benchmarks/tune.py launches every candidate, checks it, and compares it with what is recorded."""

from __future__ import annotations

import dataclasses
import io
import types
from functools import partial
from typing import Any

import attention
import operations
import pytest
import torch
import tune
from rich.console import Console
from rich.progress import Progress
from vpt_fast.kernels import launch
from vpt_fast.kernels.mlp import gemm
from vpt_fast.kernels.prompted_attention import ops

import kernels

SETTINGS = operations.Settings(
    torch.device("cpu"), torch.float32, repeats=1, bounds=operations.Bounds(20.0, 0.1)
)
SHAPE = attention.Shape(batch_size=1, num_tokens=5, num_prompts=3, num_heads=1, head_dim=16)
SMALL = [dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1, maxnreg=None)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No large buffer to empty caches with."""
    monkeypatch.setitem(operations._FLUSH_BYTES, "cpu", 16)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every launch of attention's forward kernel."""
    found: list[dict[str, Any]] = []
    kernel = ops.attention_forward_kernel

    class Recorded:
        arg_names = kernel.arg_names
        __name__ = kernel.__name__

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **keywords: found.append(keywords) or kernel[grid](*args, **keywords)

    monkeypatch.setattr(ops, "attention_forward_kernel", Recorded())
    return found


def attention_target(name: str) -> tune.Target:
    (target,) = tune.attention_targets(SHAPE, [name], SETTINGS)
    return target._replace(candidates=SMALL)


@pytest.mark.parametrize("name", tune.ATTENTION_KERNELS)
def test_candidates_of_attention_are_right_and_compared_with_what_is_recorded(name: str) -> None:
    recorded, other = tune.measure_target(attention_target(name), SETTINGS)
    assert (recorded.recorded, other.recorded) == (True, False)
    assert recorded.error is None and recorded.exact and recorded.ratio == 1.0
    assert other.error is None and other.exact and other.launch == SMALL[0]
    assert other.ratio == pytest.approx(recorded.ms / other.ms)


@pytest.mark.parametrize("op", tune.LINEAR_KERNELS)
def test_candidates_of_products_are_right(op: str) -> None:
    case = kernels.Case(op, "gelu", False, batch_size=1, num_tokens=3, width=16)
    (target,) = tune.linear_targets(case, SETTINGS)
    candidate = {**gemm._config(torch.float32, aligned=True), "BLOCK_M": 32}
    rows = tune.measure_target(target._replace(candidates=[candidate]), SETTINGS)
    assert [row.exact for row in rows] == [True, True]


@pytest.mark.parametrize("op", tune.LINEAR_KERNELS)
def test_candidates_by_descriptors_are_right(op: str) -> None:
    settings = dataclasses.replace(SETTINGS, dtype=torch.float16)
    case = kernels.Case(op, "gelu", False, batch_size=1, num_tokens=67, width=48)
    (target,) = tune.linear_targets(case, settings)
    candidate = {**gemm._tma_config(), "BLOCK_M": 64}
    rows = tune.measure_target(target._replace(candidates=[candidate]), settings)
    assert [(row.launch["BLOCK_M"], row.exact) for row in rows] == [(128, True), (64, True)]


def test_a_candidate_is_what_the_kernel_is_launched_with(launched: list[dict[str, Any]]) -> None:
    target = attention_target("forward")
    launched.clear()
    with tune.launched(target, SMALL[0]):
        target.call()
    target.call()
    (inside, after) = ({key: keywords[key] for key in SMALL[0]} for keywords in launched)
    assert (inside, after) == (SMALL[0], target.recorded)


def test_each_candidate_is_built_by_one_of_the_processes(launched: list[dict[str, Any]]) -> None:
    target = attention_target("forward")
    two = [*SMALL, dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1, maxnreg=None)]
    launched.clear()
    for part in range(2):
        tune.build(lambda: [target._replace(candidates=two)], part, 2)
    assert sorted(keywords["BLOCK_M"] for keywords in launched) == sorted(
        launch["BLOCK_M"] for launch in [target.recorded, *two]
    )


def test_a_candidate_that_cannot_be_built_stops_no_other(launched: list[dict[str, Any]]) -> None:
    refused = dict(BLOCK_M=16, BLOCK_N=24, num_warps=4, num_stages=1, maxnreg=None)  # no power of two
    target = attention_target("forward")._replace(candidates=[refused, *SMALL])
    launched.clear()
    tune.build(lambda: [target], 0, 1)
    assert [keywords["BLOCK_N"] for keywords in launched] == [
        launch["BLOCK_N"] for launch in (target.recorded, refused, *SMALL)
    ]


def test_another_process_builds_what_a_group_stands_for() -> None:
    case = kernels.Case("linear_activate", "gelu", False, batch_size=1, num_tokens=3, width=16)
    groups = [partial(tune.linear_targets, case, SETTINGS)]
    with Progress(console=Console(file=io.StringIO())) as progress:
        tune.build_all(groups, 1, progress)  # one, since each imports torch
    assert [(task.completed, task.total) for task in progress.tasks] == [(1, 1)]


def test_without_groups_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ProcessPoolExecutor", None)
    with Progress(console=Console(file=io.StringIO())) as progress:
        tune.build_all([], 2, progress)
    assert progress.tasks == []


def test_what_cannot_be_launched_costs_no_other_its_turn() -> None:
    refused = dict(BLOCK_M=16, BLOCK_N=24, num_warps=4, num_stages=1, maxnreg=None)  # no power of two
    target = attention_target("forward")._replace(candidates=[refused, *SMALL])
    recorded, failed, other = tune.measure_target(target, SETTINGS)
    assert failed.error is not None and failed.ms is None and not failed.exact
    assert recorded.ms is not None and other.ms is not None


@pytest.mark.parametrize("name", ["forward", "grad_q"])
def test_recorded_launch_that_cannot_be_built_is_a_row_that_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ops.Tiles(16, 24, 4, 1, None)  # no power of two
    monkeypatch.setattr(ops, "forward_tiles", lambda *_: refused)
    (row,) = tune.measure_target(attention_target(name)._replace(candidates=[]), SETTINGS)
    assert row.error is not None and row.ms is None
    assert f"the recorded one: {row.error}" in str(tune.make_table([row]).caption)


def test_all_candidates_graphs_share_their_results_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(operations, "prepare", lambda call, device, pool: pools.append(pool))
    monkeypatch.setattr(operations, "time_calls", lambda calls, *_, **__: dict.fromkeys(calls, [1.0]))
    on_a_gpu = dataclasses.replace(SETTINGS, device=torch.device("cuda"))
    rows = tune.measure_target(attention_target("forward"), on_a_gpu)
    assert [row.error for row in rows] == [None, None]
    assert len(pools) == 2 and pools[0] is pools[1] is not None


def test_a_wrong_candidate_is_not_shown_among_the_fastest() -> None:
    target = attention_target("forward")._replace(error=lambda: 1.0)
    rows = tune.measure_target(target, SETTINGS)
    assert not any(row.exact for row in rows)
    assert tune.make_table(rows).row_count == 1


def test_head_dims_of_other_models_are_launched_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    report = types.SimpleNamespace(rows_of=lambda case: [], describe=str, path=None)
    launched: list[tuple[int, ...]] = []

    def targets(shape: attention.Shape, names: list[str], settings: Any) -> list[tune.Target]:
        launched.append(dataclasses.astuple(shape))
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(operations, "start", lambda *_, **__: (SETTINGS, report))
    monkeypatch.setattr(tune, "build_all", lambda *_: None)
    monkeypatch.setattr(tune, "attention_targets", targets)
    tune.main("forward", head_dim="72,88", num_heads="16", batch_size=8)
    assert {*launched} == {(8, 197, 100, 16, 72), (8, 197, 100, 16, 88)}


def test_a_host_of_many_cores_does_not_fill_the_gpu_with_processes_that_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = types.SimpleNamespace(rows_of=lambda case: [], describe=str, path=None)
    processes: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.os, "sched_getaffinity", lambda process: {*range(208)})
    monkeypatch.setattr(operations, "start", lambda *_, **__: (SETTINGS, report))
    monkeypatch.setattr(tune, "attention_targets", lambda *_: [])
    monkeypatch.setattr(tune, "build_all", lambda groups, most, progress: processes.append(most))
    tune.main("forward", batch_size=8)
    assert processes == [16]


def test_every_recorded_launch_of_a_gpu_is_beside_candidates_of_its_own_kind() -> None:
    recorded = ops.forward_tiles(torch.bfloat16, 64, 197, 90).launch
    assert all(launch.keys() == recorded.keys() for launch in tune.ATTENTION_LAUNCHES)
    assert recorded in tune.ATTENTION_LAUNCHES
    linear = gemm._config(torch.bfloat16, aligned=True)
    assert all(launch.keys() == linear.keys() for launch in tune.LINEAR_LAUNCHES)
    assert linear in tune.LINEAR_LAUNCHES
    tma = gemm._tma_config()
    assert all(launch.keys() == tma.keys() for launch in tune.tma_launches())
    assert tma in tune.tma_launches()
    specialized = tune.specialized_launches()
    assert all(candidate.keys() == gemm.SPECIALIZED.keys() for candidate in specialized)
    assert gemm.SPECIALIZED in specialized


@pytest.mark.parametrize(("arch", "are_tried"), [(90, True), (100, False)])
def test_specialized_warpgroups_are_tried_on_sm_90(
    arch: int, are_tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: arch)
    settings = dataclasses.replace(SETTINGS, dtype=torch.float16)
    case = kernels.Case("linear_activate", "gelu", False, batch_size=1, num_tokens=67, width=48)
    (target,) = tune.linear_targets(case, settings)
    assert (gemm.SPECIALIZED in target.candidates) == are_tried
