"""Grouped matrix product by XLA's ``ragged_dot``: one product on TPUs.

On GPUs XLA 0.11 expands it into a product of all rows with all matrices: right, and wasteful.
"""

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(
    x: jax.Array,  # [M, D]
    w: jax.Array,  # [E, F, D]
    group_sizes: jax.Array,  # [E]
) -> jax.Array:  # [M, F]
    """See ``pallas_kernels.grouped_matmul.grouped_matmul``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = lax.ragged_dot_general(
        x, w, group_sizes, _DIMENSIONS, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype)
