"""The sections of docs/performance.md, one for each kind of results file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from measurements import MODELS, RESULTS, Group, Report, benchmark_command, name_of, setting_title
from page_text import Column, Row, field, number, paragraph, percent, spread, table

PAGE = Path("docs/performance.md")
OUR_KERNELS = ("triton", "vpt_fast")
DETERMINISTIC = ("flash_attn", "flash_attn_3", "flash_attn_4", "sdpa_flash")  # as flash.py calls them
MOST_KERNELS = 10  # of a profile
UNGRAPHED = "Concatenation was not run in a CUDA graph in this measurement."


def search_section(group: Group) -> str:
    columns: list[Column] = [
        ("implementation", name_of),
        ("dtype", field("dtype") if len(group.dtypes) > 1 else lambda row: ""),
        ("largest batch", field("largest_batch", "d")),
    ]
    title = f"#### The largest batches: {group.title()}"
    source = f"`{group.command()}` ({group.report.link(PAGE)})"
    return "\n\n".join([title, source, table(group.rows, columns)])


def throughput_section(group: Group) -> str:
    def speed(row: Row) -> str:
        ratio = group.ratio(row)
        return "" if ratio is None else f"{ratio:.2f}"

    def remark(row: Row) -> str:
        return row.get("error") or ("" if row["exact"] else "wrong gradients")

    columns: list[Column] = [
        ("implementation", name_of),
        ("dtype", field("dtype") if len(group.dtypes) > 1 else lambda row: ""),
        ("images/s (min–max)", spread("images_per_second")),
        ("× best concatenation", speed),
        ("gradient error", field("gradient_error", ".1e")),
        ("kept, MiB per image", field("kept_mib_per_image")),
        ("peak, MiB", field("peak_mib", ",.0f")),
        ("largest batch", field("largest_batch", "d")),
        ("essential TFLOP/s", field("essential_tflops")),
        ("of the ceiling", percent("share_of_ceiling")),
        ("", remark),
    ]
    rows = sorted(group.rows, key=lambda row: -(row["images_per_second"] or 0.0))
    source = f"`{group.command()}` ({group.report.link(PAGE)})"
    if ceiling := group.report.content.get("ceiling_tflops"):
        source += f"; ceiling: one large matrix product, {number(ceiling)} TFLOP/s"
        if of_shapes := rows[0].get("shapes_tflops"):
            source += f" (products of the model's own shapes: {number(of_shapes)})"
    parts = [f"#### {group.title()}", source, table(rows, columns)]
    slower = [
        f"{name_of(row)} ({group.ratio(row):.2f})"
        for row in rows
        if row["impl"].startswith("vpt_fast") and (group.ratio(row) or 1.0) < 1
    ]
    if slower:
        parts.append(f"Slower than the best concatenation: {', '.join(slower)}.")
    if group.graphs_ours_alone:
        parts.append(UNGRAPHED)
    return "\n\n".join(parts)


def distinct(rows: list[Row], *names: str) -> list[Any]:
    """The values of a field, or the tuples of values of several, in their order."""
    return list(dict.fromkeys(map(itemgetter(*names), rows)))


def attention_command(report: Report, rows: list[Row]) -> str:
    """The command that measures these rows again. Flags of sizes multiply; what no flags can ask for are the
    models' sizes, which are measured without them."""
    names = ("num_tokens", "num_heads", "head_dim")
    sizes = {name: distinct(rows, name) for name in names}
    is_product = math.prod(map(len, sizes.values())) == len(distinct(rows, *names))
    return benchmark_command(
        "attention",
        **(sizes if is_product else {}),
        num_prompts=distinct(rows, "num_prompts"),
        batch_size=distinct(rows, "batch_size"),
        implementations=distinct(rows, "impl"),
        dtype=report.content["dtype"],
        repeats=report.content.get("repeats"),
    )


