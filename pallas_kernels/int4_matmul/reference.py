"""4-bit matrix product in plain jnp: the specification, and the path of CPUs.

Columns 2i are the low nibbles and 2i + 1 the high ones, so x is taken apart instead of putting the matrix together: two
products over D/2, of which each dequantizes a few rows at a time. Interleaving the nibbles costs a CPU more than both.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_chunks import multiply_by_chunks


def dequantize_halves(
    q: jax.Array,  # [F, D / 2] u8
    scale: jax.Array,  # [F, D / G]
    bias: jax.Array | None,  # [F, D / G]
) -> tuple[jax.Array, jax.Array]:
    """The matrix's even and its odd columns in f32, ``[F, D / 2]`` each."""
    grouped = q.reshape(*scale.shape, -1)  # [F, D / G, G / 2]
    scale = scale.astype(jnp.float32)[..., None]
    offset = -8 * scale if bias is None else bias.astype(jnp.float32)[..., None]
    low, high = (grouped & 15).astype(jnp.float32), (grouped >> 4).astype(jnp.float32)
    return (scale * low + offset).reshape(q.shape), (scale * high + offset).reshape(q.shape)


def int4_matmul(
    x: jax.Array,  # [M, D]
    q: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:  # [M, F] f32
    """See ``pallas_kernels.int4_matmul.int4_matmul``."""
    even, odd = x[:, 0::2], x[:, 1::2]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x, w.astype(x.dtype), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def multiply(rows) -> jax.Array:
        low, high = dequantize_halves(rows(q), rows(scale), None if bias is None else rows(bias))
        return product(even, low) + product(odd, high)

    return multiply_by_chunks(multiply, x.shape[0], (q.shape[0], x.shape[1]))
