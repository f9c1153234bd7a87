"""scripts/small_tasks.py: what it draws is what the labels say, and no image is in two splits."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import small_tasks  # noqa: E402


def drawn(name: str, split: str = "train", count: int = 40) -> list[tuple[np.ndarray, int]]:
    images = small_tasks.drawn_images(name, split, seed=0)
    return [(np.asarray(image)[..., 0] / 255, label) for image, label in itertools.islice(images, count)]


def test_position_is_that_of_the_shape_s_middle() -> None:
    for pixels, label in drawn("shape_position"):
        middle = (ndimage.center_of_mass(pixels)[1] + 0.5) / small_tasks.SIZE
        assert abs((middle - 0.15) / 0.7 * small_tasks.NUM_POSITIONS - (label + 0.5)) < 1


def test_turn_is_where_the_shape_points(monkeypatch: pytest.MonkeyPatch) -> None:
    needle = np.array([(1.0, 0.0), (-0.5, 0.3), (-0.5, -0.3)])
    monkeypatch.setattr(small_tasks, "SHAPES", (lambda: needle,))
    for pixels, label in drawn("shape_turn"):
        points = np.argwhere(pixels > 0.5)[:, ::-1]  # x, y
        middle = points.mean(0)
        tip = points[np.argmax(np.linalg.norm(points - middle, axis=1))] - middle
        turns = np.arctan2(tip[1], tip[0]) / (2 * np.pi) * small_tasks.NUM_TURNS
        away = (turns - (label + 0.5) + small_tasks.NUM_TURNS / 2) % small_tasks.NUM_TURNS
        assert abs(away - small_tasks.NUM_TURNS / 2) < 1.2


def test_count_is_that_of_separate_shapes() -> None:
    for pixels, label in drawn("shape_count"):
        assert ndimage.label(pixels > 0, structure=np.ones((3, 3)))[1] == label + 1


@pytest.mark.parametrize("name", small_tasks.DRAWN)
def test_classes_are_even_and_splits_have_no_image_in_common(name: str) -> None:
    splits = {split: drawn(name, split) for split in small_tasks.SPLITS}
    for images in splits.values():
        counts = Counter(label for _, label in images).values()
        assert max(counts) - min(counts) <= 1
    everything = [pixels.tobytes() for images in splits.values() for pixels, _ in images]
    assert len(set(everything)) == len(everything)


def test_every_photograph_is_in_one_split_under_one_turn() -> None:
    total = sum(small_tasks.SPLITS.values())
    photographs = np.zeros((total, 4, 4, 3), dtype=np.uint8)
    photographs[:, 0, 0, 0], photographs[:, 0, 0, 1] = np.arange(total) // 100, np.arange(total) % 100
    photographs[:, 0, 0, 2] = 255  # marks the corner that is the upper left one
    corners = {0: (0, 0), 1: (3, 0), 2: (3, 3), 3: (0, 3)}
    seen = []
    for images in small_tasks.turned_photographs(photographs, seed=0).values():
        for image, label in images:
            pixel = np.asarray(image)[corners[label]]
            assert pixel[2] == 255
            seen.append(int(pixel[0]) * 100 + int(pixel[1]))
    assert sorted(seen) == list(range(total))
