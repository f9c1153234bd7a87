"""Tables of results, by hand."""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics

import pytest
import yaml

from vpt_fast.backbones.known import KNOWN
from vpt_fast.data.tasks import TASKS
from vpt_fast.sweeps import entries
from vpt_fast.sweeps.entries import read_entries
from vpt_fast.sweeps.published import ACCURACIES, BACKBONE, GROUP_MEANS, PUBLISHED, published_of
from vpt_fast.sweeps.tables import format_table, make_rows
from vpt_fast.training.recipe import Recipe

CLASSES = ["dark", "light"]


@pytest.fixture
def sweep(tmp_path):
    """Writes a finished sweep's results.json and returns its folder."""

    def write(method, task, *accuracies, finished=True, split="test", backbone=BACKBONE, **settings):
        folder = tmp_path / f"{method}-{task}-{backbone}".replace("/", "-")
        folder.mkdir()
        final = {
            "split": split,
            "accuracies": {str(seed): value for seed, value in enumerate(accuracies)},
            "mean": statistics.fmean(accuracies),
            "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "diverged": {},
        }
        results = {"kind": "sweep", "task": task, "data": "x", "backbone": backbone, "method": method}
        results |= {"settings": settings, "best": {"params": {"base_lr": 1}}}
        results |= {"parameters": {"trained": 10, "backbone": 1000}, "final": final, "finished": finished}
        results["classes"] = CLASSES
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return write


@pytest.fixture
def run(tmp_path):
    """Writes a finished run's folder and returns it."""

    def write(name, **settings):
        folder = tmp_path / name
        folder.mkdir()
        test = settings.pop("test_accuracy")
        recipe = Recipe(data="x", backbone=BACKBONE, task="vtab/cifar", **settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        facts = {"parameters": {"trained": 10, "backbone": 1000}}
        facts["data"] = {"classes": CLASSES, "train": {"per_class": [8, 8]}, "val": None}
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "results.json").write_text(json.dumps({"val_accuracy": 0.5, "test_accuracy": test}))
        return folder

    return write


@pytest.mark.parametrize("method", GROUP_MEANS)
@pytest.mark.parametrize("group", ["natural", "specialized", "structured"])
def test_published_means_are_those_of_the_published_tasks(method, group):
    tasks = [ACCURACIES[method][task.name] for task in TASKS.values() if task.group == group]
    # 0.05 for each task's rounding
    assert statistics.fmean(tasks) == pytest.approx(GROUP_MEANS[method][group], abs=0.05)


def test_published_accuracies_are_there_for_every_task():
    assert all(set(row) == set(TASKS) for row in ACCURACIES.values())


def test_means_wins_and_differences_by_hand(sweep):
    folders = [
        sweep("vpt-deep", "vtab/cifar", 0.80, 0.82),
        sweep("vpt-deep", "vtab/dtd", 0.60),
        sweep("vpt-deep", "vtab/eurosat", 0.97),
        sweep("full", "vtab/cifar", 0.70),
        sweep("full", "vtab/dtd", 0.65),
    ]
    entries, notes = read_entries(folders)
    rows, more = make_rows(entries)
    deep, full = rows
    assert (deep.method, full.method, notes, more) == ("vpt-deep", "full", [], [])
    natural = deep.means["natural"]
    assert natural.accuracy == pytest.approx((81 + 60) / 2) and natural.tasks == 2
    assert natural.published == pytest.approx((78.8 + 65.8) / 2)
    assert natural.difference == pytest.approx((81 + 60 - 78.8 - 65.8) / 2)
    assert natural.wins == 1  # cifar
    assert deep.means["specialized"].wins is None  # full has no run there
    assert deep.entries["vtab/cifar"].standard_deviation == pytest.approx(100 * 0.02 / 2**0.5)
    assert deep.total == pytest.approx(1 + 3 * 10 / 1000)
    assert full.means["natural"].wins is None


