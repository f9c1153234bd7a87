"""Labels that VTAB derives, and tasks made of CLEVR's, KITTI's, dSprites' and smallNORB's original files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from task_trees import stream, write_shards

from vpt_fast.data.images import DataError
from vpt_fast.data.prepare import TFDS_RANGES, prepare_task
from vpt_fast.data.set_files import ClevrFiles, DSpritesFiles, KittiFiles, SmallNorbFiles
from vpt_fast.data.tasks import TASKS, Task
from vpt_fast.data.vtab_labels import LABEL_RULES


def at_depth(*depths: float) -> list[list[float]]:
    return [[100.0, 50.0, depth] for depth in depths]


def on_the_road(**distances: float) -> dict[str, list]:
    kinds = {"car": 0, "van": 1, "truck": 2, "pedestrian": 3}
    return {"type": [kinds[kind] for kind in distances], "location": at_depth(*distances.values())}


@pytest.mark.parametrize(
    "task, value, label",
    [
        ("clevr_count", at_depth(9, 9, 9), 0),
        ("clevr_count", at_depth(*[9] * 10), 7),
        ("clevr_dist", at_depth(12, 7.9), 0),
        ("clevr_dist", at_depth(12, 8.0), 0),  # an edge belongs to the bin below
        ("clevr_dist", at_depth(8.01, 12), 1),
        ("clevr_dist", at_depth(9.4), 3),
        ("clevr_dist", at_depth(10.2, 11), 5),
        ("kitti", on_the_road(car=30, van=7.5), 0),
        ("kitti", on_the_road(truck=8.01, pedestrian=2), 1),
        ("kitti", on_the_road(van=20.5), 2),
        ("kitti", on_the_road(pedestrian=2), 3),
        ("kitti", {"type": [], "location": []}, 3),
        ("dsprites_loc", 31, 15),
        ("dsprites_ori", 2, 0),
        ("dsprites_ori", 3, 1),
        ("smallnorb_azi", 17, 17),
        ("smallnorb_ele", 8, 8),
    ],
)
def test_label_of_what_a_set_says(task, value, label):
    assert LABEL_RULES[f"vtab/{task}"].label(value) == label


@pytest.mark.parametrize("task, sizes", [("dsprites_loc", {2}), ("dsprites_ori", {2, 3})])
def test_sixteen_bins_are_as_large_as_they_can_be(task, sizes):
    rule = LABEL_RULES[f"vtab/{task}"]
    found = Counter(rule.label(value) for value in range(rule.binned_from))
    assert len(found) == 16 and set(found.values()) == sizes


RANGES = {
    "vtab/clevr_count": ("train[:8]", "train[16:20]", "validation"),
    "vtab/clevr_dist": ("train[:8]", "train[16:20]", "validation"),
    "vtab/kitti": ("train[:8]", "validation[:4]", "test"),
    "vtab/dsprites_loc": ("train[:8]", "train[20:24]", "train[24:]"),
    "vtab/dsprites_ori": ("train[:8]", "train[20:24]", "train[24:]"),
    "vtab/smallnorb_azi": ("train[:8]", "test[:4]", "test[6:]"),
    "vtab/smallnorb_ele": ("train[:8]", "test[:4]", "test[6:]"),
}


@pytest.fixture
def small(monkeypatch):
    """The task of that name with 8, 4 and `test` images."""

    def shrink(name: str, test: int) -> Task:
        monkeypatch.setitem(TFDS_RANGES, name, RANGES[name])
        return dataclasses.replace(TASKS[name], num_train=8, num_val=4, num_test=test)

    return shrink


def prepared(task: Task, source: Path, out: Path) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Pixels and label of every image in the lists that are made."""
    result = prepare_task(task, str(source), out)
    assert not result.is_published
    found = {}
    for split, file in task.files.items():
        lines = [line.split() for line in (result.folder / file).read_text().splitlines()]
        assert len(lines) == task.sizes[split]
        found[split] = [(np.asarray(Image.open(result.folder / path)), int(label)) for path, label in lines]
    images = [pixels.tobytes() for part in found.values() for pixels, _ in part]
    assert len(set(images)) == len(images)  # none comes twice
    return found


