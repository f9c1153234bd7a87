"""A whole model on a CUDA device in other people's hands: autocast, torch.compile, DDP, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from concatenation import relative_error
from tiny import random_batch, tiny_eva, tiny_vit

from vpt_fast import PromptedViT

pytestmark = pytest.mark.gpu

CLASSES = 5


def test_training_step_runs_under_autocast_and_grad_scaler() -> None:
    model = PromptedViT(tiny_vit(dtype=torch.float32).cuda(), CLASSES, 7).train()
    images, labels = (t.cuda() for t in random_batch(model, 4, CLASSES, torch.float32))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_compiled_model_gives_the_same_gradients() -> None:
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, depth=4).cuda()
    model = PromptedViT(vit, CLASSES, 50, dtype=torch.bfloat16)
    images = random_batch(model, 2, CLASSES, torch.float32)[0].cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    eager, compiled = (
        torch.autograd.grad(run(images).square().sum(), parameters)
        for run in (model, torch.compile(model, fullgraph=True))
    )
    for actual, expected in zip(compiled, eager, strict=True):
        assert relative_error(actual, expected) < 2e-2


@torch.no_grad()
def test_positions_of_a_new_image_size_are_complete_on_every_stream() -> None:
    eva = tiny_eva(torch.float32, dynamic_img_size=True).cuda()
    images, stream = torch.randn(2, 3, 48, 48, device="cuda"), torch.cuda.Stream()
    # Another model compiles the kernels: it would take longer than the stream is kept waiting.
    other, model = (PromptedViT(eva, CLASSES, 7).eval() for _ in range(2))
    other(images)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)  # cycles, before the positions are computed
        model(images)
    found = model(images)
    torch.cuda.synchronize()
    assert torch.equal(found, model(images))


DISTRIBUTED = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import vpt_fast
dist.init_process_group("nccl")
torch.cuda.set_device(0)
model = vpt_fast.PromptedViT("vit_tiny_patch16_224", 5, 7, dtype=torch.bfloat16).cuda()
images = torch.randn(2, 3, 224, 224, device="cuda")
model(images).sum().backward()
alone = model.prompts.grad.clone()
model.zero_grad()
DistributedDataParallel(model)(images).sum().backward()
assert torch.equal(model.prompts.grad, alone)
dist.destroy_process_group()
"""


def run_processes(number: int, source: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_distributed_data_parallel_on_one_gpu(tmp_path: Path) -> None:
    run_processes(1, DISTRIBUTED, tmp_path)


# NCCL takes one process a GPU. Two that share one exchange through gloo, which no graph can contain.
GRAPHED = """
import copy
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
import vpt_fast

dist.init_process_group(BACKEND)
torch.cuda.set_device(0)
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = vpt_fast.PromptedViT("vit_tiny_patch16_224", 5, 7, depth=2).cuda()
plain = copy.deepcopy(model)

def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.5, momentum=0.9, fused=True)

step = vpt_fast.GraphedStep(
    model, optimizer_of(model), cross_entropy, max_grad_norm=0.1, process_group=dist.group.WORLD
)
optimizer = optimizer_of(plain)
for _ in range(7):  # four of them past the capture
    images, labels = torch.randn(4, 3, 224, 224, device="cuda"), torch.randint(5, (4,), device="cuda")
    step(images.chunk(size)[rank], labels.chunk(size)[rank])
    optimizer.zero_grad()
    cross_entropy(plain(images), labels).backward()
    torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.1)
    optimizer.step()
for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("backend", "processes"), [("nccl", 1), ("gloo", 2)])
def test_processes_that_capture_their_steps_equal_one_that_does_not(
    backend: str, processes: int, tmp_path: Path
) -> None:
    run_processes(processes, GRAPHED.replace("BACKEND", repr(backend)), tmp_path)


SANITIZED = """
import torch
import vpt_fast
model = vpt_fast.PromptedViT("vit_tiny_patch16_224", 5, 7, depth=2, dtype=torch.bfloat16).cuda()
model(torch.randn(2, 3, 224, 224, device="cuda")).sum().backward()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_kernels_touch_no_memory_that_is_not_theirs() -> None:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Of memory alone: that a call of CUDA fails may be what its caller wants to know.
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", SANITIZED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]
