"""Writing, reading and locking a run folder, whose files `run_files` names.

All but metrics.jsonl and tensorboard/ are replaced atomically, so an interruption or a full disk leaves the
last good one. An epoch adds its line to metrics.jsonl; of one that an interruption cut off nothing is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch

from vpt_fast.counting import counted
from vpt_fast.data.images import ImageItem, ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.scene_preprocessing import ScenePreprocessing
from vpt_fast.data.scenes import SceneList
from vpt_fast.data_names import is_factory_name
from vpt_fast.failures import SavingFailed
from vpt_fast.files import (
    as_json,
    holds,
    lock_file,
    parse_json,
    read_json,
    remove_unfinished,
    write,
    write_json,
)
from vpt_fast.saved_model import CONFIG_FILE, WEIGHTS_FILE, read_pretrained
from vpt_fast.training.recipe import SEGMENTATION, Recipe
from vpt_fast.training.run_files import LABELS_FILE, RunFiles
from vpt_fast.tuned_model import TunedModel

CHECKPOINT_FORMAT = "1"
PROMPTS_GONE = (
    "its prompts are gone or damaged, and the checkpoint that they could be written from is gone (of a "
    "sweep's trials the best one's are kept); --fresh trains it again"
)

# Decoding workers, forked while a folder is locked, outlive a killed process by seconds. With a copy of its
# lock they would keep the folder from the process that is to resume the run.
_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


class RunError(ValueError):
    """The run folder cannot be used as requested."""


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to resume: the state after ``epochs_done`` epochs.

    No generator state is kept: each epoch seeds its own generator with (seed, epoch, rank).
    """

    epochs_done: int
    trainable: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]  # "slot/parameter name"
    scaler: dict[str, Any]

    def copied(self) -> Checkpoint:
        """A copy in host memory, which further steps do not change."""
        trainable, optimizer = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.trainable, self.optimizer)
        )
        return Checkpoint(self.epochs_done, trainable, optimizer, self.scaler)


