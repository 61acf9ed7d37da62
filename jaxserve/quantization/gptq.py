"""GPTQ (Frantar et al., 2023): columns are rounded one after the other, and each one's error is made good by those that
are left, as far as the inputs' second moments let them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.quantization.clipping import best_grid
from jaxserve.quantization.rounding import LEVELS

DAMPING = (0.01, 0.1, 1.0)  # of the mean diagonal; a later one where the factorization fails with those before


class Int4(NamedTuple):
    """A matrix [out, in] as numbers 0..15, its columns in the order ``perm`` of the input's, in which each group rises:
    what the column's groups (``g_idx``) say and no more."""

    q: np.ndarray  # [out, in] u8
    scale: np.ndarray  # [out, groups] f32
    zero: np.ndarray  # [out, groups] f32, whole numbers
    perm: np.ndarray  # [in] i32


def gptq(
    name: str, w: np.ndarray, second: Any, group_size: int, *, has_bias: bool = True, act_order: bool = True
) -> Int4:
    """``w`` [out, in] f32 in int4 for inputs with the second moments ``second`` [in, in].

    With ``act_order`` columns are taken in the order of their inputs' size, largest first, and groups are made in that
    order; without it as they come, and ``perm`` changes nothing. Without ``has_bias`` every zero point is 8.

    Raises:
        CheckpointError: the second moments cannot be factorized with any damping; names the parameter.
    """
    second = jnp.asarray(second)
    diagonal = jnp.diagonal(second)
    perm = jnp.argsort(-diagonal) if act_order else jnp.arange(len(diagonal))
    w_sorted = jnp.where(diagonal == 0, 0, jnp.asarray(w))[:, perm]  # an input that is always 0 multiplies nothing
    moments = second[perm][:, perm]
    moments = moments + jnp.diag(jnp.where(diagonal[perm] == 0, 1.0, 0.0))
    for damping in DAMPING:
        factor = _factor(moments, damping)
        if bool(jnp.isfinite(factor).all()):
            q, scale, zero = _round(w_sorted, factor, group_size, has_bias)
            groups = np.asarray(perm, np.int32).reshape(-1, group_size)
            rising = (np.argsort(groups, axis=1) + np.arange(0, w.shape[1], group_size)[:, None]).ravel()
            return Int4(np.asarray(q)[:, rising], np.asarray(scale), np.asarray(zero), groups.ravel()[rising])
    raise CheckpointError(
        f"parameter {name}: its inputs' second moments cannot be factorized with a damping of {DAMPING[-1]}: "
        "give more calibration text"
    )


@jax.jit
def _factor(moments: jax.Array, damping: float) -> jax.Array:
    """U, upper triangular, with U^T U the inverse of the damped moments: NaN where there is none."""
    eye = jnp.eye(len(moments))
    lower = jnp.linalg.cholesky(moments + damping * jnp.mean(jnp.diagonal(moments)) * eye)
    inverse = jax.scipy.linalg.cho_solve((lower, True), eye)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


@partial(jax.jit, static_argnames=("group_size", "has_bias"))
def _round(w: jax.Array, factor: jax.Array, group_size: int, has_bias: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, columns = w.shape

    def one_group(w: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        group = jax.lax.dynamic_slice(w, (0, start), (rows, group_size))
        below = jax.lax.dynamic_slice(factor, (start, 0), (group_size, columns))
        own = jax.lax.dynamic_slice(below, (0, start), (group_size, group_size))
        costs = 1 / jnp.diagonal(own) ** 2  # of an error, once the columns that follow have made good what they can
        scale, zero = best_grid(group, lambda error: (error**2 * costs).sum(-1), has_bias=has_bias)

        def one_column(i: jax.Array, carry: tuple) -> tuple:
            group, q, errors = carry
            column = group[:, i]
            number = jnp.clip(jnp.round(column / scale) + zero, 0, LEVELS["int4"])
            error = (column - (number - zero) * scale) / own[i, i]
            return group - error[:, None] * own[i], q.at[:, i].set(number), errors.at[:, i].set(error)

        zeros = jnp.zeros_like(group)
        _, q, errors = jax.lax.fori_loop(0, group_size, one_column, (group, zeros, zeros))
        return w - jnp.dot(errors, below, precision="highest"), (q.astype(jnp.uint8), scale, zero)

    _, (q, scale, zero) = jax.lax.scan(one_group, w, jnp.arange(0, columns, group_size))
    return q.transpose(1, 0, 2).reshape(rows, columns), scale.T, zero.T
