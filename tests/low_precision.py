"""Whole models in 16 bits: errors of gradients, from float64, against those of concatenation in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import ConcatenatedViT, relative_error
from tiny import random_batch, randomise, tiny_swin, tiny_vit
from torch import nn

from vpt_fast import PromptedSwin, PromptedViT

CLASSES = 5

Case = tuple[nn.Module, torch.Tensor]  # a model, and images for it


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name, of a random weighting of the logits: a saturated softmax would multiply one image's error
    by any factor, of one implementation or the other."""
    model.zero_grad()
    logits = model(images)
    generator = torch.Generator().manual_seed(0)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_no_worse_than_concatenation(
    build: Callable[..., Sequence[Case]], num_seeds: int, **arguments: Any
) -> None:
    """Root mean square over seeds of each gradient's error from float64, within 1.25 times eager's.

    Args:
        build: makes of a seed and the arguments the model in float64, the one under test and the plain one.
    """
    squares: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        expected, *found = (gradients(*case) for case in build(seed, **arguments))
        for which, actual in enumerate(found):
            for name, gradient in expected.items():
                squares.setdefault(name, [0.0, 0.0])[which] += relative_error(actual[name], gradient) ** 2
    for name, (ours, theirs) in squares.items():
        # the head's bias is the sum of what the logits are given: exact in both
        assert ours**0.5 <= 1.25 * theirs**0.5, f"{name}: {ours**0.5:.2e}, concatenation {theirs**0.5:.2e}"


def vits(
    seed: int, *, device: str, dtype: torch.dtype, backend: str, batch_size: int = 4, **settings: Any
) -> list[Case]:
    torch.manual_seed(seed)  # of the prompts
    vit = tiny_vit(torch.float32, seed, embed_dim=128, num_heads=2, img_size=64).to(device)
    exact = PromptedViT(vit, CLASSES, backend="torch", **settings)
    state = {name: t.clone() for name, t in exact.trainable_state_dict().items()}
    images = random_batch(exact, batch_size, CLASSES, torch.float32, seed=seed)[0].to(device)
    fast = PromptedViT(vit, CLASSES, dtype=dtype, backend=backend, **settings)
    fast.load_trainable_state_dict(state)
    plain = ConcatenatedViT(vit.to(dtype), CLASSES, **settings).load_trainables(state)
    return [(exact.double(), images.double()), (fast, images), (plain, images)]


# Heads of 32 in two stages: shifted windows of 7x7, and then one.
SWIN: dict[str, Any] = dict(img_size=56, embed_dim=64, num_heads=(2, 4), window_size=7)


def prompted_swin(backbone: nn.Module, seed: int = 3, **settings: Any) -> PromptedSwin:
    """With random prompts and head."""
    model = PromptedSwin(backbone, CLASSES, 50, **settings)
    with torch.no_grad():
        randomise(nn.ModuleList([model.prompts, model.head]), seed)
    return model


def swins(
    seed: int,
    *,
    device: str,
    dtype: torch.dtype,
    size: dict[str, Any] = SWIN,
    batch_size: int = 4,
    **settings: Any,
) -> list[Case]:
    backbone = tiny_swin(torch.float32, seed, **size).to(device)
    exact = prompted_swin(backbone, seed, backend="torch", **settings)
    state = {name: t.clone() for name, t in exact.trainable_state_dict().items()}
    images = random_batch(exact, batch_size, CLASSES, torch.float32, seed=seed)[0].to(device)
    fast = PromptedSwin(backbone, CLASSES, 50, dtype=dtype, backend="triton", **settings)
    fast.load_trainable_state_dict(state)
    plain = ConcatenatedSwin(backbone.to(dtype), CLASSES, 50, **settings).to(device, dtype)
    plain.load_trainables(state)
    return [(exact.double(), images.double()), (fast, images), (plain, images.to(dtype))]
