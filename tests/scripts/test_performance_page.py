"""The docs' numbers are those of the committed results files, and what is made of a results file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import measurements
import page_text
import performance_page as page
import pytest

ROOT = Path(__file__).parents[2]


def test_the_committed_documents_match_the_committed_results() -> None:
    found = page.differences(ROOT)
    assert not found, "run scripts/performance_page.py:\n" + "\n".join(found)


class Project:
    """The documents with their markers, and results of the test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / measurements.RESULTS).mkdir(parents=True)
        (root / "docs").mkdir()
        blocks = (f"<!-- {name} -->\nold\n<!-- {name} -->\n" for name in ("headline", "performance"))
        (root / page.README).write_text(f"before\n{''.join(blocks)}after\n")
        (root / page.ENGINE).write_text("<!-- memory policies -->\n<!-- memory policies -->\n")

    def add(self, name: str, rows: list[dict[str, Any]] | None = None, **fields: Any) -> None:
        header = {"device": "NVIDIA H100", "torch": "2.14", "triton": "3.8", "timm": "1.0", "cuda": "13.0"}
        report = {**header, "dtype": "bfloat16", "date": "2026-11-23", **fields}
        if rows is not None:
            report["rows"] = rows
        (self.root / measurements.RESULTS / f"{name}.json").write_text(json.dumps(report))

    def text(self, path: Path = page.PAGE) -> str:
        return page.pages(self.root)[path]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def row(impl: str, speed: float | None, **fields: Any) -> dict[str, Any]:
    """As throughput.py wrote it when it wrote least."""
    start = {"model": "vit_base_patch16_224", "prompt_type": "deep", "num_prompts": 100, "batch_size": 64}
    start |= {
        "image_size": 224,
        "dtype": "bfloat16",
        "impl": impl,
        "memory": None,
        "exact": True,
        "error": None,
    }
    ends = {"images_per_second_min": None, "images_per_second_max": None, "gradient_error": 1e-2}
    return start | {"images_per_second": speed, "kept_mib_per_image": 30.0, "repeats": 5} | ends | fields


HUGE = {"model": "vit_huge_patch14_224"}


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_speed_is_relative_to_the_best_concatenation_that_is_right(project: Project) -> None:
    wrong = row("concat_timm_compiled", 900.0, exact=False)
    project.add(
        "h100", [row("vpt_fast", 300.0), row("concat_timm", 200.0), row("concat_reference", 100.0), wrong]
    )
    text = project.text()
    assert "| 1.50 |" in line_of(text, "`vpt_fast`")
    assert "| 0.50 |" in line_of(text, "`concat_reference`")
    assert "wrong gradients" in line_of(text, "`concat_timm_compiled`")
    assert "Slower than" not in text
    assert "compiled" not in project.text(page.README)


@pytest.mark.parametrize("peer", ["concat_timm_compiled_graphed", "concat_timm_checkpointed"])
def test_any_peer_by_concatenation_may_be_the_best(project: Project, peer: str) -> None:
    project.add("h100", [row("vpt_fast", 300.0), row("concat_timm_compiled", 100.0), row(peer, 200.0)])
    assert "| 1.50 |" in line_of(project.text(), "`vpt_fast`")
    assert "| 1.00 |" in line_of(project.text(page.README), page.IN_WORDS[peer])


@pytest.mark.parametrize("path", [page.PAGE, page.README])
@pytest.mark.parametrize(("peer", "said"), [("concat_timm", True), ("concat_timm_compiled_graphed", False)])
def test_where_no_concatenation_was_graphed_it_is_said(
    project: Project, peer: str, said: bool, path: Path
) -> None:
    project.add("h100", [row("vpt_fast_graphed", 300.0), row(peer, 100.0)])
    assert (page.UNGRAPHED in " ".join(project.text(path).split())) == said


