"""Attention over image tokens and prompts that enter as keys and values only.

The prompts' keys and values are the same for every image of the batch unless dropout made them differ, so
they come with their own batch dimension of 1 or B and are never concatenated to the image's.
"""
