"""The runner of `make gpu`, with commands that pass, fail, hang or take too long as its parts."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import typer
from gpu_suite import Part

ROOT = Path(__file__).parents[2]

HEADER = {"device": "NVIDIA H100 80GB", "torch": "2.14", "triton": "3.8", "timm": "1.0", "date": "2026-11-23"}
FILE = "gpu-suite-nvidia-h100-80gb-2026-11-23.json"
HANG = "import time; print('before', flush=True); time.sleep(600)"


class Project:
    """An empty project with one source file, and the suite run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "kernels").mkdir()
        (root / "kernels" / "tile.py").write_text("TILE = 64\n")
        self.parts: list[Part] = []

    def part(
        self, name: str, code: str, seconds: float = 0.0, limit: float = 60.0, alone: bool = False
    ) -> None:
        note = f"open({name!r}, 'a').write('x'); "
        self.parts.append(Part(name, (sys.executable, "-c", note + code), seconds, limit, alone))

    def suite(self, header: Mapping[str, Any]) -> list[Part]:
        return self.parts

    def run(self, *arguments: str, header: dict[str, Any] = HEADER) -> int:
        return gpu_suite.main(
            list(arguments),
            root=self.root,
            results=self.root / "results",
            logs=self.root / "logs",
            header=lambda root: header,
            suite=self.suite,
        )

    def runs_of(self, name: str) -> int:
        file = self.root / name
        return len(file.read_text()) if file.exists() else 0

    def report(self, file: str = FILE) -> dict[str, Any]:
        return json.loads((self.root / "results" / file).read_text())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return Project(tmp_path)


def test_a_failed_part_costs_no_other_its_result(project: Project) -> None:
    project.part("test_bad", "print('why'); raise SystemExit(3)")
    project.part("test_good", "print('fine')")
    project.part("throughput", "pass", alone=True)
    assert project.run() == 1
    parts = project.report()["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "test_bad": "failed", "test_good": "passed", "throughput": "passed",
    }  # fmt: skip
    assert parts["test_bad"]["exit_status"] == 3
    assert parts["test_bad"]["tail"][-1] == "why"


def test_the_same_command_goes_on_with_what_has_not_passed(project: Project) -> None:
    project.part("test_bad", "raise SystemExit(not __import__('os').path.exists('mended'))")
    project.part("test_good", "pass")
    assert project.run() == 1
    (project.root / "mended").touch()
    assert project.run() == 0
    assert (project.runs_of("test_bad"), project.runs_of("test_good")) == (2, 1)


def test_variants_that_were_timed_beside_others_are_timed_again_by_what_runs_alone(project: Project) -> None:
    folder = "import os; folder = os.environ['TORCHINDUCTOR_CACHE_DIR']; "
    make = "[open(f'{folder}/k.{end}', 'w') for end in ('py', 'best_config')]"
    see = "open('seen', 'a').write(' '.join(sorted(os.listdir(folder))) + '; '); "
    project.part("compile", f"{folder} os.mkdir(folder); {make}")
    project.part("throughput-b", folder + see + make, alone=True)
    project.part("throughput-h", folder + see, alone=True)
    assert project.run() == 0
    assert (project.root / "seen").read_text() == "k.py; k.best_config k.py; "


@pytest.mark.parametrize("change", ["source", "version", "fresh", "nothing", "day", "helper", "test"])
def test_what_has_passed_runs_again_only_for_other_sources_or_versions_or_on_request(
    project: Project, change: str
) -> None:
    project.part("test_good", "pass")
    project.run()
    if change == "source":
        (project.root / "kernels" / "tile.py").write_text("TILE = 128\n")
    if change in ("helper", "test"):
        (project.root / "tests").mkdir()
        (project.root / "tests" / {"helper": "tiny.py", "test": "test_tiny.py"}[change]).touch()
    header = HEADER | {"version": {"torch": "2.15"}, "day": {"date": "2026-11-24"}}.get(change, {})
    assert project.run(*["--fresh"] * (change == "fresh"), header=header) == 0
    assert project.runs_of("test_good") == (1 if change in ("nothing", "day", "test") else 2)


