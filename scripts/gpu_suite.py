"""Everything that needs a GPU, in parts that end within a given time. One command, which `make gpu` calls:

    python scripts/gpu_suite.py

The tests in tests/gpu are a part, spread over the CPU's cores, since building a kernel keeps a core busy.
Beside them run parts that compile what the benchmarks need, so that these find it in the compilers' caches.
Then every benchmark is a part, alone on the GPU. Each part's outcome is written at once, to
benchmarks/results/gpu-suite-<device>-<date>.json. The same command continues with what has not passed, as
long as sources, versions and device are the same. The output of every part is kept in build/gpu-suite.

Exit status: 0 all passed, 1 something failed, 2 it cannot run here, 3 parts are left: run it again.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape

from vpt_fast.files import lock_file, read_json, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOGS = ROOT / "build" / "gpu-suite"
SOURCES = ("kernels/**/*.py", "vpt_fast/**/*.py", "benchmarks/*.py", "tests/gpu/*.py", "tests/*.py")
"""What a result depends on; in tests/ itself not the tests, only the modules that tests/gpu imports."""
MODELS = {"vit_base_patch16_224": 77, "vit_large_patch16_224": 50, "vit_huge_patch14_224": 100}
"""Model -> seconds that its throughput takes, about. There is no time for others: throughput.py --models."""
SMALLEST, BETWEEN, LARGEST = MODELS
OURS = ("vpt_fast_graphed", "vpt_fast_bfloat16_residual_graphed")
COMPILED = ("concat_timm_compiled",)
ALIKE = ("concat_timm_compiled_graphed", "concat_timm_checkpointed")
OF_THE_SMALLEST = ("vpt_fast", "concat_timm", *ALIKE)
MEMORY = ("exact", "compact", "recompute")
"""What throughput.py measures here (`OF_THE_SMALLEST` with `SMALLEST` alone); by itself it measures more.
`ALIKE` are the peers that are spared launches, as `OURS` are, or recompute, as memory "recompute" does. The
peer that is compiled under autocast was the slower one on an H200, and takes longest of all to compile.
`BETWEEN` is wider and deeper than `SMALLEST` and otherwise the same: "exact" has to do, without a profile."""
GO_ON = tuple(f"benchmarks/{name}.py" for name in ("attention", "kernels", "recipe", "throughput", "tune"))
"""What does not measure again the rows that its results file has, unless it gets --fresh."""
MOST_AT_ONCE = 16  # concurrent processes, a core each
TAIL_LINES = 40
TEST_LIMIT, BENCHMARK_LIMIT, ON_REQUEST_LIMIT = 300.0, 360.0, 900.0
"""Seconds; what takes that long hangs. That of the tests is for ten processes or more."""
HEADER_LIMIT = 120.0  # seconds; a driver that hangs never names its device
GRACE = 5.0  # seconds from SIGTERM to SIGKILL
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}

PASSED, FAILED, UNFINISHED = "passed", "failed", "unfinished"


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    Attributes:
        command: run in the repository's root; exit status 0 means passed.
        seconds: about what it takes; it is not started with less time left. If an earlier run took longer,
            that counts instead.
        limit: seconds after which it is stopped and has failed.
        alone: whether nothing may run beside it.
        on_request: whether it runs only where --parts names it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    limit: float
    alone: bool
    on_request: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        state: "passed", "failed", or "unfinished" if the suite's time was up or it was interrupted first.
        seconds: how long it ran.
        exit_status: the process's own; negative: the signal that ended it.
        tail: the last lines of its output.
    """

    state: str
    seconds: float
    exit_status: int
    tail: list[str]


