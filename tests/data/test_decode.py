from __future__ import annotations

import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise, png_of_one_row
from PIL import EpsImagePlugin, ExifTags, Image

from vpt_fast.data.decode import CheckedImages, DecodeError, check_images, decode_image
from vpt_fast.data.images import DataError, ImageList, Splits
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.scenes import read_mask
from vpt_fast.data.shards import TarImage
from vpt_fast.data.splits import open_splits

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.asarray(noise(16, 16))
SIXTEEN_BITS = (GREY.astype(np.uint16) << 8) + 37


def decoded(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    """(h, w, 3) of what comes back from the file that `image` is saved to."""
    image.save(path, **options)
    result = decode_image(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def grey_levels(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    """(h, w), of an image that comes back grey."""
    pixels = decoded(image, path, **options)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.ppm", "x.webp"])
def test_rgb_comes_back_as_written(tmp_path, name):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(decoded(Image.fromarray(RGB), tmp_path / name, **lossless), RGB)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_jpeg_comes_back_as_pillow_decodes_it(tmp_path, options):
    pixels = decoded(Image.fromarray(RGB), tmp_path / "x.jpg", **options)
    with Image.open(tmp_path / "x.jpg") as image:
        np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.pgm", "x.gif"])
def test_greyscale_fills_three_channels(tmp_path, name):
    np.testing.assert_array_equal(grey_levels(Image.fromarray(GREY), tmp_path / name), GREY)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
def test_one_bit_is_black_and_white(tmp_path, name):
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(grey_levels(bits, tmp_path / name), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bit_greyscale_is_scaled(tmp_path, name):
    grey = grey_levels(Image.fromarray(SIXTEEN_BITS), tmp_path / name)
    np.testing.assert_array_equal(grey, np.rint(SIXTEEN_BITS / 257))


def test_sixteen_bit_big_endian_tiff_is_scaled(tmp_path):
    image = Image.frombytes("I;16B", (16, 16), SIXTEEN_BITS.astype(">u2").tobytes())
    np.testing.assert_array_equal(grey_levels(image, tmp_path / "x.tif"), np.rint(SIXTEEN_BITS / 257))


def test_black_and_white_of_sixteen_bits_are_black_and_white(tmp_path):
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert grey_levels(image, tmp_path / "x.png").tolist() == [[0, 255]]


def test_thirty_two_bit_integers_are_sixteen_bit_values(tmp_path):
    image = Image.fromarray(SIXTEEN_BITS.astype(np.int32))
    np.testing.assert_array_equal(grey_levels(image, tmp_path / "x.tif"), np.rint(SIXTEEN_BITS / 257))


@pytest.mark.parametrize("top", [1, 255])
def test_floats_up_to_1_or_255_are_scaled(tmp_path, top):
    image = Image.fromarray((GREY / 255 * top).astype(np.float32))
    np.testing.assert_array_equal(grey_levels(image, tmp_path / "x.tif"), GREY)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(DecodeError, match="32-bit pixels from .*wanted 0 to 65535"):
        decode_image(tmp_path / "x.tif")


@pytest.mark.parametrize("value", [-0.5, 256, np.nan, np.inf])
def test_floats_with_no_known_range_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DecodeError, match="floating-point pixels from .*wanted 0 to 1 or 0 to 255"):
        decode_image(tmp_path / "x.tif")


def test_cmyk_jpeg_has_the_colours_of_the_rgb_one(tmp_path):
    colours = Image.fromarray(np.full((16, 16, 3), (200, 90, 30), dtype=np.uint8))
    pixels = decoded(colours.convert("CMYK"), tmp_path / "x.jpg", quality=100)
    assert np.abs(pixels.astype(int) - (200, 90, 30)).max() <= 3


def test_cmyk_tiff_has_the_colours_of_the_rgb_one(tmp_path):
    np.testing.assert_array_equal(decoded(Image.fromarray(RGB).convert("CMYK"), tmp_path / "x.tif"), RGB)


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.bmp", "x.tif"])
def test_palette_colours_come_back(tmp_path, name):
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decoded(palette, tmp_path / name), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_alpha_is_laid_over_white(tmp_path, name):
    rgba = np.array([[(200, 0, 0, 0), (200, 0, 0, 51), (200, 0, 0, 255)]], dtype=np.uint8)
    exact = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    pixels = decoded(Image.fromarray(rgba), tmp_path / name, **exact)
    assert pixels.tolist() == [[[255, 255, 255], [244, 204, 204], [200, 0, 0]]]


def test_greyscale_with_alpha_is_laid_over_white(tmp_path):
    image = Image.fromarray(np.array([[(100, 0), (100, 255)]], dtype=np.uint8), "LA")
    assert grey_levels(image, tmp_path / "x.png").tolist() == [[255, 100]]


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_transparent_palette_entry_is_white(tmp_path, name):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    assert decoded(image, tmp_path / name, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_half_transparent_palette_entries_are_laid_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    pixels = decoded(image, tmp_path / "x.png", transparency=bytes([255, 51]))
    assert pixels.tolist() == [[[10, 20, 30], [244, 204, 204]]]


@pytest.mark.parametrize(
    "image, transparency, expected",
    [
        pytest.param(
            Image.fromarray(np.array([[(9, 8, 7), (1, 2, 3)]], dtype=np.uint8)),
            (1, 2, 3),
            [[[9, 8, 7], [255, 255, 255]]],
            id="rgb",
        ),
        pytest.param(
            Image.fromarray(np.array([[9, 1]], dtype=np.uint8)), 1, [[[9] * 3, [255] * 3]], id="greyscale"
        ),
        pytest.param(
            Image.fromarray(np.array([[257, 1]], dtype=np.uint16)),
            1,
            [[[1] * 3, [255] * 3]],
            id="sixteen-bit",
        ),
    ],
)
def test_colour_marked_transparent_is_white(tmp_path, image, transparency, expected):
    assert decoded(image, tmp_path / "x.png", transparency=transparency).tolist() == expected


@pytest.mark.parametrize(
    "bits, colour_type, row, marked, expected",
    [
        (2, 0, [0b00011011], [1], [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
        (4, 0, [0x05, 0xAF], [5], [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
        (16, 2, [9, 0, 8, 0, 7, 0, 4, 0, 5, 0, 6, 0], [4 << 8, 5 << 8, 6 << 8], [[9, 8, 7], [255] * 3]),
    ],
    ids=["two-bit", "four-bit", "sixteen-bit-rgb"],
)
def test_colour_marked_transparent_is_white_at_other_depths(
    tmp_path, bits, colour_type, row, marked, expected
):
    transparent = struct.pack(f">{len(marked)}H", *marked)
    content = png_of_one_row(len(expected), bits, colour_type, bytes(row), transparent)
    (tmp_path / "x.png").write_bytes(content)
    assert np.asarray(decode_image(tmp_path / "x.png")).tolist() == [expected]


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


# Row 0 and column 0 of the stored image, by the EXIF standard: 1 top left, 2 top right, 3 bottom right,
# 4 bottom left, 5 left top, 6 right top, 7 right bottom, 8 left bottom.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: x.T[:, ::-1],
    7: lambda x: x.T[::-1, ::-1],
    8: lambda x: x.T[::-1],
}


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, name, orientation):
    stored = np.repeat(np.repeat(np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint8), 16, 0), 16, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = decoded(Image.fromarray(stored).convert("RGB"), tmp_path / name, exif=exif)[..., 0]
    expected = UPRIGHT[orientation](stored)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 5  # JPEG and WebP lose a little


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpg"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0 not EXIF", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"], ids=["junk", "cut"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_image_as_stored(tmp_path, name, exif):
    assert decoded(Image.fromarray(RGB[:8]), tmp_path / name, exif=exif).shape == (8, 16, 3)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.gif", "x.webp", "x.bmp", "x.tif"])
def test_truncated_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DecodeError) as error:
        decode_image(path)
    assert error.value.path == path
    assert str(error.value) == f"{path}: {error.value.reason}"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"this is text", "not an image"),
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "truncated|not an image"),
    ],
    ids=["text", "empty", "signature-only"],
)
def test_file_that_is_no_image_is_refused(tmp_path, content, reason):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DecodeError, match=f"x.jpg: .*({reason})"):
        decode_image(tmp_path / "x.jpg")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DecodeError, match=r"x\.jpg: No such file"):
        decode_image(tmp_path / "x.jpg")


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise(20, 20).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="400 pixels. exceeds limit of 200 pixels; wanted a smaller copy"):
        decode_image(tmp_path / "x.png")


