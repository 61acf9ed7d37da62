"""8-bit matrix product by XLA alone: the matrix is dequantized whole, in x's dtype, and multiplied."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int8_matmul.reference import dequantize_rows


def int8_matmul(
    x: jax.Array,  # [M, D]
    q: jax.Array,  # [F, D]
    scale: jax.Array,  # [F, D / G]
    bias: jax.Array | None,  # [F, D / G]
) -> jax.Array:  # [M, F] f32
    """See ``pallas_kernels.int8_matmul.int8_matmul``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    w = dequantize_rows(q, scale, bias).astype(x.dtype)
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
