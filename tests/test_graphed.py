"""The step that a CUDA graph captures, as far as it can be run without CUDA."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_on_cpu import CPUStream, capture_on_cpu
from torch import nn
from torch.nn.functional import cross_entropy

from vpt_fast import graphed
from vpt_fast.graphed import (
    WARM_UP,
    CaptureError,
    GraphedStep,
    LearningRates,
    _CaptureStream,
    form_gradients,
    require_capturable,
)
from vpt_fast.training.classification import CrossEntropy
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.step import TrainStep

RATES = (0.1, 0.1, 0.05, 0.2, 0.0, 0.3, 0.3)  # as a scheduler would assign them, past the warm-up


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))


def make_sgd(model: nn.Module, lr: float = 0.0) -> torch.optim.SGD:
    first, last = list(model.parameters())[:-1], list(model.parameters())[-1:]
    groups = [{"params": first, "weight_decay": 1e-2}, {"params": last, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, 2, 2, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(number)
    ]


def assign(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def eager(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The losses of as many steps as there are rates, written out."""
    losses = []
    for lr, (images, labels) in zip(RATES, batches(len(RATES)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr)
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.usefixtures("on_cpu")
def test_steps_are_those_of_an_eager_loop_at_changing_rates() -> None:
    model = make_model()
    plain = copy.deepcopy(model)
    expected = eager(plain, make_sgd(plain))
    optimizer = make_sgd(model)
    step = GraphedStep(model, optimizer, cross_entropy)
    actual = []
    for lr, batch in zip(RATES, batches(len(RATES)), strict=True):
        assign(optimizer, lr)
        actual.append(step(*batch))
    assert torch.equal(torch.stack(actual), torch.stack(expected))  # and none was overwritten by a later one
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert step._stream.captures == 1


def test_backward_runs_on_the_thread_that_called() -> None:
    model, seen = make_model(), []
    model[1].weight.register_hook(lambda grad: seen.append(torch._C._is_multithreading_enabled()))
    form_gradients(model, make_sgd(model), cross_entropy, *batches(1)[0])
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()


# The stream that steps are captured on.


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are empty objects."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(_CaptureStream, "_idle", defaultdict(list))


@pytest.mark.usefixtures("without_cuda")
def test_stream_is_used_again_once_its_step_is_gone_and_not_before() -> None:
    device = torch.device("cuda:0")
    first, second = _CaptureStream(device), _CaptureStream(device)
    freed = first.stream
    assert freed is not second.stream
    del first
    elsewhere, third = _CaptureStream(torch.device("cuda:1")), _CaptureStream(device)
    assert third.stream is freed
    assert elsewhere.stream is not freed
    assert _CaptureStream(device).stream not in (second.stream, third.stream)


@pytest.mark.usefixtures("without_cuda")
def test_stream_of_a_capture_that_broke_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", break_off)
    device = torch.device("cuda:0")
    stream = _CaptureStream(device)
    broken = stream.stream
    with pytest.raises(RuntimeError, match="CUDA error"):
        stream.capture(lambda: None)
    del stream
    assert _CaptureStream(device).stream is not broken


class BrokenStream(CPUStream):
    """One whose capture CUDA breaks off."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def broken_step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> GraphedStep:
    monkeypatch.setattr(graphed, "_CaptureStream", BrokenStream)
    step = GraphedStep(model, make_sgd(model, lr=0.1), cross_entropy)
    for batch in batches(WARM_UP):
        step(*batch)
    return step


@pytest.mark.usefixtures("on_cpu")
def test_broken_capture_says_so_and_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    step = broken_step(model := make_model(), monkeypatch)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match="cannot be captured in a CUDA graph: CUDA error: operation"):
        step(*batches(1)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("on_cpu")
def test_training_whose_capture_breaks_names_the_flag_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batches(1)[0]
    recipe = Recipe(data="", backbone="", precision="fp32")
    train = TrainStep(
        model := make_model(), recipe, make_sgd(model), torch.amp.GradScaler(enabled=False),
        CrossEntropy(0.0, None), num_images=len(labels), is_graphed=False,
    )  # fmt: skip
    train.graph = broken_step(model, monkeypatch)
    with pytest.raises(ValueError, match="cuda_graph: the step cannot be captured .*; want --no-cuda-graph"):
        train(images, labels)


@pytest.mark.usefixtures("on_cpu")
def test_logits_are_those_of_the_last_step() -> None:
    model = make_model()
    step = GraphedStep(model, make_sgd(model), cross_entropy)
    for images, labels in batches(WARM_UP + 2):
        step(images, labels)
        assert torch.equal(step.logits, model(images))  # the rate is 0
        assert not step.logits.requires_grad


def test_float_and_tensor_rates_give_the_same_step() -> None:
    ours, theirs = make_model(), make_model()
    optimizers = make_sgd(ours, lr=0.25), make_sgd(theirs, lr=0.25)
    LearningRates(optimizers[0], torch.device("cpu"))
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for batch in batches(3):
            form_gradients(model, optimizer, cross_entropy, *batch)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # 0.25 is exact in float32


@pytest.mark.usefixtures("on_cpu")
def test_gradient_is_clipped() -> None:
    model = make_model()
    GraphedStep(model, make_sgd(model), cross_entropy, max_grad_norm=1e-3)(*batches(1)[0])
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_model_runs_under_autocast_and_the_loss_gets_float32() -> None:
    model = make_model()
    seen = []
    model[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return cross_entropy(logits, labels)

    form_gradients(model, make_sgd(model), loss, *batches(1)[0], autocast_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("on_cpu")
def test_autocast_around_the_step_that_it_does_not_follow_is_refused() -> None:
    model = make_model()
    batch = batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(
            ValueError, match="autocast_dtype: got None .* want autocast_dtype=torch.bfloat16"
        ):
            GraphedStep(model, make_sgd(model), cross_entropy)(*batch)
        GraphedStep(model, make_sgd(model), cross_entropy, autocast_dtype=torch.bfloat16)(*batch)


def test_model_of_several_outputs_is_refused() -> None:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            return super().forward(x.flatten(1)), x

    model = Two(12, 3)
    with pytest.raises(ValueError, match="model: got a tuple from it, .* want one tensor of logits"):
        form_gradients(model, torch.optim.SGD(model.parameters()), cross_entropy, *batches(1)[0])


def test_loss_that_is_no_scalar_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"loss: got a value of shape \(5,\)"):
        form_gradients(
            model, make_sgd(model), lambda x, y: cross_entropy(x, y, reduction="none"), *batches(1)[0]
        )


# Learning rates.


def test_rate_that_is_assigned_goes_into_the_tensor_that_stands_there() -> None:
    optimizer = make_sgd(make_model(), lr=0.5)
    rates = LearningRates(optimizer, torch.device("cpu"))
    tensors = list(rates.tensors)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]
    optimizer.param_groups[1]["lr"] = 0.25
    rates.follow()
    for group, tensor, lr in zip(optimizer.param_groups, tensors, (0.5, 0.25), strict=True):
        assert group["lr"] is tensor
        assert tensor == lr
        assert f"{group['lr']:g}" == f"{lr:g}"  # as messages print it


def test_rate_follows_a_scheduler_and_a_loaded_state() -> None:
    optimizer = make_sgd(make_model(), lr=0.5)
    rates = LearningRates(optimizer, torch.device("cpu"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    rates.follow()
    assert [float(tensor) for tensor in rates.tensors] == [0.25, 0.25]
    state = copy.deepcopy(optimizer.state_dict())
    assign(optimizer, 1.0)
    rates.follow()
    optimizer.load_state_dict(state)  # puts tensors of its own there
    rates.follow()
    assert [float(tensor) for tensor in rates.tensors] == [0.25, 0.25]
    assert all(group["lr"] is t for group, t in zip(optimizer.param_groups, rates.tensors, strict=True))


# What is refused, and in what words.


def test_cpu_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="parameters on cpu, want a CUDA device"):
        GraphedStep(model, make_sgd(model), cross_entropy)


def test_distributed_model_is_refused() -> None:
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match="model: got DistributedDataParallel"):
        GraphedStep(distributed, make_sgd(make_model()), cross_entropy)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), r"SGD without fused=True, want SGD\(\.\.\., fused=True\)"),
        (lambda p: torch.optim.Adam(p), "Adam without capturable=True"),
        (lambda p: torch.optim.AdamW(p, fused=True), r"AdamW without capturable=True, want AdamW\("),
        (lambda p: torch.optim.RMSprop(p), r"RMSprop, .*want SGD\(\.\.\., fused=True\) or AdamW\("),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop"],
)
def test_optimizer_that_waits_for_the_gpu_is_refused(make: Callable, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        GraphedStep(model := make_model(), make(model.parameters()), cross_entropy)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_capturable_optimizers_are_taken(optimizer: type[torch.optim.Adam]) -> None:
    require_capturable(optimizer(make_model().parameters(), capturable=True))


def test_float16_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="autocast_dtype: got float16.*want bfloat16"):
        GraphedStep(model, make_sgd(model), cross_entropy, autocast_dtype=torch.float16)


class Tasks(nn.Module):
    """A network, and an offset of the logits for each image's task."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.offsets = make_model(), nn.Parameter(torch.zeros(4, 3))

    def forward(self, images: torch.Tensor, task: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.network(images) + weight[:, None] * self.offsets[task]


def batches_with_tasks(number: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    tasks = torch.randint(4, (number, 5), generator=generator)
    weights = torch.rand(number, 5, generator=generator)
    found = zip(batches(number), tasks, weights, strict=True)
    return [(*batch, task, weight) for batch, task, weight in found]


@pytest.mark.usefixtures("on_cpu")
def test_model_is_called_with_the_other_tensors_of_each_batch() -> None:
    model = Tasks()
    plain = copy.deepcopy(model)
    step = GraphedStep(model, make_sgd(model, lr=0.1), cross_entropy)
    optimizer = make_sgd(plain, lr=0.1)
    for images, labels, *others in batches_with_tasks(WARM_UP + 3):
        optimizer.zero_grad()
        expected = cross_entropy(plain(images, *others), labels)
        expected.backward()
        optimizer.step()
        assert torch.equal(step(images, labels, *others), expected.detach())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("on_cpu")
def test_no_gradient_reaches_what_other_tensors_were_computed_from() -> None:
    model, weigh = Tasks(), nn.Linear(1, 5)
    step = GraphedStep(model, make_sgd(model, lr=0.1), cross_entropy)
    for images, labels, task, weight in batches_with_tasks(WARM_UP + 2):
        step(images, labels, task, weigh(weight[:1]))
    assert weigh.weight.grad is None


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_no_tensor_is_refused_by_name(steps: int) -> None:
    model = Tasks()
    step = GraphedStep(model, make_sgd(model), cross_entropy)
    images, labels, task, weight = batches_with_tasks(1)[0]
    for _ in range(steps):
        step(images, labels, task, weight)
    with pytest.raises(ValueError, match=r"others\[1\]: got a list, want a torch.Tensor"):
        step(images, labels, task, [weight])


@pytest.mark.usefixtures("on_cpu")
def test_other_tensors_than_the_first_batch_had_are_refused() -> None:
    model = Tasks()
    step = GraphedStep(model, make_sgd(model), cross_entropy)
    images, labels, task, weight = batches_with_tasks(1)[0]
    step(images, labels, task, weight)
    with pytest.raises(ValueError, match="others: got 1 tensors, want the captured 2"):
        step(images, labels, task)
    with pytest.raises(ValueError, match=r"others\[1\]: got \(3,\) torch.float32, want the captured \(5,\)"):
        step(images, labels, task, weight[:3])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("steps", [1, WARM_UP + 1], ids=["warming_up", "captured"])
def test_batch_of_another_shape_is_refused_and_changes_nothing(steps: int) -> None:
    model = make_model()
    step = GraphedStep(model, make_sgd(model, lr=0.1), cross_entropy)
    images, labels = batches(1)[0]
    for _ in range(steps):
        step(images, labels)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"images: got \(4, 3, 2, 2\) .*captured \(5, 3, 2, 2\)"):
        step(images[:4], labels[:4])
    with pytest.raises(ValueError, match=r"labels: got \(5,\) torch.int32.*captured \(5,\) torch.int64"):
        step(images, labels.int())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_model_in_another_mode_is_refused() -> None:
    model = make_model()
    step = GraphedStep(model, make_sgd(model), cross_entropy)
    step(*batches(1)[0])
    model.eval()
    with pytest.raises(ValueError, match="in eval mode, want the captured train mode"):
        step(*batches(1)[0])


@pytest.mark.usefixtures("on_cpu")
def test_optimizer_state_that_was_loaded_after_the_capture_is_refused() -> None:
    model = make_model()
    optimizer = make_sgd(model)
    step = GraphedStep(model, optimizer, cross_entropy)
    for batch in batches(WARM_UP + 1):
        step(*batch)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match="optimizer: .*load_state_dict.*want a new GraphedStep"):
        step(*batches(1)[0])


def captured(on_model: nn.Module | None = None) -> tuple[GraphedStep, torch.optim.SGD, nn.Module]:
    """A step that has been captured."""
    model = on_model or make_model()
    optimizer = make_sgd(model, lr=0.1)
    step = GraphedStep(model, optimizer, cross_entropy)
    for batch in batches(WARM_UP + 1):
        step(*batch)
    return step, optimizer, model


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("is_trained", [True, False])
def test_weights_in_other_memory_than_was_captured_are_refused(is_trained: bool) -> None:
    model = make_model()
    model[1].bias.requires_grad_(is_trained)
    step, _, _ = captured(model)
    model[1].bias.data = model[1].bias.data.clone()  # what model.cpu() and back does
    with pytest.raises(ValueError, match="model: got other weights.*want a new GraphedStep"):
        step(*batches(1)[0])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("part", ["head", "frozen weight", "buffer"])
def test_tensors_that_took_the_place_of_captured_ones_are_refused(part: str) -> None:
    model = make_model()
    model.register_buffer("scale", torch.ones(3))
    model[1].weight.requires_grad_(False)
    step, _, _ = captured(model)
    if part == "head":
        model[-1] = nn.Linear(8, 3)
    elif part == "frozen weight":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model.scale = torch.ones(3)
    with pytest.raises(ValueError, match="got other weights|other tensors than the captured"):
        step(*batches(1)[0])


@pytest.mark.usefixtures("on_cpu")
def test_weights_that_are_changed_in_place_are_taken() -> None:
    step, _, model = captured()
    with torch.no_grad():
        model[1].bias += 1
    assert step(*batches(1)[0]).isfinite()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_setting_of_the_optimizer_that_changed_after_the_capture_is_refused(name: str) -> None:
    step, optimizer, _ = captured()
    optimizer.param_groups[1][name] = 0.5
    with pytest.raises(ValueError, match=rf"optimizer: got other settings than were captured \({name}\)"):
        step(*batches(1)[0])


@pytest.mark.usefixtures("on_cpu")
def test_group_of_parameters_that_was_added_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(list(model.parameters())[:-1], lr=0.1, fused=True)
    step = GraphedStep(model, optimizer, cross_entropy)
    optimizer.add_param_group({"params": list(model.parameters())[-1:]})
    with pytest.raises(ValueError, match="optimizer: got 2 groups of parameters, want the 1 that it had"):
        step(*batches(1)[0])


@pytest.mark.usefixtures("on_cpu")
def test_first_batch_that_fails_is_none_to_hold_others_to() -> None:
    model = make_model()
    step = GraphedStep(model, make_sgd(model, lr=0.1), cross_entropy)
    images, labels = batches(1)[0]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(images[..., :1], labels)
    assert step(images, labels).isfinite()
