"""Paged attention on Mosaic GPU (Hopper): decode rows by one kernel, of a quantized cache by another, and prompt chunks
by a third."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import gpu_decode, gpu_decode_quantized, gpu_prefill, reference


def needs(
    *,
    head_dim: int,
    page_size: int,
    k_heads: int,
    group: int,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype | None = None,
    windows: Collection[int | None] = (),
    softcap: float | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
) -> frozenset[str] | None:
    """What attention of these shapes needs of the kernels, in the words of ``dispatch.MOSAIC_GPU_CHECKED``; None where
    they do not take it.

    ``k_heads`` of a device, ``group`` query heads a kv head, ``dtype`` of queries and, if ``kv_dtype`` is None, of the
    cache, ``windows`` of all layers, the rest as of ``paged_attention``.
    """
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    cache = next((name for name, numbers in gpu_decode_quantized.DTYPES.items() if numbers == kv_dtype), None)
    kernel = gpu_decode if cache is None else gpu_decode_quantized
    if value_dim is not None or kernel.refusal(head_dim, page_size, group, dtype, kv_dtype) is not None:
        return None
    used = {"window": any(w is not None for w in windows), "softcap": softcap is not None, "sinks": sinks}
    used |= {"one kv head": k_heads == 1, f"kv {cache}": cache is not None}
    return frozenset(
        {f"head_dim {head_dim}", f"page_size {page_size}"} | {name for name, is_used in used.items() if is_used}
    )


def query_rows(group: int) -> int:
    """As ``pallas_kernels.paged_attention.query_rows``."""
    return gpu_decode.query_rows(group)


def paged_attention(
    q: jax.Array,  # [T, N, H]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    page_table: jax.Array,  # [B, MP]
    kv_lens: jax.Array,  # [B]
    prefill_cu_q_lens: jax.Array,  # [BP + 1]
    *,
    num_decode_rows: int,
    sm_scale: float,
    group: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    value_dim: int | None = None,
    kv_scales: jax.Array | None = None,
) -> jax.Array:  # [T, N, H]
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    if value_dim is not None:
        raise ValueError(f"value_dim={value_dim}: not in the Hopper kernel")
    variant: dict[str, Any] = {"sm_scale": sm_scale, "window": window, "softcap": softcap, "sinks": sinks}
    bd = num_decode_rows
    decoded = chunks = None
    if page_table.shape[0] > bd and group is not None:
        q, group = reference.queries(q, group), None
    if bd:
        decode: Any = gpu_decode.decode_attention
        if kv_scales is not None:
            decode = functools.partial(gpu_decode_quantized.decode_attention, kv_scales=kv_scales)
        decoded = decode(q[:bd], kv_pages, page_table[:bd], kv_lens[:bd], group=group, **variant)  # [BD, N, H]
    if page_table.shape[0] > bd:
        chunks = gpu_prefill.prefill_attention(
            q, kv_pages, page_table[bd:], kv_lens[bd:], prefill_cu_q_lens, kv_scales=kv_scales, **variant
        )  # [T, N, H]
    return reference.merged(decoded, chunks, prefill_cu_q_lens)
