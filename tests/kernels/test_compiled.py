"""Kernels as compiled for GPUs, run without one (`ptx`), in processes without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import GLIBC_TUNABLES

HERE = Path(__file__).parent


@pytest.mark.parametrize("arch", [80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def test_compiled_kernels_are_as_exact_as_eager_and_touch_no_other_memory(arch):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    command = [sys.executable, HERE / "compiled_kernels.py", str(arch)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
