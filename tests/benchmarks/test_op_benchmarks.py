"""The benchmarks of single operations count, check and compare rightly, and go on where they stopped."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attention
import ceilings
import compare
import operations
import pytest
import reports
import torch
import typer
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result
from vpt_fast.kernels.dispatch import TORCH_OPS
from vpt_fast.kernels.prompted_attention import reference

import kernels

CPU = torch.device("cpu")
SHAPE = attention.Shape(batch_size=3, num_tokens=7, num_prompts=4, num_heads=2, head_dim=16)
ALL_KINDS = list(kernels.KINDS)
CASES = [
    kernels.Case(op, kind, codes, batch_size=3, num_tokens=5, width=16)
    for op, operation in kernels.OPERATIONS.items()
    for kind in operation.kinds
    for codes in operation.codes
]
IDS = [f"{case.op}-{case.kind}{'-codes' if case.codes else ''}" for case in CASES]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=IDS)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No large buffers, copies or products."""
    monkeypatch.setitem(operations._FLUSH_BYTES, "cpu", 16)
    monkeypatch.setitem(operations._COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.LARGE, "cpu", 64)


def settings(dtype: torch.dtype = torch.float32) -> operations.Settings:
    return operations.Settings(CPU, dtype, repeats=1, bounds=operations.Bounds(20.0, 0.1))


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)


# Bytes and operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_attentions_bytes_are_those_of_its_tensors_and_its_flops_those_counted(dtype: torch.dtype) -> None:
    *given, grad = attention.make_inputs(SHAPE, dtype, CPU)
    with FlopCounterMode(display=False) as forward:
        out, lse = reference.attention(*given)
    with FlopCounterMode(display=False) as backward:
        functions = reference.attention, reference.attention_backward
        grads = attention.run_backward(functions, (*given, grad), out, lse)
    assert SHAPE.forward(dtype) == operations.Work(nbytes(*given, out, lse), forward.get_total_flops())
    moved = nbytes(grad, *given, out, lse, grads.qkv, grads.prompt_kv)
    assert SHAPE.backward(dtype) == operations.Work(moved, backward.get_total_flops())


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_an_operations_bytes_are_those_of_its_tensors_and_its_flops_those_counted(
    case: kernels.Case, dtype: torch.dtype
) -> None:
    batched, shared = kernels.make_inputs(case, dtype, CPU)
    operation = kernels.OPERATIONS[case.op]
    with FlopCounterMode(display=False) as counter:
        result = operation.run(TORCH_OPS, case, dtype, *batched, *shared)
    outputs = result if isinstance(result, tuple) else (result,)
    expected = operations.Work(nbytes(*batched, *shared, *outputs), counter.get_total_flops())
    assert operation.work(case, dtype.itemsize) == expected


def test_the_share_of_the_bound_is_by_the_tighter_of_both() -> None:
    bounds = operations.Bounds(gb_per_second=100.0, tflops=2.0)
    assert bounds.share(operations.Work(bytes=10**9, flops=10**9), 0.02) == pytest.approx(0.5)
    assert bounds.share(operations.Work(bytes=10**6, flops=10**10), 0.02) == pytest.approx(0.25)


def test_the_bounds_are_a_copy_and_a_product_of_this_run() -> None:
    bounds = operations.measure_bounds(CPU, torch.float32, 1)
    assert bounds.gb_per_second > 0 and bounds.tflops > 0


# What is timed


