"""Translates a kernel's PTX into Python: a function for each basic block, of all threads together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import matrices, numbers, tensor_memory, tma
from .machine import Block, Fault, GlobalMemory, Program
from .source import BARRIERS, REGISTERS_OF_GROUP, Instruction, Source, elements, parse

Lines = list[str]
ENDED = object()
WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}
NUMBER = re.compile(r"-?\d+")
REGISTER = re.compile(r"%(p|r|rs|rd)\d+(_\d+)?")
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
TENSOR = re.compile(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]")  # a tensor map and where in the tensor
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
NEGATED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true where a number is NaN
BITWISE = {"and": "&", "or": "|", "xor": "^"}
FLOAT = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "numbers.multiply_add({0}, {1}, {2})",
    "max": "np.fmax({0}, {1})",
    "min": "np.fmin({0}, {1})",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "ex2": "np.exp2({0})",
    "rsqrt": "np.float32(1) / np.sqrt({0})",
}


def width_of(kind: str) -> int:
    """Bytes of a PTX type."""
    kind = kind.lstrip("bfsu")
    return 2 * WIDTHS[kind[:-2]] if kind.endswith("x2") else WIDTHS[kind]


def register_width(register: str) -> int:
    """Bytes of a register, by its name."""
    return {"%rd": 8, "%rs": 2}.get(re.match(r"%[a-z]+", register)[0], 4)


def float_operation(name: str, values: Sequence[str]) -> str:
    if name in ("max", "min") and len(values) == 3:
        values = [FLOAT[name].format(*values[:2]), values[2]]
    assert FLOAT[name].count("{") == len(values)
    return FLOAT[name].format(*values)


def numpy_type(sign: str, bits: int) -> str:
    return f"int{bits}" if sign == "s" else f"uint{bits}"


class Kernel:
    """A kernel that `run` runs."""

    def __init__(self, ptx: str) -> None:
        source = parse(ptx)
        self.name, self.num_threads = source.name, source.num_threads
        self.num_parameters = len(source.parameters)
        translator = Translator(source)
        self._functions = translator.functions()
        self._num_registers = len(translator.registers)
        # Where threads do not go on alone: where they may have to wait for others, and at the end.
        firsts = {i: block[0] for i, block in enumerate(source.blocks) if block}
        self._barriers = {i: barrier_of(first) for i, first in firsts.items() if first.opcode[:2] in BARRIERS}
        self._registers = {
            i: (first.opcode[1], int(first.operands[0]))
            for i, first in firsts.items()
            if first.opcode[:2] in REGISTERS_OF_GROUP
        }
        self._waits = [*self._barriers, *self._registers, len(source.blocks)]
        # Only kernels whose warpgroups do different work divide registers among them.
        self._group_size = matrices.GROUP if self._registers else self.num_threads
        self._max_registers = source.max_registers
        if self._registers and source.max_registers is None:
            raise Fault("setmaxnreg: in a kernel without .maxnreg")

    def run(
        self,
        shared_bytes: int,
        memory: GlobalMemory,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: list[Any],
    ) -> None:
        """One program; the arguments are those of `Program`. Groups of threads take turns: each goes on until
        it has to wait for another."""
        program = Program(
            self.num_threads, shared_bytes, memory, place, grid, parameters,
            self._num_registers, self._group_size, self._max_registers or 0,
        )  # fmt: skip
        running = {block.shared.group: self._steps(block) for block in program.blocks}
        while running:
            before = program.progress
            for group, steps in list(running.items()):
                if next(steps, ENDED) is ENDED:
                    del running[group]
                    program.num_events += 1
            if program.progress == before:
                raise Fault("mbarrier.try_wait, bar.sync or setmaxnreg: it would wait for ever")
        program.require_end()

    def _steps(self, block: Block) -> Iterator[None]:
        """Runs a group of threads, up to each time that others have to go on first. Where threads part, those
        whose place in the code is first go on alone, until all are at one place again, or have to wait for
        each other: the compiler orders the code such that they meet as early as they can."""
        end, at = len(self._functions), 0
        while at < end:
            if at in self._barriers:
                yield from block.meet(*self._barriers[at])
            if at in self._registers:
                yield from block.set_registers(*self._registers[at])
            next_at = self._functions[at](block, block.registers)
            at = self._reunite(block, next_at) if isinstance(next_at, np.ndarray) else next_at
            if block.has_to_wait:
                block.has_to_wait = False
                yield

    def _reunite(self, block: Block, places: np.ndarray) -> int:
        """Runs threads at different places in the code until they are at one, and returns it."""
        while (places != places[0]).any():
            goes_on = ~np.isin(places, self._waits)
            if not goes_on.any():
                raise Fault("bar.sync: not all threads reach it")
            at = int(places[goes_on].min())
            block.mask = places == at
            before = list(block.registers)
            next_at = self._functions[at](block, block.registers)
            for i, old in enumerate(before):
                if block.registers[i] is not old:
                    new = np.asarray(block.registers[i])
                    block.registers[i] = np.where(block.mask, new, np.asarray(old).astype(new.dtype))
            places = np.where(block.mask, next_at, places)
            block.mask = None
        return int(places[0])


def barrier_of(i: Instruction) -> tuple[int, int | None]:
    """A barrier's number, and of how many threads it is, None: of all."""
    number, *count = i.operands
    return int(number), int(count[0]) if count else None


