"""The benchmark's peers compute the right thing, and its report says what it should."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings
import find_batch
import flops
import implementations
import measure
import operations
import peers
import pytest
import reports
import throughput
import torch
import typer
from concatenation import ConcatenatedViT, assert_same_step, relative_error, step
from peers import ViT
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_beit, tiny_eva, tiny_vit
from torch import Tensor, nn
from typer.testing import CliRunner
from vpt_fast.kernels.launch import MAX_ALONG_AXIS

from vpt_fast import PromptedViT

NUM_CLASSES = 5
APP = typer.Typer()
APP.command()(throughput.main)


def compiled(vit: ViT, state: dict[str, Tensor]) -> nn.Module:
    model = peers.ConcatTimm(vit, state)
    model.compile(backend="aot_eager", fullgraph=True)
    return model


PEERS: dict[str, Callable[[ViT, dict[str, Tensor]], nn.Module]] = {
    "concat_reference": peers.ConcatReference,
    "concat_timm": peers.ConcatTimm,
    "concat_timm_compiled": compiled,
    "concat_timm_checkpointed": peers.ConcatCheckpointed,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "registers": {"reg_tokens": 2},
    "average": {"global_pool": "avg", "class_token": False},
    "attention_pool": {"global_pool": "map", "class_token": False},
}
EVAS: dict[str, dict[str, Any]] = {
    "no_angles": {"use_rot_pos_emb": False},
    "dinov3": {"rope_type": "dinov3", "num_reg_tokens": 2, "dynamic_img_size": True},
    "mixed": {"rope_type": "mixed", "attn_type": "rope", "global_pool": "token"},
}
BEITS: dict[str, dict[str, Any]] = {
    "biased": {},
    "cls_of_biased": {"global_pool": "token", "use_abs_pos_emb": True},
    "unbiased": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
}
WITHOUT_OFFICIAL_CODE = [*EVAS, *BEITS]


def variant_of(name: str) -> ViT:
    if name in EVAS:
        return tiny_eva(**EVAS[name])
    return tiny_beit(**BEITS[name]) if name in BEITS else tiny_vit(**VARIANTS[name])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1])


def state_for(vit: ViT, prompt_type: str) -> dict[str, Tensor]:
    state = peers.initial_state(vit, 4, prompt_type, NUM_CLASSES)
    return {name: tensor.double() for name, tensor in state.items()}


OF_OFFICIAL_CODE = [("concat_reference", "deep"), ("concat_reference", "shallow")]
EAGER = [("concat_timm", "deep"), ("concat_timm", "shallow"), ("concat_timm_checkpointed", "deep")]
# Compiled ones take seconds: where a row alone is pooled, where all are, and with either kind of positions.
COMPILED = ("registers", "attention_pool", "dinov3", "biased")


@pytest.mark.parametrize(
    "peer, prompt_type, variant",
    [
        *((*peer, variant) for variant in VARIANTS for peer in OF_OFFICIAL_CODE + EAGER),
        *((*peer, variant) for variant in WITHOUT_OFFICIAL_CODE for peer in EAGER),
        *(("concat_timm_compiled", "deep", variant) for variant in COMPILED),
    ],
)
def test_peer_equals_the_plain_definition(peer: str, prompt_type: str, variant: str) -> None:
    torch._dynamo.reset()
    vit = variant_of(variant)
    state = state_for(vit, prompt_type)
    plain = ConcatenatedViT(vit, NUM_CLASSES, 4, prompt_type).double().load_trainables(state)
    model = PEERS[peer](vit, state).double()
    assert_same_step(step(model, *batch()), step(plain, *batch()), 1e-9)


BOUNDS = {
    "no_prompts": peers.NoPrompts,
    "linear_probe": peers.LinearProbe,
    "full_finetuning": peers.FullFineTuning,
}


@pytest.mark.parametrize("variant", [*VARIANTS, *WITHOUT_OFFICIAL_CODE])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_is_the_backbone_without_prompts(bound: str, variant: str) -> None:
    vit = variant_of(variant)
    state = state_for(vit, "deep")
    images, labels = batch()
    plain = nn.Sequential(copy.deepcopy(vit), peers.make_head(state))
    actual, expected = step(BOUNDS[bound](vit, state), images, labels), step(plain, images, labels)
    assert relative_error(actual.logits, expected.logits) < 1e-9
    names = {"head.weight": "1.weight", "head.bias": "1.bias"}
    if bound == "full_finetuning":
        names = {n: n.replace("backbone", "0").replace("head", "1") for n in actual.gradients}
        assert len(names) == len(expected.gradients)
    for name, plain_name in names.items():
        assert relative_error(actual.gradients[name], expected.gradients[plain_name]) < 1e-9, name


def test_no_prompts_sends_a_gradient_through_every_block() -> None:
    vit = tiny_vit()
    model = peers.NoPrompts(vit, state_for(vit, "deep")).double()
    reached: list[int] = []
    for index, block in enumerate(model.backbone.blocks):
        block.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    step(model, *batch())
    assert sorted(reached) == [0, 1, 2]


FROZEN = [
    peers.ConcatReference,
    peers.ConcatTimm,
    peers.ConcatCheckpointed,
    peers.NoPrompts,
    peers.LinearProbe,
]


@pytest.mark.parametrize("build", FROZEN)
def test_a_peer_shares_the_frozen_weights_and_trains_nothing_of_them(build: type) -> None:
    vit = tiny_vit()
    model = build(vit, state_for(vit, "deep"))
    shared = {name: p for name, p in model.named_parameters() if name.startswith("backbone.")}
    assert all(vit.get_parameter(name.removeprefix("backbone.")) is p for name, p in shared.items())
    assert not any(p.requires_grad for p in shared.values())


def test_full_finetuning_trains_a_copy() -> None:
    vit = tiny_vit()
    before = copy.deepcopy(vit.state_dict())
    model = peers.FullFineTuning(vit, state_for(vit, "deep"))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    step(model, *batch())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def kept(model: nn.Module, vit: VisionTransformer) -> int:
    images, labels = batch()
    return measure.kept_for_backward(measure.Contender("", model, model), images.to(vit.cls_token), labels)


def test_kept_bytes_of_concatenation_equal_the_closed_form() -> None:
    vit = tiny_vit(torch.float32)
    model = peers.ConcatTimm(vit, peers.initial_state(vit, 4, "deep", NUM_CLASSES))
    rows, width, hidden, heads, blocks, images = 3 * (17 + 4), 32, 64, 2, 3, 3
    # Each block: the inputs of both norms with mean and 1/σ, Q, K, V, attention's output and log-sum-exp, and
    # the MLP's pre-activation. After them: the final norm's input, all of which one row is a view of, its
    # statistics, the head's input, and the loss's logarithms and weight.
    block = rows * (2 * (width + 2) + 3 * width + width + heads + hidden)
    after = rows * width + images * (2 + width + NUM_CLASSES) + 1
    assert kept(model, vit) == 4 * (blocks * block + after)


def test_kept_bytes_of_checkpointing_are_the_blocks_inputs() -> None:
    vit = tiny_vit(torch.float32)
    model = peers.ConcatCheckpointed(vit, peers.initial_state(vit, 4, "deep", NUM_CLASSES))
    rows, width, blocks, images = 3 * (17 + 4), 32, 3, 3
    after = rows * width + images * (2 + width + NUM_CLASSES) + 1
    assert kept(model, vit) == 4 * (blocks * rows * width + after)


@pytest.mark.parametrize("memory", ["exact", "compact", "recompute_mlp", "recompute"])
def test_kept_bytes_of_vpt_fast_are_its_estimate_and_the_loss_s(memory: str) -> None:
    vit = tiny_vit(torch.float32)
    model = PromptedViT(vit, NUM_CLASSES, 4, memory=memory).train()
    images = 3
    loss = images * NUM_CLASSES + 1  # logarithms and weight
    assert kept(model, vit) == model.estimate_training_bytes(images)["kept"] + 4 * loss


def test_kept_bytes_are_counted_once_a_storage_and_without_weights() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 5))

        def forward(self, images: Tensor) -> Tensor:
            x = images @ self.weight  # keeps images (given) and, for nothing, no weight: left out
            return (x * x) + x.flatten().view_as(x) ** 2  # keeps x: 4 x 5 floats, under several views

    model = Squares()
    contender = measure.Contender("squares", model, model)
    contender.loss = lambda images, labels: contender.run(images).sum()  # type: ignore[method-assign]
    assert measure.kept_for_backward(contender, torch.randn(4, 10), torch.zeros(4)) == 4 * 5 * 4


def test_gradient_error_is_the_worst_tensors_and_never_nan() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert measure.gradient_error({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}, expected) == 0.1
    wrong = {"a": torch.tensor([3.0, float("nan")]), "b": torch.tensor([1.0])}
    assert measure.gradient_error(wrong, expected) == float("inf")
    assert measure.gradient_error({"a": expected["a"]}, expected) == float("inf")
    zero = {"a": torch.zeros(2), "b": torch.tensor([1.0])}
    assert measure.gradient_error(zero, zero) == 0
    assert measure.gradient_error(expected, zero) == float("inf")


class WrongGradient(peers.ConcatTimm):
    """Right logits, and prompts whose gradient is off by half a percent."""

    def block_prompts(self, block: int, x: Tensor) -> Tensor:
        prompts = super().block_prompts(block, x)
        return prompts.detach() + 1.005 * (prompts - prompts.detach())


SETTING = implementations.Setting("test_vit", 3, 2, "deep", "float32", image_size=32)


def measured(names: list[str], memory: str = "exact") -> list[throughput.Row]:
    those = throughput.entrants(names, memory.split(","))
    return throughput.measure_setting(
        SETTING, those, torch.device("cpu"), 1, 1, Console(quiet=True), ceiling_tflops=2.0
    )


def test_the_rounding_of_compact_s_codes_is_right_in_float32_too() -> None:
    (row,) = measured(["vpt_fast"], "compact")
    assert row.exact and row.gradient_error > implementations.EXACT_BELOW["float32"]


def make_row(implementation: str, **values: Any) -> throughput.Row:
    """A row as the measuring makes it, with some of its values changed."""
    usual = {"model": "vit_base_patch16_224", "num_prompts": 3, "batch_size": 8, "prompt_type": "deep"}
    usual |= {"dtype": "float32", "image_size": 224, "impl": implementation, "memory": None, "repeats": 5}
    return throughput.Row(**{**usual, **values})


def test_a_failing_gradient_check_takes_the_rank_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "concat_wrong", implementations.peer(WrongGradient))
    rows = {row.impl: row for row in measured(["vpt_fast", "concat_wrong", "concat_timm"])}
    assert not rows["concat_wrong"].exact
    assert rows["concat_wrong"].rank is None
    assert rows["concat_wrong"].gradient_error == pytest.approx(0.005, rel=0.01)
    assert rows["vpt_fast"].exact and rows["concat_timm"].exact
    assert {rows["vpt_fast"].rank, rows["concat_timm"].rank} == {1, 2}
    text = io.StringIO()
    Console(file=text, width=200).print(throughput.make_table(list(rows.values()), "float32"))
    (line,) = [line for line in text.getvalue().splitlines() if "concat_wrong" in line]
    assert "WRONG" in line and "5.0e-03" in line


@pytest.mark.parametrize(
    ("implementation", "values", "is_ours"),
    [
        ("vpt_fast_graphed", dict(images_per_second=1.0, exact=False), True),
        ("vpt_fast", dict(images_per_second=1.0, exact=True), False),
        ("vpt_fast", dict(images_per_second=1.0, exact=False, error="not checked: no definition"), False),
        ("vpt_fast", dict(exact=False, error="CUDA out of memory"), False),
        ("vpt_fast_graphed", dict(exact=False, error="CaptureError: not permitted"), True),
        ("vpt_fast_cute", dict(exact=False, error="ValueError: not installed"), False),
        ("concat_timm", dict(images_per_second=1.0, exact=False), False),
    ],
)
def test_wrong_gradients_of_vpt_fast_are_a_failure_and_so_is_one_that_does_not_run(
    implementation, values, is_ours
) -> None:
    assert throughput.is_our_mistake(make_row(implementation, **values)) == is_ours


def test_the_command_fails_where_vpt_fast_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.LARGE, "cpu", 128)
    wrong = implementations.peer(WrongGradient)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "vpt_fast_wrong", wrong)
    arguments = "--models test_vit --image-size 32 --num-prompts 3 --batch-size 2 --repeats 1 --device cpu"
    chosen = ["--implementations", "vpt_fast_wrong,concat_timm", "--output", str(tmp_path / "report.json")]
    result = CliRunner().invoke(APP, [*arguments.split(), *chosen])
    assert result.exit_code == 1
    assert "failed, or wrong gradients: vpt_fast_wrong" in result.output
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 2


def test_a_gpus_longest_row_is_printed_whole() -> None:
    name = max(implementations.ON_A_GPU, key=len)
    row = make_row(
        name, memory="recompute_mlp", dtype="amp", exact=True, rank=10, images_per_second=10_000.0,
        images_per_second_min=10_000.0, images_per_second_max=10_000.0, forward_ms=100.0, backward_ms=100.0,
        optimizer_ms=100.0, peak_mib=100_000.0, kept_mib_per_image=1000.0, largest_batch=65_535,
        share_of_ceiling=0.5, gradient_error=1e-2,
    )  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=throughput.TABLE_WIDTH).print(throughput.make_table([row], "bfloat16"))
    assert f"{name}, recompute_mlp, amp" in text.getvalue()
    assert "…" not in text.getvalue()


class GraphOnCPU:
    """In GraphedStep's place: ordinary steps, three of them, and then `replay`, an ordinary one, too.

    `model`, `optimizer` and `images` are what the last one was given.
    """

    last: GraphOnCPU

    def __init__(self, model: nn.Module, optimizer: Any, loss: Any, *, autocast_dtype: Any) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.steps = 0
        GraphOnCPU.last = self

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.steps += 1
        return self.step(images, labels) if self.steps <= 3 else self.replay(images, labels)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.step(images, labels)


class NothingIsReplayed(GraphOnCPU):
    """Its warm-up is right."""

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(())


class NothingIsComputed(NothingIsReplayed):
    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("broken", [NothingIsReplayed, NothingIsComputed])
def test_a_graph_whose_replay_is_wrong_is_marked_and_not_ranked(
    broken: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "GraphedStep", broken)
    row, other = measured(["vpt_fast_graphed", "vpt_fast"])
    assert (row.exact, row.rank, throughput.place(row)) == (False, None, "WRONG")
    assert other.rank == 1


def graphed(monkeypatch: pytest.MonkeyPatch, name: str) -> measure.Contender:
    monkeypatch.setattr(measure, "GraphedStep", GraphOnCPU)
    start = implementations.make_start(SETTING, torch.device("cpu"))
    return implementations.IMPLEMENTATIONS[name](name, start)


def test_a_graph_s_gradients_are_those_of_its_second_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = graphed(monkeypatch, "vpt_fast_graphed")
    plain = dataclasses.replace(contender, graphed=False)
    those = torch.randn(2, 3, 32, 32), torch.tensor([3, 1])
    found, expected = (measure.gradients(each, *those) for each in (contender, plain))
    assert GraphOnCPU.last.steps == 5
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_checking_a_graph_moves_no_weights_and_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    contender = graphed(monkeypatch, "vpt_fast_graphed")
    before = copy.deepcopy(contender.model.state_dict())
    measure.gradients(contender, torch.randn(2, 3, 32, 32), torch.tensor([3, 1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in contender.model.state_dict().items())
    assert not contender.optimizer.state and contender.graph is None


def test_what_is_captured_of_a_compiled_peer_is_its_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, *, mode, **options: compile_(model, backend="aot_eager", **options)
    )
    contender = graphed(monkeypatch, "concat_timm_compiled_graphed")
    contender.step(torch.randn(2, 3, 32, 32), torch.tensor([3, 1]))
    assert GraphOnCPU.last.model is contender.run is not contender.model


def test_bounds_are_measured_by_their_own_work_and_not_ranked() -> None:
    rows = measured(["no_prompts", "linear_probe", "full_finetuning"])
    assert all(row.exact and row.images_per_second is not None and row.rank is None for row in rows)
    work = [row.essential_gflop_per_image for row in rows]
    assert work[1] < work[0] < work[2]


def test_every_row_of_a_setting_has_the_same_essential_work() -> None:
    rows = measured(["vpt_fast", "concat_timm", "concat_reference"])
    shape = implementations.make_start(SETTING, torch.device("cpu")).shape
    work = flops.essential(shape, 3, "deep", 2, implementations.NUM_CLASSES)
    for row in rows:
        assert row.essential_gflop_per_image == pytest.approx(work / 2 / 1e9)
        assert row.essential_tflops == pytest.approx(work / 2 / 1e12 * row.images_per_second)
        assert row.share_of_ceiling == pytest.approx(row.essential_tflops / 2.0)
        assert row.share_of_shapes == pytest.approx(row.essential_tflops / row.shapes_tflops)


def test_memory_policies_are_rows_of_vpt_fast_alone() -> None:
    rows = measured(["vpt_fast", "concat_timm"], memory="exact,recompute")
    assert [(row.impl, row.memory) for row in rows] == [
        ("vpt_fast", "exact"),
        ("vpt_fast", "recompute"),
        ("concat_timm", None),
    ]
    assert rows[1].kept_mib_per_image < rows[0].kept_mib_per_image


def test_an_implementation_may_have_a_precision_of_its_own() -> None:
    device = torch.device("cpu")
    start = implementations.make_start(dataclasses.replace(SETTING, dtype="bfloat16"), device)
    names = ["vpt_fast", "concat_timm", "concat_reference", "concat_timm_amp", "full_finetuning"]
    made = {name: implementations.IMPLEMENTATIONS[name](name, start) for name in names}
    assert {name: contender.precision for name, contender in made.items()} == {
        "vpt_fast": "bfloat16",
        "concat_timm": "bfloat16",
        "concat_reference": "float32",
        "concat_timm_amp": "amp",
        "full_finetuning": "amp",
    }


def test_models_of_vpt_fast_share_one_folded_copy_of_the_weights() -> None:
    start = implementations.make_start(SETTING, torch.device("cpu"))
    names = ["vpt_fast", "vpt_fast_torch", "linear_probe"]
    first, *others = (implementations.IMPLEMENTATIONS[name](name, start).model for name in names)
    held = {p.data_ptr() for p in first.parameters() if not p.requires_grad}
    for model in others:
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == held
        assert not held & {p.data_ptr() for p in model.parameters() if p.requires_grad}


def test_an_implementation_that_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory(peers.ConcatTimm):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("80 GiB wanted")

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "concat_large", implementations.peer(OutOfMemory))
    row, other = measured(["concat_large", "concat_timm"])
    assert (row.images_per_second, row.kept_mib_per_image, row.rank) == (None, None, None)
    assert "80 GiB wanted" in row.error
    assert find_batch.ran_out_of_memory(row.error)
    assert other.rank == 1
    text = io.StringIO()
    Console(file=text, width=140).print(throughput.make_table([row, other], "float32"))
    assert "concat_large: OutOfMemoryError: 80 GiB wanted" in text.getvalue()


def test_an_implementation_that_fails_in_a_later_round_has_no_times() -> None:
    start = implementations.make_start(SETTING, torch.device("cpu"))
    contender = implementations.IMPLEMENTATIONS["concat_timm"]("concat_timm", start)
    contender.times = [measure.StepTimes(1.0, 1.0, 1.0)]
    with contender.turn(torch.device("cpu")):
        raise RuntimeError("lost")
    assert (contender.error, contender.times) == ("RuntimeError: lost", [])


def test_the_time_of_a_step_is_that_of_its_parts() -> None:
    assert measure.StepTimes(forward=1.0, backward=2.0, optimizer=4.0).total == 7.0


def large_definition(*given: Any) -> nn.Module:
    raise torch.OutOfMemoryError("80 GiB wanted")


def test_what_there_is_no_definition_of_is_timed_and_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "DEFINITION", large_definition)
    (row,) = measured(["concat_timm"])
    assert (row.exact, row.rank, throughput.place(row)) == (False, None, "unchecked")
    assert row.images_per_second > 0
    assert row.error == "gradients not checked, float64: OutOfMemoryError: 80 GiB wanted"


def test_a_definition_that_fails_leaves_rows_of_others_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(throughput, "DEFINITION", large_definition)
    assert [row.exact for row in measured(["concat_timm", "no_prompts"])] == [False, True]


def test_no_definition_is_there_when_a_contender_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def build(*given: Any) -> nn.Module:
        made.append(weakref.ref(model := implementations.DEFINITION(*given)))
        return model

    class Recorded(peers.ConcatTimm):
        def forward(self, images: Tensor) -> Tensor:
            alive.append(sum(model() is not None for model in made))
            return super().forward(images)

    monkeypatch.setattr(throughput, "DEFINITION", build)
    start = implementations.make_start(SETTING, torch.device("cpu"))
    throughput.check_gradients([implementations.peer(Recorded)("concat_recorded", start)], start)
    assert (len(made), alive) == (1, [0])


def test_an_implementation_that_cannot_be_built_is_a_row_with_its_reason() -> None:
    row, other = measured(["vpt_fast_flash_attn_4", "vpt_fast"])
    assert (row.impl, row.memory, row.rank, row.images_per_second) == (
        "vpt_fast_flash_attn_4",
        "exact",
        None,
        None,
    )
    assert "flash_attn" in row.error
    assert other.rank == 1


@pytest.mark.parametrize("batch_size, distinct", [(1, 1), (3, 1), (6, 2)])
def test_gradients_are_checked_on_a_whole_batch_of_few_images(batch_size: int, distinct: int) -> None:
    setting = dataclasses.replace(SETTING, batch_size=batch_size)
    start = implementations.make_start(setting, torch.device("cpu"))
    seen: list[Tensor] = []

    class Recorded(peers.ConcatTimm):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    contender = implementations.peer(Recorded)("concat_recorded", start)
    throughput.check_gradients([contender], start)
    (images,) = seen
    assert len(images) == batch_size and len(images.unique(dim=0)) == distinct
    assert contender.gradient_error < 1e-5


@pytest.mark.parametrize("limit, first", [(1, 64), (37, 8), (63, 64), (64, 64), (200, 8), (1000, 64)])
def test_the_largest_batch_is_found(limit: int, first: int) -> None:
    tried: list[int] = []

    def fits(batch_size: int) -> bool:
        tried.append(batch_size)
        return batch_size <= limit

    found = find_batch.largest(fits, first)
    assert found in tried and found <= limit and limit - found <= limit // 32
    assert len(tried) == len(set(tried)) <= 16


def test_no_larger_batch_is_tried_than_attention_takes() -> None:
    assert find_batch.largest(lambda batch_size: True, 64) == MAX_ALONG_AXIS


def test_no_batch_at_all_may_fit() -> None:
    assert find_batch.largest(lambda batch_size: False, 64) == 0


class NeedsMemory(peers.ConcatTimm):
    """Out of memory with more than 5 images; other trouble with more than 20."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 20:
            raise ValueError("more than 20")
        if len(images) > 5:
            raise torch.OutOfMemoryError("more than 5")
        return super().forward(images)


