"""Matrices of few bits: what stands in the parameter tree in a matrix' place, and what can be done with one.

The layout is the canonical one, with the input columns packed: ``[K, G + 2, H, D]`` in int4 is ``q`` ``[K, G + 2, H,
D / 2]`` and ``scale`` ``[K, G + 2, H, D / group]``. So rows are split over devices as those of any matrix, and columns
along whole groups.
"""

import math
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.config import MatrixFormat
from jaxserve.model.array_spec import ArraySpec
from pallas_kernels import int4_matmul as int4
from pallas_kernels import int8_matmul as int8
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import grouped_matmul

QUANTIZABLE = frozenset({
    "embed", "head", "qkv", "attn_out", "gate_up", "down", "q_down", "q_up", "kv_down", "experts_gate_up",
    "experts_down", "shared_gate_up", "shared_down",
})  # fmt: skip
NUMBERS = {"int4": "uint8", "int8": "int8", "fp8": "float8_e4m3fn"}  # dtype of q by kind
PER_BYTE = {"int4": 2, "int8": 1, "fp8": 1}
INIT_STD, LEVEL_STD = 0.02, 16 / math.sqrt(12)  # random weights; numbers drawn evenly from 16


@flax.struct.dataclass(kw_only=True)
class QuantizedMatrix:
    """A matrix [..., out, in], as ``format`` says (``config.MatrixFormat``).

    Where its kernel wants another layout, ``prepared`` has what the kernel's ``prepare`` made of it, on each device of
    its own part, and the arrays it was made of are None.

    Attributes:
        q: int4 ``[..., out, in / 2]`` u8, element 2i in the low nibble; int8, fp8 ``[..., out, in]``.
        scale: ``[..., out, in / group]`` f32; ``[..., out, 1]`` where a row has one scale.
        bias: as ``scale``, or None.
        perm: ``[in]`` i32 (of experts ``[E, in]``): column i of the matrix is for element ``perm[i]`` of the input.
        input_is_split: the tensor axis splits the columns.
        prepared_shape: of a device's part, where it is prepared.
    """

    q: Any = None
    scale: Any = None
    bias: Any = None
    perm: Any = None
    prepared: Any = None
    format: MatrixFormat = flax.struct.field(pytree_node=False)
    input_is_split: bool = flax.struct.field(pytree_node=False, default=False)
    implementation: Implementation | None = flax.struct.field(pytree_node=False, default=None)
    prepared_shape: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix' own, before anything was packed."""
        if self.prepared_shape is not None:
            return self.prepared_shape
        return (*self.q.shape[:-1], self.q.shape[-1] * PER_BYTE[self.format.kind])

    def reshape(self, *shape: int) -> "QuantizedMatrix":
        """With other axes before the last."""
        if shape[-1] not in (-1, self.shape[-1]):
            raise ValueError(f"a quantized matrix {self.shape} keeps its columns, asked was {shape}")
        if self.prepared_shape is not None:
            return replace(self, prepared_shape=(*shape[:-1], self.shape[-1]))
        parts = {n: None if x is None else x.reshape(*shape[:-1], x.shape[-1]) for n, x in self._parts().items()}
        return replace(self, **parts)

    def _parts(self) -> dict[str, Any]:
        return {"q": self.q, "scale": self.scale, "bias": self.bias}

    def at(self, index: Any) -> "QuantizedMatrix":
        """Rows or an expert, as indexing the first axis gives them."""
        parts = {name: None if x is None else x[index] for name, x in self._parts().items()}
        has_own_perm = getattr(self.perm, "ndim", 1) == 2
        return replace(self, **parts, perm=self.perm[index] if has_own_perm else self.perm)


