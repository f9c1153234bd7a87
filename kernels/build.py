"""A kernel in one configuration, to be built ahead of time, without a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Build:
    """What the compiler needs to know, as a launcher would pass it.

    Attributes:
        kernel: the `triton.jit` function.
        config: distinguishes this build from the kernel's others, for a reader: ``"bf16 D64 64x128"``.
        signature: Triton type of every argument that is not a constexpr: ``"*bf16"``, ``"i32"``, ``"i64"``,
            ``"fp32"``.
        constexprs: value of every constexpr argument; None for every absent pointer.
        divisible: names of arguments (pointers, strides) that are multiples of 16.
        num_warps, num_stages, max_registers: as launched. Without num_stages, Triton chooses, or the kernel
            pipelines its loads itself; without max_registers, ptxas chooses.
        wgmma: whether its matmuls have 64 or more rows, so that on sm_90 they must use wgmma.
        programs: how many programs an SM of sm_90 must hold at once.

    Raises:
        ValueError: an argument of the kernel is missing or given twice, or a name is none of its arguments.
    """

    kernel: Any
    config: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int | None
    wgmma: bool
    max_registers: int | None = None
    programs: int = 1

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

    @classmethod
    def of(
        cls,
        kernel: Any,
        config: str,
        pointers: Mapping[str, str | None],
        constexprs: Mapping[str, Any],
        *,
        odd: Collection[str],
        floats: Collection[str] = (),
        num_warps: int,
        num_stages: int | None = None,
        max_registers: int | None = None,
        wgmma: bool = False,
        programs: int = 1,
    ) -> Build:
        """A build of which only these arguments need be said; all others are integers, multiples of 16.

        Args:
            pointers: their types; None for one that is absent.
            constexprs: the others.
            odd: names of pointers and integers that need not be multiples of 16.
            floats: names of float32 scalars.
            kernel, config, num_warps, num_stages, max_registers, wgmma, programs: as of `Build`.
        """
        absent = {name: None for name, type in pointers.items() if type is None}
        signature = {
            name: pointers.get(name) or ("fp32" if name in floats else "i32")
            for name in kernel.arg_names
            if name not in absent and name not in constexprs
        }
        return cls(
            kernel=kernel,
            config=config,
            signature=signature,
            constexprs={**absent, **constexprs},
            divisible=tuple(name for name in signature if name not in odd and name not in floats),
            num_warps=num_warps,
            num_stages=num_stages,
            wgmma=wgmma,
            max_registers=max_registers,
            programs=programs,
        )

    @property
    def name(self) -> str:
        return self.kernel.__name__
