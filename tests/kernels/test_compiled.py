"""Kernels as compiled for GPUs, run without one (`ptx`), in processes without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import GLIBC_TUNABLES

HERE = Path(__file__).parent


ARCHS = (80, 90, 100)


@pytest.fixture(scope="module")
def ended() -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    command = [sys.executable, HERE / "compiled_kernels.py", ",".join(map(str, ARCHS))]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
def test_compiled_kernels_are_as_exact_as_eager_and_touch_no_other_memory(arch, ended):
    assert f"sm_{arch}: right" in ended.stdout.splitlines(), ended.stdout + ended.stderr
