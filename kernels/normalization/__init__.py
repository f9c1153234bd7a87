"""LayerNorm and RMSNorm without affine part (it is folded into the frozen weights that follow)."""
