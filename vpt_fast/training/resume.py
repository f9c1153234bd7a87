"""What a run's results depend on besides its recipe: recorded in run.json, and held against a later call in
the same folder, which may go on with the run or, if that is finished, takes its results."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rich.console import Console

from vpt_fast.backbones.architecture import differences
from vpt_fast.backbones.sources import CONFIG_FILE, local_folder
from vpt_fast.data.images import ImageList
from vpt_fast.data.scenes import SceneList
from vpt_fast.training.cache import TrainingCache
from vpt_fast.training.methods import build_seeded
from vpt_fast.training.problem import Problem
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import PROMPTS_GONE, Begun, Labels, RunError, RunFolder, environment, list_digest
from vpt_fast.training.world import World
from vpt_fast.tuned_model import TunedModel


def digest_lists(recipe: Recipe, splits: Any, cache: TrainingCache) -> dict[str, str | None]:
    """A digest of each split's list of images; None for a split that does not exist. Runs that share the
    images, in `cache`, share their digests: these are of the files that were read."""

    def digest(images: ImageList | SceneList) -> str:
        key = (recipe.data, images)
        return cache.get("digests", key, lambda: list_digest(recipe.data, images))

    lists = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {split: None if images is None else digest(images) for split, images in lists.items()}


def require_same_lists(recipe: Recipe, splits: Any, world: World) -> None:
    """Raises ValueError in all processes if one of them reads other images than the main one, by their names
    and classes: each takes its share of what has to be one list."""
    if world.size == 1:
        return
    digest = hashlib.sha256(repr(splits.classes).encode())
    for images in (splits.train, splits.val, splits.test):
        items = () if images is None else images.images if isinstance(images, SceneList) else images.items
        names = [item.name if isinstance(item, Path) else str(item) for item in items]
        digest.update(repr((names, getattr(images, "labels", None))).encode())
    if not world.agree(digest.hexdigest()):
        raise ValueError(
            f"data is {recipe.data}, of which not all processes read the same images; its files must be "
            "there, and readable, for each of them"
        )


def describe_run(
    problem: Problem,
    recipe: Recipe,
    model: TunedModel,
    splits: Any,
    listed: dict[str, str | None],
    used: dict[str, str | None],
    preprocessing: Any,
    world: World,
) -> dict[str, Any]:
    """The contents of run.json. `listed` and `used` are `digest_lists` of all images and of those that can be
    decoded; the latter are `splits`."""
    return {
        **environment(world.device),
        "processes": world.size,
        "backbone": describe_backbone(recipe, model),
        "parameters": {"trained": model.num_trainable_parameters, "backbone": model.num_backbone_parameters},
        "preprocessing": preprocessing.to_dict(),
        "data": {
            **problem.describe_data(splits),
            "listed": {split: listed[split] for split in ("train", "val")},
            "used": {split: used[split] for split in ("train", "val")},
        },
    }


def describe_backbone(recipe: Recipe, model: TunedModel) -> dict[str, Any]:
    """The backbone as run.json records it: its name, and its weights' fingerprint and settings."""
    found = model.config.backbone
    read = {name: value for name, value in found.architecture.items() if name not in model.unread_settings}
    return {"name": recipe.backbone, "fingerprint": found.fingerprint, "architecture": read}


def backbone_changes(now: dict[str, Any], began: dict[str, Any]) -> list[str]:
    """What of a backbone is not as it was when the run began, from two of `describe_backbone`."""
    if now["fingerprint"] != began["fingerprint"]:
        return ["the backbone's weights"]
    found = differences(began["architecture"], now["architecture"])
    return [f"the backbone's settings ({'; '.join(found)})"] if found else []