def test_published_mean_of_a_part_of_a_group_is_that_of_its_tasks(sweep):
    ((row,), _) = make_rows(read_entries([sweep("vpt-deep", name, 0.8) for name in NATURAL[:3]])[0])
    wanted = statistics.fmean(ACCURACIES["vpt-deep"][name] for name in NATURAL[:3])
    assert row.means["natural"].published == pytest.approx(wanted)


def test_whole_group_of_which_a_task_is_on_val_has_no_published_mean(sweep):
    folders = [sweep("vpt-deep", name, 0.8) for name in NATURAL[:-1]]
    folders.append(sweep("vpt-deep", NATURAL[-1], 0.8, split="val"))
    ((row,), _) = make_rows(read_entries(folders)[0])
    assert (row.means["natural"].tasks, row.means["natural"].published) == (7, None)


def test_tasks_of_full_share_no_backbone(sweep):
    rows, _ = make_rows(read_entries([sweep("full", task, 0.7) for task in ("vtab/cifar", "vtab/dtd")])[0])
    assert rows[0].total == pytest.approx(2 * 10 / 1000)


def test_without_runs_of_full_wins_are_against_the_published_ones(sweep):
    rows, notes = make_rows(read_entries([sweep("vpt-deep", "vtab/cifar", 0.70)])[0])
    assert rows[0].means["natural"].wins == 1  # 68.9 published
    assert "as published" in notes[0]


@pytest.mark.parametrize(
    "backbone, known",
    [
        (BACKBONE, BACKBONE),
        ("vit_base_patch16_224.orig_in21k", BACKBONE),
        ("vit_base_patch16_224.mae", "mae_vitb16"),
        ("mocov3_vitb", "mocov3_vitb"),
        ("vit_base_patch16_224", None),  # timm's weights of that name are others
        ("vit_base_patch16_224.augreg_in21k", None),
        ("swin_base_patch4_window7_224.ms_in1k", None),
        ("convnext_base.fb_in22k", "imagenet22k_sup_rnx_base"),
    ],
)
def test_published_numbers_are_of_the_very_weights(backbone, known):
    assert published_of(backbone) is (None if known is None else PUBLISHED[known])


def test_backbones_that_something_was_published_of_are_known():
    assert PUBLISHED.keys() <= KNOWN.keys()


NATURAL = [name for name, task in TASKS.items() if task.group == "natural"]


@pytest.mark.parametrize("method", GROUP_MEANS)
@pytest.mark.parametrize("group", ["natural", "specialized", "structured"])
def test_published_mean_of_a_whole_group_is_the_published_one(sweep, method, group):
    names = [name for name, task in TASKS.items() if task.group == group]
    ((row,), _) = make_rows(read_entries([sweep(method, name, 0.8) for name in names])[0])
    mean = row.means[group]
    assert (mean.published, mean.published_tasks) == (GROUP_MEANS[method][group], len(names))


def test_of_other_backbones_the_published_mean_is_of_all_tasks_of_a_group(sweep):
    swin = "swinb_imagenet22k_224"
    folders = [sweep("vpt-deep", name, 0.8, backbone=swin) for name in NATURAL]
    ((row,), notes) = make_rows(read_entries(folders)[0])
    natural = row.means["natural"]
    assert (natural.published, natural.published_tasks, natural.wins) == (76.78, 7, None)
    assert natural.difference == pytest.approx(80 - 76.78)
    assert notes == [] and not row.is_papers
    ((part,), _) = make_rows(read_entries(folders[:2])[0])
    assert (part.means["natural"].published, part.means["natural"].difference) == (76.78, None)
    assert "76.78 of 7 tasks" in format_table(*read_entries(folders[:2]), "markdown")


@pytest.mark.parametrize("location, published", [("pad", 44.64), ("concat-channel", None)])
def test_a_convnet_s_published_mean_is_of_a_border(sweep, location, published):
    convnet = "convnext_base.fb_in22k"
    entries, _ = read_entries(
        [sweep("vpt-shallow", "vtab/dmlab", 0.4, backbone=convnet, prompt_location=location)]
    )
    assert make_rows(entries)[0][0].means["structured"].published == published


