"""The training loop, from the recipe to the run folder.

:func:`train` reads top to bottom; the functions that it calls follow in the order of their use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vpt_fast.backbones.architecture import differences
from vpt_fast.backbones.sources import CONFIG_FILE, local_folder
from vpt_fast.cache import TrainingCache
from vpt_fast.classification import FORWARD_BATCH, Classification
from vpt_fast.classifier import TrainedPart, TunedClassifier, TunedModel
from vpt_fast.data import Batches, CheckedImages, Preprocessing, device_budget
from vpt_fast.failures import SavingFailed, TrainingDiverged
from vpt_fast.graphed import CaptureError, GraphedStep
from vpt_fast.methods import build_model
from vpt_fast.plots import plot_curves
from vpt_fast.precision import AUTOCAST, autocast
from vpt_fast.problem import Evaluated, Objective, Problem, Source
from vpt_fast.recipe import SEGMENTATION, Recipe
from vpt_fast.report import (
    Progress,
    checking_images,
    computing_features,
    evaluating,
    print_skipped,
    print_start,
)
from vpt_fast.run import (
    PROMPTS_GONE,
    Begun,
    Checkpoint,
    Labels,
    RunError,
    RunFolder,
    environment,
    list_digest,
)
from vpt_fast.segmentation import Segmentation
from vpt_fast.world import World, join_world

CHECK_EVERY = 16  # steps between checks of the loss: each check makes the CPU wait for the GPU


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run: ``facts`` is its run.json, ``metrics`` has a row per completed epoch.

    The last ``new_epochs`` rows are from this call. ``results``, the contents of results.json, is None until
    the last epoch is done: {val,test}_{accuracy,loss,images}, for segmentation also miou, each None if there
    was no such evaluation.
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
    cache: TrainingCache | None = None,
    on_features: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains ``recipe`` in the run folder ``out``, resuming an earlier call that was stopped.

    Stops early, with every completed epoch saved, after SIGINT or SIGTERM. ``fresh`` removes an earlier run
    first. ``cache`` holds what earlier runs in this process loaded. ``on_features`` is called while frozen
    features are computed, with the number of images that are done and of all. ``on_epoch`` is called with the
    row of each epoch that this call completed and saved; an exception that it raises ends the call. ``stop``
    is set by the first of these signals. The signal may come too late to stop this run, so a caller with
    further runs has to check it.

    Raises:
        ValueError: the request cannot be met (RunError for the folder, DataError for the data).
        TrainingDiverged: the loss is not finite; the folder keeps the last good state.
        SavingFailed: the folder can no longer be written; it keeps the last good state.
    """
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(recipe.device))
        console = console if console is not None and world.is_main else Console(quiet=True)

        # Whatever can be refused at once is refused before a folder is created or an image is read.
        if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard is on, but not installed; pip install tensorboard")
        cache = cache or TrainingCache(kept=0)
        problem = problem_of(recipe)
        splits = problem.open(recipe, cache)
        recipe = recipe.resolved(
            num_train_images=len(splits.train), device_type=world.device.type, world_size=world.size
        )

        # The run folder: a new one, or one begun with this recipe.
        folder = world.from_main(lambda: stack.enter_context(RunFolder.locked(out)))
        if fresh:
            world.from_main(folder.require_clearable)
        begun = None if fresh else world.from_main(folder.read)
        listed = world.from_main(lambda: digest_lists(recipe, splits))
        if begun:
            require_same_recipe(recipe, begun, folder)
            if begun.results is not None and (begun.results["test_images"] or not recipe.test):
                require_same_images(problem, recipe, begun, splits, listed, folder)
                world.from_main(lambda: require_same_weights(recipe, begun, splits, cache, folder))
                world.from_main(
                    lambda: restore_prompts(problem, recipe, begun, folder, splits, cache, console)
                )
                return TrainResult(out, begun.recipe, begun.facts, begun.metrics, 0, begun.results)
            if begun.results is not None and begun.checkpoint is None:
                raise RunError(
                    f"{folder.path} holds this run, finished, but not its checkpoint, from which it would go "
                    "on to the test images; vpt-fast eval takes --split test, and --fresh trains it again"
                )

        is_graphed = captures_steps(recipe, world, console, problem.graph_obstacle)

        # Model and images.
        model = build_seeded(recipe, splits, cache)
        if (dtype := AUTOCAST[recipe.precision or "fp32"]) is not None:
            model.hold_frozen_weights_in(dtype)
        model.to(world.device)
        require_attention(recipe, model, world.device)
        preprocessing = problem.preprocessing(recipe, model)
        train_images, val_images = read_images(problem, splits, preprocessing, recipe, world, console, cache)
        skipped = (*train_images.skipped, *(val_images.skipped if val_images else ()))
        splits = replace(
            splits, train=train_images.images, val=None if val_images is None else val_images.images
        )
        used = world.from_main(lambda: digest_lists(recipe, splits) if skipped else listed)
        facts = describe_run(problem, recipe, model, splits, preprocessing, world)
        facts["data"]["listed"] = {split: listed[split] for split in ("train", "val")}
        facts["data"]["used"] = {split: used[split] for split in ("train", "val")}
        if begun:
            require_same_inputs(facts, begun, folder)
        train_batches: Source = problem.batches(train_images, preprocessing, recipe, world, train=True)
        val_batches: Source | None = None
        if val_images is not None:
            val_batches = problem.batches(val_images, preprocessing, recipe, world, train=False)
        images_text = problem.describe_images(recipe, train_batches)
        print_start(console, recipe, model, splits, skipped, world, out, len(train_batches), images_text)

        rows: list[dict[str, Any]] = begun.metrics if begun and begun.checkpoint else []
        done = len(rows)

        # The network to train: with cached features, the trained part alone.
        optimizer, names = build_optimizer(recipe, model, capturable=is_graphed)
        scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
        network: nn.Module = model
        feature_seconds = 0.0
        if (
            done < recipe.epochs
            and isinstance(model, TunedClassifier)
            and caches_features(recipe, model, splits, world)
        ):
            network = TrainedPart(model)
            num_features = len(splits.train) + len(splits.val or ())
            with computing_features(
                console, num_features, feature_bytes(model, splits), world.device, on_features
            ) as advance:
                if val_images is not None:
                    val_batches = FeatureBatches(
                        model, val_images, preprocessing, recipe, world, cache, advance, train=False
                    )
                started = time.perf_counter()
                train_batches = FeatureBatches(
                    model, train_images, preprocessing, recipe, world, cache, advance, train=True
                )
                feature_seconds = time.perf_counter() - started
        parallel = stack.enter_context(world.joined(network))
        objective = problem.objective(recipe, splits, world)
        num_images = recipe.step_images(len(splits.train))
        step = TrainStep(
            parallel, recipe, optimizer, scaler, objective, num_images=num_images, is_graphed=is_graphed
        )

        # Begin, or resume after the last completed epoch.
        if begun and begun.checkpoint:
            model.load_trainable_state_dict(begun.checkpoint.trainable)
            load_optimizer(optimizer, names, begun.checkpoint.optimizer)
            scaler.load_state_dict(begun.checkpoint.scaler)
            console.print(f"Going on after epoch {done} of {recipe.epochs}.")
        elif world.is_main:
            with saving(folder, "the start of the run"):
                folder.clear()
                folder.begin(recipe, facts)
        labels = labels_of(recipe, splits, preprocessing, listed["val"])
        if done == recipe.epochs and world.is_main:
            with saving(folder, "the prompts"):  # they may be damaged, and no epoch is left to write them
                folder.save_prompts(model, labels)
        events = open_events(recipe, folder, world, done)

        stop = stop or threading.Event()
        stack.enter_context(stop_signals(stop))
        progress = stack.enter_context(Progress(console, recipe.epochs, len(train_batches), done=done))
        for epoch in range(done, recipe.epochs):
            lr = recipe.learning_rate(epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_epoch(recipe.seed, epoch, world.rank)
            network.train()  # which evaluation left in eval mode; the model is in it
            started = time.perf_counter()
            totals = train_epoch(epoch, step, train_batches, recipe, optimizer, world, stop, progress)
            if totals is None:  # asked to stop: the incomplete epoch is dropped
                break
            seconds = time.perf_counter() - started + feature_seconds
            feature_seconds = 0.0

            validation: Evaluated | None = None
            if val_batches is not None:
                validation = problem.evaluate(
                    network, val_batches, len(splits.classes), world, recipe.precision
                )
            require_finite_state(model, epoch, validation.loss if validation else 0.0)
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": totals.loss / totals.images,
                "train_accuracy": totals.hits / totals.images,
                "val_loss": validation.loss if validation else None,
                **{
                    f"val_{name}": validation.scores[name] if validation else None
                    for name in problem.score_names
                },
                "images_per_second": totals.images / seconds,
                "seconds": seconds,
            }
            rows.append(row)
            if world.is_main:
                state = Checkpoint(
                    epochs_done=len(rows),
                    trainable=model.trainable_state_dict(),
                    optimizer=optimizer_tensors(optimizer, names),
                    scaler=scaler.state_dict(),
                )
                with saving(folder, f"epoch {epoch + 1}"):
                    # The checkpoint comes last: if the process is killed before it, the epoch is repeated
                    # with the same result. Prompts saved after it could be missing for the last epoch.
                    folder.save_prompts(model, labels)
                    folder.save_epoch(rows, state)
            if events is not None:
                for name in row.keys() - {"epoch", "seconds"}:
                    if row[name] is not None:
                        events.add_scalar(name, row[name], epoch)
            progress.end_epoch(row)
            if on_epoch is not None:
                on_epoch(row)

        if events is not None:
            events.close()
        if rows and world.is_main:
            with saving(folder, "the curves"):
                plot_curves(rows, folder.curves)
        results = None
        if len(rows) == recipe.epochs:
            test = None
            progress.close()  # the test images have their own progress bar
            if recipe.test:
                test = evaluate_test(
                    problem, model, splits, preprocessing, recipe, world, console, cache, stop
                )
            results = summarise(problem, rows[-1], splits, test, listed["test"])
            if world.is_main:
                with saving(folder, "the results"):
                    folder.save_results(results)
        return TrainResult(out, recipe, facts, rows, len(rows) - done, results)


