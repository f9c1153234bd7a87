"""The vpt-fast command: flags in, one call, a report out.

Exit codes: 0 done; 1 failed on the way (training diverged, a full disk, an image that cannot be read);
2 what was asked for cannot be had; 130 stopped by the user.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Column, Table

from vpt_fast.commands import sweeps
from vpt_fast.commands.backbones import backbones
from vpt_fast.commands.data import app as data_app
from vpt_fast.commands.flags import (
    PATH,
    DataRootFlag,
    DebugFlag,
    DeviceFlag,
    JsonFlag,
    LastingConsole,
    NameConsole,
    OutputConsole,
    RunArgument,
    SameBackboneFlag,
    SameCheckpointFlag,
    WorkersFlag,
    discard_output,
    fail,
    given_settings,
    one_line_errors,
    print_error,
    refuse,
    require_data,
    require_folder_place,
    require_run,
    with_recipe_flags,
)
from vpt_fast.commands.help import CommandApp
from vpt_fast.commands.official import export_prompts, import_prompts
from vpt_fast.counting import counted
from vpt_fast.data.folder import expand_images, missing_files
from vpt_fast.training.recipe import Recipe

if TYPE_CHECKING:
    from vpt_fast.training.inference import LoadedRun

# Modules that import torch are imported by the commands that need them, so that --help answers at once.

app = CommandApp()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    """Visual Prompt Tuning of frozen vision transformers: train, evaluate and compare."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("vpt_fast"))
        raise typer.Exit


@app.command()
@with_recipe_flags
def train(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder.", rich_help_panel="Run", show_default="runs/DATA-BACKBONE-METHOD", **PATH
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with settings, such as a run's config.yaml; flags override it.",
            rich_help_panel="Run",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Delete the run in --out and start over.", rich_help_panel="Run"),
    ] = False,
    debug: DebugFlag = False,
    **flags: Any,
) -> None:
    """Train prompts, or another tuning method, on a folder of images.

    Ctrl-C stops after the current step. The same command resumes after the
    last completed epoch and gives the results of an uninterrupted run. Under
    torchrun, the processes share each batch.

        vpt-fast train --data DIR --backbone vit_base_patch16_224 --num-prompts 50
    """
    with one_line_errors(debug):
        recipe = Recipe.from_dict(given_settings(config, flags))
        from vpt_fast.training.loop import train as run_training
        from vpt_fast.training.run import default_run_folder

        console = LastingConsole(quiet=int(os.environ.get("RANK", 0)) != 0)  # torchrun's first process speaks
        result = run_training(recipe, out or default_run_folder(recipe), console=console, fresh=fresh)
    done, epochs = len(result.metrics), result.recipe.epochs
    if not result.is_finished:
        console.print(f"Stopped after epoch {done} of {epochs}; the same command goes on from there.")
        raise typer.Exit(130)
    if result.new_epochs == 0:
        console.print(f"{result.path} holds this run, trained to its end; --fresh trains it again.")
    found = [
        f"{split} {called} {value:.2%}"
        for split in ("val", "test")
        for name, called in (("miou", "mIoU"), ("accuracy", "accuracy"))
        if (value := result.results.get(f"{split}_{name}")) is not None
    ]
    console.print(f"{', '.join(found) or 'done'} after {counted(epochs, 'epoch')}; run folder {result.path}")


