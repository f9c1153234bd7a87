"""A launch over and over: Triton is asked once which build it is, and gets what it would have got. And which
devices the kernels run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from vpt_fast.kernels.launch import Launch, arch_of, cdiv, next_power_of_2, takes_kernels

CPU = torch.device("cpu")


class Kernel:
    """What `triton.jit` makes of kernel(x, y, n, WIDE, BLOCK); `calls` are Triton's, `runs` the build's."""

    __name__ = "kernel"
    arg_names = ("x", "y", "n", "WIDE", "BLOCK")

    def __init__(self, has_build: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[tuple[Any, ...]] = []
        self.has_build = has_build

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((grid, args, options))
            return Build(self) if self.has_build else None

        return call


class Build:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.runs.append((grid, args))


def launch_of(kernel: Kernel, grid: int | tuple[int, int, int] = 6) -> Launch:
    return Launch(kernel, CPU, grid, 3, BLOCK=16, WIDE=True, num_warps=4)


def test_the_first_call_goes_through_triton() -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch_of(kernel)(x, None)
    options = {"BLOCK": 16, "WIDE": True, "num_warps": 4, "enable_fp_fusion": True}
    assert kernel.calls == [((6, 1, 1), (x, None, 3), options)]
    assert kernel.runs == []


def test_later_calls_run_the_build_on_every_argument_in_the_kernels_order() -> None:
    kernel, x, other = Kernel(), torch.zeros(4), torch.ones(4)
    launch = launch_of(kernel)
    launch(x, None)
    launch(other, None)
    assert len(kernel.calls) == 1
    ((grid, args),) = kernel.runs
    assert grid == (6, 1, 1)
    assert args[0] is other and args[1:] == (None, 3, True, 16)


def test_without_a_build_triton_is_asked_every_time() -> None:
    kernel, x = Kernel(has_build=False), torch.zeros(4)
    launch = launch_of(kernel)
    launch(x, x)
    launch(x, x)
    assert len(kernel.calls) == 2 and kernel.runs == []


@pytest.mark.parametrize("grid", [0, (3, 0, 2), (3, 2, 0)])
def test_without_programs_nothing_is_launched(grid: int | tuple[int, int, int]) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch_of(kernel, grid)(x, x)
    assert kernel.calls == []


def test_a_grid_of_three_axes_stays_as_it_is() -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch = launch_of(kernel, (3, 2, 5))
    launch(x, x)
    launch(x, x)
    assert (kernel.calls[0][0], kernel.runs[0][0]) == ((3, 2, 5), (3, 2, 5))


@pytest.mark.parametrize(
    "other",
    [torch.zeros(4, dtype=torch.float64), torch.zeros(6)[2:], None],
    ids=["dtype", "alignment", "absent"],
)
def test_in_the_interpreter_tensors_of_another_kind_are_refused(other: torch.Tensor | None) -> None:
    kernel, x = Kernel(has_build=False), torch.zeros(4)
    launch = launch_of(kernel)
    launch(x, x)
    with pytest.raises(AssertionError, match="as at first"):
        launch(x, other)


@pytest.mark.parametrize(("n", "wanted"), [(1, 1), (2, 2), (3, 4), (768, 1024), (1024, 1024)])
def test_the_next_power_of_2(n: int, wanted: int) -> None:
    assert next_power_of_2(n) == wanted


@pytest.mark.parametrize(("n", "wanted"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_that_elements_take(n: int, wanted: int) -> None:
    assert cdiv(n, 16) == wanted


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)]
)
def test_the_architecture_whose_tiles_apply(capability: tuple[int, int], arch: int, monkeypatch) -> None:
    monkeypatch.setattr("vpt_fast.kernels.launch._capability", lambda device: capability)
    assert arch_of(torch.device("cuda", 0)) == arch


@pytest.mark.parametrize(
    ("capability", "hip", "wanted"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((9, 4), "6.3", False)],
)
def test_the_devices_that_kernels_run_on(
    capability: tuple[int, int], hip: str | None, wanted: bool, monkeypatch
) -> None:
    monkeypatch.setattr("vpt_fast.kernels.launch._capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert takes_kernels(torch.device("cuda", 0)) is wanted


# Triton as installed, on a device that it takes for an sm_90 and that runs nothing.
ON_NO_DEVICE = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from vpt_fast.kernels.launch import Launch
from vpt_fast.kernels.mlp.jit import activate_kernel

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return None, None, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Driver:
    utils = Utils()
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def launcher_cls(self, src, metadata):
        builds.append(metadata)
        return lambda *args: calls.append(args)

builds, calls = [], []
triton.runtime.driver.set_active(Driver())
u, a = torch.zeros(4, 16), torch.empty(4, 16)
options = dict(KIND="gelu", BLOCK=128, ONE_ROW=True, num_warps=4)
launch = Launch(activate_kernel, torch.device("cpu"), 1, 64, 1, 1, 0, 0, 0, **options)
launch(u, a, None)
"""
TWICE = """
activate_kernel.run = None  # it is not asked again
launch(u, a, None)
first, second = ([*call[:6], *call[7:]] for call in calls)  # but for what profilers are told
print(json.dumps([len(first), all(x is y or x == y for x, y in zip(first, second, strict=True))]))
"""
AHEAD_OF_TIME = """
from vpt_fast.kernels.aot import compile_build
from vpt_fast.kernels.mlp.ops import builds as builds_of

ahead, _ = compile_build(builds_of(90)[0], 90)
print(json.dumps([build.enable_fp_fusion for build in (builds[0], ahead.metadata)]))
"""


@pytest.fixture(scope="module")
def on_no_device() -> list[Any]:
    """What the scripts above print, in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ON_NO_DEVICE + TWICE + AHEAD_OF_TIME
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "0"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_later_calls_give_tritons_launcher_what_the_first_one_gave(on_no_device) -> None:
    count, are_equal = on_no_device[0]
    assert count > 12 and are_equal  # the kernel's own 12 among them


def test_builds_fuse_products_and_sums_whatever_tritons_default(on_no_device) -> None:
    assert on_no_device[1] == [True, True]


WITHOUT_COMPILER = """
import torch
from triton.backends import backends
from vpt_fast.kernels.dispatch import get_backend
from vpt_fast.kernels import dispatch

backends["nvidia"].driver.is_active = staticmethod(lambda: True)
torch.cuda.is_available = lambda: True
dispatch.takes_kernels = lambda device: True
backend = get_backend("auto")
assert backend.ops(torch.device("cpu"), torch.float32, 64).name == "torch"
for check in (backend.ops, backend.require_operations):
    try:
        check(torch.device("cuda"), torch.float32, 64)
    except ValueError as error:
        print(error)
"""


def test_machine_without_a_c_compiler_is_named_before_anything_runs(tmp_path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "CC"}
    env |= {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == second and "Failed to find C compiler" in first
    assert (
        first.startswith("backend='triton': Triton cannot launch kernels here") and "'torch' needs" in first
    )
