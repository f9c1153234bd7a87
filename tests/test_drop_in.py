"""PromptedViT in the training loops and tools that people already have."""

from __future__ import annotations

import copy
import datetime
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.nn.functional as F
from concatenation import ConcatenatedViT, assert_same_gradients, assert_same_step, relative_error, step
from tiny import random_batch, tiny_beit, tiny_convnet, tiny_eva, tiny_swin, tiny_vit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel, replicate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from vpt_fast.kernels.prompted_attention import by_images

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSegmenter, PromptedSwin, PromptedViT
from vpt_fast.engine.stream import Stream
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.lora import LoRATuning

NUM_CLASSES = 5
TRAINED = {"prompts", "head.weight", "head.bias"}
PROMPTS: dict[str, dict[str, Any]] = {
    "deep": {"num_prompts": 4},
    "shallow": {"num_prompts": 4, "prompt_type": "shallow"},
    "key-value": {"num_prompts": 4, "prompt_location": "key-value"},
}


def build(dtype: torch.dtype = torch.float64, seed: int = 0, **settings) -> PromptedViT:
    """A two-block model with random trainable tensors."""
    torch.manual_seed(seed)
    vit = tiny_vit(dtype, seed, depth=2)
    model = PromptedViT(vit, NUM_CLASSES, dtype=dtype, **(settings or PROMPTS["deep"])).to(dtype)
    with torch.no_grad():
        model.prompts.normal_()
        model.head.bias.normal_()
    return model.train()


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name not in TRAINED}


def test_only_prompts_and_head_get_gradients() -> None:
    model = build()
    F.cross_entropy(model(random_batch(model)[0]), torch.tensor([0, 1])).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED
    assert {name for name, p in model.named_parameters() if p.grad is not None} == TRAINED


def test_backbone_stays_frozen_and_in_eval_mode() -> None:
    model = build()
    own = {module for module in model.modules() if any(p.requires_grad for p in module.parameters())}
    for mode in (False, True):
        model.train(mode)
        assert model.training is mode
        assert not any(module.training for module in model.modules() if module not in own)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED


def test_the_given_backbone_is_not_modified() -> None:
    vit = tiny_vit(torch.float32).train()
    before = copy.deepcopy(vit.state_dict())
    model = PromptedViT(vit, NUM_CLASSES, 4)
    model(random_batch(model, dtype=torch.float32)[0]).sum().backward()
    assert vit.training
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


def test_the_next_forward_sees_an_optimizer_step() -> None:
    model = build()
    images, labels = random_batch(model)
    plain = ConcatenatedViT(tiny_vit(depth=2), NUM_CLASSES, **PROMPTS["deep"]).double()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    step(model, images, labels)
    optimizer.step()
    plain.load_trainables(model.trainable_state_dict())
    assert_same_step(step(model, images, labels), step(plain, images, labels), 1e-9)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_inference_mode_gives_the_logits_of_training(prompts: str) -> None:
    model = build(**PROMPTS[prompts])
    images, _ = random_batch(model)
    expected = model(images).detach()
    with torch.inference_mode():
        assert relative_error(model.eval()(images), expected) < 1e-12


def test_channels_last_images() -> None:
    model = build()
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    assert_same_step(step(model, images.to(memory_format=torch.channels_last), labels), expected, 1e-12)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_gradient_of_the_images_where_it_is_wanted(prompts: str) -> None:
    model = build(**PROMPTS[prompts])
    plain = ConcatenatedViT(tiny_vit(depth=2), NUM_CLASSES, **PROMPTS[prompts]).double()
    plain.load_trainables(model.trainable_state_dict())
    images, labels = random_batch(model)
    gradients = []
    for each in (model, plain):
        pixels = images.clone().requires_grad_()
        F.cross_entropy(each(pixels), labels).backward()
        gradients.append(pixels.grad)
    assert relative_error(*gradients) < 1e-9