@app.command("eval")
def evaluate(
    run: RunArgument,
    data: Annotated[str, typer.Option(help="Images, as for train; for a benchmark task, its folder.")],
    split: Annotated[Literal["val", "test"], typer.Option(help="Split to evaluate.")] = "val",
    as_json: JsonFlag = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per forward pass; windows for segmentation.",
            show_default="64; 16 for segmentation",
        ),
    ] = None,
    multi_scale: Annotated[
        bool,
        typer.Option("--multi-scale", help="Segmentation: average over six scales, each also mirrored."),
    ] = False,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Mixed precision (autocast); that of the training gives its accuracy."),
    ] = "fp32",
    workers: WorkersFlag = None,
    data_root: DataRootFlag = None,
    backbone: SameBackboneFlag = None,
    checkpoint: SameCheckpointFlag = None,
    device: DeviceFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Evaluate a run: accuracy, or mIoU for segmentation, overall and per class."""
    with one_line_errors(debug):
        require_run(run)
        require_data(data)
        from vpt_fast.training.classification import FORWARD_BATCH
        from vpt_fast.training.inference import LoadedRun, evaluate_run
        from vpt_fast.training.world import on_device

        with on_device(device):
            loaded = LoadedRun.load(
                run, device, backbone=backbone, checkpoint=checkpoint, precision=precision
            )
            if loaded.is_segmenter:
                refuse("a segmentation run", split=split == "test", data_root=data_root)
                _evaluate_scenes(loaded, data, multi_scale, batch_size, workers, as_json)
                return
            refuse("a classification run", multi_scale=multi_scale)
            found = evaluate_run(
                loaded,
                data,
                split,
                batch_size=batch_size or FORWARD_BATCH,
                workers=workers,
                data_root=data_root,
                console=NameConsole(stderr=True),
            )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
        return
    console = OutputConsole()
    table = Table(_names("class"), "images", "correct", "accuracy")
    for name, images, correct in zip(
        found.classes, found.evaluation.images, found.evaluation.correct, strict=True
    ):
        table.add_row(escape(name), str(images), str(correct), f"{correct / images:.2%}" if images else "-")
    console.print(table)
    for image in found.skipped:
        left_out = f"[yellow]left out:[/] {escape(str(image.path))}: {escape(image.reason)}"
        console.print(left_out, soft_wrap=True)
    console.print(
        f"{split} accuracy {found.evaluation.accuracy:.2%} ({counted(found.evaluation.num_images, 'image')})"
    )


def _names(header: str) -> Column:
    """A column whose names go on in the next line where it is narrow: a name cut short names nothing."""
    return Column(header, overflow="fold")


def _evaluate_scenes(
    run: LoadedRun, data: str, multi_scale: bool, windows: int | None, workers: int | None, as_json: bool
) -> None:
    from vpt_fast.training.scene_inference import evaluate_scene_run
    from vpt_fast.training.segmentation import WINDOWS

    found = evaluate_scene_run(
        run,
        data,
        multi_scale=multi_scale,
        windows=windows or WINDOWS,
        workers=workers,
        console=NameConsole(stderr=True),
    ).to_dict()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    table = Table(_names("class"), "IoU")
    for name, scores in found["per_class"].items():
        table.add_row(escape(name), "-" if scores["iou"] is None else f"{scores['iou']:.2%}")
    console = OutputConsole()
    console.print(table)
    console.print(
        f"val mIoU {found['miou']:.2%}, pixel accuracy {found['accuracy']:.2%} "
        f"({counted(found['images'], 'image')}{', multi-scale' if multi_scale else ''})"
    )


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Image files, folders or glob patterns.")
    ],
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Classes to print for each image.", show_default="1")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Segmentation: folder for masks and overlays.",
            show_default="RUN/predictions",
            **PATH,
        ),
    ] = None,
    as_json: JsonFlag = False,
    backbone: SameBackboneFlag = None,
    checkpoint: SameCheckpointFlag = None,
    device: DeviceFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Classify or segment images. The exit status is 1 if an image cannot be read. If stopped, the results so
    far are printed."""
    with one_line_errors(debug):
        if out is not None:
            require_folder_place(out)
        require_run(run)
        paths = expand_images(images)
        missing = missing_files(paths)
        for file, reason in missing.items():  # before torch and the backbone are loaded
            print_error(f"{file}: {reason}")
        if all(str(path) in missing for path in paths):
            answers: list[dict[str, Any]] = [{"image": str(p), "error": missing[str(p)]} for p in paths]
            is_stopped = False
        else:
            answers, is_stopped = _predict(run, paths, top_k, out, device, backbone, checkpoint)
    failed = [answer for answer in answers if "error" in answer]
    if as_json:
        typer.echo(json.dumps(answers, ensure_ascii=False, indent=2))
    elif len(failed) < len(answers):
        share = "share" if any("mask" in answer for answer in answers) else "probability"
        table = Table(_names("image"), _names("class"), share)
        for answer in answers:
            for rank, (name, part) in enumerate(answer.get("classes", {}).items()):
                table.add_row(escape(answer["image"]) if rank == 0 else "", escape(name), f"{part:.2%}")
            for rank, guess in enumerate(answer.get("predictions", [])):
                image = escape(answer["image"]) if rank == 0 else ""
                table.add_row(image, escape(guess["class"]), f"{guess['probability']:.2%}")
        OutputConsole().print(table)
        for answer in answers:
            if "mask" in answer:
                typer.echo(f"{answer['mask']}, {answer['overlay']}")
    for answer in failed:
        if answer["image"] not in missing:
            print_error(f"{answer['image']}: {answer['error']}")
    if is_stopped:
        fail(f"stopped after {len(answers)} of {counted(len(paths), 'image')}", 130)
    if failed:
        raise typer.Exit(1)


