"""From logits to tokens, for all rows of a step at once, with no sort of the vocabulary.

``top_k`` and ``top_p`` are thresholds on the logits: each is found by bisection over the ordered bit patterns of f32,
exact to the last tie, in at most 32 passes over ``[B, V]`` and in as many as the closest two logits need.
Sampling adds Gumbel noise and takes the maximum; the noise depends on (seed, position) alone. Devices may share the
vocabulary (``vocabulary.Vocabulary``): shapes are those of one device, ``VL`` columns of V.

What a step's rows may ask (``step_io.Sampling``) is fixed when it is compiled: "any" tests at run time what is needed,
which costs nothing on a CPU, but on a GPU a loop on the device makes the host wait.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.execution.vocabulary import Vocabulary, whole
from jaxserve.step_io import Sampling, StepInputs

THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # bits, of four rounds each, in turns


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of f32 ``x``; 0.0 and -0.0 have the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_threshold(keys: jax.Array, enough: Callable[[jax.Array], jax.Array], vocab: Vocabulary) -> jax.Array:
    """For each row the largest key ``t`` [B] with ``enough(keys >= t)``, which must hold for ``t = 0`` and be monotone.

    Args:
        keys: ``[B, VL]`` uint32.
        enough: from a kept mask ``[B, VL]`` to ``[B]`` bool.
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
        return low, high, vocab.any((keys > low[:, None]) & (keys < high[:, None]))

    low = jnp.zeros(keys.shape[0], jnp.uint32)
    high = vocab.max(keys) + 1
    return lax.while_loop(unresolved, halve, (low, high, jnp.ones(keys.shape[0], bool)))[0]


# Samplings that look at every field of the inputs; of "constrained" rows the logits are changed before.
LOOKS_AT_ALL: tuple[Sampling, ...] = ("any", "constrained")


def kept(scaled: jax.Array, inputs: StepInputs, asked: Sampling = "any", vocab: Vocabulary | None = None) -> jax.Array:
    """Mask [B, VL] of what ``top_k``, ``top_p`` and ``min_p`` leave of the tempered logits ``scaled`` [B, VL]."""
    vocab = vocab or whole(scaled)
    top = vocab.max(scaled)[:, None]
    weight = jnp.exp(scaled - top)  # [B, VL], probabilities up to a factor
    keep = weight >= inputs.min_p[:, None]
    if asked not in LOOKS_AT_ALL:
        return keep

    def with_thresholds() -> jax.Array:
        keys = ordered_bits(scaled)
        k = jnp.where(inputs.top_k > 0, jnp.minimum(inputs.top_k, vocab.size), vocab.padded_size)  # [B]
        in_top_k = keys >= largest_threshold(keys, lambda m: vocab.sum(m) >= k, vocab)[:, None]
        mass = inputs.top_p * vocab.sum(jnp.where(in_top_k, weight, 0))  # [B]

        def enough(mask: jax.Array) -> jax.Array:
            return vocab.sum(jnp.where(mask & in_top_k, weight, 0)) >= mass

        # top_p = 1 keeps all: a sum in another order must not drop the tail.
        in_top_p = (keys >= largest_threshold(keys, enough, vocab)[:, None]) | (inputs.top_p >= 1)[:, None]
        return in_top_k & in_top_p

    used = jnp.any((inputs.top_k > 0) | (inputs.top_p < 1))
    return keep & lax.cond(used, with_thresholds, lambda: jnp.ones_like(keep))