def test_a_part_that_hangs_is_stopped_at_its_limit_and_has_failed(project: Project) -> None:
    code = "import os; open('process', 'w').write(str(os.getpid())); "
    project.part("test_hang", code + HANG, limit=1.0)
    project.part("throughput", "pass", alone=True)
    assert project.run() == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((project.root / "process").read_text()), 0)
    hung = project.report()["parts"]["test_hang"]
    assert hung["state"] == "failed"
    assert hung["tail"][-2:] == ["before", "stopped: not done in its limit of 1 s"]
    assert project.runs_of("throughput") == 1


def test_a_part_that_a_signal_ended_says_which(project: Project) -> None:
    project.part("test_killed", "import os; os.kill(os.getpid(), 9)")
    assert project.run() == 1
    killed = project.report()["parts"]["test_killed"]
    assert (killed["state"], killed["tail"][-1]) == ("failed", "ended by signal 9: Killed")


def test_what_does_not_fit_is_left_for_the_next_command(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.part("test_hang", HANG)
    project.part("throughput", "pass", seconds=0.3, alone=True)
    assert project.run("--minutes", "0.005") == 3  # which are 0.3 s
    assert project.report()["parts"]["test_hang"]["state"] == "unfinished"
    assert project.runs_of("throughput") == 0
    assert "left: test_hang, throughput: run it again" in capsys.readouterr().out


def test_a_part_that_took_longer_than_thought_is_given_that_time_from_then_on(project: Project) -> None:
    project.part("test_good", "pass")
    project.part("throughput", "pass", alone=True)
    assert project.run() == 0
    report = project.report()
    report["parts"]["throughput"]["seconds"] = 61.0
    (project.root / "results" / FILE).write_text(json.dumps(report))
    assert project.run("--fresh", "--minutes", "1") == 3
    assert (project.runs_of("test_good"), project.runs_of("throughput")) == (2, 1)


def test_another_devices_times_do_not_count(project: Project) -> None:
    project.part("throughput", "pass", alone=True)
    other = HEADER | {"device": f"{HEADER['device']} HBM3"}
    assert project.run(header=other) == 0
    assert gpu_suite.Record(project.root / "results", other, "").earlier_seconds.keys() == {"throughput"}
    assert gpu_suite.Record(project.root / "results", HEADER, "").earlier_seconds == {}


def test_an_interruption_loses_nothing_that_is_done(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.part("test_good", "pass")
    project.run()
    project.part("test_hang", HANG)
    sleep = gpu_suite.time.sleep

    def interrupt(seconds: float) -> None:
        monkeypatch.setattr(gpu_suite.time, "sleep", sleep)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite.time, "sleep", interrupt)
    assert project.run() == 130
    assert [part["state"] for part in project.report()["parts"].values()] == ["passed", "unfinished"]


def test_a_full_disk_is_named_and_leaves_no_part_running(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, report: Any, *, indent: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gpu_suite, "write_json", full)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    project.part("test_hang", "import os; open('process', 'w').write(str(os.getpid())); " + HANG)
    project.part("test_good", "import os, time\nwhile not os.path.exists('process'): time.sleep(0.01)")
    assert project.run() == 2
    full_file = project.root / "results" / FILE
    assert f"No space left on device: '{full_file}'" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((project.root / "process").read_text()), 0)


