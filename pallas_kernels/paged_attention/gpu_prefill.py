"""Paged attention of prompt chunks on Mosaic GPU (Hopper): many queries a row, keys and values through the page table.

XLA lays the queries out in blocks that belong to one row each: the ``G`` query heads of a kv head, of as many tokens as
fit, are the 64 rows of a warpgroup's matrix product. One program has one block of one kv head: a warpgroup that walks
the page table and keeps a ring of shared memory filled by TMA, and two that share what is in it, each with its own 64
rows and its own online softmax (the shape of FlashAttention-3, Shah et al., 2024). While one is in its softmax the
other has the tensor cores. Blocks with the most keys start first, so that the short ones fill the end.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_attention import gpu_decode_quantized, gpu_prefill_quantized
from pallas_kernels.paged_attention.gpu_decode import accumulator_columns, refusal, smem_tiles

_LOG2E = math.log2(math.e)
_ROWS = 64  # of one warpgroup's matrix product
_CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ without changing the result.

    Timed on an H100: tiles of 128 are 5 to 10 % faster than of 64, though a few registers spill.
    """

    block_kv: int = 128  # keys of a tile
    ring: int = 5  # tiles of K or of V in shared memory, for head_dim 128: twice that for 64
    raw: int = 3  # of a quantized cache: tiles of K and V, as they are kept, on their way to it; as many more for 64


def default_tuning(head_dim: int, *, quantized: bool = False) -> Tuning:
    """Of head_dim 256, two tiles of 128 would fill shared memory, and of a quantized cache two rings."""
    if quantized:
        return Tuning(block_kv=64, ring=6)
    return Tuning() if head_dim <= 128 else Tuning(block_kv=64, ring=10)


