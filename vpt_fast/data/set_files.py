"""The original files of CLEVR, KITTI, dSprites and smallNORB, with TensorFlow Datasets' names of fields."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import DataError, read_json_file, read_text
from .vtab_labels import CLEVR_FEWEST, CLEVR_MOST

Writer = Callable[[Path], object]


class SetFiles(ABC):
    """A folder with the original files of a data set.

    Attributes:
        layout: what the folder holds, for messages.
        parts: name of a split in TensorFlow Datasets -> numbers of its images.
    """

    layout: str
    parts: dict[str, np.ndarray]

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """Raises DataError if files are missing or have other contents."""

    @abstractmethod
    def field(self, name: str, part: str, number: int) -> Any:
        """The value of an image's annotation."""

    @abstractmethod
    def path(self, part: str, number: int) -> Path:
        """The file that holds an image."""

    def images(self, part: str, numbers: Sequence[int]) -> Iterator[tuple[Writer, str]]:
        """For each of `numbers`, in ascending order: a function that writes the image to a path, and the file
        extension. Here, of images with a file each."""
        for number in numbers:
            source = self.path(part, number)
            yield partial(shutil.copyfile, source), source.suffix


class ClevrFiles(SetFiles):
    """CLEVR_v1.0: scenes as JSON, images as PNG. Its test images have no scenes; VTAB tests on val."""

    layout = "scenes/CLEVR_{train,val}_scenes.json and images/{train,val}"
    _FOLDERS = {"train": "train", "validation": "val"}

    def __init__(self, folder: Path) -> None:
        self._folder = _first_folder(folder, ("", "CLEVR_v1.0"), "scenes", self.layout)
        self._scenes = {
            part: _read_scenes(self._folder / "scenes" / f"CLEVR_{name}_scenes.json")
            for part, name in self._FOLDERS.items()
        }
        self.parts = {part: np.arange(len(scenes)) for part, scenes in self._scenes.items()}

    def field(self, name: str, part: str, number: int) -> list[list[float]]:
        assert name == "objects/pixel_coords"
        return [found["pixel_coords"] for found in self._scenes[part][number]["objects"]]

    def path(self, part: str, number: int) -> Path:
        name = self._scenes[part][number]["image_filename"]
        return self._folder / "images" / self._FOLDERS[part] / name


class KittiFiles(SetFiles):
    """KITTI's object detection: the labelled images, split by video with its development kit's mapping."""

    layout = "training/image_2, training/label_2 and, of the development kit, mapping"
    _TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")

    def __init__(self, folder: Path) -> None:
        self._folder = _first_folder(folder, ("",), "training/label_2", self.layout) / "training"
        kit = _first_folder(folder, ("", "devkit_object", "devkit"), "mapping", self.layout)
        self.parts = _kitti_parts(kit / "mapping")

    def field(self, name: str, part: str, number: int) -> dict[str, list[Any]]:
        del part  # the numbers are unique over all parts
        assert name == "objects"
        path = self._folder / "label_2" / f"{number:06d}.txt"
        lines = [line.split() for line in read_text(path).splitlines()]
        known = [words for words in lines if words and words[0] != "DontCare"]
        try:
            objects = [(self._TYPES.index(kind), *map(float, numbers)) for kind, *numbers in known]
        except ValueError:  # of another type, or not a number
            objects = []
        if len(objects) != len(known) or any(len(values) != 15 for values in objects):
            raise DataError(f"{path}: wanted lines of a type of object and 14 numbers")
        return {
            "type": [kind for kind, *_ in objects],
            "location": [list(values[11:14]) for values in objects],
        }

    def path(self, part: str, number: int) -> Path:
        del part
        return self._folder / "image_2" / f"{number:06d}.png"


def _kitti_parts(mapping: Path) -> dict[str, np.ndarray]:
    """A tenth of the videos is test and a tenth validation, drawn as in TensorFlow Datasets."""
    lines = read_text(mapping / "train_mapping.txt").splitlines()
    try:
        places = [int(word) - 1 for word in read_text(mapping / "train_rand.txt").split(",")]
        videos = np.array([lines[place].split()[1] for place in places])
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{mapping}: {error}; wanted numbers of lines in train_rand.txt, and a day, a video and a frame "
            "in each line of train_mapping.txt"
        ) from None
    names = sorted(set(videos.tolist()))
    count = max(1, len(names) // 10)
    generator = np.random.RandomState(123)
    test = set(generator.choice(names, count, replace=False).tolist())
    rest = [name for name in names if name not in test]
    validation = set(generator.choice(rest, count, replace=False).tolist())
    groups = {"train": set(rest) - validation, "validation": validation, "test": test}
    return {part: np.flatnonzero(np.isin(videos, sorted(those))) for part, those in groups.items()}


class DSpritesFiles(SetFiles):
    """dSprites: one .npz of all images, in the order of their factors."""

    _FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    _COLUMNS = {"label_orientation": 3, "label_x_position": 4}
    layout = _FILE

    def __init__(self, folder: Path) -> None:
        self._path = _first_folder(folder, ("",), self._FILE, self.layout) / self._FILE
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                self._classes = arrays["latents_classes"]
                arrays.zip.getinfo("imgs.npy")  # which `images` reads
        except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self._path}: {error}; wanted an archive of imgs and latents_classes") from None
        self.parts = {"train": np.arange(len(self._classes))}

    def field(self, name: str, part: str, number: int) -> int:
        return int(self._classes[number, self._COLUMNS[name]])

    def path(self, part: str, number: int) -> Path:
        del part, number
        return self._path

    def images(self, part: str, numbers: Sequence[int]) -> Iterator[tuple[Writer, str]]:
        # Read image by image: together they take 3 GB.
        with (
            _reading(self._path),
            zipfile.ZipFile(self._path) as archive,
            archive.open("imgs.npy") as file,
        ):
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or len(shape) != 3:
                raise DataError(f"{self._path}: imgs is {dtype} {shape}, wanted uint8 (images, 64, 64)")
            yield from _records(file, file.tell(), shape[1:], numbers, white=1)


