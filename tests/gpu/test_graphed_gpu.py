"""A training step as a CUDA graph: the same bits as without one."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from tiny import random_batch, tiny_vit
from torch import nn
from torch.nn.functional import cross_entropy

from vpt_fast import PromptedViT
from vpt_fast.free_memory import free_bytes
from vpt_fast.graphed import WARM_UP, GraphedStep
from vpt_fast.tuning.full import FullTuning

pytestmark = pytest.mark.gpu

CLASSES = 5
RATES = (0.1, 0.1, 0.05, 0.2, 0.0, 0.3, 0.1, 0.2)  # five of them past the warm-up
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9, weight_decay=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0, capturable=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.0, capturable=True, fused=True),
}


def make_model(**settings: float) -> PromptedViT:
    torch.manual_seed(0)
    return PromptedViT(tiny_vit(dtype=torch.float32), CLASSES, 7, **settings).cuda().train()


def trained(model: PromptedViT) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def batches(model: PromptedViT, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [random_batch(model, 4, CLASSES, torch.float32, seed=seed) for seed in range(number)]


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_graph_equals_eager_at_changing_rates(make_optimizer, autocast_dtype: torch.dtype | None) -> None:
    plain, model = make_model(), make_model()
    eager, optimizer = make_optimizer(trained(plain)), make_optimizer(trained(model))
    step = GraphedStep(model, optimizer, cross_entropy, autocast_dtype=autocast_dtype, max_grad_norm=1.0)
    for lr, (images, labels) in zip(RATES, batches(plain, len(RATES)), strict=True):
        eager.param_groups[0]["lr"] = torch.tensor(lr, device="cuda")
        eager.zero_grad()
        with torch.autocast("cuda", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = plain(images.cuda()).float()
        expected = cross_entropy(logits, labels.cuda())
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained(plain), 1.0)
        eager.step()
        optimizer.param_groups[0]["lr"] = lr
        actual = step(images, labels)
        assert torch.equal(actual, expected.detach())
        assert torch.equal(step.logits, logits.detach())
    for ours, theirs in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_every_step_updates_the_statistics_of_a_trained_batch_norm() -> None:
    torch.manual_seed(0)
    model = FullTuning("resnet10t", CLASSES, img_size=64).cuda()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.0, fused=True)  # so that all steps see the same weights
    step = GraphedStep(model, optimizer, cross_entropy)
    for images, labels in batches(model, WARM_UP + 3):
        step(images, labels)
        plain(images.cuda())
    found, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert any(name.endswith("num_batches_tracked") for name in found)
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_masks_of_prompt_dropout_differ_between_replays() -> None:
    model = make_model(prompt_dropout=0.5)
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)  # the rate is 0
    images, labels = batches(model, 1)[0]
    losses = [step(images, labels).item() for _ in range(WARM_UP + 4)]
    assert len(set(losses)) == len(losses)


def test_step_with_a_border_of_prompts_is_captured() -> None:
    torch.manual_seed(0)
    vit = tiny_vit(dtype=torch.float32, img_size=48)
    settings = dict(prompt_type="shallow", prompt_location="pad")
    model = PromptedViT(vit, CLASSES, 8, **settings).cuda().train()
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)
    images, labels = batches(model, 1)[0]
    losses = [step(images, labels).item() for _ in range(WARM_UP + 2)]
    assert len(set(losses)) == 1  # the rate is 0


class PooledPrompts(nn.Module):
    """Each image's prompts are a mixture of a pool's, weighted by what the image looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = make_model()
        self.vit.prompts.requires_grad_(False)
        self.pool = nn.Parameter(torch.randn(4, *self.vit.prompts.shape, device="cuda"))
        self.key = nn.Linear(3, 4, device="cuda")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weights = self.key(images.mean(dim=(2, 3))).softmax(dim=1)
        return self.vit(images, prompts=torch.einsum("bp,psmd->bsmd", weights, self.pool))


