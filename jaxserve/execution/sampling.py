"""From logits to tokens, for all rows of a step at once, with no sort of the vocabulary.

``top_k`` and ``top_p`` are thresholds on the logits: each is found by bisection over the ordered bit patterns of f32,
exact to the last tie, in at most 32 passes over ``[B, V]`` and in as many as the closest two logits need.
Sampling adds Gumbel noise and takes the maximum; the noise depends on (seed, position) alone.

What a step's rows may ask (``step_io.Sampling``) is fixed when it is compiled: "any" tests at run time what is needed,
which costs nothing on a CPU, but on a GPU a loop on the device makes the host wait.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.step_io import Sampling, StepInputs


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of f32 ``x``; 0.0 and -0.0 have the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_threshold(keys: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """For each row the largest key ``t`` [B] with ``enough(keys >= t)``, which must hold for ``t = 0`` and be monotone.

    Args:
        keys: ``[B, V]`` uint32.
        enough: from a kept mask ``[B, V]`` to ``[B]`` bool.
    """

    def unresolved(carry):
        low, high, between = carry
        return jnp.any(between & (high - low > 1))

    def halve(carry):
        low, high, _ = carry
        mid = low + (high - low) // 2
        ok = enough(keys >= mid[:, None])
        low, high = jnp.where(ok, mid, low), jnp.where(ok, high, mid)
        # Nothing lies strictly between: every t in [low, high) keeps the same set.
        return low, high, jnp.any((keys > low[:, None]) & (keys < high[:, None]), axis=1)

    low = jnp.zeros(keys.shape[0], jnp.uint32)
    high = jnp.max(keys, axis=1) + 1
    return lax.while_loop(unresolved, halve, (low, high, jnp.ones(keys.shape[0], bool)))[0]


# Samplings that look at every field of the inputs; of "constrained" rows the logits are changed before.
LOOKS_AT_ALL: tuple[Sampling, ...] = ("any", "constrained")


def kept(scaled: jax.Array, inputs: StepInputs, asked: Sampling = "any") -> jax.Array:
    """Mask [B, V] of what ``top_k``, ``top_p`` and ``min_p`` leave of the tempered logits ``scaled`` [B, V]."""
    top = jnp.max(scaled, axis=1, keepdims=True)
    weight = jnp.exp(scaled - top)  # [B, V], probabilities up to a factor
    keep = weight >= inputs.min_p[:, None]
    if asked not in LOOKS_AT_ALL:
        return keep

    def with_thresholds() -> jax.Array:
        keys = ordered_bits(scaled)
        k = jnp.where(inputs.top_k > 0, jnp.minimum(inputs.top_k, scaled.shape[1]), scaled.shape[1])  # [B]
        in_top_k = keys >= largest_threshold(keys, lambda m: jnp.sum(m, axis=1) >= k)[:, None]
        mass = inputs.top_p * jnp.sum(jnp.where(in_top_k, weight, 0), axis=1)  # [B]

        def enough(mask: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask & in_top_k, weight, 0), axis=1) >= mass

        # top_p = 1 keeps all: a sum in another order must not drop the tail.
        in_top_p = (keys >= largest_threshold(keys, enough)[:, None]) | (inputs.top_p >= 1)[:, None]
        return in_top_k & in_top_p

    used = jnp.any((inputs.top_k > 0) | (inputs.top_p < 1))
    return keep & lax.cond(used, with_thresholds, lambda: jnp.ones_like(keep))


def gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Noise ``[B, size]`` that depends on each row's ``seed`` [B, 2] and ``position`` [B] only."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)

    return jax.vmap(row)(seed, position)


def sample(logits: jax.Array, inputs: StepInputs, asked: Sampling = "any") -> jax.Array:
    """One token id ``[B]`` i32 a row from ``logits`` [B, V] f32, as the rows' parameters ask."""
    if asked == "greedy":
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    if asked in LOOKS_AT_ALL:
        logits = without_suppressed(logits, inputs)
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)

    def draw() -> jax.Array:
        random = inputs.temperature > 0
        # From the best logit down, so that a tiny temperature cannot overflow to inf - inf.
        below = logits - jnp.max(logits, axis=1, keepdims=True)
        scaled = below / jnp.where(random, inputs.temperature, 1)[:, None]
        noisy = scaled + gumbel(inputs.seed, inputs.kv_lens, logits.shape[1])
        drawn = jnp.argmax(jnp.where(kept(scaled, inputs, asked), noisy, -jnp.inf), axis=1).astype(jnp.int32)
        return jnp.where(random, drawn, greedy)

    if asked == "random":
        return draw()
    return lax.cond(jnp.any(inputs.temperature > 0), draw, lambda: greedy)


def without_suppressed(logits: jax.Array, inputs: StepInputs) -> jax.Array:
    """``logits`` [B, V] with -inf for the ``stop_ids`` of rows that are shorter than their ``min_len``."""
    rows = jnp.arange(logits.shape[0])[:, None]
    suppress = inputs.kv_lens < inputs.min_len  # [B]

    def suppressed() -> jax.Array:
        ids = jnp.where((inputs.stop_ids >= 0) & suppress[:, None], inputs.stop_ids, logits.shape[1])  # [B, NS]
        return logits.at[rows, ids].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(suppress), suppressed, lambda: logits)


def top_logprobs(
    logits: jax.Array, tokens: jax.Array, num_logprobs: jax.Array, k: int, asked: Sampling = "any"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Raw log-probabilities: of ``tokens`` [B], and the ids and values [B, k] of the best.

    The best are zeros unless some row's ``num_logprobs`` [B] is positive.
    """
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)  # [B, 1]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1) - norm
    b, k_all = logits.shape[0], min(k, logits.shape[1])

    def best() -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(logits, k_all)
        pad = ((0, 0), (0, k - k_all))
        return jnp.pad(values - norm, pad, constant_values=-jnp.inf), jnp.pad(ids.astype(jnp.int32), pad)

    def none() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((b, k), jnp.float32), jnp.zeros((b, k), jnp.int32)

    values, ids = lax.cond(jnp.any(num_logprobs > 0), best, none) if asked in LOOKS_AT_ALL else none()
    return chosen[:, 0], ids, values
