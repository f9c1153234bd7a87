"""t-SNE of the features that a run's head reads (Jia et al., ECCV 2022, Fig. 9)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.manifold import TSNE

from vpt_fast.classifier import TunedClassifier
from vpt_fast.data.decode import DecodeError, SkippedImage, load_image, map_decoding
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.training.classification import FORWARD_BATCH
from vpt_fast.training.inference import LoadedRun, list_split
from vpt_fast.training.report import evaluating, print_skipped
from vpt_fast.training.world import on_device

MOST_IMAGES = 2000  # t-SNE of more takes minutes, and the plot shows nothing new
PERPLEXITY = 30.0  # the default of scikit-learn, and van der Maaten's


@dataclass(frozen=True)
class Embedding:
    """points: (n, 2). labels: (n,), indices into `classes`."""

    points: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def embed_run(
    run: Path,
    data: str | Path,
    split: str,
    *,
    seed: int = 0,
    backbone: str | None = None,
    checkpoint: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    data_root: str | None = None,
    console: Console | None = None,
) -> Embedding:
    """t-SNE (van der Maaten and Hinton, 2008) of the features that a run's head reads, by scikit-learn.

    A split with more than `MOST_IMAGES` images is subsampled to that number, with `seed`, before any is read;
    those that cannot be decoded are left out. `backbone` and `checkpoint` are as for LoadedRun.load.

    Raises ValueError for a split of fewer than 3 images, for a run that does not classify images, and as
    LoadedRun.load and list_split do.
    """
    console = console or Console(quiet=True)
    with on_device(device):
        loaded = LoadedRun.load(run, device, backbone=backbone, checkpoint=checkpoint)
        preprocessing = loaded.preprocessing.for_evaluation()
        images = list_split(loaded, data, split, data_root=data_root, console=console)
        if len(images) > MOST_IMAGES:
            chosen = np.random.default_rng(seed).choice(len(images), MOST_IMAGES, replace=False)
            images = images.select(sorted(chosen.tolist()))
        features, labels = read_features(loaded, preprocessing, images, split, workers, console)
    if len(features) < 3:
        raise ValueError(f"split {split} of {data} has {len(features)} images; t-SNE needs at least 3")
    with console.status(f"t-SNE of {len(features)} images"):
        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return Embedding(points, labels, loaded.labels.classes)


@torch.no_grad()
def read_features(
    run: LoadedRun,
    preprocessing: Preprocessing,
    images: ImageList,
    split: str,
    workers: int | None,
    console: Console,
) -> tuple[np.ndarray, np.ndarray]:
    """The head's input features (n, d) float32 for every image that can be decoded, and their labels (n,);
    the others are reported."""
    assert isinstance(run.model, TunedClassifier), "its preprocessing is a classifier's"
    read, labels, skipped = [torch.empty(0)], [], []
    loading = map_decoding(lambda item: load_image(item, preprocessing), images.items, workers)

    def decoded() -> Iterator[tuple[torch.Tensor, int]]:
        for pixels, label in zip(loading, images.labels, strict=True):
            if isinstance(pixels, DecodeError):
                skipped.append(SkippedImage(pixels.path, pixels.reason))
            else:
                yield pixels.clone(), label  # a cropped image would keep all that it was cut from

    # Closed whatever ends this: an exception's traceback would keep it, and its threads, at work.
    with evaluating(console, split, len(images)) as advance, contextlib.closing(loading):
        pairs = decoded()
        while batch := list(itertools.islice(pairs, FORWARD_BATCH)):
            inputs = preprocessing.normalize(torch.stack([pixels for pixels, _ in batch]).to(run.device))
            read.append(run.model.image_features(inputs).float().cpu())
            labels += [label for _, label in batch]
            advance(len(batch))
    print_skipped(console, skipped)
    return torch.cat(read).numpy(), np.array(labels)