def test_calls_take_turns_and_each_is_timed_alone() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = operations.time_calls(calls, CPU, repeats=2, samples=2)
    assert order == ["a", "a", "b", "b"] * 2
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every capture, without CUDA."""
    found: list[dict[str, Any]] = []

    def graph(graph: Any, **keywords: Any) -> Any:
        found.append(keywords)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(
        operations, "_capture_stream", functools.cache(operations._capture_stream.__wrapped__)
    )
    return found


def test_a_captured_calls_tensors_live_as_long_as_its_replay(
    monkeypatch: pytest.MonkeyPatch, captures: list[dict[str, Any]]
) -> None:
    log: list[str] = []
    graph = SimpleNamespace(replay=lambda: log.append("replayed"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    def make(tensor: torch.Tensor) -> Callable[[], object]:
        return operations.prepare(lambda: log.append(f"called with {tensor.item()}"), torch.device("cuda"))

    tensor = torch.tensor(3)
    kept = weakref.ref(tensor)
    replay = make(tensor)
    del tensor
    assert kept() is not None
    assert log == ["called with 3"] * 4  # three to warm up, one captured
    replay()
    assert log[4:] == ["replayed"]


def test_graphs_share_the_memory_of_the_pool_that_they_are_given(captures: list[dict[str, Any]]) -> None:
    pool = object()
    for given in (pool, pool, None):
        operations.prepare(lambda: None, torch.device("cuda"), given)
    assert [keywords["pool"] for keywords in captures] == [pool, pool, None]
    # The allocator shares nothing between streams.
    assert captures[0]["stream"] is captures[1]["stream"] is not None


def test_what_is_given_concatenated_gives_the_same_results() -> None:
    inputs = attention.make_inputs(SHAPE, torch.float32, CPU)
    functions = attention.functions_of("sdpa_cpu")
    calls = attention.make_calls("sdpa_cpu", functions, inputs)
    out, lse = calls["forward_ms"]()
    torch.testing.assert_close(calls["concatenated_forward_ms"](), (out, lse))
    grad_q = calls["backward_ms"]().qkv[:, :, 0]
    torch.testing.assert_close(calls["concatenated_backward_ms"]().q, grad_q)


def test_only_libraries_are_given_what_is_concatenated() -> None:
    inputs = attention.make_inputs(SHAPE, torch.float32, CPU)
    assert attention.make_calls("torch", attention.functions_of("torch"), inputs).keys() == {
        "forward_ms",
        "backward_ms",
    }


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What torch.compile was given to compile, which runs as it is."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return seen


@EACH_CASE
def test_the_definition_is_compiled_whole_and_once(
    case: kernels.Case, graphs: list[torch.fx.GraphModule]
) -> None:
    (row,) = kernels.measure_case(case, ["compiled"], settings())
    assert row.exact and row.error is None
    assert len(graphs) == 1


def test_a_function_is_compiled_for_any_number_of_shapes(graphs: list[torch.fx.GraphModule]) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (1, 2, 3):
            case = kernels.Case("activate", "gelu", False, 1, 2, width)
            kernels.measure_case(case, ["compiled"], settings())
    assert len(graphs) == 3


@EACH_CASE
def test_tritons_kernels_are_measured_and_right(case: kernels.Case) -> None:
    names = kernels.implementations_of(case.op, ["triton", "torch", "library_triton"])
    rows = kernels.measure_case(case, names, settings())
    assert [(row.impl, row.exact, row.error) for row in rows] == [(name, True, None) for name in names]
    assert ("library_triton" in names) == case.op.startswith("linear")


def test_tritons_attention_is_measured_and_right() -> None:
    row, library = attention.measure_shape(SHAPE, ["triton", "sdpa_cpu"], settings())
    assert row.exact and row.error is None and row.concatenated_forward_ms is None
    assert row.backward_ratio == pytest.approx(library.backward_ms / row.backward_ms)
    expected = library.concatenated_backward_ms / row.backward_ms
    assert row.backward_ratio_to_concatenated == pytest.approx(expected)


# Wrong ones and failing ones


def test_attention_that_is_wrong_is_marked_and_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = attention.functions_of("sdpa_cpu")

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(*args)
        return out * 1.001, lse

    right = attention.functions_of
    monkeypatch.setattr(
        attention, "functions_of", lambda name: (wrong, backward) if name == "sdpa_cpu" else right(name)
    )
    ours, library = attention.measure_shape(SHAPE, ["torch", "sdpa_cpu"], settings())
    assert not library.exact and library.output_error == pytest.approx(1e-3, rel=0.1)
    assert library.forward_ms > 0 and library.forward_ratio is None
    assert ours.exact and ours.forward_ratio is None and ours.backward_ratio_to_concatenated is None
    assert "WRONG" in operations.verdict(library.error, library.exact, library.gradient_error)


@pytest.mark.parametrize(
    ("impl", "exact", "error", "fails"),
    [
        ("triton", True, None, False),
        ("triton", False, None, True),
        ("triton", False, "CompilationError: no such tile", True),
        ("triton", False, "OutOfMemoryError: CUDA out of memory", False),
        ("sdpa_flash", False, "ValueError: not here", False),
    ],
)
def test_command_fails_where_our_kernels_do(impl: str, exact: bool, error: str | None, fails: bool) -> None:
    row = SimpleNamespace(impl=impl, exact=exact, error=error)
    with pytest.raises(typer.Exit) if fails else nullcontext():
        operations.end_with([row], Console(quiet=True))


@pytest.mark.parametrize("factor, error", [(1.001, 1e-3), (float("nan"), None)], ids=["off", "nan"])
def test_an_operation_that_is_wrong_is_marked_and_not_compared_with(
    monkeypatch: pytest.MonkeyPatch, factor: float, error: float | None
) -> None:
    right = kernels.implementation

    def implementation(name: str, *args: Any) -> Callable[..., Any]:
        call = right("torch", *args)
        return (lambda *inputs: call(*inputs) * factor) if name == "compiled" else call

    monkeypatch.setattr(kernels, "implementation", implementation)
    case = kernels.Case("normalize_backward", "layer", False, 2, 5, 16)
    ours, wrong = kernels.measure_case(case, ["triton", "compiled"], settings())
    assert not wrong.exact and wrong.ratio is None and wrong.ms > 0
    assert wrong.relative_error == (error and pytest.approx(error, rel=0.1))
    assert ours.exact and ours.ratio is None


def test_the_ratio_is_to_the_best_right_one_that_is_not_ours() -> None:
    times = {"triton": 2.0, "torch": 6.0, "compiled": 3.0, "library_triton": 1.0}
    rows = [
        kernels.Row("linear_activate", "gelu", False, 1, 1, 1, impl=name, exact=True, ms=ms)
        for name, ms in times.items()
    ]
    rows[-1].exact = False
    kernels.compare(rows)
    assert [row.ratio for row in rows] == [1.5, 0.5, 1.0, None]


def test_codes_are_compared_as_the_numbers_they_stand_for() -> None:
    codes, scale = torch.tensor([[127, -127, 0, 64]], dtype=torch.int8), torch.tensor([[0.5, 2.0]])
    _, halves = kernels.read((torch.zeros(1), codes, scale))
    assert halves.tolist() == [[[63.5, -63.5], [0.0, 128.0]]]
    _, derivative = kernels.read((torch.zeros(1), torch.tensor([27, 227], dtype=torch.uint8), None))
    assert derivative.tolist() == [0.0, 1.0]


def test_what_cannot_run_is_a_row_with_its_reason() -> None:
    ours, library = attention.measure_shape(SHAPE, ["torch", "sdpa_flash"], settings())
    assert ours.exact and ours.forward_ms > 0
    assert "float32" in library.error and library.forward_ms is None and not library.exact
    caption = attention.make_table([ours, library]).caption
    assert caption == f"sdpa_flash: {library.error}"


def test_brackets_of_a_reason_are_shown_and_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(attention.make_table([attention.Row(1, 1, 1, 1, 1, "triton", error="no [/lib] of [red]")]))
    assert "triton: no [/lib] of [red]" in console.file.getvalue()


# The commands

HEADER = {"device", "torch", "triton", "timm", "cuda", "date", "dtype", "repeats", "bounds", "rows"}
COMMANDS: dict[str, tuple[ModuleType, str, type, int]] = {
    "attention": (
        attention,
        "--num-tokens 5,7 --num-heads 2 --head-dim 16 --num-prompts 3 --batch-size 2",
        attention.Row,
        2 * 2,
    ),
    "kernels": (
        kernels,
        "--shapes 5x16,7x16 --batch-size 2 --ops activate,normalize --kinds gelu,layer",
        kernels.Row,
        2 * 2 * 2,
    ),
}
EACH_COMMAND = pytest.mark.parametrize("name", COMMANDS)


def run(module: ModuleType, arguments: list[str]) -> Result:
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"])


def run_small(name: str, output: Path, *more: str) -> Result:
    module, arguments, _, _ = COMMANDS[name]
    return run(module, [*arguments.split(), "--repeats", "2", "--output", str(output), *more])


@EACH_COMMAND
def test_the_command_writes_the_report(name: str, tmp_path: Path) -> None:
    _, _, row_type, num_rows = COMMANDS[name]
    output = tmp_path / "report.json"
    result = run_small(name, output)
    assert result.exit_code == 0, result.output
    assert "Triton's kernels are not measured on a CPU" in result.output
    report = json.loads(output.read_text())
    assert list(tmp_path.iterdir()) == [output]
    assert report.keys() == HEADER
    assert report["dtype"] == "float32" and report["bounds"].keys() == {"gb_per_second", "tflops"}
    assert len(report["rows"]) == num_rows
    assert len(compare.keyed_rows(report)) == num_rows
    for row in report["rows"]:
        assert all(measured.has_spread for _, measured in compare.measurements(row))
        assert row.keys() == {field.name for field in dataclasses.fields(row_type)}
        assert row["exact"] is True and row["error"] is None


def interrupt_in_the_second_measurement(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What is measured of `name`, as a list that grows; the second one is broken off, once."""
    module = COMMANDS[name][0]
    function = "measure_shape" if name == "attention" else "measure_case"
    measured, right = [], getattr(module, function)

    def measure(item: Any, *args: Any) -> Any:
        measured.append(item)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return right(item, *args)

    monkeypatch.setattr(module, function, measure)
    return measured