def attention_section(report: Report) -> str:
    absent = never_ran(report.rows)
    shown = [row for row in report.rows if row["impl"] not in absent]
    columns: list[Column] = [
        *((name, field(key, "d")) for name, key in (
            ("B", "batch_size"), ("N", "num_tokens"), ("m", "num_prompts"), ("H", "num_heads"),
            ("D", "head_dim"),
        )),
        ("implementation", name_of),
        *(
            (title, show)
            for part in ("forward", "backward")
            for title, show in (
                (f"{part}, ms", field(f"{part}_ms")),
                ("TFLOP/s", field(f"{part}_tflops")),
                ("of its bound", percent(f"{part}_share_of_bound")),
                ("× best library", field(f"{part}_ratio", ".2f")),
                ("× without concatenation", field(f"{part}_ratio_to_concatenated", ".2f")),
            )
        ),
        ("gradient error", field("gradient_error", ".1e")),
        ("", field("error")),
    ]  # fmt: skip
    text = [
        "### Attention",
        paragraph(
            f"Forward and backward of one attention layer, {report.content['dtype']}. The times of libraries",
            "include concatenating prompts and image; *× without concatenation* compares with a library that",
            "is given the concatenated keys and values. Measured with",
            f"`{attention_command(report, shown)}` ({report.link(PAGE)}).",
        ),
        table(shown, columns),
    ]
    there = distinct(shown, "impl")
    if timed := [f"`{name}`" for name in DETERMINISTIC if name in there]:
        text.append(
            paragraph(
                f"The backward pass of {' and '.join(timed)} was timed in deterministic mode, which vpt_fast",
                "selects when it trains with these libraries, so that runs are reproducible bit for bit as",
                "with our kernels. Their default mode may be faster and was not timed. `sdpa_cudnn` has no",
                "deterministic mode.",
            )
        )
    text += [f"Not measured: `{name}`: {reason}." for name, reason in absent.items()]
    for part in ("forward", "backward"):
        text += lost(report.rows, f"{part}_ratio", f"the best library in {part}")
    return "\n\n".join(text)


def never_ran(rows: list[Row]) -> dict[str, str]:
    """Implementations that failed in every row, for one reason, and that reason."""
    reasons: dict[str, set[str | None]] = {}
    for row in rows:
        reasons.setdefault(row["impl"], set()).add(row["error"])
    return {name: found.pop() for name, found in reasons.items() if len(found) == 1 and None not in found}


def kernels_section(report: Report) -> str:
    columns: list[Column] = [
        ("operation", field("op")),
        ("kind", field("kind")),
        ("8-bit codes", lambda row: "yes" if row.get("codes") else ""),
        *((name, field(key, "d")) for name, key in (
            ("B", "batch_size"), ("N", "num_tokens"), ("width", "width"),
        )),
        ("implementation", name_of),
        ("ms (min–max)", spread("ms")),
        ("GB/s", field("gb_per_second")),
        ("TFLOP/s", field("tflops")),
        ("of its bound", percent("share_of_bound")),
        ("× best other", field("ratio", ".2f")),
        ("error", field("relative_error", ".1e")),
        ("", field("error")),
    ]  # fmt: skip
    content = report.content
    shapes = [f"{tokens}x{width}" for tokens, width in distinct(report.rows, "num_tokens", "width")]
    command = benchmark_command(
        "kernels",
        shapes=shapes,
        batch_size=distinct(report.rows, "batch_size"),
        implementations=distinct(report.rows, "impl"),
        dtype=content["dtype"],
        repeats=content.get("repeats"),
    )
    return "\n\n".join(
        [
            "### The other operations",
            paragraph(f"In {content['dtype']}: `{command}` ({report.link(PAGE)})."),
            table(report.rows, columns),
            *lost(report.rows, "ratio", "the best other implementation"),
        ]
    )


def lost(rows: list[Row], ratio: str, peer: str) -> list[str]:
    """How many of our kernels' rows are slower than their peer; nothing where none has a peer."""
    ours = [row for row in rows if row["impl"] in OUR_KERNELS and row.get(ratio) is not None]
    slower = sum(row[ratio] < 1 for row in ours)
    return [f"Our implementation is slower than {peer} in {slower} of {len(ours)} rows."] if ours else []


