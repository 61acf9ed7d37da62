"""Paged decode attention on Mosaic GPU (Hopper): one query a row, keys and values read through the page table.

Decode is a matter of moving bytes, so the kernel is built around them. The keys of a (row, kv head), cut into tiles of
``block_kv`` tokens, are an item; all items lie one after another on one line of tiles, and each of a fixed number of
streams (``streams_per_sm`` on every multiprocessor) takes an equal stretch of that line (the stream-K decomposition of
Osama et al., 2023). So every stream moves the same number of bytes whatever the lengths are, and a long row is split
where the stretches happen to end. A stream is a pair of warpgroups: one walks the page table and keeps a ring of shared
memory filled by TMA, the other runs the online softmax on the tensor cores. The ring runs on across items.

An item that lies in one stretch is written to the output at once. Of a split item, every stream writes what it has
seen, normalised, with its log-sum-exp, and a second small kernel combines. There is at most one such item at each end
of a stretch, so their buffer has a size that depends on nothing but the number of streams.

With a sliding window an item is the tiles that the window touches. Sinks join the softmax once an item: where it is
written to the output.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_attention import gpu_split
from pallas_kernels.paged_attention.gpu_split import Tuning

_LOG2E = math.log2(math.e)
_ROWS = 64  # rows of a warpgroup's matrix instruction; the queries of one kv head fill the first G
HEAD_DIMS = (64, 96, 128, 256)


def default_tuning(head_dim: int) -> Tuning:
    """Of head_dim 256, a second stream finds no room on a multiprocessor."""
    return Tuning() if head_dim <= 128 else Tuning(streams_per_sm=1, ring=8)


def smem_tiles(head_dim: int) -> tuple[Any, ...]:
    """How queries, keys and values lie in shared memory: swizzled tiles of 64 columns, or of 32."""
    columns = 64 if head_dim % 64 == 0 else 32
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def accumulator_columns(head_dim: int) -> int:
    """Columns of the output that one product adds to: a second accumulator of 256 has no room in registers."""
    return head_dim if head_dim <= 128 else 64


def refusal(
    head_dim: int, page_size: int, group: int, q_dtype: Any, kv_dtype: Any, tuning: Tuning | None = None
) -> str | None:
    """Why ``decode_attention`` does not take these shapes; None if it does."""
    block_kv = (tuning or default_tuning(head_dim)).block_kv
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {HEAD_DIMS}"
    if page_size % 8 or (block_kv % page_size and page_size % block_kv):
        return f"page_size={page_size} must be a multiple of 8 that divides {block_kv}, or a multiple of {block_kv}"
    if group > _ROWS:
        return f"{group} query heads a kv head are more than {_ROWS}"
    if q_dtype != jnp.bfloat16 or kv_dtype != jnp.bfloat16:
        return f"q is {q_dtype} and kv_pages {kv_dtype}; both must be bfloat16"
    return None


def query_rows(group: int) -> int:
    """Rows of ``group`` queries: the copy engine moves multiples of 8 of a swizzled tile.

    What the rows behind them hold reaches no other row: products, softmax, parts and their combination go row by row,
    and only the first ``group`` are stored.
    """
    return -(-group // 8) * 8


def _loop(upper: Any, body: Any, init: Any) -> Any:
    return lax.fori_loop(jnp.int32(0), upper, body, init)


@functools.partial(jax.jit, static_argnames=("sm_scale", "group", "window", "softcap", "tuning", "interpret"))
def decode_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    sm_scale: float,
    group: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of one query a row; arguments as of ``paged_attention``, all rows being decode rows.

    Args:
        q: ``[B, N, H]`` bfloat16; H is one of ``HEAD_DIMS``, at most 64 query heads a kv head. With ``group``
            ``[B, K, query_rows(group), H]``, which spares a copy.
        kv_pages: ``[NP, K, 2, PS, H]`` bfloat16; PS is a multiple of 8 that divides the tile (64), or a multiple of it.
        page_table: ``[B, MP]`` int32.
        kv_lens: ``[B]`` int32; 0 gives zeros.
        group, window, softcap, sinks: as of ``paged_attention``.
        tuning: None takes the defaults.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[B, N, H]``.
    """
    b, *_, h = q.shape
    t = tuning or default_tuning(h)
    k_heads, page_size = kv_pages.shape[1], kv_pages.shape[3]
    is_in_rows = group is not None
    group = group if group is not None else q.shape[1] // k_heads
    n, q_rows = k_heads * group, query_rows(group)
    if why := refusal(h, page_size, group, q.dtype, kv_pages.dtype, t):
        raise ValueError(why)
    # The same in every layer of a step that has the same window: XLA keeps one.
    plan = gpu_split.make_plan(kv_lens, page_table, page_size, k_heads, t, window)
    if sinks is not None:  # [K, 64], in units of log2
        sinks = jnp.pad(sinks.astype(jnp.float32).reshape(k_heads, group) * _LOG2E, ((0, 0), (0, _ROWS - group)))
    if is_in_rows and q.shape[2] != q_rows:
        raise ValueError(f"q {q.shape} must have {q_rows} rows for {group} queries a kv head")
    if not is_in_rows:  # XLA writes the padding with what produces q
        q = jnp.pad(q.reshape(b, k_heads, group, h), ((0, 0), (0, 0), (0, q_rows - group), (0, 0)))
    out, parts, lse = _attend(
        q, kv_pages, page_table, kv_lens, plan, sinks, group, sm_scale, window, softcap, t, interpret
    )
    return gpu_split.combine(out, parts, lse, plan, sinks, t, interpret).reshape(b, n, h)


