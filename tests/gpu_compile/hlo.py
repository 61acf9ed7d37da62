"""Reads what XLA prints of a program that it has compiled: the instructions of its entry, and the order of launches."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_THUNK = re.compile(r"^\d+: (k\w+)")
VIEWS = ("bitcast", "get-tuple-element", "tuple")  # move nothing


class Instruction(NamedTuple):
    name: str
    opcode: str
    sizes: tuple[int, ...]  # elements of its result, or of each of its results
    operands: tuple[str, ...]
    text: str  # of an operand list: a parameter's number


def entry(text: str) -> list[Instruction]:
    """The instructions of the entry computation, from the text of a compiled module."""
    _, _, body = text.partition("\nENTRY ")
    found = []
    for line in body.splitlines()[1:]:
        if line.startswith("}"):
            return found
        if not (match := _INSTRUCTION.match(line)):
            raise ValueError(f"not an instruction: {line[:200]}")
        name, shape, opcode, operands = match.groups()
        sizes = tuple(math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(shape))
        found.append(Instruction(name, opcode, sizes, tuple(re.findall(r"%([^\s,]+)", operands)), operands))
    raise ValueError("the text has no entry computation")


def readers(instructions: Iterable[Instruction], parameter: int) -> list[Instruction]:
    """What reads the entry's ``parameter``, itself or through a view of it; what returns it is left out."""
    instructions, names = list(instructions), set()
    found = []
    for x in instructions:  # in order: an operand stands before its users
        if x.opcode == "parameter" and x.text == str(parameter):
            names.add(x.name)
        elif names.intersection(x.operands):
            if x.opcode in VIEWS:
                names.update((x.name,) if x.opcode != "tuple" else ())
            else:
                found.append(x)
    if not names:
        raise ValueError(f"there is no parameter {parameter}")
    return found


def made(instructions: Iterable[Instruction], elements: Iterable[int]) -> list[Instruction]:
    """The instructions that write an array of one of these numbers of elements."""
    wanted = set(elements)
    return [x for x in instructions if x.opcode not in (*VIEWS, "parameter") and wanted.intersection(x.sizes)]


def launches(thunks: str) -> list[str]:
    """The kinds of what the host launches one by one, from a dumped sequence of thunks: a command buffer is one."""
    return [match[1] for line in thunks.splitlines() if (match := _THUNK.match(line))]