def problem_of(recipe: Recipe) -> Problem:
    """The problem that the recipe's task poses."""
    return Segmentation() if recipe.task == SEGMENTATION else Classification()


def build_seeded(recipe: Recipe, splits: Any, cache: TrainingCache) -> TunedModel:
    """The model before training. All random initialisation, also the backbone's, uses the recipe's seed."""
    torch.manual_seed(recipe.seed)
    with cache.backbones():
        return build_model(recipe, len(splits.classes))


def require_attention(recipe: Recipe, model: TunedModel, device: torch.device) -> None:
    """Raises ValueError if attention that was chosen by name does not support the precision or device."""
    try:
        with autocast(recipe.precision, device):
            model.require_attention(device)
    except ValueError as error:
        raise ValueError(f"{error} (precision {recipe.precision} on {device})") from None


def require_same_recipe(recipe: Recipe, begun: Begun, folder: RunFolder) -> None:
    """Raises RunError if the folder's run was begun with settings that give other results."""
    if differences := recipe.differences(begun.recipe):
        listed = ", ".join(
            f"{name} ({theirs} there, {ours} now)" for name, (ours, theirs) in differences.items()
        )
        raise RunError(
            f"{folder.path} holds a run with other settings: {listed}; "
            "choose another --out, or --fresh to start over there"
        )


