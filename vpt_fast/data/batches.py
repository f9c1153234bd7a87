"""Batches of normalised images on a device, the same whatever the number of workers."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .decode import CheckedImages, DecodeError, default_workers, load_image, load_resident
from .images import ImageItem, ImageList
from .preprocessing import Preprocessing
from .resident import ResidentImages, device_budget, least_bytes, resident_budget

RESIDENT = ("auto", "device", "host", "off")

_Read = tuple[int, tuple[float, float] | None]  # index of an image, crop position


class Batches:
    """Batches of images (b, 3, H, W) float32 and labels (b,) int64 on `device`.

    Training goes through a new permutation each epoch, with a new augmentation; evaluation goes through the
    list's order. Everything drawn depends on (seed, epoch) alone: not on workers, on where the pixels are
    kept, on ranks, or on PyTorch's global generators, which are left alone.

    Of `world_size` processes, each takes every `world_size`-th image of the same permutation, so that the
    processes' batches of one step together are the batch that one process would get with `batch_size` ·
    `world_size`. In training the permutation is lengthened, by starting over, to a multiple of `world_size`:
    all ranks take the same number of steps. In evaluation each image is seen exactly once, and ranks may
    differ by one image, so by one step.

    A set that fits is decoded once and kept as uint8, on the device or in the host's memory (`resident`);
    larger ones are decoded in each epoch by `workers` processes. From the host's memory a GPU copies a batch
    image by image where all pixels are pinned, else the batch is gathered in pinned memory first. All
    give the same numbers.

    Args:
        images: what to read; a `CheckedImages` brings its pixels along.
        batch_size: images a step of this process; the last batch of an epoch may be smaller, nothing is
            dropped.
        train: whether to shuffle and augment.
        seed: 0 or more.
        workers: decoding processes (threads for the one decoding of a resident set); 0 decodes in this one,
            None is `default_workers()`.
        resident: "device", "host", "off", or "auto": the first of device and host whose free memory the
            pixels take no more than a quarter of, else off.

    Attributes:
        not_pinned: why pixels in the host's memory are not pinned; None where they are, or where there are
            none or no GPU.

    Raises:
        ValueError: an argument cannot be used; the text names it.
        DecodeError: a file cannot be decoded: here for a resident set, else in `epoch`. Run `check_images`
            before.
    """

    def __init__(
        self,
        images: ImageList | CheckedImages,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        train: bool,
        seed: int,
        device: torch.device | str,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        resident: str = "auto",
    ) -> None:
        ready = images.resident if isinstance(images, CheckedImages) else None
        images = images.images if isinstance(images, CheckedImages) else images
        workers = default_workers() if workers is None else workers
        for name, value, least in (
            ("images", len(images), 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
            ("world_size", world_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: {value}, wanted {least} or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank}, wanted 0 to world_size - 1 = {world_size - 1}")
        if resident not in RESIDENT:
            raise ValueError(f"resident: {resident!r}, wanted one of {', '.join(RESIDENT)}")

        self.num_images = len(images)
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.preprocessing = preprocessing if train else preprocessing.for_evaluation()
        self._labels = torch.tensor(images.labels)
        self._plan = _Plan()
        self._resident = self._make_resident(images, ready, resident, workers)
        self._loader = None if self._resident is not None else self._make_loader(images, workers)
        to_a_gpu = self.device.type == "cuda" and self.resident_device == torch.device("cpu")
        self.not_pinned = self._resident.pin() if self._resident is not None and to_a_gpu else None
        self._is_pinned = to_a_gpu and self.not_pinned is None

    def __len__(self) -> int:
        """Steps an epoch of this rank."""
        return math.ceil(self.num_rank_images / self.batch_size)

    @property
    def num_rank_images(self) -> int:
        """Images an epoch of this rank: in training with those that come twice to even the ranks out."""
        if self.train:
            return math.ceil(self.num_images / self.world_size)
        return len(range(self.rank, self.num_images, self.world_size))

    @property
    def is_resident(self) -> bool:
        """Whether the pixels are kept decoded."""
        return self._resident is not None

    @property
    def resident_bytes(self) -> int:
        """Bytes of pixels kept."""
        return 0 if self._resident is None else self._resident.num_bytes

    @property
    def resident_device(self) -> torch.device | None:
        """Where the pixels are kept; None where they are not."""
        if self._resident is None:
            return None
        stored = self._resident.pixels
        return stored.device if isinstance(stored, torch.Tensor) else stored[0].device

    def indices(self, epoch: int) -> torch.Tensor:
        """(num_rank_images,) int64: the images of this rank's epoch in order, as indices into the list."""
        return self._draw(epoch).indices

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch `epoch`, 0 or more. One epoch at a time: where files are decoded, starting one
        ends any other, which then raises RuntimeError."""
        return self._batches(self._draw(epoch))

    def _batches(self, draws: _Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        starts = range(0, len(draws.indices), self.batch_size)
        chunks = [slice(start, start + self.batch_size) for start in starts]
        # Whole epochs go to the device at once: a copy for each batch would make the host wait for a GPU.
        labels = self._labels[draws.indices].to(self.device)
        flips = None if draws.flips is None else draws.flips.to(self.device)
        read = self._read_resident if self._loader is None else self._read_files
        for chunk, pixels in zip(chunks, read(draws, chunks), strict=True):
            if flips is not None:
                pixels = torch.where(flips[chunk].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            yield self.preprocessing.normalize(pixels), labels[chunk]

    def _read_resident(self, draws: _Draws, chunks: list[slice]) -> Iterator[torch.Tensor]:
        """uint8 (b, 3, H, W) for each chunk, from memory."""
        assert self._resident is not None
        stored = self._resident.pixels
        if isinstance(stored, torch.Tensor):
            order = draws.indices.to(stored.device)
            for chunk in chunks:
                if self._is_pinned:
                    yield self._copy_each(stored, order[chunk])
                else:
                    yield self._to_device(stored.index_select(0, order[chunk]))
            return
        for chunk in chunks:
            reads = zip(draws.indices[chunk].tolist(), draws.positions[chunk], strict=True)
            cropped = [self.preprocessing.crop(stored[i], position) for i, position in reads]
            yield self._to_device(torch.stack(cropped))

    def _copy_each(self, stored: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Straight from where they lie: nothing is gathered in the host's memory, and nothing waits."""
        pixels = torch.empty(len(indices), *stored.shape[1:], dtype=stored.dtype, device=self.device)
        for image, index in zip(pixels, indices.tolist(), strict=True):
            image.copy_(stored[index], non_blocking=True)
        return pixels

    def _to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """From pinned memory: the copy runs beside the GPU's work, and nothing waits for it."""
        if pixels.device.type == "cpu" and self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)

    def _read_files(self, draws: _Draws, chunks: list[slice]) -> Iterator[torch.Tensor]:
        """The same, from the files."""
        assert self._loader is not None
        reads = list(zip(draws.indices.tolist(), draws.positions, strict=True))
        plan = self._plan.batches = [reads[chunk] for chunk in chunks]
        for pixels in self._loader:
            if self._plan.batches is not plan:  # the workers are one iterator: it has gone over to that epoch
                raise RuntimeError("epoch: another epoch was started before this one had ended")
            if isinstance(pixels, DecodeError):
                # Another one: with its own traceback in this frame, the loader would be freed by the garbage
                # collector, after its queues, and wait for workers that it can no longer tell to stop.
                raise DecodeError(pixels.path, pixels.reason)
            yield pixels.to(self.device, non_blocking=True)

    def _draw(self, epoch: int) -> _Draws:
        if epoch < 0:
            raise ValueError(f"epoch: {epoch}, wanted 0 or more")
        if not self.train:
            # not torch.arange: a rank beyond the last image has none
            mine = torch.tensor(range(self.rank, self.num_images, self.world_size), dtype=torch.int64)
            return _Draws(mine, None, [None] * len(mine))
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(self.num_images, generator=generator)
        # For all images, so that what an image gets does not depend on the rank that takes it.
        uniform = torch.rand(self.num_images, 3, dtype=torch.float64, generator=generator)
        length = self.num_rank_images * self.world_size
        order = order.repeat(math.ceil(length / self.num_images))[:length]
        mine = order[self.rank :: self.world_size]
        flips = uniform[mine, 0] < 0.5 if self.preprocessing.augment != "none" else None
        positions: list[tuple[float, float] | None] = [None] * len(mine)
        if self.preprocessing.crops_at_random:
            positions = [(y, x) for y, x in uniform[mine, 1:].tolist()]
        return _Draws(mine, flips, positions)

    def _make_resident(
        self, images: ImageList, ready: ResidentImages | None, resident: str, workers: int
    ) -> ResidentImages | None:
        budget = resident_budget(self.device, resident)
        if budget == 0:
            return None
        if ready is None:
            if least_bytes(self.preprocessing, len(images)) > budget:
                return None
            ready = load_resident(images, self.preprocessing, workers=workers, max_bytes=budget)
        elif not ready.serves(self.preprocessing):
            raise ValueError(
                f"preprocessing: {self.preprocessing}, but the images were resized for {ready.preprocessing}"
            )
        if ready is None or ready.num_bytes > budget:
            return None
        fits_device = resident == "device" or ready.num_bytes <= device_budget(self.device)
        return ready if resident == "host" or not fits_device else ready.to(self.device)

    def _make_loader(self, images: ImageList, workers: int) -> DataLoader:
        return DataLoader(
            _Files(images.items, self.preprocessing),
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # else each epoch takes a number from the global one
        )


