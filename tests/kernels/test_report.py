"""What kernels take of a GPU, read from ahead-of-time builds, in processes without Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import report_kernels
import triton
from vpt_fast.kernels import aot
from vpt_fast.kernels.aot import Resources, count_programs, measure
from vpt_fast.kernels.report import main

HERE = Path(__file__).parent
# Saves a sixth of the time: glibc keeps as many freed pieces of memory of each size for whoever asks next,
# where it would join and split them, which the compiler's passes keep it busy with.
GLIBC_TUNABLES = "glibc.malloc.tcache_count=65535"
# Reports on other modules than the package's own: the arguments of each, and the folder of its cache.
REPORT_ON_OTHERS = """
import json, os, sys
from vpt_fast.kernels.report import main
for arguments, os.environ["TRITON_CACHE_DIR"] in json.loads(sys.argv[1]):
    status = main(["--arch", "90", "--jobs", "1", *arguments], ["report_kernels", "report_bad_kernels"])
sys.exit(status)
"""


def run(*args: object) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(HERE), "GLIBC_TUNABLES": GLIBC_TUNABLES}
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True)


def report_on_others(*reports: tuple[list[object], Path]) -> subprocess.CompletedProcess[str]:
    """In one process, as starting it takes longer than most reports; the exit status is the last one's."""
    return run("-c", REPORT_ON_OTHERS, json.dumps(reports, default=str))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_is_clean(arch, tmp_path):
    file = tmp_path / "rows.json"
    result = run("-m", "vpt_fast.kernels.report", "--arch", arch, "--jobs", 2, "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row for row in json.loads(file.read_text())["rows"] if row["problems"]] == []


def test_tiles_are_clean_on_other_gpus_that_share_them(tmp_path):
    """Those that once spilled there, and not on the GPU that gives its name to their table."""
    reports = [
        ["--arch", str(arch), "--filter", name, "--jobs", "1", "--json", str(tmp_path / f"{arch}.json")]
        for arch, name in (
            (86, "grad_kv_kernel bf16 D88 16x32 all keys"),
            (89, "linear_activate_backward_kernel bf16 gelu u 64x64x32"),
            (103, "attention_forward_kernel bf16 D16 128x64"),
            (120, "attention_forward_kernel fp32 D64 16x32"),
        )
    ]
    code = "import json, sys; from vpt_fast.kernels.report import main"
    result = run("-c", f"{code}; sys.exit(max(map(main, json.loads(sys.argv[1]))))", json.dumps(reports))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(tmp_path.iterdir())) == len(reports)


@pytest.mark.parametrize(
    ("threads", "registers", "shared_bytes", "tmem_columns", "expected"),
    [
        (256, 128, 0, 0, 2),
        (128, 168, 0, 0, 3),
        (128, 169, 0, 0, 2),  # 176 are given
        (512, 16, 0, 0, 4),
        (128, 32, 232_448, 0, 1),
        (128, 32, 76_800, 0, 3),  # 1 KiB more of each
        (128, 32, 0, 256, 2),
    ],
)
def test_programs_that_a_processor_holds(threads, registers, shared_bytes, tmem_columns, expected):
    assert count_programs(100, threads, registers, shared_bytes, tmem_columns) == expected


