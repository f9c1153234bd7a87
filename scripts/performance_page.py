"""Writes every number on performance in the docs, from the committed results files. One command:

    python scripts/performance_page.py

regenerates docs/performance.md from benchmarks/results/*.json, and the text between the markers
`<!-- headline -->` and `<!-- performance -->` in README.md and `<!-- memory policies -->` in docs/engine.md.
With `--check` it changes nothing; if they do not match, it prints the differences and exits with 1.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measurements import KINDS, Group, Report, groups, is_right, name_of, read_reports, searches
from page_text import Column, Row, field, paragraph, replace_block, table
from performance_sections import PAGE, SECTIONS, UNGRAPHED, alt_text, search_section, throughput_section

from vpt_fast.files import write

ROOT = Path(__file__).parents[1]
README, ENGINE = Path("README.md"), Path("docs/engine.md")

IN_WORDS = {
    "vpt_fast": "vpt_fast",
    "vpt_fast_graphed": "vpt_fast in a CUDA graph",
    "vpt_fast_bfloat16_residual": "vpt_fast, bfloat16 residual stream",
    "vpt_fast_reduce_overhead": 'vpt_fast in `torch.compile(mode="reduce-overhead")`',
    "vpt_fast_bfloat16_residual_graphed": "vpt_fast in a CUDA graph, bfloat16 residual stream",
    "concat_reference": "concatenation as in the official code",
    "concat_timm": "timm blocks on the concatenated sequence",
    "concat_timm_compiled": "timm blocks on the concatenated sequence, compiled",
    "concat_timm_compiled_graphed": "timm blocks on the concatenated sequence, compiled, in a CUDA graph",
    "concat_timm_checkpointed": "timm blocks on the concatenated sequence, with activation checkpointing",
    "concat_timm_max_autotune": "timm blocks on the concatenated sequence, compiled with max-autotune",
    "concat_timm_amp": "timm blocks on the concatenated sequence, under autocast",
    "concat_timm_amp_compiled": "timm blocks on the concatenated sequence, under autocast, compiled",
    "no_prompts": "for comparison: timm blocks without prompts, backward through all of them",
}
IN_README = (
    "vpt_fast",
    "vpt_fast_graphed",
    "concat_timm_compiled_graphed",
    "concat_timm_compiled",
    "concat_timm_checkpointed",
    "concat_timm",
    "concat_reference",
    "no_prompts",
)
USUAL_BATCH = {"gpu": 64, "cpu": 4}  # throughput.py's defaults

ROW_NAMES = (  # what the names of implementations say
    "`vpt_fast` is this package. *Memory* names its memory policy ([engine.md](engine.md#keeping-less)), and "
    "`bfloat16_residual` a residual stream in bfloat16.",
    "`concat_timm` runs timm's blocks on the concatenated sequence; `concat_reference` does so without fused "
    "attention, as in the official code.",
    "`compiled` is `torch.compile`, `amp` autocast. `checkpointed` keeps only the input of each block, like "
    "memory recompute.",
    "`graphed` replays the whole step (forward, backward and optimizer) from one CUDA graph, by the same "
    "code for vpt_fast and for concatenation.",
    "`no_prompts`, a reference point, runs timm's blocks without prompts, with a backward pass through all "
    "of them.",
)
MARK = "†"  # of a setting in the summary to which UNGRAPHED applies


def summary(those: Sequence[Group]) -> str:
    """For each setting, how much faster than the best concatenation vpt_fast's rows are, from the slowest to
    the fastest, and what the fastest keeps for backward; empty where nothing can be compared."""
    lines = []
    for group in those:
        ours = sorted(group.ours, key=lambda row: row["images_per_second"])
        best = group.best_concatenation
        if best is None or not ours:
            continue
        slowest, fastest = (f"{group.ratio(row):.2f}" for row in (ours[0], ours[-1]))
        kept, of_best = (row.get("kept_mib_per_image") for row in (ours[-1], best))
        mark = f" {MARK}" if group.graphs_ours_alone else ""
        lines.append(
            {
                "device": group.report.device,
                "setting": group.title(),
                "speed": (slowest if len(ours) == 1 else f"{slowest} to {fastest}") + mark,
                "fastest": name_of(ours[-1]),
                "kept": f"{kept / of_best:.2f}" if kept and of_best else "",
            }
        )
    if not lines:
        return ""
    columns: list[Column] = [
        ("device", field("device")),
        ("training step", field("setting")),
        ("speed of vpt_fast, × best concatenation", field("speed")),
        ("fastest row", field("fastest")),
        ("it keeps for backward, × best concatenation", field("kept")),
    ]
    text = paragraph(
        "Training steps of vpt_fast beside the fastest way to concatenate that was measured with it, from",
        "vpt_fast's slowest row to its fastest; below 1.00 it is slower:",
    )
    notes = [f"{MARK} {UNGRAPHED}"] if any(MARK in line["speed"] for line in lines) else []
    return "\n\n".join([text, table(lines, columns), *notes])


def device_sections(device: str, reports: list[Report]) -> list[str]:
    """The sections of a device, whose reports these are."""
    versions = dict.fromkeys(report.versions() for report in reports)
    text = [f"## {device}", paragraph("; ".join(versions) + ".")]
    if measured := groups(reports):
        text.append("### Training")
        text += [with_remarks(throughput_section(group), group.report) for group in measured]
        text += [with_remarks(search_section(group), group.report) for group in searches(reports)]
    newest = {report.subject: report for report in reversed(reports)}.values()
    for kind in KINDS:
        text += [with_remarks(SECTIONS[kind](report), report) for report in newest if report.kind == kind]
    return text


def with_remarks(section: str, report: Report) -> str:
    """The section, and below it what a reader must know of its results file, as that says itself."""
    return "\n\n".join([section, *map(paragraph, report.content.get("remarks", ()))])


def performance_page(root: Path, reports: list[Report]) -> str:
    """docs/performance.md"""
    text = [
        "<!-- Written by scripts/performance_page.py from benchmarks/results; changes here are lost. -->",
        "# Performance",
        paragraph(
            "All measurements of vpt_fast and of the implementations it is compared with: training steps,",
            "attention and the other kernels, and whole tasks. Every number comes from a file in",
            "[benchmarks/results](../benchmarks/results), linked beside the command that repeats the",
            "measurement. Settings in which vpt_fast is slower are included.",
        ),
        *filter(None, [summary(groups(reports))]),
        "## How it was measured",
        paragraph(
            "Times are medians. The rows of one table were measured in one process, in alternation. The",
            "gradient error is the largest relative error over the trained tensors, against concatenation in",
            "float64 on random weights (for `no_prompts`, against the same model in float64), and is checked",
            "in the same run. A row is marked as wrong, and left out of comparisons, if its error is more",
            "than rounding explains: above 0.0001 in float32, and above 0.05 in bfloat16, under autocast and",
            "with memory compact; a single operation's, above 0.0001 in float32 (0.001 with 8-bit codes) and",
            "0.02 in bfloat16. *Essential TFLOP/s* counts only the operations that the result requires; the",
            "ceiling is the speed of one large matrix product.",
        ),
        "\n".join(
            textwrap.fill(name, 120, initial_indent="- ", subsequent_indent="  ") for name in ROW_NAMES
        ),
    ]
    if not any(report.on_gpu for report in reports):
        text.append(
            paragraph(
                "No GPU results are committed yet; `make gpu` measures them. What follows was measured on a",
                "CPU, where the engine runs in plain PyTorch, without the Triton kernels.",
            )
        )
    if any(not report.on_gpu and report.content.get("dtype") == "bfloat16" for report in reports):
        text.append(
            paragraph(
                "PyTorch emulates bfloat16 on CPUs without instructions for it. Rows measured in bfloat16 on",
                "a CPU are there for memory and gradients; their speeds mean little.",
            )
        )
    for device in dict.fromkeys(report.device for report in reports):
        text += device_sections(device, [report for report in reports if report.device == device])
    plots = sorted((root / PAGE.with_suffix("")).glob("*.png"))
    if plots:
        text.append("## Plots")
        text += [f"![{alt_text(path, reports)}]({PAGE.stem}/{path.name})" for path in plots]
    return "\n\n".join(text) + "\n"


def ends(group: Group) -> list[Row]:
    """The fastest row of vpt_fast, the one that takes the least memory, and the best concatenation."""
    ours = group.ours
    found = [max(ours, key=lambda row: row["images_per_second"], default=None)]
    with_peak = [row for row in ours if row.get("peak_mib")]
    found += [min(with_peak, key=lambda row: row["peak_mib"], default=None), group.best_concatenation]
    return [row for i, row in enumerate(found) if row is not None and row not in found[:i]]


def is_alike(group: Group, other: Group) -> bool:
    """Whether both were measured on one device, with the same prompts and batch."""
    names = ("prompt_type", "num_prompts", "batch_size")
    return group.report.device == other.report.device and all(group[name] == other[name] for name in names)


def readme_table(group: Group, rows: list[Row]) -> str:
    """The fastest first, and last `no_prompts`, which is no way to tune prompts."""
    rows = sorted(rows, key=lambda row: (row["impl"] == "no_prompts", -row["images_per_second"]))

    def words(row: Row) -> str:
        policy = "" if row.get("memory") in (None, "exact") else f', `memory="{row["memory"]}"`'
        return IN_WORDS[row["impl"]] + policy if row["impl"] in IN_WORDS else name_of(row)

    columns: list[Column] = [
        ("implementation", words),
        ("dtype", field("dtype") if len({row["dtype"] for row in rows}) > 1 else lambda row: ""),
        ("images/s", field("images_per_second")),
        ("relative to the best concatenation", lambda row: f"{group.ratio(row):.2f}"),
        ("kept for backward, MiB per image", field("kept_mib_per_image")),
        ("peak, MiB", field("peak_mib", ",.0f")),
    ]
    return table(rows, columns)


def readme_groups(reports: list[Report]) -> list[Group]:
    """What README.md shows: the usual setting on the newest GPU, or on a CPU if there are no GPU results;
    then, of a GPU, the other models."""

    def rank(group: Group) -> tuple[Any, ...]:
        usual = (
            group["model"] == "vit_base_patch16_224",
            group["prompt_type"] == "deep",
            group["num_prompts"] == 100,
            group["batch_size"] == USUAL_BATCH["gpu" if group.report.on_gpu else "cpu"],
        )
        return group.report.on_gpu, *usual, *group.precedence()

    candidates = [group for group in groups(reports) if group.best_concatenation is not None]
    first = max(candidates, key=rank, default=None)
    if first is None or not first.report.on_gpu:
        return [] if first is None else [first]
    others = [group for group in candidates if group["model"] != first["model"] and is_alike(group, first)]
    return [first, *others]


def headline_block(reports: list[Report]) -> str:
    """For README.md's first screen: how much faster vpt_fast is at best, and in how much less memory."""
    those = [group for group in readme_groups(reports) if group.ours]
    if not those:
        return "No results are committed yet; `make bench` measures."
    parts: list[str] = []
    for group in those:
        best = group.best_concatenation
        part = f"{max(group.ratio(row) for row in group.ours):.2f} times as fast"
        if not parts:
            part = (
                f"On {group.report.device}, a training step of {group.title()}, is up to {part} as the best "
            )
            part += "concatenation that was measured with it"
        else:
            part = f"of {group.model_name()}, up to {part}"
        peaks = [row["peak_mib"] for row in group.ours if row.get("peak_mib")]
        if peaks and best.get("peak_mib"):
            part += f", or takes {min(peaks) / best['peak_mib']:.2f} of its memory"
        parts.append(part)
    return paragraph(f"{'; '.join(parts)} ([all rows](#what-it-saves)).", *ungraphed(those))


