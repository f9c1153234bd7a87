"""What benchmarks/recipe.py counts, measures and writes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import implementations
import pytest
import recipe
import reports
import torch
import typer
from PIL import Image
from recipe import Extrapolated, Measured, Protocol
from rich.console import Console
from typer.testing import CliRunner

SETTING = implementations.Setting("test_vit", 3, 2, "deep", "float32", image_size=32)
CPU = torch.device("cpu")
APP = typer.Typer()
APP.command()(recipe.main)


def test_the_protocol_is_forty_points_on_800_images_and_five_runs_on_1000() -> None:
    protocol = Protocol(test=711)
    assert protocol.sweep_batches(64) == (40 * 100 * 13, 40 * 100 * 4)
    assert protocol.run_batches(64) == (5 * 100 * 16, 5 * 100 * 4 + 5 * 12)


def test_a_task_is_extrapolated_from_the_medians() -> None:
    measured = Measured.of([0.1, 0.2, 0.9], [0.01, 0.05, 0.02])
    assert (measured.train_steps, measured.train_ms, measured.train_ms_max) == (3, 200.0, 900.0)
    found = Extrapolated.of(measured, Protocol(), 100)
    assert found.sweep_seconds == pytest.approx(4000 * (8 * 0.2 + 2 * 0.02))
    assert found.runs_seconds == pytest.approx(500 * (10 * 0.2 + 2 * 0.02) + 5 * 100 * 0.02)
    assert found.task_seconds == found.sweep_seconds + found.runs_seconds


def contenders(*names: str) -> tuple[list[recipe.Contender], tuple[torch.Tensor, torch.Tensor]]:
    start = implementations.make_start(SETTING, CPU)
    made = [implementations.IMPLEMENTATIONS[name](name, start) for name in names]
    return made, implementations.random_batch(start, SETTING.batch_size, CPU)


def test_training_and_inference_are_timed_in_every_round() -> None:
    (contender,), batch = contenders("concat_timm")
    modes: list[bool] = []
    contender.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    found = recipe.time_batches([contender], *batch, repeats=3, steps=2)["concat_timm"]
    assert (found.train_steps, found.inference_batches) == (6, 6)
    assert modes == [True, False, *3 * [True, True, False, False]]


def test_one_that_fails_is_a_row_with_its_reason_and_no_ratio() -> None:
    (bad, good), batch = contenders("vpt_fast", "concat_timm")

    def run(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("80 GiB wanted")

    bad.run = run
    for contender in (bad, good):
        contender.gradient_error = 0.0
    measured = recipe.time_batches([bad, good], *batch, repeats=1, steps=1)
    first, second = recipe.make_rows([bad, good], measured, Protocol(), SETTING)
    assert "80 GiB wanted" in first.error and first.measured is None and first.ratio is None
    assert second.ratio == 1.0
    first.error = "no [/lib] of [red]"
    console = Console(file=io.StringIO(), width=200)
    console.print(*recipe.make_tables([first, second], [], SETTING))
    assert "no [/lib] of [red]" in console.file.getvalue()


def test_one_with_wrong_gradients_is_nobodys_peer() -> None:
    those, batch = contenders("vpt_fast", "concat_timm")
    for contender, error in zip(those, (0.0, 0.01), strict=True):
        contender.gradient_error = error
    measured = recipe.time_batches(those, *batch, repeats=1, steps=1)
    right, wrong = recipe.make_rows(those, measured, Protocol(), SETTING)
    assert (right.exact, wrong.exact) == (True, False)
    assert right.ratio is None and wrong.ratio is None


def test_gradients_that_are_no_numbers_are_wrong_and_leave_the_file_json() -> None:
    (broken,), batch = contenders("vpt_fast")
    broken.gradient_error = float("inf")
    measured = recipe.time_batches([broken], *batch, repeats=1, steps=1)
    rows = recipe.make_rows([broken], measured, Protocol(), SETTING)
    assert json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)
    (table,) = recipe.make_tables(rows, [], SETTING)
    assert list(table.columns[-1].cells)[0].strip() == "WRONG"


def test_the_images_are_jpeg_files(tmp_path: Path) -> None:
    images = recipe.write_images(tmp_path, 2)
    for path in images.items:
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (400, 300))
    assert images.labels == (0, 1)


def test_more_images_than_there_are_files_are_the_same_files_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "MOST_FILES", 2)
    images = recipe.write_images(tmp_path, 5)
    names = [path.name for path in images.items]
    assert names == [*["00000.jpg", "00001.jpg"] * 2, "00000.jpg"] and len(list(tmp_path.iterdir())) == 2
    assert images.labels == (0, 1, 2, 3, 4)


def test_the_command_says_what_was_measured_and_what_extrapolated(tmp_path: Path) -> None:
    output = tmp_path / "recipe.json"
    flags = (
        "--model test_vit --image-size 32 --num-prompts 3 --batch-size 2 --repeats 1 --device cpu --workers 1"
    )
    names = "vpt_fast,concat_timm"
    result = CliRunner().invoke(APP, [*flags.split(), "--implementations", names, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "extrapolated from 2 measured steps" in result.output
    report = reports.read_own(output, recipe.Row)  # as the next run reads it, which goes on with it
    assert [row["impl"] for row in report["rows"]] == names.split(",")
    for row in report["rows"]:
        assert row["exact"] and row["measured"]["train_steps"] == 1
        assert row["extrapolated"]["task_seconds"] > row["extrapolated"]["sweep_seconds"] > 0
    assert report["protocol"]["points"] == 40
    ways = [(way["impl"], way["pixels"], way["workers"]) for way in report["end_to_end"]]
    assert ways == [(name, *way) for name in names.split(",") for way in (("resident", 0), ("decoded", 1))]
    for way in report["end_to_end"]:
        assert way["share_lost"] == pytest.approx(1 - way["images_per_second"] / way["without_loading"])


def test_command_fails_and_measures_no_loading_where_gradients_of_vpt_fast_are_wrong(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(implementations.EXACT_BELOW, "float32", 0.0)  # nothing is that exact
    given = []
    monkeypatch.setattr(
        recipe, "measure_loading", lambda those, *_, **options: given.extend(those) or ([], 0.0)
    )
    flags = "--model test_vit --image-size 32 --batch-size 2 --repeats 1 --device cpu --workers 1"
    flags = [*flags.split(), "--implementations", "vpt_fast", "--output", str(tmp_path / "recipe.json")]
    result = CliRunner().invoke(APP, flags)
    assert result.exit_code == 1 and "vpt_fast failed, or is wrong" in result.output and given == []


def test_what_an_interrupted_command_has_left_is_measured_alone(tmp_path: Path, monkeypatch) -> None:
    output, measured = tmp_path / "recipe.json", []
    run, load = recipe.time_batches, recipe.measure_loading
    monkeypatch.setattr(recipe, "time_batches", lambda *a, **k: measured.append("steps") or run(*a, **k))

    def interrupted(*arguments, **options):
        measured.append("loading")
        if measured.count("loading") == 1:
            raise KeyboardInterrupt
        return load(*arguments, **options)

    monkeypatch.setattr(recipe, "measure_loading", interrupted)
    flags = "--model test_vit --image-size 32 --batch-size 2 --repeats 1 --device cpu --workers 1"
    flags = [*flags.split(), "--implementations", "vpt_fast", "--output", str(output)]
    codes = [CliRunner().invoke(APP, flags).exit_code for _ in range(3)]
    assert codes == [130, 0, 0] and measured == ["steps", "loading", "loading"]
    result = CliRunner().invoke(APP, [*flags, "--repeats", "2"])
    assert result.exit_code == 2 and "--fresh to replace" in " ".join(result.output.split())


def test_a_setting_s_slug_has_all_of_it() -> None:
    setting = implementations.Setting("vit_base_patch16_224", 50, 64, "deep", "bfloat16", image_size=384)
    assert setting.slug == "vit_base_patch16_224-50-deep-prompts-batch-64-bfloat16-384-pixels"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--model", "vit_base_patch16_225"], "vit_base_patch16_225"),
        (["--implementations", "magic"], "implementations: got 'magic'"),
        (
            ["--model", "test_vit", "--implementations", "vpt_fast_flash_attn_4"],
            "implementations: got vpt_fast_flash_attn_4: attention='flash_attn_4'",
        ),
        (["--model", "vit_tiny_patch16_224,vit_base_patch16_224"], "model: got 'vit_tiny_patch16_224,vit"),
        (["--dtype", "float32,bfloat16"], "dtype: got 'float32,bfloat16'"),
        (["--prompt-type", "deep,shallow"], "prompt-type: got 'deep,shallow'"),
        (["--output", "/dev/null/report.json"], "output: got /dev/null/report.json, want a file that"),
        (["--device", "foo"], "device: got 'foo'"),
        (["--device", "cuda:1"], "device: got 'cuda:1'"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(APP, ["--device", "cpu", *arguments])  # of a flag given twice the last counts
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_a_file_that_another_benchmark_wrote_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    output.write_text(content := json.dumps({"rows": [{"name": "gemm", "kind": "products"}]}))
    result = CliRunner().invoke(APP, ["--model", "test_vit", "--device", "cpu", "--output", str(output)])
    assert result.exit_code == 2 and "want a report of this benchmark" in " ".join(result.output.split())
    assert output.read_text() == content