@EACH_COMMAND
def test_the_same_command_goes_on_where_it_was_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.json"
    measured = interrupt_in_the_second_measurement(monkeypatch, name)
    assert run_small(name, output).exit_code != 0
    first = json.loads(output.read_text())["rows"]
    assert run_small(name, output).exit_code == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows[: len(first)] == first and len(rows) == COMMANDS[name][3]
    assert measured.count(measured[0]) == 1 and measured.count(measured[1]) == 2
    so_far = len(measured)
    assert run_small(name, output).exit_code == 0
    assert len(measured) == so_far
    assert run_small(name, output, "--fresh").exit_code == 0
    assert measured.count(measured[0]) == 2


@pytest.mark.parametrize(
    "name, implementations", [("attention", ("torch", "sdpa_cpu")), ("kernels", ("torch", "triton"))]
)
def test_rows_of_implementations_that_are_not_asked_for_stay(
    name: str, implementations: tuple[str, str], tmp_path: Path
) -> None:
    for implementation in implementations:
        assert run_small(name, tmp_path / "report.json", "--implementations", implementation).exit_code == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["impl"] for row in rows} == {*implementations}


@dataclasses.dataclass
class Counted:
    """A row that says in which run it was measured."""

    case: int
    run: int
    contender: str = "torch"