@pytest.mark.parametrize(
    ("rows", "asked"),
    [
        ([("vpt_fast", None), ("concat_timm", None)], "--implementations vpt_fast,concat_timm"),
        ([("concat_timm", None), ("vpt_fast", "exact")], "--implementations concat_timm,vpt_fast"),
        (
            [("vpt_fast", "exact"), ("vpt_fast", "recompute"), ("concat_timm", None)],
            "--implementations vpt_fast,concat_timm --memory exact,recompute",
        ),
        ([("vpt_fast", "exact"), ("vpt_fast", "recompute"), ("vpt_fast_graphed", "exact")], ""),
    ],
    ids=["without a policy", "exact", "policies", "by default"],
)
def test_the_command_measures_the_rows_of_its_table(
    project: Project, rows: list[tuple[str, str | None]], asked: str
) -> None:
    project.add("h100", [row(impl, 300.0, memory=memory) for impl, memory in rows])
    setting = "--prompt-type deep --num-prompts 100 --batch-size 64 --dtype bfloat16"
    command = f"python benchmarks/throughput.py --models vit_base_patch16_224 {setting} {asked}".strip()
    assert f"`{command}`" in project.text()


def test_the_command_has_the_run_s_dtype_size_rounds_and_search(project: Project) -> None:
    searched = row("concat_reference", 100.0, dtype="float32", largest_batch=96)
    project.add("h100", [searched], image_size=384, repeats=3, steps=4)
    asked = "--dtype bfloat16 --image-size 384 --implementations concat_reference --repeats 3 --steps 4"
    assert f"{asked} --find-batch`" in project.text()


def test_products_of_the_model_s_shapes_stand_beside_the_ceiling(project: Project) -> None:
    project.add("h100", [row("vpt_fast", 300.0)], ceiling_tflops=800.0)
    assert "one large matrix product, 800 TFLOP/s\n" in project.text()
    project.add("h100", [row("vpt_fast", 300.0, shapes_tflops=700.0)], ceiling_tflops=800.0)
    assert "800 TFLOP/s (products of the model's own shapes: 700)\n" in project.text()


def test_the_command_of_kernels_measures_the_rows_of_its_table(project: Project) -> None:
    shapes = [dict(num_tokens=197, width=768), dict(num_tokens=257, width=1280)]
    rows = [
        kernel_row(op="rotate", batch_size=8, impl=impl, **shape)
        for shape in shapes
        for impl in ("triton", "torch")
    ]
    project.add("kernels-h100", rows, repeats=3)
    flags = "--shapes 197x768,257x1280 --batch-size 8 --implementations triton,torch --dtype bfloat16"
    assert f"`python benchmarks/kernels.py {flags} --repeats 3`" in " ".join(project.text().split())


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [
        ([(197, 12, 64), (197, 12, 80)], "--num-tokens 197 --num-heads 12 --head-dim 64,80 "),
        ([(197, 12, 64), (257, 16, 80)], ""),
    ],
    ids=["a product", "the models'"],
)
def test_the_command_of_attention_measures_the_rows_of_its_table(
    project: Project, sizes: list[tuple[int, int, int]], flags: str
) -> None:
    names = ("num_tokens", "num_heads", "head_dim")
    rows = [
        kernel_row(**dict(zip(names, size, strict=True)), num_prompts=m, batch_size=8)
        for size in sizes
        for m in (50, 100)
    ]
    project.add("attention-h100", rows, repeats=3)
    flags += "--num-prompts 50,100 --batch-size 8 --implementations triton --dtype bfloat16 --repeats 3"
    assert f"`python benchmarks/attention.py {flags}`" in " ".join(project.text().split())


def test_the_command_of_a_whole_task_has_its_setting_and_rounds(project: Project) -> None:
    project.add(
        "recipe-h100",
        **recipe(protocol=dict.fromkeys(PROTOCOL, 99)),
        repeats=3,
        steps=4,
        epoch_steps=64,
        workers=2,
    )
    flags = "--batch-size 64 --prompt-type deep --dtype bfloat16 --test-images 99 --implementations vpt_fast"
    command = f"{flags} --repeats 3 --steps 4 --epoch-steps 64 --workers 2`"
    assert command in " ".join(project.text().split())


def test_what_lost_is_said(project: Project) -> None:
    project.add(
        "h100",
        [row("vpt_fast", 300.0), row("vpt_fast", 150.0, memory="recompute"), row("concat_timm", 200.0)],
    )
    assert "Slower than the best concatenation: `vpt_fast`, memory recompute (0.75)." in project.text()


