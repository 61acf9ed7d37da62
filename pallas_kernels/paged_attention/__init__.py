"""Ragged paged attention: decode rows and prompt chunks of one step against a paged KV cache."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import gpu, reference

_IMPLEMENTATIONS = {"reference": reference.paged_attention, "mosaic_gpu": gpu.paged_attention}


def query_rows(group: int, implementation: dispatch.Implementation | None) -> int | None:
    """QR, the rows that a kv head of ``group`` queries has best where a batch has only decode rows; None: ``[T, N, H]``
    is as good."""
    return gpu.query_rows(group) if implementation == "mosaic_gpu" else None


def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    prefill_cu_q_lens: jax.Array,
    *,
    num_decode_rows: int,
    sm_scale: float,
    group: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    value_dim: int | None = None,
    kv_scales: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Causal grouped-query attention of a flat batch of tokens over the pages of their sequences.

    The K and V of the step's own tokens are already in the pages. Rows ``0..BD-1`` (``BD = num_decode_rows``) have
    one query each, token ``i`` that of row ``i``. The queries of the other ``BP`` rows lie one chunk after another:
    row ``BD + j`` has tokens ``cu[j] .. cu[j + 1] - 1``. If the first begins before token BD, the decode rows from
    ``cu[0]`` on are padding. A row's queries are the LAST tokens of its sequence: query ``i`` of ``n`` sees keys
    ``0 .. kv_len - n + i``.

    Args:
        q: ``[T, N, H]``; with ``group`` ``[T, K, QR, H]``.
        kv_pages: ``[NP, K, 2, PS, H]``; K and V of one page and head adjacent. With ``value_dim`` it is
            ``[NP, K, 1, PS, H]``. Contents of pages, or parts of pages, that no row reaches may be anything, NaN
            included.
        page_table: ``[B, MP]`` int32, ``B = BD + BP``; entries beyond a row's length may be any valid page id.
        kv_lens: ``[B]`` int32, keys of each row, this step's included; 0 marks a padding row.
        prefill_cu_q_lens: ``[BP + 1]`` int32, ascending.
        num_decode_rows: BD.
        sm_scale: factor on the scores before the softmax.
        group: queries of a kv head, the first of the QR rows it then has in ``q``: the others may hold anything, NaN
            included (``query_rows``). None: ``q`` has only queries.
        window: keys that a query sees, its own included, counted back from it (sliding window); None: all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); None: they stay.
        sinks: ``[N]``; a logit of each head that takes part in the softmax and has no value (GPT-OSS); None: no sinks.
        value_dim: values are the first ``value_dim`` elements of their keys, and pages hold nothing else (the latent of
            multi-head latent attention, DeepSeek-V2); None: pages hold both.
        kv_scales: ``[NP, K, 2, PS]`` (``[NP, K, 1, PS]``); what each vector of ``kv_pages``, then of int8, or u8 (the
            byte of an e4m3), is multiplied with; None: nothing. The same holds for what no row reaches.
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        ``[T, N, H]`` (with ``value_dim`` that instead of H) in q's dtype; zero for tokens that are neither a decode
        row's nor in a chunk. Accumulated in f32.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    _, num_kv_heads, planes, _, kv_head_dim = kv_pages.shape
    if group is not None and (q.ndim != 4 or q.shape[1] != num_kv_heads or not 0 < group <= q.shape[2]):
        raise ValueError(f"group={group}: q {q.shape} must be [T, K={num_kv_heads}, QR, H] with at least as many rows")
    num_tokens, *_, head_dim = q.shape
    num_heads = q.shape[1] if group is None else num_kv_heads * group
    num_rows, num_prefill_rows = page_table.shape[0], prefill_cu_q_lens.shape[0] - 1
    want_planes = 2 if value_dim is None else 1
    if planes != want_planes or kv_head_dim != head_dim:
        raise ValueError(f"kv_pages {kv_pages.shape} must be [NP, K, {want_planes}, PS, H={head_dim}]")
    if value_dim is not None and not 0 < value_dim <= head_dim:
        raise ValueError(f"value_dim={value_dim} must be in 1..{head_dim}, the keys' size")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a query sees itself")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks {sinks.shape} must be [N={num_heads}]")
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads {num_heads} are not divisible by kv heads {num_kv_heads}")
    if kv_lens.shape != (num_rows,) or num_decode_rows + num_prefill_rows != num_rows:
        raise ValueError(
            f"page_table has {num_rows} rows, kv_lens {kv_lens.shape}, "
            f"num_decode_rows={num_decode_rows} and prefill rows {num_prefill_rows}"
        )
    if num_tokens < num_decode_rows or (num_prefill_rows == 0 and num_tokens != num_decode_rows):
        raise ValueError(f"{num_tokens} tokens, {num_decode_rows} decode rows, {num_prefill_rows} prefill rows")
    if kv_scales is not None and kv_scales.shape != kv_pages.shape[:-1]:
        raise ValueError(f"kv_scales {kv_scales.shape} must be {kv_pages.shape[:-1]}, kv_pages without its last axis")
    return dispatch.choose(_IMPLEMENTATIONS, implementation)(
        q,
        kv_pages,
        page_table,
        kv_lens,
        prefill_cu_q_lens,
        num_decode_rows=num_decode_rows,
        sm_scale=sm_scale,
        group=group,
        window=window,
        softcap=softcap,
        sinks=sinks,
        value_dim=value_dim,
        kv_scales=kv_scales,
    )
