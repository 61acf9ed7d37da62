"""Grouped matrix product by XLA's ``ragged_dot``: one product on TPUs.

On GPUs XLA 0.11 expands it into a product of all rows with all matrices: right, and wasteful.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(
    x: jax.Array,  # [M, D]
    w: Any,  # [E, F, D]
    group_sizes: jax.Array,  # [E]
    matrix: Callable[[Any, Any], jax.Array],
) -> jax.Array:  # [M, F]
    """See ``pallas_kernels.grouped_matmul.grouped_matmul``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if not isinstance(w, jax.Array):
        w = jax.vmap(lambda e: matrix(w, e))(jnp.arange(w.shape[0]))
    out = lax.ragged_dot_general(
        x, w, group_sizes, _DIMENSIONS, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype)
