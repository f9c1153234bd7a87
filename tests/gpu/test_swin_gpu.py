"""Whole Swins on a CUDA device: within what plain low precision makes of float64's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import relative_error
from low_precision import (
    CLASSES,
    SWIN,
    assert_no_worse_than_concatenation,
    gradients,
    prompted_swin,
    swins,
)
from tiny import random_batch, tiny_swin
from torch import nn

from vpt_fast.engine.policy import POLICIES

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": dict(prompt_type="shallow"),
    "prompt_pool": dict(pool="prompts"),
}


def swin(seed: int = 0) -> nn.Module:
    return tiny_swin(torch.float32, seed, **SWIN).cuda()


def test_auto_is_the_kernels() -> None:
    block, device = prompted_swin(swin()).backbone.blocks[0], torch.device("cuda", 0)
    for dtype in (torch.bfloat16, torch.float32):
        assert block.backend.ops(device, dtype, block.spec.head_dim, in_windows=True).name == "triton"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_float32_equals_concatenation(settings: dict[str, Any]) -> None:
    model = prompted_swin(swin(), backend="triton", **settings)
    plain = ConcatenatedSwin(swin().double(), CLASSES, 50, **settings).cuda().double()
    plain.load_trainables(model.trainable_state_dict())
    images = random_batch(model, 3, CLASSES, torch.float32)[0].cuda()
    actual, expected = gradients(model, images), gradients(plain, images.double())
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 5e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_low_precision_error_is_at_most_that_of_concatenation(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_no_worse_than_concatenation(swins, 8, device="cuda", dtype=dtype, **settings)


@pytest.mark.parametrize("memory", POLICIES)
def test_same_bits_when_run_again(memory: str) -> None:
    model = prompted_swin(swin(), dtype=torch.bfloat16, memory=memory, prompt_type="shallow")
    images = random_batch(model, 8, CLASSES, torch.float32)[0].cuda()
    first, second = gradients(model, images), gradients(model, images)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_model_gives_the_same_gradients() -> None:
    model = prompted_swin(swin(), dtype=torch.bfloat16)
    images = random_batch(model, 2, CLASSES, torch.float32)[0].cuda()
    eager = gradients(model, images)
    compiled = gradients(torch.compile(model, fullgraph=True), images)
    for name, gradient in eager.items():
        assert relative_error(compiled[f"_orig_mod.{name}"], gradient) < 2e-2, name
