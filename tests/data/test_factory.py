"""Data sets by timm's names: torchvision's from files, others through data sets of timm's own classes."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image
from task_trees import picture
from timm.data import readers
from timm.data.dataset import ImageDataset, IterableImageDataset
from torch import distributed as dist

from vpt_fast.data import factory
from vpt_fast.data.decode import DecodeError, check_images, decode_image
from vpt_fast.data.images import DataError
from vpt_fast.data.splits import open_splits

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def write_mnist(root, count: dict[str, int]) -> None:
    """The files that torchvision's MNIST reads: IDX headers, then bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, number in count.items():
        pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) % 2).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, number) + labels.tobytes())


class Rows:
    """What timm's reader of the Hugging Face hub's data sets looks like."""

    label_key = "label"
    class_to_idx = {"bright": 1, "dark": 0}

    def __init__(self, count: int) -> None:
        self.dataset = {"label": [i % 2 for i in range(count)]}

    def __getitem__(self, index):
        if index == 1:
            return io.BytesIO(b"broken"), 1
        encoded = io.BytesIO()
        picture(index).save(encoded, "png")
        return encoded, index % 2

    def __len__(self):
        return len(self.dataset["label"])


@pytest.fixture
def rows(monkeypatch):
    def create(name, root, split, **options):
        return ImageDataset(root, reader=Rows(8 if split == "train" else 4))

    monkeypatch.setattr(factory, "create_dataset", create)


@pytest.fixture
def stream(monkeypatch):
    def create(name, root, split, **options):
        return IterableImageDataset(root, reader=[(picture(i), i % 2) for i in range(8)])

    monkeypatch.setattr(factory, "create_dataset", create)


def test_torchvision_data_set_is_read_from_its_files(tmp_path):
    write_mnist(tmp_path, {"train": 10, "t10k": 4})
    splits = open_splits("torch/mnist", data_root=str(tmp_path), with_test=True, val_fraction=0.4)
    assert [len(images) for images in (splits.train, splits.val, splits.test)] == [6, 4, 4]
    assert splits.classes[:2] == ("0 - zero", "1 - one")
    assert str(splits.test.items[2]) == "test[2]" and splits.test.labels == (0, 1, 0, 1)
    pixels = np.random.default_rng(4).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_image(splits.test.items[2]))[..., 0], pixels[2])


def test_rows_come_with_their_labels_and_class_names(rows):
    splits = open_splits("hfds/some/set", train_on="train+val", with_test=True)
    assert splits.classes == ("dark", "bright")
    for item, label in zip(splits.train.items, splits.train.labels, strict=True):
        assert label == item.index % 2
    item = splits.test.items[2]
    assert np.array_equal(np.asarray(decode_image(item)), np.asarray(picture(2)))


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_images_are_a_key_of_what_runs_share(request, kind):
    request.getfixturevalue(kind)
    images = open_splits("hfds/some/set", train_on="train+val").train
    assert images in {images: "decoded"}


def test_split_is_opened_as_it_is_stored_and_only_if_it_is_wanted(monkeypatch):
    def create(name, root, split, **options):
        opened.append((split, options["is_training"], options["download"]))
        return ImageDataset(root, reader=Rows(8))

    opened = []
    monkeypatch.setattr(factory, "create_dataset", create)
    assert open_splits("hfds/some/set").val_is_drawn
    assert opened == [("train", False, False)]


def test_broken_row_is_left_out_and_not_taken_for_the_next(rows):
    images = open_splits("hfds/some/set", train_on="train+val").train
    checked = check_images(images)
    assert [str(skipped.path) for skipped in checked.skipped] == ["train[1]"] and len(checked.images) == 7


def test_stream_is_held_in_its_order(stream):
    images = open_splits("wds/some", train_on="train+val").train
    assert [str(item) for item in images.items] == [f"train[{i}]" for i in range(8)]
    for number, (item, label) in enumerate(zip(images.items, images.labels, strict=True)):
        assert label == number % 2
        assert np.array_equal(np.asarray(decode_image(item)), np.asarray(picture(number)))


