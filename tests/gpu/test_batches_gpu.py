"""Batches on a CUDA device: the same numbers wherever the pixels are kept."""

from __future__ import annotations

import pytest
import torch
from task_trees import picture

from vpt_fast.data import Batches, ImageList, Preprocessing

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("resident", ["device", "host", "off"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path, resident, augment):
    paths = [tmp_path / f"{i}.png" for i in range(11)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    images = ImageList(tuple(paths), tuple(i % 2 for i in range(11)), ("dark", "bright"))
    preprocessing = Preprocessing((8, 8), resize="shortest", augment=augment)
    options = {"train": True, "seed": 0, "workers": 2, "resident": resident}
    on_cpu = Batches(images, preprocessing, 4, device="cpu", **options)
    on_gpu = Batches(images, preprocessing, 4, device="cuda", **options)
    for (pixels, labels), (others, other_labels) in zip(on_gpu.epoch(0), on_cpu.epoch(0), strict=True):
        assert pixels.is_cuda and labels.is_cuda
        torch.testing.assert_close(pixels.cpu(), others, rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), other_labels)
