"""Writes every number on performance in the docs, from the committed results files. One command:

    python scripts/performance_page.py

regenerates docs/performance.md from benchmarks/results/*.json, and the text between the markers
`<!-- performance -->` in README.md and `<!-- memory policies -->` in docs/engine.md. With `--check` it
changes nothing; if they do not match, it prints the differences and exits with 1.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt_fast.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
PAGE, README, ENGINE = Path("docs/performance.md"), Path("README.md"), Path("docs/engine.md")

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
MODELS = {
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "vit_huge_patch14_224": "ViT-H/14",
    "swin_base_patch4_window7_224": "Swin-B",
    "convnext_base": "ConvNeXt-B",
}
SETTING = ("model", "prompt_type", "num_prompts", "batch_size", "image_size")
OUR_KERNELS = ("triton", "vpt_fast")
DETERMINISTIC = ("flash_attn", "flash_attn_3", "flash_attn_4", "sdpa_flash")  # as flash.py calls them
USUAL_BATCH = {"gpu": 64, "cpu": 4}  # throughput.py's defaults
MOST_KERNELS = 10  # of a profile

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
UNGRAPHED = "Concatenation was not run in a CUDA graph in this measurement."

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Report:
    """A results file: its path in the repository and its content."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """A key of `SECTIONS`, by the beginning of its name, else "throughput"."""
        return next((kind for kind in SECTIONS if self.path.name.startswith(f"{kind}-")), "throughput")

    @property
    def subject(self) -> tuple[Any, ...]:
        """What it is about: a newer file on the same subject replaces it."""
        names = ("implementation", "memory", *SETTING, "dtype")
        return self.device, self.kind, *map(self.content.get, names)

    @property
    def device(self) -> str:
        return self.content["device"]

    @property
    def on_gpu(self) -> bool:
        return self.content.get("cuda") is not None

    @property
    def rows(self) -> list[Row]:
        return self.content.get("rows", [])

    def link(self, page: Path, text: str) -> str:
        return f"[{text}]({'../' * (len(page.parts) - 1)}{self.path.as_posix()})"

    def versions(self) -> str:
        known = (
            f"{name} {self.content[name]}" for name in ("torch", "triton", "timm") if self.content.get(name)
        )
        cuda = f"CUDA {self.content['cuda']}" if self.on_gpu else ""
        return ", ".join(filter(None, [*known, cuda, self.content["date"]]))


@dataclass(frozen=True)
class Group:
    """The rows of one setting in one throughput file: one run, so comparable."""

    report: Report
    key: tuple[Any, ...]
    rows: list[Row]

    def __getitem__(self, name: str) -> Any:
        return self.key[SETTING.index(name)]

    @property
    def is_search(self) -> bool:
        """Whether the largest batch was searched for."""
        return any(row.get("largest_batch") is not None for row in self.rows)

    def precedence(self) -> tuple[str, int]:
        """Of the groups measured at one setting, the one with the largest is shown."""
        return self.report.content["date"], len(self.rows)

    @property
    def best_concatenation(self) -> Row | None:
        found = [row for row in self.rows if row["impl"].startswith("concat") and is_right(row)]
        return max(found, key=lambda row: row["images_per_second"], default=None)

    @property
    def graphs_ours_alone(self) -> bool:
        """Whether vpt_fast's steps are replayed from a graph, and no concatenation's are."""
        graphed = [row["impl"] for row in self.rows if row["impl"].endswith("_graphed") and is_right(row)]
        return bool(graphed) and not any(name.startswith("concat") for name in graphed)

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(row["dtype"] for row in self.rows))

    def ratio(self, row: Row) -> float | None:
        """Speed relative to the best concatenation with right gradients."""
        best = self.best_concatenation
        return row["images_per_second"] / best["images_per_second"] if best and is_right(row) else None

    def title(self) -> str:
        count = self["num_prompts"]
        prompts = f"{count} {self['prompt_type']} prompt{'s' * (count != 1)}"
        dtype = f", {self.dtypes[0]}" if len(self.dtypes) == 1 else ""
        return f"{model_name(self['model'])} with {prompts}, batch {self['batch_size']}{dtype}"

    def command(self) -> str:
        """The command that measures these rows again."""
        content = self.report.content
        flags = {
            "models": self["model"],
            "prompt-type": self["prompt_type"],
            "num-prompts": self["num_prompts"],
            "batch-size": self["batch_size"],
            "dtype": content["dtype"],
            "image-size": content.get("image_size"),
            **self.chosen_rows(),
        }
        words = [f"--{key} {value}" for key, value in flags.items() if value]
        if self.is_search:
            words.append("--find-batch")
        return f"python benchmarks/throughput.py {' '.join(words)}"

    def chosen_rows(self) -> dict[str, str]:
        """The flags that select these rows. If vpt_fast's implementations have different policies, which no
        flags can ask for, these are the rows without flags."""
        there = [(row["impl"], row.get("memory")) for row in self.rows]
        names = list(dict.fromkeys(impl for impl, _ in there))
        policies = list(dict.fromkeys(memory for _, memory in there if memory)) or [None]
        chosen = {(impl, memory) for impl in names for memory in policies if impl.startswith("vpt_fast")}
        if chosen != {(impl, memory) for impl, memory in there if impl.startswith("vpt_fast")}:
            return {}
        memory = ",".join(filter(None, policies))
        return {"implementations": ",".join(names), "memory": "" if memory == "exact" else memory}


def is_right(row: Row) -> bool:
    return bool(row["exact"] and row["images_per_second"])


def model_name(model: str) -> str:
    return MODELS.get(model, f"`{model}`")


def name_of(row: Row) -> str:
    """An implementation as tables call it, with its memory policy where that is not the usual one."""
    memory = row.get("memory")
    policy = f", memory {memory}" if memory not in (None, "exact") and memory not in row["impl"] else ""
    return f"`{row['impl']}`{policy}"


def number(value: float | None, digits: int = 3) -> str:
    """The value to `digits` significant digits, with thousands separated; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def field(name: str, form: str = "") -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        if value is None or isinstance(value, str):
            return value or ""
        return format(value, form) if form else number(value)

    return show