def test_image_of_a_stream_is_what_the_same_image_in_a_file_is(monkeypatch, tmp_path):
    levels = Image.fromarray(np.arange(0, 60_000, 500, dtype=np.uint16).reshape(10, 12))
    colors = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    levels.save(tmp_path / "16-bit.png")
    Image.fromarray(colors[0]).save(tmp_path / "transparent.png")
    Image.fromarray(colors[1][..., :3]).save(tmp_path / "turned.png", exif=turned)
    files = sorted(tmp_path.iterdir())

    def create(name, root, input_img_mode="RGB", **options):
        stored = [Image.open(file) for file in files]
        opened = [image.convert(input_img_mode) if input_img_mode else image for image in stored]
        return IterableImageDataset(root, reader=list(zip(opened, (0, 1, 0), strict=True)))

    monkeypatch.setattr(factory, "create_dataset", create)
    for item, file in zip(open_splits("wds/some", train_on="train+val").train.items, files, strict=True):
        assert np.array_equal(np.asarray(decode_image(item)), np.asarray(decode_image(file))), file.name


@pytest.fixture
def programs(monkeypatch):
    """What Pillow runs where it has found Ghostscript."""
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(
        EpsImagePlugin.subprocess, "check_call", lambda *arguments, **_: ran.append(arguments)
    )
    return ran


def test_image_of_a_stream_has_no_other_program_run(monkeypatch, programs):
    class Reader:
        def __iter__(self):
            with pytest.raises(OSError):  # timm logs it and goes on
                Image.open(io.BytesIO(EPS)).load()
            yield from [(picture(0), 0), (picture(1), 1)]

    monkeypatch.setattr(
        factory, "create_dataset", lambda name, root, **options: IterableImageDataset(root, reader=Reader())
    )
    assert len(open_splits("wds/some", train_on="train+val").train) == 2 and not programs


def test_image_that_torchvision_opens_has_no_other_program_run(write_images, programs):
    root = write_images({"a": 1, "b": 1})
    (root / "a" / "000.png").write_bytes(EPS)
    item = open_splits("torch/image_folder", data_root=str(root), train_on="train+val").train.items[0]
    EpsImagePlugin.gs_binary = "gs"  # as in a process that the item was sent to
    with pytest.raises(DecodeError, match=r"train\[0\]: Unable to locate Ghostscript"):
        decode_image(item)
    assert not programs


class Part:
    """How timm's readers of streams divide a set: by the process that they are made in."""

    def __init__(self) -> None:
        self.dist_rank, self.dist_num_replicas = dist.get_rank(), dist.get_world_size()

    def __iter__(self):
        for i in range(self.dist_rank, 8, self.dist_num_replicas):
            yield picture(i), i % 2


