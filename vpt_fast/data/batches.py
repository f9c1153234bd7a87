"""Batches of normalised images on a device, identical for any number of workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .decode import CheckedImages, default_workers, load_image, load_resident
from .images import ImageItem, ImageList
from .loader import PlannedLoader, copies_may_overlap, require_usable
from .preprocessing import Preprocessing
from .resident import ResidentImages, device_budget, host_bytes_left, least_bytes, resident_budget

RESIDENT = ("auto", "device", "host", "off")

_Read = tuple[int, tuple[float, float] | None]  # index of an image, crop position


class Batches:
    """Batches of images (b, 3, H, W) float32 and labels (b,) int64 on `device`.

    Training shuffles and augments anew in each epoch; evaluation keeps the list's order. All random choices
    depend on (seed, epoch) alone: not on the number of workers, on where the pixels are kept or on ranks.
    PyTorch's global generators are neither read nor advanced.

    Each of `world_size` processes takes every `world_size`-th image of the same permutation, so that the
    processes' batches of one step together are the batch of a single process with `batch_size` ·
    `world_size`. In training the permutation is padded from its start to a multiple of `world_size`, so that
    all ranks take the same number of steps. In evaluation each image is seen exactly once, so ranks may
    differ by one image and therefore by one step.

    A set that fits is decoded once and kept as uint8, on the device or in host memory (`resident`); larger
    ones are decoded in each epoch by `workers` processes. If all pixels in host memory are pinned, a batch is
    copied to the GPU image by image; else it is gathered in pinned memory first. All of these give the same
    numbers.

    Args:
        images: what to read; decoded pixels of a `CheckedImages` are reused.
        batch_size: images per step of this process; the last batch of an epoch may be smaller, nothing is
            dropped.
        train: whether to shuffle and augment.
        seed: 0 or more.
        workers: decoding processes (threads when a resident set is decoded); 0 decodes in this process, None
            is `default_workers()`.
        resident: "device", "host", "off", or "auto": the first of device and host where the pixels take at
            most a quarter of the free memory, else off. On their way to the device they may take half of the
            host's. Pixels of a `CheckedImages` stay unless they take more than is then left of it.

    Attributes:
        not_pinned: why pixels in host memory are not pinned; None if they are, or if there are no such
            pixels or no GPU.

    Raises:
        ValueError: an argument cannot be used; the message names it.
        DecodeError: a file cannot be decoded: here for a resident set, else in `epoch`. Run `check_images`
            first.
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
        require_usable(
            images=len(images),
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
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
        self._resident = self._make_resident(images, ready, resident, workers)
        self._loader: PlannedLoader[_Read] | None = None
        if self._resident is None:
            read = functools.partial(_read_image, _packed(images.items), self.preprocessing)
            self._loader = PlannedLoader(read, workers=workers, device=self.device)
        to_a_gpu = self.device.type == "cuda" and self.resident_device == torch.device("cpu")
        self.not_pinned = self._resident.pin() if self._resident is not None and to_a_gpu else None
        self._is_pinned = to_a_gpu and self.not_pinned is None

    def __len__(self) -> int:
        """Steps per epoch of this rank."""
        return math.ceil(self.num_rank_images / self.batch_size)

    @property
    def num_rank_images(self) -> int:
        """Images per epoch of this rank, in training including the repeated ones that even out the ranks."""
        if self.train:
            return math.ceil(self.num_images / self.world_size)
        return len(range(self.rank, self.num_images, self.world_size))

    @property
    def is_resident(self) -> bool:
        """Whether the pixels are kept decoded."""
        return self._resident is not None

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pixels that are kept."""
        return 0 if self._resident is None else self._resident.num_bytes

    @property
    def resident_device(self) -> torch.device | None:
        """Where the pixels are kept; None if they are not."""
        if self._resident is None:
            return None
        stored = self._resident.pixels
        return stored.device if isinstance(stored, torch.Tensor) else stored[0].device

    def indices(self, epoch: int) -> torch.Tensor:
        """(num_rank_images,) int64: the images of this rank's epoch in order, as indices into the list."""
        return self._draw(epoch).indices

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch `epoch`, 0 or more. Only one epoch can run at a time: if files are decoded,
        starting another ends this one, which then raises RuntimeError."""
        return self._batches(self._draw(epoch))

    def _batches(self, draws: _Draws) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        starts = range(0, len(draws.indices), self.batch_size)
        chunks = [slice(start, start + self.batch_size) for start in starts]
        # Copied to the device once per epoch: a copy per batch would make the host wait for the GPU.
        labels = self._labels[draws.indices].to(self.device)
        flips = None if draws.flips is None else draws.flips.to(self.device)
        read = self._read_resident if self._loader is None else self._read_files
        for chunk, pixels in zip(chunks, read(draws, chunks), strict=True):
            if flips is not None:
                pixels = torch.where(flips[chunk].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
            yield self.preprocessing.normalize(pixels), labels[chunk]

    def _read_resident(self, draws: _Draws, chunks: list[slice]) -> Iterator[torch.Tensor]:
        """uint8 (b, 3, H, W) for each chunk, from memory."""
        stored = self._resident.pixels
        if isinstance(stored, torch.Tensor):
            order = draws.indices.to(stored.device)
            try:
                for chunk in chunks:
                    if self._is_pinned:
                        yield self._copy_each(stored, order[chunk])
                    else:
                        yield self._to_device(stored.index_select(0, order[chunk]))
            finally:
                if self._is_pinned:  # the pixels may be let go now, and copies may still read them
                    torch.cuda.synchronize(self.device)
            return
        for chunk in chunks:
            reads = zip(draws.indices[chunk].tolist(), draws.positions[chunk], strict=True)
            cropped = [self.preprocessing.crop(stored[i], position) for i, position in reads]
            yield self._to_device(torch.stack(cropped))

    def _copy_each(self, stored: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Copies each image from pinned memory: nothing is gathered on the host, and nothing waits."""
        pixels = torch.empty(len(indices), *stored.shape[1:], dtype=stored.dtype, device=self.device)
        for image, index in zip(pixels, indices.tolist(), strict=True):
            image.copy_(stored[index], non_blocking=True)
        return pixels

    def _to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """Copies through pinned memory: the copy overlaps with the GPU's work, and nothing waits for it."""
        if pixels.device.type == "cpu" and self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=copies_may_overlap(self.device))

    def _read_files(self, draws: _Draws, chunks: list[slice]) -> Iterator[torch.Tensor]:
        """As `_read_resident`, from the files."""
        reads = list(zip(draws.indices.tolist(), draws.positions, strict=True))
        for pixels in self._loader.epoch([reads[chunk] for chunk in chunks]):
            yield pixels.to(self.device, non_blocking=copies_may_overlap(self.device))

    def _draw(self, epoch: int) -> _Draws:
        if epoch < 0:
            raise ValueError(f"epoch: {epoch}, wanted 0 or more")
        if not self.train:
            # not torch.arange, which refuses the empty range of a rank beyond the last image
            mine = torch.tensor(range(self.rank, self.num_images, self.world_size), dtype=torch.int64)
            return _Draws(mine, None, [None] * len(mine))
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(self.num_images, generator=generator)
        # Drawn for all images, so that an image's augmentation does not depend on the rank that takes it.
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
        if resident == "off":
            return None
        if ready is None:
            budget = resident_budget(self.device, resident)
            if least_bytes(self.preprocessing, len(images)) > budget:
                return None
            ready = load_resident(images, self.preprocessing, workers=workers, max_bytes=budget)
        elif not ready.serves(self.preprocessing):
            raise ValueError(
                f"preprocessing: {self.preprocessing}, but the images were resized for {ready.preprocessing}"
            )
        if ready is None:
            return None
        if resident == "device" or (resident == "auto" and ready.num_bytes <= device_budget(self.device)):
            return ready.to(self.device)  # whatever is left of the host, whose pixels may be let go
        # Not the budget again, which they met before they were decoded: it is a share of what is free, and
        # that is now less by the pixels themselves.
        return ready if resident == "host" or ready.num_bytes <= host_bytes_left() else None