def test_a_backbone_that_nothing_was_published_of_is_said(sweep):
    entries, _ = read_entries([sweep("vpt-deep", "vtab/cifar", 0.8, backbone="vit_tiny_patch16_224")])
    ((row,), notes) = make_rows(entries)
    assert row.means["natural"].published is None and row.entries["vtab/cifar"].published_accuracy is None
    assert notes == ["nothing was published of vit_tiny_patch16_224, by this name, to hold its runs against"]
    text = format_table(entries, notes, "markdown")
    assert "78.8" not in text and "| published" not in text and "| difference" not in text


def test_tasks_that_are_none_of_the_papers_have_a_column_of_their_own(sweep):
    folders = [sweep("linear", "birds", 0.5, backbone="x"), sweep("linear", "fish", 0.7, backbone="x")]
    text = format_table(*read_entries(folders), "markdown")
    assert "| method | total params | Other tasks (2) |" in text
    assert "| linear | 1.02× of 2 tasks | 60.00 |" in text
    mixed = format_table(
        *read_entries([*folders, sweep("linear", "vtab/dtd", 0.6, backbone="x")]), "markdown"
    )
    assert "| FGVC (5) | Other tasks (2) |" in mixed and "| - | 60.00 |" in mixed


@pytest.mark.parametrize(
    ("task", "legend"),
    [
        ("birds", "Means are over the tasks that are there."),
        (
            "vtab/cifar",
            "Means are over the tasks that are there, published ones too unless they say of how many; in "
            "brackets behind a mean: tasks better than full.",
        ),
    ],
)
def test_what_means_are_is_said_of_those_that_are_there(sweep, task, legend):
    text = format_table(*read_entries([sweep("vpt-deep", task, 0.5)]), "markdown")
    assert legend in text.splitlines()


@pytest.mark.parametrize("backbone", [BACKBONE, "x"])
def test_tasks_that_are_none_of_the_papers_are_held_against_nothing(sweep, backbone):
    ((row,), notes) = make_rows(read_entries([sweep("linear", "birds", 0.5, backbone=backbone)])[0])
    assert (row.means["other"].published, row.means["other"].wins) == (None, None) and notes == []


def test_accuracy_on_val_is_held_against_nothing(sweep):
    entries, notes = read_entries([sweep("vpt-deep", "vtab/cifar", 0.70, split="val")])
    natural = make_rows(entries)[0][0].means["natural"]
    assert (natural.published, natural.wins) == (None, None)
    assert notes == ["vpt-deep on vtab/cifar: accuracy on val; there is none on test"]


def test_two_runs_of_one_seed_beside_one_of_another_are_refused(run):
    folders = [run(f"{i}", seed=seed, test_accuracy=0.7) for i, seed in enumerate((1, 2, 2))]
    with pytest.raises(ValueError, match="vpt-deep on vtab/cifar comes twice with the seed 2") as raised:
        read_entries(folders)
    assert str(raised.value).endswith(f"in {folders[1]} and {folders[2]}")


def test_runs_that_differ_in_their_seed_are_taken_together(run):
    folders = [run("a", seed=1, test_accuracy=0.7), run("b", seed=2, test_accuracy=0.8)]
    ((entry,), _) = read_entries(folders)
    assert (entry.runs, entry.split) == (2, "test")
    assert entry.accuracy == pytest.approx(75)
    assert entry.standard_deviation == pytest.approx(10 / 2**0.5)


def test_runs_that_differ_in_more_are_refused(run):
    folders = [run("a", base_lr=1, test_accuracy=0.7), run("b", base_lr=2, seed=2, test_accuracy=0.8)]
    with pytest.raises(ValueError, match="comes twice; .* differ in base_lr$") as raised:
        read_entries(folders)
    assert f"{folders[0]} and {folders[1]} differ" in str(raised.value)


