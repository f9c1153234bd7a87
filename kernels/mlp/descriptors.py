"""Launches of kernels that take tensor descriptors, of matrices that TMA moves in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor
from vpt_fast.kernels.build import Build
from vpt_fast.kernels.launch import TYPE_NAMES, Launch

Block = tuple[int, int]


class Plan(NamedTuple):
    """How such a kernel is launched.

    kernel: its tensors come first, then integers: M, N, K, and strides that no descriptor holds.
    blocks: the block that it moves at a time, for each of its tensors in order; None: it takes a pointer.
    programs_per_sm: how many an SM is to hold at once.
    options: constexprs and launch options.
    descriptor: the class of its descriptors. layout: how Gluon holds a block in shared memory, by dtype and
        block; None: it is Triton's choice.
    """

    kernel: Any
    blocks: list[Block | None]
    programs_per_sm: int
    options: dict[str, Any]
    descriptor: type = TensorDescriptor
    layout: Callable[[torch.dtype, Block], Any] | None = None

    @property
    def tensors(self) -> list[str]:
        """The names of the kernel's tensors, in order."""
        return self.kernel.arg_names[: len(self.blocks)]

    @property
    def integers(self) -> list[str]:
        """The names of its integers, in order."""
        return [name for name in self.kernel.arg_names[len(self.blocks) :] if name not in self.options]

    def describe(self, t: torch.Tensor, block: Block) -> Any:
        """Descriptor of (.., columns), whose leading dimensions can be one."""
        columns = t.shape[-1]
        shape, strides = [t.numel() // columns, columns], [row_stride(t), 1]
        layout = () if self.layout is None else (self.layout(t.dtype, block),)
        return self.descriptor(t, shape, strides, list(block), *layout)

    def type_of(self, dtype: torch.dtype, block: Block) -> str:
        """Triton's name of a descriptor's type."""
        layout = "" if self.layout is None else f",{self.layout(dtype, block)!r}"
        return f"tensordesc<{_type_name(dtype)}[{block[0]},{block[1]}]{layout}>"

    def build(
        self, config: str, dtypes: dict[str, torch.dtype], absent: tuple[str, ...], divisible: tuple[str, ...]
    ) -> Build:
        """The build of a launch.

        Args:
            config: as of `Build`.
            dtypes: of the tensors, by name, in the kernel's order.
            absent: those that are None.
            divisible: as of `Build`.
        """
        signature = {
            name: f"*{_type_name(dtype)}" if block is None else self.type_of(dtype, block)
            for (name, dtype), block in zip(dtypes.items(), self.blocks, strict=True)
            if name not in absent
        }
        constexprs = {**dict.fromkeys(absent), **self.options}
        num_warps, num_stages, maxnreg = (
            constexprs.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg")
        )
        return Build(
            kernel=self.kernel,
            config=config,
            signature={**signature, **dict.fromkeys(self.integers, "i32")},
            constexprs=constexprs,
            divisible=divisible,
            num_warps=num_warps,
            num_stages=num_stages,
            max_registers=maxnreg,
            wgmma=True,
            programs=self.programs_per_sm,
        )


def _type_name(dtype: torch.dtype) -> str:
    return {**TYPE_NAMES, torch.uint8: "u8"}[dtype]


def row_stride(t: torch.Tensor) -> int:
    """Elements from one row of (.., columns) to the next, if the leading dimensions can be one."""
    # The stride of a dimension of size 1 is arbitrary.
    steps = [stride for n, stride in zip(t.shape[:-1], t.stride(), strict=False) if n > 1]
    return steps[-1] if steps else t.shape[-1]


class DescriptorLaunch:
    """A launch, from tensors, of a kernel that takes descriptors.

    Args:
        plan: of the kernel.
        device: of the tensors.
        programs: how many; 0: a tensor is empty, and nothing is launched.
        sizes: the kernel's integers.
    """

    def __init__(self, plan: Plan, device: torch.device, programs: int, sizes: tuple[int, ...]) -> None:
        self._launch = Launch(plan.kernel, device, programs, *sizes, **plan.options)
        self._plan = plan
        self._is_empty = programs == 0  # an empty tensor has no descriptor
        self._forms: list[Any] | None = None  # descriptors without a tensor; None for arguments without one

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self._is_empty:
            return
        if self._forms is None:
            self._forms = [
                None if t is None or block is None else _with_base(self._plan.describe(t, block), None)
                for t, block in zip(tensors, self._plan.blocks, strict=True)
            ]
        self._launch(
            *(
                t if form is None else _with_base(form, t)
                for t, form in zip(tensors, self._forms, strict=True)
            )
        )


def _with_base(descriptor: Any, base: torch.Tensor | None) -> Any:
    """The same descriptor for another tensor of the same layout, which is not checked again."""
    found = object.__new__(type(descriptor))
    found.__dict__.update(descriptor.__dict__)
    found.base = base
    return found
