"""WebDataset shards: tar files of images and labels, read in place.

The layout is that of the full VTAB tasks on the Hugging Face hub (clip-benchmark/wds_vtab-*):
`{train,test}/{0..N}.tar`, each folder with `nshards.txt`, and `classnames.txt` beside them. A sample is an
image and a `.cls` file with its class number under one key (`s0000012.webp`, `s0000012.cls`). Listing reads
only headers and labels; after that, any process can read any image without extracting the tar.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vpt_fast.counting import counted

from .folder import IMAGE_EXTENSIONS, SPLIT_FOLDERS
from .images import (
    DataError,
    ImageList,
    Splits,
    class_number,
    hold_out,
    open_image,
    read_class_names,
    read_text,
    require_utf8,
)

_LONGEST_LABEL = 100  # bytes


@dataclass(frozen=True)
class TarImage:
    """A member of an uncompressed tar."""

    shard: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The encoded image."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self) -> Image.Image:
        return open_image(io.BytesIO(self.read()))


def holds_shards(root: Path) -> bool:
    """Whether `root` has shards in a train folder."""
    return any(_shard_files(root / name) for name, split in SPLIT_FOLDERS.items() if split == "train")


def open_shards(
    root: Path,
    *,
    val_fraction: float | None,
    seed: int,
    on_shards: Callable[[int, int], None] | None = None,
) -> Splits:
    """The splits in a folder of shards; without val shards, train is split as for a folder of images.

    Raises:
        DataError: as for `read_shards`, or a class has too few images to be split.
    """
    found = read_shards(root, on_shards)
    train, val = found["train"], found.get("val")
    if is_drawn := val is None:
        train, val = hold_out(train, val_fraction, seed, where=root)
    return Splits(train, val, found.get("test"), is_drawn)


def read_shards(root: Path, on_shards: Callable[[int, int], None] | None = None) -> dict[str, ImageList]:
    """Split -> its images, in the order of the shards. `on_shards` is called with a number of bytes whenever
    these are done, and those of all shards.

    Raises:
        DataError: a shard is missing, unexpected or broken, or has a sample without exactly one image and one
            label; `classnames.txt` does not match the labels.
    """
    folders: dict[str, str] = {}
    for name, split in SPLIT_FOLDERS.items():
        if _shard_files(root / name):
            if split in folders:
                raise DataError(
                    f"{root}: found shards in {folders[split]}/ and {name}/, wanted one {split} folder"
                )
            folders[split] = name
    shards = {split: _shards_of(root / name) for split, name in folders.items()}
    total = sum(path.stat().st_size for paths in shards.values() for path in paths)

    def advance(count: int) -> None:
        if on_shards is not None:
            on_shards(count, total)

    found = {split: _read_split(root / folders[split], paths, advance) for split, paths in shards.items()}
    count = 1 + max(label for samples in found.values() for _, label in samples)
    classes = read_class_names(root / "classnames.txt", count) or tuple(map(str, range(count)))
    return {
        split: ImageList(tuple(item for item, _ in samples), tuple(label for _, label in samples), classes)
        for split, samples in found.items()
    }


def _shard_files(folder: Path) -> dict[int, Path]:
    """Number -> tar."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.tar")):
        if not re.fullmatch(r"\d+", path.stem):
            continue
        if (number := int(path.stem)) in found:
            raise DataError(f"{folder}: found both {found[number].name} and {path.name}, wanted one of them")
        found[number] = path
    return found


def _shards_of(folder: Path) -> list[Path]:
    """The shards of a split in their order. Raises DataError if one is missing or unexpected."""
    shards = _shard_files(folder)
    count_file = folder / "nshards.txt"
    number = max(shards) + 1
    if count_file.exists():
        text = read_text(count_file).strip()
        if not text.isdecimal() or len(text) > 9:
            raise DataError(f"{count_file}, line 1: {text[:20]!r}, wanted the number of shards")
        number = int(text)
    missing = next((i for i in range(number) if i not in shards), None)
    if missing is not None:
        raise DataError(
            f"{folder}: {missing}.tar is missing, one of {number} shards; {len(shards)} are there"
        )
    if more := sorted(each for each in shards if each >= number):
        raise DataError(f"{count_file}: says {number} shards, and {shards[more[0]].name} is there too")
    return [shards[i] for i in range(number)]


def _read_split(
    folder: Path, shards: list[Path], advance: Callable[[int], None]
) -> list[tuple[TarImage, int]]:
    """(image, label) of every sample, in the order of the shards."""
    samples: list[tuple[TarImage, int]] = []
    for path in shards:
        samples += _read_shard(path, folder.name, advance)
    if not samples:
        raise DataError(f"{folder}: found no samples in {len(shards)} shards")
    return samples


def _read_shard(path: Path, split: str, advance: Callable[[int], None]) -> list[tuple[TarImage, int]]:
    """(image, label) of every sample. `advance` is called with the bytes of each member, and of the end."""
    done = 0
    images: dict[str, TarImage] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                advance(member.offset - done)
                done = member.offset
                if not member.isfile() or member.issparse():  # such as a link, which is not followed
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = folder + slash + stem
                if ending == "cls":
                    extracted = tar.extractfile(member)
                    text = extracted.read(_LONGEST_LABEL).decode(errors="replace").strip()
                    if (label := class_number(text)) is None:
                        raise DataError(f"{path}: {member.name} holds {text[:20]!r}, wanted a class number")
                    if key in labels:
                        raise DataError(f"{path}: {member.name} comes twice")
                    labels[key] = label
                elif f".{ending.lower()}" in IMAGE_EXTENSIONS:
                    if key in images:
                        raise DataError(
                            f"{path}: {key} has two images, {images[key].name.rpartition('/')[2]} and {file}"
                        )
                    name = f"{split}/{path.name}/{member.name}"
                    require_utf8(name)
                    images[key] = TarImage(path, member.offset_data, member.size, name)
            end = tar.offset
    except DataError:
        raise
    except (tarfile.TarError, ValueError, RecursionError) as error:  # the last two of damaged headers
        raise DataError(f"{path}: cannot be read as an uncompressed tar: {error}") from error
    # tarfile takes the end of the file, and a damaged header behind the first, for the tar's end, which is
    # a block of zeros.
    with open(path, "rb") as shard:
        shard.seek(end)
        is_whole = shard.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not is_whole:
        raise DataError(
            f"{path}: ends after {counted(len(images), 'image')} without a tar's end; get it again"
        )
    for key in [*images, *labels]:
        if key not in labels or key not in images:
            has, lacks = ("a label", "image") if key in labels else ("an image", "label (.cls)")
            raise DataError(f"{path}: {key} has {has} and no {lacks}")
    advance(path.stat().st_size - done)
    return [(images[key], labels[key]) for key in images]