def test_the_page_begins_with_the_slowest_and_fastest_row_of_each_setting(project: Project) -> None:
    ours = [row("vpt_fast", 150.0, memory="recompute"), row("vpt_fast", 300.0, kept_mib_per_image=15.0)]
    project.add("h100", [*ours, row("vpt_fast_torch", 900.0, exact=False), row("concat_timm", 200.0)])
    before, _, _ = project.text().partition("## How it was measured")
    setting = "| NVIDIA H100 | ViT-B/16 with 100 deep prompts, batch 64, bfloat16 |"
    assert f"{setting} 0.75 to 1.50 | `vpt_fast` | 0.50 |" in before


def test_the_summary_says_where_only_our_steps_were_graphed(project: Project) -> None:
    project.add("h100", [row("vpt_fast_graphed", 300.0), row("concat_timm", 200.0)])
    before, _, _ = project.text().partition("## How it was measured")
    assert "| 1.50 † |" in before and f"† {page.UNGRAPHED}" in before


def test_the_page_has_no_summary_of_rows_that_cannot_be_compared(project: Project) -> None:
    project.add("h100", [row("vpt_fast", 300.0), row("concat_timm", 200.0, exact=False)])
    assert "the fastest way to concatenate" not in project.text()


def test_of_a_setting_measured_twice_on_a_device_the_newest_counts(project: Project) -> None:
    project.add("old", [row("vpt_fast", 111.0), row("concat_timm", 50.0)], date="2026-11-22")
    project.add("new", [row("vpt_fast", 222.0), row("concat_timm", 50.0)])
    project.add(
        "other", [row("vpt_fast", 333.0), row("concat_timm", 50.0)], device="NVIDIA A100", date="2026-11-01"
    )
    text = project.text()
    assert "222" in text and "333" in text and "111" not in text


@pytest.mark.parametrize("names", [("batches", "vit_base"), ("vit_base", "batches")])
def test_of_a_setting_measured_twice_in_a_day_the_table_with_more_rows_counts(
    project: Project, names: tuple[str, str]
) -> None:
    project.add(names[0], [row("vpt_fast", 111.0)])
    project.add(names[1], [row("vpt_fast", 222.0), row("concat_timm", 50.0)])
    assert "222" in project.text() and "111" not in project.text()


def test_the_largest_batches_stand_beside_a_table_with_more_rows(project: Project) -> None:
    project.add("find-batch", [row("vpt_fast", 111.0, largest_batch=96)])
    project.add("vit_base", [row("vpt_fast", 222.0), row("concat_timm", 50.0)])
    searched = project.text().partition("The largest batches")[2]
    assert line_of(searched, "`vpt_fast`") == "| `vpt_fast` | 96 |"


def test_the_readme_shows_a_gpu_where_there_is_one_and_else_says_that_there_is_none(project: Project) -> None:
    project.add(
        "cpu", [row("vpt_fast", 1.5), row("concat_timm", 1.0)], device="EPYC", cuda=None, date="2026-12-01"
    )
    assert "on EPYC" in project.text(page.README)
    assert "no GPU results are committed yet" in " ".join(project.text(page.README).split())
    assert "No GPU results are committed yet" in project.text()
    project.add("h100", [row("vpt_fast", 300.0), row("concat_timm", 200.0)])
    assert "on NVIDIA H100" in project.text(page.README)
    assert "GPU results are committed yet" not in project.text(page.README) + project.text()


@pytest.mark.parametrize("key, values", [("batch_size", (128, 64, 32)), ("num_prompts", (200, 100, 50))])
def test_the_readme_shows_the_setting_that_is_measured_where_nothing_else_is_asked_for(
    project: Project, key: str, values: tuple[int, ...]
) -> None:
    for name, value, speed in zip("abc", values, (500.0, 300.0, 400.0), strict=True):
        project.add(name, [row(impl, speed, **{key: value}) for impl in ("vpt_fast", "concat_timm")])
    assert "| vpt_fast | 300 |" in project.text(page.README)


def test_columns_in_which_nothing_stands_are_left_out(project: Project) -> None:
    project.add("h100", [row("vpt_fast", 300.0)])
    assert "of the ceiling" not in project.text()
    project.add("h100", [row("vpt_fast", 300.0, share_of_ceiling=0.625, peak_mib=10240.4)])
    assert "| 10,240 |" in project.text() and "| 62 % |" in project.text()