class Translator:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.registers: dict[str, int] = {}
        self.parameters = {name: i for i, name in enumerate(source.parameters)}

    def functions(self) -> list[Callable[[Block, list[Any]], int | np.ndarray]]:
        """Of the basic blocks: what each does, and which is the next, or which for every thread."""
        text = ""
        for i, block in enumerate(self.source.blocks):
            lines = []
            for instruction in block:
                try:
                    lines += self.instruction(instruction, i + 1)
                except (AssertionError, KeyError, ValueError) as error:  # it, or its form, is not known here
                    raise NotImplementedError(instruction.text) from error
            text += f"def block{i}(B, R):\n" + "".join(f"  {line}\n" for line in (*lines, f"return {i + 1}"))
        names: dict[str, Any] = dict(
            np=np, numbers=numbers, matrices=matrices, tensor_memory=tensor_memory, tma=tma
        )
        exec(compile(text, f"<{self.source.name}>", "exec"), names)
        return [names[f"block{i}"] for i in range(len(self.source.blocks))]

    # Operands

    def register(self, name: str) -> str:
        return f"R[{self.registers.setdefault(name, len(self.registers))}]"

    def read(self, operand: str, kind: str) -> str:
        """An operand's value as PTX's type `kind`: b32, s64, f32, bf16, pred."""
        if kind == "pred":
            if operand.startswith("!"):
                return f"~{self.register(operand[1:])}"
            return f"np.bool_({operand != '0'})" if NUMBER.fullmatch(operand) else self.register(operand)
        bits = 8 * width_of(kind)
        if operand in ("%globaltimer", "%globaltimer_lo"):
            value = "B.time()"
        elif "." in operand:
            value = f"B.special[{operand!r}]"
        elif REGISTER.fullmatch(operand):
            value = self.register(operand)
        elif operand == "global_smem":  # shared memory starts at 0
            value = "np.uint32(0)"
        elif operand in self.parameters:  # a tensor map, known by its number
            value = f"np.uint64({self.parameters[operand]})"
        else:
            digits, base = (operand[2:].rstrip("U"), 16) if operand[:2] in ("0f", "0x") else (operand, 10)
            value = f"np.uint{bits}({int(digits, base) % 2**bits})"
        if kind == "bf16":
            return f"numbers.bfloat16_to_float({value})"
        if kind == "f16":
            return f"numbers.float16_to_float({value})"
        view = {"s": f"int{bits}", "f": f"float{bits}"}.get(kind[0]) if not kind.endswith("x2") else None
        return f"{value}.view(np.{view})" if view else value

    def address(self, operand: str, space: str) -> str:
        base, offset = ADDRESS.fullmatch(operand).groups()
        kind = "u64" if space == "global" else "u32"
        return f"({self.read(base, kind)} + {self.read(offset or '0', kind)})"

    def guard(self, instruction: Instruction) -> str:
        if instruction.guard is None:
            return "None"
        return self.read("!" * instruction.negated + instruction.guard, "pred")

    def write(self, instruction: Instruction, value: str, register: str | None = None) -> Lines:
        """Where the guard allows."""
        target = self.register(register or instruction.operands[0])
        if instruction.guard is None:
            return [f"{target} = {value}"]
        return [f"{target} = np.where({self.guard(instruction)}, {value}, {target})"]

    # Instructions

    def instruction(self, i: Instruction, following: int) -> Lines:
        """Python for it; `following`: the next basic block."""
        first = i.opcode[0]
        if first == "bra":
            target = self.source.labels[i.operands[0]]
            if i.guard is None:
                return [f"return {target}"]
            return [
                f"taken = np.asarray({self.guard(i)})",
                "if taken.ndim and B.mask is not None: taken = taken & B.mask",
                f"if taken.all(): return {target}",
                "if taken.any() or B.mask is not None:",
                f"  return np.where(B.each(taken), {target}, {following})",
            ]
        if first == "ret":
            return [f"return {len(self.source.blocks)}"]
        if i.opcode[:3] == ("fence", "proxy", "async"):
            return ["B.shared.fence()"]
        if first in ("fence", "membar"):  # all else is in order here
            return []
        if i.opcode[:2] == ("bar", "warp"):  # as the threads of a warp are
            return []
        if i.opcode[:2] in (*BARRIERS, *REGISTERS_OF_GROUP):  # see Kernel
            return []
        special = getattr(self, f"_{first}", None)
        if special is not None:
            return special(i)
        return self.write(i, self.arithmetic(i))

    def arithmetic(self, i: Instruction) -> str:
        """The value of an instruction of numbers."""
        first, kind = i.opcode[0], i.opcode[-1]
        sources = i.operands[1:]
        if kind == "pred":
            values = [self.read(source, kind) for source in sources]
            if first in ("mov", "not"):
                return "~" * (first == "not") + values[0]
            return f"{values[0]} {BITWISE[first]} {values[1]}"
        bits = 8 * width_of(kind)
        assert not {"NaN", "sat"} & {*i.opcode}
        if kind == "f32" or i.opcode[-2] == "f32":  # of two types, the second is that of all but the last
            values = [self.read(source, kind) for source in sources[:-1]]
            values.append(self.read(sources[-1], "f32"))
            return f"np.asarray({float_operation(first, values)}).view(np.uint32)"
        if kind.endswith("x2"):
            values = [self.read(source, kind) for source in sources]
            names = "abc"[: len(values)]
            operation = f"lambda {', '.join(names)}: {float_operation(first, names)}"
            return f"numbers.in_pairs({operation}, {kind[:-2]!r}, {', '.join(values)})"
        assert kind.lstrip("bsu") in WIDTHS
        plain = [self.read(source, f"b{bits}") for source in sources[:3]]
        typed = [self.read(source, kind) for source in sources[:2]]
        unsigned = f".view(np.uint{bits})"
        if first in ("add", "sub"):
            return f"{plain[0]} {'+' if first == 'add' else '-'} {plain[1]}"
        if first in BITWISE:
            return f"{plain[0]} {BITWISE[first]} {plain[1]}"
        if first == "neg":
            return f"np.uint{bits}(0) - {plain[0]}"
        if first in ("min", "max"):
            return f"np.{first}imum({', '.join(typed)}){unsigned}"
        if first in ("div", "rem"):
            name = "divide" if first == "div" else "remainder"
            return f"numbers.{name}({', '.join(typed)}, np.int{bits}){unsigned}"
        if first in ("mul", "mad") and i.opcode[1] in ("lo", "wide"):
            if i.opcode[1] == "lo":
                product, sum_bits = f"{plain[0]} * {plain[1]}", bits
            else:
                sum_bits = 2 * bits
                wide = f"np.{numpy_type(kind[0], sum_bits)}"
                product = " * ".join(f"np.asarray({value}).astype({wide})" for value in typed)
                product = f"({product}).view(np.uint{sum_bits})"
            return product if first == "mul" else f"{product} + {self.read(sources[2], f'b{sum_bits}')}"
        if first == "shl":
            return f"numbers.shift_left({plain[0]}, {self.read(sources[1], 'u32')}, {bits})"
        if first == "shr":
            return f"numbers.shift_right({typed[0]}, {self.read(sources[1], 'u32')}, {bits}){unsigned}"
        if first == "bfe" and bits == 32:
            return f"numbers.extract_bits({typed[0]}, {plain[1]}, {plain[2]}){unsigned}"
        if first == "prmt":
            return f"numbers.permute_bytes({', '.join(plain)})"
        raise ValueError(i.text)

    def _selp(self, i: Instruction) -> Lines:
        yes, no = (self.read(source, f"b{8 * width_of(i.opcode[-1])}") for source in i.operands[1:3])
        return self.write(i, f"np.where({self.read(i.operands[3], 'pred')}, {yes}, {no})")

    def _setp(self, i: Instruction) -> Lines:
        assert i.guard is None and len(i.opcode) == 3
        _, comparison, kind = i.opcode
        targets = i.operands[0].split("|")
        if kind.endswith("x2"):
            halves = [f"({{}} >> np.uint32({shift})).astype(np.uint16)" for shift in (0, 16)]
            convert = f"numbers.CONVERSIONS[{kind[:-2]!r}][0]"
            pairs = [
                [f"{convert}({half.format(self.read(s, 'b32'))})" for s in i.operands[1:]] for half in halves
            ]
        else:
            pairs = [[self.read(source, kind) for source in i.operands[1:]]]
        lines = []
        for target, (left, right) in zip(targets, pairs, strict=False):
            if comparison in NEGATED:
                value = f"~np.asarray({left} {NEGATED[comparison]} {right})"
            else:
                value = f"np.asarray({left} {COMPARISONS[comparison]} {right})"
            lines.append(f"{self.register(target)} = {value}")
        return lines

    def _mov(self, i: Instruction) -> Lines:
        target, source = i.operands
        if i.opcode[-1] == "pred":
            return self.write(i, self.arithmetic(i))
        bits = 8 * width_of(i.opcode[-1])
        if target.startswith("{"):
            parts = elements(target)
            each = bits // len(parts)
            value = self.read(source, f"b{bits}")
            shifted = [f"np.asarray({value} >> np.uint{bits}({n * each}))" for n in range(len(parts))]
            return [
                f"{self.register(part)} = {own}.astype(np.uint{each})"
                for part, own in zip(parts, shifted, strict=True)
            ]
        if source.startswith("{"):
            parts = elements(source)
            each = bits // len(parts)
            values = ", ".join(self.read(part, f"b{each}") for part in parts)
            return self.write(i, f"numbers.combine([{values}], {each})")
        return self.write(i, self.read(source, f"b{bits}"))

    def _cvta(self, i: Instruction) -> Lines:
        return self.write(i, self.read(i.operands[1], "u64"))

    def _cvt(self, i: Instruction) -> Lines:
        to, kind = i.opcode[-2:]
        if kind == "f32" and to.lstrip("bf") in ("16", "16x2"):
            assert i.opcode[1] == "rn"
            convert = f"numbers.CONVERSIONS[{to.removesuffix('x2')!r}][1]"
            halves = [f"{convert}({self.read(source, kind)})" for source in i.operands[:0:-1]]
            if to.endswith("x2"):
                return self.write(i, f"numbers.combine([{', '.join(halves)}], 16)")
            return self.write(i, halves[0])
        if to == "f32":
            return self.write(
                i, f"np.asarray({self.read(i.operands[1], kind)}).astype(np.float32).view(np.uint32)"
            )
        assert len(i.opcode) == 3 and {to[0], kind[0]} <= {"s", "u"}
        # Between integers: the source's low bits, extended to the target's and then to the register's.
        bits, to_bits, wide = (8 * n for n in (width_of(kind), width_of(to), register_width(i.operands[0])))
        value = f"np.asarray({self.register(i.operands[1])}).astype(np.uint{bits})"
        value += f".view(np.{numpy_type(kind[0], bits)}).astype(np.{numpy_type(to[0], to_bits)})"
        value += f".astype(np.{numpy_type(to[0], wide)}).view(np.uint{wide})"
        return self.write(i, value)

    def _ld(self, i: Instruction) -> Lines:
        space, kind = i.opcode[1], i.opcode[-1]
        if space == "param":
            place = i.operands[1].strip("[] ")
            bits = 8 * register_width(i.operands[0])
            if place.startswith("%"):  # a thread's choice among parameters
                return self.write(i, f"B.choose_parameter({self.register(place)}, np.uint{bits})")
            return self.write(i, f"np.uint{bits}(B.parameters[{self.parameters[place]}] % {2**bits})")
        targets = elements(i.operands[0])
        address = self.address(i.operands[1], space)
        lines = [f"found = B.load_{space}({address}, {width_of(kind)}, {len(targets)}, {self.guard(i)})"]
        for n, target in enumerate(targets):
            value = f"found[{n}].astype(np.uint{8 * register_width(target)})"
            lines += self.write(i, value, target)
        return lines

    def _st(self, i: Instruction) -> Lines:
        space, kind = i.opcode[1].split("::")[0], i.opcode[-1]
        values = ", ".join(
            self.register(v) if v.startswith("%") else self.read(v, kind) for v in elements(i.operands[1])
        )
        address = self.address(i.operands[0], space)
        return [f"B.store_{space}({address}, {width_of(kind)}, [{values}], {self.guard(i)})"]

    def _cp(self, i: Instruction) -> Lines:
        what = i.opcode[2:]
        guard = self.guard(i)
        if what == ("commit_group",):
            return ["B.copies.commit()"]
        if what == ("wait_group",):
            return [f"B.copies.wait({i.operands[0]})"]
        if what[:2] == ("bulk", "commit_group"):
            return ["B.stores.commit()"]
        if what[:2] == ("bulk", "wait_group"):
            return [f"B.stores.wait({i.operands[0]})"]
        if what[:3] == ("bulk", "tensor", "2d"):
            is_load = what[3].startswith("shared")
            tensor_map, where = TENSOR.fullmatch(i.operands[1 if is_load else 0]).groups()
            columns_rows = ", ".join(self.read(c.strip(), "s32") for c in where.split(","))
            tile = self.address(i.operands[0 if is_load else 1], "shared")
            arguments = f"B, {tile}, {self.read(tensor_map, 'u64')}, [{columns_rows}]"
            if is_load:
                return [f"tma.load_tile({arguments}, {self.address(i.operands[2], 'shared')}, {guard})"]
            return [f"tma.store_tile({arguments}, {guard})"]
        if what[1:] == ("shared", "global"):
            target, source, size = i.operands[:3]
            own = self.read(i.operands[3] if len(i.operands) > 3 else size, "u32")
            addresses = f"{self.address(target, 'shared')}, {self.address(source, 'global')}"
            return [f"B.copy_async({addresses}, {int(size, 0)}, {own}, {guard})"]
        raise ValueError(i.text)

    def _mbarrier(self, i: Instruction) -> Lines:
        what, guard = i.opcode[1], self.guard(i)
        if what == "init":
            count = self.read(i.operands[1], "u32")
            return [f"tma.make_barrier(B, {self.address(i.operands[0], 'shared')}, {count}, {guard})"]
        if what == "inval":
            return [f"tma.drop_barrier(B, {self.address(i.operands[0], 'shared')}, {guard})"]
        if what == "arrive" and i.operands[0] == "_":
            size = self.read(i.operands[2], "u32") if "expect_tx" in i.opcode else "0"
            assert ("expect_tx" in i.opcode) == (len(i.operands) == 3)  # without: one arrival
            return [f"tma.arrive(B, {self.address(i.operands[1], 'shared')}, {size}, {guard})"]
        if i.opcode[1:3] == ("try_wait", "parity"):
            parity = self.read(i.operands[2], "u32")
            return self.write(i, f"tma.wait(B, {self.address(i.operands[1], 'shared')}, {parity})")
        raise ValueError(i.text)

    def _elect(self, i: Instruction) -> Lines:
        return [f"{self.register(i.operands[0].split('|')[1])} = B.lane == 0"]

    def _redux(self, i: Instruction) -> Lines:
        assert i.opcode[1:] == ("sync", "max", "f32")
        return self.write(i, f"B.reduce_max({self.read(i.operands[1], 'f32')})")

    def _tcgen05(self, i: Instruction) -> Lines:
        what, guard = i.opcode[1], self.guard(i)
        if what.startswith(("wait::", "fence::")) or what in ("dealloc", "relinquish_alloc_permit"):
            return []
        if what == "alloc":
            address = self.address(i.operands[0], "shared")
            return [f"tensor_memory.allocate(B, {address}, {i.operands[1]}, {guard})"]
        if what == "commit":
            return [f"tensor_memory.commit(B, {self.address(i.operands[0], 'shared')}, {guard})"]
        if what in ("ld", "st"):
            shape = i.opcode[4]
            assert shape in ("32x32b", "16x32bx2")
            split = None if shape == "32x32b" else int(i.operands[2 if what == "ld" else 1])
            registers = [self.register(r) for r in elements(i.operands[0 if what == "ld" else -1])]
            address = self.address(i.operands[1 if what == "ld" else 0], "shared")
            if what == "ld":
                return [
                    f"{', '.join(registers)}, = tensor_memory.load(B, {address}, {len(registers)}, {split})"
                ]
            return [f"tensor_memory.store(B, {address}, [{', '.join(registers)}], {split}, {guard})"]
        assert what == "mma" and i.opcode[3] == "kind::f16"
        total, a, b, instruction, accumulates = i.operands
        in_tensor_memory = a.startswith("[")
        left = self.address(a, "shared") if in_tensor_memory else self.read(a, "u64")
        arguments = f"{self.address(total, 'shared')}, {left}, {self.read(b, 'u64')}, {in_tensor_memory}"
        arguments += f", {self.read(instruction, 'b32')}, {self.read(accumulates, 'pred')}"
        return [f"tensor_memory.multiply(B, {arguments}, {guard})"]

    def _shfl(self, i: Instruction) -> Lines:
        value, other = (self.read(source, "b32") for source in i.operands[1:3])
        assert i.operands[3] == "31" and i.operands[4] == "-1"  # all lanes of a warp
        return self.write(i, f"B.shuffle({i.opcode[2]!r}, {value}, {other})")

    def _ldmatrix(self, i: Instruction) -> Lines:
        targets = [self.register(target) for target in elements(i.operands[0])]
        address = self.address(i.operands[1], "shared")
        return [
            f"{', '.join(targets)}, = matrices.load_matrices("
            f"B, {address}, {len(targets)}, {'trans' in i.opcode})"
        ]

    def _stmatrix(self, i: Instruction) -> Lines:
        values = ", ".join(self.register(value) for value in elements(i.operands[1]))
        address = self.address(i.operands[0], "shared")
        return [f"matrices.store_matrices(B, {address}, [{values}], {'trans' in i.opcode})"]

    def _mma(self, i: Instruction) -> Lines:
        targets = ", ".join(self.register(target) for target in elements(i.operands[0]))
        fragments = ", ".join(
            "[" + ", ".join(self.read(r, "b32") for r in elements(operand)) + "]"
            for operand in i.operands[1:]
        )
        return [f"{targets}, = matrices.multiply(B, {i.opcode[3]!r}, {i.opcode[-2]!r}, {fragments})"]

    def _wgmma(self, i: Instruction) -> Lines:
        if i.opcode[1] == "fence":
            return []
        if i.opcode[1] == "commit_group":
            return ["B.products.commit()"]
        if i.opcode[1] == "wait_group":
            return [f"B.products.wait({i.operands[0]})"]

        def numbers_of(operand: str) -> str:
            names = [self.register(r) for r in elements(operand)]
            return "[" + ", ".join(name[2:-1] for name in names) + "]"

        totals, a, b, accumulates, scale_a, scale_b, *transposed = i.operands
        assert (scale_a, scale_b) == ("1", "1")
        if a.startswith("{"):
            left, transposed = numbers_of(a), ["0", *transposed]
        else:
            left = self.read(a, "u64")
        columns = re.fullmatch(r"m64n(\d+)k16", i.opcode[4])[1]
        arguments = f"{numbers_of(totals)}, {left}, {self.read(b, 'u64')}, {self.read(accumulates, 'pred')}"
        flags = tuple(flag == "1" for flag in transposed)
        return [f"matrices.multiply_async(B, {arguments}, {flags}, {columns}, {i.opcode[-1]!r})"]
