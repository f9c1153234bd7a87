"""The ablations of Jia et al., "Visual Prompt Tuning", ECCV 2022, as series of sweeps.

An ablation's folder:

    <line>/<value>/    a sweep's folder (see `sweep`) for each point; only final runs unless it searches
    results.json       every point: its settings, mean and standard deviation over the seeds
    ablation.png
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vpt_fast.backbones.creation import without_values
from vpt_fast.backbones.resolve import SWIN, VIT, Kind, kind_of, resolve_backbone
from vpt_fast.backbones.sources import finding_sources_once
from vpt_fast.files import parse_json, remove_unfinished, write_json
from vpt_fast.sweeps.settings import Sweep, default_axes
from vpt_fast.sweeps.sweep import require_trials, run_sweep
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import Classification
from vpt_fast.training.method_rules import METHOD_KNOBS, parse_method
from vpt_fast.training.methods import naming_the_backbone
from vpt_fast.training.plots import STYLES, plot_ablation
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.training.run import data_and_backbone

LENGTHS = (1, 10, 50, 100, 200)
DEPTHS = (1 / 12, 3 / 12, 6 / 12, 9 / 12, 1.0)  # share of the blocks: 1, 3, 6, 9 and 12 of ViT-B's
FRACTIONS = (0.1, 0.3, 0.5, 0.8, 1.0)
POOLS = ("cls", "image", "prompts", "image_and_prompts")
LOCATIONS = {
    "vpt-shallow": ("prepend", "add", "add-1", "prepend-pixel", "concat-channel", "pad"),
    "vpt-deep": ("prepend", "add", "add-1"),  # prompts in pixel space are at the input only
}
EXTRA_CHANNELS = 3  # for concat-channel: as many as an image has

Lines = Mapping[str, Mapping[Any, dict[str, Any]]]  # {line: {value: settings}}


@dataclass(frozen=True)
class Ablation:
    """What is varied, and how the plot is labelled.

    Attributes:
        title, x_label: of the plot.
        figure: the paper's.
        methods: default methods, one line each.
        varied: the setting that tells a line's points apart.
        points: of a method and a recipe, by line.
    """

    title: str
    figure: str
    x_label: str
    methods: tuple[str, ...]
    varied: str
    points: Callable[[str, Recipe], Lines] = field(repr=False)


def _length(method: str, recipe: Recipe) -> Lines:
    return {method: {m: {"num_prompts": m} for m in LENGTHS}}


def _depth(method: str, recipe: Recipe) -> Lines:
    blocks = len(_shape(recipe, VIT).blocks)
    counts = sorted({max(1, round(share * blocks)) for share in DEPTHS})
    return {
        "first blocks": {k: {"prompt_layers": k} for k in counts},
        "last blocks": {k: {"prompt_layers": -k} for k in counts},
    }


def _location(method: str, recipe: Recipe) -> Lines:
    # Half a patch of border on each side keeps the padded image a whole number of patches.
    counts = {
        "add": None,
        "add-1": None,
        "pad": max(1, _shape(recipe, SWIN, VIT).patch_embed.patch_size[0] // 2),
        "concat-channel": EXTRA_CHANNELS,
    }
    found: dict[Any, dict[str, Any]] = {}
    for location in LOCATIONS[method]:
        found[location] = {"prompt_location": location}
        if location in counts:
            found[location]["num_prompts"] = counts[location]
    return {method: found}


def _output(method: str, recipe: Recipe) -> Lines:
    return {method: {pool: {"pool": pool} for pool in POOLS}}


def _data_size(method: str, recipe: Recipe) -> Lines:
    return {method: {share: {"train_fraction": share} for share in FRACTIONS}}


ABLATIONS = {
    "length": Ablation("Prompt length", "Fig. 6", "prompts", ("vpt-deep",), "num_prompts", _length),
    "depth": Ablation(
        "Prompt depth", "Fig. 7", "blocks with prompts", ("vpt-deep",), "prompt_layers", _depth
    ),
    "location": Ablation(
        "Prompt location", "Fig. 5", "location", tuple(LOCATIONS), "prompt_location", _location
    ),
    "output": Ablation(
        "What the head reads", "Fig. 8", "output", ("vpt-deep", "vpt-shallow"), "pool", _output
    ),
    "data-size": Ablation(
        "Training data",
        "Fig. 3",
        "share of the training images",
        ("linear", "vpt-shallow", "vpt-deep", "full"),
        "train_fraction",
        _data_size,
    ),
}


@finding_sources_once()
def _shape(recipe: Recipe, *kinds: Kind) -> Any:
    """The backbone's modules without weights: nothing is computed or downloaded.

    Raises ValueError if it is of none of `kinds`.
    """
    found = kind_of(recipe.backbone)
    kind = found if found in kinds else VIT
    with naming_the_backbone(recipe), without_values():
        return resolve_backbone(recipe.backbone, False, recipe.backbone_arg, kind=kind)[0]


@dataclass(frozen=True)
class Point:
    """One sweep of an ablation."""

    line: str
    value: Any
    sweep: Sweep


def plan_ablation(
    name: str,
    settings: Mapping[str, Any],
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int],
    search: bool = False,
) -> list[Point]:
    """The sweeps of an ablation, with their settings checked.

    Args:
        name: in `ABLATIONS`.
        settings: of the recipe, as `Recipe.from_dict` takes them, for all points. A setting that only some
            methods have, such as num_prompts, is passed to these.
        methods: instead of the ablation's own.
        seeds: of each point's final runs.
        search: whether each point searches the recipe's grid first; else `settings` are final.

    Raises:
        ValueError: there is no such ablation, a method is named twice, a given setting is one that the
            ablation varies or searches, a point refuses a setting, there are more lines than a plot can tell
            apart, or for data-size without a task and batch_size, the data cannot be opened.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}; it must be one of {', '.join(ABLATIONS)}")
    ablation = ABLATIONS[name]
    refused = {ablation.varied: "the ablation varies it", "method": "--methods names them"}
    if ablation.varied == "train_fraction":
        refused["shots"] = "the ablation takes fractions of the images"
    for given, reason in refused.items():
        if given in settings:
            raise ValueError(f"{given} is given; {reason}")
    if settings.get("task") == SEGMENTATION:
        raise ValueError("task is segmentation, which the paper's ablations are not of")
    chosen = methods or ablation.methods
    if twice := [method for i, method in enumerate(chosen) if method in chosen[:i]]:
        raise ValueError(f"methods: got {twice[0]} twice")
    known = {knob for method in chosen for knob in parse_method(method).rule.knobs}
    defaults = {f.name: f.default for f in dataclasses.fields(Recipe)}
    for given in sorted(set(METHOD_KNOBS) - known):
        if settings.get(given) not in (None, defaults[given]):
            raise ValueError(f"{given} is given; of {', '.join(chosen)} none has it, leave it out")
    found, cache = [], TrainingCache()
    for method in chosen:
        if name == "location" and method not in LOCATIONS:
            raise ValueError(f"methods: {method!r} has no locations; wanted {' or '.join(LOCATIONS)}")
        foreign = set(METHOD_KNOBS) - set(parse_method(method).rule.knobs)
        common = {key: value for key, value in settings.items() if key not in foreign} | {"method": method}
        recipe = Recipe.from_dict(common)
        if ablation.varied == "train_fraction":
            common["batch_size"] = _batch_size_of_all_images(recipe, cache)
        for line, values in ablation.points(method, recipe).items():
            label = f"{method}, {line}" if line != method and len(methods) > 1 else line
            for value, changes in values.items():
                merged = {**common, **changes}
                merged = {key: setting for key, setting in merged.items() if setting is not None}
                axes = default_axes(Recipe.from_dict(merged)) if search else {}
                for key in axes:
                    if key in merged:
                        raise ValueError(
                            f"{key} is given as {merged[key]}, and --sweep searches it for {method} too; "
                            "leave out one of them"
                        )
                found.append(Point(label, value, Sweep(merged, axes, tuple(seeds))))
    if (lines := len({point.line for point in found})) > len(STYLES):
        raise ValueError(f"methods: got {lines} lines to plot, want at most {len(STYLES)}")
    return found