def percent(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) is None else f"{100 * row[name]:.0f} %"


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """A Markdown table without its empty columns."""
    cells = [[show(row) for _, show in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [
        [columns[i][0] for i in kept],
        ["---" for _ in kept],
        *([line[i] for i in kept] for line in cells),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paragraph(*sentences: str) -> str:
    """Prose in lines of at most 120 characters, as the documents have."""
    text = " ".join(sentences)
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def spread(name: str) -> Callable[[Row], str]:
    """A median with the smallest and largest beside it, where they are known."""

    def show(row: Row) -> str:
        low, high = row.get(f"{name}_min"), row.get(f"{name}_max")
        ends = f" ({number(low)}–{number(high)})" if low is not None and high is not None else ""
        return number(row.get(name)) + ends

    return show


def read_reports(root: Path) -> list[Report]:
    """All results files, those of GPUs first, then the newest first."""
    paths = sorted((root / RESULTS).glob("*.json"))
    found = [Report(path.relative_to(root), json.loads(path.read_text())) for path in paths]
    found.sort(key=lambda report: (report.on_gpu, report.content["date"]), reverse=True)
    return found


def all_groups(reports: Iterable[Report]) -> list[Group]:
    """The settings of all throughput files."""
    found: list[Group] = []
    for report in reports:
        if report.kind != "throughput":
            continue
        of_report: dict[tuple[Any, ...], list[Row]] = {}
        for row in report.rows:
            of_report.setdefault(tuple(row[name] for name in SETTING), []).append(row)
        found += [Group(report, key, rows) for key, rows in of_report.items()]
    return found


def preferred(those: Iterable[Group]) -> list[Group]:
    """For a setting measured more than once on a device, the newest group, and of one day the one with the
    most rows: a curve over batches has fewer than the table, and comes before it by name."""
    found: dict[tuple[Any, ...], Group] = {}
    for group in those:
        usual = next((row["dtype"] for row in group.rows if row["impl"].startswith("vpt_fast")), None)
        setting = (group.report.device, usual, *group.key)
        found[setting] = max(found.get(setting, group), group, key=Group.precedence)
    return list(found.values())


def groups(reports: Iterable[Report]) -> list[Group]:
    """The settings of all throughput files, each once."""
    return preferred(all_groups(reports))


def searches(reports: Sequence[Report]) -> list[Group]:
    """Searches of the largest batch whose rows are not among those of `groups`."""
    shown = {(group.report.path, group.key) for group in groups(reports)}
    those = preferred(group for group in all_groups(reports) if group.is_search)
    return [group for group in those if (group.report.path, group.key) not in shown]


def search_section(group: Group) -> str:
    columns: list[Column] = [
        ("implementation", name_of),
        ("dtype", field("dtype") if len(group.dtypes) > 1 else lambda row: ""),
        ("largest batch", field("largest_batch", "d")),
    ]
    title = f"#### The largest batches: {group.title()}"
    source = f"`{group.command()}` ({group.report.link(PAGE, 'results')})"
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
    source = f"`{group.command()}` ({group.report.link(PAGE, 'results')})"
    if ceiling := group.report.content.get("ceiling_tflops"):
        source += f"; ceiling: one large matrix product, {number(ceiling)} TFLOP/s"
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


def never_ran(rows: list[Row]) -> dict[str, str]:
    """Implementations that failed in every row, for one reason, and that reason."""
    reasons: dict[str, set[str | None]] = {}
    for row in rows:
        reasons.setdefault(row["impl"], set()).add(row["error"])
    return {name: found.pop() for name, found in reasons.items() if len(found) == 1 and None not in found}


def attention_section(report: Report) -> str:
    absent = never_ran(report.rows)
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
            f"`python benchmarks/attention.py` ({report.link(PAGE, 'results')}).",
        ),
        table([row for row in report.rows if row["impl"] not in absent], columns),
    ]
    there = {row["impl"] for row in report.rows} - absent.keys()
    if timed := [f"`{name}`" for name in DETERMINISTIC if name in there]:
        text.append(
            paragraph(
                f"The backward pass of {' and '.join(timed)} was timed in deterministic mode, which vpt_fast",
                "selects when it trains with these libraries, so that runs are reproducible bit for bit as",
                "with our kernels. Their default mode may be faster and was not timed. `sdpa_cudnn` has no",
                "deterministic mode.",
            )
        )
    text += map(paragraph, report.content.get("remarks", ()))
    text += [f"Not measured: `{name}`: {reason}." for name, reason in absent.items()]
    for part in ("forward", "backward"):
        text += lost(report.rows, f"{part}_ratio", f"the best library in {part}")
    return "\n\n".join(text)


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
    return "\n\n".join(
        [
            "### The other operations",
            f"In {report.content['dtype']}: `python benchmarks/kernels.py` ({report.link(PAGE, 'results')}).",
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
    setting = (
        f"{model_name(content['model'])} with {content['num_prompts']} {content['prompt_type']} prompts, "
        f"batch {content['batch_size']}, {content['dtype']}"
    )
    text = [
        "### A whole task",
        paragraph(
            f"The time of the VTAB-1k protocol on {setting}: a sweep of {protocol['points']} trials of",
            f"{protocol['epochs']} epochs on {protocol['sweep_train']} images, then",
            f"{protocol['runs']} final runs on {protocol['run_train']} images, evaluating",
            f"{protocol['val']} images after every epoch and",
            f"{protocol['test']:,} at the end of a run. Extrapolated from",
            f"{sum(step['train_steps'] for step in steps)} measured training steps and",
            f"{sum(step['inference_batches'] for step in steps)} inference batches:",
            f"`python benchmarks/recipe.py` ({report.link(PAGE, 'results')}).",
        ),
        table(flat, task),
    ]
    if content["end_to_end"]:
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
    flags = " ".join(f"--{name.replace('_', '-')} {content[name]}" for name in names)
    setting = (
        f"{model_name(content['model'])} with {content['num_prompts']} {content['prompt_type']} prompts, "
        f"batch {content['batch_size']}, {content['dtype']}"
    )
    return "\n\n".join(
        [
            "### Where a step's time goes",
            paragraph(
                f"`{content['implementation']}`{memory}, {setting}:",
                f"{number(step)} ms per step under the profiler. Without the profiler the CPU is busy for",
                f"{number(content['host_ms'])} ms per step.",
                f"`python benchmarks/profile_step.py {flags}` ({report.link(PAGE, 'results')}).",
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
            f"`python benchmarks/tune.py` ({report.link(PAGE, 'results')}).",
            table(found, columns),
        ]
    )


def suite_section(report: Report) -> str:
    parts = [{"part": name, **outcome} for name, outcome in report.content["parts"].items()]
    passed = sum(part["state"] == "passed" for part in parts)
    columns: list[Column] = [("part", field("part")), ("", field("state")), ("s", field("seconds", ".0f"))]
    return "\n\n".join(
        [
            "### The GPU test suite",
            f"`make gpu`: {passed} of {len(parts)} parts passed ({report.link(PAGE, 'results')}).",
            table(parts, columns),
        ]
    )


SECTIONS = {
    "attention": attention_section,
    "kernels": kernels_section,
    "recipe": recipe_section,
    "profile": profile_section,
    "tune": tune_section,
    "gpu-suite": suite_section,
}


def summary(those: Sequence[Group]) -> str:
    """For each setting, how much faster than the best concatenation vpt_fast's rows are, from the slowest to
    the fastest, and what the fastest keeps for backward; empty where nothing can be compared."""
    lines = []
    for group in those:
        ours = [row for row in group.rows if row["impl"].startswith("vpt_fast") and is_right(row)]
        best = group.best_concatenation
        if best is None or not ours:
            continue
        ours.sort(key=lambda row: row["images_per_second"])
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
            "in the same run. A row whose error exceeds rounding is marked and left out of comparisons.",
            "*Essential TFLOP/s* counts only the operations that the result requires; the ceiling is the",
            "speed of one large matrix product.",
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
        here = [report for report in reports if report.device == device]
        text.append(f"## {device}")
        text.append(paragraph("; ".join(dict.fromkeys(report.versions() for report in here)) + "."))
        of_device = groups(here)
        if of_device:
            text.append("### Training")
            text += [throughput_section(group) for group in of_device]
            text += [search_section(group) for group in searches(here)]
        newest = {report.subject: report for report in reversed(here)}.values()
        for kind, section in SECTIONS.items():
            text += [section(report) for report in newest if report.kind == kind]
    plots = sorted((root / PAGE.with_suffix("")).glob("*.png"))
    if plots:
        text.append("## Plots")
        text += [f"![{alt_text(path, reports)}]({PAGE.stem}/{path.name})" for path in plots]
    return "\n\n".join(text) + "\n"


def ends(group: Group) -> list[Row]:
    """The fastest row of vpt_fast, the one that takes the least memory, and the best concatenation."""
    ours = [row for row in group.rows if row["impl"].startswith("vpt_fast") and is_right(row)]
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


def readme_block(reports: list[Report]) -> str:
    """What README.md says is saved: on the newest GPU, or on a CPU if there are no GPU results."""

    def rank(group: Group) -> tuple[Any, ...]:
        usual = (
            group["model"] == "vit_base_patch16_224",
            group["prompt_type"] == "deep",
            group["num_prompts"] == 100,
            group["batch_size"] == USUAL_BATCH["gpu" if group.report.on_gpu else "cpu"],
        )
        return group.report.on_gpu, *usual, *group.precedence()

    candidates = [group for group in groups(reports) if group.best_concatenation is not None]
    if not candidates:
        return "No results are committed yet; `make bench` measures."
    group = max(candidates, key=rank)
    shown = [
        row
        for row in group.rows
        if is_right(row) and row["impl"] in IN_README and row.get("memory") in (None, "exact")
    ]
    shown += [row for row in ends(group) if row not in shown]
    text = [
        paragraph(
            f"Training steps of {group.title()}, on {group.report.device}, all in one run",
            f"({group.report.link(README, 'results')}; medians of {shown[0]['repeats']} rounds):",
        ),
        readme_table(group, shown),
    ]
    for other in candidates:
        if group.report.on_gpu and other["model"] != group["model"] and is_alike(other, group):
            title = f"{other.title()} ({other.report.link(README, 'results')}):"
            text += [paragraph(title), readme_table(other, ends(other))]
    ours = next((row for row in shown if row["impl"] == "vpt_fast"), None)
    bound = next((row for row in shown if row["impl"] == "no_prompts"), None)
    closing = ["The gradients of every row were checked against float64 in the same run."]
    graphed = next((row for row in shown if row["impl"] == "vpt_fast_graphed"), None)
    if ours and graphed and graphed["images_per_second"] > 1.2 * ours["images_per_second"]:
        closing.append(
            "Without a CUDA graph the GPU waits for the CPU to launch its kernels, so the speed depends on "
            "the CPU."
        )
    if group.graphs_ours_alone:
        closing.append(UNGRAPHED)
    if ours and bound:
        share = ours["images_per_second"] / bound["images_per_second"]
        closing.append(f"vpt_fast runs at {share:.2f} times the speed of timm's blocks without prompts.")
    if not group.report.on_gpu:
        closing.append(
            "On a CUDA GPU the engine runs on Triton kernels ([docs/kernels.md](docs/kernels.md)). They "
            "are checked in Triton's interpreter and built ahead of time; no GPU results are committed yet, "
            "and `make gpu` measures them."
        )
    closing.append(f"[{PAGE}]({PAGE}) has every measured setting, including those where vpt_fast is slower.")
    return "\n\n".join([*text, paragraph(*closing)])


def memory_block(reports: list[Report]) -> str:
    """docs/engine.md: the memory policies beside concatenation, where most of them were measured together."""

    def policies(group: Group) -> list[Row]:
        found: dict[str, Row] = {}
        for row in group.rows:
            if (
                row.get("memory")
                and row["impl"].split(f"_{row['memory']}")[0] == "vpt_fast"
                and is_right(row)
            ):
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
                f"({group.report.link(ENGINE, 'results')}): bytes",
                "kept for backward, and the largest relative error of a trained tensor's gradient from",
                "concatenation in float64, on random weights.",
            ),
            table([*policies(group), best], columns),
        ]
    )


def replace_block(path: Path, text: str, marker: str, block: str) -> str:
    """The text with `block` between its two markers.

    Raises:
        ValueError: there are not two.
    """
    line = f"<!-- {marker} -->"
    parts = text.split(line)
    if len(parts) != 3:
        raise ValueError(f"{path}: got {len(parts) - 1} of {line}, want two")
    return f"{parts[0]}{line}\n\n{block}\n\n{line}{parts[2]}"


def pages(root: Path) -> dict[Path, str]:
    """What should stand in each file."""
    reports = read_reports(root)
    readme, engine = (root / README).read_text(), (root / ENGINE).read_text()
    return {
        PAGE: performance_page(root, reports),
        README: replace_block(README, readme, "performance", readme_block(reports)),
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
        with replacing(root / path) as temporary:
            temporary.write_text(text)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
