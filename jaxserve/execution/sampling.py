"""From logits to tokens, for all rows of a step at once, with no sort of the vocabulary.

``top_k`` and ``top_p`` are thresholds on the logits: each is found by bisection over the ordered bit patterns of f32,
exact to the last tie, in at most 32 rounds and in fewer where the logits around it are further apart, unless they are
equal. Devices that share the vocabulary cut each interval into 16, in at most 8 rounds of one exchange each.
Sampling adds Gumbel noise and takes the maximum; the noise depends on (seed, position) alone. Devices may share the
vocabulary (``vocabulary.Vocabulary``): shapes are those of one device, ``VL`` columns of V.

What a step's rows may ask (``step_io.Sampling``) is fixed when it is compiled: "any" tests at run time what is needed,
which costs nothing on a CPU, but on a GPU a loop on the device makes the host wait.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.execution.vocabulary import Vocabulary, whole
from jaxserve.step_io import Sampling, StepInputs

THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # bits, of four rounds each, in turns


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of f32 ``x``; 0.0 and -0.0 have the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


# Where devices share the vocabulary they try several thresholds at once, to exchange sums less often: of a wide range
# these, dense where logits below the best lie and at most 2**28 keys apart, then 15 that cut what is left into 16. One
# device has nothing to exchange, and every pass over its columns costs it as much as the first.
WIDE = 1 << 28
FIRST_TRIED = (-(2.0**96), -(2.0**64), -(2.0**32), -16.0, -12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.25)
FIRST_TRIED += (-(2.0**-32), -(2.0**-64), -(2.0**-96))
MINUS_INF_KEY, ZERO_KEY = 0x007FFFFF, 0x80000000  # ``ordered_bits``


def largest_threshold(
    keys: jax.Array,
    weights: jax.Array | None,
    least: jax.Array,
    low: jax.Array,
    searched: jax.Array,
    vocab: Vocabulary,
) -> jax.Array:
    """For each row of ``searched`` [B] bool a key ``t`` [B] that keeps what the largest one with
    ``sum(weights[keys >= t]) >= least`` keeps; ``low`` [B] for the others.

    Args:
        keys: ``[B, VL]`` uint32 of numbers up to 0.
        weights: ``[B, VL]`` f32, not negative; None: each is 1.
        least: ``[B]``.
        low: ``[B]`` uint32, which keeps enough.
    """
    num = 1 if vocab.shards == 1 else len(FIRST_TRIED)
    one = jnp.float32(1)  # of which sums are exact below 2**24

    def unresolved(carry):
        low, high, _, _, several = carry
        return jnp.any((high - low > 1) & several)

    def narrow(carry):
        low, high, from_low, from_high = (x[:, None] for x in carry[:4])  # [B, 1]
        step = (high - low - 1) // (num + 1) + 1
        tried = jnp.minimum(low + step * jnp.arange(1, num + 1, dtype=jnp.uint32), high - 1)  # [B, C], ascending
        if num > 1:
            first = ordered_bits(jnp.asarray(FIRST_TRIED, jnp.float32))
            tried = jnp.where(high - low > WIDE, jnp.clip(first, low, high - 1), tried)
        counted = [jnp.where(keys >= tried[:, i, None], one if weights is None else weights, 0) for i in range(num)]
        if weights is not None:
            counted.append(jnp.where((keys >= low) & (keys < high), one, 0))
        found = lax.platform_dependent(*counted, cpu=_sums, default=_sums_in_one_pass)
        found = vocab.total(jnp.stack(found, axis=1))  # one exchange
        enough = (found[:, :num] >= least[:, None]) | (tried == low)
        high = jnp.min(jnp.where(enough, high, tried), axis=1, keepdims=True)
        below = tried < high  # up to the first that is not enough, whatever rounding makes of the later ones
        low = jnp.max(jnp.where(below, tried, low), axis=1)
        from_low = jnp.min(jnp.where(below, found[:, :num], from_low), axis=1)
        from_high = jnp.max(jnp.where(below, from_high, found[:, :num]), axis=1)
        # low keeps enough and high does not: a single column between them is the threshold's own. Of weights, whose
        # sums do not tell how many there are, one round late.
        inside = from_low - from_high if weights is None else found[:, num]
        return low, high[:, 0], from_low, from_high, inside > 1

    high = jnp.where(searched, jnp.uint32(ZERO_KEY + 1), low + 1)
    zeros = jnp.zeros(low.shape, jnp.float32)
    return lax.while_loop(unresolved, narrow, (low, high, zeros + vocab.padded_size, zeros, searched))[0]


def _sums(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """[B] of each of [B, VL], in the order in which one alone is added up; [B, C, VL] at once is in another."""
    return tuple(jnp.sum(x, axis=1) for x in xs)


def _sums_in_one_pass(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """``_sums`` by one reduction of all: two kernels on a GPU, however many. On a CPU it is scalar code."""
    return lax.reduce(tuple(xs), (np.float32(0),) * len(xs), lambda a, b: tuple(map(lax.add, a, b)), (1,))


# Samplings that look at every field of the inputs; of "constrained" rows the logits are changed before.
LOOKS_AT_ALL: tuple[Sampling, ...] = ("any", "constrained")


def kept(scaled: jax.Array, inputs: StepInputs, asked: Sampling = "any", vocab: Vocabulary | None = None) -> jax.Array:
    """Mask [B, VL] of what ``top_k``, ``top_p`` and ``min_p`` leave of the tempered logits ``scaled`` [B, VL], of which
    each row's largest is 0. Rows that do not sample keep what ``min_p`` leaves."""
    vocab = vocab or whole(scaled)
    weight = jnp.exp(scaled)  # [B, VL], probabilities up to a factor
    keep = weight >= inputs.min_p[:, None]
    if asked not in LOOKS_AT_ALL:
        return keep
    random = inputs.temperature > 0
    by_number = random & (inputs.top_k > 0) & (inputs.top_k < vocab.size)  # [B]
    by_mass = random & (inputs.top_p < 1)

    def with_thresholds() -> jax.Array:
        keys = ordered_bits(scaled)
        lowest = jnp.full(keys.shape[:1], MINUS_INF_KEY, jnp.uint32)
        top_k = largest_threshold(keys, None, inputs.top_k, lowest, by_number, vocab)
        total = vocab.total(jnp.sum(jnp.where(keys >= top_k[:, None], weight, 0), axis=1))
        top_p = largest_threshold(keys, weight, inputs.top_p * total, top_k, by_mass, vocab)
        return keys >= top_p[:, None]

    return keep & lax.cond(jnp.any(by_number | by_mass), with_thresholds, lambda: jnp.ones_like(keep))


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

    JAX's own is on a CPU a loop over arrays in memory. This is one expression, which XLA computes in vector registers,
    in a quarter of the time.
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