def test_grad_scaler() -> None:
    model = build(torch.float32)
    images, labels = random_batch(model, dtype=torch.float32)
    expected = step(model, images, labels)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(images), labels)).backward()
    scaler.unscale_(optimizer)
    before = model.prompts.detach().clone()
    assert_same_gradients(model, expected, 1e-6)  # a power of two scales without rounding
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(model.prompts, before - 0.1 * expected.gradients["prompts"])


def test_hook_on_a_block_gets_the_tokens_and_their_gradient() -> None:
    model = build()
    plain = ConcatenatedViT(tiny_vit(depth=2), NUM_CLASSES, **PROMPTS["deep"]).double()
    plain.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    found: list[Tensor] = []

    def of_stream(block: nn.Module, inputs: tuple[Any, ...], output: Stream) -> None:
        found.append(output.sum())
        output.update.register_hook(found.append)

    def of_tokens(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(output)
        output.register_hook(found.append)

    model.backbone.blocks[0].register_forward_hook(of_stream)
    plain.vit.blocks[0].register_forward_hook(of_tokens)
    for each in (model, plain):
        each(images)[:, 1].sum().backward()
    tokens, gradient, *expected = found
    without_prompts = [plain.without_prompts(each, PROMPTS["deep"]["num_prompts"]) for each in expected]
    assert relative_error(tokens, without_prompts[0]) < 1e-12
    assert relative_error(gradient, without_prompts[1]) < 1e-12


def test_hook_that_returns_no_stream_is_refused() -> None:
    model = build()
    model.backbone.blocks[0].register_forward_hook(lambda block, inputs, output: tuple(output))
    with pytest.raises(ValueError, match=r"stream: got a tuple from the block before, .* Stream\(tokens\)"):
        model(random_batch(model)[0])


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_hook_whose_change_of_the_base_would_get_no_gradient_is_refused(name: str) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]()
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    model.backbone.blocks[0].register_forward_hook(
        lambda block, inputs, output: output._replace(base=output.base + shift)
    )
    with pytest.raises(ValueError, match=r"stream: got a base that requires a gradient .* Stream\(tokens\)"):
        model(random_batch(model)[0])


def test_gradient_of_what_a_hook_adds_to_the_tokens_is_that_of_differences() -> None:
    model = build()
    images, _ = random_batch(model)

    def added(shift: Tensor) -> Tensor:
        hook = model.backbone.blocks[0].register_forward_hook(
            lambda block, inputs, output: Stream(output.sum() + shift)
        )
        logits = model(images)
        hook.remove()
        return logits.sin().sum()

    assert torch.autograd.gradcheck(added, torch.zeros((), dtype=torch.float64, requires_grad=True))


def test_gradient_accumulation_equals_the_joined_batch() -> None:
    model = build()
    images, labels = random_batch(model, batch_size=6)
    expected = step(model, images, labels)
    model.zero_grad()
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        (F.cross_entropy(model(images[rows]), labels[rows]) / 3).backward()
    assert_same_gradients(model, expected, 1e-12)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_inside_activation_checkpointing(prompts: str) -> None:
    model = build(**PROMPTS[prompts])
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    model.zero_grad()
    F.cross_entropy(checkpoint(model, images, use_reentrant=False), labels).backward()
    assert_same_gradients(model, expected, 1e-12)


@pytest.mark.parametrize("name", ["deep", "probe", "swin"])
def test_selective_activation_checkpointing_is_refused_with_what_to_do_instead(name: str) -> None:
    makes = {"deep": build, "probe": lambda: LinearProbe(tiny_vit(), 5).double()}
    model = makes.get(name, lambda: PromptedSwin(tiny_swin(), 5, 4).double())()
    selected = partial(create_selective_checkpoint_contexts, [torch.ops.aten.bmm.default])
    with pytest.raises(NotImplementedError, match="want .* without context_fn, or memory='recompute'"):
        checkpoint(model, random_batch(model)[0], use_reentrant=False, context_fn=selected)


def test_kept_tensors_pass_saved_tensor_hooks() -> None:
    model = build()
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    model.zero_grad()
    packed: list[Tensor] = []
    unpacked: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    assert len(unpacked) == len(packed)  # each comes back once: a hook may have moved it far away
    assert_same_gradients(model, expected, 1e-12)


