"""benchmarks/profile_step.py counts all that ran in a step, once, and names what it was for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import profile_step
import pytest
import reports
import torch
import typer
from implementations import IMPLEMENTATIONS, Setting, make_start, random_batch
from typer.testing import CliRunner

APP = typer.Typer()
APP.command()(profile_step.main)
TINY = ["--model", "vit_tiny_patch16_224", "--num-prompts", "2", "--batch-size", "1", "--steps", "1"]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("attention_forward_kernel", "attention"),
        ("grad_kv_kernel", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::_log_softmax_backward_data", "other"),
        ("void softmax_warp_forward<float, float, float, 9, false, false>(float*)", "attention"),
        ("void softmax_warp_backward<float, float, float, 7, true, false>(float*)", "other"),
        ("normalize_backward_kernel", "normalisation"),
        ("activate_backward_kernel", "activation"),
        ("linear_activate_kernel", "products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("aten::addmm", "products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::copy_", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, add>", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert profile_step.kind_of(name) == kind


@pytest.fixture(scope="module")
def profiled() -> tuple[list[profile_step.Entry], float]:
    setting = Setting("vit_tiny_patch16_224", 2, 1, "deep", "float32")
    start = make_start(setting, torch.device("cpu"))
    contender = IMPLEMENTATIONS["vpt_fast"]("vpt_fast", start)
    return profile_step.profile_steps(contender, random_batch(start, 1, torch.device("cpu")), steps=2)


def test_the_host_is_busy_until_a_step_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1.0, 1.002, 2.0, 2.009, 3.0, 3.004))
    monkeypatch.setattr(profile_step.time, "perf_counter", lambda: next(seconds))
    batch = (torch.zeros(1), torch.zeros(1))
    contender: Any = SimpleNamespace(step=lambda *_: None)
    assert profile_step.host_ms(contender, batch, steps=3) == pytest.approx(4.0)


def test_calls_are_those_of_one_step(profiled: tuple[list[profile_step.Entry], float]) -> None:
    (backward,) = (entry for entry in profiled[0] if entry.name == "_FrozenBlockFunctionBackward")
    assert backward.calls == 12


def test_what_ran_is_no_longer_than_the_step(profiled: tuple[list[profile_step.Entry], float]) -> None:
    entries, step_ms = profiled
    assert 0.5 * step_ms < sum(entry.ms for entry in entries) <= step_ms


def test_kinds_hold_every_entry_once(profiled: tuple[list[profile_step.Entry], float]) -> None:
    entries, _ = profiled
    kinds = profile_step.by_kind(entries)
    assert sum(kinds.values()) == pytest.approx(sum(entry.ms for entry in entries))
    assert next(iter(kinds)) == "products"


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    found = CliRunner().invoke(APP, [*TINY, "--memory", "recompute", "--output", str(path)])
    assert found.exit_code == 0, found.output
    report = reports.read_own(path, profile_step.Entry)  # as the next run reads it, which may replace it
    assert report["memory"] == "recompute" and report["implementation"] == "vpt_fast"
    assert all(row["name"][:20] in found.output for row in report["rows"][:3])
    assert f"{report['host_ms']:.3f} ms, without the profiler" in found.output


def test_what_differs_is_in_the_default_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "RESULTS", tmp_path)
    monkeypatch.setattr(profile_step, "profile_steps", lambda *_: ([], 1.0))
    monkeypatch.setattr(profile_step, "host_ms", lambda *_: 1.0)
    for flags in (["--memory", "exact"], ["--memory", "compact"], ["--dtype", "bfloat16"]):
        assert CliRunner().invoke(APP, [*TINY, *flags]).exit_code == 0
    setting = "vit_tiny_patch16_224-2-deep-prompts-batch-1"
    starts = [f"compact-{setting}-float32-", f"exact-{setting}-bfloat16-", f"exact-{setting}-float32-"]
    for path, start in zip(sorted(tmp_path.iterdir()), starts, strict=True):
        assert path.name.startswith(f"profile-vpt_fast-{start}")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--implementation", "concat"], ["implementation", "'concat'", "concat_timm"]),
        (["--implementation", "vpt_fast_graphed"], ["got vpt_fast_graphed on cpu", "want a GPU"]),
        (["--memory", "none"], ["memory", "'none'", "recompute"]),
        (["--dtype", "int8"], ["dtype", "'int8'", "bfloat16"]),
        (["--output", "/dev/null/profile.json"], ["output: got /dev/null/profile.json"]),
        (["--implementation", "concat_timm", "--memory", "compact"], ["'compact'", "concat_timm"]),
    ],
)
def test_what_cannot_be_profiled_is_named(flags: list[str], words: list[str]) -> None:
    found = CliRunner().invoke(APP, [*TINY, *flags])
    assert found.exit_code == 2
    assert all(word in found.output for word in words)


def test_a_file_that_another_benchmark_wrote_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "recipe.json"
    output.write_text(content := json.dumps({"rows": [{"impl": "vpt_fast", "exact": True}]}))
    found = CliRunner().invoke(APP, [*TINY, "--output", str(output)])
    assert found.exit_code == 2 and "want a report of this benchmark" in " ".join(found.output.split())
    assert output.read_text() == content
