"""A whole training step (forward, backward and optimizer) as one CUDA graph.

At ViT-B's size a step is hundreds of short kernels, and launching them one by one takes a large part of its
time. A graph is launched once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

WARM_UP = 3  # steps before the capture: they compile kernels, create workspaces and the optimizer's state


class CaptureError(RuntimeError):
    """CUDA or a library did something in a step that cannot be captured. The model is unchanged by that step,
    but the process should end, since a failed capture leaves undefined state (of random number generators,
    for example)."""


class GraphedStep:
    """``loss_value = step(images, labels, *others)``: one training step, replayed from a CUDA graph.

    The first three steps run normally (on a stream of their own). The fourth is captured; from then on every
    call copies its batch into the graph's input tensors and replays the graph. So no step is spent on warm-up
    alone, and a run is bit-identical to the same steps without a graph, by an optimizer with the same flags
    and its learning rates in float32 tensors.

    - The learning rate may change between steps: assign a float to ``group["lr"]``, or use a scheduler. Each
      group's rate is kept in a tensor that the graph reads.
    - Random numbers (prompt dropout) come from torch's CUDA generator, which every replay advances: each step
      has new masks.
    - ``.grad`` holds the last step's gradients, in the graph's memory.
    - ``logits``, (b, classes) and detached, are the last step's; the next step overwrites them.
    - Several processes, each with its own GPU and its share of the batch, average their gradients as
      DistributedDataParallel does, but after backward, in one all-reduce between two graphs. That suits
      prompts; the gradients of a whole backbone are exchanged sooner without a graph, while backward runs.
    - Between steps, parameters may be changed in place, and other code may run forward and backward passes.
      Moving or replacing parameters (``model.cpu()`` and back, a new head) requires a new GraphedStep, as
      does changing an optimizer setting other than the learning rate (a scheduler that changes momentum).
    - Everything else is fixed at the capture: which parameters are trained, the modes of modules within the
      model, the memory policy.

    Args:
        model: maps images, and tensors of the batch that may follow them (each image's task, say), to logits
            (b, classes); on one CUDA device. Its Python code does not run after the capture, so nothing in it
            may depend on the values of tensors. It must stay in the mode (train or eval) of the first step.
        optimizer: ``torch.optim.SGD(..., fused=True)``, or ``Adam`` or ``AdamW`` with ``capturable=True``
            (faster with ``fused=True`` as well).
        loss: maps (logits in at least float32, labels) to ().
        autocast_dtype: run the model under autocast in this dtype; None: no autocast, and the step must not
            be called under it. Not float16: its loss scaling is not captured.
        max_grad_norm: clip the norm of all gradients to this; None: no clipping.
        process_group: average gradients over the processes of this group, ``torch.distributed.group.WORLD``
            for all. They begin with the same parameters and take the same number of steps, on batches of one
            size. None: this process trains alone.

    Raises:
        ValueError: an optimizer, model, device or dtype that cannot be captured. When called: what is no
            tensor, a batch whose shapes or dtypes differ from the first one's, a loss that is not a scalar, a
            model that returns anything but one tensor or is in another mode; or after the capture, replaced
            parameters or optimizer state, weights in other memory, changed optimizer settings other than the
            learning rate.
        CaptureError: in the fourth call, if the step cannot be captured, but for lack of memory.
    """

    _loss_value: torch.Tensor
    _is_training: bool
    logits: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        autocast_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "model: got DistributedDataParallel, which is not captured; want a model that it never "
                "wrapped, and process_group=torch.distributed.group.WORLD"
            )
        if autocast_dtype == torch.float16:
            raise ValueError("autocast_dtype: got float16, whose loss scaling is not captured; want bfloat16")
        require_capturable(optimizer)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.autocast_dtype, self.max_grad_norm = autocast_dtype, max_grad_norm
        device = _device_of(model, optimizer)
        self._stream = _CaptureStream(device)
        self._rates = LearningRates(optimizer, device)
        self._average = None if process_group is None else GradientAverage(optimizer, process_group)
        self._inputs: tuple[torch.Tensor, ...] | None = None
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._captured: _Captured | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """One step on a batch, on any device; returns the loss (), detached.

        The loss may be infinite or NaN: checking it would have to wait for the GPU.

        Args:
            images, labels: (b, ...).
            others: tensors that the model is called with after the images. No gradient reaches what they were
                computed from.
        """
        device = self._stream.device
        if self.autocast_dtype is None and torch.is_autocast_enabled(device.type):
            raise ValueError(
                "autocast_dtype: got None where the step is called under autocast, which it does not follow; "
                f"want autocast_dtype={torch.get_autocast_dtype(device.type)}"
            )
        batch = {"images": images, "labels": labels}
        batch |= {f"others[{index}]": other for index, other in enumerate(others)}
        for name, given in batch.items():
            if not isinstance(given, torch.Tensor):
                raise ValueError(f"{name}: got a {type(given).__name__}, want a torch.Tensor")
        if self._inputs is None:
            self._inputs = tuple(torch.empty_like(given, device=device) for given in batch.values())
            self._is_training = self.model.training
        self._check(batch)
        for held, given in zip(self._inputs, batch.values(), strict=True):
            held.copy_(given.detach(), non_blocking=True)
        self._rates.follow()
        if self._steps < WARM_UP:
            try:
                self._stream.run(self._step)
            except BaseException:
                if self._steps == 0:  # later batches need not have the shape of one that failed
                    self._inputs = None
                raise
            self._steps += 1
        else:
            if self._replay is None:
                self.optimizer.zero_grad(set_to_none=True)  # so that the graph allocates .grad in its memory
                self._captured = _Captured.now(self.model, self.optimizer)
                try:
                    self._replay = self._capture()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise CaptureError(f"the step cannot be captured in a CUDA graph: {error}") from error
            self._replay()
        return self._loss_value.clone()

    def _step(self) -> None:
        self._form_gradients()
        if self._average is not None:
            self._average.all_reduce()
        self._update()

    def _capture(self) -> Callable[[], None]:
        """Captures a step, without running it, and returns the function that replays it."""
        if self._average is None:
            return self._stream.capture(self._step)
        form_gradients = self._stream.capture(self._form_gradients)
        update = self._stream.capture(self._update)
        all_reduce = self._average.all_reduce

        def replay() -> None:
            form_gradients()
            all_reduce()
            update()

        return replay

    def _form_gradients(self) -> None:
        self._loss_value, self.logits = form_gradients(
            self.model, self.optimizer, self.loss, *self._inputs, autocast_dtype=self.autocast_dtype
        )
        if self._average is not None:
            self._average.pack()

    def _update(self) -> None:
        if self._average is not None:
            self._average.unpack()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained_parameters(self.optimizer), self.max_grad_norm)
        self.optimizer.step()

    def _check(self, batch: dict[str, torch.Tensor]) -> None:
        if len(batch) != len(self._inputs):
            raise ValueError(
                f"others: got {len(batch) - 2} tensors, want the captured {len(self._inputs) - 2}"
            )
        for held, (name, given) in zip(self._inputs, batch.items(), strict=True):
            if (held.shape, held.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"{name}: got {tuple(given.shape)} {given.dtype}, want the captured "
                    f"{tuple(held.shape)} {held.dtype}"
                )
        if self.model.training != self._is_training:
            modes = {True: "train", False: "eval"}
            raise ValueError(
                f"model: got it in {modes[self.model.training]} mode, want the captured "
                f"{modes[self._is_training]} mode"
            )
        if self._replay is not None:
            self._captured.require_unchanged(self.optimizer)


def form_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    images: torch.Tensor,
    labels: torch.Tensor,
    *others: torch.Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward from no gradients; returns the loss () and the logits (b, classes), detached.

    Raises ValueError if the model returns anything but one tensor, or the loss is not a scalar.
    """
    optimizer.zero_grad(set_to_none=True)
    # No cache of cast weights: a cast made before the capture would not be repeated in a replay.
    with torch.autocast(
        images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None, cache_enabled=False
    ):
        logits = model(images, *others)  # (b, classes)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"model: got a {type(logits).__name__} from it, as a segmenter gives in training; want one "
            "tensor of logits"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    value = loss(logits, labels)
    if value.shape != ():
        raise ValueError(f"loss: got a value of shape {tuple(value.shape)}, want a scalar of shape ()")
    backward_on_this_thread(value)
    return value.detach(), logits.detach()


def backward_on_this_thread(loss: torch.Tensor) -> None:
    """``loss.backward()``, without a thread of autograd's own for the GPU. That would have another cuBLAS
    handle, which holds another workspace for each stream (32 MiB on Hopper)."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


class GradientAverage:
    """Averages an optimizer's gradients over the processes of a group, in three parts: graphs contain the
    first and the last, since not every backend's `all_reduce` can be captured.

    DistributedDataParallel cannot be taken apart so. Nor may it be wrapped around the same parameters: it
    holds autograd's accumulators of their gradients, which belong to the stream that they were made on, not
    to the one that captures.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup) -> None:
        self.optimizer, self.group = optimizer, group
        self._grads: list[torch.Tensor] = []
        self._packed = torch.empty(0)

    def __call__(self) -> None:
        self.pack()
        self.all_reduce()
        self.unpack()

    def pack(self) -> None:
        self._grads = [p.grad for p in trained_parameters(self.optimizer) if p.grad is not None]
        # Divided before the sum, as DistributedDataParallel does: the sum may be too large for 16 bits.
        self._packed = torch.cat([grad.flatten() for grad in self._grads]).div_(self.group.size())

    def all_reduce(self) -> None:
        dist.all_reduce(self._packed, group=self.group)

    def unpack(self) -> None:
        parts = self._packed.split([grad.numel() for grad in self._grads])
        torch._foreach_copy_(
            self._grads, [part.view_as(grad) for part, grad in zip(parts, self._grads, strict=True)]
        )


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class LearningRates:
    """Keeps every group's learning rate in a float32 tensor ().

    The tensor is ``group["lr"]`` itself. A captured step reads it, so it is never replaced.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.tensors = [torch.empty((), dtype=torch.float32, device=device) for _ in optimizer.param_groups]
        self.follow()

    def follow(self) -> None:
        """Copies what has been assigned to ``group["lr"]``, a number or another tensor, into the tensor."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.tensors):
            raise ValueError(
                f"optimizer: got {len(groups)} groups of parameters, want the {len(self.tensors)} that it "
                "had, or a new GraphedStep"
            )
        for group, tensor in zip(groups, self.tensors, strict=True):
            if group["lr"] is not tensor:
                tensor.fill_(group["lr"])
                group["lr"] = tensor