@pytest.mark.parametrize(
    "value, text",
    [(None, ""), (0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.0012345, "0.00123"), (1.5e-6, "1.50e-06")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert page_text.number(value) == text


def test_a_row_that_failed_has_its_reason(project: Project) -> None:
    project.add("h100", [row("concat_timm", None, gradient_error=None, error="OutOfMemoryError: 80 GiB")])
    assert "OutOfMemoryError: 80 GiB" in line_of(project.text(), "`concat_timm`")


def test_the_readme_shows_the_fastest_and_the_leanest_way_and_other_models_of_the_device(
    project: Project,
) -> None:
    def rows(**of: Any) -> list[dict[str, Any]]:
        return [
            row("vpt_fast", 300.0, memory="exact", peak_mib=400.0, **of),
            row("vpt_fast_graphed", 500.0, memory="exact", peak_mib=450.0, **of),
            row("vpt_fast_graphed", 320.0, memory="compact", peak_mib=300.0, **of),
            row("vpt_fast_graphed", 310.0, memory="recompute", peak_mib=200.0, **of),
            row("concat_timm", 200.0, peak_mib=800.0, **of),
        ]

    project.add("base", rows())
    project.add("huge", rows(**HUGE))
    project.add("elsewhere", rows(model="vit_large_patch16_224"), device="NVIDIA A100")
    project.add("larger-batch", rows(model="vit_large_patch16_224", batch_size=128))
    base, _, huge = project.text(page.README).partition("\n\nViT-H/14")
    fastest = "| vpt_fast in a CUDA graph | 500 | 2.50 |"
    leanest = '| vpt_fast in a CUDA graph, `memory="recompute"` | 310 | 1.55 |'
    for text in (base, huge):
        assert fastest in text and leanest in text and "compact" not in text
        assert "| timm blocks on the concatenated sequence | 200 | 1.00 |" in text
    assert "| vpt_fast | 300 |" in base and "| vpt_fast | 300 |" not in huge
    assert "ViT-L/16" not in base + huge


def headline(project: Project) -> str:
    return " ".join(project.text(page.README).split("<!-- headline -->")[1].split())


def test_the_headline_has_the_best_speed_and_the_least_memory_of_every_model(project: Project) -> None:
    ours = [row("vpt_fast", 300.0, peak_mib=400.0), row("vpt_fast", 210.0, memory="recompute", peak_mib=88.0)]
    project.add(
        "base", [*ours, row("vpt_fast", 900.0, exact=False), row("concat_timm", 200.0, peak_mib=800.0)]
    )
    project.add("huge", [row("vpt_fast", 25.0, peak_mib=300.0, **HUGE), row("concat_timm", 20.0, **HUGE)])
    assert headline(project) == (
        "On NVIDIA H100, a training step of ViT-B/16 with 100 deep prompts, batch 64, bfloat16, is up to "
        "1.50 times as fast as the best concatenation that was measured with it, or takes 0.11 of its "
        "memory; of ViT-H/14, up to 1.25 times as fast ([all rows](#what-it-saves))."
    )


def test_the_headline_says_if_concatenation_was_not_graphed(project: Project) -> None:
    project.add("h100", [row("vpt_fast_graphed", 300.0), row("concat_timm", 200.0)])
    assert headline(project).endswith(page.UNGRAPHED)


def test_the_readme_names_the_models_whose_concatenation_alone_was_not_graphed(project: Project) -> None:
    ours = row("vpt_fast_graphed", 300.0)
    project.add("base", [ours, row("concat_timm_compiled_graphed", 200.0)])
    project.add("huge", [ours | HUGE, row("concat_timm", 200.0) | HUGE])
    said = "Concatenation of ViT-H/14 was not run in a CUDA graph in this measurement."
    assert headline(project).endswith(said)
    readme = " ".join(project.text(page.README).split())
    assert readme.count(said) == 2 and page.UNGRAPHED not in readme


@pytest.mark.parametrize(("graphed", "waits"), [(500.0, True), (310.0, False)])
def test_the_readme_says_where_the_host_is_the_limit(project: Project, graphed: float, waits: bool) -> None:
    project.add("h100", [row("vpt_fast", 300.0), row("vpt_fast_graphed", graphed), row("concat_timm", 200.0)])
    assert ("waits for the CPU" in " ".join(project.text(page.README).split())) == waits


def test_the_readme_says_how_fast_it_is_beside_a_backbone_without_prompts(project: Project) -> None:
    project.add("h100", [row("vpt_fast", 300.0), row("concat_timm", 200.0), row("no_prompts", 400.0)])
    text = " ".join(project.text(page.README).split())
    assert "vpt_fast runs at 0.75 times the speed of timm's blocks without prompts." in text


def test_a_library_that_is_not_installed_is_said_once(project: Project) -> None:
    missing = kernel_row(impl="flash_attn", exact=False, error="no module")
    out_of_memory = kernel_row(impl="sdpa_flash", exact=False, error="out of memory")
    fine = kernel_row(impl="sdpa_flash", forward_ms=1.5)
    project.add("attention-h100", [missing, out_of_memory, missing, fine])
    text = project.text()
    assert text.count("flash_attn") == 1 and "Not measured: `flash_attn`: no module." in text
    assert text.count("| `sdpa_flash` |") == 2 and "out of memory" in text


@pytest.mark.parametrize(("library", "said"), [("sdpa_flash", True), ("sdpa_cudnn", False)])
def test_a_library_that_ran_in_deterministic_mode_is_named(
    project: Project, library: str, said: bool
) -> None:
    project.add("attention-h100", [kernel_row(impl=library, backward_ms=1.5)])
    assert (
        f"backward pass of `{library}` was timed in deterministic mode" in " ".join(project.text().split())
    ) == said


def test_engine_has_the_memory_policies_of_one_run(project: Project) -> None:
    policies = [
        row("vpt_fast", 300.0, memory=name, kept_mib_per_image=kept)
        for name, kept in (("exact", 32.1), ("compact", 11.9))
    ]
    project.add("h100", [*policies, row("concat_timm", 200.0)])
    text = project.text(page.ENGINE)
    assert "| 32.1 |" in line_of(text, '`"exact"`')
    assert "| 11.9 |" in line_of(text, '`"compact"`')


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_that_a_cpu_emulates_bfloat16_is_said(project: Project, dtype: str, said: bool) -> None:
    project.add("cpu", [row("vpt_fast", 0.1)], device="AMD EPYC, 2 threads", cuda=None, dtype=dtype)
    assert ("emulates bfloat16" in " ".join(project.text().split())) == said


def kernel_row(**fields: Any) -> dict[str, Any]:
    """Of attention, or of another operation."""
    sizes = {"batch_size": 64, "num_tokens": 197, "num_prompts": 100, "num_heads": 12, "head_dim": 64}
    return sizes | {"width": 768, "impl": "triton", "exact": True, "error": None} | fields


def test_attention_has_a_section(project: Project) -> None:
    project.add("attention-h100", [kernel_row(forward_ms=0.1234, forward_ratio=0.9)])
    text = project.text()
    assert "0.123" in text and "slower than the best library in forward in 1 of 1 rows" in text


def test_other_kernels_have_a_section(project: Project) -> None:
    project.add("kernels-h100", [kernel_row(op="add_normalize", kind="layer_norm", ms=0.5, ratio=2.0)])
    text = project.text()
    assert "add_normalize" in text and "slower than the best other implementation in 0 of 1 rows" in text


PROTOCOL = ("points", "epochs", "sweep_train", "val", "runs", "run_train", "test")


def recipe(**fields: Any) -> dict[str, Any]:
    measured = {"train_steps": 50, "inference_batches": 40, "train_ms": 20.0, "inference_ms": 5.0}
    hours = {"sweep_seconds": 7200.0, "runs_seconds": 3600.0, "task_seconds": 10800.0}
    task = {"impl": "vpt_fast", "exact": True, "error": None, "measured": measured, "extrapolated": hours}
    own = {"rows": [task], "protocol": dict.fromkeys(PROTOCOL, 40), "end_to_end": []}
    setting = ("model", "num_prompts", "prompt_type", "batch_size", "dtype")
    return {name: row("", None)[name] for name in setting} | own | fields


def test_a_whole_task_has_a_section(project: Project) -> None:
    project.add("recipe-h100", **recipe())
    text = " ".join(project.text().split())
    assert "Extrapolated from 50 measured training steps" in text and "| 2.00 | 1.00 | 3.00 |" in text


def test_a_whole_task_is_shown_with_what_loading_costs(project: Project) -> None:
    way = {"impl": "vpt_fast", "pixels": "decoded", "workers": 8, "images_per_second": 900.0}
    project.add("recipe-h100", **recipe(end_to_end=[way | {"share_lost": 0.25}]))
    assert "| decoded, 8 workers | 900 | 25 % |" in project.text()


def test_the_suite_has_a_section(project: Project) -> None:
    failed = {"test_gemm_gpu": {"state": "failed", "seconds": 12.0}}
    project.add("gpu-suite-h100", parts=failed, suite=[*failed])
    text = project.text()
    assert "0 of 1 parts passed" in text and "| test_gemm_gpu | failed | 12 |" in text


def test_parts_of_the_suite_that_have_not_run_count(project: Project) -> None:
    passed = {"tests": {"state": "passed", "seconds": 12.0}}
    project.add("gpu-suite-h100", parts=passed, suite=["tests", "recipe"])
    text = project.text()
    assert "1 of 2 parts passed" in text and "| recipe | not run |  |" in text


def add_plot(project: Project, name: str) -> None:
    folder = project.root / "docs" / "performance"
    folder.mkdir(exist_ok=True)
    (folder / name).touch()


@pytest.mark.parametrize(
    "sweep, words",
    [
        (
            "deep-batch-64-by-prompts",
            "against the number of prompts: .* ViT-B/16, deep prompts, batch 64, on ",
        ),
        ("shallow-10-prompts-by-batch-size", "against the batch size: .* shallow prompts, 10 prompts, on "),
    ],
)
def test_plots_are_shown_with_words_that_say_what_they_show(project: Project, sweep: str, words: str) -> None:
    drawn = [row("vpt_fast", 300.0, memory="compact"), row("concat_timm", 200.0)]
    project.add("h100", [*drawn, row("concat_reference", 9.0, exact=False)])
    name = f"h100-vit_base_patch16_224-{sweep}.png"
    add_plot(project, name)
    found = re.search(rf"!\[(.*)\]\(performance/{name}\)", project.text())
    assert re.search(f"{words}NVIDIA H100; a line each for vpt_fast under compact, concat_timm$", found[1])


def test_a_plot_of_no_results_file_is_named(project: Project) -> None:
    project.add("h100", [row("vpt_fast", 300.0)])
    add_plot(project, "h200-vit_base_patch16_224-deep-batch-64-by-prompts.png")
    with pytest.raises(ValueError, match=r"h200-vit.*\.png: want a picture that benchmarks/plots.py drew"):
        project.text()


def test_check_shows_the_difference_and_changes_nothing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.add("h100", [row("vpt_fast", 300.0), row("concat_timm", 200.0)])
    before = (project.root / page.README).read_text()
    assert page.main(["--check"], project.root) == 1
    assert "-old" in capsys.readouterr().out
    assert (project.root / page.README).read_text() == before
    assert page.main([], project.root) == 0
    assert page.main(["--check"], project.root) == 0
    text = (project.root / page.README).read_text()
    assert text.startswith("before\n") and text.endswith("after\n")


def test_a_missing_marker_is_named(project: Project) -> None:
    (project.root / page.README).write_text("no markers\n")
    with pytest.raises(ValueError, match="README.md: got 0 of <!-- headline -->, want two"):
        page.pages(project.root)


def test_every_link_of_the_page_leads_to_a_file() -> None:
    for path in (page.PAGE, page.README, page.ENGINE):
        text = (ROOT / path).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / path.parent / target).exists(), f"{path}: {target}"


def profile(model: str, **fields: Any) -> dict[str, Any]:
    setting = {
        "model": model,
        "num_prompts": 100,
        "prompt_type": "deep",
        "batch_size": 64,
        "dtype": "bfloat16",
    }
    kernel = {"name": "nvjet_tst", "kind": "products", "calls": 12.0, "ms": 6.0}
    start = {"implementation": "vpt_fast", "memory": "exact"}
    times = {"step_ms": 8.0, "host_ms": 2.5, "kinds_ms": {"products": 6.0}}
    return setting | start | times | {"rows": [kernel]} | fields


def test_profiles_of_several_models_stand_side_by_side_and_of_one_the_newest(project: Project) -> None:
    project.add("profile-base-old", **profile("vit_base_patch16_224", step_ms=77.0), date="2026-11-22")
    project.add("profile-base", **profile("vit_base_patch16_224"))
    project.add("profile-large", **profile("vit_large_patch16_224"))
    text = project.text()
    assert text.count("### Where a step's time goes") == 2 and "77.0 ms" not in text
    assert line_of(text, "`nvjet_tst`") == "| `nvjet_tst` | products | 6.00 | 75 % | 12 |"
    assert line_of(text, "idle") == "| idle | 2.00 | 25 % |"
    assert "the CPU is busy for 2.50 ms per step" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("vit_base", {"rows": [row("vpt_fast", 300.0, num_prompts=1)]}),
        ("recipe-h100", recipe(num_prompts=1)),
        ("profile-h100", profile("vit_base_patch16_224", num_prompts=1)),
    ],
    ids=["throughput", "recipe", "profile"],
)
def test_one_prompt_is_in_the_singular(project: Project, name: str, report: dict[str, Any]) -> None:
    project.add(name, **report)
    assert "with 1 deep prompt, batch" in " ".join(project.text().split())


