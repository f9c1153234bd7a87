"""The training loop, from the recipe to the run folder.

:func:`train` reads top to bottom; the functions that it calls follow in the order of their use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from vpt_fast.backbones.resolve import require_name
from vpt_fast.classifier import TrainedPart, TunedClassifier
from vpt_fast.counting import counted
from vpt_fast.data.decode import SkippedImage
from vpt_fast.failures import OutOfMemory, TrainingDiverged, is_out_of_memory, said_of_memory
from vpt_fast.segmenter import PromptedSegmenter
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.classification import FORWARD_BATCH, Classification
from vpt_fast.training.features import caches_features, feature_batches
from vpt_fast.training.method_rules import parse_method
from vpt_fast.training.methods import build_seeded, require_operations
from vpt_fast.training.precision import AUTOCAST, autocast
from vpt_fast.training.problem import Evaluated, Problem, Source
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.training.report import (
    Progress,
    checking_images,
    device_name,
    evaluating,
    print_no_locks,
    print_skipped,
    print_start,
)
from vpt_fast.training.resume import (
    describe_run,
    digest_lists,
    labels_of,
    require_same_inputs,
    require_same_lists,
    require_same_recipe,
    take_finished,
)
from vpt_fast.training.run import Begun, Labels, RunError, RunFolder
from vpt_fast.training.saving import EpochSaver
from vpt_fast.training.segmentation import Segmentation
from vpt_fast.training.step import (
    TrainStep,
    build_optimizer,
    captures_steps,
    load_optimizer,
    moving_norms,
    require_batches,
)
from vpt_fast.training.world import World, join_world
from vpt_fast.tuned_model import TunedModel

if TYPE_CHECKING:
    from vpt_fast.training.events import EventLog

CHECK_EVERY = 16  # steps between checks of the loss: each check makes the CPU wait for the GPU


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run: ``facts`` is its run.json, ``metrics`` has a row per completed epoch.

    The last ``new_epochs`` rows are from this call. ``results``, the contents of results.json, is None until
    the last epoch is done: {val,test}_{accuracy,loss,images}, for segmentation also miou, and test_listed,
    the digest of the list of test images; each None if there was no such evaluation.
    """

    path: Path
    recipe: Recipe
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    new_epochs: int
    results: dict[str, Any] | None

    @property
    def is_finished(self) -> bool:
        return len(self.metrics) == self.recipe.epochs


