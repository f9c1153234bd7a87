"""The vpt-fast command, as a user meets it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image
from run_fixtures import train_arguments
from typer.testing import CliRunner

from vpt_fast.__main__ import main
from vpt_fast.commands import cli
from vpt_fast.commands.cli import app
from vpt_fast.commands.flags import LastingConsole, one_line_errors
from vpt_fast.data import decode
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.training import inference, loop, report
from vpt_fast.training.inference import LoadedRun, require_same_classes
from vpt_fast.training.run import Labels, RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory, color_images):
    """A finished run on the color images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = CliRunner().invoke(app, train_arguments(color_images, out))
    assert result.exit_code == 0, result.output
    return out


def test_train_says_what_where_and_at_what_cost(command, color_images, tmp_path):
    result = command(*train_arguments(color_images, tmp_path / "run", epochs=1))
    assert result.exit_code == 0
    for text in (
        "vpt-deep: trains 291 parameters",  # 2 blocks × 3 prompts × 32, and a head of 33 × 3
        "3 classes, train 27, val 9, test 6 images",
        "1 epoch of 4 steps, batch 8",
        "expected",
        "cpu",
        str(tmp_path / "run"),
    ):
        assert text in result.output


@pytest.mark.parametrize("kernels", [True, False])
def test_train_says_that_kernels_are_compiled_if_it_runs_any(
    kernels, command, color_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(FrozenBlock, "runs_kernels", lambda self, device: kernels)
    result = command(*train_arguments(color_images, tmp_path / "run", epochs=1))
    assert ("first steps wait for kernels that are not compiled yet" in result.output) == kernels


def test_names_with_brackets_and_long_paths_are_printed_as_they_are(command, images, tmp_path):
    data = images.rename(images.with_name("colors[v2]"))
    out = tmp_path / ("long-" * 12) / "run[v2]"
    result = command(*train_arguments(data, out, epochs=1))
    assert "colors[v2]: 3 classes" in "".join(line.strip() for line in result.stdout.splitlines())
    assert result.stdout.splitlines()[-1].endswith(f"after 1 epoch; run folder {out}")
    before_training = result.stdout.partition("epoch 1/1")[0]
    assert str(out) in "".join(line.strip() for line in before_training.splitlines())


def test_an_epoch_is_one_line(command, color_images, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    result = command(*train_arguments(color_images, tmp_path / "run", epochs=2))
    lines = [line for line in result.stdout.splitlines() if "images/s" in line]
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]]


def test_run_folder_holds_config_prompts_metrics_and_curves(run):
    folder = RunFolder(run)
    assert folder.read().recipe.precision == "fp32"
    assert [row["epoch"] for row in folder.read().metrics] == [0, 1, 2, 3, 4, 5]
    assert Labels.read(folder.prompts).classes == ("blue", "green", "red")
    with Image.open(folder.curves) as picture:
        assert picture.format == "PNG"


def test_finished_run_says_so(command, run, color_images):
    result = command(*train_arguments(color_images, run))
    assert result.exit_code == 0 and "holds this run, trained to its end" in result.output


def test_eval_counts_each_class(command, run, color_images):
    result = command("eval", run, "--data", color_images, "--split", "test", "--json")
    found = json.loads(result.stdout)
    assert found["split"] == "test" and found["images"] == 6
    assert {name: entry["images"] for name, entry in found["per_class"].items()} == {
        "blue": 2,
        "green": 2,
        "red": 2,
    }
    assert found["accuracy"] == pytest.approx(
        sum(entry["accuracy"] for entry in found["per_class"].values()) / 3
    )


def test_eval_on_val_repeats_the_accuracy_of_training(command, run, color_images):
    found = json.loads(command("eval", run, "--data", color_images, "--json").stdout)
    assert found["accuracy"] == RunFolder(run).read().metrics[-1]["val_accuracy"]


def test_eval_in_the_precision_of_training_repeats_its_loss(command, color_images, tmp_path):
    trained = command(*train_arguments(color_images, tmp_path / "run", epochs=2, precision="bf16"))
    assert trained.exit_code == 0, trained.output
    losses = {
        precision: json.loads(
            command(
                "eval", tmp_path / "run", "--data", color_images, "--precision", precision, "--json"
            ).stdout
        )["loss"]
        for precision in ("bf16", "fp32")
    }
    expected = RunFolder(tmp_path / "run").read().metrics[-1]["val_loss"]
    assert losses["bf16"] == pytest.approx(expected, rel=1e-6)
    assert losses["fp32"] != pytest.approx(expected, rel=1e-6)


def test_eval_takes_the_prompts_folder_alone(command, run, color_images, tmp_path):
    moved = shutil.copytree(run / "prompts", tmp_path / "prompts")
    assert command("eval", moved, "--data", color_images).exit_code == 0


