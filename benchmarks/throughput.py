"""Training throughput and memory of vpt_fast beside what one would otherwise write. One command:

    python benchmarks/throughput.py

measures a sensible setting for the device at hand, prints a table and writes
results/<dtype>-<device>-<date>.json next to this file. `--help` lists the flags; benchmarks/plots.py draws
what was written. Every implementation starts from the same weights and the same trainable tensors; one whose
gradients differ from those of concatenation in float64 is marked and not ranked. The same command resumes an
interrupted run; `--fresh` starts again.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import ceilings
import measure
import torch
import typer
from find_batch import largest_batch, ran_out_of_memory
from implementations import (
    BOUNDS,
    CODES_EXACT_BELOW,
    DEFINITION,
    EXACT_BELOW,
    IMPLEMENTATIONS,
    NUM_CLASSES,
    ON_A_CPU,
    ON_A_GPU,
    Build,
    Family,
    Setting,
    Start,
    family_of,
    make_start,
    random_batch,
    require_possible,
)
from measure import MIB, Contender
from operations import choose_device, failures, finite, number
from reports import (
    Fresh,
    Report,
    listed,
    make_header,
    one_of,
    output_path,
    positive_numbers,
    require_model,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vpt_fast.engine.policy import POLICIES

TABLE_WIDTH = 180  # that of a GPU's longest names beside every column is 168


@dataclass
class Row:
    """One line of the results; what is not known is None. Times are medians over steps, per step.

    Attributes:
        dtype: of this implementation: "float32", "bfloat16" or "amp".
        memory: the memory policy of vpt_fast.
        exact: whether its gradients were right.
        error: why it failed, or, if it has a speed, why its gradients could not be checked.
        rank: among correct implementations of the same setting, by images per second; bounds have none.
        essential_gflop_per_image: the work that is needed, forward and backward. It is the same for all
            rows of a setting, since it is the task's and not the implementation's; a bound has its own.
            None for models that pool by attention.
        essential_tflops: that work over the time.
        share_of_ceiling: of the report's `ceiling_tflops`.
        shapes_tflops: the ceiling for matmuls of the model's own shapes; None for ConvNets.
        share_of_shapes: of `shapes_tflops`.
        largest_batch: with --find-batch, in the rows of the first batch size.
    """

    model: str
    num_prompts: int
    batch_size: int
    prompt_type: str
    dtype: str
    image_size: int
    impl: str
    memory: str | None
    repeats: int
    exact: bool = False
    rank: int | None = None
    images_per_second: float | None = None
    images_per_second_min: float | None = None
    images_per_second_max: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    peak_mib: float | None = None
    peak_reserved_mib: float | None = None
    kept_mib_per_image: float | None = None
    essential_gflop_per_image: float | None = None
    essential_tflops: float | None = None
    share_of_ceiling: float | None = None
    shapes_tflops: float | None = None
    share_of_shapes: float | None = None
    largest_batch: int | None = None
    gradient_error: float | None = None
    error: str | None = None

    @property
    def case(self) -> Case:
        return case_of(self)

    @property
    def contender(self) -> Entrant:
        return Entrant(self.impl, self.memory)


Case = tuple[str, int, int, str]


def case_of(row: Row | Setting) -> Case:
    """What tells a setting from the others of a file; the rest of it is common to all rows."""
    return row.model, row.num_prompts, row.batch_size, row.prompt_type


@dataclass(frozen=True)
class Entrant:
    """One row to measure: an implementation by name, and vpt_fast's memory policy (None for others)."""

    name: str
    memory: str | None = None

    def build(self, start: Start) -> Contender:
        contender = IMPLEMENTATIONS[self.name](self.name, start)
        if self.memory is not None:
            contender.model.memory = self.memory
        return contender


def entrants(implementations: list[str], memory: list[str]) -> list[Entrant]:
    """The implementations in their order, those of vpt_fast under every memory policy."""
    return [
        Entrant(name, policy)
        for name in implementations
        for policy in (memory if name.startswith("vpt_fast") else [None])
    ]


