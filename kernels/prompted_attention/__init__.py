"""Attention over image tokens and prompts that enter as keys and values only.

The prompts' keys and values are the same for every image of the batch unless dropout made them differ, so
they come with their own batch dimension of 1 or B and are never concatenated to the image's.
"""

HEAD_DIMS = (16, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
"""Head dims that the Triton kernels support: those of timm's ViTs, but for the 76 of one, whose rows do not
start at multiples of 16 bytes in 16 bits."""

WINDOW_HEAD_DIMS = (32, 64)
"""Head dims that they support in windows; every published Swin has 32."""
