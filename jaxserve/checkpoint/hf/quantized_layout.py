"""Which parameters of our tree stay quantized, and how quantized modules lie in them.

A parameter's rows are rows of one or more modules (q, k and v of ``qkv``), so what holds for its pieces
(``hf.layout``) holds for the arrays of its quantized form, whatever packs their columns.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.layout import AXES, Piece
from jaxserve.checkpoint.hf.quantized_module import QuantizedModule
from jaxserve.config import MatrixFormat, QuantizationConfig, QuantizedMatrices

Pieces = Callable[..., Iterator[Piece]]  # (parameter's name, experts, columns)


def quantized_parameters(
    method: str, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces, modules: Mapping[str, QuantizedModule]
) -> QuantizationConfig:
    """The parameters that modules of one format make up; a parameter of unlike modules is not one of them.

    Raises:
        CheckpointError: the family's matrices are not stored by rows, so they cannot be put together.
    """
    from jaxserve.model.quantized import QUANTIZABLE

    names: dict[MatrixFormat, list[str]] = {}
    for name in shapes:
        if not any(piece.tensor in modules for piece in pieces(name)):
            continue
        parameter = name.rpartition(".")[2]
        column = AXES[parameter][0].split()[-1]
        found = [(piece, modules.get(piece.tensor)) for piece in pieces(name)]
        for piece, module in found:
            if module is not None and (piece.order[-1] != len(piece.order) - 1 or len(piece.shape) != 2):
                raise CheckpointError(f"tensor {piece.tensor!r}: quantized matrices of this layout are not supported")
            if module is not None and module.shape != piece.shape:
                raise CheckpointError(f"{module.name!r} is of shape {module.shape}, expected {piece.shape} ({column})")
        formats = {module and module.format for _, module in found}
        if parameter not in QUANTIZABLE or len(formats) > 1 or not _share_orders(found):
            continue
        names.setdefault(formats.pop(), []).append(name)  # type: ignore[arg-type]
    matrices = tuple(QuantizedMatrices(format=f, parameters=tuple(n)) for f, n in names.items())
    return QuantizationConfig(method=method, matrices=matrices)


def _share_orders(found: list[tuple[Piece, QuantizedModule | None]]) -> bool:
    """Whether modules that are fused have their columns in one order: those of one expert, if there are experts."""
    first: dict[slice | None, np.ndarray | None] = {}
    for piece, module in found:
        assert module is not None
        expert = piece.box[0] if "experts." in piece.tensor else None
        order = first.setdefault(expert and expert.start, module.perm)
        if module.perm is not order and not np.array_equal(order, module.perm):  # type: ignore[arg-type]
            return False
    return True


def read_leaf(
    name: str,
    leaf: str,
    index: tuple[slice, ...],
    pieces: Pieces,
    modules: Mapping[str, QuantizedModule],
    matrix_format: MatrixFormat,
) -> np.ndarray:
    """Part ``index`` of the array ``leaf`` of a parameter (``model.quantized.QuantizedMatrix``)."""
    experts = index[0] if ".experts_" in name else None
    found = pieces(name, experts, columns=1)
    if leaf == "perm":
        orders = {piece.box[0].start: modules[piece.tensor].perm for piece in found}  # by expert, if there are any
        perms = [order[index[-1]] for order in orders.values() if order is not None]
        return perms[0] if experts is None else np.stack(perms)
    out: np.ndarray | None = None
    for piece in found:
        box = [slice(max(i.start, b.start), min(i.stop, b.stop)) for i, b in zip(index[:-1], piece.box)]
        if any(b.start >= b.stop for b in box):
            continue
        inside = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(box, piece.box))
        where = tuple(slice(c.start - i.start, c.stop - i.start) for c, i in zip(box, index))
        rows = piece.view(np.arange(piece.shape[0])[:, None])[..., 0][inside]
        values = modules[piece.tensor].leaf(leaf, rows.ravel(), index[-1])
        if out is None:
            out = np.empty([i.stop - i.start for i in index], values.dtype)
        out[where] = values.reshape(*rows.shape, -1)
    if out is None:
        raise CheckpointError(f"parameter {name}.{leaf} has no part {index}")
    return out
