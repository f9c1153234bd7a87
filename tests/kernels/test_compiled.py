"""Kernels as compiled for GPUs, run without one (`ptx`), in processes without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of one process each: most of a quick one's time is its start.
OPERATORS = ["prompted_attention", "window_attention", "products", "activations norms rotations"]


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
def test_compiled_kernels_are_as_exact_as_eager_and_touch_no_other_memory(operators, arch):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parent}"
    command = [sys.executable, HERE / "compiled_kernels.py", str(arch), *operators.split()]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