def require_same_inputs(facts: dict[str, Any], begun: Begun, folder: RunFolder) -> None:
    """Raises RunError if the backbone, the preprocessing that follows from it, the images or the number of
    processes changed since the run began."""
    is_recorded = "used" in begun.facts["data"]  # not in runs of earlier versions
    checks = (
        ("the images", lambda of: of["data"].get("used") if is_recorded else of["data"]["digest"]),
        ("the number of processes", lambda of: of["processes"]),
    )
    changed = backbone_changes(facts["backbone"], begun.facts["backbone"])
    if found := differences(begun.facts.get("preprocessing", {}), facts["preprocessing"]):
        changed.append(f"the preprocessing ({'; '.join(found)})")
    changed += [what for what, get in checks if get(facts) != get(begun.facts)]
    if changed:
        raise RunError(
            f"{folder.path} holds a run that cannot go on: {' and '.join(changed)} changed since it began; "
            "choose another --out, or --fresh to start over there"
        )


def describe_backbone(recipe: Recipe, model: TunedModel) -> dict[str, Any]:
    """The backbone as run.json records it: its name, and its weights' fingerprint and settings."""
    found = model.config.backbone
    read = {
        name: value for name, value in (found.architecture or {}).items() if name not in model.unread_settings
    }
    return {"name": recipe.backbone, "fingerprint": found.fingerprint, "architecture": read}


