"""One kernel in one configuration, to be built ahead of time for a GPU that need not be there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Build:
    """What the compiler needs to know, as a launcher would tell it.

    Attributes:
        kernel: the `triton.jit` function.
        config: what tells this build from others of the kernel, for a reader: ``"bf16 D64 64x128"``.
        signature: for every argument that is not a constexpr its Triton type, ``"*bf16"``, ``"i32"``,
            ``"i64"``, ``"fp32"``.
        constexprs: the value of every constexpr argument, and None for every pointer that is absent.
        divisible: names of arguments (pointers, strides) that are multiples of 16.
        num_warps, num_stages, max_registers: as launched; None leaves registers to the assembler.
        wgmma: whether its matrix products have 64 or more rows, so that on sm_90 they must be wgmma.

    Raises:
        ValueError: an argument of the kernel left out or named twice, or a name that it does not have.
    """

    kernel: Any
    config: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    wgmma: bool
    max_registers: int | None = None

    def __post_init__(self) -> None:
        arguments = {*inspect.signature(self.kernel.fn).parameters}
        wrong = ({*self.signature} | {*self.constexprs}) ^ arguments | {*self.signature} & {*self.constexprs}
        if wrong:
            names = ", ".join(sorted(wrong))
            raise ValueError(
                f"{self.name} {self.config}: got {names}, want every argument of the kernel once, "
                "in signature or in constexprs"
            )
        if not {*self.divisible} <= {*self.signature}:
            raise ValueError(
                f"{self.name} {self.config}: divisible: got {self.divisible}, want names in signature"
            )

    @property
    def name(self) -> str:
        return self.kernel.__name__
