"""Grouped matrix product in plain jnp: the specification, and the path of CPUs.

Blocks of rows that belong to one group each are multiplied one after another. So the arithmetic is that of the rows
there are, and the matrices of groups without rows are not read: XLA's own ``ragged_dot`` on a CPU multiplies all rows
with all matrices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MIN_BLOCK, MAX_BLOCK = 8, 64  # rows; fewer cost as much as 8, more need no other matrix


def grouped_matmul(
    x: jax.Array,  # [M, D]
    w: Any,  # [E, F, D]
    group_sizes: jax.Array,  # [E]
    matrix: Callable[[Any, Any], jax.Array],
) -> jax.Array:  # [M, F]
    """See ``pallas_kernels.grouped_matmul.grouped_matmul``."""
    num_rows, num_groups = x.shape[0], w.shape[0]
    block = MIN_BLOCK
    while block < MAX_BLOCK and block * num_groups < num_rows:
        block *= 2
    ends = jnp.cumsum(group_sizes)  # [E]
    blocks = -(-group_sizes // block)  # [E]
    last_block = jnp.cumsum(blocks)  # [E], one behind each group's last
    # A block that reaches into the next group, or behind the last one, is overwritten by that group's own blocks.
    padded = jnp.pad(x, ((0, block), (0, 0)))  # [M + block, D]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def multiply(i: jax.Array, out: jax.Array) -> jax.Array:  # out: [M + block, F]
        group = jnp.sum(last_block <= i)
        start = ends[group] - group_sizes[group] + (i - (last_block - blocks)[group]) * block
        rows = lax.dynamic_slice_in_dim(padded, start, block)  # [block, D]
        product = lax.dot_general(
            rows, matrix(w, group), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        return lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, axis=0)

    out = jnp.zeros((num_rows + block, w.shape[1]), x.dtype)
    return lax.fori_loop(0, last_block[-1], multiply, out)[:num_rows]
