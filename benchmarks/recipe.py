"""How long a whole VTAB-style task takes, and how much of it goes into loading data. One command:

    python benchmarks/recipe.py

measures training steps and inference batches of each implementation in turn, and extrapolates them to the
protocol's sweep of 40 points and its five runs, labelled as such. Then it trains on JPEG files that it writes
into a temporary folder, with the pixels kept on the device, and with processes that decode them in every
epoch; and compares both with the same steps on one batch that is on the device already. It prints tables and
writes results/recipe-<setting>-<device>-<date>.json next to this file; the same command goes on with it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import measure
import numpy as np
import torch
import typer
from implementations import (
    EXACT_BELOW,
    IMPLEMENTATIONS,
    NUM_CLASSES,
    Setting,
    make_start,
    random_batch,
    require_built,
    require_possible,
)
from measure import Contender
from operations import choose_device, end_with, finite, verdict
from PIL import Image
from reports import Fresh, Report, listed, make_header, one_of, output_path, require_model
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from throughput import check_gradients
from timm.data import resolve_model_data_config
from torch import Tensor

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import check_images, default_workers
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing

TASK = "task"
# On a GPU: an epoch of CUB's 5,994 training images, one of FGVC's sets, in batches of 64. In one of a dozen
# batches, 16 processes would do little else than read their first.
FGVC_STEPS = 94
MOST_FILES = 1000


@dataclass(frozen=True)
class Protocol:
    """The VTAB-1k protocol of Jia et al., "Visual Prompt Tuning", ECCV 2022, as in its public code.

    A point is trained on `sweep_train` images and evaluated on `val` after every epoch; the best one is then
    trained on `run_train` images with each of `runs` seeds, evaluated on `val` after every epoch and at the
    end on `test`.
    """

    points: int = 10 * 4  # base learning rates, weight decays
    epochs: int = 100
    sweep_train: int = 800
    val: int = 200
    runs: int = 5
    run_train: int = 1000
    test: int = 10_000

    def sweep_batches(self, batch_size: int) -> tuple[int, int]:
        """Training steps and inference batches of the sweep; a smaller last batch counts as a whole one."""
        epochs = self.points * self.epochs
        return epochs * math.ceil(self.sweep_train / batch_size), epochs * math.ceil(self.val / batch_size)

    def run_batches(self, batch_size: int) -> tuple[int, int]:
        """The same for all runs with the chosen settings."""
        epochs = self.runs * self.epochs
        test = self.runs * math.ceil(self.test / batch_size)
        return (
            epochs * math.ceil(self.run_train / batch_size),
            epochs * math.ceil(self.val / batch_size) + test,
        )


@dataclass(frozen=True)
class Measured:
    """Medians, and the smallest and largest, of `train_steps` training steps and `inference_batches`."""

    train_steps: int
    train_ms: float
    train_ms_min: float
    train_ms_max: float
    inference_batches: int
    inference_ms: float
    inference_ms_min: float
    inference_ms_max: float

    @staticmethod
    def of(train: list[float], inference: list[float]) -> Measured:
        """From seconds of each."""
        parts = []
        for seconds in (train, inference):
            ms = [1e3 * value for value in seconds]
            parts += [len(ms), statistics.median(ms), min(ms), max(ms)]
        return Measured(*parts)


@dataclass(frozen=True)
class Extrapolated:
    """Seconds on the device that the protocol takes, from the medians, without data loading."""

    sweep_seconds: float
    runs_seconds: float
    task_seconds: float

    @staticmethod
    def of(measured: Measured, protocol: Protocol, batch_size: int) -> Extrapolated:
        def seconds(batches: tuple[int, int]) -> float:
            return (batches[0] * measured.train_ms + batches[1] * measured.inference_ms) / 1e3

        sweep = seconds(protocol.sweep_batches(batch_size))
        runs = seconds(protocol.run_batches(batch_size))
        return Extrapolated(sweep, runs, sweep + runs)


@dataclass
class Row:
    """One implementation; `ratio` is the speed of the whole task relative to the best concatenation. `error`:
    why it failed, or, if it was measured, why its gradients could not be checked."""

    impl: str
    exact: bool
    gradient_error: float | None
    error: str | None
    measured: Measured | None = None
    extrapolated: Extrapolated | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.measured, dict):  # from a results file
            self.measured = Measured(**self.measured)
        if isinstance(self.extrapolated, dict):
            self.extrapolated = Extrapolated(**self.extrapolated)

    @property
    def case(self) -> str:
        """The one case of a file: all implementations run in turns."""
        return TASK


@dataclass(frozen=True)
class Loading:
    """End to end: one implementation with one source of pixels.

    Attributes:
        pixels: "resident": kept decoded on the device; "decoded": from the files, in every epoch.
        workers: processes that decode; 0 where nothing is decoded.
        images_per_second: the median of the epochs, and the smallest and largest.
        without_loading: images per second of the same steps on one batch that is on the device already.
        share_lost: 1 - images_per_second / without_loading; below 0 is noise.
    """

    impl: str
    pixels: str
    workers: int
    images: int
    images_per_second: float
    images_per_second_min: float
    images_per_second_max: float
    without_loading: float
    share_lost: float


def infer(contender: Contender, images: Tensor) -> measure.Stopwatch:
    """One batch of evaluation, with marks before and after it."""
    contender.model.eval()
    watch = measure.Stopwatch(images.device)
    with (
        torch.no_grad(),
        torch.autocast(images.device.type, contender.autocast, enabled=contender.autocast is not None),
    ):
        watch.mark()
        contender.run(images)
        watch.mark()
    contender.model.train()
    return watch


def settle(contender: Contender, images: Tensor, labels: Tensor) -> None:
    """The untimed steps that a turn begins with."""
    for _ in range(contender.steps_to_settle):
        contender.step(images, labels)


def time_batches(
    contenders: list[Contender],
    images: Tensor,
    labels: Tensor,
    *,
    repeats: int,
    steps: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Measured]:
    """Times training steps and inference batches, `steps` of each in each of `repeats` rounds, in turn.

    Every contender is warmed up first. One that fails keeps the message as its error and is left out.
    """
    times: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in contenders}
    for round_ in range(-1, repeats):
        for contender in contenders:
            if contender.error is not None:
                continue
            progress(
                f"{contender.name}: " + ("warm-up" if round_ < 0 else f"round {round_ + 1} of {repeats}")
            )
            with contender.turn(images.device):
                if round_ < 0 or images.is_cuda:
                    settle(contender, images, labels)
                    infer(contender, images)
                if round_ >= 0:
                    train = [contender.step(images, labels) for _ in range(steps)]
                    inference = [infer(contender, images) for _ in range(steps)]
                    times[contender.name][0].extend(sum(watch.seconds()) for watch in train)
                    times[contender.name][1].extend(sum(watch.seconds()) for watch in inference)
    return {c.name: Measured.of(*times[c.name]) for c in contenders if c.error is None}


def make_rows(
    contenders: list[Contender], measured: dict[str, Measured], protocol: Protocol, setting: Setting
) -> list[Row]:
    """One row for each contender; ratios are to the fastest concatenation whose gradients are right."""
    rows = []
    for contender in contenders:
        error = contender.gradient_error
        exact = error is not None and error <= EXACT_BELOW[contender.precision]
        reason = contender.error or contender.unchecked
        row = Row(contender.name, exact, finite(error), reason, measured.get(contender.name))
        if row.measured is not None:
            row.extrapolated = Extrapolated.of(row.measured, protocol, setting.batch_size)
        rows.append(row)
    right = [row for row in rows if row.exact and row.extrapolated is not None]
    concatenations = [row.extrapolated.task_seconds for row in right if row.impl.startswith("concat")]
    for row in right if concatenations else []:
        row.ratio = min(concatenations) / row.extrapolated.task_seconds
    return rows


def write_images(folder: Path, count: int) -> ImageList:
    """JPEG files of smooth shapes and some noise, which take about as long to decode as photographs do.
    Beyond `MOST_FILES` images they are the same files again."""
    generator = np.random.default_rng(0)
    classes = tuple(f"{index:03d}" for index in range(NUM_CLASSES))
    labels = tuple(index % NUM_CLASSES for index in range(count))
    paths = []
    height, width = 300, 400
    for index in range(min(count, MOST_FILES)):
        coarse = Image.fromarray(generator.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + 8 * generator.standard_normal((height, width, 3), dtype=np.float32)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return ImageList(tuple(itertools.islice(itertools.cycle(paths), count)), labels, classes)


def time_epoch(contender: Contender, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Wall-clock seconds of training on all batches, from requesting the first to the end of the last."""
    if torch.cuda.is_available():  # waits for all earlier work
        torch.cuda.synchronize()
    start = time.perf_counter()
    for images, labels in batches:
        contender.step(images, labels)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_loading(
    contenders: list[Contender],
    setting: Setting,
    images: ImageList,
    preprocessing: Preprocessing,
    random: tuple[Tensor, Tensor],
    *,
    workers: int,
    repeats: int,
    progress: Callable[[str], None],
) -> tuple[list[Loading], float]:
    """Trains on the images in every way, in turn; also the seconds that decoding them once took.

    `random` is the batch that is on the device already. The number of images is a multiple of the batch size,
    so that all ways take the same steps.

    Raises:
        RuntimeError: a contender fails here that did not with random images.
    """
    device = random[0].device
    progress(f"decoding {len(images)} images once")
    start = time.perf_counter()
    checked = check_images(images, workers=workers, preprocessing=preprocessing, keep_bytes=1 << 40)
    decode_seconds = time.perf_counter() - start

    def batches(source: Any, resident: str, processes: int) -> Batches:
        return Batches(
            source, preprocessing, setting.batch_size, train=True, seed=0, device=device,
            workers=processes, resident=resident,
        )  # fmt: skip

    ways = {"resident": batches(checked, "device", 0), "decoded": batches(images, "off", workers)}
    steps = len(ways["resident"])
    for _ in ways["decoded"].epoch(0):  # starts the processes
        pass
    seconds: dict[tuple[str, str], list[float]] = {}
    for round_ in range(repeats):
        for contender in contenders:
            progress(f"end to end, {contender.name}: round {round_ + 1} of {repeats}")
            epochs = {"none": [random] * steps, **{way: ways[way].epoch(round_ + 1) for way in ways}}
            with contender.turn(device):
                settle(contender, *random)
                for way, epoch in epochs.items():
                    seconds.setdefault((contender.name, way), []).append(time_epoch(contender, epoch))
            if contender.error is not None:
                raise RuntimeError(f"{contender.name}: {contender.error}")
    rows = []
    for contender in contenders:
        alone = len(images) / statistics.median(seconds[contender.name, "none"])
        for way in ways:
            speeds = [len(images) / value for value in seconds[contender.name, way]]
            median = statistics.median(speeds)
            rows.append(
                Loading(
                    contender.name,
                    way,
                    workers if way == "decoded" else 0,
                    len(images),
                    median,
                    min(speeds),
                    max(speeds),
                    alone,
                    1 - median / alone,
                )
            )
    return rows, decode_seconds


