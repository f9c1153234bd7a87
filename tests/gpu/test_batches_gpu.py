"""Batches on a CUDA device: the same numbers wherever the pixels are kept."""

from __future__ import annotations

import pytest
import torch
from task_trees import picture

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import check_images
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing

pytestmark = pytest.mark.gpu


def images_in(folder) -> ImageList:
    paths = [folder / f"{i}.png" for i in range(11)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return ImageList(tuple(paths), tuple(i % 2 for i in range(11)), ("dark", "bright"))


@pytest.mark.parametrize("resident", ["device", "host", "off"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path, resident, augment):
    images = images_in(tmp_path)
    preprocessing = Preprocessing((8, 8), resize="shortest", augment=augment)
    options = {"train": True, "seed": 0, "workers": 2, "resident": resident}
    on_cpu = Batches(images, preprocessing, 4, device="cpu", **options)
    on_gpu = Batches(images, preprocessing, 4, device="cuda", **options)
    for (pixels, labels), (others, other_labels) in zip(on_gpu.epoch(0), on_cpu.epoch(0), strict=True):
        assert pixels.is_cuda and labels.is_cuda
        torch.testing.assert_close(pixels.cpu(), others, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), other_labels)


def test_pixels_in_the_host_s_memory_are_pinned_once_for_all_batches_of_them(tmp_path):
    preprocessing = Preprocessing((8, 8))
    checked = check_images(images_in(tmp_path), preprocessing=preprocessing, keep_bytes=1 << 20)
    options = {"train": True, "seed": 0, "device": "cuda", "resident": "host"}
    some, others = (Batches(checked, preprocessing, 4, **options) for _ in range(2))
    assert checked.resident.pixels.is_pinned()
    assert (some.not_pinned, others.not_pinned) == (None, None)
