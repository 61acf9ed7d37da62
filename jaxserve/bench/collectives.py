"""What the devices of a mesh send each other in a compiled program: counted in the program itself, not derived."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
              "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
# Results, name and operands of a collective, as XLA writes it. A "-done" is the end of a "-start".
COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|collective-permute)(-start)?\((.*?)\)(.*)")
ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")
LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")

Axis = Literal["stage", "tensor"]


class Sent(NamedTuple):
    """Bytes that all devices together send in one call of a program, by the mesh axis that they travel."""

    stage: float
    tensor: float


def sent_bytes(programs: Iterable[str], tensor: int) -> Sent:
    """Of XLA's texts of compiled programs for a mesh whose ``tensor`` neighbours are adjacent.

    A collective of P devices is counted as a ring does it: of n bytes an all-reduce has each device send
    ``2 * n * (P - 1) / P``, an all-gather whose result they are ``n * (P - 1) / P``, to the next of its group in the
    program's order: of a group over both axes each pair of neighbours counts for its own. Where stages have layers of
    different kinds at one place, those of each kind are counted.
    """
    totals: dict[Axis, float] = {"stage": 0.0, "tensor": 0.0}
    for text in programs:
        for results, kind, start, _, attributes in COLLECTIVE.findall(text):
            sizes = [
                ITEM_BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
                for dtype, shape in ARRAY.findall(results)
            ]
            if kind == "collective-permute":
                pairs = _lists(PAIRS.findall(attributes)[0])
                size = sizes[0]  # of an async one the operand, the result, and what it needs besides
                totals[_axis(pairs[0], tensor)] += size * len(pairs)
                continue
            if kind == "all-gather" and start:
                sizes = sizes[len(sizes) // 2 :]  # operands come before the results
            for group in _groups(attributes):
                ways = len(group)
                factor = 2 if kind == "all-reduce" else 1
                for pair in zip(group, group[1:] + group[:1]):
                    if ways > 1:
                        totals[_axis(pair, tensor)] += factor * sum(sizes) * (ways - 1) / ways
    return Sent(totals["stage"], totals["tensor"])


def _axis(pair: Sequence[int], tensor: int) -> Axis:
    return "tensor" if pair[0] // tensor == pair[1] // tensor else "stage"


def _groups(attributes: str) -> list[list[int]]:
    """Of devices, each of which shares something with the others of its group."""
    if listed := LISTED_GROUPS.findall(attributes):
        return _lists(listed[0])
    if iota := IOTA_GROUPS.findall(attributes):
        shape, sizes, order = iota[0]
        ids = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
        return (ids.transpose(_ints(order)) if order else ids).reshape(_ints(shape)).tolist()
    if mesh := MESH_GROUPS.findall(attributes):
        axes, names = dict(MESH_AXIS.findall(mesh[0][0])), re.findall(r"'(\w+)'", mesh[0][1])
        ids = np.arange(math.prod(map(int, axes.values()))).reshape(list(map(int, axes.values())))
        order = [*(i for i, name in enumerate(axes) if name not in names), *(list(axes).index(name) for name in names)]
        return ids.transpose(order).reshape(-1, math.prod(int(axes[name]) for name in names)).tolist()
    raise ValueError(f"a collective's groups cannot be read: {attributes:.200}")


def _lists(text: str) -> list[list[int]]:
    return [_ints(inner) for inner in re.findall(r"\{([\d,]+)\}", text)]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def textbook_bubble(num_stages: int, num_microbatches: int) -> float:
    """The share of a step's time in which a stage has nothing to do, where steps are cut into microbatches and each
    drains before the next begins (GPipe, Huang et al. 2019)."""
    return (num_stages - 1) / (num_microbatches + num_stages - 1)
