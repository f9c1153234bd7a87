"""Whole Swins on a CUDA device: within what plain low precision makes of float64's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import relative_error
from test_model_gpu import gradients
from tiny import random_batch, randomise, tiny_swin
from torch import nn

from vpt_fast import PromptedSwin
from vpt_fast.engine.policy import POLICIES

pytestmark = pytest.mark.gpu

CLASSES = 5
# Heads of 32 in two stages: shifted windows of 7x7, and then one.
SIZE: dict[str, Any] = dict(img_size=56, embed_dim=64, num_heads=(2, 4), window_size=7)
SETTINGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": dict(prompt_type="shallow"),
    "prompt_pool": dict(pool="prompts"),
}


def swin(seed: int = 0) -> nn.Module:
    return tiny_swin(torch.float32, seed, **SIZE).cuda()


def prompted(backbone: nn.Module, seed: int = 3, **settings: Any) -> PromptedSwin:
    """With random prompts and head."""
    model = PromptedSwin(backbone, CLASSES, 50, **settings)
    with torch.no_grad():
        randomise(nn.ModuleList([model.prompts, model.head]), seed)
    return model


def test_auto_is_the_kernels() -> None:
    block, device = prompted(swin()).backbone.blocks[0], torch.device("cuda", 0)
    for dtype in (torch.bfloat16, torch.float32):
        assert block.backend.ops(device, dtype, block.spec.head_dim, in_windows=True).name == "triton"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_float32_equals_concatenation(settings: dict[str, Any]) -> None:
    model = prompted(swin(), backend="triton", **settings)
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
    """Root mean square over seeds of each gradient's error from float64, within 1.25 times eager's."""
    squares: dict[str, list[float]] = {}
    for seed in range(8):
        backbone = swin(seed)
        exact = prompted(backbone, seed, backend="torch", **settings)
        state = {name: t.clone() for name, t in exact.trainable_state_dict().items()}
        images = random_batch(exact, 4, CLASSES, torch.float32, seed=seed)[0].cuda()
        expected = gradients(exact.double(), images.double())
        fast = PromptedSwin(backbone, CLASSES, 50, dtype=dtype, backend="triton", **settings)
        fast.load_trainable_state_dict(state)
        plain = ConcatenatedSwin(backbone.to(dtype), CLASSES, 50, **settings).to(images.device, dtype)
        plain.load_trainables(state)
        for which, (model, batch) in enumerate(((fast, images), (plain, images.to(dtype)))):
            actual = gradients(model, batch)
            for name, gradient in expected.items():
                squares.setdefault(name, [0.0, 0.0])[which] += relative_error(actual[name], gradient) ** 2
    for name, (ours, theirs) in squares.items():
        # the head's bias is the sum of what the logits are given: exact in both
        assert ours**0.5 <= 1.25 * theirs**0.5, f"{name}: {ours**0.5:.2e}, concatenation {theirs**0.5:.2e}"


@pytest.mark.parametrize("memory", POLICIES)
def test_same_bits_when_run_again(memory: str) -> None:
    model = prompted(swin(), dtype=torch.bfloat16, memory=memory, prompt_type="shallow")
    images = random_batch(model, 8, CLASSES, torch.float32)[0].cuda()
    first, second = gradients(model, images), gradients(model, images)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiled_model_gives_the_same_gradients() -> None:
    model = prompted(swin(), dtype=torch.bfloat16)
    images = random_batch(model, 2, CLASSES, torch.float32)[0].cuda()
    eager = gradients(model, images)
    compiled = gradients(torch.compile(model, fullgraph=True), images)
    for name, gradient in eager.items():
        assert relative_error(compiled[f"_orig_mod.{name}"], gradient) < 2e-2, name