def backbone_changes(now: dict[str, Any], began: dict[str, Any]) -> list[str]:
    """What of a backbone is not as it was when the run began, from two of `describe_backbone`."""
    if now["fingerprint"] != began["fingerprint"]:
        return ["the backbone's weights"]
    if "architecture" not in began:  # in runs of earlier versions
        return []
    found = differences(began["architecture"], now["architecture"])
    return [f"the backbone's settings ({'; '.join(found)})"] if found else []


def digest_lists(recipe: Recipe, splits: Any) -> dict[str, str | None]:
    """A digest of each split's list of images; None for a split that does not exist."""
    lists = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {
        split: None if images is None else list_digest(recipe.data, images) for split, images in lists.items()
    }


def require_same_images(
    problem: Problem,
    recipe: Recipe,
    begun: Begun,
    splits: Any,
    listed: dict[str, str | None],
    folder: RunFolder,
) -> None:
    """Raises RunError if a finished run's results are for other images than the recipe names. No image is
    decoded."""
    theirs = begun.facts["data"]
    ours = problem.describe_data(Path(recipe.data).expanduser(), splits)
    changed = None
    if ours["classes"] != theirs["classes"]:
        changed = "classes"
    elif "listed" in theirs:
        # Images that could not be decoded may have been removed since.
        for split in ("train", "val"):
            if listed[split] not in (theirs["listed"][split], theirs["used"][split]):
                changed = "images"
    elif ours["digest"] != theirs["digest"]:
        # The run was begun before lists were recorded. Its digest lacks images that could not be decoded,
        # which are listed now.
        pairs = [(ours[split], theirs[split]) for split in ("train", "val")]
        if not any(one and other and one["images"] > other["images"] for one, other in pairs):
            changed = "images"
    assert begun.results is not None, "the run is finished"
    if not changed and recipe.test and begun.results.get("test_listed") not in (None, listed["test"]):
        changed = "test images"
    if changed:
        raise RunError(
            f"{folder.path} holds a finished run on other {changed}: data was {begun.recipe.data} and is "
            f"{recipe.data} now; choose another --out, or --fresh to start over there"
        )


def require_same_weights(
    recipe: Recipe, begun: Begun, splits: Any, cache: TrainingCache, folder: RunFolder
) -> None:
    """Raises RunError if a finished run's backbone had other weights or settings than the recipe names;
    ValueError if the recipe's checkpoint, or the weights in its local-dir: folder, do not exist.

    The backbone is read only if the file of weights is another one than the run's, or if it or the folder's
    config.json was written after the run began; the run's own files need not exist any more.
    """
    now, was = recipe.weights_file, begun.recipe.weights_file
    ours, theirs = (path and Path(path).resolve() for path in (now, was))
    is_there = ours is None or ours.is_file()
    own = local_folder(recipe.backbone)
    files = [Path(path) for path in (ours, own and own / CONFIG_FILE) if path]
    began = folder.facts.stat().st_mtime
    if ours == theirs and not any(path.is_file() and path.stat().st_mtime > began for path in files):
        return
    if not is_there:
        setting = "checkpoint" if recipe.checkpoint else "backbone"
        raise ValueError(f"{setting} is {now}, which is no file")
    found = describe_backbone(recipe, build_seeded(recipe, splits, cache))
    changed = backbone_changes(found, begun.facts["backbone"])
    if changed and found["fingerprint"] == begun.facts["backbone"]["fingerprint"]:
        raise RunError(
            f"{folder.path} holds a finished run, and {changed[0]} changed since; choose another --out, or "
            "--fresh to start over there"
        )
    if changed:
        setting = "checkpoint" if recipe.checkpoint or begun.recipe.checkpoint else "backbone"
        raise RunError(
            f"{folder.path} holds a finished run on other weights of the backbone: {setting} was "
            f"{was or 'not given'} and is {now or 'not given'} now; choose another --out, or --fresh to "
            "start over there"
        )


