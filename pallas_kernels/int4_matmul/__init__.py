"""Products with 4-bit matrices: weights of 16 levels, a scale (and a bias) for each group of input columns.

A matrix is prepared once, where it will lie (``prepare``); what comes out of that is what ``int4_matmul`` takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import gpu, reference, xla

_IMPLEMENTATIONS = {"reference": reference.int4_matmul, "xla": xla.int4_matmul, "mosaic_gpu": gpu.int4_matmul}
# Of implementations that want another layout than ``Int4Matrix``: what makes it.
PREPARE: dict[dispatch.Implementation | None, Callable[..., Any]] = {"mosaic_gpu": gpu.prepare}


class Int4Matrix(NamedTuple):
    """``w[f, d] = scale[f, d // G] * nibble[f, d] + bias[f, d // G]``.

    Attributes:
        q: ``[F, D / 2]`` u8; element ``2i`` of a row is the low nibble of byte ``i``, ``2i + 1`` the high one.
        scale: ``[F, D / G]``, G even.
        bias: as ``scale``; None is ``-8 * scale``, nibbles symmetric around 8.
    """

    q: Any
    scale: Any
    bias: Any = None


def prepare(w: Int4Matrix, *, whole_zeros: bool = False, implementation: dispatch.Implementation | None = None) -> Any:
    """What ``int4_matmul`` takes for ``w``: a pytree of arrays in the layout that the implementation wants, made on the
    device. Those without an entry in ``PREPARE`` take the matrix as it is.

    Args:
        whole_zeros: that every bias is minus the scale times a whole number of 0 to 127, which some do faster with.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    check_matrix(w)
    return PREPARE[implementation](w, whole_zeros=whole_zeros) if implementation in PREPARE else w


def int4_matmul(
    x: jax.Array,
    w: Any,
    *,
    out_dtype: Any = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """``x @ w.T``, accumulated in f32.

    Args:
        x: ``[M, D]``.
        w: what ``prepare`` made of an ``Int4Matrix`` of [F, D] for the same implementation.
        out_dtype: of the result; None is x's.
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        ``[M, F]``.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    multiply = dispatch.choose(_IMPLEMENTATIONS, implementation)
    if implementation in PREPARE:
        return multiply(x, w, out_dtype=out_dtype or x.dtype)
    check_matrix(w)
    if x.ndim != 2 or x.shape[1] != 2 * w.q.shape[1]:
        raise ValueError(f"x {x.shape} must be [M, D={2 * w.q.shape[1]}]")
    return multiply(x, *w).astype(out_dtype or x.dtype)


def dequantize(w: Int4Matrix, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix ``[F, D]``."""
    check_matrix(w)
    return jnp.stack(reference.dequantize_halves(*w), axis=-1).reshape(w.q.shape[0], -1).astype(dtype)


def check_matrix(w: Int4Matrix) -> None:
    """Raises ValueError where the shapes do not fit each other, with both numbers."""
    if w.q.ndim != 2 or w.q.dtype != jnp.uint8:
        raise ValueError(f"q {w.q.shape} {w.q.dtype} must be [F, D / 2] uint8")
    (rows, half), shape = w.q.shape, tuple(w.scale.shape)
    if len(shape) != 2 or shape[0] != rows or half % shape[1]:
        raise ValueError(f"scale {shape} must be [F={rows}, D / G] with an even G that divides D={2 * half}")
    if w.bias is not None and tuple(w.bias.shape) != shape:
        raise ValueError(f"bias {tuple(w.bias.shape)} must be as scale {shape}")
