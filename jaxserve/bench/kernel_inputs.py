"""Random inputs of the kernels, made on the default device: what they are timed and checked with."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.bench.ceilings import random_normal
from pallas_kernels.int4_matmul import Int4Matrix
from pallas_kernels.int8_matmul import Int8Matrix


def attention_inputs(
    decode_lens: Sequence[int],
    chunks: Sequence[tuple[int, int]] = (),
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    num_padding_tokens: int = 0,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Keywords of ``paged_attention`` but for what varies between layers: pages permuted, three more than are needed,
    and random ids behind each row's pages.

    Args:
        decode_lens: keys of each decode row; 0 is padding.
        chunks: (new tokens, keys) of each row that reads a prompt.
        num_padding_tokens: behind the last chunk, where there are chunks.
    """
    r = np.random.default_rng(seed)
    lens = np.asarray([*decode_lens, *(keys for _, keys in chunks)])
    pages = -(-lens // page_size)
    num_pages = int(pages.sum()) + 3
    ids = r.permutation(num_pages)
    table = r.integers(0, num_pages, (len(lens), int(pages.max()) + 1))
    for row, (count, end) in enumerate(zip(pages, np.cumsum(pages), strict=True)):
        table[row, :count] = ids[end - count : end]
    num_decode = len(decode_lens)
    cu = num_decode + np.cumsum([0, *(new for new, _ in chunks)])
    num_tokens = int(cu[-1]) + (num_padding_tokens if chunks else 0)
    return {
        "q": random_normal(seed + 1, (num_tokens, num_heads, head_dim), dtype),
        "kv_pages": random_normal(seed + 2, (num_pages, num_kv_heads, 2, page_size, head_dim), dtype),
        "page_table": jnp.asarray(table, jnp.int32),
        "kv_lens": jnp.asarray(lens, jnp.int32),
        "prefill_cu_q_lens": jnp.asarray(cu, jnp.int32),
        "num_decode_rows": num_decode,
        "sm_scale": head_dim**-0.5,
    }


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("group", "symmetric"))
def int4_matrix(num_features: int, num_inputs: int, *, group: int, symmetric: bool, seed: int = 0) -> Int4Matrix:
    """Of [F, D] in groups of ``group`` inputs. Features differ in scale by orders of magnitude, each group's scale is
    one that float16 holds."""
    key, scale_key, feature_key, zero_key = jax.random.split(jax.random.key(seed), 4)
    shape = num_features, num_inputs // group
    scale = jax.random.uniform(scale_key, shape, minval=0.5, maxval=2.0)
    scale *= 10.0 ** jax.random.randint(feature_key, (num_features, 1), -4, 2).astype(jnp.float32)
    scale = scale.astype(jnp.float16).astype(jnp.float32)
    zero = jax.random.randint(zero_key, shape, 0, 16).astype(jnp.float32)
    q = jax.random.bits(key, (num_features, num_inputs // 2), jnp.uint8)
    return Int4Matrix(q, scale, None if symmetric else -zero * scale)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("dtype",))
def int8_matrix(num_features: int, num_inputs: int, *, dtype: Any = jnp.int8, seed: int = 0) -> Int8Matrix:
    """Of [F, D] with a scale a row, every value of int8, or normal ones of FP8."""
    key, scale_key = jax.random.split(jax.random.key(seed))
    scale = jax.random.uniform(scale_key, (num_features, 1), minval=0.5, maxval=2.0)
    if dtype == jnp.int8:
        bits = jax.random.bits(key, (num_features, num_inputs), jnp.uint8)
        return Int8Matrix(jax.lax.bitcast_convert_type(bits, jnp.int8), scale)
    return Int8Matrix(jax.random.normal(key, (num_features, num_inputs), jnp.float32).astype(dtype), scale)


def rope_append_inputs(
    num_tokens: int,
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    rotary_dim: int,
    num_pages: int,
    page_size: int,
    norms: bool = False,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Keywords of ``rope_append`` but for the pages: every token has a slot of its own among the last ``2 *
    num_tokens``; of several one has none, the first has the slot before those."""
    keys = jax.random.split(jax.random.key(seed), 3)
    angle = jax.random.uniform(keys[0], (num_tokens, rotary_dim // 2), jnp.float32, 0, 7)
    slots = num_pages * page_size
    if slots <= 2 * num_tokens:
        raise ValueError(f"num_pages={num_pages} of page_size={page_size}: more than {2 * num_tokens} slots are needed")
    index = (slots - 1 - jax.random.permutation(keys[1], 2 * num_tokens)[:num_tokens]).astype(jnp.int32)
    index = index.at[0].set(slots - 1 - 2 * num_tokens)
    if num_tokens > 1:
        index = index.at[num_tokens // 2].set(slots)
    weights = [random_normal(seed + i, (head_dim,), dtype) if norms else None for i in (1, 2)]
    return {
        "qkv": random_normal(seed + 3, (num_tokens, num_kv_heads, group + 2, head_dim), dtype),
        "tables": (jnp.cos(angle), jnp.sin(angle)) if rotary_dim else None,
        "write_index": index,
        "q_norm": weights[0],
        "k_norm": weights[1],
    }
