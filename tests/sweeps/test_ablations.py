"""Ablations: which points there are, what they come to, and their pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vpt_fast.commands.cli import app
from vpt_fast.sweeps import ablations, sweep, trials
from vpt_fast.sweeps.ablations import ABLATIONS, Point, plan_ablation, run_ablation
from vpt_fast.sweeps.settings import Sweep
from vpt_fast.training import loop, plots
from vpt_fast.training.method_rules import METHODS
from vpt_fast.training.recipe import Recipe

NAMED = {"data": "images", "backbone": "vit_base_patch16_224"}


@pytest.fixture
def settings(settings) -> dict:
    """Of points that leave the method open and take one epoch."""
    return {name: value for name, value in settings.items() if name != "method"} | {"epochs": 1}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were saved, in order."""
    figures, save = [], plots._save

    def spy(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    return figures


def planned(name: str, **options) -> dict:
    """(line, value) -> settings that are not the same for all."""
    points = plan_ablation(name, NAMED, seeds=(1,), **options)
    return {(p.line, p.value): {k: v for k, v in p.sweep.settings.items() if k not in NAMED} for p in points}


def test_length_varies_the_number_of_prompts() -> None:
    assert planned("length") == {
        ("vpt-deep", m): {"method": "vpt-deep", "num_prompts": m} for m in (1, 10, 50, 100, 200)
    }


def test_depth_takes_first_and_last_blocks_of_the_backbone() -> None:
    found = planned("depth")
    assert [value for line, value in found if line == "first blocks"] == [1, 3, 6, 9, 12]
    assert found["last blocks", 9] == {"method": "vpt-deep", "prompt_layers": -9}


def test_depth_of_the_packaged_backbone_is_found_without_a_warning(recwarn) -> None:
    plan_ablation("depth", {"data": "x", "backbone": "vpt_fast_demo"}, seeds=(1,))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["depth", "location"])
def test_backbone_by_the_paper_s_name_is_planned_for_as_by_timm_s(name) -> None:
    papers = plan_ablation(name, {**NAMED, "backbone": "sup_vitb16_imagenet21k"}, seeds=(1,))
    assert [(point.line, point.value) for point in papers] == list(planned(name))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("depth", {"backbone": "swin_tiny_patch4_window7_224"}, "backbone: 'swin_tiny.*is not a timm Vision"),
        ("location", {"backbone": "resnet18"}, "backbone: 'resnet18' is not a timm VisionTransformer"),
        ("depth", {"backbone": "nosuch"}, "backbone: got 'nosuch', want the name of a timm model"),
        ("depth", {"backbone_arg": {"width": 3}}, "backbone is vit_base.*width=3.*, which cannot be built"),
    ],
    ids=["Swin", "ConvNet", "unknown", "argument"],
)
def test_backbone_that_an_ablation_has_no_points_for_is_named(name, changes, named) -> None:
    with pytest.raises(ValueError, match=named):
        plan_ablation(name, {**NAMED, **changes}, seeds=(1,))


def test_location_gives_each_place_a_number_that_fits_it() -> None:
    found = planned("location")
    assert found["vpt-shallow", "pad"]["num_prompts"] == 8  # half a patch on each side
    assert found["vpt-shallow", "concat-channel"]["num_prompts"] == 3
    assert "num_prompts" not in found["vpt-deep", "add"]
    assert ("vpt-deep", "pad") not in found and len(found) == 9


def test_location_on_a_swin_is_by_its_own_patches() -> None:
    swin = NAMED | {"backbone": "swin_tiny_patch4_window7_224"}
    points = plan_ablation("location", swin, methods=["vpt-shallow"], seeds=(1,))
    assert {p.value: p.sweep.settings.get("num_prompts") for p in points}["pad"] == 2


def test_output_varies_what_the_head_reads_for_each_method() -> None:
    found = planned("output", methods=["vpt-deep"])
    assert list(found) == [("vpt-deep", pool) for pool in ("cls", "image", "prompts", "image_and_prompts")]


def test_data_size_leaves_a_method_what_only_others_have() -> None:
    points = plan_ablation("data-size", {**NAMED, "num_prompts": 7, "batch_size": 8}, seeds=(1,))
    lines = {point.line: point.sweep.settings.get("num_prompts") for point in points}
    assert lines == {"linear": None, "vpt-shallow": 7, "vpt-deep": 7, "full": None}


