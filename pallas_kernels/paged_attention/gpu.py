"""Paged attention on Mosaic GPU (Hopper): decode rows by one kernel, prompt chunks by another."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import gpu_decode, gpu_prefill


def supports(*, head_dim: int, page_size: int, group: int, dtype: jnp.dtype, plain: bool = True) -> bool:
    """Whether the kernel takes these shapes: ``group`` query heads a kv head, ``dtype`` of queries and cache.

    ``plain``: neither window nor soft cap nor sinks nor ``value_dim`` are used, which it does not have.
    """
    return plain and gpu_decode.refusal(head_dim, page_size, group, dtype, dtype) is None


def paged_attention(
    q: jax.Array,  # [T, N, H]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    page_table: jax.Array,  # [B, MP]
    kv_lens: jax.Array,  # [B]
    prefill_cu_q_lens: jax.Array,  # [BP + 1]
    *,
    num_decode_rows: int,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    value_dim: int | None = None,
) -> jax.Array:  # [T, N, H]
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    given = {"window": window, "softcap": softcap, "sinks": sinks, "value_dim": value_dim}
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(names)}: not in the Hopper kernel")
    bd, parts = num_decode_rows, []
    if bd:
        parts.append(gpu_decode.decode_attention(q[:bd], kv_pages, page_table[:bd], kv_lens[:bd], sm_scale=sm_scale))
    if q.shape[0] > bd:
        parts.append(
            gpu_prefill.prefill_attention(
                q[bd:], kv_pages, page_table[bd:], kv_lens[bd:], prefill_cu_q_lens, sm_scale=sm_scale
            )
        )
    return jnp.concatenate(parts)