def test_too_much_tensor_memory_is_a_fault():
    resources = Resources(32, 0, 0, 0, 1, 513, 0, 1, 0, False, {})
    problems = resources.problems(report_kernels.builds(90)[0], 100)
    assert problems == ["tensor memory 513 over 512 columns"]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A report for sm_90 on kernels with and without faults, built afresh."""
    folder = tmp_path_factory.mktemp("report")
    result = report_on_others((["--json", folder / "rows.json"], folder / "cache"))
    result.cache = folder / "cache"
    result.report = json.loads((folder / "rows.json").read_text())
    result.rows = {row["config"]: row for row in result.report["rows"]}
    return result


def test_a_fault_is_exit_status_1(faulty):
    assert faulty.returncode == 1, faulty.stderr


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("spills", r"spills \d+ bytes"),
        ("array", "keeps (40|48) bytes in local memory"),
        ("no wgmma", "no wgmma"),
        ("serialized", r"spills \d+ bytes; serialized wgmma"),  # ptxas waits, as it is short of registers
        ("too many registers", "3 programs on an SM, want 4"),
        ("too much shared memory", r"shared memory \d+ over 232448 bytes"),
        ("does not compile", "does not compile: CompilationError .*power of 2"),
    ],
)
def test_a_fault_is_named_in_its_row(faulty, config, problem):
    assert re.fullmatch(problem, "; ".join(faulty.rows[config]["problems"]))


@pytest.fixture(scope="module")
def later(faulty, tmp_path_factory):
    """Reports of another process on the builds of `faulty`, with the logs of ptxas and without them, as where
    a launch has made the builds; then one on a filtered part of them."""
    folder = tmp_path_factory.mktemp("later")
    for log in ("kept", "lost"):
        shutil.copytree(faulty.cache, folder / log)
    for path in (folder / "lost").glob("*/ptxas.log"):
        path.unlink()
    result = report_on_others(
        *((["--json", folder / f"{log}.json"], folder / log) for log in ("kept", "lost")),
        (["--filter", "16x32"], folder / "kept"),
    )
    result.folder = folder
    return result


@pytest.mark.parametrize("log", ["kept", "lost"])
def test_a_report_on_builds_in_the_cache_is_the_same(faulty, later, log):
    assert json.loads((later.folder / f"{log}.json").read_text()) == faulty.report


def test_the_table_names_faults(faulty):
    (line,) = [line for line in faulty.stdout.splitlines() if line.startswith("product_kernel  no wgmma")]
    assert line.endswith("  no wgmma")


def test_rows_stand_in_the_order_of_the_builds(faulty):
    assert [row["config"] for row in faulty.report["rows"]] == [
        *("64x32", "16x32", "64x32 unaligned"),
        *("spills", "array", "no wgmma", "serialized", "too many registers"),
        *("too much shared memory", "does not compile"),
    ]


def test_json_has_what_it_was_built_with_and_every_column(faulty):
    assert list(faulty.report) == ["arch", "triton", "torch", "rows"]
    assert faulty.report["arch"] == 90
    told = {"kernel", "config", "num_warps", "num_stages", "wgmma_wanted", "shared_limit", "problems"}
    assert set(faulty.rows["does not compile"]) == told
    read = {"registers", "stack_bytes", "spill_bytes", "shared_bytes", "programs", "tmem_columns"}
    counted = {"wgmma", "tcgen05", "mma_sync", "serialized", "global_loads"}
    assert set(faulty.rows["64x32"]) == told | read | counted


def test_what_is_read_of_a_build_is_in_its_machine_code(faulty):
    cubins = [*faulty.cache.glob("*/product_kernel.cubin")]
    assert len(cubins) == 7  # two configs have the same build, and one does not compile
    for cubin in cubins:
        ptx, log = cubin.with_suffix(".ptx").read_text(), (cubin.parent / "ptxas.log").read_text()
        tool = triton.knobs.nvidia.cuobjdump.path
        sass = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True).stdout
        count = Counter(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE)
        )
        assert len(aot.WGMMA.findall(ptx)) == count["HGMMA"]
        assert len(aot.MMA_SYNC.findall(ptx)) == count["HMMA"]
        assert len(aot.LOAD.findall(ptx)) == count["LDG"]
        assert len(aot.COPY.findall(ptx)) == count["LDGSTS"]
        assert (int(aot.STACK.search(log)[2]) > 0) == (count["STL"] > 0)
        assert (aot.SERIALIZED in log) == (count["HGMMA"] > 1 and count["WARPGROUP"] > count["HGMMA"])


def test_small_products_use_the_older_matrix_instruction(faulty):
    row = faulty.rows["16x32"]
    assert row["mma_sync"] and not row["wgmma"]


def test_loads_are_wide_only_where_pointers_are_aligned(faulty):
    aligned, unaligned = (faulty.rows[config]["global_loads"] for config in ("64x32", "64x32 unaligned"))
    assert (max(map(int, aligned)), max(map(int, unaligned))) == (128, 16)


def test_progress_goes_to_stderr(faulty):
    assert len(re.findall(r"^\d+/10 \w+_kernel .* s\)", faulty.stderr, re.MULTILINE)) == 10


def test_filter_leaves_out_the_faulty_ones(later):
    assert later.returncode == 0, later.stdout + later.stderr
    assert "1 builds for sm_90, 0 with problems" in later.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--arch", "70"], "'?70'?"),
        (["--arch", "90", "--jobs", "0"], "--jobs: got 0"),
        (["--arch", "90", "--json", "no/such/folder.json"], "no/such"),
        (["--arch", "90", "--filter", "nobody"], "--filter: .*'nobody'"),
    ],
    ids=["arch", "jobs", "json", "filter"],
)
def test_a_wrong_argument_is_named(args, named, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(args, ["report_kernels"])
    assert stopped.value.code == 2
    assert re.search(named, capsys.readouterr().err)


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        main(["--arch", "90"], ["report_kernels"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_an_interpreted_kernel_is_not_measured(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="product_kernel: .*want TRITON_INTERPRET unset"):
        measure(report_kernels.builds(90)[0], 90)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"signature": {"a": "*fp16", "b": "*fp16"}}, "got c"),
        ({"constexprs": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "BLOCK": 64}}, "got BLOCK"),
        ({"constexprs": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "a": None}}, "got a"),
        ({"divisible": ("a", "BLOCK_M")}, r"divisible: got \('a', 'BLOCK_M'\)"),
    ],
    ids=["missing", "unknown", "twice", "divisible"],
)
def test_a_build_that_does_not_fit_its_kernel_says_where(changes, named):
    with pytest.raises(ValueError, match=f"product_kernel 64x32: {named}"):
        replace(report_kernels.builds(90)[0], **changes)
