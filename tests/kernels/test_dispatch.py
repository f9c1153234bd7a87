"""Which implementation of the operations a name, a device and a shape come to."""

from __future__ import annotations

import pytest
import torch
from vpt_fast.kernels import Backend, dispatch, get_backend, launch
from vpt_fast.kernels.dispatch import TORCH_OPS

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def a_driver(monkeypatch) -> None:
    """Of a GPU, which Triton finds."""
    monkeypatch.setattr(dispatch, "require_driver", lambda: None)


def test_unknown_backend_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'cuda'.*'torch'"):
        get_backend("cuda")


def test_unknown_attention_names_the_choices() -> None:
    with pytest.raises(ValueError, match="attention: got 'flash'.*'flash_attn'.*'sdpa_cudnn'"):
        get_backend("auto", "flash")


def test_triton_without_a_cuda_device_is_refused_and_not_replaced(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend='triton': there is no CUDA device here"):
        get_backend("triton")


def test_triton_stands_for_its_kernels_on_every_device(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (8, 0))
    backend = get_backend("triton")
    assert backend.ops(GPU, torch.bfloat16, 64).name == "triton"
    assert backend.ops(torch.device("cpu"), torch.float32, 64).name == "triton"


def test_torch_stands_for_pytorch_on_every_device(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    assert get_backend("torch").ops(GPU, torch.bfloat16, 64).name == "torch"


@pytest.fixture
def auto(monkeypatch) -> Backend:
    """Where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return get_backend("auto")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_products_hold_the_activation_where_that_is_faster(auto, monkeypatch, backend) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    ops = get_backend(backend).ops
    found = [ops(GPU, dtype, 64).name for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert found == ["triton_fused_mlp", "triton_fused_mlp", "triton"]
    assert ops(GPU, torch.bfloat16, 64, in_windows=True).name == "triton"
    assert ops(GPU, torch.bfloat16, 64, is_gated=True).name == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_on_a_gpu_is_triton_but_for_what_it_does_not_support(auto, monkeypatch, capability) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    assert auto.ops(GPU, torch.bfloat16, 64).name == "triton"
    assert auto.ops(GPU, torch.bfloat16, 32, in_windows=True).name == "triton"
    others = (
        (torch.device("cpu"), torch.bfloat16, 64),
        (GPU, torch.float64, 64),
        (GPU, torch.float32, 76),
        (GPU, torch.float32, 16, True),
    )
    for request in others:
        assert auto.ops(*request).name == "torch"


def test_auto_on_a_gpu_older_than_triton_takes_is_pytorch(auto, monkeypatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (7, 5))
    assert auto.ops(GPU, torch.float16, 64).name == "torch"


def test_auto_on_a_gpu_of_amd_is_pytorch(auto, monkeypatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert auto.ops(GPU, torch.float16, 64).name == "torch"


@pytest.mark.parametrize("recording", [(torch.compiler, "is_exporting"), (torch.jit, "is_tracing")])
def test_auto_on_a_gpu_is_pytorch_while_a_model_is_exported(auto, monkeypatch, recording) -> None:
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(*recording, lambda: True)
    assert auto.ops(GPU, torch.bfloat16, 64).name == "torch"
    assert auto.ops(GPU, torch.bfloat16, 32, in_windows=True).name == "torch"


def test_named_attention_takes_the_place_of_the_backend_s_own() -> None:
    ops = get_backend("torch", "sdpa_cpu").other
    assert ops.needs_out and ops.normalize is TORCH_OPS.normalize and ops.attention is not TORCH_OPS.attention