@pytest.mark.parametrize("first, second", [("sweep", "sweep"), ("sweep", "run"), ("run", "sweep")])
def test_two_folders_with_results_of_one_method_and_task_are_both_named(run, sweep, first, second):
    folders = {}
    for name in {"run", first, second}:
        folders[name] = (
            run("a", seed=1, test_accuracy=0.7) if name == "run" else sweep("vpt-deep", "vtab/cifar", 1)
        )
    earlier, later = folders[first], folders[second]
    if first == second:  # a copy of the sweep
        later = earlier.with_name("again")
        shutil.copytree(earlier, later)
    with pytest.raises(ValueError) as raised:
        read_entries([earlier, later])
    assert str(raised.value).startswith(f"{earlier} and {later} both hold results of vpt-deep on vtab/cifar")


def test_run_of_segmentation_is_left_out_and_said_so(run):
    finished = run("seed-1", seed=1, test_accuracy=0.5)
    folder = run("scenes", test_accuracy=0.8)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "task": "segmentation"}))
    entries, notes = read_entries([finished, folder])
    assert len(entries) == 1
    assert notes == [f"{folder}: a run of segmentation; tables are of classification; left out"]


def test_sweep_and_run_that_are_named_twice_are_read_once(sweep, run, tmp_path):
    folders = [sweep("linear", "vtab/dtd", 0.6), run("seed-1", seed=1, test_accuracy=0.5)]
    entries, notes = read_entries([tmp_path, *folders])
    assert [entry.runs for entry in entries] == [1, 1] and notes == []


def test_sweep_whose_final_runs_all_diverged_is_left_out_and_said_so(sweep):
    folder = sweep("vpt-deep", "vtab/cifar", 0.7)
    results = json.loads((folder / "results.json").read_text())
    results["final"] |= {"accuracies": {}, "mean": None, "diverged": {"0": "the loss is inf"}}
    (folder / "results.json").write_text(json.dumps(results))
    assert read_entries([folder]) == ([], [f"{folder}: every final run of the sweep diverged; left out"])


def test_mean_of_a_sweep_that_lacks_diverged_runs_says_so(sweep):
    folder = sweep("vpt-deep", "vtab/cifar", 0.7, 0.8)
    results = json.loads((folder / "results.json").read_text())
    results["final"]["diverged"] = {"2": "the loss is inf"}
    (folder / "results.json").write_text(json.dumps(results))
    (note,) = read_entries([folder])[1]
    assert note == (
        "vpt-deep on vtab/cifar: 1 of 3 final runs diverged; mean and standard deviation are of the others"
    )


def test_unfinished_runs_are_left_out_and_said_so(run, tmp_path):
    for seed in (1, 2, 3):
        run(f"seed-{seed}", seed=seed, test_accuracy=0.5)
    (tmp_path / "seed-3" / "results.json").unlink()
    (entry,), notes = read_entries([tmp_path])
    assert entry.runs == 2 and notes == [f"{tmp_path / 'seed-3'}: the run is not finished; left out"]


def test_unfinished_run_and_sweep_that_are_named_are_left_out(run, sweep, tmp_path):
    finished = [run("seed-1", seed=1, test_accuracy=0.5), sweep("linear", "vtab/dtd", 0.6)]
    begun = run("seed-2", seed=2, test_accuracy=0.5)
    (begun / "results.json").unlink()
    searching = tmp_path / "searching"  # a sweep before its first trial has ended
    (searching / "trials" / "a").mkdir(parents=True)
    (searching / "sweep.yaml").touch()
    (searching / "trials" / "a" / "config.yaml").touch()
    wanted = [
        f"{begun}: the run is not finished; left out",
        f"{searching}: the sweep is not finished; left out",
    ]
    entries, notes = read_entries([*finished, begun, searching])
    assert len(entries) == 2 and notes == wanted
    assert sorted(read_entries([tmp_path])[1]) == sorted(wanted)


def test_folders_and_files_that_are_no_runs_are_left_out(run, tmp_path):
    finished = run("seed-1", seed=1, test_accuracy=0.5)
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").touch()
    entries, notes = read_entries([finished, tmp_path / "logs", tmp_path / "notes.txt"])
    assert len(entries) == 1
    assert notes == [f"{tmp_path / name}: holds no run or sweep; left out" for name in ("logs", "notes.txt")]


