"""Images that tests write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """RGB noise: no two pixels that could be taken for each other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_of_one_row(width: int, bits: int, colour_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of a depth that Pillow does not write; `transparent` is the content of its tRNS chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))]
    chunks += [chunk(b"tRNS", transparent)] if transparent else []
    chunks += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