def test_no_second_suite_runs_beside_a_part_that_a_killed_one_left(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = project.root / "logs"
    part = Part("test_hang", (sys.executable, "-c", HANG), 0.0, 60.0, alone=False)
    with gpu_suite.only_suite(logs) as lock:
        job = gpu_suite.Running(part, part.command, project.root, logs, float("inf"), {}, lock)
    project.part("test_good", "pass")
    assert project.run() == 2
    assert f"still running here (process {os.getpid()}, {job.process.pid})" in capsys.readouterr().err
    job.stop()
    assert project.run() == 0


def test_a_closed_terminal_ends_the_suite_as_ctrl_c_does_but_not_under_nohup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    gpu_suite.end_as_by_ctrl_c()
    assert set(handlers.values()) == {signal.default_int_handler}
    handlers[signal.SIGHUP] = signal.SIG_IGN
    gpu_suite.end_as_by_ctrl_c()
    assert handlers[signal.SIGHUP] == signal.SIG_IGN


def test_kernels_are_built_in_the_suites_own_folders_unless_the_environment_names_others(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(gpu_suite.tempfile, "gettempdir", lambda: str(project.root))
    project.part("test_good", "import os; print(*(os.environ[name] for name in %r))" % [*gpu_suite.CACHES])
    project.run()
    own = project.root / f"vpt_fast-gpu-suite-{os.getuid()}" / "triton"
    expected = f"{os.environ['TORCHINDUCTOR_CACHE_DIR']} {own}".replace(f"{project.root}/", "")
    assert project.report()["parts"]["test_good"]["tail"][-1] == expected


@pytest.mark.parametrize("state", [None, "failed", "unfinished"])
def test_a_benchmark_goes_on_with_its_file_only_where_it_was_stopped(
    tmp_path: Path, state: str | None
) -> None:
    record = gpu_suite.Record(tmp_path, HEADER, "digest")
    if state is not None:
        record.outcomes["throughput"] = gpu_suite.Outcome(state, 1.0, 1, [])
    part = Part("throughput", (sys.executable, "benchmarks/throughput.py"), 1.0, 1.0, alone=True)
    fresh = () if state == "unfinished" else ("--fresh",)
    assert gpu_suite.command_of(part, record) == (*part.command, *fresh)


@pytest.mark.parametrize(
    ("flags", "empties", "goes_on"),
    [
        (["--fresh"], "pass", False),
        (["--fresh"], "os.remove(file)", True),
        (["--fresh"], "open(file, 'w')", True),
        ([], "pass", True),
    ],
)
def test_a_part_that_was_stopped_before_it_emptied_its_results_file_begins_anew(
    project: Project, flags: list[str], empties: str, goes_on: bool
) -> None:
    code = f"import os, sys; file = sys.argv[1].partition('=')[2]; {empties}; open('there', 'w'); "
    project.part("test_hang", code + HANG)
    project.parts[0] = dataclasses.replace(
        project.parts[0], command=(*project.parts[0].command, "--output=rows.json", *flags)
    )
    (project.root / "rows.json").write_text("of other sources")
    os.utime(project.root / "rows.json", (0, 0))
    project.part("test_wait", "import os, time\nwhile not os.path.exists('there'): time.sleep(0.01)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        show = gpu_suite.show
        patch.setattr(gpu_suite, "show", lambda part, *rest: show(part, *rest) or interrupt(part.name))

        def interrupt(name: str) -> None:
            if name == "test_wait":
                raise KeyboardInterrupt

        assert project.run() == 130
    assert ("test_hang" in project.report()["parts"]) == goes_on


def test_a_part_is_run_by_the_command_that_it_is_given(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.part("throughput", "import sys; print(sys.argv[1:])")
    monkeypatch.setattr(gpu_suite, "command_of", lambda part, record: (*part.command, "--fresh"))
    project.run()
    assert project.report()["parts"]["throughput"]["tail"][-1] == "['--fresh']"


def test_what_has_failed_before_comes_after_what_has_not_run(project: Project) -> None:
    project.part("first", "raise SystemExit(1)", alone=True)
    project.run()
    project.part("second", "assert len(open('first').read()) == 1", alone=True)
    assert project.run() == 1
    assert project.report()["parts"]["second"]["state"] == "passed"


def test_nothing_runs_beside_a_benchmark(project: Project) -> None:
    alone = "import os, time; os.mkdir('busy'); time.sleep(0.2); os.rmdir('busy')"
    for index in range(2):
        project.part(f"test_{index}", "import os; assert not os.path.exists('busy')")
        project.part(f"benchmark_{index}", alone, alone=True)
    assert project.run() == 0


def test_parts_are_chosen_by_pattern(project: Project) -> None:
    for name in ("test_a", "test_b", "attention", "recipe"):
        project.part(name, "pass")
    assert project.run("--parts", "test_*,recipe") == 0
    report = project.report()
    assert report["parts"].keys() == {"test_a", "test_b", "recipe"}
    assert report["suite"] == ["test_a", "test_b", "attention", "recipe"]


def test_no_pattern_between_commas_chooses_what_no_pattern_does(project: Project) -> None:
    project.part("attention", "pass")
    assert project.run("--parts", " , ") == 0
    assert project.report()["parts"].keys() == {"attention"}


def test_a_part_on_request_runs_only_where_it_is_named(project: Project) -> None:
    project.part("attention", "pass")
    project.part("tune", "pass")
    project.parts[-1] = dataclasses.replace(project.parts[-1], on_request=True)
    assert project.run() == 0
    assert project.report()["parts"].keys() == {"attention"}
    assert project.run("--parts", "tune") == 0
    assert project.report()["parts"].keys() == {"attention", "tune"}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--parts", "atention"], "'atention' is none of test_a"),
        (["--minutes", "0.1"], "--minutes: 0.1, want 1"),
    ],
    ids=["part", "minutes"],
)
def test_a_wrong_argument_is_named_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    project.part("test_a", "pass", seconds=60.0)
    assert project.run(*arguments) == 2
    assert named in capsys.readouterr().err
    assert project.runs_of("test_a") == 0


def test_without_a_gpu_it_says_so(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def no_device(root: Path) -> dict[str, Any]:
        raise RuntimeError("no CUDA device")

    assert gpu_suite.main([], root=project.root, header=no_device, suite=project.suite) == 2
    assert capsys.readouterr().err == "gpu_suite: no CUDA device\n"


@pytest.mark.parametrize(
    "content, named",
    [(None, "File exists: "), ('{"digest": ', f"{FILE} cannot be read: "), ("{}", f"{FILE} lacks date")],
    ids=["no folder", "cut short", "another's"],
)
def test_results_that_cannot_be_kept_or_read_are_named_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str], content: str | None, named: str
) -> None:
    project.part("test_good", "pass")
    results = project.root / "results"
    if content is None:
        results.touch()
    else:
        results.mkdir()
        (results / FILE).write_text(content)
    assert project.run() == 2
    assert named in capsys.readouterr().err
    assert project.runs_of("test_good") == 0


def test_a_driver_that_never_answers_is_an_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "HEADER", HANG)
    monkeypatch.setattr(gpu_suite, "HEADER_LIMIT", 0.5)
    with pytest.raises(RuntimeError, match="did not name the device"):
        gpu_suite.read_header(project.root)