def make_tables(rows: list[Row], loading: list[Loading], setting: Setting) -> list[Table]:
    steps = sum(row.measured.train_steps for row in rows if row.measured is not None)
    title = (
        f"one VTAB task, extrapolated from {steps} measured steps: {setting.model}, "
        f"{setting.num_prompts} {setting.prompt_type} prompts, batch {setting.batch_size}, {setting.dtype}"
    )
    task = Table(title=title, box=box.SIMPLE)
    task.add_column("implementation", no_wrap=True)
    for column in (
        "step ms",
        "(min–max)",
        "inference ms",
        "sweep h",
        "runs h",
        "task h",
        "× concat",
        "error",
    ):
        task.add_column(column, justify="right")
    for row in rows:
        if row.measured is None or row.extrapolated is None:
            task.add_row(row.impl, escape(row.error), style="red")
            continue
        times, hours = row.measured, row.extrapolated
        task.add_row(
            row.impl,
            f"{times.train_ms:.1f}",
            f"{times.train_ms_min:.1f}–{times.train_ms_max:.1f}",
            f"{times.inference_ms:.1f}",
            *(
                f"{seconds / 3600:.3g}"
                for seconds in (hours.sweep_seconds, hours.runs_seconds, hours.task_seconds)
            ),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "unchecked" if row.error is not None else verdict(None, row.exact, row.gradient_error),
            style="" if row.exact else "red",
        )
    ends = Table(title="end to end, with data loading", box=box.SIMPLE)
    for column in ("implementation", "pixels"):
        ends.add_column(column, no_wrap=True)
    for column in ("images/s", "(min–max)", "without loading", "share lost"):
        ends.add_column(column, justify="right")
    for way in loading:
        ends.add_row(
            way.impl,
            way.pixels + (f", {way.workers} workers" if way.workers else ""),
            f"{way.images_per_second:.1f}",
            f"{way.images_per_second_min:.1f}–{way.images_per_second_max:.1f}",
            f"{way.without_loading:.1f}",
            f"{100 * way.share_lost:.1f} %",
        )
    return [task, ends] if loading else [task]


