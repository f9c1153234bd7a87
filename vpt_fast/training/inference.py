"""Using a finished run: accuracy on a split, and predictions for image files."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import DecodeError, SkippedImage, check_images, load_image, map_decoding
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.resident import resident_budget
from vpt_fast.data.scene_preprocessing import ScenePreprocessing
from vpt_fast.data.splits import open_splits
from vpt_fast.pretrained import class_of, load_pretrained
from vpt_fast.saved_model import read_pretrained
from vpt_fast.training.bars import listing_shards
from vpt_fast.training.classification import FORWARD_BATCH, Evaluation, evaluate
from vpt_fast.training.precision import AUTOCAST
from vpt_fast.training.recipe import SEGMENTATION
from vpt_fast.training.report import checking_images, evaluating
from vpt_fast.training.run import PROMPTS_GONE, Labels, RunError, list_digest
from vpt_fast.training.run_files import LABELS_FILE, RunFiles
from vpt_fast.training.world import World, find_device
from vpt_fast.tuned_model import TunedModel


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, in eval mode, with the classes and preprocessing to use it on image files.

    precision: of the autocast that evaluations run it under; fp32: none.
    """

    model: TunedModel
    labels: Labels
    device: torch.device
    precision: str = "fp32"

    @property
    def is_segmenter(self) -> bool:
        return self.labels.task == SEGMENTATION

    @property
    def preprocessing(self) -> Preprocessing:
        """Raises RunError for a run that does not classify images."""
        made = self.labels.preprocessing
        if not isinstance(made, Preprocessing):
            raise RunError(f"the run holds a {type(self.model).__name__}, which does not classify images")
        return made

    @property
    def scene_preprocessing(self) -> ScenePreprocessing:
        """Raises RunError for a run that does not segment images."""
        made = self.labels.preprocessing
        if not isinstance(made, ScenePreprocessing):
            raise RunError(f"the run holds a {type(self.model).__name__}, which does not segment images")
        return made

    @classmethod
    def load(
        cls,
        run: Path,
        device: str | None = None,
        *,
        backbone: str | None = None,
        checkpoint: Path | None = None,
        precision: str = "fp32",
    ) -> LoadedRun:
        """From a run folder or its prompts folder; with the backbone of this name, or this file of its
        weights, if it is no longer where the run found it.

        Raises ValueError if it is neither, if the backbone is not the one that it was trained on, or if there
        is a `checkpoint` and the run read its backbone from no file, or holds all weights itself, as after
        full fine-tuning.
        """
        files = RunFiles(run)
        folder = files.prompts
        if (run / LABELS_FILE).exists() or not (folder.exists() or files.config.exists()):
            folder = run
        elif not folder.exists():
            if files.checkpoint.exists():
                raise RunError(f"{folder} is gone; the command that trained the run writes it again")
            if files.results.exists():
                raise RunError(f"the run in {run} is finished, but {PROMPTS_GONE}")
            raise RunError(f"the run in {run} has not completed an epoch yet")
        labels = Labels.read(folder)
        chosen = find_device(device)
        settings, _ = read_pretrained(folder)
        if len(labels.classes) != settings["num_classes"]:
            raise RunError(
                f"{folder} has the names of {len(labels.classes)} classes ({LABELS_FILE}) and a model of "
                f"{settings['num_classes']!r}: its files are of several runs"
            )
        if checkpoint is not None and settings["backbone"].get("checkpoint") is None:
            raise ValueError(
                f"checkpoint: got {checkpoint}, and the run in {run} read its backbone's weights from no file"
            )
        if checkpoint is not None and class_of(settings, folder).stores_backbone_with(settings["options"]):
            raise ValueError(
                f"checkpoint: got {checkpoint}, and the run in {run} trained the whole backbone and holds "
                "its weights itself; leave it out"
            )
        # The run's kernels may have been chosen for a device or precision that is not used here.
        overrides = {name: "auto" for name in ("backend", "attention") if name in settings["options"]}
        if checkpoint is not None:
            overrides["checkpoint"] = str(checkpoint)
        with torch.random.fork_rng(devices=[]):
            # A backbone without published weights was initialised from the run's seed, before other draws; on
            # the CPU, so that a GPU's generator need not be seeded.
            torch.default_generator.manual_seed(labels.seed)
            model = load_pretrained(folder, backbone, **overrides)
        if (size := labels.preprocessing.image_size) != model.image_size:
            raise RunError(
                f"{folder} has images resized to {size} ({LABELS_FILE}) and a model for {model.image_size}: "
                "its files are of several runs"
            )
        if (dtype := AUTOCAST[precision]) is not None:
            model.hold_frozen_weights_in(dtype)
        return cls(model.to(chosen).eval(), labels, chosen, precision)