def _batch_size_of_all_images(recipe: Recipe, cache: TrainingCache) -> int | None:
    """What points with fewer images are to have too; None if it does not depend on their number. By a point's
    own default, the learning rate, which depends on the batch size, would differ between points.

    Raises ValueError if the data cannot be opened.
    """
    if recipe.task is not None or recipe.batch_size is not None:
        return recipe.batch_size
    num_images = len(Classification().open(recipe, cache).train)
    return recipe.resolved(num_train_images=num_images, device_type="cpu").batch_size


def default_ablation_folder(name: str, points: Sequence[Point]) -> Path:
    """runs/ablation-<name>-<data>-<backbone>: the same command gives the same folder."""
    return Path("runs") / f"ablation-{name}-{data_and_backbone(points[0].sweep.first_recipe)}"


def run_ablation(
    name: str, points: Sequence[Point], out: Path, *, console: Console | None = None
) -> dict[str, Any]:
    """Runs the points of `plan_ablation` that are not done yet; returns the contents of results.json.

    The plot is drawn after each point. `finished` is False after SIGINT or SIGTERM; the same call resumes.

    Raises:
        ValueError: as for `run_sweep`, or `out` holds another ablation.
    """
    recorded = _require_same_ablation(name, points, out)
    results_file, picture = out / "results.json", out / "ablation.png"
    remove_unfinished(results_file, picture)
    console = console or Console(quiet=True)
    ablation, cache, stop = ABLATIONS[name], TrainingCache(), threading.Event()
    Classification().open(points[0].sweep.first_recipe, cache, console)  # what no point is to blame for
    for point in points:
        try:
            require_trials(point.sweep, cache)
        except ValueError as error:
            raise ValueError(f"{point.line}, {ablation.x_label} {point.value}: {error}") from None
    console.print(f"{ablation.title} (the paper's {ablation.figure}): {len(points)} points", highlight=False)
    sizes = {point.line: point.sweep.settings.get("batch_size") for point in points}
    if given := ", ".join(f"{size} ({line})" for line, size in sizes.items() if size is not None):
        console.print(f"Batch size at every point of a line: {given}", highlight=False)
    rows: list[dict[str, Any]] = []
    for point in points:
        console.rule(f"{point.line}: {ablation.x_label} {point.value}")
        folder = out / point.line.replace(", ", "-").replace(" ", "-") / str(point.value)
        found = run_sweep(point.sweep, folder, console=console, cache=cache, stop=stop)
        if not found["finished"]:
            return {"ablation": name, "points": rows, "finished": False}
        final = found["final"]
        rows.append(
            {
                "line": point.line,
                "value": point.value,
                "settings": {**found["settings"], **(found["best"]["params"] if found["best"] else {})},
                "split": final["split"],
                "mean": final["mean"],
                "standard_deviation": final["standard_deviation"],
                "accuracies": final["accuracies"],
                "diverged": final["diverged"],
                "parameters": found["parameters"],
            }
        )
        results = {"ablation": name, "points": rows, "finished": len(rows) == len(points)}
        # Until all points that are recorded have been read again, the files are the record of them.
        if recorded <= {(row["line"], row["value"]) for row in rows}:
            write_json(results_file, results)
            _draw(ablation, rows, picture)
        if stop.is_set():  # after this point had finished
            break
    return results


