"""Which grid a group of int4 numbers gets: its range is cut where that lets the other weights lie nearer (AWQ's and
GPTQ's search for a smaller range), or its step is made larger where the weights lie on that of a larger grid."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.quantization.rounding import LEVELS, int4_grid

# What is tried, as (part of the range, stretch of the step). Larger steps than the range needs: a zero point that is a
# whole number cuts one end by up to half a step, which such a step may spare. And weights that were 4-bit numbers in
# larger groups span 15 steps of theirs or fewer here, so are found again; where neither holds the loss is larger.
GRIDS = (*((1 - 0.04 * i, 1.0) for i in range(13)), *((1.0, LEVELS["int4"] / k) for k in range(14, 6, -1)))


def best_grid(
    grouped: jax.Array, loss: Callable[[jax.Array], jax.Array], *, has_bias: bool
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point ``[..., groups]`` of weights ``grouped`` [..., groups, group] with the least loss.

    Args:
        loss: of errors of the weights' shape, for each group.
    """
    low, high = grouped.min(-1), grouped.max(-1)

    def attempt(best: tuple, tried: jax.Array) -> tuple:
        part, stretch = tried
        scale, zero = int4_grid(low * part, high * part, has_bias=has_bias, stretch=stretch)
        found = loss(on_grid(grouped, scale, zero) - grouped)
        return tuple(jnp.where(found < best[0], new, old) for new, old in zip((found, scale, zero), best)), None

    start = jnp.full(low.shape, jnp.inf), jnp.ones_like(low), jnp.zeros_like(low)
    (_, scale, zero), _ = jax.lax.scan(attempt, start, jnp.asarray(GRIDS))
    return scale, zero


def on_grid(grouped: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """What the nearest numbers stand for."""
    scale, zero = scale[..., None], zero[..., None]
    return (jnp.clip(jnp.round(grouped / scale) + zero, 0, LEVELS["int4"]) - zero) * scale
