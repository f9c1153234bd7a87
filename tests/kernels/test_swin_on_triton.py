"""Whole Swins on the Triton kernels, in the interpreter, against concatenation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import image_by_image, relative_error
from low_precision import assert_no_worse_than_concatenation, swins
from test_model_on_triton import gradients
from tiny import random_batch, randomise, tiny_swin
from torch import nn

from vpt_fast import PromptedSwin

pytestmark = pytest.mark.usefixtures("nan_empty")

CLASSES = 5
# Heads of 32 in two stages: windows of 3x3 that reach past 5x5 tokens, as they are and shifted; then one.
SMALL: dict[str, Any] = dict(img_size=20, embed_dim=32, num_heads=(1, 2), window_size=3, depths=(2, 1))
SETTINGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": dict(prompt_type="shallow"),
    "image_pool": dict(pool="image"),
    "prompt_pool": dict(pool="prompts"),
}


def models(memory: str = "exact", **settings: Any) -> tuple[PromptedSwin, ConcatenatedSwin]:
    """On the kernels in float32, and concatenated in float64, with the same random trainable tensors."""
    swin = tiny_swin(torch.float32, **SMALL)
    model = PromptedSwin(swin, CLASSES, 7, backend="triton", memory=memory, **settings).train()
    with torch.no_grad():
        randomise(nn.ModuleList([model.prompts, model.head]), seed=3)
    plain = ConcatenatedSwin(swin.double(), CLASSES, 7, **settings).double()
    return model, plain.load_trainables(model.trainable_state_dict())


def errors(memory: str = "exact", **settings: Any) -> dict[str, float]:
    """Relative errors of logits and gradients, by name."""
    model, plain = models(memory, **settings)
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    actual, expected = gradients(model, images), gradients(plain, images.double())
    return {name: relative_error(actual[name], exact) for name, exact in expected.items()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_concatenation(settings: dict[str, Any]) -> None:
    assert max(errors(**settings).values()) < 2e-5


@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
def test_prompts_that_are_each_image_s_own_equal_concatenation(prompt_type: str) -> None:
    model, plain = models(prompt_type=prompt_type)
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    generator = torch.Generator().manual_seed(2)
    ours = [torch.randn(2, *own.shape, generator=generator).requires_grad_() for own in model.prompts]
    theirs = [given.detach().double().requires_grad_() for given in ours]
    actual, expected = model(images, ours), image_by_image(plain, images.double(), theirs)
    assert relative_error(actual, expected) < 2e-5
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    actual.backward(weights.float())
    expected.backward(weights)
    for given, exact in zip(ours, theirs, strict=True):
        assert relative_error(given.grad, exact.grad) < 2e-5


def test_compact_gradients_carry_the_codes_rounding_alone() -> None:
    found = errors("compact")
    assert found.pop("logits") < 2e-5  # forward is exact
    assert max(found.values()) < 5e-2


def test_dropout_per_image_equals_concatenation() -> None:
    pair = models(prompt_type="shallow", prompt_dropout=0.5)
    images = random_batch(pair[0], 2, CLASSES, torch.float32)[0]
    found = []
    for model, batch in zip(pair, (images, images.double()), strict=True):
        torch.manual_seed(0)  # both draw the same mask
        found.append(gradients(model.train(), batch))
    for name, expected in found[1].items():
        assert relative_error(found[0][name], expected) < 2e-5, name


@pytest.mark.parametrize("name", ["deep", "shallow"])
def test_error_in_bfloat16_is_at_most_that_of_concatenation(name: str) -> None:
    case = dict(device="cpu", dtype=torch.bfloat16, size=SMALL, batch_size=2, **SETTINGS[name])
    assert_no_worse_than_concatenation(swins, 2, **case)


def test_compiles_without_a_graph_break() -> None:
    model, _ = models(pool="image_and_prompts")
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    eager = gradients(model, images)
    model.zero_grad()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    for name, expected in eager.items():
        actual = compiled[name if name == "logits" else f"_orig_mod.{name}"]
        assert relative_error(actual, expected) < 1e-5, name


def test_estimate_counts_no_scores_of_windows() -> None:
    swin = tiny_swin(torch.float32, **SMALL)
    plain, kernels = (
        PromptedSwin(swin, CLASSES, 7, backend=backend).estimate_training_bytes(2)
        for backend in ("torch", "triton")
    )
    assert kernels["kept"] == plain["kept"] and kernels["workspace"] < plain["workspace"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_head_dim_that_kernels_do_not_take_in_windows_is_refused(device: str) -> None:
    swin = tiny_swin(torch.float32).to(device)
    wanted = "backend='triton': got a backbone with head dim 8 in windows, want one of 32, 64; 'auto' and"
    with pytest.raises(ValueError, match=wanted):
        PromptedSwin(swin, CLASSES, 3, backend="triton")