def recipe_section(report: Report) -> str:
    content = report.content
    protocol, steps = content["protocol"], [row["measured"] for row in report.rows if row["measured"]]
    flat = [{**row, **(row["measured"] or {}), **(row["extrapolated"] or {})} for row in report.rows]

    def hours(name: str) -> Callable[[Row], str]:
        return lambda row: number(row[name] / 3600) if row.get(name) is not None else ""

    task: list[Column] = [
        ("implementation", name_of),
        ("training step, ms (min–max)", spread("train_ms")),
        ("inference batch, ms (min–max)", spread("inference_ms")),
        ("sweep, h (extrapolated)", hours("sweep_seconds")),
        ("five runs, h (extrapolated)", hours("runs_seconds")),
        ("task, h (extrapolated)", hours("task_seconds")),
        ("× best concatenation", field("ratio", ".2f")),
        ("", lambda row: row["error"] or ("" if row["exact"] else "wrong gradients")),
    ]  # fmt: skip
    loading: list[Column] = [
        ("implementation", name_of),
        ("pixels", lambda row: row["pixels"] + (f", {row['workers']} workers" if row["workers"] else "")),
        ("images/s (min–max)", spread("images_per_second")),
        ("images/s without loading", field("without_loading")),
        ("lost to loading", percent("share_lost")),
    ]
    common = ("num_prompts", "batch_size", "prompt_type", "dtype", "image_size")
    of_run = ("repeats", "steps", "epoch_steps", "workers")
    command = benchmark_command(
        "recipe",
        model=content["model"],
        **{name: content.get(name) for name in common},
        test_images=protocol["test"],
        implementations=[row["impl"] for row in report.rows],
        **{name: content.get(name) for name in of_run},
    )
    text = [
        "### A whole task",
        paragraph(
            f"The time of the VTAB-1k protocol on {setting_title(content)}: a sweep of",
            f"{protocol['points']} trials of {protocol['epochs']} epochs on",
            f"{protocol['sweep_train']} images, then {protocol['runs']} final runs on",
            f"{protocol['run_train']} images, evaluating {protocol['val']} images after every epoch and",
            f"{protocol['test']:,} at the end of a run. Extrapolated from",
            f"{sum(step['train_steps'] for step in steps)} measured training steps and",
            f"{sum(step['inference_batches'] for step in steps)} inference batches:",
            f"`{command}` ({report.link(PAGE)}).",
        ),
        table(flat, task),
    ]
    if content.get("end_to_end"):  # not there yet if it was interrupted
        text += [
            "Measured end to end, including data loading, on JPEG files of 400×300 pixels:",
            table(content["end_to_end"], loading),
        ]
    return "\n\n".join(text)


def profile_section(report: Report) -> str:
    content = report.content
    step, kinds = content["step_ms"], content["kinds_ms"]
    spent = [{"kind": kind, "ms": ms} for kind, ms in kinds.items()]
    spent.append({"kind": "idle", "ms": max(0.0, step - sum(kinds.values()))})

    def share(row: Row) -> str:
        return f"{100 * row['ms'] / step:.0f} %"

    columns: list[Column] = [("kind", field("kind")), ("ms", field("ms")), ("of the step", share)]
    longest: list[Column] = [
        ("kernel", lambda row: f"`{row['name'][:80]}`"),
        *columns,
        ("calls", field("calls", "g")),
    ]
    memory = "" if content["memory"] == "exact" else f", memory {content['memory']}"
    names = ("model", "num_prompts", "batch_size", "dtype", "implementation", "memory")
    command = benchmark_command("profile_step", **{name: content[name] for name in names})
    return "\n\n".join(
        [
            "### Where a step's time goes",
            paragraph(
                f"`{content['implementation']}`{memory}, {setting_title(content)}:",
                f"{number(step)} ms per step under the profiler. Without the profiler the CPU is busy for",
                f"{number(content['host_ms'])} ms per step.",
                f"`{command}` ({report.link(PAGE)}).",
            ),
            table(spent, columns),
            table(content["rows"][:MOST_KERNELS], longest),
        ]
    )


