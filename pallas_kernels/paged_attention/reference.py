"""Paged attention in plain jnp with f32 accumulation: the specification, and the path of CPUs.

Queries are grouped into blocks that belong to one row each: blocks of one query for decode rows, of ``QUERY_BLOCK`` for
chunks. All blocks advance together over the keys, ``KEY_BLOCK`` at a time, with an online softmax (Milakov and
Gimelshein, 2018), as far as the longest row needs: cost follows the lengths, not the page table's width.
"""

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
) -> jax.Array:  # [T, N, H]
    """See ``pallas_kernels.paged_attention.paged_attention``."""
    bd, parts = num_decode_rows, []
    if bd:
        decode = _attend(
            q[:bd, None], (kv_lens[:bd] - 1)[:, None], kv_pages, page_table[:bd], kv_lens[:bd], sm_scale
        )  # [BD, 1, N, H]
        parts.append(decode[:, 0])
    if q.shape[0] > bd:
        parts.append(_attend_chunks(q[bd:], kv_pages, page_table[bd:], kv_lens[bd:], prefill_cu_q_lens, sm_scale))
    return jnp.concatenate(parts)


def _attend_chunks(
    q: jax.Array,  # [TP, N, H]
    kv_pages: jax.Array,
    page_table: jax.Array,  # [BP, MP]
    kv_lens: jax.Array,  # [BP]
    cu_q_lens: jax.Array,  # [BP + 1]
    sm_scale: float,
) -> jax.Array:  # [TP, N, H]
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
    out = _attend(q_blocks, position, kv_pages, page_table[row], block_kv_len, sm_scale)  # [NB, QB, N, H]
    # Where each token's block is: a gather, because a scatter is a loop on CPUs.
    t = jnp.arange(num_tokens)  # [TP]
    t_row = jnp.clip(jnp.searchsorted(cu_q_lens[1:], t, side="right"), 0, num_rows - 1)  # [TP]
    t_offset = t - cu_q_lens[t_row]
    flat = (first_block[t_row] + t_offset // qb) * qb + t_offset % qb  # [TP]
    flat = jnp.where(t < cu_q_lens[-1], flat, num_blocks * qb)
    return out.reshape(num_blocks * qb, *q.shape[1:]).at[flat].get(mode="fill", fill_value=0)


def _attend(
    q: jax.Array,  # [NB, QB, N, H]
    position: jax.Array,  # [NB, QB], each query's own position; -1 = padding
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    page_table: jax.Array,  # [NB, MP]
    kv_lens: jax.Array,  # [NB], keys the block needs; 0 = padding
    sm_scale: float,
) -> jax.Array:  # [NB, QB, N, H]
    nb, qb, n, h = q.shape
    dtype = q.dtype
    k_heads, page_size = kv_pages.shape[1], kv_pages.shape[3]
    group = n // k_heads
    pages = min(-(-KEY_BLOCK // page_size), page_table.shape[1])  # an iteration
    width = pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    heads = jnp.arange(k_heads)[None, :, None]  # [1, K, 1]
    # [NB, K, QB * G, H]: the queries that share a kv head are the rows of one product.
    q = q.reshape(nb, qb, k_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(nb, k_heads, qb * group, h)
    q = q.astype(jnp.float32) * sm_scale
    q_pos = jnp.repeat(position, group, axis=1)[:, None, :, None]  # [NB, 1, QB * G, 1]

    def body(i, carry):
        acc, m, total = carry  # [NB, K, QB * G, H], [NB, K, QB * G, 1] twice
        ids = lax.dynamic_slice_in_dim(page_table, i * pages, pages, axis=1)[:, None]  # [NB, 1, pages]
        k = kv_pages[ids, heads, 0].reshape(nb, k_heads, width, h).astype(jnp.float32)
        v = kv_pages[ids, heads, 1].reshape(nb, k_heads, width, h).astype(jnp.float32)
        key_pos = i * width + jnp.arange(width)  # [width]
        s = jnp.einsum("bkqh,bkwh->bkqw", q, k)
        s = jnp.where(key_pos <= q_pos, s, -jnp.inf)
        # A page may hold NaN beyond the row's length, and 0 * NaN is NaN: the values are masked too.
        v = jnp.where((key_pos < kv_lens[:, None])[:, None, :, None], v, 0)
        m_new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
        m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - m_safe)
        scale = jnp.exp(m - m_safe)
        return acc * scale + jnp.einsum("bkqw,bkwh->bkqh", p, v), m_new, total * scale + jnp.sum(p, -1, keepdims=True)

    stats = jnp.zeros((nb, k_heads, qb * group, 1), jnp.float32)
    init = (jnp.zeros(q.shape, jnp.float32), stats - jnp.inf, stats)
    steps = -(-jnp.max(kv_lens) // width)
    acc, _, total = lax.fori_loop(0, steps, body, init)
    out = acc / jnp.where(total == 0, 1, total)
    out = out.reshape(nb, k_heads, qb, group, h).transpose(0, 2, 1, 3, 4)
    return out.reshape(nb, qb, n, h).astype(dtype)