def write_clevr(root: Path) -> Path:
    """Scene i has 3 + i % 8 objects, the closest at depth 7.75 + i % 6 / 2; its image is i at every pixel."""
    for part, count in (("train", 24), ("val", 6)):
        (root / "CLEVR_v1.0" / "images" / part).mkdir(parents=True)
        (root / "CLEVR_v1.0" / "scenes").mkdir(exist_ok=True)
        scenes = []
        for i in range(count):
            shade = i + 100 * (part == "val")
            name = f"CLEVR_{part}_{i:06d}.png"
            Image.new("RGB", (12, 8), (shade,) * 3).save(root / "CLEVR_v1.0" / "images" / part / name)
            depths = [7.75 + shade % 6 / 2, *[30.0] * (2 + shade % 8)]
            scenes.append(
                {"image_filename": name, "objects": [{"pixel_coords": place} for place in at_depth(*depths)]}
            )
        path = root / "CLEVR_v1.0" / "scenes" / f"CLEVR_{part}_scenes.json"
        path.write_text(json.dumps({"info": {}, "scenes": scenes}))
    return root


@pytest.mark.parametrize("name, modulus", [("vtab/clevr_count", 8), ("vtab/clevr_dist", 6)])
def test_images_of_clevr_are_labelled_by_their_scenes(small, tmp_path, name, modulus):
    found = prepared(small(name, test=6), write_clevr(tmp_path / "set"), tmp_path / "out")
    for part in found.values():
        assert [label for _, label in part] == [int(pixels[0, 0, 0]) % modulus for pixels, _ in part]
    assert all(pixels[0, 0, 0] >= 100 for pixels, _ in found["test"])


def write_kitti(root: Path) -> Path:
    """Image i, of the video i // 2 of 20, shows a car i metres away, and what is no object."""
    for folder in ("training/image_2", "training/label_2", "mapping"):
        (root / folder).mkdir(parents=True)
    rest = "0.00 0 0.00 1 2 3 4 1.5 1.6 4.0"
    for i in range(40):
        Image.new("RGB", (12, 8), (i,) * 3).save(root / "training/image_2" / f"{i:06d}.png")
        lines = [
            f"Car {rest} 0.5 1.6 {i:.2f} 0.1",
            "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10",
        ]
        (root / "training/label_2" / f"{i:06d}.txt").write_text("\n".join(lines) + "\n")
    # One line of the mapping for each image, in an order of its own that train_rand.txt gives, from 1.
    order = np.random.default_rng(1).permutation(40)
    lines = [f"2011_09_26 2011_09_26_drive_{i // 2:04d}_sync {i:010d}" for i in np.argsort(order)]
    (root / "mapping/train_mapping.txt").write_text("\n".join(lines) + "\n")
    (root / "mapping/train_rand.txt").write_text(",".join(str(place + 1) for place in order))
    return root