def parts_of(header: Mapping[str, Any]) -> list[Part]:
    """The suite, in the order in which it runs: what matters most comes first, in case time runs out."""
    logs = str(LOGS.relative_to(ROOT))

    def benchmark(name: str, seconds: float, command: tuple[str, ...]) -> Part:
        return Part(name, command, seconds, BENCHMARK_LIMIT, alone=True)

    def compilation(name: str, command: tuple[str, ...]) -> Part:
        """Runs a benchmark once, to fill the compilers' caches."""
        output = f"--output={logs}/compile-{name}.json"
        return Part(f"compile-{name}", (*command, "--repeats=1", output), 100, BENCHMARK_LIMIT, alone=False)

    rows = {model: (*OURS, *COMPILED, *(OF_THE_SMALLEST if model == SMALLEST else ())) for model in MODELS}
    # Without those that wait for the CPU, and with epochs of two thirds of what is usual.
    in_recipe = (f"--implementations={OURS[0]},{ALIKE[0]}", "--epoch-steps=64")
    # Those of `SMALLEST` and `LARGEST`.
    kernels = script("kernels", "--shapes=197x768,257x1280")
    compilations = [
        *(
            # The graphed ones compile to the same.
            compilation(model, throughput(model, [name for name in rows[model] if name.endswith("compiled")]))
            for model in reversed(MODELS)  # what takes longest starts first
        ),
        compilation("kernels", kernels),
        compilation("recipe", script("recipe", *in_recipe[:1], "--steps=1", "--epoch-steps=1")),
    ]
    # Building kernels keeps a core busy, and the GPU has room for many small tests. With few cores, half of
    # them: the compilations end long before the tests.
    cores = min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)
    processes = max(cores - len(compilations), cores // 2, 1)
    tests = (
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-n", str(processes), "--dist=worksteal",
        "--durations=10", "-p", "no:cacheprovider", "tests/gpu",
    )  # fmt: skip

    def of_model(model: str) -> tuple[str, ...]:
        # Each model has a results file of its own, so that one that was stopped loses no other's rows.
        memory = MEMORY[:1] if model == BETWEEN else MEMORY
        return throughput(model, rows[model], f"--memory={','.join(memory)}", results_file(header, model))

    def profile(model: str) -> tuple[str, ...]:
        return script("profile_step", f"--model={model}", f"--implementation={OURS[0]}")

    return [
        Part("tests", tests, 110, TEST_LIMIT * max(1.0, 10 / processes), alone=False),
        *compilations,
        benchmark("attention", 20, script("attention", results_file(header, "attention"))),
        *(benchmark(f"throughput-{model}", seconds, of_model(model)) for model, seconds in MODELS.items()),
        *(benchmark(f"profile-{model}", 15, profile(model)) for model in (SMALLEST, LARGEST)),
        benchmark("recipe", 48, script("recipe", *in_recipe, results_file(header, "recipe"))),
        benchmark("kernels", 45, (*kernels, results_file(header, "kernels"))),
        *on_request(header),
    ]


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """The command of a benchmark."""
    return (sys.executable, f"benchmarks/{name}.py", *arguments)


def throughput(model: str, names: Iterable[str], *arguments: str) -> tuple[str, ...]:
    """That of throughput.py for these implementations."""
    rows = f"--implementations={','.join(names)}"
    return script("throughput", f"--models={model}", rows, "--steps=4", *arguments)


def on_request(header: Mapping[str, Any]) -> list[Part]:
    """Parts that nine minutes have no room for: for ViT-B the largest batches and curves over prompts and
    batches; and other launches of kernels."""

    def part(name: str, seconds: float, command: tuple[str, ...]) -> Part:
        command = (*command, results_file(header, name))
        return Part(name, command, seconds, ON_REQUEST_LIMIT, alone=True, on_request=True)

    def smallest(*arguments: str) -> tuple[str, ...]:
        return throughput(SMALLEST, (*OURS, *COMPILED, *ALIKE), *arguments)

    return [
        part("find-batch", 210, smallest("--find-batch", f"--memory={','.join(MEMORY)}")),
        part("prompts", 420, smallest("--num-prompts=1,10,50,100,200", "--memory=exact")),
        part("batches", 330, smallest("--batch-size=16,64,256", "--memory=exact,recompute")),
        part("tune", 300, script("tune")),
    ]


def file_name(header: Mapping[str, Any], prefix: str) -> str:
    """<prefix>-<device>-<date>.json, as all results files are called."""
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return f"{prefix}-{device}-{header['date']}.json"


def results_file(header: Mapping[str, Any], prefix: str) -> str:
    """The flag of a benchmark that names it."""
    return f"--output=benchmarks/results/{file_name(header, prefix)}"


def written_at(file: Path | None) -> int | None:
    """When a file was last written; None where there is none."""
    return file.stat().st_mtime_ns if file is not None and file.exists() else None


def digest(root: Path, header: Mapping[str, Any]) -> str:
    """A hash of the sources and of what they run on: outcomes under another one do not count."""
    total = hashlib.sha256()
    versions = {key: value for key, value in header.items() if key != "date"}
    total.update(json.dumps(versions, sort_keys=True).encode())
    files = {file.relative_to(root) for pattern in SOURCES for file in root.glob(pattern)}
    for file in sorted(files):
        if file.parent == Path("tests") and file.name.startswith("test_"):
            continue
        total.update(f"{file}\0{hashlib.sha256((root / file).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


class Record:
    """The results file: an existing one of the same sources, else a new one.

    Args:
        header: of the device and the versions, and what else the file is to say.

    Raises:
        OSError: nothing can be written there.
        ValueError: an existing file cannot be read.

    Attributes:
        outcomes: by part, as found under this digest.
        earlier_seconds: by part, what it took in the newest file that has it, whatever the sources.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], sources: str) -> None:
        self.path = folder / file_name(header, "gpu-suite")
        self.header = {**header, "digest": sources}
        self.outcomes: dict[str, Outcome] = {}
        self.earlier_seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # or nothing that is measured could be kept
            pass
        name_of_any_day = file_name({**header, "date": "????-??-??"}, "gpu-suite")
        for path in sorted(folder.glob(name_of_any_day)):  # by date, the newest last
            report = read_json(path, "date", "digest", "parts")
            outcomes = {name: Outcome(**outcome) for name, outcome in report["parts"].items()}
            self.earlier_seconds |= {name: outcome.seconds for name, outcome in outcomes.items()}
            if report["digest"] == sources:
                self.path, self.outcomes = path, outcomes
                self.header = {**report, **self.header, "date": report["date"]}
                del self.header["parts"]

    def write(self) -> None:
        report = {**self.header, "parts": {name: asdict(outcome) for name, outcome in self.outcomes.items()}}
        try:
            write_json(self.path, report, indent=1)
        except OSError as error:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from None


class Running:
    """A part's process, in a group of its own so that it can be stopped with all that it has started."""

    def __init__(
        self,
        part: Part,
        command: tuple[str, ...],
        root: Path,
        logs: Path,
        deadline: float,
        environment: Mapping[str, str],
        lock: IO[str],
    ) -> None:
        self.part = part
        self.root = root
        self.log = logs / f"{part.name}.log"
        self.started = time.monotonic()
        names = [word.partition("=")[2] for word in command if word.startswith("--output=")]
        self.output = root / names[0] if names and "--fresh" in command else None
        self.output_before = written_at(self.output)
        self.limit = min(self.started + part.limit, deadline)
        self.over_budget = deadline < self.started + part.limit
        with open(self.log, "w") as output:
            shown = shlex.join(command).replace(sys.executable, "python", 1)
            print(f"$ {shown}", file=output, flush=True)
            self.process = subprocess.Popen(
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # it holds the lock even if this process is killed
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            )
        print(self.process.pid, file=lock, flush=True)

    def poll(self) -> Outcome | None:
        """Its outcome, once it has ended; stops it if its time is up."""
        status = self.process.poll()
        if status is not None:
            self.stop()  # what it may have left behind
            note = f"ended by signal {-status}: {signal.strsignal(-status)}" if status < 0 else None
            return self._outcome(PASSED if status == 0 else FAILED, note)
        if time.monotonic() < self.limit:
            return None
        self.stop()
        if self.over_budget:
            return self._outcome(UNFINISHED, "stopped: the time of the suite was up")
        return self._outcome(FAILED, f"stopped: not done in its limit of {self.part.limit:.0f} s")

    def has_older_results(self) -> bool:
        """Whether the results file that it was to empty, by --fresh, is as it was found."""
        return self.output_before is not None and written_at(self.output) == self.output_before

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(GRACE)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def interrupt(self) -> Outcome:
        self.stop()
        return self._outcome(UNFINISHED, "stopped: interrupted")

    def _outcome(self, state: str, note: str | None = None) -> Outcome:
        # Results are committed, so paths of the local machine are removed.
        text = self.log.read_text(errors="replace").replace(f"{self.root}{os.sep}", "")
        lines = text.splitlines()[-TAIL_LINES:]
        seconds = round(time.monotonic() - self.started, 1)
        return Outcome(state, seconds, self.process.returncode, lines + ([note] if note else []))


def run(
    parts: Iterable[Part],
    record: Record,
    *,
    root: Path,
    logs: Path,
    lock: IO[str],
    deadline: float,
    cores: int,
    console: Console,
) -> list[Part]:
    """Runs the parts that have not passed, and records each as it ends.

    Those that have failed before come last, so that they cannot keep the others from running.

    Args:
        lock: from `only_suite`.
        deadline: of time.monotonic(); nothing runs after it. The first part starts even if it took longer
            before: it will never have more time than now.
        cores: CPU cores to distribute.

    Returns:
        The parts for which there was no time.
    """
    pending = [part for part in parts if state_of(part, record) != PASSED]
    failed_before = [part for part in pending if state_of(part, record) == FAILED]
    first = [part for part in pending if part not in failed_before]
    waiting = [
        part
        for group in (first, failed_before)
        for part in sorted(group, key=lambda part: part.alone)  # tests, then benchmarks
    ]
    most = max(1, min(cores, MOST_AT_ONCE))
    running, left, started, tuning_forgotten = list[Running](), list[Part](), False, False
    caches = cache_folders()

    def record_outcome(job: Running, outcome: Outcome) -> None:
        running.remove(job)
        record.outcomes[job.part.name] = outcome
        if outcome.state == UNFINISHED and job.has_older_results():
            del record.outcomes[job.part.name]  # or it would go on with them, which may be of other sources
        record.write()
        show(job.part, outcome, console, job.log)
        if outcome.state == UNFINISHED:
            left.append(job.part)

    try:
        with console.status("") as status:
            while waiting or running:
                while waiting and _may_start(waiting[0], running, most):
                    part = waiting.pop(0)
                    if started and time.monotonic() + expected_seconds(part, record) > deadline:
                        left.append(part)
                        continue
                    if part.alone and not tuning_forgotten:
                        forget_tuning(Path(caches["TORCHINDUCTOR_CACHE_DIR"]))
                        tuning_forgotten = True
                    started = True
                    threads = cores if part.alone else max(1, cores // most)
                    environment = {**caches, "OMP_NUM_THREADS": str(threads)}
                    command = command_of(part, record)
                    running.append(Running(part, command, root, logs, deadline, environment, lock))
                    if not console.is_terminal:  # a terminal shows what is running all the time
                        console.print(f"started    {part.name}")
                names = ", ".join(job.part.name for job in running)
                remaining = max(0, deadline - time.monotonic())
                status.update(f"{names}  ({len(waiting)} waiting, {remaining:.0f} s left)")
                for job in list(running):
                    if (outcome := job.poll()) is not None:
                        record_outcome(job, outcome)
                time.sleep(0.05)
    except KeyboardInterrupt:
        for job in list(running):
            record_outcome(job, job.interrupt())
        raise
    finally:  # by a full disk, say, or a second Ctrl-C
        for job in running:
            job.stop()
    return left


def forget_tuning(cache: Path) -> None:
    """Deletes which of a kernel's variants torch.compile has found to be the fastest, and keeps the builds.
    It timed them beside tests and other compilations, and would not do so again."""
    for path in cache.rglob("*.best_config"):
        path.unlink()


def cache_folders() -> dict[str, str]:
    """`CACHES`: where the environment says, else in a folder that the suite alone uses. By default Triton
    needs a home that can be written, and torch.compile caches for all of a user's projects, whose tuning
    must stay."""
    own = Path(tempfile.gettempdir()) / f"vpt_fast-gpu-suite-{os.getuid()}"
    return {name: os.environ.get(name) or str(own / folder) for name, folder in CACHES.items()}


def only_suite(logs: Path) -> IO[str]:
    """A locked file in the folder of logs, which every part inherits: two on one GPU would time each other.

    Raises:
        ValueError: another suite is running, or a part of one that was killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    lock = open(logs / "running", "a+")
    try:
        lock_file(lock, wait=False)
    except BlockingIOError:
        with lock:
            lock.seek(0)
            there = [number for number in lock.read().split() if Path("/proc", number).exists()]
        raise ValueError(
            f"an earlier suite, or a part that it left when it was killed, is still running here (process "
            f"{', '.join(there)}); want it to end first"
        ) from None
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    return lock


def _may_start(part: Part, running: list[Running], most: int) -> bool:
    if not running:
        return True
    return len(running) < most and not part.alone and not running[0].part.alone


def state_of(part: Part, record: Record) -> str | None:
    outcome = record.outcomes.get(part.name)
    return None if outcome is None else outcome.state


def command_of(part: Part, record: Record) -> tuple[str, ...]:
    """The part's command. A benchmark goes on with its results file only where it was stopped: else the rows
    may be of other sources, or be why it failed."""
    begins = part.command[1] in GO_ON and state_of(part, record) != UNFINISHED
    return (*part.command, "--fresh") if begins else part.command


def expected_seconds(part: Part, record: Record) -> float:
    return max(part.seconds, record.earlier_seconds.get(part.name, 0.0))


def show(part: Part, outcome: Outcome, console: Console, log: Path) -> None:
    style = {PASSED: "green", FAILED: "red", UNFINISHED: "yellow"}[outcome.state]
    console.print(f"[{style}]{outcome.state:10}[/] {escape(part.name)}  {outcome.seconds:.0f} s")
    if outcome.state != PASSED:
        console.print(escape("\n".join(f"    {line}" for line in outcome.tail)), highlight=False)
        console.print(f"    all of it: {escape(str(log))}", highlight=False)


def chosen(parts: list[Part], patterns: str) -> list[Part]:
    """The parts whose names match one of the comma-separated patterns; where there is none, all but those on
    request.

    Raises:
        ValueError: a pattern matches none.
    """
    listed = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not listed:
        return [part for part in parts if not part.on_request]
    names = [part.name for part in parts]
    wanted: set[str] = set()
    for pattern in listed:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ValueError(f"--parts: {pattern!r} is none of {', '.join(names)}")
        wanted.update(matching)
    return [part for part in parts if part.name in wanted]


HEADER = """
import importlib.util, json, sys
sys.path.insert(0, "benchmarks")
import torch
if importlib.util.find_spec("xdist") is None:
    sys.exit("pytest-xdist is missing, which spreads the tests over the cores: want pip install pytest-xdist")
if not torch.cuda.is_available():
    sys.exit(f"no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) finds none")
from reports import make_header
print(json.dumps(make_header(torch.device("cuda"))))
"""


def read_header(root: Path) -> dict[str, Any]:
    """The device and the versions, found in another process: this one must not hold GPU memory.

    Raises:
        RuntimeError: there is no CUDA device, it does not answer, or the project cannot be imported.
    """
    try:
        found = subprocess.run(
            [sys.executable, "-c", HEADER], cwd=root, capture_output=True, text=True, timeout=HEADER_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"PyTorch did not name the device within {HEADER_LIMIT:.0f} s") from None
    if found.returncode != 0:
        raise RuntimeError((found.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return json.loads(found.stdout.splitlines()[-1])


def main(
    arguments: list[str] | None = None,
    *,
    root: Path = ROOT,
    results: Path = RESULTS,
    logs: Path = LOGS,
    header: Callable[[Path], dict[str, Any]] = read_header,
    suite: Callable[[Mapping[str, Any]], list[Part]] = parts_of,
) -> int:
    """The command; returns its exit status. The other parameters are there for its tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.75,
        help="of the whole command (default: 8.75, so that with the installation `make gpu` ends in nine)",
    )
    parser.add_argument(
        "--parts",
        default="",
        help="comma-separated names or patterns, such as 'tests,throughput-*'; by default all but "
        "find-batch, prompts, batches and tune, which nine minutes have no room for",
    )
    parser.add_argument("--fresh", action="store_true", help="run what has passed, too")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    console = Console(soft_wrap=True)
    try:
        found = header(root)
        everything = suite(found)
        parts = chosen(everything, options.parts)
        if (longest := max(parts, key=lambda part: part.seconds)).seconds > 60 * options.minutes:
            raise ValueError(
                f"--minutes: {options.minutes:g}, want {longest.seconds / 60:.2g} or more, "
                f"which {longest.name} takes about"
            )
        usual = [part.name for part in chosen(everything, "")]
        lock = only_suite(logs)
        record = Record(results, found | {"suite": usual}, digest(root, found))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    if options.fresh:
        for part in parts:
            record.outcomes.pop(part.name, None)
    done = sum(state_of(part, record) == PASSED for part in parts)
    console.print(f"{found['device']}, torch {found['torch']}: {len(parts)} parts, {done} passed before")
    cores = len(os.sched_getaffinity(0))
    try:
        with lock:
            left = run(
                parts, record,
                root=root, logs=logs, lock=lock, deadline=deadline, cores=cores, console=console,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return 130
    except OSError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    console.print(f"written: {record.path}")
    failed = [part.name for part in parts if state_of(part, record) == FAILED and part not in left]
    if failed:
        console.print(f"[red]failed[/]: {', '.join(failed)}")
    if left:
        console.print(f"[yellow]left[/]: {', '.join(part.name for part in left)}: run it again")
        return 3
    return 1 if failed else 0


def end_as_by_ctrl_c() -> None:
    """What ends this process must end the parts as well, which are in process groups of their own: a
    terminal that is closed, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    end_as_by_ctrl_c()
    sys.exit(main())
