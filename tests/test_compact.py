"""memory="compact": queries, keys and values that are projected anew in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kept_bytes import KeptBytes
from test_eva import DINOV3, MIXED, QK_NORM
from tiny import random_batch, tiny_eva, tiny_swin, tiny_vit
from torch.nn import functional as F
from vpt_fast.kernels import Backend

from vpt_fast import PromptedSwin, PromptedViT

CLASSES, M, BATCH = 5, 3, 2
DROPOUT = dict(prompt_dropout=0.4)


def vit(backbone: dict[str, Any] | None = None, **settings: Any) -> PromptedViT:
    return PromptedViT(tiny_vit(torch.float32, **(backbone or {})), CLASSES, M, **settings)


def eva(backbone: dict[str, Any], **settings: Any) -> PromptedViT:
    return PromptedViT(tiny_eva(torch.float32, **backbone), CLASSES, M, **settings)


def padded_swin(**settings: Any) -> PromptedSwin:
    return PromptedSwin(tiny_swin(torch.float32, window_size=3), CLASSES, M, **settings)


MODELS: dict[str, Callable[..., Any]] = {
    "deep": vit,
    "deep, prompts of each image": lambda **of: vit(**DROPOUT, **of),
    "first two blocks, whose prompts flow on": lambda **of: vit(prompt_layers=2, **of),
    "shallow": lambda **of: vit(prompt_type="shallow", **of),
    "prompts pooled": lambda **of: vit(pool="prompts", **of),
    "query-key norm, prompts of each image": lambda **of: vit(dict(qk_norm=True), **DROPOUT, **of),
    "a norm on attention's output": lambda **of: vit(dict(scale_attn_norm=True), **of),
    "rotary": lambda **of: eva(DINOV3, **of),
    "rotary of each head": lambda **of: eva(MIXED, **of),
    "rotary behind a query-key norm": lambda **of: eva(QK_NORM, **DROPOUT, **of),
    "padded windows": padded_swin,
    "padded windows, prompts of each image": lambda **of: padded_swin(**DROPOUT, **of),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param](memory="compact").train()


def test_attention_is_given_the_same_bits_in_backward_as_in_forward(model: Any) -> None:
    blocks = [module for module in model.modules() if hasattr(module, "qkv_weight")]
    given: dict[str, list[Any]] = {"forward": [], "backward": []}
    for i, block in enumerate(blocks):
        plain = block.backend.other

        def spy(direction: str, name: str, first: int, plain: Any = plain, i: int = i) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                operands = [None if x is None else x.detach().clone() for x in args[first : first + 5]]
                given[direction].append((i, operands))
                return getattr(plain, name)(*args, **kwargs)

            return call

        ops = plain._replace(
            **{
                f"{kind}attention{suffix}": spy(direction, f"{kind}attention{suffix}", first)
                for kind in ("", "window_")
                for direction, suffix, first in (("forward", "", 0), ("backward", "_backward", 1))
            }
        )
        block.backend = Backend(ops, ops)
    images, labels = random_batch(model, BATCH, CLASSES, torch.float32)
    F.cross_entropy(model(images), labels).backward()

    forward = dict(given["forward"])
    with_keys = [(i, operands) for i, operands in given["backward"] if operands[1] is not None]
    assert len(forward) == len(blocks) and with_keys
    for i, operands in with_keys:
        for before, after in zip(forward[i], operands, strict=True):
            if before is None or before.shape != after.shape:  # queries of some rows alone
                continue
            assert torch.equal(before, after)


def test_bytes_kept_are_those_estimated(model: Any) -> None:
    images, _ = random_batch(model, BATCH, CLASSES, torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == model.estimate_training_bytes(BATCH)["kept"]
