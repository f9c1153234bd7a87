"""PTX text, taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)([^{]*)\{", re.DOTALL)
PARAMETER = re.compile(r"(\w+)(?:\[\d+\])?$")
BARRIERS = (("bar", "sync"), ("barrier", "sync"))
REGISTERS_OF_GROUP = (("setmaxnreg", "inc"), ("setmaxnreg", "dec"))
THREADS = re.compile(r"\.reqntid (\d+)")
MAX_REGISTERS = re.compile(r"\.maxnreg (\d+)")
LABEL = re.compile(r"[$\w]+")
OWN_LABEL = re.compile(r"^\s*(\w+):(?!:)", re.MULTILINE)  # of inline assembly; others begin with $
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+) )?([\w.:]+) ?(.*)")
VECTOR = re.compile(r"\{[^{}]*\}")  # of registers, within an instruction
REGISTERS = re.compile(r"%\w+<\d+>")  # a declaration of many


class Instruction(NamedTuple):
    """guard: the predicate register without which it has no effect, or None; negated: if it has one;
    opcode: its parts between dots; operands: as written."""

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


class Source(NamedTuple):
    """A kernel. blocks: basic blocks in order, each instruction that may have to wait for other threads the
    first of one; labels: of their first instructions; max_registers: None if the kernel does not say."""

    name: str
    parameters: tuple[str, ...]
    num_threads: int
    max_registers: int | None
    blocks: list[list[Instruction]]
    labels: dict[str, int]


def parse(ptx: str) -> Source:
    """The kernel of a module of PTX that has one."""
    ptx = COMMENT.sub("", ptx)
    entry = ENTRY.search(ptx)
    assert entry is not None
    name, parameters, directives = entry.groups()
    names = tuple(PARAMETER.search(p.strip())[1] for p in parameters.split(",") if p.strip())
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in statements(ptx[entry.end() :]):
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
            continue
        if item.opcode[:2] in (*BARRIERS, *REGISTERS_OF_GROUP) and blocks[-1]:
            blocks.append([])
        blocks[-1].append(item)
        if item.opcode[0] in ("bra", "ret"):
            blocks.append([])
    registers = MAX_REGISTERS.search(directives)
    max_registers = None if registers is None else int(registers[1])
    return Source(name, names, int(THREADS.search(directives)[1]), max_registers, blocks, labels)


def statements(body: str) -> Iterator[str | Instruction]:
    """Labels and instructions, from after the kernel's brace to its end. Names that a block in braces
    declares, as inline assembly does, are made unlike those of others."""
    scopes: list[dict[str, str]] = [{}]
    num_scopes, text, at = 0, "", 0
    while True:
        char = body[at]
        text += char
        at += 1
        if char == "{":
            vector = VECTOR.match(body, at - 1)
            if text.strip() != "{":  # an operand
                text += body[at : vector.end()]
                at = vector.end()
                continue
            num_scopes += 1
            labels = OWN_LABEL.findall(body, at, end_of_scope(body, at))  # a branch may come before its label
            scopes.append({label: f"{label}_{num_scopes}" for label in labels})
            text = ""
        elif char == "}":
            scopes.pop()
            if not scopes:
                return
            text = ""
        elif char == "\n" and text.strip().startswith((".loc", ".file")):
            text = ""
        elif char == ":" and body[at] != ":" and LABEL.fullmatch(text.strip()[:-1]):
            yield renamed(text.strip()[:-1], scopes)
            text = ""
        elif char == ";":
            statement, text = " ".join(text[:-1].split()), ""
            if statement.startswith(".reg"):
                own = [n for n in statement.split(maxsplit=2)[2].split(", ") if not REGISTERS.fullmatch(n)]
                scopes[-1].update((n, f"{n}_{num_scopes}") for n in own)
            elif statement and not statement.startswith("."):
                negated, guard, opcode, operands = INSTRUCTION.fullmatch(statement).groups()
                yield Instruction(
                    None if guard is None else renamed(guard, scopes),
                    negated == "!",
                    tuple(opcode.split(".")),
                    tuple(renamed(operand, scopes) for operand in split(operands)),
                    statement,
                )


def end_of_scope(body: str, start: int) -> int:
    """Where the brace is closed that was opened before `start`."""
    depth, at = 1, start
    while depth:
        depth += (body[at] == "{") - (body[at] == "}")
        at += 1
    return at


def renamed(text: str, scopes: list[dict[str, str]]) -> str:
    for scope in scopes:
        for name, new in scope.items():
            text = re.sub(rf"(?<![%\w]){re.escape(name)}(?!\w)", new, text)
    return text


def split(operands: str) -> Iterator[str]:
    """Operands, between commas that are not in brackets."""
    depth, start = 0, 0
    for at, char in enumerate(operands):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            yield operands[start:at].strip()
            start = at + 1
    if operands[start:].strip():
        yield operands[start:].strip()


def elements(operand: str) -> list[str]:
    """Of a vector in braces, or the operand alone."""
    return [e.strip() for e in operand.strip("{}").split(",")] if operand.startswith("{") else [operand]
