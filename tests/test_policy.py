"""Which memory policy "auto" comes to."""

from __future__ import annotations

import pytest
import torch
from tiny import random_batch, tiny_vit
from vpt_fast.kernels import Backend

from vpt_fast import LinearProbe, PromptedViT, classifier
from vpt_fast.engine.policy import choose_policy

BYTES = {"exact": 100, "compact": 60, "recompute_mlp": 70, "recompute": 20}


@pytest.mark.parametrize(
    ("dtype", "free", "chosen"),
    [
        (torch.bfloat16, 112, "exact"),
        (torch.bfloat16, 111, "compact"),
        (torch.bfloat16, 66, "recompute"),
        (torch.float32, 111, "recompute_mlp"),  # 8-bit codes would be its largest error by far
        (torch.float32, 77, "recompute"),
        (torch.bfloat16, 1, "recompute"),
        (torch.bfloat16, None, "exact"),
    ],
)
def test_fastest_that_fits_nine_tenths_of_the_free_memory(dtype, free, chosen) -> None:
    assert choose_policy(BYTES.__getitem__, dtype, free) == chosen


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> PromptedViT:
    """A model whose device has memory for a batch of 2 under "recompute" and of 1 under "exact"."""
    model = PromptedViT(tiny_vit(dtype=torch.float32), 5, 7, memory="auto")
    model.memory = "recompute_mlp"
    step = model.estimate_training_bytes(2)
    model.memory = "auto"
    looks = []

    def free(device: torch.device) -> int:
        looks.append(device)
        return int((step["kept"] + step["workspace"]) / 0.9) - 100

    monkeypatch.setattr(classifier, "free_bytes", free)
    model.looks = looks
    return model


def test_auto_depends_on_the_batch_size(auto: PromptedViT) -> None:
    assert [auto.memory_policy(1), auto.memory_policy(2)] == ["exact", "recompute"]


def test_auto_depends_on_the_number_of_tokens(auto: PromptedViT) -> None:
    own = auto.backbone.num_tokens
    assert [auto.memory_policy(1, n) for n in (own, 4 * own)] == ["exact", "recompute"]


def test_auto_looks_once_for_each_batch_size(auto: PromptedViT) -> None:
    for batch_size in (1, 2, 1, 2):
        auto(random_batch(auto, batch_size, dtype=torch.float32)[0])
    assert len(auto.looks) == 2


def test_auto_chooses_again_on_another_device(auto: PromptedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "free_bytes", lambda device: 10**12 if device.type == "cpu" else 1)
    before = auto.memory_policy(1)
    assert [before, auto.to("meta").memory_policy(1)] == ["exact", "recompute"]


def test_auto_does_not_look_where_nothing_is_kept(auto: PromptedViT) -> None:
    with torch.no_grad():
        auto(random_batch(auto, 1, dtype=torch.float32)[0])
    assert auto.looks == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_policy_and_estimate_are_those_of_training_in_every_mode(auto: PromptedViT, mode) -> None:
    in_training = auto.memory_policy(2), auto.estimate_training_bytes(2)
    with mode():
        assert (auto.memory_policy(2), auto.estimate_training_bytes(2)) == in_training
    assert in_training[0] == "recompute"


def test_policy_may_be_changed_on_a_model(auto: PromptedViT) -> None:
    auto.memory = "compact"
    assert auto.memory_policy(1) == "compact"


def test_auto_chooses_in_the_first_compiled_step_of_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    auto = PromptedViT(tiny_vit(torch.float32, depth=1), 5, 3, memory="auto").train()
    compiled = torch.compile(auto, backend="eager", fullgraph=True, dynamic=True)
    small, large = (random_batch(auto, size, dtype=torch.float32)[0] for size in (6, 7))
    chosen = []
    for images, free, policy in ((small, None, "exact"), (large, 1, "recompute"), (small, 1, "exact")):
        monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device, free=free: free)
        logits = compiled(images)
        chosen.append((auto.memory_policy(len(images)), policy))
        torch.testing.assert_close(logits, auto(images))
    assert all(ours == wanted for ours, wanted in chosen), chosen


def test_inference_forms_no_codes(auto: PromptedViT) -> None:
    auto.memory = "compact"
    packed = []
    for block in auto.backbone.blocks:
        plain = block.backend.other

        def activate_(u, kind, *, pack=False, plain=plain):
            packed.append(pack)
            return plain.activate_(u, kind, pack=pack)

        block.backend = Backend(*[plain._replace(activate_=activate_)] * 2)
    images = random_batch(auto, 1, dtype=torch.float32)[0]
    with torch.no_grad():
        auto(images)
    assert packed == [False] * 3
    auto(images)
    assert packed[3:] == [True] * 3


@pytest.mark.parametrize("batch_size", [-1, 0, 1.5, True, "2"])
def test_batch_size_that_is_no_count_is_refused_by_name(auto: PromptedViT, batch_size) -> None:
    probe = LinearProbe(tiny_vit(), 5)
    for ask in (auto.estimate_training_bytes, auto.memory_policy, probe.estimate_training_bytes):
        with pytest.raises(ValueError, match=f"batch_size: got {batch_size!r}, want a whole number from 1"):
            ask(batch_size)


def test_number_of_tokens_that_is_no_count_is_refused_by_name(auto: PromptedViT) -> None:
    with pytest.raises(ValueError, match="num_tokens: got 0, want a whole number from 1"):
        auto.memory_policy(1, 0)


def test_auto_takes_a_batch_without_images(auto: PromptedViT) -> None:
    assert auto(random_batch(auto, 0, dtype=torch.float32)[0]).shape == (0, 5)