def restore_prompts(
    problem: Problem,
    recipe: Recipe,
    begun: Begun,
    folder: RunFolder,
    splits: Any,
    cache: TrainingCache,
    console: Console,
) -> None:
    """Restores prompts/ of a finished run from its checkpoint if it is damaged or gone; prints a message if
    the checkpoint is gone too.

    Raises RunError if the backbone or the classes changed since the run began.
    """
    if folder.holds_prompts_of(begun.checkpoint):
        return
    if begun.checkpoint is None:
        console.print(f"{folder.path}: {PROMPTS_GONE}.", highlight=False)
        return
    model = build_seeded(recipe, splits, cache)
    changed = backbone_changes(describe_backbone(recipe, model), begun.facts["backbone"])
    if list(splits.classes) != begun.facts["data"]["classes"]:
        changed.append("the classes")
    if changed:
        raise RunError(
            f"{folder.prompts} is damaged, and cannot be written again from the checkpoint: "
            f"{' and '.join(changed)} changed since the run began; --fresh trains it again"
        )
    model.load_trainable_state_dict(begun.checkpoint.trainable)
    with saving(folder, "the prompts"):
        val_listed = begun.facts["data"].get("listed", {}).get("val")
        preprocessing = problem.preprocessing(recipe, model)
        folder.save_prompts(model, labels_of(recipe, splits, preprocessing, val_listed))
    console.print(f"{folder.prompts} was damaged, and is written again from the checkpoint.", highlight=False)