def test_images_of_kitti_are_labelled_by_distance_and_split_by_video(small, tmp_path):
    found = prepared(small("vtab/kitti", test=4), write_kitti(tmp_path / "set"), tmp_path / "out")
    videos = {}
    for split, part in found.items():
        metres = [int(pixels[0, 0, 0]) for pixels, _ in part]
        assert [label for _, label in part] == [0 if m <= 8 else 1 if m <= 20 else 2 for m in metres]
        videos[split] = {m // 2 for m in metres}
    assert not videos["train"] & videos["test"] and not videos["val"] & (videos["train"] | videos["test"])
    assert len(videos["test"]) == len(videos["val"]) == 2  # a tenth of 20


@pytest.mark.parametrize("change", ["label", "image"])
def test_files_of_other_contents_do_not_go_on_with_what_is_there(small, tmp_path, change):
    task, source = small("vtab/kitti", test=4), write_kitti(tmp_path / "set")
    prepare_task(task, str(source), tmp_path)
    for i in range(40):  # of which some are taken
        if change == "label":
            (source / "training/label_2" / f"{i:06d}.txt").write_text("")
        else:
            Image.new("RGB", (24, 16)).save(source / "training/image_2" / f"{i:06d}.png")
    with pytest.raises(DataError, match="holds images of another source"):
        prepare_task(task, str(source), tmp_path)


def test_missing_image_of_a_set_is_named_before_any_is_written(small, tmp_path):
    source = write_kitti(tmp_path / "set")
    for path in (source / "training/image_2").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"image_2/0000\d\d.png: is missing"):
        prepare_task(small("vtab/kitti", test=4), str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_dsprites(root: Path) -> Path:
    """Image i has x position i and orientation 39 - i: so many white pixels in its first and second row."""
    root.mkdir()
    images, classes = np.zeros((30, 64, 64), np.uint8), np.zeros((30, 6), np.int64)
    for i in range(30):
        images[i, 0, :i] = images[i, 1, : 39 - i] = 1
        classes[i, 3:5] = 39 - i, i
    arrays = {"imgs": images, "latents_classes": classes, "metadata": np.array({"title": "dSprites"})}
    np.savez_compressed(root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", **arrays)
    return root


@pytest.mark.parametrize("name, row, values", [("vtab/dsprites_loc", 0, 32), ("vtab/dsprites_ori", 1, 40)])
def test_images_of_dsprites_are_labelled_by_their_factors(small, tmp_path, name, row, values):
    found = prepared(small(name, test=6), write_dsprites(tmp_path / "set"), tmp_path / "out")
    for part in found.values():
        assert [label for _, label in part] == [16 * int(px[row].sum()) // 255 // values for px, _ in part]
        assert {int(pixels.max()) for pixels, _ in part} == {255}


def test_images_of_original_files_are_drawn_with_seed_0(small, tmp_path):
    task = small("vtab/dsprites_loc", test=6)
    found = prepared(task, write_dsprites(tmp_path / "set"), tmp_path / "out")
    order = np.random.default_rng(0).permutation(30)
    for split, drawn in {"train": order[:8], "val": order[20:24], "test": order[24:]}.items():
        assert [int(pixels[0].sum()) // 255 for pixels, _ in found[split]] == sorted(drawn)


def test_archive_of_dsprites_without_the_images_is_named(tmp_path):
    np.savez(tmp_path / DSpritesFiles.layout, latents_classes=np.zeros((30, 6), np.int64))
    with pytest.raises(DataError, match="imgs.npy.*; wanted an archive of imgs and latents_classes"):
        DSpritesFiles(tmp_path)


def test_images_of_dsprites_of_another_kind_are_named(tmp_path):
    arrays = {"imgs": np.zeros((30, 64, 64)), "latents_classes": np.zeros((30, 6), np.int64)}
    np.savez(tmp_path / DSpritesFiles.layout, **arrays)
    with pytest.raises(DataError, match=r"imgs is float64 \(30, 64, 64\), wanted uint8"):
        next(DSpritesFiles(tmp_path).images("train", [0]))


@pytest.mark.parametrize("damage", ["other bytes", "fewer images"])
def test_damaged_images_of_dsprites_are_named(tmp_path, damage):
    path = write_dsprites(tmp_path / "set") / DSpritesFiles.layout
    if damage == "fewer images":
        with np.load(path) as arrays:
            images, classes = arrays["imgs"][:20], arrays["latents_classes"]
        np.savez_compressed(path, imgs=images, latents_classes=classes)
    else:
        with zipfile.ZipFile(path) as archive:
            header = archive.getinfo("imgs.npy").header_offset
        contents = bytearray(path.read_bytes())
        contents[header + 200 : header + 220] = bytes(20)
        path.write_bytes(contents)
    with pytest.raises(DataError, match=r"64x64.npz: is damaged or not complete; get it again"):
        list(DSpritesFiles(path.parent).images("train", range(30)))


def write_norb(root: Path) -> Path:
    """Image i has elevation i % 9 and azimuth i % 18; its first camera sees i at every pixel."""
    root.mkdir()

    def matrix(array: np.ndarray) -> bytes:
        magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
        sizes = [*array.shape, *[1] * (3 - array.ndim)]
        return np.array([magic, array.ndim, *sizes], "<i4").tobytes() + array.tobytes()

    for name, count, first in (
        ("5x46789x9x18x6x2x96x96-training", 20, 0),
        ("5x01235x9x18x6x2x96x96-testing", 12, 50),
    ):
        numbers = np.arange(first, first + count)
        cameras = np.full((count, 2, 96, 96), 255, np.uint8)
        cameras[:, 0] = numbers[:, None, None]
        info = np.stack([numbers % 10, numbers % 9, 2 * (numbers % 18), numbers % 6], axis=1).astype(np.int32)
        (root / f"smallnorb-{name}-info.mat").write_bytes(matrix(info))
        with gzip.open(root / f"smallnorb-{name}-dat.mat.gz", "wb") as file:
            file.write(matrix(cameras))
    return root


@pytest.mark.parametrize("name, modulus", [("vtab/smallnorb_azi", 18), ("vtab/smallnorb_ele", 9)])
def test_images_of_smallnorb_are_labelled_by_their_pose_and_are_of_one_camera(small, tmp_path, name, modulus):
    found = prepared(small(name, test=6), write_norb(tmp_path / "set"), tmp_path / "out")
    for split, part in found.items():
        assert [label for _, label in part] == [int(pixels[0, 0]) % modulus for pixels, _ in part]
        assert all((pixels[0, 0] >= 50) == (split != "train") for pixels, _ in part)


@pytest.mark.parametrize("length", [0, 4, 22, 0.5])
@pytest.mark.parametrize("kind", ["info.mat", "dat.mat", "dat.mat.gz"])
def test_incomplete_file_of_smallnorb_is_named(small, tmp_path, kind, length):
    root = write_norb(tmp_path / "set")
    whole = root / f"smallnorb-5x46789x9x18x6x2x96x96-training-{kind}"
    if kind == "dat.mat":
        whole.write_bytes(gzip.decompress(whole.with_name(f"{whole.name}.gz").read_bytes()))
    contents = whole.read_bytes()
    whole.write_bytes(contents[: length if length != 0.5 else len(contents) // 2])
    with pytest.raises(DataError, match=f"training-{kind}: is damaged or not complete"):
        prepare_task(small("vtab/smallnorb_azi", test=6), str(root), tmp_path / "out")


def test_fields_of_tfds_become_labels_and_pixels_of_0_to_255(small, tmp_path, monkeypatch):
    asked = set()

    def create(name, root, split, target_key, **options):
        asked.add((name, target_key))
        count = {"train[:8]": 8, "train[20:24]": 4, "train[24:]": 6}[split]
        white = Image.fromarray(np.ones((4, 4, 3), np.uint8))
        return stream([(white, np.int64(x)) for x in range(count)], "dsprites/2.0.0")

    monkeypatch.setattr("vpt_fast.data.factory.create_dataset", create)
    result = prepare_task(small("vtab/dsprites_loc", test=6), "tfds/dsprites", tmp_path)
    assert result.is_published and asked == {("tfds/dsprites", "label_x_position")}
    lines = (result.folder / "train800.txt").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.asarray(Image.open(result.folder / lines[0].split()[0])).min() == 255


def test_classes_of_shards_are_put_into_bins(small, tmp_path, monkeypatch):
    rule = dataclasses.replace(LABEL_RULES["vtab/dsprites_loc"], label=lambda x: 7 + x, binned_from=2)
    monkeypatch.setitem(LABEL_RULES, "vtab/dsprites_loc", rule)
    shards = write_shards(tmp_path / "shards", {"train": 12, "test": 6})
    result = prepare_task(small("vtab/dsprites_loc", test=6), str(shards), tmp_path / "out")
    labels = [line.split()[1] for line in (result.folder / "train800.txt").read_text().splitlines()]
    assert labels == ["7", "8"] * 4 and not (result.folder / "classnames.txt").exists()


def test_classes_of_shards_that_are_the_task_s_own_stay(small, tmp_path):
    task = dataclasses.replace(small("vtab/smallnorb_ele", test=6), num_classes=2)
    shards = write_shards(tmp_path / "shards", {"train": 12, "test": 6})
    result = prepare_task(task, str(shards), tmp_path / "out")
    labels = [line.split()[1] for line in (result.folder / "train800.txt").read_text().splitlines()]
    assert labels == ["0", "1"] * 4 and (result.folder / "classnames.txt").read_text() == "dark\nbright\n"


def scenes_of(image: str, coordinates: list[list[float]]) -> str:
    objects = [{"pixel_coords": place} for place in coordinates]
    return json.dumps({"scenes": [{"image_filename": image, "objects": objects}]})


@pytest.mark.parametrize(
    "files, broken, message",
    [
        (ClevrFiles, None, "has no scenes; wanted scenes/CLEVR_"),
        (ClevrFiles, ("scenes/CLEVR_train_scenes.json", "{"), "CLEVR_train_scenes.json, line 1: is not JSON"),
        (ClevrFiles, ("scenes/CLEVR_train_scenes.json", "{}"), "wanted scenes, each with"),
        (ClevrFiles, ("scenes/CLEVR_train_scenes.json", '{"scenes": [{}]}'), "wanted scenes, each with"),
        (ClevrFiles, ("scenes/CLEVR_train_scenes.json", '{"scenes": [1]}'), "wanted scenes, each with"),
        (
            ClevrFiles,
            ("scenes/CLEVR_train_scenes.json", scenes_of("../../secret", at_depth(9, 9, 9))),
            "wanted scenes, each with",
        ),
        (
            ClevrFiles,
            ("scenes/CLEVR_train_scenes.json", scenes_of("a", [[1.0, 1.0], *at_depth(9, 9)])),
            "wanted scenes, each with",
        ),
        *(
            (
                ClevrFiles,
                ("scenes/CLEVR_train_scenes.json", scenes_of("a", at_depth(*[9] * count))),
                "wanted scenes, each with image_filename and 3 to 10 objects of three pixel_coords",
            )
            for count in (0, 2, 11)  # of which a label would be negative, or above the last class
        ),
        (KittiFiles, ("training/label_2/0.txt", ""), "has no mapping; wanted training/image_2"),
        (DSpritesFiles, None, "wanted dsprites_ndarray"),
        (
            DSpritesFiles,
            ("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", "no"),
            "wanted an archive of imgs",
        ),
        (DSpritesFiles, ("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", ""), "wanted an archive of imgs"),
        (SmallNorbFiles, None, "-training-info.mat: is missing; wanted smallnorb-5x"),
        (
            SmallNorbFiles,
            ("smallnorb-5x46789x9x18x6x2x96x96-training-info.mat", "12345678901234567890"),
            "begins with 0x34333231, which is no matrix of smallNORB's",
        ),
    ],
)
def test_files_of_something_else_are_named(tmp_path, files, broken, message):
    if broken is not None:
        path = tmp_path / broken[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(broken[1])
    with pytest.raises(DataError, match=message):
        files(tmp_path)


def test_a_mapping_of_kitti_that_says_something_else_is_named(tmp_path):
    root = write_kitti(tmp_path / "set")
    (root / "mapping/train_rand.txt").write_text("1,two")
    with pytest.raises(DataError, match="mapping: .*'two'; wanted numbers of lines in train_rand.txt"):
        KittiFiles(root)


@pytest.mark.parametrize(
    "line", ["Car 1 2 3", "Tree" + 14 * " 1", "Car" + 13 * " 1" + " one"], ids=["short", "type", "word"]
)
def test_a_line_of_kitti_that_says_something_else_is_named(tmp_path, line):
    files = KittiFiles(write_kitti(tmp_path / "set"))
    (tmp_path / "set/training/label_2/000007.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match="000007.txt: wanted lines of a type of object and 14 numbers"):
        files.field("objects", "train", 7)