def test_results_of_another_program_are_left_out_and_said_so(run, tmp_path):
    finished = run("seed-1", seed=1, test_accuracy=0.5)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text('{"linear probe": {"epochs": 100}}')
    entries, notes = read_entries([finished, tmp_path / "demo"])
    assert len(entries) == 1
    assert notes == [f"{tmp_path / 'demo'}: results.json is neither a sweep's nor a run's; left out"]


def test_folder_of_runs_beside_their_configuration_is_no_unfinished_run(run, tmp_path):
    run("seed-1", seed=1, test_accuracy=0.5)
    (tmp_path / "config.yaml").touch()
    entries, notes = read_entries([tmp_path])
    assert len(entries) == 1 and notes == []


def test_folder_that_is_not_there_is_refused(run, tmp_path):
    finished = run("seed-1", seed=1, test_accuracy=0.5)
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        read_entries([finished, tmp_path / "nowhere"])


@pytest.mark.parametrize("form", ["markdown", "csv"])
def test_table_command_says_on_stderr_what_it_leaves_out(command, sweep, form):
    folders = sweep("linear", "vtab/cifar", 0.5), sweep("full", "vtab/cifar", 0.5, finished=False)
    result = command("table", *folders, "--format", form)
    assert result.exit_code == 0 and result.stdout
    assert result.stderr == f"{folders[1]}: the sweep is not finished; left out\n"


def test_table_command_refuses_folders_without_any_finished_run(command, run, tmp_path):
    begun = run("seed-1", seed=1, test_accuracy=0.5)
    (begun / "results.json").unlink()
    (tmp_path / "logs").mkdir()
    result = command("table", begun, tmp_path / "logs")
    assert result.exit_code == 2 and "there are no finished runs to tabulate" in result.stderr
    assert f"{begun}: the run is not finished" in result.stderr and "logs: holds no run" in result.stderr


def test_markdown_shows_what_is_missing(sweep, tmp_path):
    sweep("vpt-deep", "vtab/cifar", 0.80, 0.82)
    text = format_table(*read_entries([tmp_path]), "markdown")
    assert "| vpt-deep | 1.01× of 1 task | 81.00 (1), 1 of 7 tasks | - | - | - |" in text
    assert "| published | 1.18× of 24 tasks | 78.80 | - | - | - |" in text
    assert "| difference | - | +2.20 | - | - | - |" in text
    assert "| vtab/cifar | 81.00 ± 1.41 | 78.8 | +2.20 |" in text
    assert "| vtab/dtd | missing | 65.8 | - |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 7}  # the tasks' table, the groups'


def test_total_parameters_are_held_against_the_published_ones_of_the_same_tasks_only(sweep):
    *most, last = [sweep("vpt-deep", name, 0.8) for name in TASKS]
    for folders, cell in (([*most, last], "+0.06"), ([*most, sweep("vpt-deep", None, 0.8)], "-")):
        text = format_table(*read_entries(folders), "markdown")
        assert "| vpt-deep | 1.24× of 24 tasks |" in text and f"| difference | {cell} |" in text


def test_csv_has_a_line_for_each_task_and_group(sweep):
    entries, notes = read_entries([sweep("vpt-deep", "vtab/cifar", 0.80, 0.82)])
    task, group = csv.DictReader(io.StringIO(format_table(entries, notes, "csv")))
    assert (task["of"], float(task["accuracy"]), float(task["difference"])) == ("vtab/cifar", 81, 2.2)
    assert (group["of"], group["tasks"], group["wins"]) == ("natural", "1", "1")
    assert group["difference"] == "2.2"


def test_latex_is_escaped_and_every_row_has_all_columns(sweep):
    entries, notes = read_entries([sweep("vpt-deep", "vtab/oxford_iiit_pet", 0.80, 0.82)])
    text = format_table(entries, notes, "latex")
    assert (
        r"oxford\_iiit\_pet" in text
        and r"$\pm$" in text
        and "%" not in text.replace(r"\%", "").partition("\n")[2]
    )
    for name in ("toprule", "midrule", "bottomrule"):
        assert text.count("\\" + name) == 2
    for tabular in text.split(r"\begin{tabular}{")[1:]:
        columns = len(tabular.partition("}")[0])
        lines = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert {line.count(" & ") + 1 for line in lines} == {columns}


