"""t-SNE of the features that a run's head reads (Jia et al., ECCV 2022, Fig. 9)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from sklearn.manifold import TSNE

from vpt_fast.classifier import TunedClassifier
from vpt_fast.data.batches import Batches
from vpt_fast.training.inference import LoadedRun, open_split
from vpt_fast.training.report import evaluating
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

    A split with more than `MOST_IMAGES` images is subsampled to that number, with `seed`. `backbone`
    and `checkpoint` are as for LoadedRun.load.

    Raises ValueError for a split of fewer than 3 images, and as LoadedRun.load and open_split do.
    """
    console = console or Console(quiet=True)
    with on_device(device):
        loaded = LoadedRun.load(run, device, backbone=backbone, checkpoint=checkpoint)
        batches, _ = open_split(loaded, data, split, workers=workers, data_root=data_root, console=console)
        assert isinstance(loaded.model, TunedClassifier), "opening the split saw to it"
        features, labels = read_features(loaded.model, batches, split, console)
    if len(features) < 3:
        raise ValueError(f"split {split} of {data} has {len(features)} images; t-SNE needs at least 3")
    if len(features) > MOST_IMAGES:
        chosen = np.sort(np.random.default_rng(seed).choice(len(features), MOST_IMAGES, replace=False))
        features, labels = features[chosen], labels[chosen]
    with console.status(f"t-SNE of {len(features)} images"):
        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return Embedding(points, labels, loaded.labels.classes)


@torch.no_grad()
def read_features(
    model: TunedClassifier, batches: Batches, split: str, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """The head's input features (n, d) float32 for every image, and the labels (n,)."""
    read, labels = [], []
    with evaluating(console, split, batches.num_images) as advance:
        for images, targets in batches.epoch(0):  # (b, 3, H, W), (b,)
            read.append(model.image_features(images).float())
            labels.append(targets)
            advance(len(targets))
    return torch.cat(read).cpu().numpy(), torch.cat(labels).cpu().numpy()