def test_stream_is_held_as_a_whole_in_each_of_several_processes(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        factory, "create_dataset", lambda name, root, **options: IterableImageDataset(root, reader=Part())
    )
    images = open_splits("wds/some", train_on="train+val").train
    assert images.labels == (0, 1, 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize("reader", ["hfids", "tfds", "wds"])
def test_readers_of_streams_divide_a_set_by_what_is_overridden(reader):
    # By its text: the libraries that it imports need not be installed.
    text = (Path(readers.__file__).parent / f"reader_{reader}.py").read_text()
    assert "self.dist_rank = 0\n" in text and "self.dist_num_replicas = 1\n" in text


def test_stream_that_does_not_fit_is_refused(stream, monkeypatch):
    monkeypatch.setattr(factory, "host_budget", lambda: 3 * 16 * 18 * 3)
    with pytest.raises(
        DataError, match=r"wds/some, split train: comes as a stream, and more than .* \(3 images\)"
    ):
        open_splits("wds/some")


def cut_short() -> Image.Image:
    encoded = io.BytesIO()
    picture(1).save(encoded, "png")
    return Image.open(io.BytesIO(encoded.getvalue()[:-100]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((cut_short(), 1), "wds/some, split train: image 1: image file is truncated"),
        ((picture(1), "cat"), "split train: wanted one class number for each image: invalid literal"),
        ((picture(1), None), "split train: wanted one class number for each image: int.. argument"),
    ],
    ids=["broken image", "name of a class", "no label"],
)
def test_stream_of_something_that_cannot_be_trained_on_is_refused_by_name(monkeypatch, second, message):
    def create(name, root, **options):
        return IterableImageDataset(root, reader=[(picture(0), 0), second])

    monkeypatch.setattr(factory, "create_dataset", create)
    with pytest.raises(DataError, match=message):
        open_splits("wds/some", train_on="train+val")


def test_rows_without_the_field_that_timm_reads_labels_from_are_refused_by_name(rows, monkeypatch):
    monkeypatch.setattr(Rows, "__init__", lambda self, count: setattr(self, "dataset", {"fine_label": [0]}))
    with pytest.raises(DataError, match="hfds/some, split train: has no field 'label'"):
        open_splits("hfds/some")


def test_stream_that_breaks_off_is_refused_by_name(monkeypatch):
    class Reader:
        def __iter__(self):
            yield picture(0), 0
            raise KeyError("label")

    monkeypatch.setattr(
        factory, "create_dataset", lambda name, root, **options: IterableImageDataset(root, reader=Reader())
    )
    with pytest.raises(DataError, match=r"hfids/some, split train: cannot be read on: KeyError\('label'\)"):
        open_splits("hfids/some")


def test_class_number_that_no_memory_holds_the_names_up_to_is_refused(rows, monkeypatch):
    monkeypatch.setattr(
        Rows, "__init__", lambda self, count: setattr(self, "dataset", {"label": [0, 10**12]})
    )
    with pytest.raises(DataError, match="image 1 has the class number 1000000000000, wanted one below 1,000"):
        open_splits("hfds/some")


def stream_of_classes(monkeypatch, *, train: int, test: int) -> None:
    """Opens, for any name, streams of nine images, of so many classes in either split."""

    def create(name, root, split, **options):
        num_classes = train if split == "train" else test
        return IterableImageDataset(root, reader=[(picture(i), i % num_classes) for i in range(9)])

    monkeypatch.setattr(factory, "create_dataset", create)


def test_test_split_that_lacks_the_last_numbered_classes_has_those_of_train(monkeypatch):
    stream_of_classes(monkeypatch, train=3, test=2)
    splits = open_splits("wds/some", with_test=True)
    assert splits.test.classes == splits.train.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "split train: has no images"),
        ([0, -1], "split train: image 1 has no class number"),
        (["cat"], "split train: wanted one class number for each image: invalid literal"),
        (np.array([0.0, 0.5], np.float32), "split train: wanted one class number for each image: got 0.5"),
        (None, "split train: SimpleNamespace does not list its labels"),
    ],
)
def test_set_without_a_class_number_for_each_image_is_refused(monkeypatch, labels, message):
    dataset = SimpleNamespace() if labels is None else SimpleNamespace(targets=labels)
    monkeypatch.setattr(factory, "create_dataset", lambda *_, **options: dataset)
    with pytest.raises(DataError, match=message):
        open_splits("torch/some")


def test_test_split_of_other_classes_is_refused(monkeypatch):
    stream_of_classes(monkeypatch, train=2, test=3)
    with pytest.raises(DataError, match="the test split has other classes than train"):
        open_splits("wds/some", with_test=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("torch/mnist", "torch/mnist, split train, in .*: cannot be opened: Dataset not found"),
        ("torch/nothing", "cannot be opened: Unknown torchvision dataset nothing"),
    ],
)
def test_set_that_is_not_there_is_refused(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        open_splits(name, data_root=str(tmp_path))


def test_folder_of_that_name_is_a_folder(write_images, monkeypatch):
    root = write_images({"torch/a/x": 2, "torch/a/y": 2})
    monkeypatch.chdir(root)
    assert open_splits("torch/a").classes == ("x", "y")