def test_data_of_a_task_are_not_opened_for_a_batch_size_that_does_not_depend_on_them() -> None:
    points = plan_ablation("data-size", {**NAMED, "task": "vtab/cifar"}, methods=["linear"], seeds=(1,))
    assert all("batch_size" not in point.sweep.settings for point in points)


def test_batch_size_of_all_data_sizes_is_that_of_all_images(color_images, monkeypatch) -> None:
    rules = {"linear": 27, "vpt-deep": 28}  # of 27 training images
    for method, size in rules.items():
        monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], batch_size=size))
    points = plan_ablation("data-size", {**NAMED, "data": str(color_images)}, methods=[*rules], seeds=(1,))
    found = [(point.line, point.sweep.settings["batch_size"]) for point in points]
    assert found == [("linear", 27)] * 5 + [("vpt-deep", 64)] * 5


def test_search_leaves_the_searched_settings_open() -> None:
    point, *_ = plan_ablation("length", NAMED, seeds=(1,), search=True)
    assert "base_lr" in point.sweep.axes and "base_lr" not in point.sweep.settings


@pytest.mark.parametrize(
    ("name", "changes", "options", "named"),
    [
        ("width", {}, {}, "ablation is 'width'"),
        ("length", {"num_prompts": 5}, {}, "num_prompts is given; the ablation varies it"),
        ("length", {"method": "vpt-deep"}, {}, "method is given; --methods names them"),
        ("length", {}, {"methods": ["linear"]}, "num_prompts"),
        ("location", {}, {"methods": ["bias"]}, "'bias' has no locations"),
        ("data-size", {}, {"methods": ["linear", "full", "linear"]}, "methods: got linear twice"),
        ("data-size", {"shots": 4}, {}, "shots is given; the ablation takes fractions of the images"),
        ("data-size", {"lora_rank": 4}, {}, "lora_rank is given; of linear, vpt-shallow, .* none has it"),
        ("length", {"seed": 4}, {}, "seed is given as 4 with nothing to search; seeds name it"),
        (
            "length",
            {"base_lr": 1.0},
            {"search": True},
            "base_lr is given as 1.0, and --sweep searches it for",
        ),
        ("length", {"weight_decay": 0.0}, {"search": True}, "weight_decay is given as 0.0, and --sweep"),
        (
            "data-size",
            {"batch_size": 8},
            {"methods": [f"mlp-{k}" for k in range(1, 10)]},
            "methods: got 9 lines",
        ),
    ],
    ids=[
        *("ablation", "varied", "method", "refused", "location", "methods", "shots", "foreign", "seed"),
        *("searched rate", "decay", "lines"),
    ],
)
def test_what_cannot_be_varied_is_named(name, changes, options, named) -> None:
    with pytest.raises(ValueError, match=named):
        plan_ablation(name, {**NAMED, **changes}, seeds=(1,), **options)


def test_points_are_runs_by_hand_and_their_picture_has_a_line_for_each_method(
    settings, tmp_path, drawn, monkeypatch
) -> None:
    monkeypatch.setattr(ablations, "LENGTHS", (1, 2))
    methods = ["vpt-deep", "vpt-shallow"]
    points = plan_ablation("length", settings, methods=methods, seeds=(1,))
    found = run_ablation("length", points, tmp_path / "a")
    common = dict(settings, test=True, train_on="train+val", tensorboard=False, seed=1)
    for row in found["points"]:
        recipe = Recipe(**common, method=row["line"], num_prompts=row["value"])
        by_hand = loop.train(recipe, tmp_path / row["line"] / str(row["value"]))
        assert row["mean"] == by_hand.results["test_accuracy"]
    assert len(found["points"]) == 4 and found["finished"]
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == found
    (axes,) = drawn[-1].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == methods
    assert [line.get_xdata().tolist() for line in axes.get_lines() if len(line.get_xdata()) == 2]

    monkeypatch.setattr(loop, "train_epoch", None)  # the same again trains nothing
    assert run_ablation("length", points, tmp_path / "a") == found


