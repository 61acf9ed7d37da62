"""How the tensors of a Hugging Face checkpoint lie in our parameters: a small algebra of axes.

A ``Source`` says that one tensor of the file holds one box of a parameter. Its ``layout`` lists the tensor's axes by
the letters of the parameter's own axes (``AXES``), several that lie within one axis in parentheses, as einops does:
``q_proj.weight`` of shape ``[N * H, D]`` is ``"(k s h) d"`` of ``qkv`` with ``s`` cut to the query heads.
Everything is a reshape that splits axes, slices and a transpose, so numpy makes a view of the mapped file, and only the
elements that are asked for are touched.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

AXES: dict[str, tuple[str, ...]] = {
    "embed": ("v d",), "positions": ("p d",), "head": ("v d",), "final_norm": ("d",), "final_norm_bias": ("d",),
    "attn_norm": ("d",), "attn_norm_bias": ("d",), "qkv": ("k s h d",), "qkv_bias": ("k s h",),
    "q_norm": ("h", "k g h"), "k_norm": ("h", "k h"), "sinks": ("k g",),
    "q_down": ("q d",), "q_down_norm": ("q",), "q_up": ("n w q",), "kv_down": ("r d",), "kv_down_norm": ("r",),
    "k_up": ("n w r",), "v_up": ("n w r",), "attn_out": ("d o",), "attn_out_bias": ("d",), "attn_post_norm": ("d",),
    "mlp_norm": ("d",), "mlp_norm_bias": ("d",), "gate_up": ("u f d",), "gate_up_bias": ("u f",), "down": ("d f",),
    "down_bias": ("d",), "router": ("e d",), "router_bias": ("e",), "correction_bias": ("e",),
    "experts_gate_up": ("e u f d",), "experts_gate_up_bias": ("e u f",), "experts_down": ("e d f",),
    "experts_down_bias": ("e d",), "shared_gate_up": ("u f d",), "shared_down": ("d f",), "shared_gate": ("x d",),
    "mlp_post_norm": ("d",),
}  # fmt: skip
# parameter -> letters of its axes in model.params, by rank where it has several (s: query heads of a group, key, value;
# u: gate, up; w: dimensions of an MLA head; o: all heads' outputs; others as in the legend)


@dataclass(frozen=True)
class Source:
    """One tensor that holds a box of a parameter.

    Attributes:
        tensor: its name: ``{p}`` is the family's prefix, ``{i}`` the layer, ``{e}`` an expert (one source for each).
        layout: its axes. Sources of one parameter that name the same tensor follow each other along its first axis.
        at: letter -> part of that axis which it holds; all of the others. An axis that ``layout`` leaves out is cut to
            one index.
        beside: parameters whose ``w`` axes lie one after another in the tensor's: the parameter itself and others.
    """

    tensor: str
    layout: str
    at: Mapping[str, slice] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


Recipe = tuple[Source, ...]


class Piece(NamedTuple):
    """A source with its sizes: the tensor's expected shape, and how to see the box in it."""

    tensor: str
    shape: tuple[int, ...]
    rows: slice  # of the tensor's first axis
    split: tuple[int, ...]  # shape of these rows with every axis of the layout apart
    take: tuple[slice, ...]  # of ``split``: other parameters' parts left out
    order: tuple[int, ...]  # axes of ``split`` in the parameter's order
    box: tuple[slice, ...]  # of the parameter

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The box, as a view of the whole tensor."""
        x = tensor[self.rows].reshape(self.split)[self.take].transpose(self.order)
        return x.reshape([s.stop - s.start for s in self.box]) if x.ndim < len(self.box) else x


def pieces(
    parameter: str,
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    prefix: str,
    layer: int | None,
    experts: range | None = None,
) -> Iterator[Piece]:
    """The pieces of a parameter; of ``experts`` only, where its experts are tensors of their own.

    Args:
        shapes: of the parameter, and of all others of its layer.
    """
    shape = shapes[parameter]
    axes = next(a for a in AXES[parameter] if len(a.split()) == len(shape)).split()
    sizes = dict(zip(axes, shape))
    rows: dict[str, int] = {}  # tensor -> rows of it given so far
    total = {tensor: 0 for tensor in (s.tensor for s in recipe)}
    for source in recipe:
        total[source.tensor] += _first_axis(source, sizes, shapes)
    for source in recipe:
        given = rows.get(source.tensor, 0)
        rows[source.tensor] = given + _first_axis(source, sizes, shapes)
        groups = groups_of(source.layout)
        box = {a: _resolved(source.at.get(a, slice(None)), n) for a, n in sizes.items()}
        widths, take = {}, []
        for axis in (a for group in groups for a in group):
            widths[axis] = box[axis].stop - box[axis].start
            start = 0
            if axis == "w" and source.beside:
                start = sum(shapes[p][1] for p in source.beside[: source.beside.index(parameter)])
                widths[axis], stop = sum(shapes[p][1] for p in source.beside), start + widths[axis]
                take.append(slice(start, stop))
            else:
                take.append(slice(0, widths[axis]))
        file_shape = tuple(math.prod(widths[a] for a in group) for group in groups)
        flat = [a for group in groups for a in group]
        split = tuple(widths[a] for a in flat)
        order = tuple(flat.index(a) for a in axes if a in flat)
        for e in (experts or range(sizes["e"])) if "{e}" in source.tensor else (None,):
            if e is not None:
                box["e"] = slice(e, e + 1)
            yield Piece(
                source.tensor.format(p=prefix, i=layer, e=e),
                (total[source.tensor], *file_shape[1:]),
                slice(given, given + file_shape[0]),
                split,
                tuple(take),
                order,
                tuple(box[a] for a in axes),
            )


def read_box(
    pieces: Iterator[Piece], tensor: Mapping[str, np.ndarray], index: tuple[slice, ...]
) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    """Where in ``index``'s part each piece goes, and its values, as views of the tensors."""
    found = []
    for piece in pieces:
        common = [slice(max(i.start, b.start), min(i.stop, b.stop)) for i, b in zip(index, piece.box, strict=True)]
        if any(c.start >= c.stop for c in common):
            continue
        inside = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, piece.box))
        where = tuple(slice(c.start - i.start, c.stop - i.start) for c, i in zip(common, index))
        found.append((where, piece.view(tensor[piece.tensor])[inside]))
    return found


def groups_of(layout: str) -> list[list[str]]:
    """``"(k s h) d"`` as ``[["k", "s", "h"], ["d"]]``."""
    groups, inside = [], False
    for word in layout.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _resolved(part: slice, size: int) -> slice:
    start, stop, _ = part.indices(size)
    return slice(start, stop)


def _first_axis(source: Source, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the tensor's first axis that the source takes up."""
    rows = 1
    for axis in groups_of(source.layout)[0]:
        if axis == "w" and source.beside:
            rows *= sum(shapes[p][1] for p in source.beside)
        else:
            part = _resolved(source.at.get(axis, slice(None)), sizes[axis])
            rows *= part.stop - part.start
    return rows