def test_differences_in_latex_have_a_minus_and_not_a_hyphen(sweep):
    text = format_table(*read_entries([sweep("vpt-deep", "vtab/cifar", 0.70)]), "latex")
    assert "$-8.80$" in text and "& -8.80" not in text


def test_only_methods_with_published_numbers_have_columns_for_them(sweep):
    folders = [sweep("vpt-deep", "vtab/cifar", 0.80), sweep("lora", "vtab/cifar", 0.81)]
    text = format_table(*read_entries(folders), "markdown")
    assert "| task | vpt-deep | published | difference | lora |\n" in text
    assert "| vtab/cifar | 80.00 | 78.8 | +1.20 | 81.00 |\n" in text
    assert text.count("| published | 1.18× of 24 tasks") == text.count("| published | ") - 1 == 1


def test_csv_has_the_backbone_and_stored_parameters_in_columns(sweep):
    folders = [sweep("linear", "vtab/cifar", 0.8, backbone=name) for name in ("mae_vitb16", BACKBONE)]
    rows = list(csv.DictReader(io.StringIO(format_table(*read_entries(folders), "csv"))))
    assert {row["method"] for row in rows} == {"linear"}
    assert [(row["backbone"], row["of"], row["stored_parameters"]) for row in rows] == [
        ("mae_vitb16", "vtab/cifar", "10"),
        ("mae_vitb16", "natural", ""),
        (BACKBONE, "vtab/cifar", "10"),
        (BACKBONE, "natural", ""),
    ]


def test_names_that_mean_something_to_latex_and_markdown_are_escaped(run):
    folder = run("run", seed=1, method="linear", test_accuracy=0.5)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "task": None, "data": "a|b$c^d\\e{f}\ng"}))
    found = read_entries([folder])
    assert r"a|b\$c\^{}d\textbackslash{}e\{f\}" in format_table(*found, "latex")
    assert r"| a\|b$c^d\e{f} g |" in format_table(*found, "markdown")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no mapping"),
        ('{"kind": "sweep", "finished": true}', "lacks final, best, settings"),
        ('{"val_accuracy": 0.5}', "lacks test_accuracy"),
    ],
)
def test_results_that_were_changed_are_named(run, text, reason):
    path = run("run", seed=1, method="linear", test_accuracy=0.5) / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as raised:
        read_entries([path.parent])
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("final", [7, {"mean": "x"}, {"mean": 0.5}])
def test_results_of_another_form_are_named(sweep, final):
    path = sweep("linear", "vtab/cifar", 0.5) / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "final": final}))
    with pytest.raises(ValueError, match=f"{path.parent} holds files that were changed"):
        read_entries([path.parent])


def test_sweep_with_a_setting_that_there_is_not_is_named(sweep):
    folder = sweep("linear", "vtab/cifar", 0.5, newer=1)
    with pytest.raises(ValueError, match=f"{folder / 'results.json'}: unknown setting 'newer'"):
        read_entries([folder])


def test_many_runs_hold_the_numbers_of_their_images_once(run):
    reader = entries._Reader()
    for seed in (1, 2):
        folder = run(f"run-{seed}", seed=seed, method="linear", test_accuracy=0.5)
        data = {"classes": CLASSES, "train": {"per_class": [2, 3]}, "val": {"per_class": [1, 1]}}
        (folder / "run.json").write_text(json.dumps({"parameters": {}, "data": data}))
        reader.read(folder)
    ((one, other),) = reader._runs.values()
    assert one.images_by_class is other.images_by_class and one.images_by_class == (3, 4)


def test_place_that_no_file_can_be_written_to_is_refused(command, sweep, tmp_path):
    folder = sweep("linear", "vtab/cifar", 0.5)
    for place, reason in (
        (tmp_path, "a folder; it must be a file"),
        (tmp_path / "no" / "x.md", "is no folder"),
    ):
        result = command("table", folder, "--out", place)
        assert result.exit_code == 2 and f"out is {place}" in result.stderr and reason in result.stderr


