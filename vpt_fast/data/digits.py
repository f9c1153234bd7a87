"""The 1,797 real handwritten digits that scikit-learn ships, as a folder of images."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vpt_fast.counting import counted
from vpt_fast.files import lock_file

from .images import DataError

DIGITS_SPLITS = {"train": 800, "val": 200, "test": 797}
"""Images in each split: 1,000 for training and model selection, as in VTAB-1k, and the rest."""
DIGITS_SIZE = 32
"""Height and width of the images written, in pixels; the originals are 8×8."""
_MANIFEST = "digits.json"


def export_digits(root: str | os.PathLike[str], *, seed: int) -> None:
    """Writes the UCI handwritten digits (scikit-learn's `load_digits`) as
    `root/{train,val,test}/{0..9}/*.png`.

    1,797 greyscale images, 8×8 with 17 grey levels, are scaled to 0..255 and resized to 32×32 (bicubic), and
    split by `seed` into 800 / 200 / 797, stratified by class. The folder is written completely or not at all.
    A complete one of the same seed is left as it is; one of another seed, or with files missing, is
    rewritten.

    Raises:
        DataError: `root` is a file, or a folder with files that this function did not write.
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed: {seed}, wanted 0 or more")
    root = Path(root).expanduser().resolve()
    files = _split_digits(seed)
    if _is_complete(root, set(files)):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    from sklearn.datasets import load_digits  # takes seconds

    images = load_digits().images  # (1797, 8, 8), 0..16
    with _scratch_folder(root) as scratch:
        new = scratch / "new"
        for name, index in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray(np.rint(images[index] * (255 / 16)).astype(np.uint8))
            grey.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC).save(path)
        manifest = {"source": "sklearn.datasets.load_digits", "seed": seed, "images": DIGITS_SPLITS}
        (new / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if root.exists():
            os.rename(root, scratch / "old")
        try:
            os.rename(new, root)
        except OSError:
            # Another process, perhaps of the same run, may have been quicker.
            if not _is_complete(root, set(files)):
                raise


@contextlib.contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A temporary folder beside `root`, which is removed at the end, as are those that killed processes left.
    A lock tells them from those in use."""
    prefix = f".{root.name}.unfinished-"
    for left in root.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(FileNotFoundError), _locked(left) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent) as scratch, _locked(Path(scratch)):
        yield Path(scratch)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Yields whether it could be locked: not if another process has, and not where there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            is_locked = lock_file(descriptor, wait=False)
        except BlockingIOError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _split_digits(seed: int) -> dict[str, int]:
    """File name below the root -> index of the image in scikit-learn's list."""
    from sklearn.datasets import load_digits  # takes seconds
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    chosen = np.arange(len(labels))
    train, rest = train_test_split(
        chosen, train_size=DIGITS_SPLITS["train"], stratify=labels, random_state=seed
    )
    val, test = train_test_split(
        rest, train_size=DIGITS_SPLITS["val"], stratify=labels[rest], random_state=seed
    )
    splits = {"train": train, "val": val, "test": test}
    return {f"{split}/{labels[i]}/{i:04d}.png": int(i) for split, part in splits.items() for i in part}


def _is_complete(root: Path, files: set[str]) -> bool:
    """Whether `root` holds exactly `files` and the manifest; False if it can be written or replaced.

    Raises:
        DataError: it holds files that `export_digits` did not write and must not replace.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise DataError(f"{root}: is a file; wanted a new folder for the digits")
    present = {path.relative_to(root).as_posix() for path in root.rglob("[!.]*") if not path.is_dir()}
    if not present:
        return False
    seed = _read_seed(root / _MANIFEST)
    ours = set() if seed is None else {_MANIFEST, *_split_digits(seed)}
    if foreign := sorted(present - ours):
        raise DataError(
            f"{root}: holds {counted(len(foreign), 'file')} not of the digits, such as {foreign[0]}; "
            "wanted a new folder"
        )
    return present == files | {_MANIFEST}


def _read_seed(path: Path) -> int | None:
    """The seed in a manifest; None if there is no manifest, or not one that `export_digits` writes."""
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    seed = manifest.get("seed") if isinstance(manifest, dict) else None
    return seed if isinstance(seed, int) and seed >= 0 else None
