from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml
from image_files import noise
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from vpt_fast.data.preprocessing import Preprocessing

BACKBONE = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.9}
SHAPES = [(30, 30), (47, 31), (31, 47), (200, 20), (5, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_squash_is_torchvisions_resize_to_height_and_width(shape, interpolation):
    image = noise(*shape)
    mode = transforms.InterpolationMode(interpolation)
    expected = transforms.PILToTensor()(transforms.Resize((24, 16), mode)(image))
    assert torch.equal(Preprocessing((24, 16), interpolation=interpolation).resize_image(image), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shortest_is_torchvisions_resize_of_the_short_side_and_centre_crop(shape):
    image = noise(*shape)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose(
        [transforms.Resize(32, bicubic), transforms.CenterCrop(28), transforms.PILToTensor()]
    )
    assert torch.equal(Preprocessing((28, 28), resize="shortest").resize_image(image), reference(image))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [28, 224])
def test_evaluation_is_timms(crop_pct, size):
    preprocessing = Preprocessing((size, size), resize="shortest", crop_pct=crop_pct)
    reference = create_transform((3, size, size), crop_pct=crop_pct, interpolation="bicubic")
    image = noise(300, 300)
    torch.testing.assert_close(preprocessing(image), reference(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 60), (60, 1)], ids=str)
@pytest.mark.parametrize("image_size", [(16, 16), (24, 16), (7, 33)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.3, 0.875, 1.0])
def test_resized_image_covers_the_crop_and_keeps_its_shape(shape, image_size, crop_pct):
    preprocessing = Preprocessing(image_size, resize="shortest", crop_pct=crop_pct)
    height, width = preprocessing.resized_size(shape)
    cover = [math.floor(side / crop_pct) for side in image_size]
    assert height >= cover[0] and width >= cover[1]
    assert height == cover[0] or width == cover[1]
    assert abs(height * shape[1] - width * shape[0]) < max(shape)
    assert preprocessing.resize_image(noise(*shape)).shape == (3, *image_size)


def test_random_crops_reach_every_corner_and_no_further():
    preprocessing = Preprocessing((2, 3), resize="shortest", augment="crop_flip")
    pixels = torch.arange(3 * 4 * 5).view(3, 4, 5)
    nearly = 1 - 2**-53  # the largest that torch.rand gives in float64
    assert torch.equal(preprocessing.crop(pixels, (0.0, 0.0)), pixels[:, :2, :3])
    assert torch.equal(preprocessing.crop(pixels, (nearly, nearly)), pixels[:, 2:, 2:])
    assert torch.equal(preprocessing.crop(pixels, (nearly, 0.0)), pixels[:, 2:, :3])


def test_normalised_is_pixels_over_255_minus_mean_over_std():
    preprocessing = Preprocessing((2, 2), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = noise(2, 2)
    expected = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))]
    )
    torch.testing.assert_close(preprocessing(pixels), expected(pixels), rtol=0, atol=1e-6)


def test_calling_it_evaluates_whatever_the_augmentation():
    augmented = Preprocessing((16, 16), resize="shortest", augment="crop_flip")
    image = noise(30, 40)
    assert torch.equal(augmented(image), dataclasses.replace(augmented, augment="none")(image))


@pytest.mark.parametrize(
    "normalization, mean, std",
    [
        ("backbone", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_for_model_knows_normalisations_by_name(normalization, mean, std):
    preprocessing = Preprocessing.for_model(BACKBONE, (16, 16), normalization=normalization)
    assert (preprocessing.mean, preprocessing.std) == (mean, std)


def test_for_model_squashes_as_vtab_with_the_backbones_interpolation():
    preprocessing = Preprocessing.for_model(BACKBONE, (16, 24))
    assert preprocessing.image_size == (16, 24)
    assert (preprocessing.resize, preprocessing.interpolation) == ("squash", "bilinear")


def test_for_model_crops_224_from_256_as_fgvc():
    preprocessing = Preprocessing.for_model(BACKBONE, (224, 224), augment="crop_flip")
    assert preprocessing.resized_size((500, 1000)) == (256, 512)
    assert preprocessing.resize_image(Image.new("RGB", (100, 50))).shape == (3, 256, 512)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing((16, 24)),
        Preprocessing((16, 24), "shortest", 0.5, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop_flip"),
    ],
    ids=["defaults", "all-set"],
)
@pytest.mark.parametrize("text", [json, yaml], ids=["json", "yaml"])
def test_comes_back_from_text(preprocessing, text):
    load = json.loads if text is json else yaml.safe_load
    dump = json.dumps if text is json else yaml.safe_dump
    assert Preprocessing.from_dict(load(dump(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resize": "stretch"}, "resize: 'stretch', wanted one of squash, shortest"),
        ({"augment": "mixup"}, "augment: 'mixup', wanted one of none, flip, crop_flip"),
        ({"augment": "crop_flip"}, '"crop_flip" .* goes with resize="shortest", not \'squash\''),
        ({"interpolation": "random"}, "interpolation: 'random', wanted one of nearest, bilinear"),
        ({"image_size": 224}, "image_size: 224, wanted 2 numbers"),
        ({"image_size": [224, 0]}, "image_size: .*wanted .*whole pixels"),
        ({"image_size": [224, 32.5]}, "image_size: .*wanted .*whole pixels"),
        ({"mean": [0.5]}, r"mean: \[0.5\], wanted 3 numbers"),
        ({"mean": "imagenet"}, "mean: 'imagenet', wanted 3 numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean: .*wanted 3 numbers"),
        ({"std": [0.5, 0.5, 0]}, "std: .*wanted numbers above 0"),
        ({"crop_pct": 0}, "crop_pct: 0, wanted a number above 0"),
        ({"crop_pct": 1.1}, "crop_pct: 1.1, wanted a number above 0"),
        ({"crop_pct": "0.9"}, "crop_pct: '0.9', wanted a number above 0"),
        ({"colour": 1}, "preprocessing: unknown colour; wanted image_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_field_that_cannot_be_used_is_named(change, message):
    values = {**Preprocessing((16, 16)).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values)


def test_missing_field_is_named():
    values = Preprocessing((16, 16)).to_dict()
    del values["mean"]
    with pytest.raises(ValueError, match="preprocessing: missing mean"):
        Preprocessing.from_dict(values)


def test_unknown_normalisation_is_refused_by_name():
    with pytest.raises(
        ValueError, match="normalization: 'clip', wanted one of backbone, imagenet, inception, none"
    ):
        Preprocessing.for_model(BACKBONE, (16, 16), normalization="clip")
