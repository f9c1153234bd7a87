"""What training prints for the user."""

from __future__ import annotations

import contextlib
import resource
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vpt_fast.counting import counted
from vpt_fast.data.decode import SkippedImage
from vpt_fast.data.images import Splits
from vpt_fast.data.scenes import SceneSplits
from vpt_fast.free_memory import free_bytes
from vpt_fast.training.bars import Advance, progress_bar
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel

NAMES_SHOWN = 10
MANY_IMAGES = 20_000  # which take seconds to decode


def print_no_locks(console: Console, folder: Path) -> None:
    """Prints that the folder, in which one process may train, cannot be locked."""
    console.print(
        f"No file in {folder} can be locked: nothing keeps a second process from training there.",
        style="yellow", highlight=False, markup=False,
    )  # fmt: skip


def print_start(
    console: Console,
    recipe: Recipe,
    model: TunedModel,
    splits: Splits | SceneSplits,
    skipped: Sequence[SkippedImage],
    world: World,
    out: Path,
    steps: int,
    images_text: str,
) -> None:
    """Prints what will be trained, on what data and device, at what cost, and the skipped files by name.
    `images_text` describes the preprocessing of the training images."""
    trained, backbone = model.num_trainable_parameters, model.num_backbone_parameters
    batch = recipe.step_images(len(splits.train))
    memory = model.estimate_training_bytes(-(-batch // (world.size * recipe.accumulate)))
    expected = memory["weights"] + memory["kept"] + memory["workspace"]
    free = free_bytes(world.device)
    processes = f" in {world.size} processes" if world.size > 1 else ""
    parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
    kernels = model.runs_kernels(world.device)
    compiled = "; first steps wait for kernels that are not compiled yet" if kernels else ""
    parts_of_data = ", ".join(
        f"{name} {len(images):,}"
        for name, images in (("train", splits.train), ("val", splits.val), ("test", splits.test))
        if images is not None
    )
    source = recipe.data if recipe.task is None else f"{recipe.task} in {recipe.data}"

    facts = {
        "backbone": f"{recipe.backbone}: {backbone:,} parameters",
        "method": f"{recipe.method}: trains {trained:,} parameters "
        f"({trained / backbone:.2%} of the backbone)",
        "data": f"{source}: {len(splits.classes)} classes, {parts_of_data} images",
        "images": images_text,
        "schedule": f"{counted(recipe.epochs, 'epoch')} of {counted(steps, 'step')}, batch {batch}{parts}, "
        f"learning rate {recipe.peak_lr:g} at its peak, {recipe.precision}",
        "device": f"{device_name(world.device)}{processes}{compiled}",
        "memory": f"{gigabytes(expected)} expected{'' if free is None else f', {gigabytes(free)} free'}",
        "run folder": str(out),
    }
    print_facts(console, facts)
    if free is not None and expected > free:
        console.print("More memory is expected than is free: --accumulate splits a batch.", style="yellow")
    print_skipped(console, skipped)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Prints a line for each fact, after its name. Long ones go on below, broken between words only: a path
    that is longer than a line stays in one piece, so that it can be copied."""
    indent = max(len(name) for name in facts) + 2
    for name, fact in facts.items():
        text = textwrap.fill(
            fact,
            max(console.width, 2 * indent),
            initial_indent=name.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_skipped(console: Console, skipped: Sequence[SkippedImage]) -> None:
    """Prints the number of images that were left out, and the first few by name."""
    if not skipped:
        return
    console.print(f"{counted(len(skipped), 'image')} cannot be read and will be left out:", style="yellow")
    for image in skipped[:NAMES_SHOWN]:
        console.print(f"  {image.path}: {image.reason}", highlight=False)
    if len(skipped) > NAMES_SHOWN:
        console.print(f"  and {len(skipped) - NAMES_SHOWN} more")


def _print_in_log(console: Console, total: int, text: str) -> None:
    if total >= MANY_IMAGES and not console.is_terminal:  # there is no bar, and nothing else for minutes
        console.print(text, highlight=False)


def checking_images(console: Console, total: int) -> contextlib.AbstractContextManager[Advance]:
    _print_in_log(console, total, f"Checking {total:,} images: each is decoded once.")
    return progress_bar(console, "checking images", total)


def predicting(console: Console, total: int) -> contextlib.AbstractContextManager[Advance]:
    _print_in_log(console, total, f"Predicting {total:,} images; the results follow together.")
    return progress_bar(console, "predicting", total)


def evaluating(console: Console, split: str, total: int) -> contextlib.AbstractContextManager[Advance]:
    return progress_bar(console, f"evaluating {split}", total)


@contextlib.contextmanager
def computing_features(
    console: Console,
    total: int,
    num_bytes: int,
    device: torch.device,
    on_features: Callable[[int, int], None] | None,
) -> Iterator[Advance]:
    """Says what the frozen features of `total` images cost; then a progress bar. `on_features` is called with
    the number of images that are done and with `total`."""
    console.print(
        f"Computing the frozen features of {counted(total, 'image')} once, {filesize.decimal(num_bytes)} on "
        f"{device}; epochs then train on these.",
        highlight=False,
    )
    done = 0
    with progress_bar(console, "frozen features", total) as advance:

        def count(images: int) -> None:
            nonlocal done
            done += images
            advance(images)
            if on_features is not None:
                on_features(done, total)

        yield count


class Progress:
    """A progress bar for the current epoch, on a terminal, and a line for every finished one."""

    def __init__(self, console: Console, epochs: int, steps: int, *, done: int) -> None:
        self._console = console
        self._epochs, self._steps = epochs, steps
        self._bars = Bars(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("{task.fields[what]}"),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        # One task over all epochs, so that its remaining time is the run's.
        self._task = self._bars.add_task(
            "", total=(epochs - done) * steps, epoch=done + 1, what="", rate=0.0, memory=""
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._bars.stop()

    def begin_epoch(self, epoch: int) -> None:
        self._step = 0
        self._images = self._val_images = 0
        self._started = time.perf_counter()
        self._bars.update(self._task, epoch=epoch + 1, what=f"0/{self._steps} steps")

    def step(self, images: int) -> None:
        self._step += 1
        self._images += images
        rate = self._images / (time.perf_counter() - self._started)
        what = f"{self._step}/{self._steps} steps"
        self._bars.update(self._task, advance=1, what=what, rate=rate, memory=gigabytes(peak_bytes()))

    def validate(self, images: int) -> None:
        """Shows that so many more images of val are evaluated."""
        self._val_images += images
        self._bars.update(self._task, what=counted(self._val_images, "val image"))

    def end_epoch(self, row: dict[str, Any]) -> None:
        width = len(str(self._epochs))
        start = f"epoch {row['epoch'] + 1:{width}}/{self._epochs}  "
        train = (
            f"lr {row['lr']:<8.4g} train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:6.2%}"
        )
        val = f"{row['images_per_second']:,.0f} images/s"
        if row["val_accuracy"] is not None:
            miou = f"mIoU {row['val_miou']:6.2%} " if "val_miou" in row else ""
            val = f"val loss {row['val_loss']:.4f} {miou}accuracy {row['val_accuracy']:6.2%}  {val}"
        line = f"{start}{train}  {val}"
        if self._console.is_terminal and len(line) > self._console.width:  # a log has one line an epoch
            line = f"{start}{train}\n{' ' * len(start)}{val}"
        self._console.print(line, highlight=False)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({counted(torch.get_num_threads(), 'thread')})"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def peak_bytes() -> int:
    """Peak memory so far: torch's on the GPU if one is used, else this process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in kilobytes everywhere else
