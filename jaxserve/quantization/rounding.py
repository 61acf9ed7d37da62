"""Round-to-nearest: numbers of few bits from a matrix, each by itself, in numpy."""

import numpy as np

from jaxserve.checkpoint.dequantize import pack_nibbles
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import MatrixFormat

LEVELS = {"int4": 15, "int8": 127}  # the largest number; an int8's least is its negative


def scales_of(matrix_format: MatrixFormat, grouped: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and bias ``[..., groups]`` f32 of ``grouped`` [..., groups, group] f32, so that the extremes are numbers.

    An int4's range has 0 in it, as for the zero points of GPTQ and AWQ: what is 0 stays near 0. A group of zeros has
    scale 1.
    """
    if matrix_format.has_bias:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scale = (high - low) / LEVELS[matrix_format.kind]
        return np.where(scale > 0, scale, 1).astype(np.float32), low.astype(np.float32)
    scale = np.abs(grouped).max(-1) / LEVELS[matrix_format.kind]
    return np.where(scale > 0, scale, 1).astype(np.float32), None


def round_to_nearest(name: str, matrix_format: MatrixFormat, w: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of ``model.quantized.QuantizedMatrix`` by field, for ``w`` [..., out, in] of whole groups.

    Raises:
        CheckpointError: ``w`` has a value that is not finite; names the parameter.
    """
    w = w.astype(np.float32)
    check_finite(name, w)
    grouped = w.reshape(*w.shape[:-1], -1, matrix_format.group_size or w.shape[-1])
    scale, bias = scales_of(matrix_format, grouped)
    if bias is None:
        q = np.rint(grouped / scale[..., None])
        return {"q": q.reshape(w.shape).astype(np.int8), "scale": scale}
    q = np.clip(np.rint((grouped - bias[..., None]) / scale[..., None]), 0, LEVELS[matrix_format.kind])
    return {"q": pack(q.reshape(w.shape)), "scale": scale, "bias": bias}


def pack(q: np.ndarray) -> np.ndarray:
    """Int4 numbers 0..15 ``[..., out, in]`` two a byte."""
    return pack_nibbles(q.reshape(-1, q.shape[-1])).reshape(*q.shape[:-1], -1)


def check_finite(name: str, w: np.ndarray) -> None:
    bad = w.size - np.count_nonzero(np.isfinite(w))
    if bad:
        raise CheckpointError(f"parameter {name}: {bad} of {w.size} values are not finite and cannot be quantized")
