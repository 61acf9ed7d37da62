"""8-bit matrix product in plain jnp: the specification, and the path of CPUs."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_chunks import multiply_by_chunks

MIN_TOKENS = 8  # of a product of int8: XLA has no fast one for fewer on CPUs, 40 times slower at 4096 x 4096


def dequantize_rows(
    q: jax.Array,  # [F, D]
    scale: jax.Array,  # [F, D / G]
    bias: jax.Array | None,  # [F, D / G]
) -> jax.Array:
    """``[F, D]`` f32."""
    grouped = q.astype(jnp.float32).reshape(*scale.shape, -1)  # [F, D / G, G]
    w = grouped * scale.astype(jnp.float32)[..., None]
    return (w if bias is None else w + bias.astype(jnp.float32)[..., None]).reshape(q.shape)


def int8_matmul(
    x: jax.Array,  # [M, D]
    q: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:  # [M, F] f32
    """See ``pallas_kernels.int8_matmul.int8_matmul``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def multiply(rows) -> jax.Array:
        w = dequantize_rows(rows(q), rows(scale), None if bias is None else rows(bias)).astype(x.dtype)
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    return multiply_by_chunks(multiply, x.shape[0], q.shape)


def w8a8_matmul(
    x: jax.Array,  # [M, D] int8
    x_scale: jax.Array,  # [M, 1] f32
    q: jax.Array,  # [F, D] int8
    scale: jax.Array,  # [F, 1]
) -> jax.Array:  # [M, F] f32
    """Both operands of 8 bits, summed exactly in 32."""
    num_tokens = x.shape[0]
    x = jnp.pad(x, ((0, max(0, MIN_TOKENS - num_tokens)), (0, 0)))
    sums = lax.dot_general(x, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)[:num_tokens]
    return sums.astype(jnp.float32) * x_scale * scale.astype(jnp.float32)[:, 0]
