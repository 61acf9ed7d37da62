"""Each sampling field changes the distribution exactly as a numpy reference says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.execution import sampling
from jaxserve.scheduler.batch import choose_sampling
from jaxserve.step_io import Bucket, StepDims, StepInputs, new_inputs

kept = jax.jit(sampling.kept)
sample = jax.jit(sampling.sample)


def rows(num: int, **fields) -> StepInputs:
    """Inputs of ``num`` decode rows with the given fields set."""
    dims = StepDims(num_slots=num, max_pages_per_seq=1, num_pages=1, page_size=1)
    inputs = new_inputs(Bucket(num, 0, 0), dims)[1]
    inputs.kv_lens[:] = 10
    for name, value in fields.items():
        getattr(inputs, name)[:] = value
    return inputs


def numpy_kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The kept set of one row by sorting: top_k with ties, top_p over the renormalised rest with ties, min_p."""
    order = np.sort(scaled)[::-1]
    keep = scaled >= order[min(top_k, len(order)) - 1] if top_k > 0 else np.ones(len(scaled), bool)
    weight = np.where(keep, np.exp(scaled - order[0]), 0)
    if top_p < 1:
        mass = np.cumsum(np.sort(weight)[::-1])
        smallest = np.sort(weight)[::-1][np.argmax(mass >= top_p * weight.sum())]
        keep &= weight >= smallest
    return keep & (np.exp(scaled - order[0]) >= min_p)


@pytest.mark.parametrize("top_k", [0, -1, 1, 2, 5, 50, 1000])
@pytest.mark.parametrize("top_p, min_p", [(1.0, 0.0), (0.9, 0.0), (0.3, 0.0), (1.0, 0.2), (0.8, 0.05), (1e-6, 0.0)])
def test_kept_set(top_k, top_p, min_p):
    r = np.random.default_rng(0)
    scaled = r.standard_normal((16, 97)).astype(np.float32) * 3
    scaled[4:8] = np.round(scaled[4:8])  # many ties
    scaled[8] = 0.0  # all equal
    scaled[9, ::2] = -0.0
    scaled[10] *= 1e-6
    scaled[11] -= 1e4
    scaled[12, 5:] = -np.inf  # suppressed
    scaled -= scaled.max(axis=1, keepdims=True)
    got = kept(jnp.asarray(scaled), rows(16, temperature=1, top_k=max(top_k, 0), top_p=top_p, min_p=min_p))
    for row, mask in zip(scaled.astype(np.float64) + 0.0, np.asarray(got), strict=True):
        np.testing.assert_array_equal(mask & np.isfinite(row), numpy_kept(row, top_k, top_p, min_p) & np.isfinite(row))