@functools.partial(jax.jit, static_argnames=("sm_scale", "window", "softcap", "tuning", "interpret"))
def prefill_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of the chunks alone; arguments as of ``paged_attention`` without decode rows.

    Args:
        q: ``[T, N, H]`` bfloat16; H and PS as of ``decode_attention``, at most 64 query heads a kv head.
        kv_pages: ``[NP, K, 2, PS, H]`` bfloat16; with ``kv_scales`` as of ``gpu_decode_quantized``, and so H and the
            query heads.
        page_table: ``[BP, MP]`` int32.
        kv_lens: ``[BP]`` int32.
        cu_q_lens: ``[BP + 1]`` int32.
        sm_scale: factor on the scores before the softmax.
        window, softcap, sinks, kv_scales: as of ``paged_attention``.
        tuning: None takes the defaults.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[T, N, H]``, zero for tokens in no chunk.
    """
    num_tokens, n, h = q.shape
    k_heads, num_rows = kv_pages.shape[1], page_table.shape[0]
    group = n // k_heads
    refused = refusal if kv_scales is None else gpu_decode_quantized.refusal
    if why := refused(h, kv_pages.shape[3], group, q.dtype, kv_pages.dtype):
        raise ValueError(why)
    t = tuning or default_tuning(h, quantized=kv_scales is not None)
    if kv_pages.dtype == jnp.uint8:  # the same bytes: XLA for GPUs copies nothing
        kv_pages = lax.bitcast_convert_type(kv_pages, jnp.float8_e4m3fn)
    tokens = _ROWS // group  # of one warpgroup's rows
    qb = _CONSUMERS * tokens  # of a block
    num_blocks = num_tokens // qb + num_rows  # NB: at most one ragged block a row
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]  # [BP]
    blocks = -(-q_lens // qb)  # [BP], blocks of each row
    last_block = jnp.cumsum(blocks)  # [BP], one behind it
    block = jnp.arange(num_blocks)  # [NB]
    # By comparing: a search would be a loop on the device.
    row = jnp.minimum(jnp.sum(last_block[None, :] <= block[:, None], axis=1), num_rows - 1)  # [NB]
    offset = (block - (last_block - blocks)[row])[:, None] * qb + jnp.arange(qb)  # [NB, QB], in the row's chunk
    valid = (offset < q_lens[row][:, None]) & (block < last_block[-1])[:, None]  # [NB, QB]
    token = jnp.where(valid, cu_q_lens[row][:, None] + offset, num_tokens)  # [NB, QB]
    position = jnp.where(valid, (kv_lens - q_lens)[row][:, None] + offset, -1)  # [NB, QB]
    meta = jnp.stack([row, jnp.max(position, axis=1) + 1, position[:, 0], kv_lens[row]], axis=1)  # [NB, 4]
    pad = _ROWS - tokens * group

    q_blocks = q.at[token].get(mode="fill", fill_value=0)  # [NB, QB, N, H]
    q_blocks = q_blocks.reshape(num_blocks, _CONSUMERS, tokens, k_heads, group, h).transpose(0, 3, 1, 2, 4, 5)
    q_blocks = q_blocks.reshape(num_blocks, k_heads, _CONSUMERS, tokens * group, h)
    q_blocks = jnp.pad(q_blocks, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))  # [NB, K, 2, 64, H]
    limit = jnp.repeat(position.reshape(num_blocks, _CONSUMERS, tokens), group, axis=2)
    limit = jnp.pad(limit, ((0, 0), (0, 0), (0, pad)), constant_values=-1)  # [NB, 2, 64], last key each row sees

    if sinks is not None:  # [K, 64], in units of log2, of each row
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(k_heads, group) * _LOG2E, (1, tokens))
        sinks = jnp.pad(sinks, ((0, 0), (0, pad)))

    out = _attend(
        q_blocks, kv_pages, kv_scales, page_table, meta.astype(jnp.int32), limit.astype(jnp.int32), sinks, sm_scale,
        window, softcap, t, interpret,
    )  # [NB, K, 2, 64, H]  # fmt: skip
    out = out[:, :, :, : tokens * group].reshape(num_blocks, k_heads, _CONSUMERS, tokens, group, h)
    out = out.transpose(0, 2, 3, 1, 4, 5).reshape(num_blocks * qb, n, h)
    # Where each token's block is.
    i = jnp.arange(num_tokens)  # [T]
    i_row = jnp.minimum(jnp.sum(cu_q_lens[None, 1:] <= i[:, None], axis=1), num_rows - 1)  # [T]
    flat = (last_block - blocks)[i_row] * qb + i - cu_q_lens[i_row]  # [T]
    flat = jnp.where((i >= cu_q_lens[0]) & (i < cu_q_lens[-1]), flat, num_blocks * qb)
    return out.at[flat].get(mode="fill", fill_value=0)


def _attend(
    q: jax.Array,  # [NB, K, 2, 64, H]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    kv_scales: jax.Array | None,  # [NP, K, 2, PS]
    page_table: jax.Array,  # [BP, MP]
    meta: jax.Array,  # [NB, 4]: row, keys the block needs (0: padding), its first query's position, keys of the row
    limit: jax.Array,  # [NB, 2, 64]
    sinks: jax.Array | None,  # [K, 64]
    sm_scale: float,
    window: int | None,
    softcap: float | None,
    t: Tuning,
    interpret: Any,
) -> jax.Array:  # [NB, K, 2, 64, H]; padding blocks are not written
    num_blocks, k_heads, _, _, h = q.shape
    page_size, max_pages = kv_pages.shape[3], page_table.shape[1]
    block_kv, ring = t.block_kv, t.ring * 128 // h
    pages_per_tile, tiles_per_page = max(1, block_kv // page_size), max(1, page_size // block_kv)
    scale = (sm_scale if softcap is None else softcap) * _LOG2E  # on s, as it is once it has its soft cap
    width = accumulator_columns(h)
    wgmma_layout = plgpu.Layout.WGMMA
    row_layout = wgmma_layout.reduce(1)
    tiled = smem_tiles(h)

    def kernel(
        q_ref,  # [NB, K, 2, 64, H]
        kv_ref,  # [NP, K, 2, PS, H]
        table_ref,  # [BP, MP]
        meta_ref,  # [NB, 4]
        limit_ref,  # [NB, 2, 64]
        *refs,  # with sinks: sinks_ref [K, 64]; with scales: scales_ref [NP, K, 2, PS]; then out_ref [NB, K, 2, 64, H]
        q_smem,  # [2, 64, H], the output's place at the end
        kv_smem,  # [ring, block_kv, H]
        q_full,  # [2]
        kv_full,  # [ring]
        kv_free,  # [ring]
        v_clean: Any = None,
        **raw,  # of a quantized cache: what gpu_prefill_quantized.scratch names
    ):
        *sinks_ref, out_ref = refs
        scales_ref = None if kv_scales is None else sinks_ref.pop()
        warpgroup = lax.axis_index("warpgroup")
        head = lax.axis_index("head")
        block = num_blocks - 1 - lax.axis_index("block")
        row, keys = meta_ref[block, 0], meta_ref[block, 1]
        first_position, row_keys = meta_ref[block, 2], meta_ref[block, 3]
        num_tiles = lax.div(keys + (block_kv - 1), jnp.int32(block_kv))
        first_tile = jnp.int32(0)  # that any query of the block sees
        if window is not None:
            first_tile = lax.div(jnp.maximum(first_position - (window - 1), 0), jnp.int32(block_kv))

        def entry_of(tile):
            return tile if window is None else tile - first_tile

        def _convert():
            plgpu.set_max_registers(gpu_prefill_quantized.CONVERTING_REGISTERS, action="decrease")
            gpu_prefill_quantized.fill_ring(
                kv_ref, scales_ref, lambda page: table_ref[row, jnp.minimum(page, max_pages - 1)], head, first_tile,
                num_tiles, row_keys, kv_smem, kv_full, kv_free, **raw, page_size=page_size, interpret=interpret,
            )  # fmt: skip
            drain(2 * entry_of(num_tiles))

        def drain(num_entries):
            @pl.loop(jnp.maximum(num_entries - ring, 0), num_entries)
            def _(entry):  # who waits on a barrier at all must see each of its phases
                plgpu.barrier_wait(kv_free.at[lax.rem(entry, jnp.int32(ring))])

        def _load():
            plgpu.set_max_registers(24, action="decrease")
            num_pages = lax.div(row_keys + (page_size - 1), jnp.int32(page_size))

            def page_of(tile):
                return tile * pages_per_tile if tiles_per_page == 1 else lax.div(tile, jnp.int32(tiles_per_page))

            def page_ids(page):
                return [table_ref[row, jnp.minimum(page + p, max_pages - 1)] for p in range(pages_per_tile)]

            def load_half(entry, which, ids, tile, left):
                slot = lax.rem(entry, jnp.int32(ring))
                full = kv_full.at[slot]

                @pl.when(entry >= ring)
                def _():
                    plgpu.barrier_wait(kv_free.at[slot])

                for p in range(pages_per_tile):
                    source = kv_ref.at[ids[p], head, which]
                    if tiles_per_page > 1:
                        source = source.at[pl.ds(lax.rem(tile, jnp.int32(tiles_per_page)) * block_kv, block_kv)]
                    rows = min(page_size, block_kv)
                    target = kv_smem.at[slot, pl.ds(p * rows, rows)]
                    copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, full)
                    if p == 0:
                        copy()
                    else:  # pages behind the row's last key are not read; the others are, so that a tile has no place
                        # that nothing was ever written to: what lies there by chance may be NaN, and 0 * NaN is NaN
                        pl.when(p < left)(copy)
                        pl.when(p >= left)(lambda: plgpu.barrier_arrive(full))

            def load_tile(i, ids):
                next_ids = page_ids(page_of(i + 1))
                for which in range(2):
                    load_half(2 * entry_of(i) + which, which, ids, i, num_pages - page_of(i))
                return next_ids

            lax.fori_loop(first_tile, num_tiles, load_tile, page_ids(0 if window is None else page_of(first_tile)))
            drain(2 * entry_of(num_tiles))

        pl.when(warpgroup == _CONSUMERS)(_load if kv_scales is None else _convert)

        @pl.when((warpgroup < _CONSUMERS) & (num_tiles > 0))
        def _compute():
            registers = 240 if kv_scales is None else gpu_prefill_quantized.MULTIPLYING_REGISTERS
            plgpu.set_max_registers(registers, action="increase")
            plgpu.copy_gmem_to_smem(q_ref.at[block, head, warpgroup], q_smem.at[warpgroup], q_full.at[warpgroup])
            last_key = plgpu.load(limit_ref.at[block, warpgroup], layout=row_layout, optimized=False)
            plgpu.barrier_wait(q_full.at[warpgroup])

            def columns_of(ref):
                return [ref] if width == h else [ref.at[:, pl.ds(c, width)] for c in range(0, h, width)]

            def attend_tile(i, carry, *, masked):
                acc, m, norm = carry
                first_key = i * block_kv
                k_slot = lax.rem(2 * entry_of(i), jnp.int32(ring))
                v_slot = lax.rem(2 * entry_of(i) + 1, jnp.int32(ring))
                plgpu.barrier_wait(kv_full.at[k_slot])

                def scores(s_ref):
                    plgpu.wgmma(s_ref, q_smem.at[warpgroup], kv_smem.at[k_slot].transpose((1, 0)))
                    return s_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((_ROWS, block_kv), jnp.float32))
                plgpu.barrier_arrive(kv_free.at[k_slot])
                if softcap is not None:
                    s = jnp.tanh(s * (sm_scale / softcap))
                if masked:
                    key = plgpu.broadcasted_iota(jnp.int32, (_ROWS, block_kv), 1, layout=wgmma_layout)
                    last = lax.broadcast_in_dim(last_key - first_key, (_ROWS, block_kv), [0])
                    seen = key <= last
                    if window is not None:
                        seen &= key > last - window
                    s = jnp.where(seen, s, -jnp.inf)
                # A padding row sees nothing, as any row may of a window's first tiles: -1e30 in place of -inf as its
                # maximum keeps it from NaN.
                m_new = jnp.maximum(m, s.max(axis=1))
                alpha = jnp.exp2((m - m_new) * scale)
                p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_new * scale, s.shape, [0]))
                norm = norm * alpha + p.sum(axis=1)
                acc = [a * lax.broadcast_in_dim(alpha, a.shape, [0]) for a in acc]
                p = p.astype(q.dtype)
                plgpu.barrier_wait(kv_full.at[v_slot])
                if masked and kv_scales is None:
                    clean(row_keys - first_key, v_slot)

                def values(o_ref, piece):
                    plgpu.wgmma(o_ref, p, piece)
                    return o_ref[...]

                acc = [
                    a + pl.run_scoped(functools.partial(values, piece=piece), plgpu.ACC(a.shape, jnp.float32))
                    for a, piece in zip(acc, columns_of(kv_smem.at[v_slot]), strict=True)
                ]
                plgpu.barrier_arrive(kv_free.at[v_slot])
                return acc, m_new, norm

            def clean(valid, v_slot):
                """Zeros in place of values behind the row's last key, which may be NaN: 0 * NaN is NaN."""

                @pl.when((valid < block_kv) & (warpgroup == 0))
                def _():
                    for start in range(0, block_kv, _ROWS):  # in pieces, to need few registers
                        for piece in columns_of(kv_smem.at[v_slot, pl.ds(start, _ROWS)]):
                            v = plgpu.load(piece, layout=wgmma_layout)
                            key = plgpu.broadcasted_iota(jnp.int32, (_ROWS, width), 0, layout=wgmma_layout)
                            piece[...] = jnp.where(key < valid - start, v, jnp.zeros_like(v))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(v_clean)

                @pl.when((valid < block_kv) & (warpgroup == 1))
                def _():
                    plgpu.barrier_wait(v_clean)

            zeros = plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), wgmma_layout)
            m = plgpu.layout_cast(jnp.full((_ROWS,), -1e30, jnp.float32), row_layout)
            norm = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row_layout)
            # Tiles that all queries of the block see in full need no mask.
            whole = lax.div(first_position + 1, jnp.int32(block_kv))
            carry, begin = ([zeros] * (h // width), m, norm), jnp.int32(0)
            if window is not None:  # the first tiles, which some queries no longer see in full
                begin = lax.div(jnp.maximum(keys - window, 0) + (block_kv - 1), jnp.int32(block_kv))
                begin = jnp.minimum(begin, num_tiles)
                carry = lax.fori_loop(first_tile, begin, functools.partial(attend_tile, masked=True), carry)
                whole = jnp.maximum(whole, begin)
            carry = lax.fori_loop(begin, whole, functools.partial(attend_tile, masked=False), carry)
            acc, m, norm = lax.fori_loop(whole, num_tiles, functools.partial(attend_tile, masked=True), carry)

            total = jnp.maximum(norm, 1e-30)
            if sinks_ref:
                # Where all scores are far below the sink this is inf, and the output 0 as it should be.
                total = total + jnp.exp2(
                    plgpu.load(sinks_ref[0].at[head], layout=row_layout, optimized=False) - m * scale
                )
            for a, target in zip(acc, columns_of(q_smem.at[warpgroup]), strict=True):
                target[...] = (a * lax.broadcast_in_dim(1.0 / total, a.shape, [0])).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_ref.at[block, head, warpgroup])
            plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = dict(
        q_smem=plgpu.SMEM((_CONSUMERS, _ROWS, h), q.dtype, transforms=tiled),
        kv_smem=plgpu.SMEM((ring, block_kv, h), q.dtype, transforms=tiled),
        q_full=plgpu.Barrier(num_barriers=_CONSUMERS),
        kv_full=plgpu.Barrier(num_arrivals=pages_per_tile if kv_scales is None else 1, num_barriers=ring),
        kv_free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=ring),
    )
    if kv_scales is None:
        scratch["v_clean"] = plgpu.Barrier()
    else:
        scratch |= gpu_prefill_quantized.scratch(
            h, page_size, block_kv, t.raw * 128 // h, kv_pages.dtype, kv_scales.dtype
        )
    optional = [x for x in (sinks, kv_scales) if x is not None]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_blocks, k_heads),
        grid_names=("block", "head"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        scratch_types=scratch,
        interpret=interpret,
    )(q, kv_pages, page_table, meta, limit, *optional)