def test_two_backward_passes_through_one_graph_give_the_same_gradients() -> None:
    model = build()
    images, labels = random_batch(model)
    loss = F.cross_entropy(model(images), labels)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_deepcopy_is_equal_and_independent() -> None:
    model = build()
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    twin = copy.deepcopy(model)
    assert_same_step(step(twin, images, labels), expected, 0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_same_step(step(model, images, labels), expected, 0.0)


AVERAGED = {
    "vit": lambda: PromptedViT(tiny_vit(torch.float32), NUM_CLASSES, 3),
    "rotary": lambda: PromptedViT(tiny_eva(torch.float32), NUM_CLASSES, 3),
    "biased": lambda: PromptedViT(tiny_beit(torch.float32), NUM_CLASSES, 3),
    "swin": lambda: PromptedSwin(tiny_swin(torch.float32, window_size=3), NUM_CLASSES, 3),
}


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9995, 0.9999])
@pytest.mark.parametrize("name", AVERAGED)
def test_moving_average_of_a_model_that_stands_still_is_the_model(name: str, decay: float) -> None:
    model = AVERAGED[name]().eval()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for _ in range(4):
        averaged.update_parameters(model)
    images, _ = random_batch(model, dtype=torch.float32)
    assert relative_error(averaged(images), model(images)) < 1e-5


@pytest.mark.parametrize("prompts", PROMPTS)
def test_state_dict_carries_everything_onto_another_model(prompts: str) -> None:
    model, fresh = build(seed=0, **PROMPTS[prompts]), build(seed=1, **PROMPTS[prompts])
    images, labels = random_batch(model)
    fresh.load_state_dict(model.state_dict())
    assert_same_step(step(fresh, images, labels), step(model, images, labels), 0.0)


def why_inductor_cannot_run() -> str | None:
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        return "torch.compile's default backend needs a C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "torch.compile's default backend needs the Python headers"
    return None


NO_INDUCTOR = why_inductor_cannot_run()


@pytest.mark.parametrize(
    "backend, prompts",
    [
        ("aot_eager", "shallow"),
        ("aot_eager", "key-value"),
        pytest.param(
            "inductor", "deep", marks=pytest.mark.skipif(bool(NO_INDUCTOR), reason=str(NO_INDUCTOR))
        ),
    ],
)
def test_compiled_model_equals_eager(backend: str, prompts: str) -> None:
    torch._dynamo.reset()
    model = build(**PROMPTS[prompts])
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss = F.cross_entropy(compiled(images), labels)
    model.zero_grad()
    loss.backward()
    assert relative_error(loss.detach(), expected.loss) < 1e-9
    assert_same_gradients(model, expected, 1e-9)


def distributed_step(rank: int, world_size: int, folder: str) -> None:
    """One process of the test below: runs its share of the batch, then rank 0 writes the gradients."""
    rendezvous = dict(init_method=f"file://{folder}/rendezvous", timeout=datetime.timedelta(minutes=2))
    dist.init_process_group("gloo", rank=rank, world_size=world_size, **rendezvous)
    try:
        model = build()
        images, labels = random_batch(model, batch_size=6)
        share = slice(3 * rank, 3 * rank + 3)
        parallel = DistributedDataParallel(model)
        F.cross_entropy(parallel(images[share]), labels[share]).backward()
        if rank == 0:
            torch.save({name: model.get_parameter(name).grad for name in TRAINED}, f"{folder}/gradients.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    other = torch.multiprocessing.spawn(distributed_step, args=(2, str(tmp_path)), nprocs=1, join=False)
    distributed_step(1, 2, str(tmp_path))  # in this process: starting one takes seconds
    while not other.join():
        pass
    model = build()
    expected = step(model, *random_batch(model, batch_size=6))
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients[name], gradient) < 1e-12, name


