"""Grouped matrix product: rows sorted by group, each multiplied with its group's matrix (mixture of experts)."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference, xla

_IMPLEMENTATIONS = {"reference": reference.grouped_matmul, "xla": xla.grouped_matmul}


def grouped_matmul(
    x: jax.Array,
    w: Any,
    group_sizes: jax.Array,
    *,
    matrix: Callable[[Any, Any], jax.Array] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """``out[m] = w[g] @ x[m]`` for every row ``m``, where ``g`` is the row's group.

    Args:
        x: ``[M, D]``; the rows of group 0, then those of group 1, and so on.
        w: ``[E, F, D]``, in x's dtype; or with ``matrix`` anything of that ``shape``.
        group_sizes: ``[E]`` int32, rows of each group; their sum is M.
        matrix: ``matrix(w, e)`` is expert ``e``'s matrix [F, D] in x's dtype: it is made where it is needed.
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        ``[M, F]`` in x's dtype, accumulated in f32.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    if x.ndim != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x {x.shape} must be [M, D] and w {w.shape} [E, F, D] with the same D")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"group_sizes {group_sizes.shape} must be [E={w.shape[0]}]")
    return dispatch.choose(_IMPLEMENTATIONS, implementation)(x, w, group_sizes, matrix or one_of_array)


def one_of_array(w: jax.Array, e: Any) -> jax.Array:
    return w[e]