@pytest.mark.parametrize(
    ("name", "report", "in_its_table"),
    [
        ("h100", {"rows": [row("vpt_fast", 300.0)]}, "| 300"),
        ("attention-h100", {"rows": [kernel_row(forward_ms=1.5)]}, "| 1.50 |"),
        ("kernels-h100", {"rows": [kernel_row(op="rotate", ms=1.5)]}, "| 1.50 |"),
        ("recipe-h100", recipe(), "| 2.00 |"),
        ("profile-h100", profile("vit_base_patch16_224"), "| 6.00 |"),
        (
            "gpu-suite-h100",
            {"parts": {"tests": {"state": "passed", "seconds": 12.0}}, "suite": ["tests"]},
            "| passed |",
        ),
    ],
    ids=["throughput", "attention", "kernels", "recipe", "profile", "gpu-suite"],
)
def test_what_a_results_file_remarks_stands_below_its_table(
    project: Project, name: str, report: dict[str, Any], in_its_table: str
) -> None:
    project.add(name, **report, remarks=["Measured on a Monday."])
    above, _ = project.text().split("Measured on a Monday.")
    assert in_its_table in above


def test_profiles_of_two_settings_of_a_model_stand_side_by_side(project: Project) -> None:
    project.add("profile-100", **profile("vit_base_patch16_224"))
    project.add("profile-50", **profile("vit_base_patch16_224", num_prompts=50))
    assert project.text().count("### Where a step's time goes") == 2


def test_a_profile_s_command_has_its_setting(project: Project) -> None:
    project.add("profile-base", **profile("vit_base_patch16_224", num_prompts=50, memory="compact"))
    setting = "--model vit_base_patch16_224 --num-prompts 50 --batch-size 64 --dtype bfloat16"
    command = f"profile_step.py {setting} --implementation vpt_fast --memory compact`"
    assert command in " ".join(project.text().split())


def test_of_launches_the_recorded_one_stands_beside_the_fastest_right_one(project: Project) -> None:
    def launch(block: int, ms: float, **fields: Any) -> dict[str, Any]:
        start = {"kernel": "forward", "shape": "head_dim 64", "launch": {"BLOCK_M": block}, "recorded": False}
        return start | {"exact": True, "ms": ms, "ms_min": ms, "ms_max": ms} | fields

    project.add("tune-h100", [launch(64, 2.0, recorded=True), launch(128, 1.5), launch(32, 1.0, exact=False)])
    line = line_of(project.text(), "forward")
    assert [cell.strip() for cell in line.split("|")[3:8]] == [
        *("3", "BLOCK_M=64", "2.00 (2.00–2.00)", "BLOCK_M=128", "1.50 (1.50–1.50)"),
    ]