def test_table_command_writes_a_file(command, sweep, tmp_path):
    folder = sweep("linear", "vtab/cifar", 0.5)
    result = command("table", folder, "--format", "csv", "--out", tmp_path / "table.csv")
    assert result.exit_code == 0 and result.output == ""
    assert (tmp_path / "table.csv").read_text().startswith("method,backbone,of,accuracy")


def test_command_that_writes_a_file_removes_what_a_killed_one_left_of_it(command, sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".table.csv.abcd_123.csv").touch()
    folder = sweep("linear", "vtab/cifar", 0.5)
    command("table", folder, "--format", "csv", "--out", tmp_path / "out" / "table.csv")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.csv"]


def test_unknown_format_is_refused(sweep):
    with pytest.raises(ValueError, match="format is 'html'; it must be one of markdown, csv, latex"):
        format_table(*read_entries([sweep("full", "vtab/cifar", 0.7)]), "html")


def test_backbone_without_weights_is_held_against_nothing_published(sweep):
    entries, notes = read_entries([sweep("vpt-deep", "vtab/cifar", 0.9, pretrained=False)])
    (row,), _ = make_rows(entries)
    natural = row.means["natural"]
    assert (natural.published, natural.wins, row.published_accuracies) == (None, None, {})
    (note,) = notes
    assert f"vpt-deep on vtab/cifar: {BACKBONE} had no weights" in note


@pytest.mark.parametrize("part", [{"shots": 4}, {"train_fraction": 0.5}], ids=str)
def test_runs_on_a_part_of_the_images_are_held_against_nothing_published(sweep, part):
    entries, notes = read_entries([sweep("vpt-deep", "vtab/cifar", 0.9, **part)])
    ((row,), more) = make_rows(entries)
    natural = row.means["natural"]
    assert (natural.published, natural.wins, row.published_accuracies) == (None, None, {})
    assert notes == [
        "vpt-deep on vtab/cifar: trained on a part of the images; it is held against nothing published"
    ]
    assert more == []  # nor is full fine-tuning as published


def test_runs_on_a_part_of_the_images_win_against_own_runs_of_full_alone(sweep):
    part = [sweep("vpt-deep", "vtab/cifar", 0.9, shots=4), sweep("linear", "vtab/cifar", 0.9)]
    deep, linear = make_rows(read_entries(part)[0])[0]
    assert (deep.means["natural"].wins, linear.means["natural"].wins) == (None, 1)
    part.append(sweep("full", "vtab/cifar", 0.8, shots=4))
    assert make_rows(read_entries(part)[0])[0][0].means["natural"].wins == 1


def test_wins_against_published_numbers_are_counted_among_the_comparable_tasks(sweep):
    part = sweep("vpt-deep", "vtab/cifar", 0.9, shots=4)
    folders = [part, sweep("vpt-deep", "vtab/dtd", 0.7), sweep("vpt-deep", "vtab/svhn", 0.8)]
    entries, notes = read_entries(folders)
    ((row,), _) = make_rows(entries)
    natural = row.means["natural"]
    assert (natural.wins, natural.compared, natural.tasks) == (1, 2, 3)  # better than 64.3, not than 87.4
    text = format_table(entries, notes, "markdown")
    assert "| 80.00 (1 of 2), 3 of 7 tasks |" in text and "where not all can" in text
    # The first task is not comparable; the others' published numbers are shown all the same.
    assert "| vtab/cifar | 90.00 | - | - |" in text and "| vtab/dtd | 70.00 | 65.8 | +4.20 |" in text
    *_, group = csv.DictReader(io.StringIO(format_table(entries, notes, "csv")))
    assert (group["wins"], group["compared"]) == ("1", "2")


def test_wins_of_all_tasks_do_not_say_of_how_many(sweep):
    folders = [sweep("vpt-deep", name, 0.9) for name in NATURAL[:2]]
    text = format_table(*read_entries(folders), "markdown")
    assert "(2), 2 of 7 tasks" in text and "where not all can" not in text