def tune_section(report: Report) -> str:
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        cases.setdefault((row["kernel"], row["shape"]), []).append(row)
    found: list[Row] = []
    for (kernel, shape), rows in cases.items():
        right = [row for row in rows if row["exact"] and row["ms"] is not None]
        recorded = next((row for row in right if row["recorded"]), None)
        best = min(right, key=lambda row: row["ms"], default=None)
        found.append(
            {"kernel": kernel, "shape": shape, "recorded": recorded, "best": best, "tried": len(rows)}
        )

    def launch(name: str) -> Callable[[Row], str]:
        return lambda row: (
            ""
            if row[name] is None
            else " ".join(f"{key}={value}" for key, value in row[name]["launch"].items())
        )

    def ms(name: str) -> Callable[[Row], str]:
        return lambda row: "" if row[name] is None else spread("ms")(row[name])

    columns: list[Column] = [
        ("kernel", field("kernel")),
        ("shape", field("shape")),
        ("launches tried", field("tried", "d")),
        ("used", launch("recorded")),
        ("ms (min–max)", ms("recorded")),
        ("fastest with right results", launch("best")),
        ("ms (min–max) ", ms("best")),
    ]
    return "\n\n".join(
        [
            "### Launch settings of the kernels",
            f"`python benchmarks/tune.py` ({report.link(PAGE)}).",
            table(found, columns),
        ]
    )


def suite_section(report: Report) -> str:
    outcomes = report.content["parts"]
    parts = [{"part": name, **outcome} for name, outcome in outcomes.items()]
    parts += [{"part": name, "state": "not run"} for name in report.content["suite"] if name not in outcomes]
    passed = sum(part["state"] == "passed" for part in parts)
    columns: list[Column] = [("part", field("part")), ("", field("state")), ("s", field("seconds", ".0f"))]
    return "\n\n".join(
        [
            "### The GPU test suite",
            f"`make gpu`: {passed} of {len(parts)} parts passed ({report.link(PAGE)}).",
            table(parts, columns),
        ]
    )


def alt_text(plot: Path, reports: Sequence[Report]) -> str:
    """What a picture of benchmarks/plots.py shows, by its name: that of its results file and of its sweep.

    Raises:
        ValueError: the name is no such name, or there is no such results file.
    """
    of_a_sweep = (
        r"(?P<model>[^-]+)-(?P<prompt_type>deep|shallow)-(?P<fixed>batch-\d+|\d+-prompts)-by-(?P<axis>.+)"
    )
    for report in reports:
        found = re.fullmatch(f"{re.escape(report.path.stem)}-{of_a_sweep}", plot.stem)
        if found is None:
            continue
        lines = dict.fromkeys(
            row["impl"] if row["memory"] in (None, "exact") else f"{row['impl']} under {row['memory']}"
            for row in report.rows
            if row["model"] == found["model"] and row["exact"] and row["images_per_second"] is not None
        )
        memory = "peak memory" if report.on_gpu else "memory kept for backward per image"
        axis = {"prompts": "number of prompts", "batch-size": "batch size"}[found["axis"]]
        return (
            f"Two line plots against the {axis}: images per second on the left, {memory} on the right; "
            f"{MODELS.get(found['model'], found['model'])}, {found['prompt_type']} prompts, "
            f"{found['fixed'].replace('-', ' ')}, on {report.device}; a line each for {', '.join(lines)}"
        )
    raise ValueError(f"{plot}: want a picture that benchmarks/plots.py drew of a file in {RESULTS}")


SECTIONS = {
    "attention": attention_section,
    "kernels": kernels_section,
    "recipe": recipe_section,
    "profile": profile_section,
    "tune": tune_section,
    "gpu-suite": suite_section,
}
"""Kind of results file -> its section."""