def train(
    recipe: Recipe,
    out: Path,
    *,
    console: Console | None = None,
    fresh: bool = False,
    draw_curves: bool = True,
    cache: TrainingCache | None = None,
    on_features: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains ``recipe`` in the run folder ``out``, resuming an earlier call that was stopped.

    Stops early, with every completed epoch saved, after SIGINT or SIGTERM. ``fresh`` removes an earlier run
    first. ``draw_curves`` is whether curves.png is drawn. ``cache`` holds what earlier runs in this process
    loaded. ``on_features`` is called while frozen features are computed, with the number of images that are
    done and of all. ``on_epoch`` is called with the row of each epoch that this call completed; an
    exception that it raises ends the call. ``stop`` is set by the first of these signals. The signal may come
    too late to stop this run, so a caller with further runs has to check it.

    Raises:
        ValueError: the request cannot be met (RunError for the folder, DataError for the data).
        TrainingDiverged: the loss is not finite; the folder keeps the last good state.
        OutOfMemory: the device has too little for a step; the folder keeps the last good state.
        SavingFailed: the folder can no longer be written; it keeps the last good state.
    """
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(recipe.device))
        console = console if console is not None and world.is_main else Console(quiet=True)
        run = open_run(recipe, out, fresh, world, console, cache or TrainingCache(kept=0), stack)
        if (finished := finished_result(run)) is not None:
            return finished
        training = prepare_training(run, on_features, stack)
        begin_or_resume(run, training)

        stop = stop or threading.Event()
        stack.enter_context(stop_signals(stop))
        train_epochs(run, training, stop, on_epoch)
        # Test images go where the graph's memory, the optimizer's state and the other images were.
        del training
        return end_run(run, draw_curves, stop)


@dataclass
class Run:
    """What the parts of a training work on, to its end.

    splits: the images; without those that cannot be decoded as soon as the others are read.
    listed: digests of the lists of all images.
    begun: what the folder held before.
    The model, its preprocessing, the contents of run.json and the rows of the completed epochs, of which
    `done` are from earlier calls, are there after `prepare_training`.
    """

    recipe: Recipe
    problem: Problem
    world: World
    console: Console
    cache: TrainingCache
    folder: RunFolder
    splits: Any
    listed: dict[str, str | None]
    begun: Begun | None
    model: TunedModel = field(init=False)
    preprocessing: Any = field(init=False)
    facts: dict[str, Any] = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0

    @property
    def labels(self) -> Labels:
        return labels_of(self.recipe, self.splits, self.preprocessing, self.listed["val"])

    @property
    def is_trained(self) -> bool:
        return len(self.rows) == self.recipe.epochs


@dataclass
class Training:
    """What is only needed until the last epoch has ended.

    network: what is trained: the model, or with cached features the part of it that is trained.
    feature_seconds: what train's frozen features took.
    """

    network: nn.Module
    train_batches: Any
    val_batches: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: TrainStep
    feature_seconds: float


def open_run(
    recipe: Recipe,
    out: Path,
    fresh: bool,
    world: World,
    console: Console,
    cache: TrainingCache,
    stack: contextlib.ExitStack,
) -> Run:
    """Lists the images, resolves the recipe, and locks the run folder: a new one, or one begun with this
    recipe. Whatever can be refused at once is refused before a folder is created or an image is read."""
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard is on, but not installed; pip install tensorboard")
    require_name(recipe.backbone)  # to list the images may take minutes
    problem = problem_of(recipe)
    splits = problem.open(recipe, cache, console)
    recipe = recipe.resolved(
        num_train_images=len(splits.train), device_type=world.device.type, world_size=world.size
    )
    folder = world.from_main(lambda: stack.enter_context(RunFolder.locked(out)))
    if not folder.is_locked:
        print_no_locks(console, out)
    if fresh:
        world.from_main(folder.require_clearable)
    begun = None if fresh else world.from_main(folder.read)
    listed = world.from_main(lambda: digest_lists(recipe, splits, cache))
    if begun:
        require_same_recipe(recipe, begun, folder)
    return Run(recipe, problem, world, console, cache, folder, splits, listed, begun)


def finished_result(run: Run) -> TrainResult | None:
    """The result of a run that an earlier call has finished; None if there is more to do. Raises RunError if
    what is left cannot be done."""
    begun, path = run.begun, run.folder.path
    if begun is None or begun.results is None:
        return None
    if begun.results["test_images"] or not run.recipe.test:
        run.world.from_main(
            lambda: take_finished(
                run.problem, run.recipe, begun, run.folder, run.splits, run.listed, run.cache, run.console
            )
        )
        return TrainResult(path, begun.recipe, begun.facts, begun.metrics, 0, begun.results)
    if begun.checkpoint is None:
        raise RunError(
            f"{path} holds this run, finished, but not its checkpoint, from which it would go "
            "on to the test images; vpt-fast eval takes --split test, and --fresh trains it again"
        )
    return None


def prepare_training(
    run: Run, on_features: Callable[[int, int], None] | None, stack: contextlib.ExitStack
) -> Training:
    """Builds the model, reads the images, and says what will be trained."""
    recipe, problem, world, console, cache = run.recipe, run.problem, run.world, run.console, run.cache
    is_graphed = captures_steps(recipe, world, console, problem.graph_obstacle)
    model = run.model = build_model_on_device(run)
    preprocessing = run.preprocessing = problem.preprocessing(recipe, model)
    train_images, val_images, skipped = read_usable_images(run)
    splits = run.splits
    used = world.from_main(lambda: digest_lists(recipe, splits, cache) if skipped else run.listed)
    run.facts = describe_run(problem, recipe, model, splits, run.listed, used, preprocessing, world)
    if run.begun:
        require_same_inputs(run.facts, run.begun, run.folder)
        if run.begun.checkpoint:
            run.rows, run.done = run.begun.metrics, len(run.begun.metrics)
    if recipe.prompt_init == "tokens" and run.done == 0:
        init_prompts(problem, model, train_images, preprocessing, recipe, world.device, console)

    # Pixels are kept for epochs that read images: not with cached features, nor if no epoch is left.
    lists = [splits.train] if splits.val is None else [splits.train, splits.val]
    with_features = not run.is_trained and caches_features(recipe, model, lists, preprocessing, world, cache)
    reads_images = not run.is_trained and not with_features
    placed = recipe if reads_images else replace(recipe, resident="off")
    train_batches: Any = problem.batches(train_images, preprocessing, placed, world, train=True)
    val_batches: Any = None
    if val_images is not None:
        val_batches = problem.batches(val_images, preprocessing, placed, world, train=False)
    images_text = problem.describe_images(recipe, train_batches, read_once=not reads_images)
    path, steps = run.folder.path, len(train_batches)
    print_start(console, recipe, model, splits, skipped, world, path, steps, images_text)

    network: nn.Module = model
    feature_seconds = 0.0
    if with_features:
        assert isinstance(model, TunedClassifier)
        network = TrainedPart(model)
        train_batches, val_batches, feature_seconds = feature_batches(
            model,
            (train_images, train_batches),
            None if val_images is None else (val_images, val_batches),
            preprocessing,
            recipe,
            world,
            console,
            cache,
            on_features,
        )
    del train_images, val_images  # pixels that are on the GPU are not kept in host memory too
    optimizer = build_optimizer(recipe, model, capturable=is_graphed)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
    joined = network
    if is_graphed:
        world.share_parameters(network)  # the step averages its gradients
    else:
        joined = stack.enter_context(world.joined(network))
    step = TrainStep(
        joined,
        recipe,
        optimizer,
        scaler,
        problem.objective(recipe, splits, world),
        num_images=recipe.step_images(len(splits.train), world.size),
        is_graphed=is_graphed,
        process_group=world.group,
    )
    return Training(network, train_batches, val_batches, optimizer, scaler, step, feature_seconds)


def begin_or_resume(run: Run, training: Training) -> None:
    """Writes the start of a new run; or goes on after the last completed epoch."""
    begun, folder = run.begun, run.folder
    if begun and begun.checkpoint:
        run.model.load_trainable_state_dict(begun.checkpoint.trainable)
        load_optimizer(training.optimizer, begun.checkpoint.optimizer)
        training.scaler.load_state_dict(begun.checkpoint.scaler)
        run.facts = begun.facts
        run.console.print(f"Going on after epoch {run.done} of {run.recipe.epochs}.")
    elif run.world.is_main:
        with folder.saving("the start of the run"):
            folder.clear()
            folder.begin(run.recipe, run.facts)
    if run.is_trained and run.world.is_main:
        with folder.saving("the prompts"):  # they may be damaged, and no epoch is left to write them
            folder.save_prompts(run.model, run.labels)


def train_epochs(
    run: Run,
    training: Training,
    stop: threading.Event,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Trains the epochs that are left, until ``stop`` is set, and saves each."""
    recipe, world, folder, rows = run.recipe, run.world, run.folder, run.rows
    optimizer, network, train_batches = training.optimizer, training.network, training.train_batches
    feature_seconds = training.feature_seconds
    with contextlib.ExitStack() as stack:
        if (events := open_events(recipe, folder, world, run.done)) is not None:
            stack.callback(events.close)
        saver = EpochSaver(folder, run.model, run.labels)
        stack.callback(saver.close)
        progress = Progress(run.console, recipe.epochs, len(train_batches), done=run.done)
        stack.enter_context(progress)
        for epoch in range(run.done, recipe.epochs):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(epoch)
            seed_epoch(recipe.seed, epoch, world.rank)
            network.train()  # which evaluation left in eval mode; the model is in it
            started = time.perf_counter()
            totals = train_epoch(epoch, training.step, train_batches, recipe, world, stop, progress)
            if totals is None:  # asked to stop: the incomplete epoch is dropped
                break
            for norm in moving_norms(network):  # each process's are of its own images
                world.average(b for b in norm.buffers() if b.is_floating_point())
            seconds = time.perf_counter() - started + feature_seconds
            feature_seconds = 0.0

            validation: Evaluated | None = None
            if training.val_batches is not None and recipe.evaluates_after(epoch):
                num_classes = len(run.splits.classes)
                validation = run.problem.evaluate(
                    network, training.val_batches, num_classes, world, recipe.precision, progress.validate
                )
            require_finite_state(run.model, epoch, validation.loss if validation else 0.0)
            row = epoch_row(run.problem, recipe, epoch, totals, validation, seconds)
            rows.append(row)
            if world.is_main:
                saver.end_epoch(rows, optimizer, training.scaler, is_last=run.is_trained)
            if events is not None:
                with folder.saving(f"the TensorBoard log of epoch {len(rows)}", folder.tensorboard):
                    shown = row.keys() - {"epoch", "seconds"}
                    events.add(epoch, {name: row[name] for name in shown if row[name] is not None})
            progress.end_epoch(row)
            if on_epoch is not None:
                on_epoch(row)


def end_run(run: Run, draw_curves: bool, stop: threading.Event) -> TrainResult:
    """Draws the curves and, after the last epoch, evaluates on test and writes the results."""
    folder, rows = run.folder, run.rows
    if rows and draw_curves and run.world.is_main:
        from vpt_fast.training.plots import plot_curves  # matplotlib takes half a second

        with folder.saving("the curves"):
            plot_curves(rows, folder.curves)
    results = None
    if run.is_trained:
        test = None
        if run.recipe.test:
            test = evaluate_test(
                run.problem, run.model, run.splits, run.preprocessing, run.recipe, run.world, run.console,
                run.cache, stop,
            )  # fmt: skip
        results = summarise(run.problem, rows[-1], run.splits, test, run.listed["test"])
        if run.world.is_main:
            with folder.saving("the results"):
                folder.save_results(results)
    return TrainResult(folder.path, run.recipe, run.facts, rows, len(rows) - run.done, results)


def problem_of(recipe: Recipe) -> Problem:
    """The problem that the recipe's task poses."""
    return Segmentation() if recipe.task == SEGMENTATION else Classification()


def build_model_on_device(run: Run) -> TunedModel:
    """The recipe's model as it starts. Raises ValueError if its operations cannot be had there."""
    model = build_seeded(run.recipe, len(run.splits.classes), run.cache)
    if (dtype := AUTOCAST[run.recipe.precision or "fp32"]) is not None:
        model.hold_frozen_weights_in(dtype)
    model.to(run.world.device)
    require_operations(run.recipe, model, run.world.device)
    return model


def read_usable_images(run: Run) -> tuple[Any, Any, tuple[SkippedImage, ...]]:
    """The results of `read_images`, and what they leave out, which is then in no split either."""
    require_same_lists(run.recipe, run.splits, run.world)  # of which each may check a share
    train, val = read_images(
        run.problem, run.splits, run.preprocessing, run.recipe, run.world, run.console, run.cache
    )
    run.splits = replace(run.splits, train=train.images, val=None if val is None else val.images)
    require_same_lists(run.recipe, run.splits, run.world)
    require_batches(run.recipe, run.model, len(run.splits.train), run.world)
    return train, val, (*train.skipped, *(val.skipped if val else ()))


def read_images(
    problem: Problem,
    splits: Any,
    preprocessing: Any,
    recipe: Recipe,
    world: World,
    console: Console,
    cache: TrainingCache,
) -> tuple[Any, Any]:
    """The results of the problem's `check` of train and of val; None for val if there is none."""
    lists = [images for images in (splits.train, splits.val) if images is not None]
    with checking_images(console, sum(map(len, lists))) as advance:
        train, *val = (
            problem.check(
                images,
                preprocessing if images is splits.train else preprocessing.for_evaluation(),
                recipe,
                world,
                cache,
                advance,
            )
            for images in lists
        )
    return train, val[0] if val else None


def init_prompts(
    problem: Problem,
    model: TunedModel,
    images: Any,
    preprocessing: Any,
    recipe: Recipe,
    device: torch.device,
    console: Console,
) -> None:
    """Starts the prompts from tokens of training images, the same ones in every process: of those that a
    single process trains on first, FORWARD_BATCH at most. images: the result of the problem's `check`."""
    few: dict[str, Any] = dict(batch_size=FORWARD_BATCH, workers=0)
    if isinstance(problem, Classification):
        few["resident"] = "off"  # they are read once
    batches = problem.batches(images, preprocessing, replace(recipe, **few), World(0, 1, device), train=True)
    inputs, _ = next(iter(batches.epoch(0)))  # (b, 3, H, W)
    console.print(f"Prompts start from tokens of {counted(len(inputs), 'training image')}.")
    prompted: Any = model.encoder if isinstance(model, PromptedSegmenter) else model
    with autocast(recipe.precision, device):
        prompted.init_prompts_from(inputs, torch.Generator().manual_seed(recipe.seed))


def open_events(recipe: Recipe, folder: RunFolder, world: World, epochs_done: int) -> EventLog | None:
    """The TensorBoard log; None if none is wanted, and in all but the main process."""
    is_wanted = recipe.tensorboard
    if is_wanted is None:
        is_wanted = importlib.util.find_spec("tensorboard") is not None
    if not is_wanted or not world.is_main:
        return None
    from vpt_fast.training.events import EventLog  # which imports the optional tensorboard

    with folder.saving("the TensorBoard log"):
        return EventLog(folder.tensorboard, epochs_done)


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seeds torch's generators, so that prompt dropout depends on these three numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


@contextlib.contextmanager
def stop_signals(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``stop``; the second interrupts at once."""
    process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a decoding worker that has just been forked
            return
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Totals:
    """Sums over an epoch's images in all processes."""

    loss: float
    hits: float
    images: float


def train_epoch(
    epoch: int,
    train_step: TrainStep,
    batches: Source,
    recipe: Recipe,
    world: World,
    stop: threading.Event,
    progress: Progress,
) -> Totals | None:
    """One pass over the training images; None if it was asked to stop.

    Raises TrainingDiverged, which names the first step with a loss that is not finite, fewer than CHECK_EVERY
    steps after it, and OutOfMemory.
    """
    progress.begin_epoch(epoch)
    losses = torch.zeros(len(batches), device=world.device)  # (steps,), each summed over the step's images
    hits = torch.zeros((), device=world.device)
    num_images = 0
    for step, (inputs, targets) in enumerate(batches.epoch(epoch)):
        # inputs (b, 3, H, W), or features of them; labels (b,) or masks (b, H, W): this process's share
        try:
            losses[step], step_hits = train_step(inputs, targets)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            less = "--accumulate splits a batch"
            if "memory" in parse_method(recipe.method).rule.knobs:
                less += ", --memory recompute keeps less for the backward pass"
            raise OutOfMemory(
                f"{device_name(world.device)} has too little memory for a step of "
                f"{counted(len(targets), 'image')}: {said_of_memory(error)} ({kept(epoch)}); {less}"
            ) from error
        hits += step_hits
        num_images += len(targets)
        progress.step(len(targets) * world.size)
        is_check = (step + 1) % CHECK_EVERY == 0 or step + 1 == len(batches)
        if is_check:
            seen = world.sum(losses[: step + 1])
            if bad := (~torch.isfinite(seen)).nonzero().flatten().tolist():
                lr = recipe.learning_rate(epoch)
                raise TrainingDiverged(
                    f"the loss is {seen[bad[0]].item()} in epoch {epoch + 1} of {recipe.epochs}, "
                    f"step {bad[0] + 1} of {len(batches)}, at a learning rate of {lr:g}; "
                    f"{kept(epoch)}; a lower base_lr may help"
                )
        # A single process can stop after any step; several have to stop at the same one.
        if (is_check or world.size == 1) and world.any(stop.is_set()):
            return None
    totals = world.sum(torch.stack([losses.sum(), hits, torch.full_like(hits, num_images)]))
    return Totals(*totals.tolist())


def require_finite_state(model: TunedModel, epoch: int, val_loss: float) -> None:
    """Raises TrainingDiverged if a trained parameter or the validation loss is not finite, before saving."""
    broken = [name for name, tensor in model.trainable_state_dict().items() if not tensor.isfinite().all()]
    if broken or not math.isfinite(val_loss):
        what = f"{', '.join(broken)} not finite" if broken else f"the validation loss is {val_loss}"
        raise TrainingDiverged(f"{what} after the last step of epoch {epoch + 1}; {kept(epoch)}")


def kept(epochs_done: int) -> str:
    return f"what epoch {epochs_done} ended with is kept" if epochs_done else "no epoch was completed"


def epoch_row(
    problem: Problem, recipe: Recipe, epoch: int, totals: Totals, validation: Evaluated | None, seconds: float
) -> dict[str, Any]:
    """A line of metrics.jsonl; the values of val are None if there was no validation."""
    return {
        "epoch": epoch,
        "lr": recipe.learning_rate(epoch),
        "train_loss": totals.loss / totals.images,
        "train_accuracy": totals.hits / totals.images,
        "val_loss": validation.loss if validation else None,
        **{f"val_{name}": validation.scores[name] if validation else None for name in problem.score_names},
        "images_per_second": totals.images / seconds,
        "seconds": seconds,
    }


def evaluate_test(
    problem: Problem,
    model: TunedModel,
    splits: Any,
    preprocessing: Any,
    recipe: Recipe,
    world: World,
    console: Console,
    cache: TrainingCache,
    stop: threading.Event,
) -> Evaluated:
    """Loss and scores on the test images; those that cannot be decoded are reported and left out.

    Raises KeyboardInterrupt if asked to stop; training is saved, so the same command resumes here.
    """

    def unless_stopped(advance: Callable[[int], None]) -> Callable[[int], None]:
        def call(count: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            advance(count)

        return call

    assert splits.test is not None, "opening the data saw to it"
    preprocessing = preprocessing.for_evaluation()
    with checking_images(console, len(splits.test)) as advance:
        images = problem.check(splits.test, preprocessing, recipe, world, cache, unless_stopped(advance))
    require_same_lists(recipe, replace(splits, test=images.images), world)
    print_skipped(console, images.skipped)
    batches = problem.batches(images, preprocessing, recipe, world, train=False)
    with evaluating(console, "test", len(images.images)) as count:
        return problem.evaluate(
            model, batches, len(splits.classes), world, recipe.precision, unless_stopped(count)
        )


def summarise(
    problem: Problem, last: dict[str, Any], splits: Any, test: Evaluated | None, test_listed: str | None
) -> dict[str, Any]:
    """The contents of results.json, from the last epoch's row and the evaluation on test."""
    return {
        **{f"val_{name}": last[f"val_{name}"] for name in problem.score_names},
        "val_loss": last["val_loss"],
        "val_images": None if splits.val is None else len(splits.val),
        **{f"test_{name}": test.scores[name] if test else None for name in problem.score_names},
        "test_loss": test.loss if test else None,
        "test_images": test.num_images if test else None,
        "test_listed": test_listed if test else None,
    }