def test_published_total_is_shown_where_no_mean_was_published(sweep):
    text = format_table(*read_entries([sweep("vpt-deep", "birds", 0.5)]), "markdown")
    assert "| published | 1.18× of 24 tasks | - |" in text


def test_of_a_backbone_that_nothing_was_published_of_no_part_is_said_to_be_held_against_nothing(sweep):
    folder = sweep("vpt-deep", "vtab/cifar", 0.9, backbone="vit_tiny_patch16_224", shots=4)
    assert read_entries([folder])[1] == []


def test_of_data_that_are_no_task_nothing_is_said_of_what_was_published(sweep):
    assert read_entries([sweep("vpt-deep", "birds", 0.9, pretrained=False)])[1] == []


def test_backbone_with_weights_of_a_file_is_held_against_what_was_published(sweep):
    folder = sweep("vpt-deep", "vtab/cifar", 0.9, pretrained=False, checkpoint="imagenet21k.npz")
    assert make_rows(read_entries([folder])[0])[0][0].means["natural"].published == 78.8


def test_searched_method_and_backbone_are_those_of_the_best_trial(sweep):
    folder = sweep("linear", "birds", 0.5)
    results = json.loads((folder / "results.json").read_text())
    results["best"] = {"params": {"method": "bias", "backbone": "x"}}
    (folder / "results.json").write_text(json.dumps(results))
    ((entry,), _) = read_entries([folder])
    assert (entry.method, entry.backbone) == ("bias", "x")


@pytest.fixture
def run_on(run):
    """Writes a finished run on a folder of images that are counted by class."""

    def write(name, counts, data="images", **settings):
        folder = run(name, method="linear", test_accuracy=0.5, **settings)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "task": None, "data": data}))
        facts = json.loads((folder / "run.json").read_text())
        facts["data"] = {"classes": list(counts), "train": {"per_class": list(counts.values())}, "val": None}
        (folder / "run.json").write_text(json.dumps(facts))
        return folder

    return write


def test_runs_on_data_of_one_name_and_other_classes_are_refused(run_on):
    folders = [run_on("a", {"cat": 3, "dog": 3}, seed=1), run_on("b", {"car": 3, "van": 3}, seed=2)]
    with pytest.raises(
        ValueError, match=r"a and .*b are of data that are called images and have other classes"
    ):
        read_entries(folders)


def test_runs_on_other_numbers_of_images_are_not_taken_together(run_on):
    folders = [run_on("a", {"cat": 3, "dog": 3}, seed=1), run_on("b", {"cat": 3, "dog": 4}, seed=2)]
    with pytest.raises(ValueError, match="linear on images: the runs are of other images"):
        read_entries(folders)


@pytest.mark.parametrize("part", [{"shots": 4}, {"train_fraction": 0.5}], ids=str)
def test_runs_that_drew_other_numbers_of_readable_images_are_taken_together(run_on, part):
    numbers = {1: {"cat": 4, "dog": 3}, 2: {"cat": 3, "dog": 4}}  # one of each class cannot be read
    folders = [run_on(f"{seed}", counts, seed=seed, **part) for seed, counts in numbers.items()]
    assert [entry.runs for entry in read_entries(folders)[0]] == [2]


def test_sweep_on_data_of_one_name_and_other_classes_is_refused(run_on, sweep):
    folder = sweep("bias", "images", 0.5)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "classes": ["car", "van"]}))
    with pytest.raises(ValueError, match="called images and have other classes"):
        read_entries([run_on("a", {"cat": 3, "dog": 3}), folder])


def test_working_directory_as_data_has_its_folders_name(run_on, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ((entry,), _) = read_entries([run_on("a", {"cat": 3, "dog": 3}, data=".")])
    assert entry.task == tmp_path.name


def test_ablations_are_left_out_and_said_so(sweep, tmp_path):
    folder = sweep("linear", "vtab/cifar", 0.5)
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "results.json").write_text(json.dumps({"ablation": "length", "points": []}))
    entries, notes = read_entries([folder, tmp_path / "ablation"])
    assert len(entries) == 1
    assert notes == [f"{tmp_path / 'ablation'}: an ablation, whose points are sweeps below it; left out"]