REPORT_HEADER = {"device": "x", "torch": "2.11", "date": "2026-11-23", "repeats": 5}


def report_of(path: Path, asked: list[int], fresh: bool = False, **header: Any) -> reports.Report:
    return reports.Report(path, REPORT_HEADER | header, Counted, asked, fresh)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of the first run, which measured the cases 1 and 2."""
    report = report_of(tmp_path / "report.json", [1, 2])
    report.once("bounds", lambda: 7)
    for case in (1, 2):
        report.replace(case, [Counted(case, run=1)])
    return report.path


@pytest.mark.parametrize("key, value", [("torch", "2.0"), ("repeats", 1), ("device", "y")])
def test_another_runs_file_is_refused_by_what_differs(written: Path, key: str, value: Any) -> None:
    before = written.read_text()
    with pytest.raises(
        typer.BadParameter, match=rf"\({key} .*, here {value!r}\); want another file, or --fresh"
    ):
        report_of(written, [1], **{key: value})
    assert written.read_text() == before


def test_another_runs_file_is_replaced_by_a_fresh_one(written: Path) -> None:
    report = report_of(written, [1], fresh=True, repeats=1)
    assert report.rows == [] and report.once("bounds", lambda: 8) == 8


def test_a_file_of_another_day_is_gone_on_with_and_keeps_its_date(written: Path) -> None:
    report = report_of(written, [1, 3], date="2026-11-24")
    report.replace(3, [Counted(3, run=2)])
    found = json.loads(written.read_text())
    assert found["date"] == REPORT_HEADER["date"] and [row["run"] for row in found["rows"]] == [1, 1, 2]


def test_a_fresh_run_that_is_interrupted_is_gone_on_with_without_the_flag(written: Path) -> None:
    report_of(written, [1, 2], fresh=True).replace(1, [Counted(1, run=2)])
    report = report_of(written, [1, 2])
    assert report.rows_of(1) == [Counted(1, run=2)] and report.rows_of(2) == []


@pytest.mark.parametrize(
    "asked, header, left",
    [([1, 2], {}, []), ([1], {}, [Counted(2, run=1)]), ([1], {"repeats": 1}, [])],
    ids=["all", "some", "another run's"],
)
def test_a_fresh_run_that_is_interrupted_at_once_is_not_gone_on_with_what_it_was_to_replace(
    written: Path, asked: list[int], header: dict[str, Any], left: list[Counted]
) -> None:
    report_of(written, asked, fresh=True, **header)
    assert report_of(written, asked, **header).rows == left


def test_a_file_s_bounds_stay_as_long_as_any_of_its_rows_do(written: Path) -> None:
    assert report_of(written, [1], fresh=True).once("bounds", lambda: 8) == 7
    assert report_of(written, [1, 2], fresh=True).once("bounds", lambda: 8) == 8


def test_a_run_says_what_its_file_has_already(written: Path) -> None:
    assert (
        "has 1 row of 2026-11-23 already, which --fresh measures again" in report_of(written, [1]).describe()
    )
    assert "the same command goes on with it" in report_of(written, [3]).describe()


def test_by_default_every_kind_is_measured_at_the_first_shape_and_a_vits_at_the_others() -> None:
    shapes = kernels.parse_shapes(",".join(kernels.MODELS))
    cases = kernels.choose_cases(shapes, 64, list(kernels.OPERATIONS), [])
    kinds = {width: {case.kind for case in cases if case.width == width} for _, width in shapes}
    assert kinds == {768: set(ALL_KINDS), 1024: {"layer", "gelu"}, 1280: {"layer", "gelu"}}
    assert {case.kind for case in cases if case.op.startswith("linear")} == {"gelu"}


def test_a_sweep_takes_all_combinations_and_the_default_the_models() -> None:
    shapes = attention.choose_shapes(True, "197,577", "", "64,80", "10,100", "8")
    assert len(shapes) == 2 * 2 * 2 and {shape.num_heads for shape in shapes} == {12}
    models = attention.choose_shapes(True, "", "", "", "50,100,200", "")
    assert {(shape.num_tokens, shape.num_heads, shape.head_dim) for shape in models} == {
        (197, 12, 64), (197, 16, 64), (257, 16, 80),
    }  # fmt: skip
    assert len(models) == 9 and {shape.batch_size for shape in models} == {64}


@pytest.mark.parametrize(
    "module, arguments, named",
    [
        (attention, ["--implementations", "magic"], "implementations: got 'magic'"),
        (attention, ["--num-prompts", "5,zero"], "num-prompts: got 'zero'"),
        (attention, ["--head-dim", "0"], "head-dim: got '0'"),
        (attention, ["--dtype", "int8"], "int8"),
        (kernels, ["--dtype", "float32,bfloat16"], "float32,bfloat16"),
        (attention, ["--device", "tpu"], "tpu"),
        (attention, ["--output", "/dev/null/report.json"], "output: got /dev/null"),
        (kernels, ["--ops", "softmax"], "ops: got 'softmax'"),
        (kernels, ["--kinds", "batch"], "kinds: got 'batch'"),
        (kernels, ["--kinds", "rms", "--ops", "activate"], "rms"),
        (kernels, ["--shapes", "197"], "197"),
        (kernels, ["--implementations", "compiled,magic"], "magic"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_named(module: ModuleType, arguments: list[str], named: str) -> None:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert named in result.output and "want" in result.output


@pytest.mark.parametrize(
    "content",
    [{"rows": [{"head_dim": 64}]}, {"name": "package"}, [1], {"rows": 3}],
    ids=["another_benchmark_s", "no_rows", "list", "rows_no_list"],
)
@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["", "fresh"])
def test_a_file_that_the_benchmark_did_not_write_is_not_replaced(
    content: Any, flags: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "other.json"
    output.write_text(json.dumps(content))
    result = run_small("kernels", output, *flags)
    assert result.exit_code == 2 and "want a report of this benchmark" in " ".join(result.output.split())
    assert json.loads(output.read_text()) == content


def test_rotations_bytes_are_those_of_its_heads_where_they_do_not_fill_the_width() -> None:
    case = kernels.Case("rotate", "rotary", False, batch_size=2, num_tokens=5, width=100)
    ((x,), shared) = kernels.make_inputs(case, torch.float32, CPU)
    assert kernels.OPERATIONS["rotate"].work(case, 4) == operations.Work(2 * nbytes(x) + nbytes(*shared))


def test_an_output_that_is_no_report_is_named(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("by hand")
    result = run_small("kernels", output)
    assert result.exit_code == 2 and "notes.txt" in result.output.replace("\n", "")
    assert output.read_text() == "by hand"