def mixed(num_rows: int, vocab: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tempered logits [B, V] whose largest is 0, of every kind, and what each row asks."""
    r = np.random.default_rng(seed)
    scaled = r.standard_normal((num_rows, vocab)).astype(np.float32) * r.choice([1e-3, 1, 4], (num_rows, 1))
    scaled[::5] = np.round(scaled[::5] * 2) / 2  # ties
    scaled[1::7] = 1  # all equal
    scaled[2::7, r.random(vocab) < 0.9] = -np.inf
    scaled[3::7, 1:] = -np.inf
    scaled[4::7] = -2 * np.log(1 + r.permutation(vocab))
    scaled = (scaled - scaled.max(axis=1, keepdims=True)).astype(np.float32)
    temperature = r.choice([1e-30, 0.05, 1, 8, 1e6], num_rows).astype(np.float32)
    with np.errstate(over="ignore"):
        scaled /= temperature[:, None]
    asked = {
        "temperature": temperature,
        "top_k": r.choice([0, 1, 5, 20, vocab - 1, vocab, vocab + 1, 2**31 - 1], num_rows),
        "top_p": r.choice([1, 0.9, 0.45, 1e-6, 1e-38], num_rows),
        "min_p": r.choice([0, 0.1], num_rows),
    }
    return scaled, asked


@pytest.mark.parametrize("seed", range(4))
def test_kept_set_of_mixed_rows(seed):
    scaled, asked = mixed(64, 97, seed)
    got = kept(jnp.asarray(scaled), rows(64, **asked))
    for i, (row, mask) in enumerate(zip(scaled.astype(np.float64), np.asarray(got), strict=True)):
        want = numpy_kept(row, *(asked[name][i] for name in ("top_k", "top_p", "min_p")))
        np.testing.assert_array_equal(mask & np.isfinite(row), want & np.isfinite(row), err_msg=str(i))


def test_only_rows_that_sample_look_for_thresholds():
    scaled = -jnp.arange(20.0)[None].repeat(2, axis=0)
    got = kept(scaled, rows(2, temperature=[0, 1], top_k=3, top_p=0.5))
    assert got.sum(axis=1).tolist() == [20, 1]


def test_a_wide_range_is_cut_into_what_seven_rounds_of_fifteen_resolve():
    ends = np.asarray(sampling.ordered_bits(jnp.asarray([-np.inf, *sampling.FIRST_TRIED, 0.0]))).astype(np.int64)
    assert len(sampling.FIRST_TRIED) == 15 and sampling.WIDE == 16**7
    assert (ends[0], ends[-1]) == (sampling.MINUS_INF_KEY, sampling.ZERO_KEY)
    ends[-1] += 1  # where the search ends
    assert np.all(np.diff(ends) > 0) and np.all(np.diff(ends) <= sampling.WIDE)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.85, "min_p": 0.05},
    ],
)
def test_frequencies(fields):
    n, v = 20_000, 12
    logits = np.random.default_rng(1).standard_normal(v).astype(np.float32) * 1.5
    seeds = np.random.default_rng(2).integers(-(2**31), 2**31, (n, 2))
    inputs = rows(n, seed=seeds, **fields)
    tokens = np.asarray(sample(jnp.broadcast_to(logits, (n, v)), inputs))
    scaled = logits.astype(np.float64) / fields["temperature"]
    keep = numpy_kept(scaled, fields.get("top_k", 0), fields.get("top_p", 1.0), fields.get("min_p", 0.0))
    want = np.where(keep, np.exp(scaled - scaled.max()), 0)
    want /= want.sum()
    got = np.bincount(tokens, minlength=v) / n
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(keep))
    assert np.all(np.abs(got - want) < 5 * np.sqrt(want * (1 - want) / n) + 1e-12)


def test_token_depends_on_seed_and_position_alone():
    r = np.random.default_rng(3)
    logits = jnp.asarray(r.standard_normal((8, 500)), jnp.float32)
    fields = {"temperature": np.linspace(0.5, 2, 8), "seed": r.integers(0, 99, (8, 2)), "kv_lens": np.arange(1, 9)}
    together = np.asarray(sample(logits, rows(8, **fields)))
    for i in range(8):
        alone = sample(logits[i : i + 1], rows(1, **{k: v[i : i + 1] for k, v in fields.items()}))
        assert alone[0] == together[i]
    moved = np.asarray(sample(logits, rows(8, **(fields | {"kv_lens": np.arange(2, 10)}))))
    reseeded = np.asarray(sample(logits, rows(8, **(fields | {"seed": fields["seed"] + 1}))))
    assert (moved != together).any() and (reseeded != together).any()


def test_greedy_rows_among_random_ones():
    r = np.random.default_rng(4)
    logits = r.standard_normal((6, 50)).astype(np.float32)
    tokens = np.asarray(sample(jnp.asarray(logits), rows(6, temperature=[0, 1, 0, 1, 0, 1], seed=[[1, 2]] * 6)))
    assert tokens[::2].tolist() == logits.argmax(1)[::2].tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 3e-38, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.random.default_rng(6).standard_normal((3, 300)).astype(np.float32) * 5
    tokens = np.asarray(sample(jnp.asarray(logits), rows(3, temperature=temperature, top_p=0.9)))
    assert tokens.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ("greedy", {}),
        ("greedy", {"top_k": 3, "top_p": 0.5, "min_p": 0.5}),  # of greedy rows, which they do not change
        ("random", {"temperature": 1.3}),
        ("random", {"temperature": np.linspace(0, 2, 16), "min_p": 0.1}),
        ("any", {"temperature": 1.0, "top_k": 3}),
        ("any", {"temperature": 1.0, "top_p": 0.5}),
        ("any", {"min_len": 11, "stop_ids": 4}),
        ("any", {"num_logprobs": 2}),
    ],
)
def test_the_least_that_gives_every_row_what_it_asks_for(asked, fields):
    r = np.random.default_rng(6)
    logits = jnp.asarray(r.standard_normal((16, 300)), jnp.float32)
    inputs = rows(16, seed=r.integers(-(2**31), 2**31, (16, 2)), **fields)
    assert choose_sampling(inputs) == asked
    least = jax.jit(sampling.sample, static_argnums=2)(logits, inputs, asked)
    np.testing.assert_array_equal(least, sample(logits, inputs))


def test_stop_ids_cannot_be_sampled_before_min_len():
    logits = np.zeros((3, 10), np.float32)
    logits[:, 7], logits[:, 3], logits[:, 5] = 9, 8, 7
    stop_ids = np.full((3, 16), -1)
    stop_ids[:, :2] = [7, 3]
    inputs = rows(3, kv_lens=[10, 11, 12], min_len=[12, 12, 12], stop_ids=stop_ids)
    assert np.asarray(sample(jnp.asarray(logits), inputs)).tolist() == [5, 5, 7]


def test_top_logprobs():
    logits = np.random.default_rng(5).standard_normal((4, 33)).astype(np.float32) * 4
    tokens = jnp.asarray([0, 5, 9, 32])
    want = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for asked, k in (([-1, 0, 3, 20], 20), ([1, 1, 1, 1], 40)):
        chosen, ids, values = sampling.top_logprobs(jnp.asarray(logits), tokens, jnp.asarray(asked), k)
        np.testing.assert_allclose(chosen, want[np.arange(4), tokens], atol=1e-5)
        n = min(k, 33)
        np.testing.assert_array_equal(ids[:, :n], np.argsort(-logits, axis=1)[:, :n])
        np.testing.assert_allclose(values[:, :n], -np.sort(-want, axis=1)[:, :n], atol=1e-5)
        assert np.all(np.isneginf(values[:, n:]))


def test_no_sort_of_the_vocabulary():
    v = 5000
    inputs = rows(2, temperature=1.0, top_k=5, top_p=0.5)
    text = sample.lower(jnp.zeros((2, v)), inputs).compile().as_text()
    assert text is not None and f"{v}" in text and " sort(" not in text
