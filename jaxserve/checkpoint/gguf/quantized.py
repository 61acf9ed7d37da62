"""Block types that can stay as they are: their numbers and scales in the layout of ``model.quantized``.

A block is 32 elements of a row. Of the 4-bit types byte j has element j in its low nibble and element j + 16 in its
high one; ours has neighbours in a byte.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxserve.checkpoint.dequantize import pack_nibbles
from jaxserve.checkpoint.gguf.header import TensorInfo
from jaxserve.checkpoint.gguf.layout import Piece
from jaxserve.config import MatrixFormat, QuantizationConfig, QuantizedMatrices

BLOCK = 32  # elements


class KeptType(NamedTuple):
    """A ggml type: scale f16 in bytes 0 and 1, maybe a minimum f16 after it, then the numbers."""

    format: MatrixFormat
    numbers: int  # first byte


KEPT: dict[str, KeptType] = {
    "Q4_0": KeptType(MatrixFormat(kind="int4", group_size=BLOCK), 2),
    "Q4_1": KeptType(MatrixFormat(kind="int4", group_size=BLOCK, has_bias=True), 4),
    "Q8_0": KeptType(MatrixFormat(kind="int8", group_size=BLOCK), 2),
}


def kept_parameters(
    layout: Mapping[str, tuple[Piece, ...]], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, str]]:
    """(parameter, type) of those whose tensors are all of one type that is kept."""
    from jaxserve.model.quantized import QUANTIZABLE

    for name, pieces in layout.items():
        types = {tensors[piece.tensor].type_name for piece in pieces}
        by_rows = all(len(tensors[p.tensor].shape) > 1 and not p.is_transposed for p in pieces)
        if name.rpartition(".")[2] in QUANTIZABLE and len(types) == 1 and by_rows and types <= KEPT.keys():
            yield name, types.pop()


def quantization(
    layout: Mapping[str, tuple[Piece, ...]], tensors: Mapping[str, TensorInfo]
) -> QuantizationConfig | None:
    """What can be kept of a file; None where there is nothing."""
    names: dict[str, list[str]] = {}
    for name, kind in kept_parameters(layout, tensors):
        names.setdefault(kind, []).append(name)
    matrices = tuple(QuantizedMatrices(format=KEPT[kind].format, parameters=tuple(n)) for kind, n in names.items())
    return QuantizationConfig(method="gguf", matrices=matrices) if matrices else None


def leaf_of_blocks(leaf: str, kind: str, blocks: np.ndarray) -> np.ndarray:
    """``[rows, ...]`` of an array of ``QuantizedMatrix`` (q, scale or bias) of ``blocks`` [rows, blocks, bytes] u8."""
    if leaf in ("scale", "bias"):
        at = 0 if leaf == "scale" else 2
        return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
    numbers = blocks[..., KEPT[kind].numbers :]
    if KEPT[kind].format.kind == "int8":
        return np.ascontiguousarray(numbers).view(np.int8).reshape(len(blocks), -1)
    return pack_nibbles(np.concatenate([numbers & 15, numbers >> 4], axis=-1).reshape(len(blocks), -1))