SQUASH = Preprocessing((4, 5))


def test_image_near_the_limit_of_pixels_is_named(tmp_path, monkeypatch):
    noise(10, 12).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning) as warned:
        decode_image(tmp_path / "large.png")
    _, ours = (str(each.message) for each in warned)  # the first is Pillow's
    assert "large.png: all its 12×10 pixels are decoded" in ours


def with_broken_files(root: Path, *names: str) -> Splits:
    for name in names:
        (root / name).write_bytes(b"broken")
    return open_splits(root)


@pytest.mark.parametrize("read", ["file", "shard", "mask"])
def test_no_other_program_is_run_to_decode_what_is_named_like_an_image(read, tmp_path, monkeypatch):
    path, ran = tmp_path / "x.jpg", []
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: ran.append(1))
    with pytest.raises(DecodeError):
        if read == "mask":
            read_mask(path, 2, no_zero=False)
        decode_image(path if read == "file" else TarImage(path, 0, path.stat().st_size, "x.jpg"))
    assert not ran


def check(images: ImageList, **options) -> CheckedImages:
    return check_images(images, **{"workers": 2, "preprocessing": SQUASH, "keep_bytes": 1 << 20, **options})


FOLDERS = {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_broken_images_are_named_and_left_out(write_images, workers):
    root = write_images(FOLDERS)
    images = with_broken_files(root, "train/a/001.png", "train/b/000.png").train
    checked = check_images(images, workers=workers)
    assert [s.path for s in checked.skipped] == [root / "train/a/001.png", root / "train/b/000.png"]
    assert checked.skipped[0].reason == "not an image in a format that Pillow decodes"
    assert checked.images == images.select([0, 2, 4, 5])
    assert checked.resident is None


def test_class_that_loses_all_its_images_is_an_error(write_images):
    root = write_images(FOLDERS)
    images = with_broken_files(root, *[f"train/b/{i:03d}.png" for i in range(3)]).train
    with pytest.raises(
        DataError, match=r"no image of b can be decoded; the first: .*b/000\.png: not an image"
    ):
        check_images(images)


def test_kept_pixels_are_those_of_the_images_left(write_images):
    images = with_broken_files(write_images(FOLDERS), "train/a/001.png").train
    checked = check(images)
    expected = torch.stack([SQUASH.resize_image(decode_image(path)) for path in checked.images.items])
    assert torch.equal(checked.resident.pixels, expected)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_pixels_are_kept_up_to_keep_bytes_and_no_further(write_images, augment):
    images = open_splits(write_images(FOLDERS)).train
    preprocessing = Preprocessing((4, 5), resize="shortest", augment=augment)
    num_bytes = check(images, preprocessing=preprocessing).resident.num_bytes
    assert check(images, preprocessing=preprocessing, keep_bytes=num_bytes).resident is not None
    assert check(images, preprocessing=preprocessing, keep_bytes=num_bytes - 1).resident is None


def test_image_too_thin_to_keep_its_shape_is_skipped(write_images):
    root = write_images(FOLDERS)
    noise(1, 50_000).save(root / "train/a/000.png")
    preprocessing = Preprocessing((224, 224), resize="shortest")
    checked = check(open_splits(root).train, preprocessing=preprocessing)
    assert [s.reason for s in checked.skipped] == [
        "50000×1 is too thin to keep its shape: it would be resized to 12800000×256 pixels"
    ]


def test_progress_counts_every_image(write_images):
    calls = []
    images = with_broken_files(write_images(FOLDERS), "train/a/001.png").train
    check_images(images, workers=2, progress=calls.append)
    assert calls == [1] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_interruption_ends_the_check_at_once(write_images, workers):
    images = open_splits(write_images({"a": 40, "b": 40})).train
    done, before = [], set(threading.enumerate())

    def interrupt(count: int) -> None:
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        check_images(images, workers=workers, progress=interrupt)
    assert len(done) == 3
    assert raised.tb and set(threading.enumerate()) <= before


def test_negative_workers_are_refused(write_images):
    with pytest.raises(ValueError, match="workers: -1"):
        check_images(open_splits(write_images(FOLDERS)).train, workers=-1)


def test_file_that_may_not_be_read_is_skipped_with_the_systems_reason(write_images, monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    images = open_splits(write_images(FOLDERS)).train
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"000\.png: Permission denied$"):
        check_images(images)