def ungraphed(those: Sequence[Group]) -> list[str]:
    """`UNGRAPHED`, of the models of README.md to which it applies."""
    names = [group.model_name() for group in those if group.graphs_ours_alone]
    if 0 < len(names) < len(those):
        return [UNGRAPHED.replace("Concatenation", f"Concatenation of {' and '.join(names)}")]
    return [UNGRAPHED] if names else []


def readme_block(reports: list[Report]) -> str:
    """What README.md says is saved."""
    if not (found := readme_groups(reports)):
        return "No results are committed yet; `make bench` measures."
    group, *others = found
    shown = [
        row
        for row in group.rows
        if is_right(row) and row["impl"] in IN_README and row.get("memory") in (None, "exact")
    ]
    shown += [row for row in ends(group) if row not in shown]
    text = [
        paragraph(
            f"Training steps of {group.title()}, on {group.report.device}, all in one run",
            f"({group.report.link(README)}; medians of {shown[0]['repeats']} rounds):",
        ),
        readme_table(group, shown),
    ]
    for other in others:
        title = f"{other.title()} ({other.report.link(README)}):"
        text += [paragraph(title), readme_table(other, ends(other))]
    return "\n\n".join([*text, readme_closing(found, shown)])


def readme_closing(those: Sequence[Group], shown: Sequence[Row]) -> str:
    """What README.md says below the tables, one for each of `those`; shown: the rows of the first."""
    ours = next((row for row in shown if row["impl"] == "vpt_fast"), None)
    bound = next((row for row in shown if row["impl"] == "no_prompts"), None)
    closing = ["The gradients of every row were checked against float64 in the same run."]
    graphed = next((row for row in shown if row["impl"] == "vpt_fast_graphed"), None)
    if ours and graphed and graphed["images_per_second"] > 1.2 * ours["images_per_second"]:
        closing.append(
            "Without a CUDA graph the GPU waits for the CPU to launch its kernels, so the speed depends on "
            "the CPU."
        )
    closing += ungraphed(those)
    if ours and bound:
        share = ours["images_per_second"] / bound["images_per_second"]
        closing.append(f"vpt_fast runs at {share:.2f} times the speed of timm's blocks without prompts.")
    if not those[0].report.on_gpu:
        closing.append(
            "On a CUDA GPU the engine runs on Triton kernels ([docs/kernels.md](docs/kernels.md)). They "
            "are checked in Triton's interpreter and built ahead of time; no GPU results are committed yet, "
            "and `make gpu` measures them."
        )
    closing.append(f"[{PAGE}]({PAGE}) has every measured setting, including those where vpt_fast is slower.")
    return paragraph(*closing)


