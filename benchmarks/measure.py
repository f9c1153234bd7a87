"""Measuring one training step: time by part, bytes kept for backward, peak memory, gradient error."""

from __future__ import annotations

import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.graphed import GraphedStep

MIB = 2**20


def device_name(device: torch.device) -> str:
    """The device in words, such as the GPU's or the processor's model name and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def label(implementation: str, memory: str | None) -> str:
    """A row's name in tables and plots: "vpt_fast", "vpt_fast, compact"."""
    return implementation if memory in (None, "exact") else f"{implementation}, {memory}"


def first_line(failure: Exception) -> str:
    """An exception's type and first line, short enough for a row."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


@dataclass
class StepTimes:
    """Seconds of one training step, by part."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


class Stopwatch:
    """Marks in time, by device events on a GPU (read after the work is done) and by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: list[torch.cuda.Event] = []
        self.readings: list[float] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.readings.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between each mark and the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.events)]
        return [b - a for a, b in itertools.pairwise(self.readings)]


@dataclass
class Contender:
    """One implementation in the comparison.

    Attributes:
        model: trained parameters have requires_grad set, all others not.
        run: what is called on images, and captured; the model itself or its compiled form.
        autocast: dtype to run under torch.autocast, or None.
        graphed: whether timed steps are replayed from a CUDA graph, whose parts have no times.
        captures: whether `run` captures CUDA graphs itself, as torch.compile's max-autotune does.
        times: one entry per timed step.
        kept_bytes: kept for backward, of one step; None until measured.
        peak_bytes, peak_reserved_bytes: of a step with only this model's weights counted; None on a CPU.
        gradient_error: None until checked.
        unchecked: why its gradients could not be checked, through no fault of its own.
        error: why it could not run; None if it could.
    """

    name: str
    model: nn.Module
    run: nn.Module
    autocast: torch.dtype | None = None
    graphed: bool = False
    captures: bool = False
    times: list[StepTimes] = field(default_factory=list)
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    gradient_error: float | None = None
    unchecked: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=self.graphed or None)
        self.graph: GraphedStep | None = None

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Context in which to take steps. An exception inside is kept as this contender's error, and not
        raised.

        Afterwards the contender holds only weights and the optimizer's state, no gradients and no graph, and
        what it left in the allocator's cache is released.
        """
        try:
            yield
        except Exception as failure:
            self.error = first_line(failure)
            self.times = []
        self.graph = None
        self.optimizer.zero_grad(set_to_none=True)
        empty_cache(device)

    @property
    def steps_to_settle(self) -> int:
        """Untimed steps after which all memory is reserved: a graph is captured by the fourth."""
        return 5 if self.graphed or self.captures else 1

    @property
    def memory(self) -> str | None:
        """vpt_fast's memory policy; None for all others."""
        return getattr(self.model, "memory", None)

    @property
    def precision(self) -> str:
        """ "amp" under autocast, else the dtype of the narrowest weights, such as "bfloat16"."""
        if self.autocast is not None:
            return "amp"
        narrowest = min((p.dtype for p in self.model.parameters()), key=lambda dtype: dtype.itemsize)
        return str(narrowest).removeprefix("torch.")

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        # Graphed steps run without autocast's weight cache (`GraphedStep`): with it here, a model compiles
        # twice.
        with torch.autocast(
            images.device.type,
            self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=not self.graphed,
        ):
            return F.cross_entropy(self.run(images).float(), labels)

    def make_graph(self, optimizer: torch.optim.Optimizer) -> GraphedStep:
        """Steps by an optimizer of the trained parameters, replayed from the fourth on."""
        return GraphedStep(self.run, optimizer, F.cross_entropy, autocast_dtype=self.autocast)

    def step(self, images: Tensor, labels: Tensor) -> Stopwatch:
        """One training step, with marks before forward, backward and optimizer, and at the end.

        For a graphed step all marks but the first are at the end, so that all of its time counts as forward.
        """
        watch = Stopwatch(images.device)
        if self.graphed:
            if self.graph is None:
                self.graph = self.make_graph(self.optimizer)
            watch.mark()
            self.graph(images, labels)
            for _ in range(3):
                watch.mark()
            return watch
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        loss = self.loss(images, labels)
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimizer.step()
        watch.mark()
        return watch