def require_same_recipe(recipe: Recipe, begun: Begun, folder: RunFolder) -> None:
    """Raises RunError if the folder's run was begun with settings that give other results."""
    if changed := recipe.differences(begun.recipe):
        listed = ", ".join(f"{name} ({theirs} there, {ours} now)" for name, (ours, theirs) in changed.items())
        raise RunError(
            f"{folder.path} holds a run with other settings: {listed}; "
            "choose another --out, or --fresh to start over there"
        )


def require_same_inputs(facts: dict[str, Any], begun: Begun, folder: RunFolder) -> None:
    """Raises RunError if the backbone, the preprocessing that follows from it, the images or the number of
    processes changed since the run began."""
    changed = backbone_changes(facts["backbone"], begun.facts["backbone"])
    if found := differences(begun.facts["preprocessing"], facts["preprocessing"]):
        changed.append(f"the preprocessing ({'; '.join(found)})")
    if facts["data"]["used"] != begun.facts["data"]["used"]:
        changed.append("the images")
    if facts["processes"] != begun.facts["processes"]:
        changed.append("the number of processes")
    if changed:
        raise RunError(
            f"{folder.path} holds a run that cannot go on: {' and '.join(changed)} changed since it began; "
            "choose another --out, or --fresh to start over there"
        )


def take_finished(
    problem: Problem,
    recipe: Recipe,
    begun: Begun,
    folder: RunFolder,
    splits: Any,
    listed: dict[str, str | None],
    cache: TrainingCache,
    console: Console,
) -> None:
    """Sees to it that a finished run's results are those of the recipe, and that its prompts are there.

    Raises ValueError as the functions below do.
    """
    require_same_images(recipe, begun, splits, listed, folder)
    require_same_weights(recipe, begun, splits, cache, folder)
    restore_prompts(problem, recipe, begun, folder, splits, cache, console)


def require_same_images(
    recipe: Recipe, begun: Begun, splits: Any, listed: dict[str, str | None], folder: RunFolder
) -> None:
    """Raises RunError if a finished run's results are for other images than the recipe names. No image is
    decoded."""
    theirs = begun.facts["data"]
    changed = None
    if list(splits.classes) != theirs["classes"]:
        changed = "classes"
    else:
        # Images that could not be decoded may have been removed since.
        for split in ("train", "val"):
            if listed[split] not in (theirs["listed"][split], theirs["used"][split]):
                changed = "images"
    assert begun.results is not None, "the run is finished"
    if not changed and recipe.test and begun.results["test_listed"] not in (None, listed["test"]):
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
    found = describe_backbone(recipe, build_seeded(recipe, len(splits.classes), cache))
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

    The classes are those of the run (`require_same_images`). Raises RunError if the backbone changed since it
    began.
    """
    if folder.holds_prompts_of(begun.checkpoint):
        return
    if begun.checkpoint is None:
        console.print(f"{folder.path}: {PROMPTS_GONE}.", highlight=False)
        return
    model = build_seeded(recipe, len(splits.classes), cache)
    changed = backbone_changes(describe_backbone(recipe, model), begun.facts["backbone"])
    if changed:
        raise RunError(
            f"{folder.prompts} is damaged, and cannot be written again from the checkpoint: "
            f"{' and '.join(changed)} changed since the run began; --fresh trains it again"
        )
    model.load_trainable_state_dict(begun.checkpoint.trainable)
    with folder.saving("the prompts"):
        val_listed = begun.facts["data"]["listed"]["val"]
        preprocessing = problem.preprocessing(recipe, model)
        folder.save_prompts(model, labels_of(recipe, splits, preprocessing, val_listed))
    console.print(f"{folder.prompts} was damaged, and is written again from the checkpoint.", highlight=False)


def labels_of(recipe: Recipe, splits: Any, preprocessing: Any, val_listed: str | None) -> Labels:
    """What is saved beside the prompts of a resolved recipe's run."""
    return Labels(
        splits.classes,
        preprocessing,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed,
        task=recipe.task,
        train_on=recipe.train_on,
        ignore_zero=recipe.ignore_zero,
        val_listed=val_listed,
    )