def gumbel(seed: jax.Array, position: jax.Array, vocab: Vocabulary) -> jax.Array:
    """Noise ``[B, VL]`` that depends on each row's ``seed`` [B, 2] and ``position`` [B] only: this device's columns of
    what one device draws for all, which is ``jax.random.gumbel``'s of ``fold_in(seed, position)``."""
    seed = lax.bitcast_convert_type(seed, jnp.uint32)
    key = threefry_2x32(seed[:, 0], seed[:, 1], jnp.zeros_like(seed[:, 0]), position.astype(jnp.uint32))  # of fold_in
    ids = (vocab.first_id() + jnp.arange(vocab.width)).astype(jnp.uint32)  # the counter
    high, low = threefry_2x32(key[0][:, None], key[1][:, None], jnp.zeros_like(ids), ids)  # [B, VL]
    uniform = lax.bitcast_convert_type((high ^ low) >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1  # in [0, 1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def threefry_2x32(k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The block cipher of ``jax.random``'s keys (Salmon et al. 2011, 20 rounds), of uint32 arrays that broadcast.

    JAX's own is on a CPU a loop over arrays in memory, and draws a half of what is asked at a time: this is one
    expression, which XLA computes in vector registers, in a quarter of the time. Nor can JAX's draw a part of an array.
    """
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for distance in THREEFRY_ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << distance | x1 >> 32 - distance)
        x0, x1 = x0 + keys[(group + 1) % 3], x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def sample(
    logits: jax.Array, inputs: StepInputs, asked: Sampling = "any", vocab: Vocabulary | None = None
) -> jax.Array:
    """One token id ``[B]`` i32 a row from ``logits`` [B, VL] f32, as the rows' parameters ask."""
    vocab = vocab or whole(logits)
    if asked == "greedy":
        return vocab.argmax(logits)
    if asked in LOOKS_AT_ALL:
        logits = without_suppressed(logits, inputs, vocab)

    def drawn() -> tuple[jax.Array, jax.Array]:
        random = inputs.temperature > 0
        # From the best logit down, so that a tiny temperature cannot overflow to inf - inf.
        below = logits - vocab.max(logits)[:, None]
        scaled = below / jnp.where(random, inputs.temperature, 1)[:, None]
        noisy = scaled + gumbel(inputs.seed, inputs.kv_lens, vocab)
        noisy = jnp.where(kept(scaled, inputs, asked, vocab), noisy, -jnp.inf)
        return vocab.local_best(jnp.where(random[:, None], noisy, logits))

    if asked == "random":
        return vocab.best(*drawn())
    return vocab.best(*lax.cond(jnp.any(inputs.temperature > 0), drawn, lambda: vocab.local_best(logits)))


def without_suppressed(logits: jax.Array, inputs: StepInputs, vocab: Vocabulary) -> jax.Array:
    """``logits`` [B, VL] with -inf for the ``stop_ids`` of rows that are shorter than their ``min_len``."""
    rows = jnp.arange(logits.shape[0])[:, None]
    suppress = inputs.kv_lens < inputs.min_len  # [B]

    def suppressed() -> jax.Array:
        columns = jnp.where(suppress[:, None], vocab.columns(inputs.stop_ids), vocab.width)  # [B, NS]
        return logits.at[rows, columns].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(suppress), suppressed, lambda: logits)


def top_logprobs(
    logits: jax.Array,
    tokens: jax.Array,
    num_logprobs: jax.Array,
    k: int,
    asked: Sampling = "any",
    vocab: Vocabulary | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Raw log-probabilities of ``logits`` [B, VL]: of ``tokens`` [B], and the ids and values [B, k] of the best.

    The best are zeros unless some row's ``num_logprobs`` [B] is positive.
    """
    vocab = vocab or whole(logits)
    norm = vocab.logsumexp(logits)[:, None]  # [B, 1]
    chosen = vocab.at(logits, tokens) - norm[:, 0]
    b, k_all = logits.shape[0], min(k, vocab.size)

    def best() -> tuple[jax.Array, jax.Array]:
        values, ids = vocab.top_k(logits, k_all)
        pad = ((0, 0), (0, k - k_all))
        return jnp.pad(values - norm, pad, constant_values=-jnp.inf), jnp.pad(ids.astype(jnp.int32), pad)

    def none() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((b, k), jnp.float32), jnp.zeros((b, k), jnp.int32)

    values, ids = lax.cond(jnp.any(num_logprobs > 0), best, none) if asked in LOOKS_AT_ALL else none()
    return chosen, ids, values