def memory_block(reports: list[Report]) -> str:
    """docs/engine.md: the memory policies beside concatenation, where most of them were measured together."""

    def policies(group: Group) -> list[Row]:
        found: dict[str, Row] = {}
        for row in group.ours:
            if row.get("memory") and row["impl"].split(f"_{row['memory']}")[0] == "vpt_fast":
                found.setdefault(row["memory"], row)
        return list(found.values())

    candidates = [group for group in groups(reports) if group.best_concatenation is not None]
    if not any(policies(group) for group in candidates):
        return "No results are committed yet."
    group = max(candidates, key=lambda group: (len(policies(group)), group.report.on_gpu))
    columns: list[Column] = [
        (
            "`memory`",
            lambda row: (
                f'`"{row["memory"]}"`' if row is not best else IN_WORDS.get(row["impl"], name_of(row))
            ),
        ),
        ("kept, MiB per image", field("kept_mib_per_image")),
        ("peak, MiB", field("peak_mib", ",.0f")),
        ("gradient error", field("gradient_error", ".3e")),
    ]
    best = group.best_concatenation
    return "\n\n".join(
        [
            paragraph(
                f"{group.title()}, on {group.report.device}, one run",
                f"({group.report.link(ENGINE)}): bytes",
                "kept for backward, and the largest relative error of a trained tensor's gradient from",
                "concatenation in float64, on random weights.",
            ),
            table([*policies(group), best], columns),
        ]
    )


def pages(root: Path) -> dict[Path, str]:
    """What should stand in each file."""
    reports = read_reports(root)
    readme, engine = (root / README).read_text(), (root / ENGINE).read_text()
    return {
        PAGE: performance_page(root, reports),
        README: replace_block(
            README,
            replace_block(README, readme, "headline", headline_block(reports)),
            "performance",
            readme_block(reports),
        ),
        ENGINE: replace_block(ENGINE, engine, "memory policies", memory_block(reports)),
    }


def differences(root: Path) -> list[str]:
    """Lines of a diff from what the files say to what they should say; none where they match."""
    found: list[str] = []
    for path, wanted in pages(root).items():
        there = (root / path).read_text() if (root / path).exists() else ""
        lines = there.splitlines(), wanted.splitlines()
        found += difflib.unified_diff(*lines, str(path), f"{path} from benchmarks/results", lineterm="")
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where files do not match"
    )
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(root)
        print("\n".join(found), end="\n" if found else "")
        return 1 if found else 0
    for path, text in pages(root).items():
        write(root / path, text.encode())
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
