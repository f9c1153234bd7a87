"""Attention over image tokens and prompts that enter as keys and values only.

The prompts' keys and values are the same for every image of the batch unless dropout made them differ, so
they come with their own batch dimension of 1 or B and are never concatenated to the image's.
"""

HEAD_DIMS = {16: (16, 0), 32: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
"""Head dims that the Triton kernels support, each as the two power-of-two tiles that a row is read in."""

WINDOW_HEAD_DIMS = (32, 64)
"""Head dims that they support in windows; every published Swin has 32."""