def main(
    model: Annotated[str, typer.Option(help="timm name; default by device")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, help="prompts per block")] = 50,
    batch_size: Annotated[int, typer.Option(min=0, help="images a step; 0: by device")] = 0,
    prompt_type: Annotated[str, typer.Option(help="deep or shallow")] = "deep",
    implementations: Annotated[str, typer.Option(help="comma-separated; default by device")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or amp; default by device")] = "",
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels; default: the model's own")] = None,
    test_images: Annotated[int, typer.Option(min=1, help="size of the task's test set")] = Protocol.test,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after one of warm-up")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="steps a round; 0: by device")] = 0,
    epoch_steps: Annotated[int, typer.Option(min=0, help="steps an epoch, end to end; 0: by device")] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="processes that decode; 0: as vpt-fast train chooses")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default: results/recipe-<setting>-<device>-<date>.json"),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Measure what a VTAB-style task costs, and what loading its images adds.

    The exit status is 1 if gradients of vpt_fast are wrong, or it fails though there is memory enough.
    """
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding alone fails float32's gradient check
    name = model or ("vit_base_patch16_224" if on_gpu else "vit_tiny_patch16_224")
    require_model("model", name)
    setting = Setting(
        name,
        num_prompts,
        batch_size or (64 if on_gpu else 8),
        one_of("prompt-type", prompt_type, ["deep", "shallow"]),
        one_of("dtype", dtype or ("bfloat16" if on_gpu else "float32"), EXACT_BELOW),
        image_size,
    )
    default = ["vpt_fast", "concat_timm_compiled"]
    default += [f"{name}_graphed" for name in default if on_gpu]
    names = listed("implementations", implementations or ",".join(default), IMPLEMENTATIONS)
    require_possible(setting, names, [])
    header = make_header(where)
    path = output_path(output, header, Row, f"recipe-{setting.slug}")
    protocol = Protocol(test=test_images)
    workers = workers or default_workers()
    steps, epoch_steps = steps or (10 if on_gpu else 1), epoch_steps or (FGVC_STEPS if on_gpu else 2)
    console = Console()
    console.width = max(console.width, 140)  # a table cut to a pipe's 80 columns says nothing
    console.print(
        f"{measure.device_name(where)}, torch {torch.__version__}: {len(names)} implementations, "
        f"{repeats * steps} training steps and {3 * min(repeats, 3)} short epochs each"
    )
    start = make_start(setting, where)
    size = start.image_size
    settings = {
        **asdict(setting), "image_size": size[0], "protocol": asdict(protocol), "implementations": names,
        "repeats": repeats, "steps": steps, "epoch_steps": epoch_steps, "workers": workers,
    }  # fmt: skip
    contenders = [require_built(name, start) for name in names]
    report = Report(path, header | settings, Row, [TASK], fresh)
    console.print(report.describe(), soft_wrap=True)
    random = random_batch(start, setting.batch_size, where)

    with console.status("gradients against float64") as status:
        if not report.rows:
            check_gradients(contenders, start)
            measured = time_batches(contenders, *random, repeats=repeats, steps=steps, progress=status.update)
            report.replace(TASK, make_rows(contenders, measured, protocol, setting))
        right = [row.impl for row in report.rows if row.exact and row.measured]

        def load() -> list[dict[str, Any]]:
            with tempfile.TemporaryDirectory() as folder:
                status.update("writing images")
                images = write_images(Path(folder), epoch_steps * setting.batch_size)
                loading, decode_seconds = measure_loading(
                    [contender for contender in contenders if contender.name in right], setting, images,
                    Preprocessing.for_model(resolve_model_data_config(start.backbone), size),
                    random, workers=workers, repeats=min(repeats, 3), progress=status.update,
                )  # fmt: skip
            console.print(f"{len(images)} images decoded once in {decode_seconds:.1f} s")
            report.once("decode_seconds", lambda: decode_seconds)
            return [asdict(way) for way in loading]

        loading = [Loading(**way) for way in report.once("end_to_end", load)]
        report.write()
    for table in make_tables(report.rows, loading, setting):
        console.print(table)
    console.print(f"written: {path}")
    # It is no failure that gradients of what ran could not be checked.
    judged = [row for row in report.rows if row.measured is None or row.error is None]
    end_with(judged, console, ours="vpt_fast")


if __name__ == "__main__":
    typer.run(main)
