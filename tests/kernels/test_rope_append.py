"""Rotation and append: the reference against numpy, and the Hopper kernel in the interpreter against the reference."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope_append import gpu, reference, rope_append
from tests.kernels.gpu_interpreter import INTERPRET, races_found

NUM_PAGES, PAGE_SIZE = 7, 8
SLOTS = NUM_PAGES * PAGE_SIZE


def inputs(t, k, g, h, rotary, *, norms=False, dtype=jnp.bfloat16) -> tuple[Any, ...]:
    """Random; pages of NaN but for one that is in use; slots all over, one or two of them outside of the pages."""
    r = np.random.default_rng(t * k + h)
    qkv = jnp.asarray(r.normal(size=(t, k, g + 2, h)), dtype)
    angle = r.uniform(0, 7, (t, rotary // 2))
    tables = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin)) if rotary else None
    pages = np.full((NUM_PAGES, k, 2, PAGE_SIZE, h), np.nan)
    pages[2] = r.normal(size=pages.shape[1:])
    index = r.permutation(SLOTS)[:t]
    if t > 1:
        index[t // 2], index[0] = SLOTS, SLOTS + 5
    weights = [jnp.asarray(r.normal(size=h), dtype) if norms else None for _ in range(2)]
    return qkv, tables, jnp.asarray(pages, dtype), jnp.asarray(index, jnp.int32), *weights


def as_float32(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_against_numpy(interleaved):
    t, k, g, h, rotary = 5, 2, 3, 16, 12
    qkv, tables, pages, index, q_norm, k_norm = inputs(t, k, g, h, rotary, norms=True, dtype=jnp.float32)
    q, written = rope_append(
        qkv, tables, pages, index, q_norm, k_norm, norm_eps=0.1, norm_offset=1.0, q_rows=4, interleaved=interleaved
    )

    def turn(x, token, weight):
        x = x / np.sqrt(np.mean(x**2) + 0.1) * (1 + np.asarray(weight))
        first = 2 * np.arange(rotary // 2) if interleaved else np.arange(rotary // 2)
        second = first + (1 if interleaved else rotary // 2)
        z = (x[first] + 1j * x[second]) * (np.asarray(tables[0])[token] + 1j * np.asarray(tables[1])[token])
        return np.concatenate([z.real, z.imag, x[rotary:]])

    want, x = np.array(pages), np.asarray(qkv)
    for token, head in np.ndindex(t, k):
        for i in range(g):
            np.testing.assert_allclose(q[token, head, i], turn(x[token, head, i], token, q_norm), rtol=1e-4, atol=1e-5)
        if index[token] < SLOTS:
            where = want[index[token] // PAGE_SIZE, head, :, index[token] % PAGE_SIZE]
            where[0], where[1] = turn(x[token, head, g], token, k_norm), x[token, head, g + 1]
    np.testing.assert_allclose(written, want, rtol=1e-4, atol=1e-5)  # NaN where nothing was written
    assert np.isnan(want).any()


CASES = {  # tokens, kv heads, queries of each, head_dim, dimensions that turn, norms
    "heads of 128": (5, 8, 4, 128, 128, False),
    "heads of 128, norms": (3, 8, 2, 128, 128, True),
    "heads of 64, one token": (1, 3, 3, 64, 64, False),
    "one kv head, so rows of queries": (3, 1, 8, 128, 128, False),
    "one kv head, norms": (3, 1, 4, 64, 64, True),
    "heads of 256, norms": (3, 2, 2, 256, 256, True),
    "heads of 96": (3, 4, 1, 96, 96, False),
    "a part turns": (3, 2, 4, 64, 32, False),
    "nothing turns, norms": (3, 2, 2, 64, 0, True),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_against_reference(name):
    t, k, g, h, rotary, norms = CASES[name]
    given = inputs(t, k, g, h, rotary, norms=norms)
    rows = None if norms else 8
    options = {"norm_eps": 1e-5, "norm_offset": 1.0, "q_rows": rows}
    want_q, want_pages = reference.rope_append(*given, **options)
    q, pages = gpu.rope_append(*given, **options, interpret=INTERPRET)
    assert q.dtype == pages.dtype == jnp.bfloat16 and q.shape == want_q.shape
    if rows:
        q, want_q = q[:, :, :g], want_q[:, :, :g]
    # One rounding to bfloat16 may fall to the other side, in the norm and in what is turned.
    bound: dict[str, Any] = {"rtol": 2**-7, "atol": 2**-7} if norms else {"rtol": 2**-8, "atol": 2**-10}
    np.testing.assert_allclose(as_float32(q), as_float32(want_q), **bound)
    np.testing.assert_allclose(as_float32(pages), as_float32(want_pages), **bound)  # NaN where nothing was written
    assert not races_found()


def test_slots_below_zero_are_outside_too():
    qkv, tables, pages, index, *_ = inputs(2, 1, 1, 64, 64)
    for run in (reference.rope_append, lambda *a: gpu.rope_append(*a, interpret=INTERPRET)):
        _, written = run(qkv, tables, pages, jnp.full_like(index, -1))
        np.testing.assert_array_equal(as_float32(written), as_float32(pages))


def test_what_is_refused():
    qkv, tables, pages, index, *_ = inputs(2, 1, 1, 64, 64)
    with pytest.raises(ValueError, match=r"kv_pages .* K=1, 2, PS, H=64"):
        rope_append(qkv, tables, pages[..., :32], index)
    with pytest.raises(ValueError, match=r"write_index \(1,\) must be \[T=2\]"):
        rope_append(qkv, tables, pages, index[:1])
    with pytest.raises(ValueError, match="only q_norm is given"):
        rope_append(qkv, tables, pages, index, jnp.ones(64))
    with pytest.raises(ValueError, match="q_rows=0 must be at least the 1"):
        rope_append(qkv, tables, pages, index, q_rows=0)
    with pytest.raises(ValueError, match="interleaved=True"):
        rope_append(qkv, tables, pages, index, interleaved=True, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="float32"):
        rope_append(qkv.astype(jnp.float32), tables, pages, index, implementation="mosaic_gpu")
    assert "elements a thread" in (gpu.refusal(64, 8, 256, 256, jnp.bfloat16, jnp.bfloat16, False) or "")