def _require_same_ablation(name: str, points: Sequence[Point], out: Path) -> set[tuple[str, Any]]:
    """The line and value of each point in results.json. Raises ValueError if it is of another ablation, or
    has points that would be lost because they are not among `points`.

    Other differences are refused by the points' own folders.
    """
    path = out / "results.json"
    if not path.exists():
        return set()
    planned = [(point.line, point.value) for point in points]
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        other, rows = values["ablation"], [(row["line"], row["value"]) for row in values["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what an ablation writes ({error!r}); choose another --out") from None
    if other != name:
        raise ValueError(f"{out} holds the ablation {other}, not {name}; choose another --out")
    if lost := [f"{line} {value}" for line, value in rows if (line, value) not in planned]:
        raise ValueError(
            f"{out} holds an ablation with points that this one has not: {', '.join(lost)}; choose another "
            "--out"
        )
    return set(rows)


def _draw(ablation: Ablation, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    lines: dict[str, dict[Any, tuple[float, float | None]]] = {}
    for row in rows:
        if row["mean"] is not None:  # None if every seed diverged
            line = lines.setdefault(row["line"], {})
            line[row["value"]] = row["mean"], row["standard_deviation"]
    if lines:
        plot_ablation(
            lines,
            path,
            title=ablation.title,
            x_label=ablation.x_label,
            y_label=f"{rows[0]['split']} accuracy",
        )