def require_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if the optimizer's step would wait for the GPU; the message says what to use."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SGD):
        flag = "fused"
    elif isinstance(optimizer, torch.optim.Adam):  # and AdamW
        flag = "capturable"
    else:
        raise ValueError(
            f"optimizer: got {name}, which is not captured; want SGD(..., fused=True) or "
            "AdamW(..., capturable=True)"
        )
    if not all(group[flag] for group in optimizer.param_groups):
        raise ValueError(f"optimizer: got {name} without {flag}=True, want {name}(..., {flag}=True)")


def _device_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    """The one CUDA device that everything is on."""
    devices = {p.device for p in (*model.parameters(), *trained_parameters(optimizer))}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"model: got parameters on {found}, want a CUDA device")
    return devices.pop()


class _Captured(NamedTuple):
    """What the graph refers to by address or contains as a constant.

    state: all tensors that the optimizer's step writes, parameters and state.
    modules: of the model: for each, the dictionary that holds it, its name there, and the module.
    held: the same for parameters and buffers, with each one's data pointer.
    settings: of each of the optimizer's groups, without parameters and learning rate.
    """

    state: list[torch.Tensor]
    modules: list[tuple[dict[str, Any], str, nn.Module | None]]
    held: list[tuple[dict[str, Any], str, torch.Tensor, int]]
    settings: list[dict[str, Any]]

    @classmethod
    def now(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Captured:
        modules = [(m._modules, name, child) for m in model.modules() for name, child in m._modules.items()]
        owners = [owner for m in model.modules() for owner in (m._parameters, m._buffers)]
        held = [
            (owner, name, tensor, tensor.data_ptr())
            for owner in owners
            for name, tensor in owner.items()
            if tensor is not None
        ]
        return cls(_state_tensors(optimizer), modules, held, _settings(optimizer))

    def require_unchanged(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError if a replay would use tensors that were replaced, or ignore changed settings."""
        now = _state_tensors(optimizer)
        if len(now) != len(self.state) or any(a is not b for a, b in zip(now, self.state, strict=True)):
            raise ValueError(
                "optimizer: its parameters or its state are other tensors than the captured ones (after "
                "load_state_dict, for one); want a new GraphedStep"
            )
        if any(owner.get(name) is not module for owner, name, module in self.modules) or any(
            owner.get(name) is not tensor or tensor.data_ptr() != address
            for owner, name, tensor, address in self.held
        ):
            raise ValueError(
                "model: got other weights, or weights in other memory, than were captured (after a move to "
                "another device and back, for one, or with a new head); want a new GraphedStep"
            )
        for before, group in zip(self.settings, optimizer.param_groups, strict=True):
            if changed := [name for name, value in before.items() if not _is_same(value, group[name])]:
                raise ValueError(
                    f"optimizer: got other settings than were captured ({', '.join(changed)}); want a new "
                    "GraphedStep"
                )


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each group's settings that a step reads, except learning rates."""
    others = ("params", "lr", "initial_lr")  # a scheduler adds the last
    return [
        {name: value for name, value in group.items() if name not in others}
        for group in optimizer.param_groups
    ]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, or for a tensor, identical: a graph reads its current value."""
    return one is other if isinstance(one, torch.Tensor) else bool(one == other)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors that a step writes, parameters and state."""
    found: list[torch.Tensor] = []
    for parameter in trained_parameters(optimizer):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        found.append(parameter)
        found.extend(value for value in state.values() if isinstance(value, torch.Tensor))
    return found


class _CaptureStream:
    """The stream for warm-up steps and the capture: the default stream does not allow captures.

    One that is given up is used again: cuBLAS never frees the workspace that it made for a stream, and a
    sweep captures a graph per trial. Two that are in use have different streams, since their graphs would
    write to the same workspace.
    """

    _idle: ClassVar[defaultdict[torch.device, list[torch.cuda.Stream]]] = defaultdict(list)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        idle = self._idle[device]
        try:
            self.stream = idle.pop()
        except IndexError:
            self.stream = torch.cuda.Stream(device)
        else:
            torch.cuda.synchronize(device)  # its last graph may still be running, on another stream
        self._give_up = weakref.finalize(self, idle.append, self.stream)
        self._give_up.atexit = False

    def run(self, step: Callable[[], None]) -> None:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            step()
        caller.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Captures a step or a part of it, without running it, and returns the function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls can invalidate the capture: other threads, such as one that pins batches,
        # may continue.
        try:
            with (
                _without_stale_streams(),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                step()
        except BaseException:
            self._give_up.detach()  # nobody knows what state the stream is in
            raise
        return graph.replay


@contextmanager
def _without_stale_streams() -> Iterator[None]:
    """Lets a capture override the default stream, which autograd remembers for a parameter as long as the
    loss of an ordinary step is alive (in a notebook, for example). Does nothing where PyTorch cannot, as 2.11
    cannot; 2.14 can."""
    set_override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
    if set_override is None:
        yield
        return
    # There is no public getter; without the private one, the initial value is assumed.
    before = getattr(torch._C, "_override_stale_capture_stream", lambda: False)()
    set_override(True)
    try:
        yield
    finally:
        set_override(before)
