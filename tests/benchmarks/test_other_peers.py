"""The benchmark's peers of Swins, ConvNets and rotary ViTs compute the right thing, measured alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ceilings
import convnet_flops
import convnet_peers
import implementations
import peers
import pytest
import swin_flops
import swin_peers
import throughput
import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import assert_same_step, relative_error, step
from rich.console import Console
from test_flops import BATCH, CLASSES, ON_A_CPU
from test_swin import SIZES
from timm.models.swin_transformer import SwinTransformer
from tiny import tiny_convnet, tiny_eva, tiny_swin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSwin
from vpt_fast.prompts import pad_image

Build = Callable[[Any, dict[str, Tensor]], nn.Module]
TYPES = ("deep", "shallow")
WINDOWS = ("whole_windows", "padded_windows", "odd_image", "one_window", "three_stages")


def compiled(build: Build) -> Build:
    def make(backbone: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        torch._dynamo.reset()
        model = build(backbone, state)
        model.compile(backend="aot_eager", fullgraph=True)
        return model

    return make


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def batch_for(size: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(dtype), torch.arange(BATCH)


SWIN_PEERS: dict[str, Build] = {
    "reference": swin_peers.ConcatReference,
    "timm": swin_peers.ConcatTimm,
    "compiled": compiled(swin_peers.ConcatTimm),
    "checkpointed": swin_peers.ConcatCheckpointed,
}


@pytest.mark.parametrize(
    "peer, size, prompt_type",
    [
        *((peer, size, kind) for peer in ("reference", "timm") for size in WINDOWS for kind in TYPES),
        *(("checkpointed", "odd_image", kind) for kind in TYPES),
        ("compiled", "padded_windows", "deep"),
    ],
)
def test_peer_of_a_swin_equals_the_plain_definition(peer: str, size: str, prompt_type: str) -> None:
    swin = tiny_swin(**SIZES[size])
    state = doubled(swin_peers.initial_state(swin, 3, prompt_type, CLASSES))
    plain = ConcatenatedSwin(swin, CLASSES, 3, prompt_type).double().load_trainables(state)
    batch = batch_for(swin_peers.image_size(swin))
    assert_same_step(step(SWIN_PEERS[peer](swin, state), *batch), step(plain, *batch), 1e-9)


def test_tokens_that_fill_the_windows_are_not_copied_to_be_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    swin = tiny_swin(**SIZES["whole_windows"])
    peer = swin_peers.ConcatTimm(swin, doubled(swin_peers.initial_state(swin, 3, "deep", CLASSES)))
    images, _ = batch_for(swin_peers.image_size(swin))
    expected = peer(images)
    # timm's own layers pad with the module that is here replaced for the peer alone
    no_pad = SimpleNamespace(scaled_dot_product_attention=F.scaled_dot_product_attention)
    monkeypatch.setattr(swin_peers, "F", no_pad)
    torch.testing.assert_close(peer(images), expected)


CONVNET_PEERS: dict[str, Build] = {
    "timm": convnet_peers.ConcatTimm,
    "compiled": compiled(convnet_peers.ConcatTimm),
    "checkpointed": convnet_peers.ConcatCheckpointed,
}


class Bordered(nn.Module):
    """The plain definition: timm's network on the images with their border."""

    def __init__(self, backbone: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = [backbone]  # not a part: what is trained are prompts and head
        self.prompts, self.prompts_sides = (nn.Parameter(state[n]) for n in ("prompts", "prompts_sides"))
        self.head = peers.make_head(state)

    def forward(self, images: Tensor) -> Tensor:
        border = self.prompts.shape[2] // 2
        return self.head(self.backbone[0](pad_image(images, self.prompts, self.prompts_sides, border)))


@pytest.mark.parametrize(
    "peer, name",
    [("timm", "test_convnext"), ("timm", "test_resnet"), ("compiled", "test_resnet")]
    + [("checkpointed", "test_convnext")],
)
def test_peer_of_a_convnet_equals_the_plain_definition(peer: str, name: str) -> None:
    backbone = tiny_convnet(name).requires_grad_(False)
    state = doubled(convnet_peers.initial_state(backbone, 3, "shallow", CLASSES))
    batch = batch_for(convnet_peers.image_size(backbone))
    expected = step(Bordered(backbone, state), *batch)
    assert_same_step(step(CONVNET_PEERS[peer](backbone, state), *batch), expected, 1e-9)


def swin_state() -> tuple[nn.Module, dict[str, Tensor]]:
    swin = tiny_swin(**SIZES["odd_image"])
    return swin, doubled(swin_peers.initial_state(swin, 3, "deep", CLASSES))


def convnet_state() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = tiny_convnet("test_convnext")
    return backbone, doubled(convnet_peers.initial_state(backbone, 3, "shallow", CLASSES))


@pytest.mark.parametrize("family", [swin_state, convnet_state], ids=["swin", "convnet"])
@pytest.mark.parametrize("bound", ["no_prompts", "linear_probe", "full_finetuning"])
def test_a_bound_is_the_backbone_without_prompts(
    bound: str, family: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
) -> None:
    backbone, state = family()
    model = implementations.BOUNDS[bound](backbone, state)
    plain = nn.Sequential(copy.deepcopy(backbone).eval(), peers.make_head(state))
    batch = batch_for(implementations.family_of(backbone).peers.image_size(backbone))
    actual, expected = step(model, *batch), step(plain.eval(), *batch)
    assert relative_error(actual.logits, expected.logits) < 1e-9
    for name in ("weight", "bias"):
        gradient = expected.gradients[f"1.{name}"]
        assert relative_error(actual.gradients[f"head.{name}"], gradient) < 1e-9, name
    assert len(actual.gradients) == {"no_prompts": 3, "linear_probe": 2}.get(bound, len(expected.gradients))


def counted(model: nn.Module, size: tuple[int, int]) -> int:
    """Operations of one forward and backward pass."""
    images, labels = batch_for(size, torch.float32)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        F.cross_entropy(model.train()(images), labels).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", WINDOWS)
@pytest.mark.parametrize("prompt_type", TYPES)
def test_operations_with_prompts_in_windows(prompt_type: str, size: str) -> None:
    swin = tiny_swin(torch.float32, **SIZES[size]).requires_grad_(False)
    shape, setting = swin_flops.shape_of(swin), (7, prompt_type, BATCH, CLASSES)
    state = swin_peers.initial_state(swin, 7, prompt_type, CLASSES)
    pixels = swin_peers.image_size(swin)
    prompted, concatenated = PromptedSwin(swin, CLASSES, 7, prompt_type), swin_peers.ConcatTimm(swin, state)
    assert counted(prompted, pixels) == swin_flops.essential(shape, *setting)
    assert counted(concatenated, pixels) == swin_flops.concatenation(shape, *setting)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_operations_with_a_border(name: str) -> None:
    backbone = tiny_convnet(name).float().requires_grad_(False)
    work = convnet_flops.essential(convnet_flops.shape_of(backbone), 3, "shallow", BATCH, CLASSES)
    state = convnet_peers.initial_state(backbone, 3, "shallow", CLASSES)
    for model in (PromptedConvNet(backbone, CLASSES, 3), convnet_peers.ConcatTimm(backbone, state)):
        assert counted(model, (32, 32)) == work


@pytest.mark.parametrize("bound", ["no_prompts", "linear_probe", "full_finetuning"])
@pytest.mark.parametrize("size", ["whole_windows", "odd_image"])
def test_operations_of_a_swin_s_bounds(size: str, bound: str) -> None:
    swin = tiny_swin(torch.float32, **SIZES[size]).requires_grad_(False)
    assert_work_of_bound(bound, swin, swin_peers.initial_state(swin, 3, "deep", CLASSES))


@pytest.mark.parametrize("bound", ["no_prompts", "linear_probe", "full_finetuning"])
def test_operations_of_a_convnet_s_bounds(bound: str) -> None:
    # None of its convolutions has groups, which PyTorch's counter leaves out of a weight's gradient.
    backbone = tiny_convnet("test_resnet").float().requires_grad_(False)
    assert_work_of_bound(bound, backbone, convnet_peers.initial_state(backbone, 3, "shallow", CLASSES))


def assert_work_of_bound(bound: str, backbone: nn.Module, state: dict[str, Tensor]) -> None:
    family = implementations.family_of(backbone)
    if bound == "linear_probe":
        model: nn.Module = LinearProbe(backbone, CLASSES)
    else:
        model = implementations.BOUNDS[bound](backbone, state)
    work = getattr(family.flops, bound)(family.flops.shape_of(backbone), BATCH, CLASSES)
    assert counted(model, family.peers.image_size(backbone)) == work


def test_products_of_a_swin_are_those_of_all_blocks() -> None:
    products = swin_flops.block_products(swin_flops.shape_of(tiny_swin()), 3)
    stages = [(3 * 64, 16, 32), (3 * 16, 32, 64)]
    assert products == [
        product
        for rows, d, hidden in stages
        for product in 2 * [(rows, d, 3 * d), (rows, d, d), (rows, d, hidden), (rows, hidden, d)]
    ]


SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def small_swin(monkeypatch: pytest.MonkeyPatch) -> implementations.Setting:
    """A setting whose model, by its name, is `tiny_swin`."""
    tiny: SwinTransformer = tiny_swin(torch.float32)
    monkeypatch.setattr(implementations, "resolve_backbone", lambda *given, **kind: (tiny, None))
    return implementations.Setting(SWIN, 3, 2, "deep", "float32", image_size=32)


def rows_of(setting: implementations.Setting, names: list[str], memory: list[str]) -> list[throughput.Row]:
    those = throughput.entrants(names, memory)
    quiet = Console(quiet=True)
    return throughput.measure_setting(setting, those, torch.device("cpu"), 1, 1, quiet, ceiling_tflops=2.0)


def test_rows_of_a_swin_are_exact_under_every_policy(small_swin: implementations.Setting) -> None:
    names = ["vpt_fast", "concat_reference", "concat_timm", "concat_timm_checkpointed", "no_prompts"]
    rows = rows_of(small_swin, [*names, "linear_probe", "full_finetuning"], ["exact", "recompute"])
    assert [row.error for row in rows] == [None] * 8 and all(row.exact for row in rows)
    assert [row.rank is None for row in rows] == [False] * 5 + [True] * 3
    exact, recompute, *_ = rows
    assert recompute.kept_mib_per_image < exact.kept_mib_per_image < rows[3].kept_mib_per_image
    assert exact.share_of_shapes == pytest.approx(exact.essential_tflops / exact.shapes_tflops)


def test_angles_of_a_rotary_vit_are_not_rounded_for_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    eva = tiny_eva(torch.float32, rope_type="dinov3", rope_temperature=100)
    monkeypatch.setattr(implementations, "resolve_backbone", lambda *given, **kind: (eva, None))
    setting = implementations.Setting("vit_small_patch16_dinov3", 3, 2, "deep", "bfloat16", image_size=32)
    start = implementations.make_start(setting, torch.device("cpu"))
    assert peers.dtype_of(start.peer_backbone) == torch.bfloat16
    (exact,), (found,) = ({*peers.position_tables(vit, 0)[0].values()} for vit in (eva, start.peer_backbone))
    assert torch.equal(found, exact.bfloat16())
    rows = rows_of(setting, ["vpt_fast", "concat_timm", "no_prompts"], ["exact"])
    assert [row.error for row in rows] == [None] * 3 and all(row.exact for row in rows)


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
def test_rows_of_a_convnet_are_exact(model: str) -> None:
    setting = implementations.Setting(model, 3, 2, "shallow", "float32", image_size=32)
    names = ["vpt_fast", "concat_timm", "concat_timm_checkpointed", "no_prompts", "full_finetuning"]
    rows = rows_of(setting, names, ["exact"])
    assert [row.error for row in rows] == [None] * 5 and all(row.exact for row in rows)
    assert rows[0].kept_mib_per_image < rows[1].kept_mib_per_image
    assert rows[0].essential_gflop_per_image == rows[1].essential_gflop_per_image
    assert all(row.image_size == 32 and row.shapes_tflops is None for row in rows)


def test_a_swin_with_wrong_gradients_is_not_ranked(
    small_swin: implementations.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrongGradient(swin_peers.ConcatTimm):
        """Right logits, and prompts whose gradient is off by half a percent."""

        def block_prompts(self, prompts: Tensor, x: Tensor) -> Tensor:
            right = super().block_prompts(prompts, x)
            return right.detach() + 1.005 * (right - right.detach())

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "concat_wrong", implementations.peer(WrongGradient))
    wrong, right = rows_of(small_swin, ["concat_wrong", "concat_timm"], [])
    assert (wrong.exact, wrong.rank, right.rank) == (False, None, 1)
    assert wrong.gradient_error == pytest.approx(0.005, rel=0.01)


def test_what_is_measured_unasked_is_what_the_family_has() -> None:
    swin, convnet = (implementations.family_of(name) for name in (SWIN, "convnext_base"))
    of_swin = throughput.chosen_entrants([], [], swin, on_gpu=True)
    of_convnet = throughput.chosen_entrants([], [], convnet, on_gpu=True)
    assert [entry.memory for entry in of_swin if entry.name == "vpt_fast"] == list(swin.memory)
    assert [entry.memory for entry in of_convnet if entry.name == "vpt_fast"] == ["exact"]
    assert "vpt_fast_sdpa_flash" not in {entry.name for entry in (*of_swin, *of_convnet)}
    assert "concat_reference" in {entry.name for entry in of_swin}
    assert "concat_reference" not in {entry.name for entry in of_convnet}


def test_each_model_of_a_run_has_its_family_s_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []

    def measure_setting(setting: implementations.Setting, *rest: Any) -> list[throughput.Row]:
        measured.append((setting.prompt_type, setting.num_prompts))
        return [throughput.Row(setting.model, 1, 1, "deep", "float32", 224, "concat_timm", None, 1)]

    monkeypatch.setattr(throughput, "measure_setting", measure_setting)
    monkeypatch.setattr(ceilings, "large_product", lambda *where: 0.5)
    output = str(tmp_path / "report.json")
    throughput.main(models=f"{SWIN},convnext_base", device="cpu", output=Path(output))
    assert measured == [("deep", 100), ("shallow", 10)]
