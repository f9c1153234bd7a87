"""Backbones: converting a timm model into frozen blocks, loading weights, and the small packaged backbone."""
