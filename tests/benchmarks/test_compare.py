"""What benchmarks/compare.py makes of two results files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compare
import pytest
import recipe
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]

app = compare.typer.Typer()
app.command()(compare.main)


def throughput(impl: str, speed: float | None, spread: float = 0.02, **fields: Any) -> dict[str, Any]:
    """A row of throughput.py, with repetitions from `spread` below to `spread` above the median."""
    ends = (None, None) if speed is None else (speed * (1 - spread), speed * (1 + spread))
    row = {"model": "vit_base_patch16_224", "num_prompts": 100, "batch_size": 64, "impl": impl, "exact": True}
    row |= {"images_per_second": speed, "images_per_second_min": ends[0], "images_per_second_max": ends[1]}
    return row | {"forward_ms": 1.0, "error": None} | fields


def report(*rows: dict[str, Any], **header: Any) -> dict[str, Any]:
    return {"device": "H100", "torch": "2.14", "date": "2026-11-23", "rows": list(rows)} | header


def only_change(old: dict[str, Any], new: dict[str, Any]) -> compare.Change:
    (found,) = compare.compare(old, new).changes
    return found


@pytest.mark.parametrize(
    "speed, spread, verdict",
    [
        (130.0, 0.02, "faster"),
        (80.0, 0.02, "slower"),
        (97.0, 0.02, "within noise"),
        (80.0, 0.30, "within noise"),
    ],
)
def test_a_change_counts_where_the_ranges_do_not_overlap(speed: float, spread: float, verdict: str) -> None:
    old, new = report(throughput("vpt_fast", 100.0)), report(throughput("vpt_fast", speed, spread))
    found = only_change(old, new)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(speed / 100)
    assert found.metric == "images_per_second"


def test_times_are_better_when_lower_and_without_a_range_say_so() -> None:
    row = {"num_tokens": 197, "num_heads": 12, "head_dim": 64, "impl": "vpt_fast", "exact": True}
    old = report(row | {"forward_ms": 2.0, "backward_ms": 5.0, "error": None}, dtype="bfloat16")
    new = report(row | {"forward_ms": 1.0, "backward_ms": 10.0, "error": None}, dtype="bfloat16")
    forward, backward = compare.compare(old, new).changes
    assert (forward.metric, forward.ratio, forward.verdict) == ("forward_ms", 2.0, "faster?")
    assert (backward.metric, backward.ratio, backward.verdict) == ("backward_ms", 0.5, "slower?")


def recipe_report(train_ms: float, images_per_second: float, workers: int = 2) -> dict[str, Any]:
    """As recipe.py writes it."""
    measured = recipe.Measured.of([1e-3 * train_ms * x for x in (0.99, 1.0, 1.01)], [1e-3, 1.1e-3])
    extrapolated = recipe.Extrapolated.of(measured, recipe.Protocol(), 64)
    rows = [
        recipe.Row("vpt_fast", True, 1e-6, None, measured, extrapolated),
        recipe.Row("concat_large", False, None, "OutOfMemoryError: 80 GiB"),
    ]
    speeds = (images_per_second, 0.99 * images_per_second, 1.01 * images_per_second, 500.0, 0.1)
    ways = [
        recipe.Loading("vpt_fast", pixels, number, 128, *speeds)
        for pixels, number in (("resident", 0), ("decoded", workers))
    ]
    setting = {"model": "vit_base_patch16_224", "num_prompts": 50, "batch_size": 64, "dtype": "bfloat16"}
    ends = {"end_to_end": [asdict(way) for way in ways], "decode_seconds": 1.0}
    return {**report(*map(asdict, rows)), **setting, **ends}


def test_a_whole_task_s_steps_and_its_loading_are_compared() -> None:
    found = compare.compare(recipe_report(20.0, 400.0), recipe_report(10.0, 404.0))
    assert [(change.metric, change.verdict) for change in found.changes] == [
        ("train_ms", "faster"),
        ("inference_ms", "within noise"),
        ("images_per_second", "within noise"),
        ("images_per_second", "within noise"),
    ]
    assert found.changes[0].ratio == pytest.approx(2)
    assert dict(found.changes[0].key)["model"] == "vit_base_patch16_224"
    assert [dict(change.key).get("pixels") for change in found.changes] == [None, None, "resident", "decoded"]
    assert not (found.broken or found.mended or found.only_old or found.only_new)


def test_loading_with_another_number_of_workers_is_another_row() -> None:
    found = compare.compare(recipe_report(20.0, 400.0), recipe_report(20.0, 400.0, workers=8))
    assert [dict(key)["workers"] for key in (*found.only_old, *found.only_new)] == [2, 8]


def test_rows_of_one_file_are_listed() -> None:
    old = report(throughput("vpt_fast", 1.0), throughput("concat_timm", 1.0))
    new = report(throughput("vpt_fast", 1.0), throughput("vpt_fast", 1.0, memory="compact"))
    found = compare.compare(old, new)
    assert [dict(key)["impl"] for key in found.only_old] == ["concat_timm"]
    assert [dict(key)["memory"] for key in found.only_new] == ["compact"]


@pytest.mark.parametrize(
    "fields", [{"exact": False}, {"error": "OutOfMemoryError: 80 GiB", "images_per_second": None}]
)
def test_a_row_that_is_wrong_or_failed_is_not_compared(fields: dict[str, Any]) -> None:
    good, bad = report(throughput("vpt_fast", 1.0)), report(throughput("vpt_fast", 2.0, **fields))
    broken, mended = compare.compare(good, bad), compare.compare(bad, good)
    assert not broken.changes and len(broken.broken) == 1
    assert not mended.changes and len(mended.mended) == 1


def test_two_rows_of_one_setting_are_an_error() -> None:
    with pytest.raises(ValueError, match="two rows of .*vpt_fast"):
        compare.keyed_rows(report(throughput("vpt_fast", 1.0), throughput("vpt_fast", 2.0)))


ROWS = {
    "profile": [{"name": name, "kind": "products", "calls": 12.0, "ms": 1.5} for name in ("gemm", "fused")],
    "tune": [
        {"kernel": "forward", "shape": "N 197", "launch": {"BLOCK_M": m}, "exact": True, "ms": 1.5}
        for m in (64, 128)
    ],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_kernels_of_a_profile_and_launches_of_tune_are_told_apart(rows: list[dict[str, Any]]) -> None:
    slower = [{**rows[0], "ms": 3.0}, rows[1]]
    first, second = compare.compare(report(*rows), report(*slower)).changes
    assert (first.ratio, second.ratio) == (0.5, 1.0)


# But those of the suite of tests, which have no rows to match.
COMMITTED = [
    path
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if "rows" in json.loads(path.read_text())
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_file_differs_from_itself_in_nothing(path: Path) -> None:
    read = compare.read_report(path)
    found = compare.compare(read, read)
    assert found.changes and not any(one.beyond_noise for one in found.changes)


def run(tmp_path: Path, old: Any, new: Any, *arguments: str) -> Any:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(content))
    return CliRunner().invoke(app, [*map(str, paths), *arguments])


@pytest.mark.parametrize("fail_below, status", [("0.95", 1), ("0.7", 0), (None, 0)])
def test_fail_below_is_about_rows_slower_than_that_beyond_noise(
    tmp_path: Path, fail_below: str | None, status: int
) -> None:
    old = report(throughput("vpt_fast", 100.0), throughput("concat_timm", 100.0))
    new = report(throughput("vpt_fast", 80.0), throughput("concat_timm", 60.0, spread=0.9))
    result = run(tmp_path, old, new, *(["--fail-below", fail_below] if fail_below else []))
    assert result.exit_code == status, result.output
    assert "0 faster, 1 slower, 1 within noise" in result.output


def test_fail_below_is_about_rows_that_went_wrong_too(tmp_path: Path) -> None:
    old, new = report(throughput("vpt_fast", 1.0)), report(throughput("vpt_fast", 2.0, exact=False))
    assert run(tmp_path, old, new, "--fail-below", "0.95").exit_code == 1


def test_other_devices_are_compared_on_request_only(tmp_path: Path) -> None:
    old, new = report(throughput("vpt_fast", 1.0)), report(throughput("vpt_fast", 2.0), device="A100")
    refused = run(tmp_path, old, new)
    assert refused.exit_code == 2 and "'H100' and 'A100'" in refused.output
    assert run(tmp_path, old, new, "--across-devices").exit_code == 0


def test_files_without_a_row_in_common_are_refused(tmp_path: Path) -> None:
    old, new = report(throughput("vpt_fast", 1.0)), report(throughput("concat_timm", 1.0))
    result = run(tmp_path, old, new, "--fail-below", "0.95")
    assert result.exit_code == 2 and "no row in common" in result.output


@pytest.mark.parametrize(
    "content", [[], {"device": "H100"}, {"rows": []}], ids=["list", "no_rows", "no_device"]
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: Any) -> None:
    result = run(tmp_path, report(throughput("vpt_fast", 1.0)), content)
    assert result.exit_code == 2
    assert "new.json" in result.output
