"""The Mosaic GPU kernels in the interpreter: their numbers against dense attention, their races, the decode plan."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import gpu, paged_attention
from pallas_kernels.paged_attention.gpu_decode import decode_attention
from pallas_kernels.paged_attention.gpu_prefill import Tuning as PrefillTuning
from pallas_kernels.paged_attention.gpu_prefill import prefill_attention
from pallas_kernels.paged_attention.gpu_split import Tuning, make_plan
from tests.kernels.gpu_interpreter import INTERPRET, races_found
from tests.kernels.test_paged_attention import case, with_

TOLERANCE = 0.01  # of outputs up to 4: the weights and the output are rounded to bfloat16, the inputs are exact


def variant(inputs):
    return {name: inputs[name] for name in ("sm_scale", "window", "softcap", "sinks")}


def decode(lens, tuning, **shape):
    """(the kernel's output, the dense one in float64) in float32; pages permuted, NaN in all that no row reaches."""
    inputs, want = case(0, lens, [], pad_rows=0, dtype=jnp.bfloat16, **shape)
    out = decode_attention(
        inputs["q"].astype(jnp.bfloat16),
        inputs["kv_pages"].astype(jnp.bfloat16),
        inputs["page_table"],
        inputs["kv_lens"],
        **variant(inputs),
        tuning=tuning,
        interpret=INTERPRET,
    )
    assert out.dtype == jnp.bfloat16
    return np.asarray(out.astype(jnp.float32)), want


@pytest.mark.parametrize(
    ("lens", "tuning", "shape"),
    [
        # One stream has several items; page boundaries and a tile's boundary.
        ([1, 15, 16, 17, 63, 64, 65], Tuning(num_sms=1, streams_per_sm=1, ring=1), (16, 2, 1, 64)),
        # Split in the middle of items, two streams a multiprocessor, a ring that wraps, three heads in a group.
        ([1, 300, 64, 65], Tuning(num_sms=3, streams_per_sm=2, ring=2, min_tiles=1), (16, 6, 2, 64)),
        # So many parts that the combining loop turns twice; a page as large as a tile; more streams than work.
        ([640], Tuning(num_sms=12, streams_per_sm=1, ring=1, min_tiles=1), (64, 2, 1, 64)),
        # Head dimension 128, one query head a kv head.
        ([70, 200], Tuning(num_sms=2, streams_per_sm=1, ring=3), (32, 1, 1, 128)),
    ],
    ids=["whole", "split", "many parts", "head_dim 128"],
)
def test_decode_kernel(lens, tuning, shape):
    page_size, num_heads, num_kv_heads, head_dim = shape
    out, want = decode(
        lens, tuning, page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    np.testing.assert_allclose(out, want, atol=TOLERANCE)
    assert not races_found()


def test_decode_kernel_of_queries_in_rows_whatever_is_behind_them():
    """Items that are whole and split, three queries of 64 in eight rows: a part has one row that is nobody's."""
    inputs, want = case(0, [1, 300, 64], [], page_size=16, num_heads=6, num_kv_heads=2, head_dim=64, pad_rows=0,
                        dtype=jnp.bfloat16)  # fmt: skip
    q = inputs["q"].astype(jnp.bfloat16).reshape(3, 2, 3, 64)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 5), (0, 0)), constant_values=jnp.nan)
    arguments = [inputs["kv_pages"].astype(jnp.bfloat16), inputs["page_table"], inputs["kv_lens"]]
    tuning = Tuning(num_sms=3, streams_per_sm=2, ring=2, min_tiles=1)
    out = decode_attention(q, *arguments, group=3, **variant(inputs), tuning=tuning, interpret=INTERPRET)
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), want, atol=TOLERANCE)
    out = paged_attention(**(inputs | {"q": q, "kv_pages": arguments[0]}), group=3)  # the reference
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), want, atol=TOLERANCE)
    with pytest.raises(ValueError, match="must have 8 rows for 3 queries"):
        decode_attention(q[:, :, :4], *arguments, group=3, **variant(inputs))
    wrong: dict[str, Any] = inputs | {"q": q, "group": 9}
    with pytest.raises(ValueError, match=r"group=9: q .3, 2, 8, 64. must be"):
        paged_attention(**wrong)