def test_step_whose_prompts_are_computed_from_the_images_is_captured() -> None:
    model = PooledPrompts()
    plain = copy.deepcopy(model)
    eager, optimizer = (
        OPTIMIZERS["sgd"]([p for p in m.parameters() if p.requires_grad]) for m in (plain, model)
    )
    step = GraphedStep(model, optimizer, cross_entropy)
    for images, labels in batches(model.vit, WARM_UP + 3):
        eager.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
        optimizer.param_groups[0]["lr"] = 0.1
        eager.zero_grad()
        expected = cross_entropy(plain(images.cuda()), labels.cuda())
        expected.backward()
        eager.step()
        assert torch.equal(step(images, labels), expected.detach())


class Tasks(nn.Module):
    """Each image has the keys and values of its task."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = make_model(prompt_location="key-value")
        self.vit.prompts.requires_grad_(False)
        self.prompts = nn.Parameter(torch.randn(4, *self.vit.prompts.shape, device="cuda"))

    def forward(self, images: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        return self.vit(images, prompts=self.prompts[task])


def test_step_is_replayed_with_the_tasks_of_each_batch() -> None:
    model = Tasks()
    plain = copy.deepcopy(model)
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)  # the rate is 0
    for index, (images, labels) in enumerate(batches(model.vit, WARM_UP + 3)):
        task = (torch.arange(len(images)) + index) % 4
        expected = cross_entropy(plain(images.cuda(), task.cuda()), labels.cuda())
        assert torch.equal(step(images, labels, task), expected.detach())


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "set_override_stale_capture_stream"), reason="a PyTorch that cannot"
)
def test_capture_passes_by_a_loss_that_is_still_alive() -> None:
    model = make_model()
    images, labels = batches(model, 1)[0]
    loss = cross_entropy(model(images.cuda()), labels.cuda())
    loss.backward()
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)
    for _ in range(WARM_UP + 2):
        assert torch.equal(step(images, labels), loss.detach())


def test_steps_one_after_the_other_take_no_more_memory_than_one() -> None:
    gc.collect()  # what tests before this one left, which would be let go in between
    model = make_model()
    held = []
    for _ in range(3):
        step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)
        for images, labels in batches(model, WARM_UP + 2):
            step(images, labels)
        del step
        model.zero_grad()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] <= held[0]


def test_memory_of_a_graph_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if this process were alone on the GPU: others test beside it, and take and give memory meanwhile.
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (total - torch.cuda.memory_reserved(device), total)
    )
    device, size = torch.device("cuda"), 2**28
    before = free_bytes(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.empty(size, dtype=torch.uint8, device=device)  # freed at once, but the graph's
    held = free_bytes(device)
    del graph
    assert before - held >= size
    assert free_bytes(device) - held >= size


def test_backward_runs_on_the_thread_that_called() -> None:
    model, seen = make_model(), []
    model.prompts.register_hook(lambda grad: seen.append(threading.get_ident()))
    GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)(*batches(model, 1)[0])
    assert seen == [threading.get_ident()]


def test_loss_that_is_not_finite_is_returned() -> None:
    model = make_model()
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)
    images, labels = batches(model, 1)[0]
    for _ in range(WARM_UP + 1):
        assert step(images, labels).isfinite()
    assert step(images * float("nan"), labels).isnan()


def test_evaluation_between_replays_changes_nothing() -> None:
    plain, model = make_model(), make_model()
    steps = [GraphedStep(m, OPTIMIZERS["sgd"](trained(m)), cross_entropy) for m in (plain, model)]
    for images, labels in batches(plain, WARM_UP + 3):
        for step in steps:
            step.optimizer.param_groups[0]["lr"] = 0.1
            step(images, labels)
        with torch.no_grad():
            model.eval()(torch.cat((images, images)).cuda())
        model.train()
    for ours, theirs in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_another_shape_is_refused() -> None:
    model = make_model()
    step = GraphedStep(model, OPTIMIZERS["sgd"](trained(model)), cross_entropy)
    images, labels = batches(model, 1)[0]
    for _ in range(WARM_UP + 1):
        step(images, labels)
    with pytest.raises(ValueError, match=r"images: got \(3, .*want the captured \(4, "):
        step(images[:3], labels[:3])