def test_the_header_is_read_in_another_process_whose_last_word_is_the_error(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "HEADER", "import sys; sys.exit('no CUDA device: torch 2.14 finds none')")
    with pytest.raises(RuntimeError, match="no CUDA device: torch 2.14 finds none"):
        gpu_suite.read_header(project.root)


def test_the_suite_is_all_gpu_tests_and_every_benchmark_with_a_minute_of_the_nine_to_spare() -> None:
    parts = {part.name: part for part in gpu_suite.chosen(gpu_suite.parts_of(HEADER), "")}
    assert parts["tests"].command[-1] == "tests/gpu" and not parts["tests"].alone
    throughput = {f"throughput-{model}" for model in gpu_suite.MODELS}
    alone = {name for name, part in parts.items() if part.alone}
    assert alone == {
        "attention",
        "kernels",
        "recipe",
        *throughput,
        f"profile-{gpu_suite.SMALLEST}",
        f"profile-{gpu_suite.LARGEST}",
    }
    assert parts.keys() - alone - {"tests"} == {
        f"compile-{name}" for name in ("kernels", "recipe", *gpu_suite.MODELS)
    }
    assert all((ROOT / parts[name].command[1]).is_file() for name in alone)
    before = max(part.seconds for part in parts.values() if not part.alone)
    assert before + sum(parts[name].seconds for name in alone) <= 8 * 60