def test_points_lie_in_folders_named_by_line_and_value(settings, tmp_path, monkeypatch) -> None:
    folders: list[Path] = []
    points = [Point("vpt-deep, first blocks", -1, Sweep(settings, {}, seeds=(1,)))]
    monkeypatch.setattr(ablations, "run_sweep", lambda _, out, **__: folders.append(out) or {"finished": 0})
    run_ablation("depth", points, tmp_path)
    assert folders == [tmp_path / "vpt-deep-first-blocks" / "-1"]


def test_point_that_cannot_be_trained_is_refused_before_any_is(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trials, "train", None)
    points = plan_ablation("output", settings, methods=["linear"], seeds=(1,))
    with pytest.raises(ValueError, match="linear, output prompts: pool: got 'prompts', and the model has no"):
        run_ablation("output", points, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_data_that_cannot_be_used_are_not_blamed_on_a_point(settings, tmp_path) -> None:
    points = plan_ablation("length", settings | {"data": "no such"}, seeds=(1,))
    with pytest.raises(ValueError, match="^no such: there is no such folder"):
        run_ablation("length", points, tmp_path)


@pytest.fixture
def ablated(settings, tmp_path, monkeypatch):
    """A folder with the lengths 1 and 2 of vpt-deep."""
    monkeypatch.setattr(ablations, "LENGTHS", (1, 2))
    run_ablation("length", plan_ablation("length", settings, seeds=(1,)), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "name, methods, named",
    [
        ("output", [], "holds the ablation length, not output"),
        ("length", ["vpt-shallow"], "points that this one has not: vpt-deep 1, vpt-deep 2"),
    ],
)
def test_other_ablation_in_the_same_folder_is_refused_and_replaces_nothing(
    settings, ablated, name, methods, named
) -> None:
    written = (ablated / "results.json").read_bytes()
    points = plan_ablation(name, settings, methods=methods, seeds=(1,))
    with pytest.raises(ValueError, match=f"{named}.*; choose another --out"):
        run_ablation(name, points, ablated)
    assert (ablated / "results.json").read_bytes() == written


def test_ctrl_c_that_is_too_late_for_a_point_stops_the_ablation_behind_it(
    settings, tmp_path, monkeypatch, late_ctrl_c
) -> None:
    monkeypatch.setattr(ablations, "LENGTHS", (1, 2))
    points = plan_ablation("length", settings, seeds=(1,))
    first = run_ablation("length", points, tmp_path / "a")
    assert not first["finished"] and len(first["points"]) == 1
    assert run_ablation("length", points, tmp_path / "a")["finished"]


def test_ablation_may_be_given_more_points(settings, ablated) -> None:
    points = plan_ablation("length", settings, methods=["vpt-deep", "vpt-shallow"], seeds=(1,))
    assert len(run_ablation("length", points, ablated)["points"]) == 4


def test_points_stay_recorded_while_the_command_is_repeated(settings, ablated, monkeypatch) -> None:
    def run_and_stop(*arguments, stop, **options):
        found = sweep.run_sweep(*arguments, stop=stop, **options)
        stop.set()
        return found

    written = (ablated / "results.json").read_bytes()
    monkeypatch.setattr(ablations, "run_sweep", run_and_stop)
    run_ablation("length", plan_ablation("length", settings, seeds=(1,)), ablated)
    assert (ablated / "results.json").read_bytes() == written


def test_ablation_removes_temporary_files_of_a_process_that_was_killed(settings, tmp_path) -> None:
    left = tmp_path / ".ablation.png.abcd_123.png"
    left.touch()
    points = plan_ablation("length", {**settings, "data": str(tmp_path / "none")}, seeds=(1,))
    with pytest.raises(ValueError, match="none"):
        run_ablation("length", points, tmp_path)
    assert not left.exists()


def test_folder_of_something_else_is_refused_by_an_ablation(settings, tmp_path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "sweep"}')
    with pytest.raises(ValueError, match=r"results\.json is not what an ablation writes"):
        run_ablation("length", plan_ablation("length", settings, seeds=(1,)), tmp_path)


def test_values_that_are_no_numbers_are_bars_side_by_side(tmp_path, drawn) -> None:
    lines = {"deep": {"cls": (0.5, 0.1), "image": (0.6, None)}, "shallow": {"image": (0.4, 0.2)}}
    plots.plot_ablation(lines, tmp_path / "a.png", title="t", x_label="x", y_label="y")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cls", "image"]
    assert sorted(bar.get_height() for bar in axes.patches) == [0.4, 0.5, 0.6]


def test_group_of_bars_that_lacks_a_line_is_centred_on_its_name(tmp_path, drawn) -> None:
    lines = {"shallow": {"add": (0.5, None), "pad": (0.6, None)}, "deep": {"add": (0.4, None)}}
    plots.plot_ablation(lines, tmp_path / "a.png", title="t", x_label="x", y_label="y")
    centres = sorted(bar.get_x() + bar.get_width() / 2 for bar in drawn[0].axes[0].patches)
    assert centres == pytest.approx([-0.2, 0.2, 1.0])


@pytest.mark.parametrize("deviation, label", [(None, "y"), (0.1, "y (mean ± std)")])
def test_axis_says_what_bars_of_error_are(deviation, label, tmp_path, drawn) -> None:
    plots.plot_ablation(
        {"deep": {1: (0.5, deviation)}}, tmp_path / "a.png", title="t", x_label="x", y_label="y"
    )
    assert drawn[0].axes[0].get_ylabel() == label


@pytest.mark.parametrize(
    "names", [ablations.LOCATIONS["vpt-shallow"], ablations.POOLS], ids=["location", "output"]
)
def test_names_of_bars_stand_side_by_side(names, tmp_path, drawn) -> None:
    lines = {method: dict.fromkeys(names, (0.5, None)) for method in ablations.LOCATIONS}
    plots.plot_ablation(lines, tmp_path / "a.png", title="t", x_label="x", y_label="y")
    figure = drawn[-1]
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    gap = boxes[0].height
    assert all(left.x1 + gap < right.x0 for left, right in itertools.pairwise(boxes))


def test_more_lines_than_styles_are_refused(tmp_path) -> None:
    lines = {str(i): {1: (0.5, None)} for i in range(len(plots.STYLES) + 1)}
    with pytest.raises(ValueError, match="lines: got 9, want at most 8"):
        plots.plot_ablation(lines, tmp_path / "a.png", title="t", x_label="x", y_label="y")


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "partial-1"])
def test_folder_is_named_by_data_and_backbone_whatever_the_method(method) -> None:
    points = plan_ablation("data-size", {**NAMED, "batch_size": 8}, methods=[method], seeds=(1,))
    folder = ablations.default_ablation_folder("data-size", points)
    assert str(folder) == "runs/ablation-data-size-images-vit_base_patch16_224"


