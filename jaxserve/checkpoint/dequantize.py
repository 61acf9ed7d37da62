"""Quantized matrices on the host, in numpy: packing, and what they stand for."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxserve.config import MatrixFormat, ModelConfig

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # ``model.params.ParamSource.read``


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """``[rows, columns / 2]`` u8 of numbers 0..15, element 2i in the low nibble."""
    values = values.astype(np.uint8, copy=False)
    return values[:, 0::2] | values[:, 1::2] << 4


def dequantize(
    matrix_format: MatrixFormat, q: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, perm: np.ndarray | None
) -> np.ndarray:
    """The matrix ``[..., out, in]`` f32 of the arrays of a ``model.quantized.QuantizedMatrix``."""
    if matrix_format.kind == "int4":
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:-1], -1)
    values = q.astype(np.float32).reshape(*scale.shape, -1)  # [..., out, groups, group]
    if bias is not None:
        values = values * scale[..., None] + bias[..., None]
    else:
        values = (values - 8 if matrix_format.kind == "int4" else values) * scale[..., None]
    values = values.reshape(*scale.shape[:-1], -1)
    if perm is None:
        return values
    inverse = np.argsort(perm, axis=-1)
    if perm.ndim == 1:
        return values[..., inverse]
    inverse = inverse.reshape(len(perm), *(1,) * (values.ndim - 2), -1)  # an expert has its own
    return np.take_along_axis(values, np.broadcast_to(inverse, values.shape), axis=-1)


class DequantizedSource:
    """A ``ParamSource`` of the plain parameters over ``read`` of those of ``config``, some of them quantized.

    Attributes:
        config: the plain model's.
    """

    def __init__(self, read: Read, config: ModelConfig):
        self._read = read
        self._formats = {} if config.quantization is None else config.quantization.formats()
        self._columns = _columns_of(config)
        self.config = dataclasses.replace(config, quantization=None)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See ``ParamSource``; f32 where the parameter is quantized."""
        matrix_format = self._formats.get(name)
        if matrix_format is None:
            return self._read(name, index)
        columns, num_columns = index[-1], self._columns[name]
        rows, has_groups = index[:-1], matrix_format.group_size is not None
        group = matrix_format.group_size or num_columns
        # Whole groups, or with an order of its own all columns.
        start, stop = (0, num_columns) if matrix_format.has_perm else (columns.start, columns.stop)
        start, stop = start // group * group, -(-stop // group) * group
        per_byte = 2 if matrix_format.kind == "int4" else 1
        groups = slice(start // group, stop // group) if has_groups else slice(0, 1)
        q = self._read(f"{name}.q", (*rows, slice(start // per_byte, stop // per_byte)))
        scale = self._read(f"{name}.scale", (*rows, groups))
        bias = self._read(f"{name}.bias", (*rows, groups)) if matrix_format.has_bias else None
        perm = None
        if matrix_format.has_perm:
            experts = rows[:1] if ".experts_" in name else ()
            perm = self._read(f"{name}.perm", (*experts, slice(0, num_columns)))
        values = dequantize(matrix_format, q, scale, bias, perm)
        return values[..., columns.start - start : columns.stop - start]


def _columns_of(config: ModelConfig) -> dict[str, int]:
    """Input columns of every quantized parameter."""
    from jaxserve.model.params import named_leaves, param_specs

    plain = param_specs(dataclasses.replace(config, quantization=None))
    return {name: spec.shape[-1] for name, spec in named_leaves(plain)}
