"""Round-to-nearest: numbers of few bits from a matrix, each by itself, in numpy."""

from typing import Any

import numpy as np

from jaxserve.checkpoint.dequantize import pack_nibbles
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import MatrixFormat

LEVELS = {"int4": 15, "int8": 127}  # the largest number; an int8's least is its negative
MIDDLE = 8  # the int4 that stands for 0 where there are no zero points
SCALES = 2.0**-24, 65504.0  # the least and largest float16


def int4_grid(low: Any, high: Any, *, has_bias: bool, stretch: Any = 1.0) -> tuple[Any, Any]:
    """Scale and zero point, f32, of groups of int4 numbers whose least and largest values are ``low`` and ``high``
    (arrays of numpy or jax, of any one shape): number ``q`` stands for ``scale * (q - zero)``. The scale is
    ``stretch`` times what the range needs.

    What the layouts of GPTQ and AWQ can say: a scale is a float16, a zero point a whole number of 0 to 15 (without
    biases always 8), so 0 stays 0. A group of zeros has scale 1.
    """
    xp = low.__array_namespace__()
    low, high = xp.minimum(low, 0), xp.maximum(high, 0)
    span = high - low if has_bias else 2 * xp.maximum(high, -low)
    scale = xp.clip(span * stretch / LEVELS["int4"], *SCALES).astype(np.float16).astype(np.float32)
    scale = xp.where(span > 0, scale, np.float32(1))
    if not has_bias:
        return scale, xp.full_like(scale, MIDDLE)
    return scale, xp.clip(xp.round(-low / scale), 0, LEVELS["int4"])


def round_to_nearest(name: str, matrix_format: MatrixFormat, w: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of ``model.quantized.QuantizedMatrix`` by field, for ``w`` [..., out, in] of whole groups.

    Raises:
        CheckpointError: ``w`` has a value that is not finite; names the parameter.
    """
    w = w.astype(np.float32)
    check_finite(name, w)
    grouped = w.reshape(*w.shape[:-1], -1, matrix_format.group_size or w.shape[-1])
    if matrix_format.kind == "int4":
        scale, zero = int4_grid(grouped.min(-1), grouped.max(-1), has_bias=matrix_format.has_bias)
        q = np.clip(np.rint(grouped / scale[..., None]) + zero[..., None], 0, LEVELS["int4"])
        parts = {"q": pack(q.reshape(w.shape)), "scale": scale}
        return parts | {"bias": -zero * scale} if matrix_format.has_bias else parts
    scale = np.abs(grouped).max(-1) / LEVELS[matrix_format.kind]
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return {"q": np.rint(grouped / scale[..., None]).reshape(w.shape).astype(np.int8), "scale": scale}


def pack(q: np.ndarray) -> np.ndarray:
    """Int4 numbers 0..15 ``[..., out, in]`` two a byte."""
    return pack_nibbles(q.reshape(-1, q.shape[-1])).reshape(*q.shape[:-1], -1)


def check_finite(name: str, w: np.ndarray) -> None:
    bad = w.size - np.count_nonzero(np.isfinite(w))
    if bad:
        raise CheckpointError(f"parameter {name}: {bad} of {w.size} values are not finite and cannot be quantized")
