"""Augmentation of scenes, and their batches: by the seed alone, and mask and image the same way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import write
from torchvision.transforms import v2

from vpt_fast.data import scene_preprocessing
from vpt_fast.data.scene_batches import SceneBatches
from vpt_fast.data.scene_preprocessing import (
    INTERPOLATIONS,
    MOST_OF_ONE_CLASS,
    ScenePreprocessing,
    image_seed,
)
from vpt_fast.data.scenes import IGNORED, open_scenes

SIZE = (24, 24)
PLAIN = ScenePreprocessing(SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def scene(height: int = 40, width: int = 60) -> tuple[Image.Image, np.ndarray]:
    """Dark above a slanted edge and light below it; the mask is 0 above and 1 below."""
    mask = (np.arange(height)[:, None] + np.arange(width) / 3 > height / 2).astype(np.uint8)
    return Image.fromarray(np.repeat((40 + 180 * mask)[..., None], 3, axis=2)), mask


def test_mask_goes_where_the_image_goes():
    right = total = 0
    for seed in range(20):
        pixels, labels = PLAIN.augment(*scene(), seed)
        assert pixels.shape == (3, *SIZE) and labels.shape == SIZE and pixels.dtype == labels.dtype
        is_light = pixels.float().mean(0) > 0.5 * pixels.float().max()
        right += int(((is_light == (labels == 1)) & (labels != IGNORED)).sum())
        total += int((labels != IGNORED).sum())
    assert right > 0.95 * total  # all but pixels along the edge


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [54, 81, 117])
def test_resized_mask_lies_on_its_image(monkeypatch, interpolation, size):
    monkeypatch.setattr(scene_preprocessing, "SCALES", (size / 128, size / 128))
    monkeypatch.setattr(scene_preprocessing.v2, "RandomPhotometricDistort", lambda: lambda pixels: pixels)
    mask = np.zeros((60, 60), np.uint8)
    mask[14:47, 17:40] = 1
    image = Image.fromarray(np.repeat(255 * mask[..., None], 3, axis=2))
    made = ScenePreprocessing((128, 128), interpolation, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels, labels = made.augment(image, mask, 0)

    def middle(weights: torch.Tensor) -> torch.Tensor:
        places = torch.stack(torch.meshgrid(*map(torch.arange, weights.shape), indexing="ij"))
        return (weights * places).sum((1, 2)) / weights.sum()

    shift = middle(labels.double() * (labels != IGNORED)) - middle(pixels[0].double())
    assert shift.abs().max() < 0.2  # pixels


def test_augmentation_depends_on_the_seed_and_leaves_torch_generator_alone():
    before = torch.get_rng_state()
    one, again, other = (PLAIN.augment(*scene(), seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_augmentation_leaves_the_generator_of_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU is seeded"))
    PLAIN.augment(*scene(), 3)


def test_small_image_is_padded_with_the_mean_colour_and_no_class():
    preprocessing = ScenePreprocessing((64, 64), mean=(0.2, 0.4, 0.6), std=(1.0, 1.0, 1.0))
    padded = 0
    for seed in range(12):
        _, labels = preprocessing.augment(*scene(), seed)
        padded += bool((labels == IGNORED).any())
    assert 0 < padded < 12  # at scales below 1 alone


def test_crops_of_nearly_one_class_are_drawn_again(monkeypatch):
    image, mask = scene(80, 80)
    mask[:] = np.arange(80) >= 60

    def varied() -> int:
        shares = []
        for seed in range(30):
            _, labels = PLAIN.augment(image, mask, seed)
            shares.append(float((labels[labels != IGNORED] == 0).float().mean()))
        return sum(share <= MOST_OF_ONE_CLASS for share in shares)

    several = varied()
    monkeypatch.setattr(scene_preprocessing, "TRIES", 1)
    assert several > varied() + 5


def test_crops_without_a_class_are_drawn_again(monkeypatch):
    image, mask = scene(80, 80)
    mask[:] = IGNORED
    mask[:, :6] = np.arange(6) % 2

    def labelled() -> int:
        return sum(bool((PLAIN.augment(image, mask, seed)[1] != IGNORED).any()) for seed in range(30))

    several = labelled()
    monkeypatch.setattr(scene_preprocessing, "TRIES", 1)
    assert several > labelled() + 5


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((30, 60), 1.0, (24, 48)),
        ((60, 30), 1.0, (48, 24)),
        ((30, 60), 0.5, (12, 24)),
        ((24, 24), 1.75, (42, 42)),
    ],
)
def test_evaluation_covers_a_window_with_the_shape_kept(size, scale, expected):
    assert PLAIN.covering_size(size, scale) == expected
    assert PLAIN.resize(torch.zeros(3, *size, dtype=torch.uint8), scale).shape == (3, *expected)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_image_is_resized_with_the_interpolation_that_is_named(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8))
    resized = ScenePreprocessing(SIZE, interpolation=name).resize(v2.functional.pil_to_tensor(image))
    wanted = v2.functional.pil_to_tensor(image.resize((30, 24), Image.Resampling[name.upper()]))
    assert (resized.int() - wanted.int()).abs().max() <= 1


def test_preprocessing_survives_json():
    assert ScenePreprocessing.from_dict(PLAIN.to_dict()) == PLAIN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation: 'lanczos', wanted one of nearest, bilinear, bicubic"),
        ({"std": (1.0, 0.0, 1.0)}, "std: "),
        ({"image_size": (24,)}, "image_size: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_fields_of_preprocessing_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ScenePreprocessing(**{"image_size": SIZE} | settings)


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (40, 30), (26, 50), (31, 31), (24, 24)]
    labels = {f"training/{i}": rng.integers(0, 3, size, dtype=np.uint8) for i, size in enumerate(sizes)}
    return open_scenes(write(tmp_path / "scenes", labels | {"validation/0": labels["training/0"]})).train


def batches(scenes, **settings) -> SceneBatches:
    wanted = dict(batch_size=2, train=True, seed=5, device="cpu", workers=0) | settings
    return SceneBatches(scenes, PLAIN, **wanted)


def test_only_a_cuda_device_reads_scenes_after_the_copy_was_asked_for(scenes, overlapping):
    pixels, _ = next(batches(scenes, device="meta").epoch(0))
    assert pixels.device.type == "meta" and overlapping == []


def test_batches_are_the_same_in_worker_processes(scenes):
    here, there = batches(scenes), batches(scenes, workers=1)
    for epoch in (0, 1):
        pairs = list(zip(here.epoch(epoch), there.epoch(epoch), strict=True))
        assert len(pairs) == len(here) == 3
        for (x, y), (other_x, other_y) in pairs:
            assert torch.equal(x, other_x) and torch.equal(y, other_y)
            assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_workers_give_the_same_scenes_without_room_in_shared_memory(scenes, full_shared_memory):
    pairs = zip(batches(scenes).epoch(0), batches(scenes, workers=1).epoch(0), strict=True)
    assert all(torch.equal(x, other_x) and torch.equal(y, other_y) for (x, y), (other_x, other_y) in pairs)
    assert len(full_shared_memory) == 3


def test_epochs_differ_and_repeat(scenes):
    source = batches(scenes)
    first, second, again = (torch.cat([x for x, _ in source.epoch(epoch)]) for epoch in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_ranks_share_what_one_process_would_get(scenes):
    whole = batches(scenes, batch_size=4).indices(3)
    parts = [batches(scenes, rank=rank, world_size=2).indices(3) for rank in (0, 1)]
    joined = [index for pair in zip(*parts, strict=True) for index in pair]
    assert joined == [*whole, whole[0]]  # five images, of which one comes twice


def test_evaluation_gives_every_image_once_as_it_is(scenes):
    sizes = [
        [
            tuple(image.shape[1:])
            for image, mask in batches(scenes, train=False, rank=r, world_size=2).epoch(0)
        ]
        for r in (0, 1)
    ]
    assert sizes == [[(30, 40), (26, 50), (24, 24)], [(40, 30), (31, 31)]]


def test_image_that_broke_since_it_was_checked_is_named(scenes):
    scenes.images[1].write_bytes(b"no image")
    with pytest.raises(ValueError, match="training/1.jpg: not an image"):
        list(batches(scenes, workers=1, train=False).epoch(0))


def test_two_epochs_at_once_are_refused(scenes):
    source = batches(scenes)
    with pytest.raises(RuntimeError, match="epoch: another epoch was started"):
        list(zip(source.epoch(0), source.epoch(1), strict=True))


def test_rank_that_no_process_has_is_refused(scenes):
    with pytest.raises(ValueError, match="rank: 2, wanted 0 to world_size - 1 = 1"):
        batches(scenes, rank=2, world_size=2)


def test_seeds_of_images_and_epochs_differ():
    assert len({image_seed(1, epoch, index) for epoch in range(5) for index in range(5)}) == 25