def test_eval_prints_a_table(command, run, color_images):
    output = command("eval", run, "--data", color_images).stdout
    assert "green" in output and "val accuracy" in output


def test_predict_agrees_with_eval(command, run, color_images):
    answers = json.loads(command("predict", run, color_images / "val", "--json").stdout)
    right = sum(answer["predictions"][0]["class"] == answer["image"].split("/")[-2] for answer in answers)
    assert right / len(answers) == RunFolder(run).read().metrics[-1]["val_accuracy"]


def test_predict_gives_the_k_most_probable_classes(command, run, color_images):
    image = color_images / "test" / "red" / "0.png"
    (answer,) = json.loads(command("predict", run, image, "--top-k", 2, "--json").stdout)
    first, second = (guess["probability"] for guess in answer["predictions"])
    assert 1 >= first >= second >= 0


def test_predict_gives_all_classes_if_asked_for_more(command, run, color_images):
    image = color_images / "test" / "red" / "0.png"
    (answer,) = json.loads(command("predict", run, image, "--top-k", 5, "--json").stdout)
    assert sorted(guess["class"] for guess in answer["predictions"]) == ["blue", "green", "red"]


def test_predict_takes_patterns(command, run, color_images):
    answers = json.loads(command("predict", run, f"{color_images}/test/*/1.png", "--json").stdout)
    assert len(answers) == 3


def test_predict_decodes_several_images_at_once(command, run, color_images, monkeypatch):
    two_at_once = threading.Barrier(2, timeout=20)

    def load(*arguments):
        two_at_once.wait()
        return decode.load_image(*arguments)

    monkeypatch.setattr(inference, "load_image", load)
    monkeypatch.setattr(decode, "default_workers", lambda: 2)
    assert command("predict", run, color_images / "test").exit_code == 0  # 6 images


def test_predictions_do_not_depend_on_the_batches_they_are_made_in(run, color_images, tmp_path, monkeypatch):
    (tmp_path / "broken.png").touch()
    paths = sorted(color_images.rglob("val/*/*.png"))
    for place in (2, 4, 5, 6, 7):  # the second of three batches has no image that can be read
        paths.insert(place, tmp_path / "broken.png")
    loaded = LoadedRun.load(run)
    whole = list(inference.predict_images(loaded, paths, 1))
    monkeypatch.setattr(inference, "FORWARD_BATCH", 4)
    parts = list(inference.predict_images(loaded, paths, 1))
    assert [answer["image"] for answer in whole] == [str(path) for path in paths]
    assert [i for i, answer in enumerate(whole) if "error" in answer] == [2, 4, 5, 6, 7]
    for answer, other in zip(whole, parts, strict=True):
        guesses, others = (each.pop("predictions", [{"probability": 0}]) for each in (answer, other))
        assert guesses[0].pop("probability") == pytest.approx(others[0].pop("probability"))
        assert (answer, guesses) == (other, others)