@pytest.mark.parametrize("cores, processes, limit", [(64, 11, 300.0), (16, 11, 300.0), (8, 4, 750.0)])
def test_fewer_cores_test_in_fewer_processes_and_for_longer(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, limit: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(cores)})
    tests = gpu_suite.parts_of(HEADER)[0]
    assert tests.command[tests.command.index("-n") + 1] == str(processes)
    assert tests.limit == limit


@pytest.mark.parametrize("name", ["throughput", "profile_step", "kernels", "recipe", "attention", "tune"])
def test_what_the_suite_passes_on_is_what_the_benchmarks_take(name: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    command = typer.main.get_command(typer.Typer(callback=importlib.import_module(name).main))
    for part in gpu_suite.parts_of(HEADER):
        if part.command[1] == f"benchmarks/{name}.py":
            command.make_context(name, list(part.command[2:]))  # refuses what it does not know


@pytest.mark.parametrize("name", ["throughput", "profile_step", "kernels", "recipe", "attention", "tune"])
def test_the_suite_knows_which_benchmarks_go_on_with_their_files(name: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    parameters = inspect.signature(importlib.import_module(name).main).parameters
    assert (f"benchmarks/{name}.py" in gpu_suite.GO_ON) == ("fresh" in parameters)


def test_the_rows_are_known_and_what_is_compiled_is_measured() -> None:
    parts = {part.name: part for part in gpu_suite.parts_of(HEADER)}

    def rows(name: str) -> set[str]:
        (found,) = (word for word in parts[name].command if word.startswith("--implementations="))
        return {*found.partition("=")[2].split(",")}

    sys.path.insert(0, str(ROOT / "benchmarks"))
    known = importlib.import_module("implementations").IMPLEMENTATIONS
    for model in gpu_suite.MODELS:
        measured, compiled = rows(f"throughput-{model}"), rows(f"compile-{model}")
        assert measured <= known.keys()
        assert compiled == {name for name in measured if name.endswith("compiled")} != set()


def test_the_smallest_model_is_measured_beside_peers_that_save_launches_and_memory_as_ours_do() -> None:
    parts = {part.name: part for part in gpu_suite.parts_of(HEADER)}
    command = parts[f"throughput-{gpu_suite.SMALLEST}"].command
    (rows,) = (word for word in command if word.startswith("--implementations="))
    assert {*gpu_suite.ALIKE} <= {*rows.partition("=")[2].split(",")}


def test_the_whole_task_is_of_graphed_steps_on_both_sides() -> None:
    parts = {part.name: part for part in gpu_suite.parts_of(HEADER)}
    for name in ("recipe", "compile-recipe"):
        (rows,) = (word for word in parts[name].command if word.startswith("--implementations="))
        ours, peer = rows.partition("=")[2].split(",")
        assert (ours, peer) == ("vpt_fast_graphed", "concat_timm_compiled_graphed")


def test_gpu_tests_that_take_most_memory_come_first_and_the_others_keep_their_order() -> None:
    spec = importlib.util.spec_from_file_location("gpu_conftest", ROOT / "tests" / "gpu" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    class Item:
        def __init__(self, name: str) -> None:
            self.name = name

        def get_closest_marker(self, marker: str) -> str | None:
            return self.name if self.name.startswith(marker) else None

    items = [Item(name) for name in ("small", "large", "tiny", "large_too")]
    conftest.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["large", "large_too", "small", "tiny"]
