"""The committed results files: reports, and the settings that throughput files measured.

benchmarks/results has files of `KINDS`, named after them, and files of benchmarks/throughput.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page_text import Row

RESULTS = Path("benchmarks/results")
KINDS = ("attention", "kernels", "recipe", "profile", "tune", "gpu-suite")  # besides throughput
MODELS = {
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "vit_huge_patch14_224": "ViT-H/14",
    "swin_base_patch4_window7_224": "Swin-B",
    "convnext_base": "ConvNeXt-B",
}
SETTING = ("model", "prompt_type", "num_prompts", "batch_size", "image_size")


@dataclass(frozen=True)
class Report:
    """A results file: its path in the repository and its content."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """One of `KINDS`, by the beginning of its name, else "throughput"."""
        return next((kind for kind in KINDS if self.path.name.startswith(f"{kind}-")), "throughput")

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

    def link(self, page: Path) -> str:
        return f"[results]({'../' * (len(page.parts) - 1)}{self.path.as_posix()})"

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
    def ours(self) -> list[Row]:
        """vpt_fast's rows with right gradients."""
        return [row for row in self.rows if row["impl"].startswith("vpt_fast") and is_right(row)]

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

    def model_name(self) -> str:
        return model_name(self["model"])

    def title(self) -> str:
        dtype = self.dtypes[0] if len(self.dtypes) == 1 else None
        return setting_title({**dict(zip(SETTING, self.key, strict=True)), "dtype": dtype})

    def command(self) -> str:
        """The command that measures these rows again."""
        content = self.report.content
        command = benchmark_command(
            "throughput",
            models=self["model"],
            prompt_type=self["prompt_type"],
            num_prompts=self["num_prompts"],
            batch_size=self["batch_size"],
            dtype=content["dtype"],
            image_size=content.get("image_size"),
            **self.chosen_rows(),
            repeats=content.get("repeats"),
            steps=content.get("steps"),
        )
        return f"{command} --find-batch" if self.is_search else command

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


def benchmark_command(script: str, **flags: Any) -> str:
    """The command of a script in benchmarks/. Lists are joined by commas; what is None or empty is left out:
    not all results files say everything."""
    values = {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in flags.items()}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value]
    return " ".join([f"python benchmarks/{script}.py", *words])


def is_right(row: Row) -> bool:
    return bool(row["exact"] and row["images_per_second"])


def setting_title(setting: Mapping[str, Any]) -> str:
    """A measured setting in words: its model, prompts, batch and, unless it is None, dtype."""
    count = setting["num_prompts"]
    prompts = f"{count} {setting['prompt_type']} prompt{'s' * (count != 1)}"
    dtype = f", {setting['dtype']}" if setting["dtype"] else ""
    return f"{model_name(setting['model'])} with {prompts}, batch {setting['batch_size']}{dtype}"


def model_name(timm_name: str) -> str:
    return MODELS.get(timm_name, f"`{timm_name}`")


def name_of(row: Row) -> str:
    """An implementation as tables call it, with its memory policy where that is not the usual one."""
    memory = row.get("memory")
    policy = f", memory {memory}" if memory not in (None, "exact") and memory not in row["impl"] else ""
    return f"`{row['impl']}`{policy}"


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