def _attend(
    q: jax.Array,  # [B, K, QR, H]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    page_table: jax.Array,  # [B, MP]
    kv_lens: jax.Array,  # [B]
    plan: jax.Array,  # [S, F]
    sinks: jax.Array | None,  # [K, 64]
    group: int,
    sm_scale: float,
    window: int | None,
    softcap: float | None,
    t: Tuning,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One stream: its stretch of tiles. Returns out [B, K, G, H], parts [2 S, 2, GP, H], lse [2 S, QR].

    A part is kept as two bfloat16 arrays, the value and what rounding it left over: 16 bits of mantissa in the same
    bytes as float32, staged through the same shared memory as the output. Slot ``s`` of the parts holds the end of an
    item that began before stream ``s``, slot ``S + s`` the beginning of one that goes on after it.
    """
    b, k_heads, q_rows, h = q.shape
    page_size = kv_pages.shape[3]
    max_pages = page_table.shape[1]
    block_kv, streams, per_sm = t.block_kv, t.num_streams, t.streams_per_sm
    ring = t.ring * 128 // h
    pages_per_tile, tiles_per_page = max(1, block_kv // page_size), max(1, page_size // block_kv)
    part_rows = gpu_split.part_rows(group, h)
    scale = sm_scale * _LOG2E
    width = accumulator_columns(h)
    wgmma_layout = plgpu.Layout.WGMMA
    row_layout = wgmma_layout.reduce(1)
    tiled = smem_tiles(h)

    def kernel(
        q_ref,  # [B, K, QR, H]
        kv_ref,  # [NP, K, 2, PS, H]
        table_ref,  # [B, MP]
        lens_ref,  # [B]
        plan_ref,  # [S, F]
        *refs,  # with sinks: sinks_ref [K, 64]; then out_ref [B, K, G, H], parts_ref [2 S, 2, GP, H], lse_ref [2 S, QR]
        q_smem,  # [P, 64, H], P streams a multiprocessor
        kv_smem,  # [P, ring, block_kv, H]
        o_smem,  # [P, 2, 64, H]
        lse_smem,  # [P, 64]
        q_full,  # [P]
        kv_full,  # [P * ring]
        kv_free,  # [P * ring]
    ):
        *sinks_ref, out_ref, parts_ref, lse_ref = refs
        warpgroup = lax.axis_index("warpgroup")
        place = lax.rem(warpgroup, jnp.int32(per_sm))
        # Neighbours on the line lie on different multiprocessors: a small batch spreads over all of them.
        stream = place * t.num_sms + lax.axis_index("sm")
        if t.launch_early:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        first_item, first_tile = plan_ref[stream, gpu_split.FIRST_ITEM], plan_ref[stream, gpu_split.FIRST_TILE]
        num_tiles, num_items = plan_ref[stream, gpu_split.NUM_TILES], plan_ref[stream, gpu_split.NUM_ITEMS]
        first_keys = plan_ref[stream, gpu_split.FIRST_KEYS]

        def place_of(item):
            """(row, head) of an item; the last row for the item behind the last."""
            row = jnp.minimum(lax.div(item, jnp.int32(k_heads)), b - 1)
            return row, lax.rem(item, jnp.int32(k_heads))

        def tile_of_row(tile, keys):
            """A tile of an item, counted from the row's first key."""
            return tile if window is None else tile + lax.div(jnp.maximum(keys - window, 0), jnp.int32(block_kv))

        def num_tiles_of(keys):
            tiles = lax.div(keys + (block_kv - 1), jnp.int32(block_kv))
            return jnp.maximum(tiles if window is None else tiles - tile_of_row(jnp.int32(0), keys), 1)

        @pl.when(warpgroup >= per_sm)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def page_of(tile):
                return tile * pages_per_tile if tiles_per_page == 1 else lax.div(tile, jnp.int32(tiles_per_page))

            def page_ids(row, page):
                # Entries behind a row's pages are in the table or not; none of them is used.
                return [table_ref[row, jnp.minimum(page + p, max_pages - 1)] for p in range(pages_per_tile)]

            def load_item(j, carry):
                tile, left, entry, keys, ids = carry
                row, head = place_of(first_item + j)
                count = jnp.minimum(num_tiles_of(keys) - tile, left)
                num_pages = lax.div(keys + (page_size - 1), jnp.int32(page_size))
                first = tile_of_row(tile, keys)

                def load_tile(i, carry):
                    entry, ids = carry
                    page = page_of(first + i)
                    # Read ahead: a read of device memory takes as long as a whole tile may.
                    next_ids = page_ids(row, page + pages_per_tile if tiles_per_page == 1 else page_of(first + i + 1))
                    for which in range(2):
                        load_half(entry + which, which, head, ids, first + i, num_pages - page)
                    return entry + 2, next_ids

                next_row, _ = place_of(first_item + j + 1)
                next_keys = lens_ref[next_row]
                next_ids = page_ids(next_row, 0 if window is None else page_of(tile_of_row(jnp.int32(0), next_keys)))
                entry, _ = _loop(jnp.where(keys == 0, 0, count), load_tile, (entry, ids))
                return jnp.int32(0), left - count, entry, next_keys, next_ids

            def load_half(entry, which, head, ids, tile, num_pages):
                slot = lax.rem(entry, jnp.int32(ring))
                full = kv_full.at[place * ring + slot]

                @pl.when(entry >= ring)
                def _():
                    plgpu.barrier_wait(kv_free.at[place * ring + slot])

                for p in range(pages_per_tile):
                    source = kv_ref.at[ids[p], head, which]
                    if tiles_per_page > 1:
                        source = source.at[pl.ds(lax.rem(tile, jnp.int32(tiles_per_page)) * block_kv, block_kv)]
                    rows = min(page_size, block_kv)
                    target = kv_smem.at[place, slot, pl.ds(p * rows, rows)]
                    copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, full)
                    if p == 0:
                        copy()
                    else:  # pages behind the last key are not read
                        pl.when(p < num_pages)(copy)
                        pl.when(p >= num_pages)(lambda: plgpu.barrier_arrive(full))

            first_ids = [plan_ref[stream, gpu_split.FIRST_PAGES + p] for p in range(pages_per_tile)]
            init = (first_tile, num_tiles, jnp.int32(0), first_keys, first_ids)
            _, _, entries, _, _ = _loop(num_items, load_item, init)

            @pl.loop(jnp.maximum(entries - ring, 0), entries)
            def _(entry):  # who waits on a barrier at all must see each of its phases
                plgpu.barrier_wait(kv_free.at[place * ring + lax.rem(entry, jnp.int32(ring))])

        @pl.when(warpgroup < per_sm)
        def _compute():
            plgpu.set_max_registers(216 if h <= 128 else 240, action="increase")

            def load_q(item):
                row, head = place_of(item)
                plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[place, pl.ds(0, q_rows)], q_full.at[place])

            def columns_of(ref):
                return [ref] if width == h else [ref.at[:, pl.ds(c, width)] for c in range(0, h, width)]

            # Rows without a query take part in every product: zeros keep them finite.
            q_smem[place] = plgpu.layout_cast(jnp.zeros((_ROWS, h), q.dtype), wgmma_layout)
            plgpu.commit_smem()
            pl.when(num_items > 0)(lambda: load_q(first_item))

            def attend_item(j, carry):
                tile, left, entry, keys = carry
                item = first_item + j
                row, head = place_of(item)
                next_keys = lens_ref[place_of(item + 1)[0]]
                count = jnp.minimum(num_tiles_of(keys) - tile, left)
                first = tile_of_row(tile, keys)
                plgpu.barrier_wait(q_full.at[place])

                def attend_tile(i, carry):
                    acc, m, norm, entry = carry
                    valid = keys - (first + i) * block_kv  # keys of the tile, if less than all
                    k_slot = lax.rem(entry, jnp.int32(ring))
                    v_slot = lax.rem(entry + 1, jnp.int32(ring))
                    plgpu.barrier_wait(kv_full.at[place * ring + k_slot])

                    def scores(s_ref):
                        plgpu.wgmma(s_ref, q_smem.at[place], kv_smem.at[place, k_slot].transpose((1, 0)))
                        return s_ref[...]

                    s = pl.run_scoped(scores, plgpu.ACC((_ROWS, block_kv), jnp.float32))
                    plgpu.barrier_arrive(kv_free.at[place * ring + k_slot])
                    key = plgpu.broadcasted_iota(jnp.int32, (_ROWS, block_kv), 1, layout=wgmma_layout)
                    seen = key < valid
                    if window is not None:
                        seen &= key >= valid - window
                    s = s * scale if softcap is None else jnp.tanh(s * (sm_scale / softcap)) * (softcap * _LOG2E)
                    s = jnp.where(seen, s, -jnp.inf)
                    m_new = jnp.maximum(m, s.max(axis=1))
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
                    norm = norm * alpha + p.sum(axis=1)
                    acc = [a * lax.broadcast_in_dim(alpha, a.shape, [0]) for a in acc]
                    p = p.astype(q.dtype)
                    plgpu.barrier_wait(kv_full.at[place * ring + v_slot])

                    pieces = columns_of(kv_smem.at[place, v_slot])

                    @pl.when(valid < block_kv)
                    def _():  # what lies behind the last key may be NaN, and 0 * NaN is NaN
                        for piece in pieces:
                            v = plgpu.load(piece, layout=wgmma_layout)
                            key = plgpu.broadcasted_iota(jnp.int32, (block_kv, width), 0, layout=wgmma_layout)
                            piece[...] = jnp.where(key < valid, v, jnp.zeros_like(v))
                        plgpu.commit_smem()

                    def values(o_ref, piece):
                        plgpu.wgmma(o_ref, p, piece)
                        return o_ref[...]

                    acc = [
                        a + pl.run_scoped(functools.partial(values, piece=piece), plgpu.ACC(a.shape, jnp.float32))
                        for a, piece in zip(acc, pieces, strict=True)
                    ]
                    plgpu.barrier_arrive(kv_free.at[place * ring + v_slot])
                    return acc, m_new, norm, entry + 2

                zeros = plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), wgmma_layout)
                acc = [zeros] * (h // width)
                m = plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), row_layout)
                norm = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row_layout)
                acc, m, norm, entry = _loop(jnp.where(keys == 0, 0, count), attend_tile, (acc, m, norm, entry))
                pl.when(j + 1 < num_items)(lambda: load_q(item + 1))

                norm_safe = jnp.maximum(norm, 1e-30)
                is_whole = count == num_tiles_of(keys)
                total = norm_safe
                if sinks_ref:
                    # Where all scores are far below the sink this is inf, and the output 0 as it should be.
                    sink = plgpu.load(sinks_ref[0].at[head], layout=row_layout, optimized=False)
                    total = norm_safe + jnp.exp2(sink - m + jnp.where(is_whole, jnp.float32(0), jnp.float32(-1e30)))
                o = [a * lax.broadcast_in_dim(1.0 / total, a.shape, [0]) for a in acc]
                slot = jnp.where(tile > 0, stream, streams + stream)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's output has left o_smem
                high = [x.astype(q.dtype) for x in o]
                for x, target in zip(high, columns_of(o_smem.at[place, 0]), strict=True):
                    target[...] = x

                @pl.when(is_whole)
                def _():
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_smem.at[place, 0, pl.ds(0, group)], out_ref.at[row, head])

                @pl.when(jnp.logical_not(is_whole))
                def _():
                    for x, y, target in zip(o, high, columns_of(o_smem.at[place, 1]), strict=True):
                        target[...] = (x - y.astype(jnp.float32)).astype(q.dtype)
                    lse_smem[place] = m + jnp.log2(norm_safe)
                    plgpu.commit_smem()
                    for x in range(2):
                        plgpu.copy_smem_to_gmem(o_smem.at[place, x, pl.ds(0, part_rows)], parts_ref.at[slot, x])
                    plgpu.copy_smem_to_gmem(lse_smem.at[place, pl.ds(0, q_rows)], lse_ref.at[slot])

                return jnp.int32(0), left - count, entry, next_keys

            _loop(num_items, attend_item, (first_tile, num_tiles, jnp.int32(0), first_keys))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((b, k_heads, group, h), q.dtype),
            jax.ShapeDtypeStruct((2 * streams, 2, part_rows, h), q.dtype),
            jax.ShapeDtypeStruct((2 * streams, q_rows), jnp.float32),
        ),
        grid=(t.num_sms,),
        grid_names=("sm",),
        num_threads=2 * per_sm,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        scratch_types=dict(
            q_smem=plgpu.SMEM((per_sm, _ROWS, h), q.dtype, transforms=tiled),
            kv_smem=plgpu.SMEM((per_sm, ring, block_kv, h), q.dtype, transforms=tiled),
            o_smem=plgpu.SMEM((per_sm, 2, _ROWS, h), q.dtype),
            lse_smem=plgpu.SMEM((per_sm, _ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_barriers=per_sm),
            kv_full=plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=per_sm * ring),
            kv_free=plgpu.Barrier(num_barriers=per_sm * ring),
        ),
        interpret=interpret,
    )(q, kv_pages, page_table, kv_lens, plan, *([] if sinks is None else [sinks]))
