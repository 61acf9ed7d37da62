"""The reference of paged attention against dense attention in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import paged_attention

compiled = jax.jit(
    paged_attention,
    static_argnames=("num_decode_rows", "sm_scale", "window", "softcap", "value_dim", "implementation"),
)


def dense(q, k, v, scale, window=None, softcap=None, sinks=None):
    """Causal attention of the last len(q) positions: q [n, N, H], k [s, K, H], v [s, K, HV], float64."""
    n, num_heads, _ = q.shape
    s, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    out = np.zeros((n, num_heads, v.shape[-1]))
    for i in range(n):
        last = s - n + i + 1
        first = 0 if window is None else max(0, last - window)
        for head in range(num_heads):
            scores = k[first:last, head // group] @ q[i, head] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            p = np.exp(scores - scores.max())
            total = p.sum() + (0 if sinks is None else np.exp(sinks[head] - scores.max()))
            out[i, head] = p / total @ v[first:last, head // group]
    return out


def with_(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**inputs, **changes}


def case(
    seed,
    decode_lens,
    chunks,
    *,
    page_size,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    pad_rows=1,
    pad_tokens=3,
    value_dim=None,
    window=None,
    softcap=None,
    sinks=None,
    dtype=np.float32,
):
    """Inputs with permuted pages and NaN in all that no row reaches; and the expected output.

    ``decode_lens``: keys of each decode row; ``chunks``: (new tokens, keys) of each prefill row. Queries, keys and
    values are ones that ``dtype`` holds exactly, so that a kernel of that type answers for its own arithmetic alone.
    """

    def normal(*shape):
        return r.standard_normal(shape).astype(dtype).astype(np.float64)

    variant = {"window": window, "softcap": softcap, "sinks": sinks}
    out_dim = head_dim if value_dim is None else value_dim
    r = np.random.default_rng(seed)
    rows = [(1, n) for n in decode_lens] + [(0, 0)] * pad_rows + list(chunks) + [(0, 0)] * pad_rows
    num_decode, has_chunks = len(decode_lens) + pad_rows, bool(chunks)
    if not has_chunks:
        rows = rows[:num_decode]
    max_pages = max(-(-n // page_size) for _, n in rows) + 1
    num_pages = max_pages * len(rows) + 2
    free = list(r.permutation(num_pages))
    kv = np.full((num_pages, num_kv_heads, 2 if value_dim is None else 1, page_size, head_dim), np.nan)
    table = r.integers(0, num_pages, (len(rows), max_pages))
    q, want = [], []
    for row, (new, keys) in enumerate(rows):
        k, v = normal(2, keys, num_kv_heads, head_dim)
        for i in range(keys):
            if i % page_size == 0:
                table[row, i // page_size] = free.pop()
            kv[table[row, i // page_size], :, 0, i % page_size] = k[i]
            if value_dim is None:
                kv[table[row, i // page_size], :, 1, i % page_size] = v[i]
        queries = normal(new, num_heads, head_dim)
        out = dense(queries, k, v if value_dim is None else k[..., :value_dim], 0.3, **variant)
        if (
            row < num_decode and new == 0 and not has_chunks
        ):  # beside chunks a place that nobody decodes in has no token
            queries, out = r.standard_normal((1, num_heads, head_dim)), np.zeros((1, num_heads, out_dim))
        q.append(queries)
        want.append(out)
    if has_chunks:
        q.append(r.standard_normal((pad_tokens, num_heads, head_dim)))
        want.append(np.zeros((pad_tokens, num_heads, out_dim)))
    cu = len(decode_lens) * has_chunks + np.cumsum([0] + [new for new, _ in rows[num_decode:]])
    inputs: dict[str, Any] = {
        "q": jnp.asarray(np.concatenate(q), jnp.float32),
        "kv_pages": jnp.asarray(kv, jnp.float32),
        "page_table": jnp.asarray(table, jnp.int32),
        "kv_lens": jnp.asarray([n for _, n in rows], jnp.int32),
        "prefill_cu_q_lens": jnp.asarray(cu, jnp.int32),
        "num_decode_rows": num_decode,
        "sm_scale": 0.3,
        "window": window,
        "softcap": softcap,
        "sinks": None if sinks is None else jnp.asarray(sinks, jnp.float32),
        "value_dim": value_dim,
    }
    return inputs, np.concatenate(want)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_decode_rows(page_size, seed):
    lens = [1, max(page_size - 1, 1), page_size, page_size + 1, 3 * page_size + 2, 150]
    inputs, want = case(seed, lens, [], page_size=page_size, pad_rows=0)
    np.testing.assert_allclose(compiled(**inputs), want, atol=2e-6)


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_decode_rows_and_chunks(page_size, seed):
    chunks = [(1, 1), (page_size, page_size), (page_size + 1, 3 * page_size), (35, 40), (33, 200), (2, 17)]
    inputs, want = case(seed, [5, 140], chunks, page_size=page_size)
    np.testing.assert_allclose(compiled(**inputs), want, atol=2e-6)


@pytest.mark.parametrize("value_dim", [None, 6])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_of_few_bits_are_their_numbers_times_their_scales(dtype, value_dim):
    inputs, _ = case(5, [1, 40, 17], [(9, 30), (5, 5)], page_size=4, value_dim=value_dim)
    kv = np.asarray(inputs["kv_pages"], np.float64)
    scale = (np.abs(kv).max(-1) / 100).astype(jnp.bfloat16)  # NaN where no row reaches
    numbers = np.nan_to_num(np.rint(kv / scale.astype(np.float64)[..., None]), nan=77).astype(dtype)
    stands_for = numbers.astype(np.float64) * scale.astype(np.float64)[..., None]
    want = compiled(**with_(inputs, kv_pages=jnp.asarray(stands_for, jnp.float32)))
    stored = numbers if dtype == "int8" else numbers.view(np.uint8)
    got = compiled(**with_(inputs, kv_pages=jnp.asarray(stored), kv_scales=jnp.asarray(scale)))
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.abs(np.asarray(got)).max() > 0.1


@pytest.mark.parametrize("seed", range(8))
def test_random_ragged_batches(seed):
    r = np.random.default_rng(100 + seed)
    decode = r.integers(1, 80, r.integers(0, 4)).tolist()
    chunks = [(int(n), int(n + r.integers(0, 50))) for n in r.integers(1, 40, r.integers(1, 5))]
    heads = [(4, 4), (6, 2), (8, 1)][seed % 3]
    inputs, want = case(
        seed, decode, chunks, page_size=8, num_heads=heads[0], num_kv_heads=heads[1], pad_rows=int(seed % 2)
    )
    np.testing.assert_allclose(compiled(**inputs), want, atol=2e-6)


VARIANTS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 7},
    {"window": 130},  # more than one block of keys
    {"softcap": 0.7},
    {"sinks": np.array([-3.0, 0, 1, 2, 8, 0.5])},
    {"value_dim": 5, "num_kv_heads": 1},
    {"window": 20, "softcap": 2.0, "sinks": np.array([0.1, 0, 1, -2, 3, 0.5]), "value_dim": 8},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v))
@pytest.mark.parametrize("page_size", [4, 16])
def test_window_softcap_sinks_and_latent(variant, page_size):
    chunks = [(1, 1), (page_size + 1, 3 * page_size), (35, 40), (33, 300), (2, 17)]
    inputs, want = case(7, [1, 5, 19, 140, 290], chunks, page_size=page_size, **variant)
    np.testing.assert_allclose(compiled(**inputs), want, atol=2e-6)


def test_a_window_does_not_read_what_lies_before_it():
    inputs, want = case(3, [300], [], page_size=4, window=9, pad_rows=0)
    before = np.asarray(inputs["page_table"])[
        0, : (300 - 9) // 128 * 128 // 4
    ]  # whole blocks of keys before the window
    kv_pages = inputs["kv_pages"].at[before].set(jnp.nan)
    np.testing.assert_allclose(compiled(**with_(inputs, kv_pages=kv_pages)), want, atol=2e-6)


def test_bfloat16_accumulates_in_float32():
    inputs, want = case(0, [700], [], page_size=16, pad_rows=0)
    half = {k: inputs[k].astype(jnp.bfloat16) for k in ("q", "kv_pages")}
    out = compiled(**(inputs | half))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.02)


def test_shapes_that_do_not_fit_are_refused_with_both_numbers():
    inputs, _ = case(0, [5], [(3, 9)], page_size=4)
    with pytest.raises(ValueError, match=r"query heads 6 are not divisible by kv heads 4"):
        paged_attention(**with_(inputs, kv_pages=jnp.zeros((4, 4, 2, 4, 8))))
    with pytest.raises(ValueError, match=r"must be \[NP, K, 1, PS, H=8\]"):
        paged_attention(**with_(inputs, value_dim=4))
    with pytest.raises(ValueError, match=r"sinks \(5,\) must be \[N=6\]"):
        paged_attention(**with_(inputs, sinks=jnp.zeros(5)))
    with pytest.raises(ValueError, match=r"window=0 must be at least 1"):
        paged_attention(**with_(inputs, window=0))
    with pytest.raises(ValueError, match=r"num_decode_rows=1 and prefill rows 2"):
        paged_attention(**with_(inputs, num_decode_rows=1))
    with pytest.raises(ValueError, match="does not exist"):
        paged_attention(**inputs, implementation="fastest")  # pyright: ignore[reportArgumentType]
