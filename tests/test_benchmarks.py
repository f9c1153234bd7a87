"""The benchmark's peers compute the right thing, and its report says what it should."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from concatenation import ConcatenatedViT, relative_error, step
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_vit
from torch import Tensor, nn
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import implementations  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import throughput  # noqa: E402

NUM_CLASSES = 5


def compiled(vit: VisionTransformer, state: dict[str, Tensor]) -> nn.Module:
    model = peers.ConcatTimm(vit, state)
    model.compile(backend="aot_eager")
    return model


PEERS: dict[str, Callable[[VisionTransformer, dict[str, Tensor]], nn.Module]] = {
    "concat_reference": peers.ConcatReference,
    "concat_timm": peers.ConcatTimm,
    "concat_timm_compiled": compiled,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "registers": {"reg_tokens": 2},
    "average": {"global_pool": "avg", "class_token": False},
    "attention_pool": {"global_pool": "map", "class_token": False},
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 3, 1])


def state_for(vit: VisionTransformer, prompt_type: str) -> dict[str, Tensor]:
    state = peers.initial_state(vit, 4, prompt_type, NUM_CLASSES)
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "peer, prompt_type",
    [
        ("concat_reference", "deep"),
        ("concat_reference", "shallow"),
        ("concat_timm", "deep"),
        ("concat_timm", "shallow"),
        ("concat_timm_compiled", "deep"),
    ],
)
def test_peer_equals_the_plain_definition(peer: str, prompt_type: str, variant: str) -> None:
    torch._dynamo.reset()
    vit = tiny_vit(**VARIANTS[variant])
    state = state_for(vit, prompt_type)
    plain = ConcatenatedViT(vit, NUM_CLASSES, 4, prompt_type).double().load_trainables(state)
    model = PEERS[peer](vit, state).double()
    actual, expected = step(model, *batch()), step(plain, *batch())
    assert relative_error(actual.logits, expected.logits) < 1e-9
    for name, gradient in actual.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) < 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bound_is_the_backbone_without_prompts(variant: str) -> None:
    vit = tiny_vit(**VARIANTS[variant])
    state = state_for(vit, "deep")
    images, _ = batch()
    logits = peers.NoPrompts(vit, state).double()(images)
    expected = nn.functional.linear(vit(images), state["head.weight"], state["head.bias"])
    assert relative_error(logits, expected) < 1e-9


def test_the_bound_sends_a_gradient_through_every_block() -> None:
    vit = tiny_vit()
    model = peers.NoPrompts(vit, state_for(vit, "deep")).double()
    reached: list[int] = []
    for index, block in enumerate(model.vit.blocks):
        block.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    step(model, *batch())
    assert sorted(reached) == [0, 1, 2]


def test_peers_share_the_frozen_weights_and_train_nothing_of_them() -> None:
    vit = tiny_vit()
    for build in (peers.ConcatReference, peers.ConcatTimm, peers.NoPrompts):
        model = build(vit, state_for(vit, "deep"))
        shared = {name: p for name, p in model.named_parameters() if name.startswith("vit.")}
        assert all(vit.get_parameter(name.removeprefix("vit.")) is p for name, p in shared.items())
        assert not any(p.requires_grad for p in shared.values())


def test_kept_bytes_are_counted_once_a_storage_and_without_weights() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 5))

        def forward(self, images: Tensor) -> Tensor:
            x = images @ self.weight  # keeps images (given) and, for nothing, no weight: left out
            return (x * x) + x.flatten().view_as(x) ** 2  # keeps x: 4 x 5 floats, under several views

    model = Squares()
    contender = measure.Contender("squares", model, lambda images: model(images), None)
    contender.loss = lambda images, labels: contender.run(images).sum()  # type: ignore[method-assign]
    assert measure.kept_for_backward(contender, torch.randn(4, 10), torch.zeros(4)) == 4 * 5 * 4


def test_gradient_error_is_the_worst_tensors_and_never_nan() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert measure.gradient_error({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}, expected) == 0.1
    wrong = {"a": torch.tensor([3.0, float("nan")]), "b": torch.tensor([1.0])}
    assert measure.gradient_error(wrong, expected) == float("inf")
    assert measure.gradient_error({"a": expected["a"]}, expected) == float("inf")


class WrongGradient(peers.ConcatTimm):
    """Right logits, and prompts whose gradient is off by half a percent."""

    def block_prompts(self, block: int, x: Tensor) -> Tensor:
        prompts = super().block_prompts(block, x)
        return prompts.detach() + 1.005 * (prompts - prompts.detach())


SETTING = implementations.Setting("test_vit", 3, 2, "deep", "float32", image_size=32)


def measured(names: list[str]) -> list[throughput.Row]:
    return throughput.measure_setting(SETTING, names, torch.device("cpu"), 1, 1, Console(quiet=True))


def test_a_failing_gradient_check_takes_the_rank_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "concat_wrong", implementations.peer(WrongGradient))
    rows = {row.impl: row for row in measured(["vpt_fast", "concat_wrong", "concat_timm"])}
    assert not rows["concat_wrong"].exact
    assert rows["concat_wrong"].rank is None
    assert rows["concat_wrong"].gradient_error == pytest.approx(0.005, rel=0.01)
    assert rows["vpt_fast"].exact and rows["concat_timm"].exact
    assert {rows["vpt_fast"].rank, rows["concat_timm"].rank} == {1, 2}
    text = io.StringIO()
    Console(file=text, width=200).print(throughput.make_table(list(rows.values())))
    assert "WRONG 5.0e-03" in text.getvalue()


def test_the_bound_is_measured_and_not_ranked() -> None:
    (row,) = measured(["no_prompts"])
    assert row.exact and row.images_per_second is not None and row.rank is None


def test_an_implementation_that_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory(peers.ConcatTimm):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("80 GiB wanted")

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "concat_large", implementations.peer(OutOfMemory))
    row, other = measured(["concat_large", "concat_timm"])
    assert (row.images_per_second, row.kept_mib_per_image, row.rank) == (None, None, None)
    assert "80 GiB wanted" in row.error
    assert other.rank == 1


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    arguments = "--models test_vit --image-size 32 --num-prompts 3 --batch-size 2 --repeats 2 --device cpu"
    names = ["vpt_fast", "concat_reference", "concat_timm", "no_prompts"]
    app = throughput.typer.Typer()
    app.command()(throughput.main)
    result = CliRunner().invoke(
        app, [*arguments.split(), "--implementations", ",".join(names), "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert list(tmp_path.iterdir()) == [output]
    assert report.keys() == {
        "device", "torch", "triton", "timm", "cuda", "date", "ceiling_tflops", "rows",
    }  # fmt: skip
    assert report["torch"] == torch.__version__
    assert [row["impl"] for row in report["rows"]] == names
    fields = {field.name for field in dataclasses.fields(throughput.Row)}
    for row in report["rows"]:
        assert row.keys() == fields
        assert row["exact"] is True
        assert row["images_per_second_min"] <= row["images_per_second"] <= row["images_per_second_max"]
        assert row["kept_mib_per_image"] > 0
        assert (
            row["peak_mib"] is None and row["share_of_ceiling"] is None
        )  # not known on a CPU: never invented
        assert row["error"] is None


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--models", "vit_base_patch16_225"], "vit_base_patch16_225"),
        (["--implementations", "magic"], "magic"),
        (["--dtype", "int8"], "int8"),
        (["--models", "resnet18"], "ResNet"),
    ],
    ids=["model", "implementation", "dtype", "not_a_vit"],
)
def test_a_wrong_flag_is_named(arguments: list[str], named: str) -> None:
    app = throughput.typer.Typer()
    app.command()(throughput.main)
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 2
    assert named in result.output
