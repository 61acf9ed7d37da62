"""How far the range of a group of int4 numbers goes: a few large weights are cut where that lets the others lie nearer,
measured by what the group's own inputs make of the error (AWQ's and GPTQ's search for a smaller range)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.quantization.rounding import LEVELS, int4_grid

SHRINKS = tuple(1 - 0.04 * i for i in range(13))  # of the range, that are tried: the whole to about half


def best_grid(
    grouped: jax.Array, loss: Callable[[jax.Array], jax.Array], *, has_bias: bool
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point ``[..., groups]`` of weights ``grouped`` [..., groups, group] with the least loss.

    Args:
        loss: of errors of the weights' shape, for each group.
    """
    low, high = grouped.min(-1), grouped.max(-1)

    def attempt(best: tuple, shrink: jax.Array) -> tuple:
        scale, zero = int4_grid(low * shrink, high * shrink, has_bias=has_bias)
        found = loss(on_grid(grouped, scale, zero) - grouped)
        return tuple(jnp.where(found < best[0], new, old) for new, old in zip((found, scale, zero), best)), None

    start = jnp.full(low.shape, jnp.inf), jnp.ones_like(low), jnp.zeros_like(low)
    (_, scale, zero), _ = jax.lax.scan(attempt, start, jnp.asarray(SHRINKS))
    return scale, zero


def on_grid(grouped: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """What the nearest numbers stand for."""
    scale, zero = scale[..., None], zero[..., None]
    return (jnp.clip(jnp.round(grouped / scale) + zero, 0, LEVELS["int4"]) - zero) * scale


@partial(jax.jit, static_argnames="group_size")
def clipped_grid(w: jax.Array, second: jax.Array, *, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point ``[out, groups]`` of ``w`` [out, in] for inputs of second moments ``second`` [in, in]: each
    group by itself changes the outputs least."""
    rows, columns = w.shape
    i = jnp.arange(columns // group_size)
    own = second.reshape(len(i), group_size, len(i), group_size)[i, :, i]  # [groups, group, group]

    def loss(error: jax.Array) -> jax.Array:
        return jnp.einsum("rgc,gcd,rgd->rg", error, own, error, precision="highest")

    return best_grid(w.reshape(rows, -1, group_size), loss, has_bias=True)