def test_the_search_for_a_batch_takes_steps_until_memory_runs_out() -> None:
    device = torch.device("cpu")
    start = implementations.make_start(SETTING, device)
    build = implementations.peer(NeedsMemory)
    assert find_batch.largest_batch(lambda own: build("", own), start, device) == 5
    start = dataclasses.replace(start, setting=dataclasses.replace(SETTING, batch_size=32))
    with pytest.raises(RuntimeError, match="batch 32: ValueError: more than 20"):
        find_batch.largest_batch(lambda own: build("", own), start, device)


def test_the_command_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.LARGE, "cpu", 128)
    output = tmp_path / "report.json"
    arguments = "--models test_vit --image-size 32 --num-prompts 3 --batch-size 2 --repeats 2 --device cpu"
    names = ["vpt_fast", "concat_reference", "concat_timm", "no_prompts"]
    result = CliRunner().invoke(
        APP, [*arguments.split(), "--implementations", ",".join(names), "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert list(tmp_path.iterdir()) == [output]
    assert report.keys() == {
        "device", "torch", "triton", "timm", "cuda", "date", "dtype", "image_size", "repeats", "steps",
        "ceiling_tflops", "rows",
    }  # fmt: skip
    assert report["torch"] == torch.__version__
    assert [row["impl"] for row in report["rows"]] == names
    fields = {field.name for field in dataclasses.fields(throughput.Row)}
    for row in report["rows"]:
        assert row.keys() == fields
        assert row["exact"] is True
        assert row["images_per_second_min"] <= row["images_per_second"] <= row["images_per_second_max"]
        assert row["kept_mib_per_image"] > 0
        assert row["essential_tflops"] / report["ceiling_tflops"] == pytest.approx(row["share_of_ceiling"])
        assert row["peak_mib"] is None and row["largest_batch"] is None  # not known on a CPU: never invented
        assert row["error"] is None


def test_the_same_command_measures_what_is_missing_and_fresh_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure_setting(setting: implementations.Setting, *rest: Any) -> list[throughput.Row]:
        if setting.num_prompts == stops_at:
            raise KeyboardInterrupt
        measured.append(setting.num_prompts)
        return [make_row("concat_timm", num_prompts=setting.num_prompts, batch_size=setting.batch_size)]

    monkeypatch.setattr(throughput, "measure_setting", measure_setting)
    monkeypatch.setattr(ceilings, "large_product", lambda *where: 0.5)
    output = tmp_path / "report.json"
    arguments = ["--num-prompts", "1,2,3", "--implementations", "concat_timm", "--device", "cpu"]

    def run(*more: str) -> list[int]:
        CliRunner().invoke(APP, [*arguments, "--output", str(output), *more])
        return [row["num_prompts"] for row in json.loads(output.read_text())["rows"]]

    stops_at = 3
    assert run() == [1, 2]
    stops_at = 0
    assert run() == run() == [1, 2, 3]
    assert measured == [1, 2, 3]
    assert run("--fresh") == [1, 2, 3]
    assert measured == [1, 2, 3, 1, 2, 3]


def rows_after(
    path: Path, monkeypatch: pytest.MonkeyPatch, *runs: list[str]
) -> list[tuple[int, str, str | None]]:
    """Prompts, implementation and policy of the rows that the file holds after some runs, none of them
    timed."""

    def measure_setting(
        setting: implementations.Setting, those: list[throughput.Entrant], *rest: Any
    ) -> list[throughput.Row]:
        of = {"num_prompts": setting.num_prompts, "batch_size": setting.batch_size}
        return [make_row(entrant.name, memory=entrant.memory, **of) for entrant in those]

    monkeypatch.setattr(throughput, "measure_setting", measure_setting)
    monkeypatch.setattr(ceilings, "large_product", lambda *where: 0.5)
    for flags in runs:
        found = CliRunner().invoke(APP, [*flags, "--device", "cpu", "--output", str(path)])
        assert found.exit_code == 0, found.output
    return [(row["num_prompts"], row["impl"], row["memory"]) for row in json.loads(path.read_text())["rows"]]


@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["", "fresh"])
def test_rows_of_settings_that_are_not_asked_for_stay(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [["--implementations", "concat_timm", "--num-prompts", m, *flags] for m in ("1,2", "3", "2")]
    found = rows_after(tmp_path / "report.json", monkeypatch, *runs)
    assert sorted(found) == [(m, "concat_timm", None) for m in (1, 2, 3)]


@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["", "fresh"])
def test_implementations_that_are_not_asked_for_are_measured_again_beside_those_that_are(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [["--implementations", name, "--num-prompts", "1"] for name in ("concat_timm", "vpt_fast")]
    found = rows_after(tmp_path / "report.json", monkeypatch, runs[0], [*runs[1], *flags])
    assert sorted(found) == [(1, "concat_timm", None), (1, "vpt_fast", "exact")]


def test_the_default_file_s_name_has_what_its_rows_have_in_common() -> None:
    header = {"device": "AMD EPYC", "date": "2026-11-26", "dtype": "float32", "image_size": 384}
    path = throughput.open_report(None, header, [], fresh=False).path
    assert path.name == "float32-384-pixels-amd-epyc-2026-11-26.json"


def test_what_a_killed_run_was_writing_is_not_left_beside_the_results(tmp_path: Path) -> None:
    (tmp_path / ".report.json.abcd1234.json").touch()
    reports.output_path(tmp_path / "report.json", {"device": ""}, throughput.Row, "throughput")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = CliRunner().invoke(APP, ["--device", device])
    assert found.exit_code == 2 and f"device: got '{device}'" in found.output


def test_what_is_named_twice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--implementations", "concat_timm,concat_timm", "--num-prompts", "1,1"]
    found = rows_after(tmp_path / "report.json", monkeypatch, flags)
    assert found == [(1, "concat_timm", None)]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--models", "vit_base_patch16_225"], "models: got 'vit_base_patch16_225', want timm's name"),
        (["--models", "test_vit.no_tag"], "models: got test_vit.no_tag: Invalid pretrained tag"),
        (["--models", ","], "models: got ',', want a comma-separated list"),
        (["--image-size", "100"], "with image-size 100: img_size: got 100x100, want a multiple"),
        (["--image-size", "-32"], "Invalid value for '--image-size'"),
        (["--num-prompts", "4,x"], "num-prompts: got 'x', want numbers of at least 1"),
        (["--batch-size", "-1"], "batch-size: got '-1', want numbers of at least 1"),
        (["--prompt-type", "both"], "prompt-type: got 'both', want one of deep, shallow"),
        (["--implementations", "magic"], "implementations: got 'magic', want one of vpt_fast"),
        (["--dtype", "int8"], "int8"),
        (["--dtype", "float32,bfloat16"], "dtype: got 'float32,bfloat16', want one of float32"),
        (["--output", "/dev/null/report.json"], "output: got /dev/null/report.json, want a file that"),
        (["--memory", "none"], "memory: got 'none', want one of exact"),
        (["--find-batch"], "find-batch"),
        (["--models", "swinv2_tiny_window8_256"], "swinv2_tiny_window8_256 has no plain implementation"),
        (
            ["--models", "beit_base_patch16_224", "--implementations", "vpt_fast_sdpa_flash"],
            "got vpt_fast_sdpa_flash with beit_base_patch16_224: it has no relative position bias",
        ),
        (
            ["--models", "eva02_tiny_patch14_224", "--implementations", "concat_reference"],
            "got concat_reference with eva02_tiny_patch14_224: the official code has no such backbone",
        ),
        (
            ["--models", "deit_tiny_distilled_patch16_224"],
            "has no plain implementation here, as it has two heads",
        ),
        (["--models", "test_resnet", "--prompt-type", "deep"], "prompt-type: got deep with test_resnet"),
        (["--models", "test_resnet", "--memory", "compact"], "memory: got compact with test_resnet"),
        (
            ["--models", "test_resnet", "--implementations", "concat_reference"],
            "implementations: got concat_reference with test_resnet: concat_timm is what the official",
        ),
        (
            ["--models", "swin_tiny_patch4_window7_224", "--implementations", "vpt_fast_sdpa_flash"],
            "implementations: got vpt_fast_sdpa_flash with swin_tiny_patch4_window7_224",
        ),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "large_product", lambda *where: pytest.fail("it has begun to measure"))
    result = CliRunner().invoke(APP, [*arguments, "--device", "cpu"])
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_the_page_names_the_errors_up_to_which_a_row_counts_as_right():
    page = " ".join((Path(__file__).parents[2] / "docs" / "performance.md").read_text().split())
    assert implementations.EXACT_BELOW["amp"] == implementations.CODES_EXACT_BELOW
    for limits in (implementations.EXACT_BELOW, operations.ERROR_BELOW):
        exact, rounded = (f"{limits[key]:g}" for key in list(limits)[:2])  # float32, bfloat16
        assert f"above {exact} in float32" in page and f"{rounded} in bfloat16" in page