@dataclass(frozen=True)
class Labels:
    """What turns a saved model into a classifier or segmenter of image files, saved beside its prompts."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing | ScenePreprocessing
    val_fraction: float
    seed: int
    task: str | None
    train_on: str
    ignore_zero: bool | None  # of a segmenter's data
    val_listed: str | None  # `list_digest` of val; None of a run without

    def to_json(self) -> bytes:
        return as_json(
            {
                "classes": list(self.classes),
                "preprocessing": self.preprocessing.to_dict(),
                "split": {
                    "task": self.task,
                    "train_on": self.train_on,
                    "val_fraction": self.val_fraction,
                    "seed": self.seed,
                    "ignore_zero": self.ignore_zero,
                    "val_listed": self.val_listed,
                },
            }
        )

    @classmethod
    def read(cls, folder: Path) -> Labels:
        """Raises RunError if ``folder`` has no readable labels."""
        path = folder / LABELS_FILE
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            is_segmenter = values["split"]["task"] == SEGMENTATION
            kind: Any = ScenePreprocessing if is_segmenter else Preprocessing
            if not all(isinstance(name, str) for name in values["classes"]):
                raise TypeError("classes that are no text")
            if type(values["split"]["seed"]) is not int:
                raise TypeError("a seed that is no whole number")
            return cls(tuple(values["classes"]), kind.from_dict(values["preprocessing"]), **values["split"])
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{folder} is neither a run folder nor its prompts folder ({path} is missing)"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not ours
            raise RunError(f"{path} cannot be read: {error!r}") from None


@dataclass(frozen=True)
class Begun:
    """The run in a folder: its resolved recipe, run.json, and progress so far."""

    recipe: Recipe
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]  # one row per epoch of the checkpoint
    checkpoint: Checkpoint | None
    results: dict[str, Any] | None  # after the last epoch


class RunFolder(RunFiles):
    """The files of a run; training obtains one with :meth:`locked`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Bytes and rows of the metrics as this process left them.
        self._metrics_size: int | None = None
        self._num_rows = 0
        self.is_locked = False

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path) -> Iterator[RunFolder]:
        """Creates the folder and locks it against other processes; RunError if that fails."""
        lock, is_locked = _lock(path)
        with lock:
            folder = cls(path)
            folder.is_locked = is_locked
            folder.remove_unfinished()
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):  # it is gone, or another process has just begun in it
                    if os.listdir(path) == [".lock"]:  # nothing was written: leave no empty folder behind
                        (path / ".lock").unlink()
                        path.rmdir()

    def remove_unfinished(self) -> None:
        """Removes temporary files that a killed process left beside the run's files."""
        if not self.config.exists():
            return
        files = [self.config, self.facts, self.metrics, self.results, self.curves, self.checkpoint]
        files += [self.prompts / name for name in (LABELS_FILE, CONFIG_FILE, WEIGHTS_FILE)]
        remove_unfinished(*files)

    def require_clearable(self) -> None:
        """Raises RunError if `clear` would remove files that are not a run's."""
        if self.config.exists() and not any(f.exists() for f in (self.facts, self.metrics, self.checkpoint)):
            raise RunError(
                f"{self.config} is not of a run, none of whose other files are there; choose another --out"
            )

    def clear(self) -> None:
        """Removes an earlier run if there is one, and no other files in the folder."""
        if not self.config.exists():
            return
        # config.yaml goes after the results and the checkpoint: if this is interrupted, the rest is still
        # recognised as this run, and a later run cannot mistake them for its own.
        for path in (self.results, self.checkpoint, self.metrics, self.curves):
            path.unlink(missing_ok=True)
        for path in (self.prompts, self.tensorboard):
            if path.is_dir():
                shutil.rmtree(path)
        for path in (self.config, self.facts):
            path.unlink(missing_ok=True)

    def read(self) -> Begun | None:
        """The run in this folder, None if there is none; RunError for a broken file."""
        if not self.config.exists():
            return None
        recipe = Recipe.from_yaml(self.config)
        checkpoint = self.read_checkpoint()
        facts = _read_json(self.facts, "backbone", "data", "processes")
        results = _read_json(self.results, "test_images") if self.results.exists() else None
        # A finished run does not need its checkpoint.
        done = recipe.epochs if results is not None else 0
        if checkpoint is not None:
            done = checkpoint.epochs_done
        rows = self._read_metrics(done) if done else []
        if len(rows) < done:
            raise RunError(f"{self.metrics} has {len(rows)} of {counted(done, 'epoch')}; {_NOT_OURS}")
        return Begun(recipe, facts, rows, checkpoint, results)

    def _read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            return [parse_json(line) for line in lines[:epochs]]  # the next may be incomplete
        except (OSError, ValueError) as error:
            raise RunError(f"{self.metrics} cannot be read: {error}; {_NOT_OURS}") from None

    def begin(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Writes what stays the same for the whole run; config.yaml last, since it marks a run's folder."""
        write_json(self.facts, facts)
        write(self.config, recipe.to_yaml().encode())
        self.remove_unfinished()  # of a process that was killed before this folder was marked as a run's

    def save_epoch(self, rows: list[dict[str, Any]], checkpoint: Checkpoint) -> None:
        """Writes metrics first: a resumed run drops rows past the checkpoint, but could not restore missing
        ones."""
        self.add_metrics(rows)
        with open(self.metrics, "rb+") as file:
            os.fsync(file.fileno())
        tensors = {f"trainable/{name}": tensor for name, tensor in checkpoint.trainable.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {
            "format": CHECKPOINT_FORMAT,
            "epochs_done": str(checkpoint.epochs_done),
            "scaler": json.dumps(checkpoint.scaler),
        }
        write(self.checkpoint, safetensors.torch.save(tensors, header))

    def add_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Appends what is new if the file is as this process left it, and else writes all rows: to write ten
        thousand after each of as many epochs would take longer than the epochs."""
        if not self.metrics.exists() or self.metrics.stat().st_size != self._metrics_size:
            write(self.metrics, "".join(map(_line, rows)).encode())
        else:
            with open(self.metrics, "ab") as file:
                file.write("".join(map(_line, rows[self._num_rows :])).encode())
        self._metrics_size, self._num_rows = self.metrics.stat().st_size, len(rows)

    @contextlib.contextmanager
    def saving(self, what: str, place: Path | None = None) -> Iterator[None]:
        """Turns errors while ``what`` is written to ``place``, by default the run folder, into SavingFailed.
        That the folder is gone is one too: the writing might make it anew, without the rest of the run."""
        place = place or self.path
        try:
            os.stat(place)
            yield
        except (OSError, safetensors.SafetensorError) as error:
            if not place.is_dir():
                raise SavingFailed(f"{what} could not be saved: the folder {place} is gone") from error
            reason = getattr(error, "strerror", None) or error
            raise SavingFailed(
                f"{what} could not be saved in {self.path}: {reason}; what was saved before is still there, "
                "and the same command goes on from it"
            ) from error

    def save_results(self, results: Mapping[str, Any]) -> None:
        write_json(self.results, results)

    def save_prompts(self, model: TunedModel, labels: Labels) -> None:
        model.save_pretrained(self.prompts)
        path, data = self.prompts / LABELS_FILE, labels.to_json()
        if not holds(path, data):
            write(path, data)

    def holds_prompts_of(self, checkpoint: Checkpoint | None) -> bool:
        """Whether prompts/ is complete and, if there is a ``checkpoint``, has its weights."""
        try:
            if not self.prompts.is_dir():  # read_pretrained would take the path for a name on the hub
                return False
            Labels.read(self.prompts)
            _, saved = read_pretrained(self.prompts)
        except (ValueError, OSError):
            return False
        if checkpoint is None:
            return True
        wanted = checkpoint.trainable
        return saved.keys() == wanted.keys() and all(
            saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor)
            for name, tensor in wanted.items()
        )

    def read_checkpoint(self) -> Checkpoint | None:
        """The state after the last saved epoch, None before the first; RunError for a broken file."""
        if not self.checkpoint.exists():
            return None
        try:
            with safetensors.safe_open(self.checkpoint, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise RunError(f"{self.checkpoint} cannot be read: {error}") from None
        if header.get("format") != CHECKPOINT_FORMAT:
            raise RunError(f"{self.checkpoint} has format {header.get('format')}, not {CHECKPOINT_FORMAT}")

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            done, scaler = int(header["epochs_done"]), parse_json(header["scaler"])
        except (KeyError, ValueError) as error:
            raise RunError(f"{self.checkpoint} cannot be read: its header has no such {error}") from None
        return Checkpoint(done, part("trainable/"), part("optimizer/"), scaler)


def _lock(folder: Path) -> tuple[IO[str], bool]:
    """Creates the folder and locks its lock file, until that is closed. RunError if it cannot be written, or
    if another process has locked it.

    Returns:
        The lock file, and whether it could be locked.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")
            _locks.add(lock)
        except OSError as error:
            raise RunError(f"out is {folder}, which cannot be written: {error.strerror}") from None
        try:
            is_locked = lock_file(lock, wait=False)
        except BlockingIOError:
            lock.close()
            raise RunError(
                f"another process is training in {folder}; wait for it or choose another --out"
            ) from None
        # A process that wrote nothing may have removed the file after it was opened here: the next process
        # would lock another one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / ".lock")):
                return lock, is_locked
        lock.close()


def default_run_folder(recipe: Recipe) -> Path:
    """runs/<data>-<backbone>-<method>: the same command gives the same folder."""
    return Path("runs") / f"{data_and_backbone(recipe)}-{recipe.method}"


def data_and_backbone(recipe: Recipe) -> str:
    """<data>-<backbone>, as folders of runs are named by default."""
    data = Path(recipe.data).resolve().name
    if recipe.task == SEGMENTATION:
        data += "-segmentation"
    elif recipe.task is not None:
        data = recipe.task.replace("/", "-")
    backbone = recipe.backbone.replace("/", "_").replace(":", "_")
    return f"{data}-{backbone}"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, for run.json."""
    packages = ("torch", "torchvision", "timm", "triton", "numpy", "safetensors")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"versions": versions, "device": {"type": device.type, "name": name}}


def list_digest(data: str, images: ImageList | SceneList) -> str:
    """Digest of the listed images' names below ``data``, classes and file sizes. It does not depend on where
    the data are stored, or on which images are readable."""
    digest = hashlib.sha256()
    if is_factory_name(data):  # its rows are named by number alone
        digest.update(f"{data}\0".encode())
    root = os.path.join(os.path.abspath(Path(data).expanduser()), "")
    if isinstance(images, SceneList):
        digest.update(f"{images.classes}\0{images.ignores_zero}\0".encode())
        named: Iterator[tuple[ImageItem, str]] = ((path, "") for path in (*images.images, *images.masks))
    else:
        classes = (images.classes[label] for label in images.labels)
        named = zip(images.items, classes, strict=True)
    for item, name in named:
        if isinstance(item, Path):
            try:
                size = item.stat().st_size
            except OSError:  # such as a dangling link
                size = None
            path = os.path.abspath(item)
            # relpath takes apart both paths, which for each of a million images takes longer than all else.
            below = path[len(root) :] if path.startswith(root) else os.path.relpath(path, root)
            digest.update(f"{below}\0{name}\0{size}\0".encode())
        else:
            digest.update(f"{item}\0{name}\0{getattr(item, 'size', None)}\0".encode())
    return digest.hexdigest()


_NOT_OURS = (
    "a run whose files were changed cannot go on; choose another --out, or --fresh to start over there"
)


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """`files.read_json` of a run's file; raises RunError."""
    try:
        return read_json(path, *keys)
    except ValueError as error:
        raise RunError(f"{error}; {_NOT_OURS}") from None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
