"""Products with matrices that are dequantized a few rows at a time: what CPUs do instead of a fused kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Rows = Callable[[jax.Array], jax.Array]  # of an array [F, ...] those that are due

# Dequantized elements at once. One token is multiplied as fast as the rows come, so they had better come from a core's
# cache; more tokens are worth larger products. Measured on two cores with 1 MiB of second-level cache each.
FEW_TOKENS = 4
CHUNK_ELEMENTS = {"few": 2**17, "many": 2**20}


def multiply_by_chunks(multiply: Callable[[Rows], jax.Array], num_tokens: int, shape: tuple[int, ...]) -> jax.Array:
    """``[M, F]`` f32 of a matrix of ``shape`` [F, D], some rows after others.

    Args:
        multiply: given what takes the rows that are due, their product [M, rows] f32.
        num_tokens: M.
    """
    num_rows, num_columns = shape
    if num_rows == 1:
        return multiply(lambda x: x)
    elements = CHUNK_ELEMENTS["few" if num_tokens < FEW_TOKENS else "many"]
    # Two at least: outside of a loop XLA makes dequantizing a part of whatever surrounds it, 5 to 10 times slower.
    num_chunks = max(2, -(-num_rows // max(1, elements // num_columns)))
    rows = -(-num_rows // num_chunks)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * rows, num_rows - rows)  # the last chunk may do some of the one before again
        part = multiply(lambda x: lax.dynamic_slice_in_dim(x, start, rows))
        return lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    return lax.fori_loop(0, num_chunks, one, jnp.zeros((num_tokens, num_rows), jnp.float32))
