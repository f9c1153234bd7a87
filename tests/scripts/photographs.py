"""Archives of photographs that tests write."""

from __future__ import annotations

import tarfile
from pathlib import Path

from PIL import Image


def archive_of(path: Path, *pictures: tuple[int, int]) -> Path:
    """A tar archive of one class with black JPEG files of these (width, height)."""
    with tarfile.open(path, "w:gz") as tar:
        for index, size in enumerate(pictures):
            file = path.with_suffix(".jpg")
            Image.new("RGB", size).save(file)
            tar.add(file, f"cat/{index}.jpg")
    return path
