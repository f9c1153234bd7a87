"""Batches of normalised crops with their masks, identical for any number of workers; and whole images."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from .decode import default_workers
from .loader import PlannedLoader, copies_may_overlap, require_usable
from .scene_preprocessing import ScenePreprocessing, image_seed
from .scenes import SceneList, read_scene

_Read = tuple[int, int | None]  # index of an image, seed of its augmentation or None for the image as it is
_Scene = tuple[torch.Tensor, torch.Tensor]


class SceneBatches:
    """In training, batches of images (b, 3, H, W) float32 and masks (b, H, W) int64 on `device`; in
    evaluation, single images (3, h, w) uint8 and masks (h, w) int64 at their original sizes.

    Training shuffles and augments anew in each epoch. The random choices depend on (seed, epoch) alone: not
    on the number of workers, on ranks or on PyTorch's global generators. Each of `world_size` processes takes
    every `world_size`-th image of the same permutation, padded from its start to a multiple of `world_size`;
    in evaluation each image is seen exactly once. Masks hold class indices, or `scenes.IGNORED`.

    Args:
        scenes: what to read; decoded in each epoch.
        batch_size: images per step of this process in training; an epoch's last batch may be smaller.
        train: whether to shuffle and augment.
        seed: 0 or more.
        workers: decoding processes; 0 decodes in this process, None is `default_workers()`.

    Raises:
        ValueError: an argument cannot be used; the message names it.
        DecodeError: in `epoch`, a file cannot be used. Run `check_scenes` first.
    """

    def __init__(
        self,
        scenes: SceneList,
        preprocessing: ScenePreprocessing,
        batch_size: int,
        *,
        train: bool,
        seed: int,
        device: torch.device | str,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        workers = default_workers() if workers is None else workers
        require_usable(
            images=len(scenes),
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        self.num_images = len(scenes)
        self.preprocessing = preprocessing
        self.batch_size = batch_size if train else 1
        self.train, self.seed = train, seed
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        read = functools.partial(_read, scenes, preprocessing)
        self._loader = PlannedLoader(read, workers=workers, device=self.device)

    def __len__(self) -> int:
        """Steps per epoch of this rank."""
        return math.ceil(len(self.indices(0)) / self.batch_size)

    def indices(self, epoch: int) -> list[int]:
        """The images of this rank's epoch in order, as indices into the list."""
        if not self.train:
            return list(range(self.rank, self.num_images, self.world_size))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        length = math.ceil(self.num_images / self.world_size) * self.world_size
        return np.resize(order, length)[self.rank :: self.world_size].tolist()

    def epoch(self, epoch: int) -> Iterator[_Scene]:
        """The batches of epoch `epoch`, 0 or more. Only one epoch can run at a time: starting another ends
        this one, which then raises RuntimeError."""
        reads = [(i, image_seed(self.seed, epoch, i) if self.train else None) for i in self.indices(epoch)]
        plan = [reads[i : i + self.batch_size] for i in range(0, len(reads), self.batch_size)]
        overlap = copies_may_overlap(self.device)
        for loaded in self._loader.epoch(plan):
            pixels, masks = (tensor.to(self.device, non_blocking=overlap) for tensor in loaded)
            if self.train:
                yield self.preprocessing.normalize(pixels), masks.long()
            else:
                yield pixels[0], masks[0].long()


def _read(scenes: SceneList, preprocessing: ScenePreprocessing, read: _Read) -> _Scene:
    """An image (3, h, w) and its mask (h, w), both uint8."""
    index, seed = read
    image, mask = read_scene(scenes, index)
    if seed is None:
        return pil_to_tensor(image), torch.from_numpy(mask)
    return preprocessing.augment(image, mask, seed)