def chosen_entrants(names: list[str], memory: list[str], family: Family, on_gpu: bool) -> list[Entrant]:
    """The implementations and policies that were asked for. By default those that a family has: on a GPU
    vpt_fast under every policy, its variants under "exact"."""
    usual = [name for name in (ON_A_GPU if on_gpu else ON_A_CPU) if name not in family.lacks]
    if names or memory or not on_gpu:
        return entrants(names or usual, memory or ["exact"])
    variants = [name for name in usual if name != "vpt_fast"]
    return entrants(["vpt_fast"], list(family.memory)) + entrants(variants, ["exact"])


def check_gradients(contenders: list[Contender], start: Start) -> None:
    """Fills in every contender's gradient error, from its definition in float64: concatenation, or a bound's
    own. If a definition fails, for lack of memory, say, its contenders are `unchecked`.

    Contenders run on a batch of the setting's size, which is what is timed, made of one or two repeated
    images. The mean loss of these images alone has the same gradient, so that float64 runs on no more.
    """
    batch_size = start.setting.batch_size
    distinct = 2 if batch_size % 2 == 0 else 1
    few_images, few_labels = random_batch(start, distinct, start.device)
    definitions = {contender.name: BOUNDS.get(contender.name, DEFINITION) for contender in contenders}
    expected: dict[Build, dict[str, Tensor]] = {}
    reasons: dict[Build, str] = {}
    # All definitions first, so that nothing in float64 is on the device beside a contender.
    for build in dict.fromkeys(definitions.values()):
        try:
            expected[build] = definition_gradients(build, start, few_images, few_labels)
        except Exception as failure:
            reasons[build] = measure.first_line(failure)
        measure.empty_cache(start.device)
    images = few_images.repeat(batch_size // distinct, 1, 1, 1)
    labels = few_labels.repeat(batch_size // distinct)
    for contender in contenders:
        build = definitions[contender.name]
        if build in reasons:
            contender.unchecked = f"gradients not checked, float64: {reasons[build]}"
            continue
        with contender.turn(start.device):
            actual = measure.gradients(contender, images, labels)
            contender.gradient_error = measure.gradient_error(actual, expected[build])


def definition_gradients(build: Build, start: Start, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of a definition in float64, by parameter; on the CPU: they may be as large as the model."""
    backbone = copy.deepcopy(start.backbone).double()
    state = {name: tensor.double() for name, tensor in start.state.items()}
    exact = build(backbone, state).double().to(start.device)
    found = measure.gradients(Contender("float64", exact, exact), images.double(), labels)
    return {name: gradient.cpu() for name, gradient in found.items()}


def essential_flops(implementation: str, start: Start) -> int | None:
    """Operations that a step needs; None if there is no closed form."""
    setting, shape, forms = start.setting, start.shape, start.family.flops
    if shape is None:
        return None
    if implementation in BOUNDS:
        return getattr(forms, implementation)(shape, setting.batch_size, NUM_CLASSES)
    return forms.essential(shape, setting.num_prompts, setting.prompt_type, setting.batch_size, NUM_CLASSES)


def make_row(entrant: Entrant, start: Start, repeats: int) -> Row:
    """A row without measurements."""
    fields: dict[str, Any] = asdict(start.setting) | {"image_size": start.image_size[0]}
    return Row(**fields, impl=entrant.name, memory=entrant.memory, repeats=repeats)


def fill_in(
    row: Row, contender: Contender, start: Start, ceiling_tflops: float | None, shapes_tflops: float | None
) -> None:
    """Copies a contender's measurements into its row."""
    batch_size, error = start.setting.batch_size, contender.gradient_error
    row.dtype, row.error = contender.precision, contender.error or contender.unchecked
    allowed = CODES_EXACT_BELOW if row.memory == "compact" else EXACT_BELOW[row.dtype]
    row.exact = error is not None and error <= allowed
    row.gradient_error = finite(error)

    def mib(count: int | None, per: int = 1) -> float | None:
        return None if count is None else count / MIB / per

    row.peak_mib, row.peak_reserved_mib = mib(contender.peak_bytes), mib(contender.peak_reserved_bytes)
    row.kept_mib_per_image = mib(contender.kept_bytes, batch_size)
    row.shapes_tflops = shapes_tflops
    work = essential_flops(contender.name, start)
    row.essential_gflop_per_image = None if work is None else work / batch_size / 1e9
    if not contender.times:
        return
    speeds = sorted(batch_size / times.total for times in contender.times)
    row.images_per_second = statistics.median(speeds)
    row.images_per_second_min, row.images_per_second_max = speeds[0], speeds[-1]
    if not contender.graphed:
        median = measure.median_times(contender.times)
        row.forward_ms, row.backward_ms = median.forward * 1e3, median.backward * 1e3
        row.optimizer_ms = median.optimizer * 1e3
    if work is not None:
        row.essential_tflops = work / batch_size * row.images_per_second / 1e12
        row.share_of_ceiling = row.essential_tflops / ceiling_tflops if ceiling_tflops else None
        row.share_of_shapes = row.essential_tflops / shapes_tflops if shapes_tflops else None


def rank(rows: list[Row]) -> list[Row]:
    """Numbers the rows of one setting by speed, fastest first, except wrong ones, failed ones and bounds."""
    for row in rows:
        row.rank = None
    able = [row for row in rows if row.exact and row.images_per_second is not None and row.impl not in BOUNDS]
    able.sort(key=lambda row: row.images_per_second or 0.0, reverse=True)
    for place, row in enumerate(able, start=1):
        row.rank = place
    return rows


def product_dtype(dtype: str) -> torch.dtype:
    """The matmuls' dtype under a `Setting.dtype`."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def measure_setting(
    setting: Setting,
    those: list[Entrant],
    device: torch.device,
    repeats: int,
    steps: int,
    console: Console,
    ceiling_tflops: float,
) -> list[Row]:
    """One row for each entrant."""
    torch.compiler.reset()  # how often one function may be compiled is limited
    with console.status("weights") as status:
        start = make_start(setting, device)
        shapes_tflops = None
        shape = start.shape
        sizes = [] if shape is None else start.family.flops.block_products(shape, setting.batch_size)
        if sizes:
            status.update("products of the model's shapes")
            shapes_tflops = ceilings.products(sizes, device, product_dtype(setting.dtype))
        rows, contenders = list[Row](), dict[int, Contender]()
        for index, entrant in enumerate(those):
            row = make_row(entrant, start, repeats)
            try:
                contenders[index] = entrant.build(start)
            except (ValueError, torch.OutOfMemoryError) as failure:  # a missing library
                row.error = measure.first_line(failure)
            rows.append(row)
        images, labels = random_batch(start, setting.batch_size, device)
        status.update("gradients against float64")
        running = list(contenders.values())
        check_gradients(running, start)
        measure.interleave(running, images, labels, repeats=repeats, steps=steps, progress=status.update)
    for index, contender in contenders.items():
        fill_in(rows[index], contender, start, ceiling_tflops, shapes_tflops)
    return rank(rows)


def is_our_mistake(row: Row) -> bool:
    """Whether this is vpt_fast, and did not run, or has a speed and wrong gradients. Where they could not be
    checked, `error` says why; nor is it a mistake to lack memory, or to refuse what was asked for (a
    ValueError, as for a library that is not there)."""
    if not row.impl.startswith("vpt_fast"):
        return False
    if row.images_per_second is not None:
        return not row.exact and row.error is None
    return (
        row.error is not None and not row.error.startswith("ValueError") and not ran_out_of_memory(row.error)
    )


def find_batches(rows: list[Row], setting: Setting, device: torch.device, console: Console) -> None:
    """Fills in the largest batch of every row, unless it failed for another reason than lack of memory."""
    start = make_start(setting, torch.device("cpu"))
    with console.status("largest batch") as status:
        for row in rows:
            if row.error is not None and not ran_out_of_memory(row.error):
                continue
            name = measure.label(row.impl, row.memory)

            def progress(text: str, name: str = name) -> None:
                status.update(f"largest batch of {name}: {text}")

            try:
                row.largest_batch = largest_batch(row.contender.build, start, device, progress)
            except RuntimeError as failure:
                console.print(f"largest batch of {name}: not found, {failure}", markup=False)


def make_table(rows: list[Row], dtype: str) -> Table:
    """The rows of one setting; an implementation with a dtype of its own says so."""
    first = rows[0]
    prompts, batch = f"{first.num_prompts} {first.prompt_type} prompts", f"batch {first.batch_size}"
    table = Table(title=f"{first.model}, {prompts}, {batch}, {dtype}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    searched = any(row.largest_batch is not None for row in rows)
    columns = ["\nimages/s", "\n(min–max)", "× best\nconcat", "forward\nms", "backward\nms", "optimizer\nms"]
    columns += ["peak\nMiB", "kept MiB\n/image", "of\nceiling", *(["largest\nbatch"] if searched else [])]
    for column in (*columns, "gradient\nerror"):
        table.add_column(column, justify="right", no_wrap=True)
    concat = [row.images_per_second or 0.0 for row in rows if row.impl.startswith("concat") and row.rank]

    def speed_of(value: float | None) -> str:
        return number(value, ".2f" if (first.images_per_second or 0.0) < 100 else ".0f")

    for row in rows:
        speed = row.images_per_second
        name = measure.label(row.impl, row.memory)
        cells = [
            place(row),
            name if row.dtype == dtype else f"{name}, {row.dtype}",
            speed_of(speed),
            f"{speed_of(row.images_per_second_min)}–{speed_of(row.images_per_second_max)}" if speed else "",
            number(speed / max(concat), ".2f") if concat and speed and row.exact else "",
            *(number(ms, ".1f") for ms in (row.forward_ms, row.backward_ms, row.optimizer_ms)),
            number(row.peak_mib, ".0f"),
            number(row.kept_mib_per_image, ".1f"),
            number(row.share_of_ceiling, ".0%"),
        ]
        if searched:
            cells.append(number(row.largest_batch, "d"))
        cells.append(number(row.gradient_error, ".1e"))
        table.add_row(*cells, style="" if row.exact else "red")
    table.caption = failures({measure.label(row.impl, row.memory): row.error for row in rows})
    table.caption_justify = "left"
    return table


def place(row: Row) -> str:
    """The cell in the column of ranks."""
    if row.error is not None:
        return "failed" if row.images_per_second is None else "unchecked"
    if not row.exact:
        return "WRONG"
    return "bound" if row.impl in BOUNDS else str(row.rank)


def open_report(path: Path | None, header: dict[str, Any], asked: Iterable[Setting], fresh: bool) -> Report:
    """The results file; `path` None is results/<dtype>[-<image size>-pixels]-<device>-<date>.json."""
    size = f"{header['image_size']}-pixels" if header["image_size"] else ""
    name = "-".join(filter(None, [header["dtype"], size]))
    return Report(output_path(path, header, Row, name), header, Row, map(case_of, asked), fresh)


def main(
    models: Annotated[str, typer.Option(help="timm names, comma-separated; default by device")] = "",
    num_prompts: Annotated[
        str,
        typer.Option(
            help="prompts per block, or pixels of a ConvNet's border, comma-separated; default: 100, or 10"
        ),
    ] = "",
    batch_size: Annotated[str, typer.Option(help="images per step, comma-separated; default by device")] = "",
    prompt_type: Annotated[
        str, typer.Option(help="deep or shallow, comma-separated; default: deep, and of a ConvNet shallow")
    ] = "",
    implementations: Annotated[
        str, typer.Option(help=f"comma-separated, of {', '.join(IMPLEMENTATIONS)}; default by device")
    ] = "",
    memory: Annotated[
        str,
        typer.Option(
            help=f"policies that each vpt_fast implementation is run under, of {', '.join(POLICIES)}; "
            "default: exact, and where no implementations are named on a GPU, all for plain vpt_fast"
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or amp; default by device")] = "",
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels; default: the model's own")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds after one of warm-up")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="steps a round; 0: by device")] = 0,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="also search each implementation's largest batch; GPU only")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default: results/<dtype>[-<image size>-pixels]-<device>-<date>.json"),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Measure training throughput and memory; every flag has a default that suits the device.

    The exit status is 1 if gradients of vpt_fast are wrong, or it fails though there is memory enough.
    """
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    if find_batch and not on_gpu:
        raise typer.BadParameter(
            f"find-batch: got it with device {where}, want a GPU: a CPU's memory has no end at which it fails"
        )
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding alone fails float32's gradient check
    dtype = one_of("dtype", dtype or ("bfloat16" if on_gpu else "float32"), EXACT_BELOW)
    big = "vit_base_patch16_224,vit_large_patch16_224,vit_huge_patch14_224"
    names = listed("implementations", implementations, IMPLEMENTATIONS) if implementations else []
    policies = listed("memory", memory, POLICIES) if memory else []
    settings: dict[Setting, list[Entrant]] = {}
    for model in listed("models", models or (big if on_gpu else "vit_base_patch16_224")):
        require_model("models", model)
        family = family_of(model)
        for kind, m, batch in itertools.product(
            listed("prompt-type", prompt_type or family.prompt_types[0], ("deep", "shallow")),
            positive_numbers("num-prompts", num_prompts or str(family.num_prompts)),
            positive_numbers("batch-size", batch_size or ("64" if on_gpu else "4")),
        ):
            setting = Setting(model, m, batch, kind, dtype, image_size)
            require_possible(setting, names, policies)
            settings[setting] = chosen_entrants(names, policies, family, on_gpu)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # a table cut to a pipe's 80 columns says nothing
    steps = steps or (10 if on_gpu else 1)
    common = {"dtype": dtype, "image_size": image_size, "repeats": repeats, "steps": steps}
    report = open_report(output, {**make_header(where), **common}, settings, fresh)
    console.print(f"{measure.device_name(where)}, torch {torch.__version__}, {dtype}")
    with console.status("one large product"):
        ceiling = report.once("ceiling_tflops", lambda: ceilings.large_product(where, product_dtype(dtype)))
    console.print(f"Ceiling: {ceiling:.3g} TFLOP/s, one large product.")
    running = {
        # Rows may be of implementations that are no longer there.
        setting: [one for one in report.contenders(case_of(setting), those) if one.name in IMPLEMENTATIONS]
        for setting, those in settings.items()
    }
    count = f"{len(settings)} setting{'s' if len(settings) > 1 else ''}"
    total = sum(map(len, running.values()))
    rounds = f"{repeats} round{'s' if repeats > 1 else ''} of {steps} step{'s' if steps > 1 else ''}"
    console.print(f"{count}, {total} rows, {rounds} each after one of warm-up.")
    console.print(report.describe(), soft_wrap=True)
    first_size = next(iter(settings)).batch_size
    for setting, those in running.items():
        rows = report.rows_of(case_of(setting))
        if not {*those} <= {row.contender for row in rows}:  # all again, so that compared rows ran in turns
            rows = measure_setting(setting, those, where, repeats, steps, console, ceiling)
            report.replace(case_of(setting), rows)
        is_first_size = setting.batch_size == first_size
        if find_batch and is_first_size and all(row.largest_batch is None for row in rows):
            find_batches(rows, setting, where, console)
            report.write()
        console.print(make_table(rows, dtype))
    console.print(f"written: {report.path}")
    if wrong := [row for row in report.rows if is_our_mistake(row)]:
        names = dict.fromkeys(measure.label(row.impl, row.memory) for row in wrong)
        console.print(f"[red]failed, or wrong gradients:[/] {', '.join(names)}", soft_wrap=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
