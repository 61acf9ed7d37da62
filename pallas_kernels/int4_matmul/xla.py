"""4-bit matrix product by XLA alone: the matrix is dequantized whole, in x's dtype, and multiplied.

For accelerators without a kernel of their own: a loop over rows, as the reference has it, makes them wait.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul.reference import dequantize_halves


def int4_matmul(
    x: jax.Array,  # [M, D]
    q: jax.Array,  # [F, D / 2] u8
    scale: jax.Array,  # [F, D / G]
    bias: jax.Array | None,  # [F, D / G]
) -> jax.Array:  # [M, F] f32
    """See ``pallas_kernels.int4_matmul.int4_matmul``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    w = jnp.stack(dequantize_halves(q, scale, bias), axis=-1).reshape(q.shape[0], -1).astype(x.dtype)
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