def labels_of(recipe: Recipe, splits: Any, preprocessing: Any, val_listed: str | None) -> Labels:
    """What is saved beside the prompts of a resolved recipe's run."""
    return Labels(
        splits.classes, preprocessing, recipe.val_fraction, recipe.seed, recipe.task, recipe.train_on,
        recipe.ignore_zero, val_listed,
    )  # fmt: skip


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

    def unless_stopped(advance: Callable[..., None]) -> Callable[..., None]:
        def call(*done: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            advance(*done)

        return call

    assert splits.test is not None, "opening the data saw to it"
    preprocessing = preprocessing.for_evaluation()
    with checking_images(console, len(splits.test)) as advance:
        images = problem.check(splits.test, preprocessing, recipe, world, cache, unless_stopped(advance))
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


def describe_run(
    problem: Problem, recipe: Recipe, model: TunedModel, splits: Any, preprocessing: Any, world: World
) -> dict[str, Any]:
    """The contents of run.json: what the results depend on besides the recipe."""
    return {
        **environment(world.device),
        "processes": world.size,
        "backbone": describe_backbone(recipe, model),
        "parameters": {"trained": model.num_trainable_parameters, "backbone": model.num_backbone_parameters},
        "preprocessing": preprocessing.to_dict(),
        "data": problem.describe_data(Path(recipe.data).expanduser(), splits),
    }


def caches_features(recipe: Recipe, model: TunedClassifier, splits: Any, world: World) -> bool:
    """Whether the trained part's inputs are the same in every epoch and small enough to keep."""
    if model.feature_shape is None or recipe.augment != "none":
        return False
    return feature_bytes(model, splits) <= device_budget(world.device)


def feature_bytes(model: TunedClassifier, splits: Any) -> int:
    """Bytes of the frozen features of all train and val images, in float32."""
    assert model.feature_shape is not None
    return 4 * math.prod(model.feature_shape) * (len(splits.train) + len(splits.val or ()))


class FeatureBatches:
    """As Classification.batches, with frozen features in place of images. Each process computes all of them
    once. `advance` is called with a number of images whenever theirs are computed."""

    def __init__(
        self,
        model: TunedClassifier,
        images: CheckedImages,
        preprocessing: Preprocessing,
        recipe: Recipe,
        world: World,
        cache: TrainingCache,
        advance: Callable[[int], None],
        *,
        train: bool,
    ) -> None:
        self.batches = Classification().batches(images, preprocessing, recipe, world, train=train)
        frozen = json.dumps(model.config.to_dict(), sort_keys=True)  # all that features depend on
        self.features, self.labels = cache.get(
            "features",
            (frozen, images.images, preprocessing.for_evaluation(), recipe.precision, world.device),
            lambda: compute_features(model, images, preprocessing, recipe, world, advance),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.batches.indices(epoch).to(self.features.device)
        for chunk in order.split(self.batches.batch_size):
            yield self.features[chunk], self.labels[chunk]


def compute_features(
    model: TunedClassifier,
    images: CheckedImages,
    preprocessing: Preprocessing,
    recipe: Recipe,
    world: World,
    advance: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen features of all images in order, (n, d), or (n, N, d) for tokens; and labels (n,)."""
    in_order = Batches(
        images,
        preprocessing,
        FORWARD_BATCH,
        train=False,
        seed=recipe.seed,
        device=world.device,
        workers=recipe.workers,
    )
    features, labels = [], []
    with autocast(recipe.precision, world.device):
        for x, y in in_order.epoch(0):  # x (b, 3, H, W), y (b,)
            features.append(model.frozen_features(x))
            labels.append(y)
            advance(len(y))
    return torch.cat(features), torch.cat(labels)


def graph_obstacle(recipe: Recipe, device: torch.device, num_processes: int, own: str | None) -> str | None:
    """Why training steps cannot be captured in a CUDA graph; None if they can. `own` is the problem's reason.

    Raises ValueError if a graph was requested and is not possible.
    """
    obstacle = own
    if device.type != "cuda":
        obstacle = f"the device is {device.type}"
    elif num_processes > 1:
        obstacle = f"{num_processes} processes exchange gradients"
    elif recipe.accumulate > 1:
        obstacle = f"accumulate is {recipe.accumulate}"
    elif recipe.precision == "fp16":
        obstacle = "precision is fp16, whose loss scaling looks at the gradients"
    if recipe.cuda_graph and obstacle:
        raise ValueError(f"cuda_graph: got True, and a step cannot be captured: {obstacle}")
    return obstacle


def captures_steps(recipe: Recipe, world: World, console: Console, own: str | None) -> bool:
    """Whether training steps are captured in a CUDA graph; prints the reason if a GPU's cannot be. Raises as
    `graph_obstacle` does."""
    obstacle = graph_obstacle(recipe, world.device, world.size, own)
    if obstacle and world.device.type == "cuda" and recipe.cuda_graph is None:
        console.print(f"Training steps are not captured in a CUDA graph: {obstacle}.")
    return obstacle is None and recipe.cuda_graph is not False


def build_optimizer(
    recipe: Recipe, model: TunedModel, *, capturable: bool
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer and the names of its parameters in its order; a head's last bias has no weight decay.

    `capturable`: whether its steps may be captured in a CUDA graph.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [name for name in trained if name not in model.undecayed]
    names = [*decayed, *model.undecayed]
    groups = [
        {"params": [trained[name] for name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [trained[name] for name in model.undecayed], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        adamw = torch.optim.AdamW(groups, lr=0.0, capturable=capturable, fused=capturable or None)
        return adamw, names
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=capturable or None)
    return sgd, names


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as a mapping of "slot/parameter name" to tensor."""
    state = optimizer.state_dict()["state"]  # index: {slot: tensor or None}
    return {
        f"{slot}/{names[index]}": value
        for index, slots in state.items()
        for slot, value in slots.items()
        if value is not None
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        state.setdefault(names.index(name), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
    optimizer: torch.optim.Optimizer,
    world: World,
    stop: threading.Event,
    progress: Progress,
) -> Totals | None:
    """One pass over the training images; None if it was asked to stop.

    Raises TrainingDiverged, which names the first step with a loss that is not finite, fewer than CHECK_EVERY
    steps after it.
    """
    progress.begin_epoch(epoch)
    losses = torch.zeros(len(batches), device=world.device)  # (steps,), each summed over the step's images
    hits = torch.zeros((), device=world.device)
    num_images = 0
    for step, (inputs, targets) in enumerate(batches.epoch(epoch)):
        # inputs (b, 3, H, W), or features of them; labels (b,) or masks (b, H, W): this process's share
        losses[step], step_hits = train_step(inputs, targets)
        hits += step_hits
        num_images += len(targets)
        progress.step(len(targets) * world.size)
        is_check = (step + 1) % CHECK_EVERY == 0 or step + 1 == len(batches)
        if is_check:
            seen = world.sum(losses[: step + 1])
            if bad := (~torch.isfinite(seen)).nonzero().flatten().tolist():
                lr = optimizer.param_groups[0]["lr"]
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


class TrainStep:
    """One optimizer step: ``loss_sum, hits = step(inputs, targets)``, both (), over the images of the batch.

    With `is_graphed`, batches of `num_images` replay a CUDA graph; a smaller last batch runs eagerly.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        objective: Objective,
        *,
        num_images: int,
        is_graphed: bool,
    ) -> None:
        self.network, self.recipe, self.optimizer, self.scaler = network, recipe, optimizer, scaler
        self.objective, self.num_images = objective, num_images
        self.graph: GraphedStep | None = None
        if is_graphed:
            self.graph = GraphedStep(
                network,
                optimizer,
                lambda logits, labels: objective.loss_sum(logits, labels) / len(labels),
                autocast_dtype=AUTOCAST[recipe.precision or "fp32"],
                max_grad_norm=recipe.clip_grad_norm,
            )

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graph is not None and len(targets) == self.num_images:
            try:
                loss = self.graph(inputs, targets)
            except CaptureError as error:
                raise ValueError(f"cuda_graph: {error}; want --no-cuda-graph") from error
            return loss * len(targets), self.objective.hits(self.graph.logits, targets)
        return self._eager(inputs, targets)

    def _eager(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, scaler, network = self.recipe, self.scaler, self.network
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=inputs.device)
        hits = torch.zeros((), device=inputs.device)
        parts = list(zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        for i, (x, y) in enumerate(parts):  # x and y (b / accumulate, ...)
            with exchange(network, now=i == len(parts) - 1):
                with autocast(recipe.precision, inputs.device):
                    output = network(x)  # logits (b / accumulate, classes), or a segmenter's
                loss = self.objective.loss_sum(output, y)  # ()
                scaler.scale(loss / len(targets)).backward()
            loss_sum += loss.detach()
            hits += self.objective.hits(output, y)
        if recipe.clip_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        return loss_sum, hits


def exchange(network: nn.Module, *, now: bool) -> contextlib.AbstractContextManager:
    """With `now`, processes average their gradients in this backward pass; else gradients only accumulate.

    The average is exact because all processes have equal shares of a batch.
    """
    if isinstance(network, DistributedDataParallel) and not now:
        return network.no_sync()
    return contextlib.nullcontext()


def require_finite_state(model: TunedModel, epoch: int, val_loss: float) -> None:
    """Raises TrainingDiverged if a trained parameter or the validation loss is not finite, before saving."""
    broken = [name for name, tensor in model.trainable_state_dict().items() if not tensor.isfinite().all()]
    if broken or not math.isfinite(val_loss):
        what = f"{', '.join(broken)} not finite" if broken else f"the validation loss is {val_loss}"
        raise TrainingDiverged(f"{what} after the last step of epoch {epoch + 1}; {kept(epoch)}")


def kept(epochs_done: int) -> str:
    return f"what epoch {epochs_done} ended with is kept" if epochs_done else "no epoch was completed"


@contextlib.contextmanager
def saving(folder: RunFolder, what: str) -> Iterator[None]:
    """Turns errors while ``what`` is written into SavingFailed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SavingFailed(
            f"{what} could not be saved in {folder.path}: {reason}; what was saved before is still there, "
            "and the same command goes on from it"
        ) from error


def open_events(recipe: Recipe, folder: RunFolder, world: World, epochs_done: int) -> Any:
    """A TensorBoard writer; None if none is wanted, and in all but the main process."""
    is_wanted = recipe.tensorboard
    if is_wanted is None:
        is_wanted = importlib.util.find_spec("tensorboard") is not None
    if not is_wanted or not world.is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter  # an optional dependency

    return SummaryWriter(str(folder.tensorboard), purge_step=epochs_done)