class SmallNorbFiles(SetFiles):
    """smallNORB: .mat files in its own format, as downloaded (.gz) or decompressed."""

    layout = "smallnorb-5x…-{training,testing}-{dat,info}.mat or .mat.gz"
    _NAMES = {"train": "5x46789x9x18x6x2x96x96-training", "test": "5x01235x9x18x6x2x96x96-testing"}
    _TYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("uint8"), 0x1E3D4C54: np.dtype("<i4")}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._info: dict[str, np.ndarray] = {}
        for part in self._NAMES:
            with self._open(part, "info") as file:
                shape, dtype = self._header(file)
                self._info[part] = np.frombuffer(file.read(), dtype).reshape(shape)
        self.parts = {part: np.arange(len(info)) for part, info in self._info.items()}

    def field(self, name: str, part: str, number: int) -> int:
        _, elevation, azimuth, _ = self._info[part][number].tolist()  # azimuths are 0, 2, .., 34
        return {"label_elevation": elevation, "label_azimuth": azimuth // 2}[name]

    def path(self, part: str, number: int) -> Path:
        del number
        return self._path(part, "dat")

    def images(self, part: str, numbers: Sequence[int]) -> Iterator[tuple[Writer, str]]:
        with self._open(part, "dat") as file:
            shape, _ = self._header(file)
            # The first of the two cameras' images, as in TensorFlow Datasets' field "image".
            yield from _records(file, file.tell(), shape[2:], numbers, stride=shape[1])

    @contextlib.contextmanager
    def _open(self, part: str, kind: str) -> Iterator[Any]:
        """The file, decompressed."""
        path = self._path(part, kind)
        with _reading(path), path.open("rb") if path.suffix == ".mat" else gzip.open(path, "rb") as file:
            yield file

    def _path(self, part: str, kind: str) -> Path:
        path = self._folder / f"smallnorb-{self._NAMES[part]}-{kind}.mat"
        found = next((each for each in (path, path.with_name(f"{path.name}.gz")) if each.is_file()), None)
        if found is None:
            raise DataError(f"{path}: is missing; wanted {self.layout}")
        return found

    def _header(self, file: Any) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the array that follows. The header is a magic number, the number of dimensions,
        and their sizes, of which at least three are written."""
        magic, dimensions = np.frombuffer(file.read(8), "<i4").tolist()
        if magic not in self._TYPES:
            raise DataError(f"{file.name}: begins with {magic:#x}, which is no matrix of smallNORB's")
        sizes = np.frombuffer(file.read(4 * max(3, dimensions)), "<i4").tolist()
        return tuple(sizes[:dimensions]), self._TYPES[magic]


SET_FILES: dict[str, type[SetFiles]] = {
    "tfds/clevr": ClevrFiles,
    "tfds/kitti": KittiFiles,
    "tfds/dsprites": DSpritesFiles,
    "tfds/smallnorb": SmallNorbFiles,
}
"""A task's source -> reader of its original files."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises DataError where a file is damaged, or ends too early, as a part of a download does."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, ValueError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is damaged or not complete; get it again") from error


def _records(
    file: Any, start: int, shape: tuple[int, ...], numbers: Sequence[int], stride: int = 1, white: int = 255
) -> Iterator[tuple[Writer, str]]:
    """Every `stride`-th of the grey images of one size stored consecutively from `start`, scaled so that the
    value `white` becomes 255."""
    size = int(np.prod(shape))
    for number in numbers:
        file.seek(start + int(number) * size * stride)
        pixels = np.frombuffer(file.read(size), np.uint8).reshape(shape) * (255 // white)
        yield png_writer(Image.fromarray(pixels)), ".png"


def png_writer(image: Image.Image) -> Writer:
    return lambda path: image.save(path, "png")


def _first_folder(root: Path, names: Sequence[str], inside: str, layout: str) -> Path:
    """The first of the folders `names` below `root` ("" is `root` itself) that contains `inside`."""
    found = next((root / name for name in names if (root / name / inside).exists()), None)
    if found is None:
        raise DataError(f"{root}: has no {inside}; wanted {layout}")
    return found


def _read_scenes(path: Path) -> list[dict[str, Any]]:
    found = read_json_file(path)
    scenes = found.get("scenes") if isinstance(found, dict) else None
    if not isinstance(scenes, list) or not all(map(_is_scene, scenes)):
        raise DataError(
            f"{path}: wanted scenes, each with image_filename and {CLEVR_FEWEST} to {CLEVR_MOST} objects of "
            "three pixel_coords"
        )
    return scenes


def _is_scene(scene: Any) -> bool:
    """Its image has to be in the folder of images: a path could name any file of this machine, which would be
    copied into a data set."""
    if not isinstance(scene, dict) or not isinstance(scene.get("objects"), list):
        return False
    coordinates = [each.get("pixel_coords") if isinstance(each, dict) else None for each in scene["objects"]]
    if not CLEVR_FEWEST <= len(coordinates) <= CLEVR_MOST:  # of others there is no class
        return False
    if not all(isinstance(each, list) and len(each) == 3 for each in coordinates):
        return False
    name = scene.get("image_filename")
    return isinstance(name, str) and Path(name).name == name
