"""Backbones: reading a timm model into frozen blocks, and the small one that the package carries."""
