"""Paged attention in plain jnp with f32 accumulation: the specification, and the path of CPUs.

Queries are grouped into blocks that belong to one row each: blocks of one query for decode rows, of ``QUERY_BLOCK`` for
chunks. All blocks advance together over the keys, ``KEY_BLOCK`` at a time, with an online softmax (Milakov and
Gimelshein, 2018), from the first key that any of them sees to the last: cost follows the lengths (and a window), not
the page table's width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 32
KEY_BLOCK = 128  # keys an iteration, rounded up to whole pages


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
    sinks: jax.Array | None = None,  # [N]
    value_dim: int | None = None,
    kv_scales: jax.Array | None = None,  # [NP, K, 2, PS]
) -> jax.Array:  # [T, N, H], or [T, N, value_dim]
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    q = queries(q, group)
    attend = functools.partial(
        _attend,
        kv_pages=kv_pages,
        kv_scales=kv_scales,
        sm_scale=sm_scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        value_dim=value_dim,
    )
    bd = num_decode_rows
    decoded = chunks = None
    if bd:
        decoded = attend(q[:bd, None], (kv_lens[:bd] - 1)[:, None], page_table[:bd], kv_lens[:bd])[:, 0]  # [BD, N, H]
    if page_table.shape[0] > bd:
        chunks = _attend_chunks(attend, q, page_table[bd:], kv_lens[bd:], prefill_cu_q_lens)  # [T, N, H]
    return merged(decoded, chunks, prefill_cu_q_lens)


def queries(q: jax.Array, group: int | None) -> jax.Array:
    """``[T, N, H]`` of queries that lie in rows, ``group`` a kv head, as ``paged_attention`` takes them."""
    return q if group is None else q[:, :, :group].reshape(q.shape[0], -1, q.shape[-1])


def merged(decoded: jax.Array | None, chunks: jax.Array | None, cu_q_lens: jax.Array) -> jax.Array:
    """[T, ...] of the decode rows' outputs [BD, ...] and the chunks' [T, ...], which begin at ``cu_q_lens[0]``."""
    if decoded is None or chunks is None:
        out = chunks if decoded is None else decoded
        assert out is not None
        return out
    padded = jnp.pad(decoded, ((0, chunks.shape[0] - decoded.shape[0]), (0, 0), (0, 0)))
    is_decoded = jnp.arange(chunks.shape[0]) < jnp.minimum(cu_q_lens[0], decoded.shape[0])
    return jnp.where(is_decoded[:, None, None], padded, chunks)


def _attend_chunks(
    attend: Callable[..., jax.Array],
    q: jax.Array,  # [T, N, H]
    page_table: jax.Array,  # [BP, MP]
    kv_lens: jax.Array,  # [BP]
    cu_q_lens: jax.Array,  # [BP + 1]
) -> jax.Array:  # [T, N, H], zero outside the chunks
    """Cuts the chunks into query blocks (QB tokens of one row), attends, and puts the tokens back in place."""
    num_tokens, num_rows = q.shape[0], page_table.shape[0]
    qb = min(QUERY_BLOCK, num_tokens)
    num_blocks = num_tokens // qb + num_rows  # NB: at most one ragged block a row
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]  # [BP]
    blocks = -(-q_lens // qb)  # [BP], blocks of each row
    first_block = jnp.cumsum(blocks) - blocks  # [BP]
    block = jnp.arange(num_blocks)  # [NB]
    row = jnp.clip(jnp.searchsorted(first_block + blocks, block, side="right"), 0, num_rows - 1)  # [NB]
    offset = (block - first_block[row])[:, None] * qb + jnp.arange(qb)  # [NB, QB], in the row's chunk
    valid = (offset < q_lens[row][:, None]) & (block < first_block[-1] + blocks[-1])[:, None]  # [NB, QB]
    token = jnp.where(valid, cu_q_lens[row][:, None] + offset, num_tokens)  # [NB, QB]
    position = jnp.where(valid, (kv_lens - q_lens)[row][:, None] + offset, -1)  # [NB, QB]
    block_kv_len = jnp.max(position, axis=1) + 1  # [NB], keys that any query of the block sees
    q_blocks = q.at[token].get(mode="fill", fill_value=0)  # [NB, QB, N, H]
    out = attend(q_blocks, position, page_table[row], block_kv_len)  # [NB, QB, N, H]
    # Where each token's block is: a gather, because a scatter is a loop on CPUs.
    t = jnp.arange(num_tokens)  # [T]
    t_row = jnp.clip(jnp.searchsorted(cu_q_lens[1:], t, side="right"), 0, num_rows - 1)  # [T]
    t_offset = t - cu_q_lens[t_row]
    flat = (first_block[t_row] + t_offset // qb) * qb + t_offset % qb  # [T]
    flat = jnp.where((t >= cu_q_lens[0]) & (t < cu_q_lens[-1]), flat, num_blocks * qb)
    return out.reshape(num_blocks * qb, *out.shape[2:]).at[flat].get(mode="fill", fill_value=0)


def _attend(
    q: jax.Array,  # [NB, QB, N, H]
    position: jax.Array,  # [NB, QB], each query's own position; -1 = padding
    page_table: jax.Array,  # [NB, MP]
    kv_lens: jax.Array,  # [NB], keys the block needs; 0 = padding
    *,
    kv_pages: jax.Array,  # [NP, K, 2, PS, H], or [NP, K, 1, PS, H]
    kv_scales: jax.Array | None,  # [NP, K, 2, PS], or [NP, K, 1, PS]
    sm_scale: float,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,  # [N]
    value_dim: int | None,  # HV
) -> jax.Array:  # [NB, QB, N, HV]
    nb, qb, n, h = q.shape
    dtype = q.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None  # a GPU's default is tf32
    k_heads, page_size = kv_pages.shape[1], kv_pages.shape[3]
    group, hv = n // k_heads, h if value_dim is None else value_dim
    pages = min(-(-KEY_BLOCK // page_size), page_table.shape[1])  # an iteration
    width = pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    heads = jnp.arange(k_heads)[None, :, None]  # [1, K, 1]
    # [NB, K, QB * G, H]: the queries that share a kv head are the rows of one product.
    q = q.reshape(nb, qb, k_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(nb, k_heads, qb * group, h)
    q = q.astype(jnp.float32) * sm_scale
    q_pos = jnp.repeat(position, group, axis=1)[:, None, :, None]  # [NB, 1, QB * G, 1]

    def read(ids, plane):  # [NB, K, width, H]
        part = kv_pages[ids, heads, plane].reshape(nb, k_heads, width, h)
        if kv_pages.dtype == jnp.uint8:
            part = lax.bitcast_convert_type(part, jnp.float8_e4m3fn)
        return part.astype(jnp.float32)

    def body(i, carry):
        acc, m, total = carry  # [NB, K, QB * G, HV], [NB, K, QB * G, 1] twice
        ids = lax.dynamic_slice_in_dim(page_table, i * pages, pages, axis=1)[:, None]  # [NB, 1, pages]
        k = read(ids, 0)
        v = read(ids, 1) if value_dim is None else k[..., :value_dim]
        key_pos = i * width + jnp.arange(width)  # [width]
        s = jnp.einsum("bkqh,bkwh->bkqw", q, k, precision=precision)
        if kv_scales is not None:
            k_scale = kv_scales[ids, heads, 0].reshape(nb, k_heads, 1, width).astype(jnp.float32)
            v_scale = k_scale
            if value_dim is None:
                v_scale = kv_scales[ids, heads, 1].reshape(nb, k_heads, 1, width).astype(jnp.float32)
            s, v = s * k_scale, v * v_scale.swapaxes(2, 3)
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        visible = key_pos <= q_pos
        if window is not None:
            visible &= key_pos > q_pos - window
        s = jnp.where(visible, s, -jnp.inf)
        # A page may hold NaN beyond the row's length, and 0 * NaN is NaN: the values are masked too.
        v = jnp.where((key_pos < kv_lens[:, None])[:, None, :, None], v, 0)
        m_new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
        m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - m_safe)
        scale = jnp.exp(m - m_safe)
        seen = jnp.einsum("bkqw,bkwh->bkqh", p, v, precision=precision)
        return acc * scale + seen, m_new, total * scale + jnp.sum(p, -1, keepdims=True)

    stats = jnp.zeros((nb, k_heads, qb * group, 1), jnp.float32)
    init = (jnp.zeros((nb, k_heads, qb * group, hv), jnp.float32), stats - jnp.inf, stats)
    first = 0
    if window is not None:
        earliest = jnp.min(jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position))
        first = jnp.maximum(earliest - window + 1, 0) // width
    steps = -(-jnp.max(kv_lens) // width)
    acc, m, total = lax.fori_loop(first, steps, body, init)
    if sinks is not None:
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(k_heads, 1, group), (1, qb, 1)).reshape(k_heads, -1, 1)
        m_new = jnp.maximum(m, sink)
        scale = jnp.exp(m - m_new)
        acc, total = acc * scale, total * scale + jnp.exp(sink - m_new)
    out = acc / jnp.where(total == 0, 1, total)
    out = out.reshape(nb, k_heads, qb, group, hv).transpose(0, 2, 1, 3, 4)
    return out.reshape(nb, qb, n, hv).astype(dtype)