class _Draws(NamedTuple):
    """The random choices for one rank's epoch."""

    indices: torch.Tensor  # (n,) int64
    flips: torch.Tensor | None  # (n,) bool
    positions: list[tuple[float, float] | None]  # n crop positions, None for the centre


def _packed(items: tuple[ImageItem, ...]) -> tuple[ImageItem, ...] | _PackedPaths:
    """`items` as worker processes read them."""
    paths = [item for item in items if isinstance(item, Path)]
    return _PackedPaths(paths) if len(paths) == len(items) else items


class _PackedPaths:
    """Paths without an object for each. To read an object is to count a reference to it, and a forked worker
    then gets its own copy of the page: in time, of all paths."""

    def __init__(self, paths: list[Path]) -> None:
        names = [str(path).encode(errors="surrogatepass") for path in paths]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])

    def __getitem__(self, index: int) -> Path:
        start = self._ends[index - 1] if index > 0 else 0
        return Path(self._names[start : self._ends[index]].decode(errors="surrogatepass"))


def _read_image(
    items: tuple[ImageItem, ...] | _PackedPaths, preprocessing: Preprocessing, read: _Read
) -> torch.Tensor:
    """uint8 (3, H, W)."""
    index, position = read
    return preprocessing.crop(load_image(items[index], preprocessing), position)