def loader(model: PromptedViT) -> DataLoader:
    return DataLoader(TensorDataset(*random_batch(model, 8, NUM_CLASSES, torch.float32)), batch_size=4)


def assert_trained(model: PromptedViT, losses: list[float], frozen: dict[str, Tensor]) -> None:
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses
    after = frozen_state(model)
    assert frozen.keys() == after.keys()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen), "the backbone changed"


def test_lightning_loop(tmp_path: Path) -> None:
    import lightning

    losses: list[float] = []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(torch.float32)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

    task = Task()
    frozen = frozen_state(task.model)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, loader(task.model))
    assert_trained(task.model, losses, frozen)


def test_accelerate_loop() -> None:
    import accelerate

    model = build(torch.float32)
    frozen, batches = frozen_state(model), loader(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for _ in range(4):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(prepared(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
    assert_trained(accelerator.unwrap_model(prepared), losses, frozen)


EXPORTED = {
    "vit": lambda: PromptedViT(tiny_vit(torch.float32, depth=2), NUM_CLASSES, 3),
    "shallow": lambda: PromptedViT(tiny_vit(torch.float32, depth=2), NUM_CLASSES, 3, prompt_type="shallow"),
    "normalised queries": lambda: PromptedViT(tiny_vit(torch.float32, depth=1, qk_norm=True), NUM_CLASSES, 3),
    "rotary": lambda: PromptedViT(tiny_eva(torch.float32, depth=1), NUM_CLASSES, 3),
    "biased": lambda: PromptedViT(tiny_beit(torch.float32, depth=2), NUM_CLASSES, 3, "shallow"),
    "swin": lambda: PromptedSwin(tiny_swin(torch.float32, depths=(2, 1)), NUM_CLASSES, 3),
    "memory by what is free": lambda: PromptedViT(
        tiny_vit(torch.float32, depth=1), NUM_CLASSES, 3, memory="auto"
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_for_batches_of_any_size(name: str) -> None:
    model = EXPORTED[name]().eval()
    images, _ = random_batch(model, 3, dtype=torch.float32)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images[:2],), dynamic_shapes=(batch,))
    for size in (1, 3):
        expected, actual = model(images[:size]), program.module()(images[:size])
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("prompts", ["deep", "shallow"])
def test_exported_prompts_are_joined_to_the_tokens_and_written_into_nothing(prompts: str) -> None:
    model = build(torch.float32, **PROMPTS[prompts]).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    program = torch.export.export(model, (images,)).run_decompositions({})
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.cat.default" in names
    assert not [name for name in names if "scatter" in name or "copy" in name or "index_put" in name]


OUTSIDE_OF_AUTOGRAD = {
    "ViT": build,
    "Swin": lambda: PromptedSwin(tiny_swin(), NUM_CLASSES, 4).double(),
    "ConvNet": lambda: PromptedConvNet(tiny_convnet("resnet10t"), NUM_CLASSES, 2).double(),
}


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[nn.Module]]:
    """Makes two replicas as nn.DataParallel does, on the CPU, for which PyTorch has no broadcast."""

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda model: replicate(model, [0, 1])


@pytest.mark.parametrize("make", OUTSIDE_OF_AUTOGRAD.values(), ids=OUTSIDE_OF_AUTOGRAD)
def test_replicas_of_data_parallel_form_the_step_of_the_model(make, replicas) -> None:
    model = make()
    images, labels = random_batch(model)
    expected = step(model, images, labels)
    model.zero_grad()
    logits = [replica(share) for replica, share in zip(replicas(model), images.split(1), strict=True)]
    F.cross_entropy(torch.cat(logits), labels).backward()
    assert_same_gradients(model, expected, 1e-12)


def test_replica_of_data_parallel_does_not_choose_the_memory_policy(replicas) -> None:
    model = build(num_prompts=4, memory="auto")
    with pytest.raises(ValueError, match="memory: got 'auto' in a replica .* want one of 'exact', .*Distri"):
        replicas(model)[0](random_batch(model)[0])


@pytest.fixture
def lone_process() -> Iterator[None]:
    """This process as a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_model_of_fully_shard_forms_the_step_of_the_model(name: str, lone_process) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]()
    images, labels = random_batch(model)
    expected = step(copy.deepcopy(model), images, labels)
    F.cross_entropy(fully_shard(model, mesh=init_device_mesh("cpu", (1,)))(images), labels).backward()
    for each, gradient in expected.gradients.items():
        assert relative_error(model.get_parameter(each).grad.full_tensor(), gradient) < 1e-12, each


@pytest.mark.filterwarnings("ignore")  # that it is deprecated, and that weights differ in requires_grad
def test_the_older_sharding_that_would_train_the_backbone_is_refused_with_the_newer_one(lone_process) -> None:
    model = build()
    images, _ = random_batch(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="want .* fully_shard instead of FullyShardedDataParallel"):
        sharded(images)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", OUTSIDE_OF_AUTOGRAD.values(), ids=OUTSIDE_OF_AUTOGRAD)
def test_gradient_of_a_functional_call_is_that_of_the_model_with_these_tensors(make) -> None:
    model = make()
    images, labels = random_batch(model)
    expected = step(copy.deepcopy(model), images, labels)
    given = {name: t.requires_grad_() for name, t in trainable(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # not read
    loss = F.cross_entropy(torch.func.functional_call(model, given, (images,)), labels)
    gradients = torch.autograd.grad(loss, list(given.values()))
    for name, gradient in zip(given, gradients, strict=True):
        assert torch.equal(gradient, expected.gradients[name]), name


@pytest.mark.parametrize("make", OUTSIDE_OF_AUTOGRAD.values(), ids=OUTSIDE_OF_AUTOGRAD)
def test_torch_func_s_grad_is_refused_with_what_to_do_instead(make) -> None:
    model = make()
    images, _ = random_batch(model)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, tensors, (images,)).sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms .* want torch\.autograd\.grad"):
        torch.func.grad(loss)(trainable(model))


@pytest.mark.parametrize("name", ["ViT", "Swin"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_flops_are_counted_without_gradients(name: str, context: Any) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]().eval()
    images, _ = random_batch(model)
    found = []
    for each in (torch.enable_grad, context):
        with FlopCounterMode(display=False) as counter, each():
            model(images)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own use of it
def test_forward_mode_derivative_of_the_prompts_is_that_of_concatenation() -> None:
    model = build()
    plain = ConcatenatedViT(tiny_vit(depth=2), NUM_CLASSES, **PROMPTS["deep"]).double()
    plain.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    direction = torch.randn(model.prompts.shape, generator=torch.Generator().manual_seed(0)).double()
    tangents = []
    for each in (model, plain):
        with fwAD.dual_level(), sdpa_kernel(SDPBackend.MATH):
            given = {"prompts": fwAD.make_dual(each.prompts, direction)}
            logits = torch.func.functional_call(each, given, (images,))
            tangents.append(fwAD.unpack_dual(logits).tangent)
    assert relative_error(*tangents) < 1e-12


def test_jacobian_in_forward_mode_is_that_in_reverse_mode() -> None:
    model = build()
    images, _ = random_batch(model, 1)

    def logits(prompts: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"prompts": prompts}, (images,))

    prompts = model.prompts.detach()
    expected = torch.autograd.functional.jacobian(logits, prompts)
    settings: dict[str, Any] = {"vectorize": True, "strategy": "forward-mode"}
    assert relative_error(torch.autograd.functional.jacobian(logits, prompts, **settings), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_linearize_is_refused_with_what_to_do_instead(name: str) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]()
    with pytest.raises(NotImplementedError, match=r"torch\.func\.linearize .*want torch\.func\.jvp"):
        torch.func.linearize(model, random_batch(model)[0])


@pytest.mark.parametrize("make", OUTSIDE_OF_AUTOGRAD.values(), ids=OUTSIDE_OF_AUTOGRAD)
def test_forward_mode_while_gradients_are_recorded_is_refused_with_what_to_do_instead(make) -> None:
    model = make()
    images, _ = random_batch(model)
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match=r"forward-mode .* torch\.no_grad\(\)"):
        model(fwAD.make_dual(images, images))


def test_torch_func_differentiates_a_probe_of_a_swin() -> None:
    model = LinearProbe(tiny_swin(), NUM_CLASSES).double()
    images, _ = random_batch(model)
    expected = torch.autograd.grad(model(images).sin().sum(), [model.head.weight])[0]

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"head.weight": weight}, (images,)).sin().sum()

    assert relative_error(torch.func.grad(loss)(model.head.weight.detach()), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("mapped", ["images", "prompts"])
def test_vmap_is_refused_without_gradients_too(mapped: str) -> None:
    model = build()
    images, _ = random_batch(model)

    def logits(images: Tensor, prompts: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"prompts": prompts}, (images,))

    arguments = {"images": images, "prompts": model.prompts.detach()}
    dims = tuple(0 if name == mapped else None for name in arguments)
    arguments[mapped] = torch.stack([arguments[mapped]] * 2)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap .*want the images as one batch"):
        torch.func.vmap(logits, in_dims=dims)(*arguments.values())


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_several_gradients_in_one_backward_pass_are_refused_with_what_to_do_instead(name: str) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(random_batch(model, 1)[0])[0]
    each = torch.eye(NUM_CLASSES, dtype=logits.dtype)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.* want one backward pass for each"):
        torch.autograd.grad(logits, trained, each, is_grads_batched=True)


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_second_derivatives_are_refused_when_they_are_asked_for(name: str) -> None:
    model = OUTSIDE_OF_AUTOGRAD[name]()
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(random_batch(model, 1)[0])
    # Not by the next pass: one for some of the gradients alone need not reach the blocks.
    with pytest.raises(NotImplementedError, match="second derivatives .*want create_graph=False"):
        torch.autograd.grad(logits.sum(), trained, create_graph=True)


def test_second_derivatives_that_pass_no_block_are_those_of_the_head() -> None:
    model = build()
    images, labels = random_batch(model)
    features = model.image_features(images).detach()
    found = []
    for logits in (model(images), model.head(features)):
        loss = F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, [model.head.weight], create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [model.head.weight])[0])
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")  # that it is deprecated, and that shapes are taken for constants
@pytest.mark.parametrize("make", OUTSIDE_OF_AUTOGRAD.values(), ids=OUTSIDE_OF_AUTOGRAD)
def test_jit_trace_gives_the_logits_without_gradients_and_is_refused_with_them(make) -> None:
    model = make().eval()
    images, _ = random_batch(model)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace .* want it under torch\.no_grad"):
        torch.jit.trace(model, images)
    with torch.no_grad():
        traced = torch.jit.trace(model, images, check_trace=False)
        assert torch.equal(traced(images + 1), model(images + 1))


@pytest.mark.filterwarnings("ignore")  # that it is deprecated
def test_torch_jit_script_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(NotImplementedError, match=r"compile a PromptedViT; want .* torch\.jit\.trace"):
        torch.jit.script(build())


@pytest.mark.parametrize("kind", [PromptedViT, PromptedSwin, PromptedConvNet])
def test_symbolic_tracing_is_refused_with_what_to_do_instead(kind) -> None:
    backbones = {PromptedViT: tiny_vit, PromptedSwin: tiny_swin}
    backbone = backbones[kind]() if kind in backbones else "resnet10t"
    with pytest.raises(ValueError, match=r"as torch\.fx\.symbolic_trace makes it; want torch\.export"):
        torch.fx.symbolic_trace(kind(backbone, 5, 4))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("scores", [1, 2**20], ids=["an image at a time", "all images at once"])
def test_traced_model_takes_batches_of_another_size(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(by_images.SCORES_AT_ONCE, "cpu", scores)
    model = build().eval()
    images, _ = random_batch(model, 3)
    traced = torch.jit.trace(model, images[:2], check_trace=False)
    for size in (1, 3):
        assert relative_error(traced(images[:size]), model(images[:size])) < 1e-12


def test_optimizers_of_timm_take_what_is_trained() -> None:
    model = PromptedViT(tiny_vit(torch.float32), NUM_CLASSES, 3)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    taken = {p for group in optimizer.param_groups for p in group["params"]}
    assert taken == {p for p in model.parameters() if p.requires_grad}


CONVNET = {"depths": [1] * 4, "dims": [8, 8, 16, 32], "img_size": 64}
LAYER_DECAY = {
    "vit": lambda: tiny_vit(torch.float32, class_token=False, global_pool="avg"),
    "rotary": lambda: tiny_eva(torch.float32),
    "trained_rotary": lambda: tiny_eva(torch.float32, rope_type="mixed"),
    "biased": lambda: tiny_beit(torch.float32),
    "swin": lambda: tiny_swin(torch.float32),
    "convnet": lambda: timm.create_model("convnext_atto", depths=[1] * 4, dims=[8, 8, 16, 32]),
}


def rates_of_timm(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Of each trained parameter, by its name in timm, the factor of its rate and its weight decay."""
    name_of = {}
    for name, parameter in model.named_parameters():
        for place in ("encoder.", "backbone.stem.", "backbone."):
            name = name.removeprefix(place)
        name_of[parameter] = name
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=0.5)
    return {
        name_of[p]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("backbone", LAYER_DECAY)
def test_fine_tuning_has_the_rates_and_decays_of_timm_s_own_model(backbone: str) -> None:
    network = LAYER_DECAY[backbone]()
    network.reset_classifier(NUM_CLASSES)
    expected, found = rates_of_timm(network), rates_of_timm(FullTuning(network, NUM_CLASSES))
    heads = [name for name in expected if name.startswith("head.fc.")]
    expected |= {name.replace("head.fc.", "head."): expected.pop(name) for name in heads}
    assert found == expected
    assert len(set(found.values())) > 3  # and not all in one layer


def test_layer_wise_rates_of_a_segmenter_s_backbone_are_those_of_a_classifier_s() -> None:
    vit = tiny_vit(torch.float32)
    expected = rates_of_timm(FullTuning(vit, NUM_CLASSES))
    found = rates_of_timm(PromptedSegmenter(vit, NUM_CLASSES, "full", head_channels=8))
    own = {name for name in expected if not name.startswith(("head.", "norm."))}  # its heads have the norms
    assert {name: found[name] for name in own} == {name: expected[name] for name in own}


@pytest.mark.parametrize("prompts", PROMPTS)
def test_layer_wise_rates_leave_prompts_and_head_at_the_full_one(prompts: str) -> None:
    model = PromptedViT("vit_tiny_patch16_224", NUM_CLASSES, img_size=32, **PROMPTS[prompts])
    rates = rates_of_timm(model)
    assert rates.keys() == TRAINED
    assert {scale for scale, _ in rates.values()} == {1.0}


ADDED_WITHIN = {
    "adapter_swin": lambda: AdapterTuning(tiny_swin(torch.float32), NUM_CLASSES),
    "adapter_convnet": lambda: AdapterTuning("convnext_atto", NUM_CLASSES, 4, **CONVNET),
    "lora": lambda: LoRATuning(tiny_vit(torch.float32), NUM_CLASSES, 2),
}


@pytest.mark.parametrize("method", ADDED_WITHIN)
def test_layer_wise_rates_leave_what_is_added_within_timm_s_blocks_at_the_full_one(method: str) -> None:
    rates = rates_of_timm(ADDED_WITHIN[method]())
    assert any("blocks" in name for name in rates)
    assert {scale for scale, _ in rates.values()} == {1.0}


def test_checkpointing_by_timm_s_name_is_the_policy_that_recomputes() -> None:
    model = PromptedViT(tiny_vit(torch.float32), NUM_CLASSES, 3)
    model.set_grad_checkpointing()
    assert model.memory_policy(2) == "recompute"
    model.set_grad_checkpointing(False)
    assert model.memory_policy(2) == "exact"
