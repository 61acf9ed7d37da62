"""Products with matrices that are dequantized a few rows at a time: what CPUs do instead of a fused kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_ELEMENTS = 2**17  # of dequantized rows: 512 KiB of f32, half of a core's cache; 2**16 to 2**18 differ little


def multiply_by_chunks(
    multiply: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], num_tokens: int, shape: tuple[int, ...]
) -> jax.Array:
    """``[M, F]`` f32 of a matrix of ``shape`` [F, D], some rows after others.

    Args:
        multiply: given a function that takes the rows of an array [F, ...] that are due, their product [M, rows] f32.
        num_tokens: M.
    """
    num_rows, num_columns = shape
    rows = min(num_rows, max(1, CHUNK_ELEMENTS // num_columns))
    if rows == num_rows:
        return multiply(lambda x: x)
    num_chunks = -(-num_rows // rows)
    rows = -(-num_rows // num_chunks)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, num_rows - rows)  # the last chunk may do some of the one before again
        part = multiply(lambda x: lax.dynamic_slice_in_dim(x, start, rows))
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, num_chunks, one, jnp.zeros((num_tokens, num_rows), jnp.float32))