@torch.no_grad()
def predict_images(
    run: LoadedRun, paths: Sequence[Path], top_k: int
) -> Generator[dict[str, Any], None, None]:
    """For each path {"image", "predictions": [{"class", "probability"}, ...]}, or {"image", "error"}.

    Raises RunError for a run that does not classify images.
    """
    preprocessing, classes = run.preprocessing.for_evaluation(), run.labels.classes
    top_k = min(top_k, len(classes))
    loading = map_decoding(lambda path: load_image(path, preprocessing), paths, None)
    # Closed whatever ends this: an exception's traceback would keep it, and its threads, at work.
    with contextlib.closing(loading):
        for start in range(0, len(paths), FORWARD_BATCH):
            answers: list[dict[str, Any]] = [
                {"image": str(path)} for path in paths[start : start + FORWARD_BATCH]
            ]
            pixels = torch.empty(len(answers), 3, *preprocessing.image_size, dtype=torch.uint8)
            readable: list[dict[str, Any]] = []
            for answer, loaded in zip(answers, loading, strict=False):
                if isinstance(loaded, DecodeError):
                    answer["error"] = loaded.reason
                else:
                    # Copied at once: a cropped image would keep all that it was cut from.
                    pixels[len(readable)] = loaded
                    readable.append(answer)
            if readable:
                inputs = preprocessing.normalize(pixels[: len(readable)].to(run.device))
                top = run.model(inputs).float().softmax(1).topk(top_k)  # (b, k)
                for answer, values, indices in zip(
                    readable, top.values.tolist(), top.indices.tolist(), strict=True
                ):
                    answer["predictions"] = [
                        {"class": classes[index], "probability": value}
                        for value, index in zip(values, indices, strict=True)
                    ]
            yield from answers


@dataclass(frozen=True)
class SplitAccuracy:
    """The result of an evaluation on ``split``, and the files that were left out."""

    split: str
    classes: tuple[str, ...]
    evaluation: Evaluation
    skipped: tuple[SkippedImage, ...]

    def to_dict(self) -> dict[str, Any]:
        found = self.evaluation
        return {
            "split": self.split,
            "images": found.num_images,
            "accuracy": found.accuracy,
            "loss": found.loss,
            "per_class": {
                name: {"images": images, "accuracy": correct / images if images else None}
                for name, images, correct in zip(self.classes, found.images, found.correct, strict=True)
            },
            "skipped": [{"image": str(image.path), "reason": image.reason} for image in self.skipped],
        }


def evaluate_run(
    run: LoadedRun,
    data: str | Path,
    split: str,
    *,
    batch_size: int = FORWARD_BATCH,
    workers: int | None = None,
    data_root: str | None = None,
    console: Console | None = None,
) -> SplitAccuracy:
    """Accuracy of a run on the val or test split of ``data``, which is split as in training: by the run's
    task, or by its seed if there is no val split.

    ``console`` shows progress.

    Raises ValueError as list_split does, and for a run that does not classify images.
    """
    console = console or Console(quiet=True)
    preprocessing, classes = run.preprocessing.for_evaluation(), run.labels.classes
    images = list_split(run, data, split, data_root=data_root, console=console)
    with checking_images(console, len(images)) as advance:
        checked = check_images(
            images,
            workers=workers,
            preprocessing=preprocessing,
            keep_bytes=resident_budget(run.device),
            progress=advance,
        )
    batches = Batches(
        checked,
        preprocessing,
        batch_size,
        train=False,
        seed=0,
        device=run.device,
        workers=workers,
    )
    with evaluating(console, split, batches.num_images) as count:
        world = World(0, 1, run.device)
        found = evaluate(run.model, batches, len(classes), world, run.precision, count)
    return SplitAccuracy(split, classes, found, checked.skipped)


def list_split(
    run: LoadedRun, data: str | Path, split: str, *, data_root: str | None, console: Console
) -> ImageList:
    """The val or test split of ``data``, split as in training.

    Raises ValueError if the data have no such split or other classes, or if the split is val and the model
    was trained on it.
    """
    labels = run.labels
    if split == "val" and labels.train_on == "train+val":
        raise ValueError("split is val, whose images the run was trained on; want test, if the data have it")
    with listing_shards(console) as on_shards:
        splits = open_splits(
            data,
            task=labels.task,
            with_test=split == "test",
            val_fraction=labels.val_fraction,
            data_root=data_root,
            seed=labels.seed,
            on_shards=on_shards,
        )
    require_same_classes(data, splits.classes, labels)
    images = splits.test if split == "test" else splits.val
    if split == "val" and splits.val_is_drawn and list_digest(str(data), images) != labels.val_listed:
        console.print(
            f"[yellow]note:[/] val is drawn from {escape(str(data))} by the run's seed, and is not what "
            "the run held out: images were added or removed since, or these are others. The run may have "
            "been trained on some of them.",
            highlight=False,
            soft_wrap=True,
        )
    return images


def require_same_classes(data: str | Path, classes: tuple[str, ...], labels: Labels) -> None:
    """Raises ValueError if the classes of ``data`` are not those of the run, in the run's order."""
    if classes == labels.classes:
        return
    if other := sorted(set(classes) ^ set(labels.classes))[:5]:
        raise ValueError(f"{data} has other classes than the run was trained on, such as {', '.join(other)}")
    place = next(i for i, name in enumerate(classes) if name != labels.classes[i])
    raise ValueError(
        f"{data} has the classes that the run was trained on, but numbers them in another order: class "
        f"{place} is {classes[place]} there, and {labels.classes[place]} in the run"
    )
