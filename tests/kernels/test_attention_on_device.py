"""Paged attention on a GPU against the reference there, in shapes of real models; small ones wherever tests run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench.ceilings import random_normal
from jaxserve.bench.kernel_inputs import attention_inputs
from jaxserve.cache.pages import NUMBERS, rounded
from pallas_kernels.paged_attention import paged_attention, query_rows

compiled = jax.jit(
    paged_attention, static_argnames=("num_decode_rows", "sm_scale", "group", "window", "softcap", "implementation")
)
# Relative, in the Euclidean norm: of all, as has been measured (0.9e-3 to 2.2e-3), and of each token.
ERROR, TOKEN_ERROR = 5e-3, 2e-2


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


LLAMA_8B = Shape(32, 8, 128)
LLAMA_8B_TENSOR8 = Shape(4, 1, 128)
SMOLLM2_135M = Shape(9, 3, 64)
QWEN_05B = Shape(14, 2, 64)
GEMMA3_270M = Shape(4, 1, 256, window=512)
GEMMA2_9B = Shape(16, 8, 256, page_size=128, window=4096, softcap=50.0)
PHI3_MINI = Shape(32, 32, 96, window=2047)
GPT_OSS = Shape(64, 8, 64, window=128, sinks=True)
SMALL = Shape(6, 2, 16, page_size=4)

RAGGED = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 0, 127, 128, 129, 700, 4096, 5000, 0)
CHUNKS = ((100, 130), (1, 700), (411, 2900), (75, 75), (0, 0), (33, 4097))


def uneven(rows: int, mean: int) -> tuple[int, ...]:
    """Log-normal lengths and one very long row."""
    r = np.random.default_rng(0)
    return 32768, *np.clip(r.lognormal(np.log(mean), 1.2, rows - 1).astype(int), 1, 16384).tolist()


def stored(x: dict[str, Any], cache: str | None) -> dict[str, jax.Array]:
    """The pages of ``attention_inputs``, NaN in every place that no row reaches; as numbers of ``cache`` and scales if
    it is not None, the vectors of different sizes."""
    num_pages, _, _, page_size, _ = x["kv_pages"].shape
    reached = np.zeros((num_pages, page_size), bool)
    for ids, length in zip(np.asarray(x["page_table"]), np.asarray(x["kv_lens"]), strict=True):
        tokens = np.arange(length)
        reached[ids[tokens // page_size], tokens % page_size] = True
    is_reached = jnp.asarray(reached)[:, None, None, :]
    if cache is None:
        return {"kv_pages": jnp.where(is_reached[..., None], x["kv_pages"], jnp.nan)}
    sizes = jnp.exp2(random_normal(97, x["kv_pages"].shape[:-1], scale=0.5))
    numbers, scale = rounded(x["kv_pages"].astype(jnp.float32) * sizes[..., None], jnp.dtype(NUMBERS[cache]))
    garbage = jnp.asarray(0x7F, numbers.dtype)  # as an e4m3, NaN
    return {
        "kv_pages": jnp.where(is_reached[..., None], numbers, garbage),
        "kv_scales": jnp.where(is_reached, scale, jnp.nan),
    }


def in_rows(q: jax.Array, num_kv_heads: int, num_rows: int) -> jax.Array:
    """``q`` [T, N, H] as [T, K, QR, H], NaN in the rows that are nobody's."""
    t, n, h = q.shape
    q = q.reshape(t, num_kv_heads, n // num_kv_heads, h)
    return jnp.pad(q, ((0, 0), (0, 0), (0, num_rows - q.shape[2]), (0, 0)), constant_values=jnp.nan)


def check(
    shape: Shape,
    decode_lens=(),
    chunks=(),
    *,
    implementation="mosaic_gpu",
    rows: int | None = None,
    cache: str | None = None,
) -> None:
    """The implementation in bfloat16 against the reference in float32 on the same numbers. With ``rows`` it gets its
    queries in as many rows a kv head."""
    n, k, h, page_size, window, softcap, sinks = shape
    x = attention_inputs(
        decode_lens,
        chunks,
        num_heads=n,
        num_kv_heads=k,
        head_dim=h,
        page_size=page_size,
        num_padding_tokens=5,
        seed=len(decode_lens),
    )
    x |= {**stored(x, cache), "window": window, "softcap": softcap}
    x |= {"sinks": random_normal(98, (n,)) * 3 if sinks else None}
    wanted = compiled(**(x | {"q": x["q"].astype(jnp.float32)}), implementation="reference")
    if rows is not None:
        x |= {"q": in_rows(x["q"], k, rows), "group": n // k}
    out = compiled(**x, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and out.shape == wanted.shape
    got, want = (np.asarray(a.astype(jnp.float32), np.float64).reshape(len(a), -1) for a in (out, wanted))
    used = want.any(axis=1)
    assert not got[~used].any()
    error, size = np.linalg.norm(got - want, axis=1)[used], np.linalg.norm(want, axis=1)[used]
    assert np.max(error / size) < TOKEN_ERROR
    assert np.linalg.norm(error) / np.linalg.norm(size) < ERROR


DECODE: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "llama 8b": (LLAMA_8B, RAGGED),
    "llama 8b, pages of 128": (LLAMA_8B._replace(page_size=128), RAGGED),
    "llama 8b, one row": (LLAMA_8B, (5000,)),
    "llama 8b, uneven": (LLAMA_8B, uneven(64, 500)),
    "llama 8b, 256 rows": (LLAMA_8B, tuple(np.random.default_rng(1).integers(1, 1500, 256).tolist())),
    "llama 8b, one of eight devices": (LLAMA_8B_TENSOR8, RAGGED),
    "llama 8b, window": (LLAMA_8B._replace(window=128), RAGGED),
    "smollm2 135m": (SMOLLM2_135M, RAGGED),
    "qwen 0.5b, pages of 64": (QWEN_05B._replace(page_size=64), RAGGED),
    "gpt-oss": (GPT_OSS, RAGGED),
    "16 kv heads, pages of 32, softcap": (Shape(32, 16, 128, page_size=32, softcap=2.0), RAGGED),
    "gemma 3 270m": (GEMMA3_270M, RAGGED),
    "gemma 2 9b": (GEMMA2_9B, RAGGED),
    "phi 3 mini": (PHI3_MINI, RAGGED),
    "llama 70b, one of two devices": (Shape(32, 4, 128), RAGGED),
    # Gemma 3 270M is wrong on a device, groups of 2 are right: what of it is?
    "head_dim 256, no window": (GEMMA3_270M._replace(window=None), RAGGED),
    "head_dim 256, pages of 64": (GEMMA3_270M._replace(page_size=64), RAGGED),
    "head_dim 256, 2 kv heads": (GEMMA3_270M._replace(num_heads=8, num_kv_heads=2), RAGGED),
    "head_dim 256, groups of 2": (GEMMA3_270M._replace(num_heads=2), RAGGED),
    "head_dim 256, groups of 8": (GEMMA3_270M._replace(num_heads=8), RAGGED),
    "head_dim 256, one row": (GEMMA3_270M, (700,)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODE)
def test_decode(name):
    check(*DECODE[name])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [LLAMA_8B, SMOLLM2_135M], ids=["llama 8b", "smollm2 135m"])
def test_decode_of_queries_in_rows(shape):
    check(shape, RAGGED, rows=query_rows(shape.num_heads // shape.num_kv_heads, "mosaic_gpu"))


QUANTIZED: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "llama 8b": (LLAMA_8B, RAGGED),
    "llama 8b, pages of 32": (LLAMA_8B._replace(page_size=32), RAGGED),
    "llama 8b, pages of 64": (LLAMA_8B._replace(page_size=64), RAGGED),
    "llama 8b, pages of 128": (LLAMA_8B._replace(page_size=128), RAGGED),
    "llama 8b, one row": (LLAMA_8B, (5000,)),
    "llama 8b, uneven": (LLAMA_8B, uneven(64, 500)),
    "llama 8b, 256 rows": (LLAMA_8B, tuple(np.random.default_rng(1).integers(1, 1500, 256).tolist())),
    "llama 8b, one of eight devices": (LLAMA_8B_TENSOR8, RAGGED),
    "llama 8b, window": (LLAMA_8B._replace(window=128), RAGGED),
    "20 heads of 1": (Shape(20, 1, 128), RAGGED),
    "smollm2 135m": (SMOLLM2_135M, RAGGED),
    "qwen 0.5b, pages of 64": (QWEN_05B._replace(page_size=64), RAGGED),
    "gpt-oss": (GPT_OSS, RAGGED),
    "16 kv heads, pages of 32, softcap": (Shape(32, 16, 128, page_size=32, softcap=2.0), RAGGED),
}


@pytest.mark.gpu
@pytest.mark.parametrize("cache", NUMBERS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_decode(name, cache):
    check(*QUANTIZED[name], cache=cache)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", NUMBERS)
def test_quantized_decode_of_queries_in_rows(cache):
    check(SMOLLM2_135M, RAGGED, rows=query_rows(3, "mosaic_gpu"), cache=cache)


PREFILL: dict[str, tuple[Shape, tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    "llama 8b": (LLAMA_8B, (), CHUNKS),
    "llama 8b, whole prompts": (LLAMA_8B, (), ((2048, 2048), (512, 4096))),
    "llama 8b, pages of 128": (LLAMA_8B._replace(page_size=128), (), CHUNKS),
    "llama 8b, beside decode rows": (LLAMA_8B, (700, 1, 129), CHUNKS),
    "smollm2 135m, beside decode rows": (SMOLLM2_135M, (64, 5000), CHUNKS),
    "qwen 0.5b, pages of 64": (QWEN_05B._replace(page_size=64), (), CHUNKS),
    "gpt-oss": (GPT_OSS, (), CHUNKS),
    "16 kv heads, pages of 32, softcap": (Shape(32, 16, 128, page_size=32, softcap=2.0), (), CHUNKS),
    "gemma 3 270m": (GEMMA3_270M, (), CHUNKS),
    "gemma 2 9b": (GEMMA2_9B, (), CHUNKS),
    "phi 3 mini": (PHI3_MINI, (), CHUNKS),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name):
    check(*PREFILL[name])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", NUMBERS)
@pytest.mark.parametrize("name", [name for name in PREFILL if PREFILL[name][0].head_dim in (64, 128)])
def test_quantized_prefill(name, cache):
    check(*PREFILL[name], cache=cache)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [None, *NUMBERS])
def test_decode_gives_the_same_bits_again(cache):
    """An error that moves would be a race."""
    x = attention_inputs(uneven(100, 900), num_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    x |= stored(x, cache)
    outs = [compiled(**x, implementation="mosaic_gpu") for _ in range(20)]
    assert all(jnp.array_equal(out, outs[0]) for out in outs[1:])


def test_small_shapes_by_the_reference():
    """So that what is run on a device has been run."""
    check(SMALL, (1, 0, 9, 40), implementation="reference", rows=5)
    variant = SMALL._replace(window=7, softcap=2.0, sinks=True)
    check(variant, (3, 17), ((1, 1), (9, 30), (0, 0)), implementation="reference")
    for cache in NUMBERS:
        check(SMALL, (1, 0, 9, 40), ((9, 30),), implementation="reference", cache=cache)


@pytest.mark.parametrize("wrong", [float("nan"), 1.05, 0.0])
def test_one_wrong_token_is_noticed(monkeypatch, wrong):
    right = compiled

    def spoiled(**x):
        out = right(**x)
        return out.at[-1].multiply(wrong) if out.dtype == jnp.bfloat16 else out

    monkeypatch.setitem(globals(), "compiled", spoiled)
    with pytest.raises(AssertionError):
        check(SMALL, (9, 40, 70), implementation="reference")
