"""The Mosaic GPU kernels of an int8 or fp8 cache in the interpreter: their numbers against the reference, of what the
cache stands for, and their races."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve.cache.pages import rounded
from pallas_kernels.paged_attention import gpu_decode_quantized, paged_attention
from pallas_kernels.paged_attention.gpu_decode_quantized import DTYPES, decode_attention
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_prefill import prefill_attention
from pallas_kernels.paged_attention.gpu_split import Tuning
from tests.kernels.gpu_interpreter import INTERPRET, races_found
from tests.kernels.test_paged_attention import case, with_

TOLERANCE = 0.01  # of outputs up to 4: the weights and the output are rounded to bfloat16, the inputs are exact


def quantized(inputs: dict[str, Any], dtype: str) -> tuple[dict[str, Any], np.ndarray]:
    """``inputs`` with pages of ``dtype`` (of the engine's own rounding; vectors differ in scale), and what their
    output is by the reference, of the numbers that the pages stand for. In what no row reaches are the largest
    number or NaN, and NaN scales."""
    kv = np.asarray(inputs["kv_pages"])
    reached = np.isfinite(kv).all(-1)
    sizes = 2.0 ** np.random.default_rng(9).integers(-3, 2, kv.shape[:-1])
    numbers, scale = rounded(jnp.asarray(np.where(reached[..., None], kv * sizes[..., None], 1)), DTYPES[dtype])
    numbers = jnp.where(reached[..., None], numbers, jnp.asarray(0x7F, numbers.dtype))  # as an e4m3, NaN
    scale = jnp.where(reached, scale, jnp.nan)
    inputs = with_(inputs, kv_pages=numbers, kv_scales=scale, q=inputs["q"].astype(jnp.bfloat16))
    want = paged_attention(**with_(inputs, q=inputs["q"].astype(jnp.float32)))
    return inputs, np.asarray(want)


def check(lens, dtype, tuning, *, pad_rows=0, rows: int | None = None, **shape):
    """The kernel against the reference. With ``rows`` its queries lie in as many rows a kv head, NaN behind them."""
    inputs, want = quantized(case(0, lens, [], pad_rows=pad_rows, dtype=jnp.bfloat16, **shape)[0], dtype)
    q, k, group = inputs["q"], inputs["kv_pages"].shape[1], None
    if rows is not None:
        group = q.shape[1] // k
        q = q.reshape(len(q), k, group, -1)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)), constant_values=jnp.nan)
    out = decode_attention(
        q,
        *(inputs[name] for name in ("kv_pages", "page_table", "kv_lens")),
        **{name: inputs[name] for name in ("sm_scale", "window", "softcap", "sinks", "kv_scales")},
        group=group,
        tuning=tuning,
        interpret=INTERPRET,
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=2**-8, atol=TOLERANCE)
    assert np.abs(want[: len(lens)]).max(axis=(1, 2)).min() > 0.01
    assert not races_found()


CASES: dict[str, tuple[list[int], str, Tuning, dict[str, Any]]] = {
    # One stream has several items; page boundaries and a tile's boundary; a row of padding.
    "whole": (
        [1, 16, 17, 64, 65], "int8", Tuning(num_sms=1, streams_per_sm=1, ring=1),
        {"page_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "pad_rows": 1},
    ),
    # Split in the middle of items, two streams a multiprocessor, a ring that wraps, three heads in a group.
    "split": (
        [1, 200, 64, 65], "fp8", Tuning(num_sms=2, streams_per_sm=2, ring=1, min_tiles=1),
        {"page_size": 16, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "rows": 8},
    ),
    "head_dim 128, pages of 32": (
        [70, 130], "int8", Tuning(num_sms=2, streams_per_sm=1, ring=3),
        {"page_size": 32, "num_heads": 9, "num_kv_heads": 1, "head_dim": 128},
    ),
    "pages of 64, four parts": (
        [250], "fp8", Tuning(num_sms=4, streams_per_sm=1, ring=1, min_tiles=1),
        {"page_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    ),
    # Window edges at a tile's, at a page's and inside; sinks in both kernels, one of them far above all scores.
    "window, softcap, sinks": (
        [1, 80, 81, 144, 230], "int8", Tuning(num_sms=5, streams_per_sm=1, ring=1, min_tiles=1),
        {"page_size": 16, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "window": 80, "softcap": 2.0,
         "sinks": (0.5, -3.0, 5.0)},
    ),
    "pages of 128, window": (
        [127, 200], "fp8", Tuning(num_sms=3, streams_per_sm=1, ring=2, min_tiles=1),
        {"page_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "window": 130},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decode_kernel(name):
    lens, dtype, tuning, shape = CASES[name]
    check(lens, dtype, tuning, **shape)


PREFILL: dict[str, tuple[list[tuple[int, int]], str, PrefillTuning, dict[str, Any]]] = {
    # Ragged blocks, a prefix, both rings wrap, rows of padding between and behind; rows that end inside a tile.
    "prefixes": (
        [(5, 9), (40, 40), (33, 200)], "int8", PrefillTuning(block_kv=64, ring=2),
        {"page_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
    ),
    "window, softcap, sinks, tiles of 128": (
        [(3, 3), (50, 200)], "fp8", PrefillTuning(block_kv=128, ring=1),
        {"page_size": 32, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64, "window": 100, "softcap": 2.0,
         "sinks": (0.5, -3.0, 5.0)},
    ),
    "head_dim 128, pages of 128": (
        [(70, 150)], "fp8", PrefillTuning(block_kv=64, ring=3),
        {"page_size": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_kernel(name):
    chunks, dtype, tuning, shape = PREFILL[name]
    inputs, _ = quantized(case(0, [], chunks, dtype=jnp.bfloat16, **shape)[0], dtype)
    # Its keys and values are rounded to bfloat16, once.
    kv, scales = inputs["kv_pages"], inputs["kv_scales"].astype(jnp.float32)
    kv = kv if dtype == "int8" else lax.bitcast_convert_type(kv, jnp.float8_e4m3fn)
    kv = (kv.astype(jnp.float32) * scales[..., None]).astype(jnp.bfloat16).astype(jnp.float32)
    want = paged_attention(**with_(inputs, q=inputs["q"].astype(jnp.float32), kv_pages=kv, kv_scales=None))
    skipped = inputs["num_decode_rows"]
    out = prefill_attention(
        *(inputs[name] for name in ("q", "kv_pages")),
        *(inputs[name][skipped:] for name in ("page_table", "kv_lens")),
        inputs["prefill_cu_q_lens"],
        **{name: inputs[name] for name in ("sm_scale", "window", "softcap", "sinks", "kv_scales")},
        tuning=tuning,
        interpret=INTERPRET,
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=2**-8, atol=TOLERANCE)
    assert not races_found()


def test_shapes_without_a_kernel_are_refused_with_their_figures():
    half, byte = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)
    refusal = gpu_decode_quantized.refusal
    assert refusal(128, 16, 4, half, byte) is refusal(64, 128, 32, half, jnp.dtype(jnp.uint8)) is None
    assert "head_dim=96" in str(refusal(96, 16, 4, half, byte))
    assert "page_size=24" in str(refusal(128, 24, 4, half, byte))
    assert "33 query heads" in str(refusal(128, 16, 33, half, byte))
    assert "q is float32" in str(refusal(128, 16, 4, jnp.dtype(jnp.float32), byte))
    assert "kv_pages bfloat16" in str(refusal(128, 16, 4, half, half))
    inputs, _ = quantized(case(0, [5], [], page_size=16, num_heads=2, num_kv_heads=1, head_dim=64)[0], "int8")
    arguments = {name: inputs[name] for name in ("q", "kv_pages", "kv_scales", "page_table", "kv_lens", "sm_scale")}
    with pytest.raises(ValueError, match=r"kv_scales float32"):
        decode_attention(**with_(arguments, kv_scales=inputs["kv_scales"].astype(jnp.float32)))
    with pytest.raises(ValueError, match="block_kv=128"):
        decode_attention(**arguments, tuning=Tuning(block_kv=128))