def _predict(
    run: Path,
    paths: list[Path],
    top_k: int | None,
    out: Path | None,
    device: str | None,
    backbone: str | None,
    checkpoint: Path | None,
) -> tuple[list[dict[str, Any]], bool]:
    """What `predict_scenes` or `predict_images` yields, and whether they were stopped."""
    from vpt_fast.training.inference import LoadedRun, predict_images
    from vpt_fast.training.report import predicting
    from vpt_fast.training.world import on_device

    if out is not None:
        from vpt_fast.training.scene_inference import require_masks_folder

        require_masks_folder(paths, out)  # before the backbone is loaded
    with on_device(device):
        loaded = LoadedRun.load(run, device, backbone=backbone, checkpoint=checkpoint)
        if loaded.is_segmenter:
            from vpt_fast.training.scene_inference import predict_scenes

            refuse("a segmentation run", top_k=top_k)
            predicted = predict_scenes(loaded, paths, out or run / "predictions")
        else:
            refuse("a classification run", out=out)
            predicted = predict_images(loaded, paths, top_k or 1)
        answers = []
        try:
            with predicting(NameConsole(stderr=True), len(paths)) as advance, contextlib.closing(predicted):
                for answer in predicted:
                    answers.append(answer)
                    advance(1)
        except KeyboardInterrupt:
            return answers, True
        return answers, False


@app.command()
def methods(
    backbone: Annotated[str, typer.Option(help="Backbone, as for train.")] = "vit_base_patch16_224",
    backbone_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="As for train.", show_default="none")
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Count the parameters each method trains and stores, for one task and for the paper's 24 tasks."""
    with one_line_errors(debug):
        from vpt_fast.sweeps.parameters import count_parameters, table

        rows, reasons = count_parameters(backbone, backbone_arg or [])
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        header, *body = table(rows)
        shown = Table(*header)
        for line in body:
            shown.add_row(*line)
        OutputConsole().print(shown)
    for method, reason in reasons.items():
        typer.echo(f"{method}: {reason}", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images and runs.", **PATH)] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again even if the runs exist.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Compare linear probe, VPT-Shallow and VPT-Deep on handwritten digits, in under 3 minutes on 2 cores."""
    with one_line_errors(debug):
        require_folder_place(out)
        from vpt_fast.commands.demo import run_demo

        if not run_demo(out, console=LastingConsole(), fresh=fresh):
            raise typer.Exit(130)


# --help shows the commands in this order, those above first.
app.command()(sweeps.sweep)
app.command()(sweeps.ablate)
app.command()(sweeps.table)
app.command()(backbones)
app.command()(import_prompts)
app.command()(export_prompts)
app.add_typer(data_app, name="data")
app.add_typer(sweeps.plot_app, name="plot")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Characters that stdout's encoding lacks, as JSON escapes them: what --json prints stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def main() -> None:
    # Under an old locale, even a "×" would end a training with UnicodeEncodeError.
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and codecs.lookup(out.encoding).name != "utf-8":
        if out.errors in ("strict", "surrogateescape"):  # else PYTHONIOENCODING chose what is done
            codecs.register_error("vpt_fast.escape", _escape)
            out.reconfigure(errors="vpt_fast.escape")
    # Ours names the image: `data.decode.decode_image`.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb", module=r"PIL\.Image")
    try:
        app()
    except OSError as error:
        # Commands report their own; what is left is printing the results, to a file on a full disk, say.
        if "--debug" in sys.argv or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        discard_output()
        sys.exit(f"error: the output cannot be written: {error.strerror}")