class _Draws(NamedTuple):
    """What one rank's epoch is made of."""

    indices: torch.Tensor  # (n,) int64
    flips: torch.Tensor | None  # (n,) bool
    positions: list[tuple[float, float] | None]  # n crop positions, None for the centre


class _Plan(Sampler):
    """The batches of the epoch that comes next."""

    def __init__(self) -> None:
        self.batches: list[list[_Read]] = []

    def __iter__(self) -> Iterator[list[_Read]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Files(Dataset):
    """Read (index, crop position) -> uint8 (3, H, W), or the error: an exception raised in a worker process
    would reach the user with the worker's traceback for its text."""

    def __init__(self, items: tuple[ImageItem, ...], preprocessing: Preprocessing) -> None:
        self._items = items
        self._preprocessing = preprocessing

    def __getitem__(self, read: _Read) -> torch.Tensor | DecodeError:
        index, position = read
        try:
            return self._preprocessing.crop(load_image(self._items[index], self._preprocessing), position)
        except DecodeError as error:
            return error


def ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the one that trains decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stack(loaded: list[torch.Tensor | DecodeError]) -> torch.Tensor | DecodeError:
    """uint8 (b, 3, H, W), or the first error."""
    errors = [item for item in loaded if isinstance(item, DecodeError)]
    return errors[0] if errors else torch.stack([item for item in loaded if isinstance(item, torch.Tensor)])
