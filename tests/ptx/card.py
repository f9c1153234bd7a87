"""A driver for Triton whose launches `translate` runs: kernels are compiled for a GPU that is not there, and
take tensors in this process's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget

from .machine import Fault, GlobalMemory
from .tma import TensorMap
from .translate import Kernel


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads


class _Launcher:
    """Launches one build. `build` is set once Triton has made it."""

    build: Any = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        self.kernel: Kernel | None = None

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        """With the grid's size; then stream, function, metadata and hooks; then the kernel's arguments."""
        if self.kernel is None:
            self.kernel = Kernel(self.build.asm["ptx"])
        parameters, memory = self._parameters(args[6:])
        assert len(parameters) == self.kernel.num_parameters
        with np.errstate(all="ignore"):  # integers wrap around, as on a GPU
            for program in np.ndindex(z, y, x):
                try:
                    self.kernel.run(self.metadata.shared, memory, program[::-1], (x, y, z), parameters)
                except Fault as fault:
                    raise Fault(f"{self.kernel.name}, program {program[::-1]}: {fault}") from None

    def _parameters(self, args: tuple[Any, ...]) -> tuple[list[Any], GlobalMemory]:
        """The kernel's parameters, and the memory of its tensors."""
        parameters: list[Any] = []
        ranges = set()
        descriptors = iter(self.metadata.tensordesc_meta or ())
        for kind, value in zip(self.source.signature.values(), args, strict=True):
            if kind == "constexpr":
                continue
            tensor = getattr(value, "base", value)
            if hasattr(tensor, "untyped_storage"):
                first, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                ranges |= {(first, first + size)} if size else set()
            if kind.startswith("tensordesc"):
                own = next(descriptors)
                parameters.append(
                    TensorMap(
                        tensor.data_ptr(), own["elem_size"], tuple(value.shape), tuple(value.strides),
                        tuple(own["block_size"]), own["swizzle"],
                    )
                )  # fmt: skip
                parameters += [*value.shape, *value.strides]
            elif kind.startswith("*"):
                parameters.append(value.data_ptr())
            elif kind == "fp32":
                parameters.append(int(np.float32(value).view(np.uint32)))
            else:
                parameters.append(int(value))
        return [*parameters, 0, 0], GlobalMemory(ranges)  # memory for Triton itself: none


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.utils, self.target = _Utilities(), GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(arch: int) -> None:
    """From now on, Triton in this process compiles for sm_`arch` and launches here."""
    triton.runtime.driver.set_active(_Driver(arch))
    compiled = triton.compiler.CompiledKernel
    initialise = compiled._init_handles

    def initialise_and_tell(build: Any) -> None:
        is_new = build.module is None
        initialise(build)
        if is_new:
            build._run.build = build

    compiled._init_handles = initialise_and_tell