def kept_for_backward(contender: Contender, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward of one training step, which it takes.

    Counted where autograd saves tensors (torch.autograd.graph.saved_tensors_hooks), by storage: one that is
    saved several times, or through several views, counts once and in full. Storages of parameters, buffers,
    images and labels are left out: they exist anyway.
    """
    outside = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*contender.model.parameters(), *contender.model.buffers(), images, labels)
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    contender.optimizer.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.loss(images, labels)
    total = sum(kept.values())  # read while the graph still holds them all, so that no address was reused
    loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad(set_to_none=True)
    return total


def measure_peak(contender: Contender, images: Tensor, labels: Tensor) -> None:
    """Records the peak of what a step allocates and reserves, plus the weights of this contender alone.

    The others' weights are on the device too, so the allocator's own peak would count them. The steps up to
    the capture of a CUDA graph, and what the graph then holds, count as well; cuBLAS's workspaces, which the
    first step on a stream makes and all that follow use, do not. On a CPU, which has no such counters,
    nothing is recorded.
    """
    device = images.device
    if device.type != "cuda":
        return
    contender.step(images, labels)
    contender.graph = None
    contender.optimizer.zero_grad(set_to_none=True)
    empty_cache(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    for _ in range(contender.steps_to_settle):
        contender.step(images, labels)
    torch.cuda.synchronize(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own_tensors(contender)}
    own = sum(storages.values())
    contender.peak_bytes = torch.cuda.max_memory_allocated(device) - allocated + own
    if contender.steps_to_settle > 1:  # replays do not need what was reserved before the capture
        empty_cache(device)
        contender.peak_reserved_bytes = torch.cuda.memory_reserved(device) - reserved + own
    else:
        contender.peak_reserved_bytes = torch.cuda.max_memory_reserved(device) - reserved + own


def empty_cache(device: torch.device) -> None:
    """Releases a GPU's unused memory, so that what one contender left is not counted for another."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def own_tensors(contender: Contender) -> list[Tensor]:
    momentum = [state["momentum_buffer"] for state in contender.optimizer.state.values()]
    tensors = [*contender.model.parameters(), *contender.model.buffers(), *momentum]
    return [tensor for tensor in tensors if tensor is not None]


def interleave(
    contenders: list[Contender],
    images: Tensor,
    labels: Tensor,
    *,
    repeats: int,
    steps: int,
    progress: Callable[[str], None],
) -> None:
    """Times all contenders in one process, round-robin, so that other load on the machine affects all alike.

    First each is warmed up: by the step that counts the bytes kept, which compiles, and by those that measure
    the peak, in which graphs are captured. Then there are `repeats` rounds of `steps` steps each. Results are
    stored in the contenders. One that fails (out of memory, no compiler, a kernel that does not build) keeps
    the message as its error and sits out the rest.

    Between turns a contender holds only its weights and momentum. On a GPU each turn begins with an empty
    cache and untimed steps, which reserve memory and capture a graph again.
    """
    for contender in contenders:
        if contender.error is None:
            progress(f"{label(contender.name, contender.memory)}: warm-up")
            with contender.turn(images.device):
                contender.kept_bytes = kept_for_backward(contender, images, labels)
                measure_peak(contender, images, labels)
    for round_ in range(1, repeats + 1):
        for contender in contenders:
            if contender.error is not None:
                continue
            progress(f"{label(contender.name, contender.memory)}: round {round_} of {repeats}")
            with contender.turn(images.device):
                for _ in range(contender.steps_to_settle if images.device.type == "cuda" else 0):
                    contender.step(images, labels)
                # Read after the last step, so that a GPU does not wait between steps.
                watches = [contender.step(images, labels) for _ in range(steps)]
                contender.times += [StepTimes(*watch.seconds()) for watch in watches]


def gradients(contender: Contender, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of every trained parameter, by name; of a graphed contender, as a replay leaves it."""
    if contender.graphed:
        return replayed_gradients(contender, images, labels)
    for _ in range(contender.steps_to_settle if contender.captures else 1):
        contender.optimizer.zero_grad(set_to_none=True)
        contender.loss(images, labels).backward()
    return take_gradients(contender)


def replayed_gradients(contender: Contender, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`gradients` by a separate graph with a learning rate of 0: weights, if gradients are finite, and the
    contender's optimizer stay as they are.

    Before each step the previous gradients are overwritten by NaN, so that a replay that writes nothing does
    not pass as correct.
    """
    contender.optimizer.zero_grad(set_to_none=True)
    trained = [p for p in contender.model.parameters() if p.requires_grad]
    step = contender.make_graph(torch.optim.SGD(trained, lr=0.0, fused=True))
    for _ in range(contender.steps_to_settle):
        for p in trained:
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        step(images, labels)
    return take_gradients(contender)  # while the graph, which owns their memory, exists


def take_gradients(contender: Contender) -> dict[str, Tensor]:
    """Copies of every `.grad`, zeros where there is none; then clears them."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in contender.model.named_parameters()
        if p.requires_grad
    }
    contender.optimizer.zero_grad(set_to_none=True)
    return found


def gradient_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error, by norm, of any trained tensor's gradient; infinite if one is missing. An
    expected zero is matched by zero alone: a residual branch may begin with a scale of zero."""
    if actual.keys() != expected.keys():
        return float("inf")
    errors = []
    for name, gradient in expected.items():
        gradient = gradient.to(actual[name].device, torch.float64)
        difference = (actual[name].double() - gradient).norm()
        errors.append(float(difference / gradient.norm()) if difference != 0 else 0.0)
    return max(error if error == error else float("inf") for error in errors)  # NaN is never exact


def median_times(times: list[StepTimes]) -> StepTimes:
    """The median of each part."""
    return StepTimes(
        *(statistics.median(getattr(t, part) for t in times) for part in ("forward", "backward", "optimizer"))
    )
