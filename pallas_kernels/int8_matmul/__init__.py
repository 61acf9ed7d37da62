"""Products with 8-bit matrices, int8 or FP8 (e4m3): a scale (and maybe a bias) for each group of input columns."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.int8_matmul import gpu, reference, xla

_IMPLEMENTATIONS = {"reference": reference.int8_matmul, "xla": xla.int8_matmul, "mosaic_gpu": gpu.int8_matmul}
# Of implementations that want another layout than ``Int8Matrix``: what makes it. They round no activations.
PREPARE: dict[dispatch.Implementation | None, Callable[..., Any]] = {"mosaic_gpu": gpu.prepare}
Activations = Literal["none", "int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}


class Int8Matrix(NamedTuple):
    """``w[f, d] = scale[f, d // G] * q[f, d] + bias[f, d // G]``.

    Attributes:
        q: ``[F, D]`` int8 or float8_e4m3fn.
        scale: ``[F, D / G]``; ``[F, 1]`` where a row has one scale.
        bias: as ``scale``; None is 0.
    """

    q: Any
    scale: Any
    bias: Any = None


def prepare(w: Int8Matrix, *, implementation: dispatch.Implementation | None = None) -> Any:
    """What ``int8_matmul`` takes for ``w``: a pytree of arrays in the layout that the implementation wants, made on the
    device. Those without an entry in ``PREPARE`` take the matrix as it is.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    check_matrix(w)
    return PREPARE[implementation](w) if implementation in PREPARE else w


def int8_matmul(
    x: jax.Array,
    w: Any,
    *,
    activations: Activations = "none",
    activation_group: int | None = None,
    across: Callable[[jax.Array], jax.Array] | None = None,
    out_dtype: Any = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """``x @ w.T``, accumulated in f32 (in int32 where both are int8).

    Args:
        x: ``[M, D]``.
        w: what ``prepare`` made of an ``Int8Matrix`` of [F, D] for the same implementation.
        activations: 8-bit numbers that x is rounded to first, each token by a scale of its own (dynamic): its largest
            magnitude becomes the largest of the type.
        activation_group: columns of a token that share a scale; None: all.
        across: makes a token's largest magnitude that over all devices which have a part of its columns.
        out_dtype: of the result; None is x's.
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        ``[M, F]``.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    multiply = dispatch.choose(_IMPLEMENTATIONS, implementation)
    dtype = out_dtype or x.dtype
    if implementation in PREPARE:
        if activations != "none":
            raise ValueError(f"activations={activations!r}: implementation={implementation!r} rounds none")
        return multiply(x, w, out_dtype=dtype)
    check_matrix(w)
    if x.ndim != 2 or x.shape[1] != w.q.shape[1]:
        raise ValueError(f"x {x.shape} must be [M, D={w.q.shape[1]}]")
    if activations == "none":
        return multiply(x, *w).astype(dtype)
    rounded, scale = round_tokens(x, activations, activation_group, across)
    if activations == "int8" and scale.shape[1:] == w.scale.shape[1:] == (1,) and w.bias is None:
        return reference.w8a8_matmul(rounded, scale, w.q, w.scale).astype(dtype)
    values = rounded.astype(jnp.float32).reshape(*scale.shape, -1) * scale[..., None]
    return multiply(values.reshape(x.shape).astype(x.dtype), *w).astype(dtype)


def round_tokens(
    x: jax.Array,
    activations: Activations,
    group: int | None = None,
    across: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``x`` [M, D] in 8 bits and the scales ``[M, D / group]`` f32 that it was divided by."""
    size = x.shape[1] if group is None else group
    if x.shape[1] % size:
        raise ValueError(f"activation_group={size} does not divide D={x.shape[1]}")
    x32 = x.astype(jnp.float32).reshape(x.shape[0], -1, size)
    largest = jnp.max(jnp.abs(x32), axis=-1)  # [M, D / group]
    if across is not None and group is None:
        largest = across(largest)
    scale = jnp.maximum(largest, 1e-10) / LARGEST[activations]
    values = x32 / scale[..., None]
    if activations == "int8":
        rounded = jnp.clip(jnp.round(values), -127, 127).astype(jnp.int8)
    else:
        rounded = jnp.clip(values, -448, 448).astype(jnp.float8_e4m3fn)
    return rounded.reshape(x.shape), scale


def dequantize(w: Int8Matrix, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix ``[F, D]``."""
    check_matrix(w)
    return reference.dequantize_rows(*w).astype(dtype)


def check_matrix(w: Int8Matrix) -> None:
    """Raises ValueError where the shapes do not fit each other, with both numbers."""
    if w.q.ndim != 2 or w.q.dtype not in (jnp.int8, jnp.float8_e4m3fn):
        raise ValueError(f"q {w.q.shape} {w.q.dtype} must be [F, D] int8 or float8_e4m3fn")
    (rows, columns), shape = w.q.shape, tuple(w.scale.shape)
    if len(shape) != 2 or shape[0] != rows or columns % shape[1]:
        raise ValueError(f"scale {shape} must be [F={rows}, D / G] with a G that divides D={columns}")
    if w.bias is not None and tuple(w.bias.shape) != shape:
        raise ValueError(f"bias {tuple(w.bias.shape)} must be as scale {shape}")