def test_predict_shows_its_progress_image_by_image(command, run, color_images, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress_bar(console, what, total):
        assert console.stderr
        shown.append((what, total))
        yield shown.append

    monkeypatch.setattr(report, "progress_bar", progress_bar)
    answers = json.loads(command("predict", run, color_images / "test", "--json").stdout)
    assert shown == [("predicting", 6), *[1] * 6] and len(answers) == 6


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_predict_that_is_stopped_prints_what_it_has(name, command, run, color_images, monkeypatch):
    @contextlib.contextmanager
    def progress_bar(console, what, total):
        counts = itertools.count(1)
        yield lambda _: signal.raise_signal(getattr(signal, name)) if next(counts) == 4 else None

    whole = json.loads(command("predict", run, color_images / "test", "--json").stdout)
    monkeypatch.setattr(report, "progress_bar", progress_bar)
    result = command("predict", run, color_images / "test", "--json")
    assert json.loads(result.stdout) == whole[:4]
    assert (result.exit_code, result.stderr) == (130, "error: stopped after 4 of 6 images\n")


def test_predict_that_is_interrupted_ends_its_decoding_threads(run, color_images, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    loaded = LoadedRun.load(run)
    monkeypatch.setattr(loaded.model, "forward", interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as raised:
        list(inference.predict_images(loaded, sorted(color_images.rglob("*.png")), 1))
    assert raised.tb and set(threading.enumerate()) <= before


def test_predict_reports_unreadable_files_and_classifies_the_rest(command, run, color_images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = color_images / "test" / "red" / "0.png"
    result = command("predict", run, tmp_path / "broken.png", good, tmp_path / "missing.png")
    assert result.exit_code == 1
    assert "broken.png" in result.stderr and "missing.png" in result.stderr
    assert "0.png" in result.stdout
    assert command("predict", run, tmp_path / "broken.png").stdout == ""  # no table of nothing


def test_predict_names_missing_files_first_and_once(command, run, color_images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [tmp_path / "broken.png", color_images / "test" / "red" / "0.png", tmp_path / "missing.png"]
    result = command("predict", run, *images, "--json")
    named = [line.partition(".png")[0].rpartition("/")[2] for line in result.stderr.splitlines()]
    assert named == ["missing", "broken"]
    assert [answer["image"] for answer in json.loads(result.stdout)] == [str(image) for image in images]


def test_predict_of_missing_files_alone_answers_for_each(command, run, tmp_path):
    result = command("predict", run, tmp_path / "b.png", tmp_path / "a.png", "--json")
    reasons = {answer["image"]: answer["error"] for answer in json.loads(result.stdout)}
    assert result.exit_code == 1 and result.stderr.count("No such file") == 2
    assert list(reasons.items()) == [
        (str(tmp_path / name), "No such file or directory") for name in ("b.png", "a.png")
    ]


def test_predict_of_a_folder_leaves_out_what_is_hidden_as_training_does(command, run, images):
    (images / "val" / "._0.png").write_bytes(b"of a Mac")
    shutil.copytree(images / "val" / "red", images / "val" / ".thumbnails")
    result = command("predict", run, images / "val", "--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == 9


def test_predict_reports_an_image_too_thin_to_be_resized_and_classifies_the_rest(
    command, color_images, tmp_path
):
    run = tmp_path / "run"
    command(*train_arguments(color_images, run, epochs=1, resize="shortest"))
    Image.new("RGB", (1, 1_000_000)).save(tmp_path / "thin.png")
    result = command("predict", run, tmp_path / "thin.png", color_images / "val" / "red" / "0.png", "--json")
    assert result.exit_code == 1 and "too thin to keep its shape" in result.stderr
    assert [len(answer.get("predictions", [])) for answer in json.loads(result.stdout)] == [0, 1]


@pytest.mark.parametrize("arguments", [("predict", ""), ("eval", "--data=")])
def test_an_empty_name_is_not_the_working_directory(command, run, images, monkeypatch, arguments):
    monkeypatch.chdir(images)  # it holds what an empty name must not stand for
    name, *rest = arguments
    result = command(name, run, *rest)
    assert result.exit_code == 2 and "''" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--data=x", "--backbone=y"),
        ("sweep", "--data=x", "--backbone=y"),
        ("ablate", "length", "--data=x", "--backbone=y"),
        ("table", "x"),
        ("plot", "tsne", "x", "--data=x"),
        ("predict", "x", "x"),
        ("demo",),
    ],
)
def test_an_empty_out_is_not_the_working_directory(command, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments, "--out", "")
    assert result.exit_code == 2 and "--out" in result.stderr and "it is ''" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "/folder"])
@pytest.mark.parametrize(
    "arguments",
    ["demo", "predict . {file}", "data prepare --task cifar --from .", "import-prompts {file} --backbone x"],
)
def test_folder_that_is_to_be_written_where_a_file_is_is_refused_by_name(command, tmp_path, arguments, below):
    (tmp_path / "file").touch()
    result = command(*arguments.format(file=tmp_path / "file").split(), "--out", f"{tmp_path}/file{below}")
    assert result.exit_code == 2
    assert f"out is {tmp_path}/file{below}, and {tmp_path}/file is no folder" in result.stderr


def test_help_of_a_sweeps_trials_names_the_samplers_that_need_it(command):
    text = command("sweep", "--help").stdout
    assert "required for tpe and random" in " ".join(text.split()) and "all of the grid" not in text


def test_predict_of_a_folder_has_what_is_below_linked_folders(command, run, images):
    (images / "links").mkdir()
    (images / "links" / "val").symlink_to(images / "val")
    assert len(json.loads(command("predict", run, images / "links", "--json").stdout)) == 9


def test_predict_of_a_folder_names_links_that_lead_nowhere(command, run, images):
    (images / "val" / "gone.png").symlink_to(images / "nowhere.png")
    result = command("predict", run, images / "val", "--json")
    assert result.exit_code == 1 and "gone.png" in result.stderr


@pytest.fixture
def without_prompts(run, tmp_path) -> Path:
    """A finished run whose prompts and checkpoint are gone."""
    folder = RunFolder(Path(shutil.copytree(run, tmp_path / "without")))
    shutil.rmtree(folder.prompts)
    folder.checkpoint.unlink()
    return folder.path


def test_predict_by_a_finished_run_without_prompts_says_that_they_are_gone(
    command, without_prompts, color_images
):
    result = command("predict", without_prompts, color_images)
    assert result.exit_code == 2 and "is finished, but its prompts are gone" in result.stderr


def test_train_of_a_finished_run_without_prompts_says_that_they_are_gone(
    command, without_prompts, color_images
):
    output = " ".join(command(*train_arguments(color_images, without_prompts)).output.split())
    assert "its prompts are gone" in output and "holds this run, trained to its end" in output


@pytest.mark.parametrize("name", ["model.safetensors", "labels.json", "config.json"])
def test_train_of_a_finished_run_without_its_checkpoint_says_that_its_prompts_are_damaged(
    command, run, color_images, tmp_path, name
):
    folder = RunFolder(Path(shutil.copytree(run, tmp_path / "damaged")))
    folder.checkpoint.unlink()
    same = train_arguments(color_images, folder.path)
    assert "damaged" not in command(*same).stdout.replace(str(folder.path), "")
    (folder.prompts / name).write_bytes((folder.prompts / name).read_bytes()[:-20])
    assert "its prompts are gone or damaged" in command(*same).stdout


def test_going_on_removes_what_a_killed_process_left(command, run, color_images, tmp_path):
    folder = RunFolder(Path(shutil.copytree(run, tmp_path / "killed")))
    left = [
        folder.path / ".curves.png.a1b2_3d4.png",
        folder.prompts / ".model.safetensors.abcdefgh.safetensors",
    ]
    for path in left:
        path.write_bytes(b"")
    own = folder.path / ".mine.png.a1b2_3d4.png"
    own.write_bytes(b"")
    command(*train_arguments(color_images, folder.path))
    assert own.exists() and not any(path.exists() for path in left)


def test_predict_of_a_name_that_is_not_utf8_is_refused(command, run, tmp_path):
    (tmp_path / "caf\udce9.png").write_bytes(b"")
    result = command("predict", run, tmp_path, "--json")
    assert result.exit_code == 2 and "caf\\udce9.png': found a name that is not UTF-8" in result.stderr


def test_predict_cuts_no_name_short_where_the_output_is_narrow(command, run, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = shutil.copy(images / "val" / "red" / "0.png", images / f"{'long' * 20}.png")
    result = command("predict", run, path)
    shown = "".join(line.split("│")[1].strip() for line in result.stdout.splitlines() if "│" in line)
    assert result.exit_code == 0 and shown.endswith(str(path))


def test_eval_names_an_image_that_it_leaves_out_in_one_piece(command, run, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    broken = images / "val" / "red" / "broken.png"
    broken.touch()
    assert str(broken) in command("eval", run, "--data", images).stdout


def test_table_in_a_pipe_breaks_no_name(command, run, images, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    path = shutil.copy(images / "val" / "red" / "0.png", images / f"{'long' * 40}.png")
    assert str(path) in command("predict", run, path).stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_to_a_full_disk_ends_in_one_line(unbuffered):
    code = "import sys; from vpt_fast.commands.cli import main; sys.argv[1:] = ['--version']; main()"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"


def test_letters_that_the_output_s_encoding_lacks_are_escaped_as_in_json(monkeypatch):
    text = "32×32 Äpfel 🍎"
    monkeypatch.setattr(cli, "app", lambda: typer.echo(json.dumps(text, ensure_ascii=False)))
    with io.TextIOWrapper(io.BytesIO(), encoding="latin-1") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        cli.main()
        output.flush()
        written = output.buffer.getvalue()
    assert json.loads(written.decode("latin-1")) == text


def test_a_very_large_image_is_named_in_one_warning(tmp_path, monkeypatch):
    Image.new("L", (12, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(cli, "app", lambda: decode.decode_image(tmp_path / "large.png"))
    with pytest.warns(Image.DecompressionBombWarning) as warned:
        cli.main()
    (message,) = (str(each.message) for each in warned)
    assert "large.png: all its 12×10 pixels are decoded" in message


def test_predict_takes_no_name_for_an_emoji(command, run, images):
    good = (images / "val" / "red" / "0.png").rename(images / "a:dog:.png")
    broken = images / "b:100:.png"
    broken.touch()
    result = command("predict", run, good, broken)
    assert "a:dog:.png" in result.stdout and "b:100:.png" in result.stderr


def test_predict_of_an_empty_folder_is_refused(command, run, tmp_path):
    result = command("predict", run, tmp_path)
    assert result.exit_code == 2 and "there are no images" in result.stderr


def test_another_backbone_is_refused(command, run, color_images, tmp_path):
    prompts = shutil.copytree(run / "prompts", tmp_path / "prompts")
    config = json.loads((prompts / "config.json").read_text())
    config["backbone"]["fingerprint"] = "0" * 64
    (prompts / "config.json").write_text(json.dumps(config))
    result = command("eval", prompts, "--data", color_images)
    assert result.exit_code == 2 and "fingerprint" in result.stderr


def test_run_on_a_backbone_that_its_seed_drew_is_evaluated(command, color_images, tmp_path, monkeypatch):
    flags = {"backbone": "test_vit", "backbone-arg": "img_size=32", "seed": 7, "epochs": 1}
    trained = command(*train_arguments(color_images, tmp_path / "run", **flags), "--no-pretrained")
    assert trained.exit_code == 0, trained.output
    torch.manual_seed(1)
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU is seeded"))
    result = command("eval", tmp_path / "run", "--data", color_images, "--json")
    assert result.exit_code == 0, result.stderr
    known = json.loads((tmp_path / "run" / "results.json").read_text())["val_accuracy"]
    assert json.loads(result.stdout)["accuracy"] == known
    assert torch.equal(torch.get_rng_state(), state)  # the caller's draws are its own


def test_run_trained_with_kernels_by_name_is_evaluated_where_these_are_not(
    command, run, color_images, tmp_path
):
    prompts = shutil.copytree(run / "prompts", tmp_path / "prompts")
    config = json.loads((prompts / "config.json").read_text())
    config["options"] |= {"backend": "triton", "attention": "sdpa_flash"}  # on CUDA alone
    (prompts / "config.json").write_text(json.dumps(config))
    result = command("eval", prompts, "--data", color_images, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == command("eval", run, "--data", color_images, "--json", "--device", "cpu").stdout


def test_eval_on_other_classes_is_refused(command, run, images):
    for split in ("train", "val", "test"):
        (images / split / "red").rename(images / split / "rot")
    result = command("eval", run, "--data", images)
    assert result.exit_code == 2 and "other classes" in result.stderr and "rot" in result.stderr


def test_eval_on_test_images_that_the_data_do_not_have_is_refused(command, run, images):
    shutil.rmtree(images / "test")
    result = command("eval", run, "--data", images, "--split", "test")
    assert result.exit_code == 2 and f"{images}: has no test split" in result.stderr


def test_eval_on_the_classes_in_another_order_is_refused(run):
    labels = Labels.read(run / "prompts")
    with pytest.raises(ValueError, match="another order: class 0 is red there, and blue in the run"):
        require_same_classes("shards", labels.classes[::-1], labels)


def test_run_whose_prompts_are_gone_says_how_to_have_them_again(command, run, color_images, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("prompts"))
    result = command("eval", moved, "--data", color_images)
    assert result.exit_code == 2
    assert f"{moved / 'prompts'} is gone; the command that trained the run writes it again" in result.stderr


def test_segmenters_flags_are_refused_with_a_classification_run(command, run, color_images, tmp_path):
    image = color_images / "test" / "red" / "0.png"
    for arguments, message in (
        (["eval", run, "--data", color_images, "--multi-scale"], "multi_scale"),
        (["predict", run, image, "--out", tmp_path / "masks"], "out"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2 and f"{message}: a classification run has no such" in result.stderr
    assert not (tmp_path / "masks").exists()


def test_folder_with_nothing_but_a_run_s_prompts_is_a_run(run, tmp_path):
    shutil.copytree(run / "prompts", tmp_path / "run" / "prompts")
    assert LoadedRun.load(tmp_path / "run").labels == Labels.read(run / "prompts")


def test_folder_that_is_no_run_is_refused(command, color_images, tmp_path):
    result = command("eval", tmp_path, "--data", color_images)
    assert result.exit_code == 2
    assert f"{tmp_path} is neither a run folder nor its prompts folder" in result.stderr
    (tmp_path / "sweep.yaml").touch()
    result = command("eval", tmp_path, "--data", color_images)
    assert "prompts folder; of a sweep, want one of the runs in its final/" in result.stderr


@pytest.mark.parametrize("name", ["train", "weights", "eval", "predict", "plot"])
def test_what_is_no_run_or_no_folder_is_refused_before_torch_is_imported(name, color_images, tmp_path):
    picture = color_images / "val" / "red" / "0.png"
    train = ["train", "--backbone", "test_vit", "--data"]
    arguments = {
        "train": [*train, str(picture)],
        "weights": [*train, str(color_images), "--checkpoint", "no.pth"],
        "eval": ["eval", str(tmp_path), "--data", str(color_images)],
        "predict": ["predict", str(tmp_path), str(picture)],
        "plot": ["plot", "tsne", str(tmp_path), "--data", str(color_images)],
    }[name]
    code = (
        "import sys\n"
        "from vpt_fast.__main__ import main\n"
        "sys.modules['torch'] = None  # an import of it fails\n"
        f"sys.argv = {['vpt-fast', *arguments]}\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = {"train": "a file; it must be a folder", "weights": "checkpoint is no.pth, which is no file"}
    assert ended.returncode == 2
    assert wanted.get(name, "neither a run folder nor its prompts folder") in ended.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": 7}, "labels.json cannot be read"),
        ({"preprocessing": {"image_size": 7}}, "labels.json cannot be read"),
        ({"classes": [1, 2, 3]}, "labels.json cannot be read"),
        ({"split": {"seed": None}}, "labels.json cannot be read"),
        (
            {"preprocessing": {"image_size": [64, 64]}},
            "resized to (64, 64) (labels.json) and a model for (16, 16)",
        ),
        ({"classes": ["blue", "red"]}, "names of 2 classes (labels.json) and a model of 3: its files are of"),
    ],
)
def test_labels_that_were_changed_are_named(command, run, color_images, tmp_path, change, message):
    labels = shutil.copytree(run / "prompts", tmp_path / "prompts") / "labels.json"
    values = json.loads(labels.read_text())
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    labels.write_text(json.dumps(values))
    result = command("predict", labels.parent, color_images / "val")
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("lost", ["task", "train_on"])
def test_labels_that_lack_what_the_run_was_trained_on_are_named(command, run, color_images, tmp_path, lost):
    labels = shutil.copytree(run / "prompts", tmp_path / "prompts") / "labels.json"
    values = json.loads(labels.read_text())
    del values["split"][lost]
    labels.write_text(json.dumps(values))
    result = command("eval", labels.parent, "--data", color_images)
    assert result.exit_code == 2 and "labels.json cannot be read" in result.stderr and lost in result.stderr


@pytest.mark.parametrize("names", ["classes", "images"])
def test_control_characters_in_names_do_not_reach_the_terminal(command, run, color_images, tmp_path, names):
    evil = "\x1b]0;title\x07\x9b31m"
    prompts = shutil.copytree(run / "prompts", tmp_path / "prompts")
    photo = next((color_images / "val").rglob("*.*"))
    if names == "images":
        photo = tmp_path / f"{evil}.png"
        photo.write_bytes(b"no image")
    else:
        labels = json.loads((prompts / "labels.json").read_text())
        labels["classes"] = [f"{evil}{name}" for name in labels["classes"]]
        (prompts / "labels.json").write_text(json.dumps(labels))
    result = command("predict", prompts, photo)
    assert r"\x1b]0;title\x07\x9b31m" in result.output
    assert not {"\x1b", "\x07", "\x9b"} & set(result.output)


def only(folder, keep) -> None:
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path)


def no_images(root):
    shutil.rmtree(root / "train")
    (root / "train" / "red").mkdir(parents=True)


def one_class(root):
    for split in ("train", "val", "test"):
        only(root / split, "red")


def class_missing_from_val(root):
    shutil.rmtree(root / "val" / "red")


def class_all_broken(root):
    for path in (root / "train" / "red").iterdir():
        path.write_bytes(b"no image")


def nothing_wrong(root):
    pass


@pytest.mark.parametrize(
    "spoil, flags, message",
    [
        (no_images, {}, "no images"),
        (one_class, {}, "one class"),
        (class_missing_from_val, {}, "red"),
        (class_all_broken, {}, "no image of red"),
        (nothing_wrong, {"data": "nowhere"}, "nowhere"),
        (nothing_wrong, {"data": None}, "data is not given"),
        (nothing_wrong, {"num-prompts": 0}, "num_prompts is 0"),
        (nothing_wrong, {"backbone-arg": "img_size=18"}, "img_size"),
        (nothing_wrong, {"backbone": "vit_bass_patch16_224"}, "vit_base_patch16_224"),
        (nothing_wrong, {"device": "tpu9"}, "device is 'tpu9'"),
        (nothing_wrong, {"out": "/dev/null/run"}, "out is /dev/null/run, which cannot be written"),
        (nothing_wrong, {"epochs": 0}, "epochs is 0"),
        (nothing_wrong, {"config": "missing.yaml"}, "missing.yaml does not exist"),
        (nothing_wrong, {"prompt-layers": "5"}, "prompt_layers"),
        (nothing_wrong, {"pool": "cls", "backbone-arg": "class_token=false"}, "class_token=False"),
        (nothing_wrong, {"backbone-arg": "heads=3"}, "heads=3), which cannot be built"),
        (nothing_wrong, {"backbone-arg": "patch_size=0"}, "patch_size=0), which cannot be built"),
        (nothing_wrong, {"backbone-arg": "img_size=*x"}, "backbone_arg is 'img_size=*x'"),
        (nothing_wrong, {"config": "/"}, "configuration file / cannot be read"),
        (nothing_wrong, {"backbone": "test_vit4"}, "timm has no published weights of test_vit4"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_bad_input_is_one_line_before_anything_is_made(command, images, tmp_path, spoil, flags, message):
    spoil(images)
    result = command(*train_arguments(**{"images": images, "out": tmp_path / "run", **flags}))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_truncated_image_is_left_out_and_named(command, images, tmp_path):
    path = images / "train" / "red" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    result = command(*train_arguments(images, tmp_path / "run", epochs=1))
    assert result.exit_code == 0
    output = result.output
    assert "1 image cannot be read" in output and "red/0.png" in output and "train 26" in output


def test_diverging_training_fails_with_epoch_and_learning_rate(command, color_images, tmp_path):
    flags = {"base-lr": 1e30, "warmup-epochs": 1, "epochs": 3}
    result = command(*train_arguments(color_images, tmp_path / "run", **flags))
    assert result.exit_code == 1
    assert "in epoch 2 of 3" in result.stderr and "learning rate" in result.stderr
    assert RunFolder(tmp_path / "run").read().checkpoint.epochs_done == 1


def test_ctrl_c_while_the_commands_are_imported_ends_in_one_line(monkeypatch, capsys):
    class CtrlC:
        @staticmethod
        def find_spec(name, path, target=None):
            assert name == "vpt_fast.commands.cli"
            raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "vpt_fast.commands.cli")
    monkeypatch.setattr(sys, "meta_path", [CtrlC])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err == "error: stopped\n"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["front", "background"])
def test_interruption_in_a_finalizer_is_not_lost(capsys, handler):
    """As by SIGTERM where a shell has a job in the background ignore Ctrl-C."""

    class Finalized:
        def __del__(self):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(typer.Exit) as ended, one_line_errors(debug=False):
            Finalized()
            threading.Event().wait(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.exit_code == 130 and capsys.readouterr().err == "error: stopped\n"


def test_ctrl_c_hidden_by_another_error_is_not_lost(capsys):
    with pytest.raises(typer.Exit) as ended, one_line_errors(debug=False):
        try:
            raise KeyboardInterrupt
        finally:
            raise UnboundLocalError("as of Optuna, interrupted while it saves the end of a trial")
    assert ended.value.exit_code == 130 and capsys.readouterr().err == "error: stopped\n"


def test_ctrl_c_says_how_to_go_on(command, color_images, tmp_path, monkeypatch):
    original, steps = loop.TrainStep.__call__, []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop.TrainStep, "__call__", train_step)
    result = command(*train_arguments(color_images, tmp_path / "run"))
    assert result.exit_code == 130
    assert "Stopped after epoch 1 of 6; the same command goes on from there" in result.stdout


def test_sigterm_before_the_first_step_stops_like_ctrl_c(command, color_images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_seeded", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    result = command(*train_arguments(color_images, tmp_path / "run"))
    assert (result.exit_code, result.stderr) == (130, "error: stopped\n")


@pytest.mark.parametrize(
    "arguments", [["train"], ["sweep", "--over=base_lr=0.1", "--seeds=1"]], ids=lambda a: a[0]
)
def test_work_goes_on_to_its_end_where_nobody_reads_the_output(
    arguments, color_images, tmp_path, monkeypatch, capfd
):
    flags = ["--backbone=train_test_vit", "--method=linear", "--epochs=2", "--device=cpu"]
    reader, writer = os.pipe()
    os.close(reader)  # what `| head` does when it has its lines
    monkeypatch.chdir(tmp_path)
    with open(writer, "w") as output, monkeypatch.context() as patch:  # closed, it is flushed, as at an exit
        patch.setattr(sys, "stdout", output)
        app([*arguments, *flags, f"--data={color_images}"], standalone_mode=False)
    assert capfd.readouterr().err == ""
    (results,) = (tmp_path / "runs").glob("*/results.json")
    assert "accuracy" in results.read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "no more can be allocated"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to.\nSee also"), "CUDA out of memory. Tried to."),
    ],
)
def test_too_little_memory_is_one_line(error, said, capsys):
    with pytest.raises(typer.Exit) as ended, one_line_errors(debug=False):
        raise error
    assert (ended.value.exit_code, capsys.readouterr().err) == (1, f"error: too little memory: {said}\n")


def test_backbone_that_does_not_fit_into_memory_is_not_called_wrong(command, color_images, tmp_path):
    flags = {"backbone-arg": f"embed_dim={10**12}"}
    result = command(*train_arguments(color_images, tmp_path / "run", **flags))
    assert result.exit_code == 1 and result.stderr.startswith("error: too little memory: ")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(command, tmp_path):
    result = command("train", "--data", tmp_path / "nowhere", "--backbone", "train_test_vit", "--debug")
    assert isinstance(result.exception, ValueError)


def test_tensorboard_events_are_written_where_it_is_installed(command, color_images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert command(*train_arguments(color_images, run, epochs=3)).exit_code == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert written == [(row["epoch"], pytest.approx(row["val_loss"])) for row in rows]


def test_no_tensorboard_events_where_they_are_not_wanted(command, color_images, tmp_path):
    arguments = train_arguments(color_images, tmp_path / "run", epochs=1)
    assert command(*arguments, "--no-tensorboard").exit_code == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_tensorboard_that_is_not_installed_is_refused(command, color_images, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = command(*train_arguments(color_images, tmp_path / "run"), "--tensorboard")
    assert result.exit_code == 2 and "pip install tensorboard" in result.stderr


def test_folder_without_val_is_split_the_same_way_by_eval(command, images, tmp_path):
    settings = {"epochs": 3, "val-fraction": 0.4}
    result = command(*train_arguments(images / "train", tmp_path / "run", **settings))
    assert result.exit_code == 0, result.output
    found = json.loads(command("eval", tmp_path / "run", "--data", images / "train", "--json").stdout)
    assert found["images"] == 12
    assert found["accuracy"] == RunFolder(tmp_path / "run").read().metrics[-1]["val_accuracy"]


def test_eval_says_that_a_folder_whose_val_is_drawn_has_other_images_now(command, images, tmp_path):
    assert command(*train_arguments(images / "train", tmp_path / "run", epochs=1)).exit_code == 0
    arguments = ("eval", tmp_path / "run", "--data", images / "train")
    note = "note: val is drawn from"
    assert note not in command(*arguments).stderr
    extra = next((images / "val" / "red").iterdir())
    extra.rename(images / "train" / "red" / f"0{extra.name}")  # before the others: another val is drawn
    result = command(*arguments)
    assert result.exit_code == 0
    assert note in result.stderr and "may have been trained on some of them" in result.stderr


def test_eval_says_nothing_of_other_data_with_a_val_of_their_own(command, run, images):
    next((images / "val" / "red").iterdir()).unlink()
    result = command("eval", run, "--data", images)
    assert result.exit_code == 0 and "note" not in result.stderr


def test_version(command):
    from vpt_fast import __version__

    assert command("--version").stdout.strip() == __version__


PLAIN = {"num-prompts": None, "prompt-dropout": None}


def train_on_a_file(command, images, folder, **flags) -> Path:
    """The file of weights of a run on them, which is in `folder` / "run"."""
    file = folder / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("train_test_vit").state_dict(), file)
    result = command(*train_arguments(images, folder / "run", epochs=1, checkpoint=file, **flags))
    assert result.exit_code == 0, result.output
    return file


def test_eval_and_predict_are_told_where_the_checkpoint_is_now(command, color_images, tmp_path):
    file = train_on_a_file(command, color_images, tmp_path)
    moved = file.rename(tmp_path / "moved.pth")
    image = color_images / "test" / "red" / "0.png"
    for use in (("eval", tmp_path / "run", "--data", color_images), ("predict", tmp_path / "run", image)):
        result = command(*use)
        assert result.exit_code == 2 and f"checkpoint: {file}, which the backbone" in result.stderr
        result = command(*use, "--checkpoint", moved)
        assert result.exit_code == 0, result.stderr


def test_eval_refuses_a_checkpoint_where_the_run_had_none(command, color_images, tmp_path):
    command(*train_arguments(color_images, tmp_path / "run", epochs=1))
    result = command("eval", tmp_path / "run", "--data", color_images, "--checkpoint", "a.pth")
    assert result.exit_code == 2 and "checkpoint: got a.pth, and the run in" in result.stderr


def test_eval_refuses_a_checkpoint_where_the_run_holds_all_weights(command, color_images, tmp_path):
    file = train_on_a_file(command, color_images, tmp_path, method="full", **PLAIN)
    result = command("eval", tmp_path / "run", "--data", color_images, "--checkpoint", file)
    assert result.exit_code == 2 and "holds its weights itself" in " ".join(result.stderr.split())


def test_a_bug_in_loading_with_a_checkpoint_is_no_refusal(run, tmp_path, monkeypatch):
    prompts = shutil.copytree(run / "prompts", tmp_path / "prompts")
    config = json.loads((prompts / "config.json").read_text())
    config["backbone"]["checkpoint"] = "weights.pth"
    (prompts / "config.json").write_text(json.dumps(config))

    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("vpt_fast.training.inference.load_pretrained", fail)
    with pytest.raises(TypeError, match="a bug"):
        LoadedRun.load(prompts, "cpu", checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize("columns", [None, "60"])
def test_a_heading_in_a_file_is_as_wide_as_a_terminal(monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    written = io.StringIO()
    LastingConsole(file=written).rule("VPT-Deep")
    (line,) = written.getvalue().splitlines()
    assert "VPT-Deep" in line
    assert len(line) == int(columns or 80)
