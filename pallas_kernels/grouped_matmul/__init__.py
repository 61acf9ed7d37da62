"""Grouped matrix product: rows sorted by group, each multiplied with its group's matrix (mixture of experts)."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import reference, xla

_IMPLEMENTATIONS = {"reference": reference.grouped_matmul, "xla": xla.grouped_matmul}


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """``out[m] = w[g] @ x[m]`` for every row ``m``, where ``g`` is the row's group.

    Args:
        x: ``[M, D]``; the rows of group 0, then those of group 1, and so on.
        w: ``[E, F, D]``, in x's dtype.
        group_sizes: ``[E]`` int32, rows of each group; their sum is M.
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        ``[M, F]`` in x's dtype, accumulated in f32.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x {x.shape} must be [M, D] and w {w.shape} [E, F, D] with the same D")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"group_sizes {group_sizes.shape} must be [E={w.shape[0]}]")
    return dispatch.choose(_IMPLEMENTATIONS, implementation)(x, w, group_sizes)