def quantized_specs(name: str, spec: ArraySpec, matrix_format: MatrixFormat) -> QuantizedMatrix:
    """The ``ArraySpec``s of parameter ``name`` in a format, whose matrix has ``spec``.

    Raises:
        ValueError: it cannot have the format: a group does not divide its columns (with both numbers).
    """
    field = name.rpartition(".")[2]
    if field not in QUANTIZABLE:
        raise ValueError(f"params.{name} cannot be quantized, only {', '.join(sorted(QUANTIZABLE))}")
    (*rows, columns), (*row_axes, column_axis) = spec.shape, spec.axes
    group, per_byte = matrix_format.group_size, PER_BYTE[matrix_format.kind]
    for what, size in (("group_size", group or per_byte), ("activation_group", matrix_format.activation_group or 1)):
        if columns % size:
            raise ValueError(f"params.{name}: {what}={size} does not divide its {columns} input columns")
    num_groups, group_axis = (1, None) if group is None else (columns // group, column_axis)
    per_group = ArraySpec((*rows, num_groups), (*row_axes, group_axis), "float32")
    experts = 1 if field.startswith("experts_") else 0  # leading axes of perm
    return QuantizedMatrix(
        q=ArraySpec((*rows, columns // per_byte), spec.axes, NUMBERS[matrix_format.kind]),
        scale=per_group,
        bias=per_group if matrix_format.has_bias else None,
        perm=ArraySpec((*rows[:experts], columns), (*row_axes[:experts], column_axis), "int32")
        if matrix_format.has_perm
        else None,
        format=matrix_format,
        input_is_split=column_axis is not None,
    )  # fmt: skip


def check_split(name: str, matrix: QuantizedMatrix, tensor: int) -> None:
    """Raises ValueError where the tensor axis would cut a group of the matrix of specs, with both numbers."""
    group = matrix.format.group_size
    if tensor == 1 or not matrix.input_is_split:
        return
    columns = matrix.shape[-1]
    if group is not None and columns // tensor % group:
        raise ValueError(
            f"params.{name}: tensor={tensor} gives each device {columns // tensor} of its {columns} input columns, "
            f"which are quantized in groups of {group}"
        )
    if matrix.format.activation_group is not None and columns // tensor % matrix.format.activation_group:
        raise ValueError(
            f"params.{name}: tensor={tensor} gives each device {columns // tensor} of its {columns} input columns, "
            f"of which {matrix.format.activation_group} are rounded together"
        )
    if matrix.perm is not None and len(matrix.perm.axes) > 1 and "experts" in name:
        raise ValueError(f"params.{name}: tensor={tensor} cannot split experts with act-order (g_idx), only tensor=1")


def random_leaf(key: jax.Array, name: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """A random array in place of the leaf ``name`` of a quantized matrix: weights of standard deviation 0.02.

    Args:
        key: the matrix' own, the same for all its leaves: zero points are whole numbers.
    """
    match name.rpartition(".")[2]:
        case "q":
            if dtype == "uint8":
                return jax.random.bits(key, shape, jnp.uint8)
            return jax.random.randint(key, shape, -8, 8, jnp.int8).astype(dtype)
        case "perm":
            return jax.random.permutation(key, jnp.broadcast_to(jnp.arange(shape[-1], dtype=dtype), shape), axis=-1)
        case leaf:
            scale_key, zero_key = jax.random.split(key)
            scale = INIT_STD / LEVEL_STD * (1 + 0.1 * jax.random.normal(scale_key, shape, dtype))
            return -jax.random.randint(zero_key, shape, 7, 9).astype(dtype) * scale if leaf == "bias" else scale


def matmul(x: jax.Array, w: QuantizedMatrix, out_dtype: Any = None) -> jax.Array:
    """``x`` [..., in] times ``w`` [out, in] transposed, accumulated in f32, in ``out_dtype`` (None: x's)."""
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    is_split = w.input_is_split and lax.axis_size("tensor") > 1
    if w.perm is not None:
        if is_split:  # a device's columns are sorted by group: they may be for any element of the input
            x = lax.all_gather(x, "tensor", axis=1, tiled=True)
        x = jnp.take(x, w.perm, axis=1)
    if w.format.kind == "int4":
        matrix = int4.Int4Matrix(w.q, w.scale, w.bias) if w.prepared is None else w.prepared
        out = int4.int4_matmul(x, matrix, out_dtype=out_dtype, implementation=w.implementation)
    else:
        out = int8.int8_matmul(
            x,
            int8.Int8Matrix(w.q, w.scale, w.bias) if w.prepared is None else w.prepared,
            activations=w.format.activations,
            activation_group=w.format.activation_group,
            across=(lambda largest: lax.pmax(largest, "tensor")) if is_split else None,
            out_dtype=out_dtype,
            implementation=w.implementation,
        )
    return out.reshape(*lead, -1)


def dequantize(w: QuantizedMatrix, dtype: Any) -> jax.Array:
    """The matrix ``[out, in]``, its columns in the input's order."""
    if w.format.kind == "int4":
        matrix = int4.dequantize(int4.Int4Matrix(w.q, w.scale, w.bias), dtype)
    else:
        matrix = int8.dequantize(int8.Int8Matrix(w.q, w.scale, w.bias), dtype)
    return matrix if w.perm is None else jnp.take(matrix, jnp.argsort(w.perm), axis=1)


def table_rows(table: jax.Array | QuantizedMatrix, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows ``ids`` [T] of an embedding [V, D]: ``[T, D]``."""
    return dequantize(table.at(ids), dtype) if isinstance(table, QuantizedMatrix) else table[ids]


def experts_matmul(
    x: jax.Array, w: jax.Array | QuantizedMatrix, group_sizes: jax.Array, implementation: Implementation
) -> jax.Array:
    """``grouped_matmul`` with experts' matrices ``w`` [E, F, D] of either kind; a quantized one is put together again
    for the rows that are its own."""
    if not isinstance(w, QuantizedMatrix):
        return grouped_matmul(x, w, group_sizes, implementation=implementation)
    rounded = x
    if w.format.activations != "none":
        is_split = w.input_is_split and lax.axis_size("tensor") > 1
        values, scale = int8.round_tokens(
            x,
            w.format.activations,
            w.format.activation_group,
            (lambda largest: lax.pmax(largest, "tensor")) if is_split else None,
        )
        values = values.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
        rounded = values.reshape(x.shape).astype(x.dtype)
    return grouped_matmul(
        rounded, w, group_sizes, matrix=lambda w, e: dequantize(w.at(e), x.dtype), implementation=implementation
    )