DECODE_VARIANTS: dict[str, tuple[Any, Tuning, dict[str, Any], dict[str, Any]]] = {
    # Window edges at a tile's, at a page's and inside; rows shorter than the window; items whole and split; sinks in
    # both kernels, one of them far above all scores.
    "window, softcap, sinks": (
        [1, 16, 79, 80, 81, 143, 144, 145, 300],
        Tuning(num_sms=7, streams_per_sm=1, ring=1, min_tiles=1),
        {"page_size": 16, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
        {"window": 80, "softcap": 2.0, "sinks": (0.5, -3.0, 90.0)},
    ),
    "head_dim 256, page 128, window": (
        [127, 200],
        Tuning(num_sms=3, streams_per_sm=1, ring=4, min_tiles=1),
        {"page_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 256},
        {"window": 130},
    ),
    "head_dim 96": (
        [33, 150],
        Tuning(num_sms=3, streams_per_sm=1, ring=2, min_tiles=1),
        {"page_size": 32, "num_heads": 3, "num_kv_heads": 1, "head_dim": 96},
        {},
    ),
}


@pytest.mark.parametrize("name", DECODE_VARIANTS)
def test_decode_variants(name):
    lens, tuning, shape, changes = DECODE_VARIANTS[name]
    out, want = decode(lens, tuning, **shape, **changes)
    np.testing.assert_allclose(out, want, atol=TOLERANCE)
    assert not races_found()


def test_padding_rows_give_zeros():
    inputs, want = case(1, [40], [], page_size=16, num_heads=2, num_kv_heads=1, head_dim=64, pad_rows=2)
    out = decode_attention(
        inputs["q"][:3].astype(jnp.bfloat16),
        inputs["kv_pages"].astype(jnp.bfloat16),
        inputs["page_table"][:3],
        inputs["kv_lens"][:3],
        sm_scale=inputs["sm_scale"],
        tuning=Tuning(num_sms=1, ring=1),
        interpret=INTERPRET,
    )
    assert not np.asarray(out[1:], np.float32).any()
    np.testing.assert_allclose(np.asarray(out, np.float32), want[:3], atol=0.02)
    assert not races_found()


@pytest.mark.parametrize(
    ("chunks", "tuning", "shape"),
    [
        # Ragged blocks, a prefix, a ring that wraps, rows of padding between and behind.
        ([(5, 9), (40, 40), (33, 150)], PrefillTuning(block_kv=128, ring=1), (16, 2, 1, 64)),
        # Three heads in a group: 63 rows of 64; one token; a page as large as a tile.
        ([(1, 1), (70, 200)], PrefillTuning(block_kv=64, ring=1), (64, 6, 2, 64)),
        # Blocks that end inside a tile of their row, before anything else was loaded into its place.
        ([(75, 75)], PrefillTuning(block_kv=64, ring=4), (16, 4, 1, 64)),
    ],
    ids=["prefixes", "group of 3", "several blocks"],
)
def test_prefill_kernel(chunks, tuning, shape):
    page_size, num_heads, num_kv_heads, head_dim = shape
    out, want = prefill(
        chunks, tuning, page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    np.testing.assert_allclose(out, want, atol=TOLERANCE)
    assert not races_found()


PREFILL_VARIANTS: dict[str, tuple[Any, PrefillTuning, dict[str, Any], dict[str, Any]]] = {
    # The window ends inside a block, inside a tile, and before the row's first key; tiles that all see between masks.
    "window, softcap, sinks": (
        [(3, 3), (70, 280), (40, 41)],
        PrefillTuning(block_kv=64, ring=1),
        {"page_size": 16, "num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
        {"window": 150, "softcap": 2.0, "sinks": (0.5, -3.0, 90.0)},
    ),
    "head_dim 256, page 128, window": (
        [(40, 200)],
        PrefillTuning(block_kv=64, ring=4),
        {"page_size": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256},
        {"window": 20},
    ),
    "head_dim 96": (
        [(70, 130)],
        PrefillTuning(block_kv=128, ring=2),
        {"page_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 96},
        {},
    ),
}


@pytest.mark.parametrize("name", PREFILL_VARIANTS)
def test_prefill_variants(name):
    chunks, tuning, shape, changes = PREFILL_VARIANTS[name]
    out, want = prefill(chunks, tuning, **shape, **changes)
    np.testing.assert_allclose(out, want, atol=TOLERANCE)
    assert not races_found()


def prefill(chunks, tuning, **shape):
    """As ``decode``, of the prefill kernel."""
    inputs, want = case(0, [], chunks, dtype=jnp.bfloat16, **shape)
    skipped = inputs["num_decode_rows"]
    out = prefill_attention(
        inputs["q"].astype(jnp.bfloat16),
        inputs["kv_pages"].astype(jnp.bfloat16),
        inputs["page_table"][skipped:],
        inputs["kv_lens"][skipped:],
        inputs["prefill_cu_q_lens"],
        **variant(inputs),
        tuning=tuning,
        interpret=INTERPRET,
    )
    return np.asarray(out, np.float32), want


@pytest.mark.parametrize("seed", range(10))
def test_plan_gives_every_tile_to_one_stream_and_every_part_to_one_combination(seed):
    r = np.random.default_rng(seed)
    rows, heads = int(r.integers(1, 30)), int(r.integers(1, 9))
    lens = r.integers(0, int(r.integers(1, 3000)), rows)
    page_size = int(r.choice([16, 32, 64, 128]))
    table = r.integers(0, 1000, (rows, 50))
    tuning = Tuning(
        num_sms=int(r.integers(1, 140)), streams_per_sm=int(r.integers(1, 3)), min_tiles=int(r.integers(1, 5))
    )
    make = jax.jit(make_plan, static_argnums=(2, 3, 4, 5))
    window = None if seed % 2 else int(r.integers(1, 1000))
    plan = np.asarray(
        make(jnp.asarray(lens, jnp.int32), jnp.asarray(table, jnp.int32), page_size, heads, tuning, window)
    )
    skipped = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0) // 64  # tiles of each row
    tiles = np.repeat(np.maximum(-(-lens // 64) - skipped, 1), heads)  # of each item
    seen = [np.zeros(n, int) for n in tiles]
    parts: dict[int, list[int]] = {}
    stretch = max(-(-int(tiles.sum()) // tuning.num_streams), tuning.min_tiles)
    for stream, (item, tile, left, items, keys, _, *pages) in enumerate(plan):
        assert left <= stretch
        if left:
            assert keys == lens[item // heads]
            per_tile = max(1, 64 // page_size)
            first = (skipped[item // heads] + tile) * 64 // page_size
            places = np.minimum(first + np.arange(per_tile), table.shape[1] - 1)
            assert list(pages) == table[item // heads, places].tolist()
        for j in range(items):
            count = min(tiles[item + j] - tile, left)
            seen[item + j][tile : tile + count] += 1
            if count < tiles[item + j]:
                parts.setdefault(item + j, []).append(stream if tile else tuning.num_streams + stream)
            tile, left = 0, left - count
        assert left == 0
    assert all((n == 1).all() for n in seen)
    # As the combining kernel finds them: the beginning, one stream back, and then the first parts of streams in a row.
    combined = {
        int(plan[s, 0]): [tuning.num_streams + s - 1, *range(s, s + plan[s, 5] - 1)]
        for s in range(tuning.num_streams)
        if plan[s, 5] > 0
    }
    assert combined == parts


def test_shapes_without_a_kernel_are_refused_with_their_figures():
    half, single = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    shape: dict[str, Any] = {"head_dim": 128, "page_size": 16, "k_heads": 8, "group": 4, "dtype": half}
    assert gpu.needs(**shape) == gpu.needs(**shape, windows=(None, None)) == {"head_dim 128", "page_size 16"}
    gemma = gpu.needs(**with_(shape, head_dim=256), windows=(None, 512), softcap=50.0, sinks=True)
    assert gemma == {"head_dim 256", "page_size 16", "window", "softcap", "sinks"}
    assert gpu.needs(**with_(shape, k_heads=1)) == {"head_dim 128", "page_size 16", "one kv head"}
    for name, numbers in (("int8", jnp.int8), ("fp8", jnp.uint8)):
        quantized = gpu.needs(**shape, kv_dtype=jnp.dtype(numbers))
        assert quantized == {"head_dim 128", "page_size 16", f"kv {name}"}
        assert gpu.needs(**with_(shape, head_dim=96), kv_dtype=jnp.dtype(numbers)) is None
    assert gpu.needs(**with_(shape, dtype=single)) is None
    assert gpu.needs(**with_(shape, page_size=24)) is None
    assert gpu.needs(**shape, value_dim=64) is None
    inputs, _ = case(0, [5], [], page_size=16, pad_rows=0)
    with pytest.raises(ValueError, match="head_dim=8 is not one of"):
        paged_attention(**inputs, implementation="mosaic_gpu")


def test_hopper_gets_the_kernel_once_it_has_been_checked_there(monkeypatch):
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    ampere = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(dispatch, "MOSAIC_GPU_CHECKED", frozenset({"head_dim 64", "window"}))
    assert dispatch.best(hopper, hopper=frozenset({"head_dim 64", "window"})) == "mosaic_gpu"
    assert dispatch.best(hopper, hopper=frozenset({"head_dim 64", "sinks"})) == "reference"
    assert dispatch.best(hopper, hopper=None) == "reference"
    assert dispatch.best(ampere, hopper=frozenset({"head_dim 64"})) == "reference"
    assert dispatch.best(jax.devices("cpu")[0], hopper=frozenset({"head_dim 64"})) == "reference"