def test_every_ablation_of_the_paper_is_a_command() -> None:
    text = CliRunner().invoke(app, ["ablate", "--help"]).output
    assert all(name in text for name in ABLATIONS)


def test_command_prints_the_points_of_the_methods_and_seeds_it_is_given(
    settings, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ablations, "LENGTHS", (1, 2))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += ["--methods=vpt-shallow", "--seeds=1,2", f"--out={tmp_path}"]
    result = CliRunner().invoke(app, ["ablate", "length", *flags])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["points"]
    assert [(row["line"], row["value"]) for row in rows] == [("vpt-shallow", 1), ("vpt-shallow", 2)]
    shown = [line.strip("│ ").split(" │ ") for line in result.stdout.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in shown]
    assert cells == [
        [row["line"], str(row["value"]), f"{row['mean']:.2%}", f"{row['standard_deviation']:.2%}"]
        for row in rows
    ]


@pytest.mark.parametrize(("flags", "searches"), [([], False), (["--sweep"], True)], ids=["plain", "sweep"])
def test_command_searches_at_each_point_if_told_to(tmp_path, monkeypatch, flags, searches) -> None:
    asked = []

    def plan(name, settings, **options):
        asked.append(options)
        raise ValueError("no more is wanted")

    monkeypatch.setattr(ablations, "plan_ablation", plan)
    CliRunner().invoke(app, ["ablate", "length", f"--data={tmp_path}", "--backbone=y", "--seeds=3", *flags])
    assert asked == [{"methods": [], "seeds": (3,), "search": searches}]
