"""Paged decode attention on Mosaic GPU (Hopper) of a cache of int8 or fp8 (e4m3) with a scale for each vector.

Items, streams, stretches and parts are those of ``gpu_decode``; what a stream does with a tile is another. Of half the
bytes the arithmetic of 64 padded rows would not hide behind the memory, so here the keys are the rows of the products
and the queries of a kv head, rounded up to 8, their columns: ``s^T = K q^T`` and ``o^T = V^T p^T``. The numbers of K go
from shared memory through registers, where they become bfloat16 (exactly: both types have 8 bits of mantissa or
fewer), into the matrix instruction; those of V once more through shared memory, because the instruction turns operands
of 16 bits only. No element is multiplied by a scale: K's multiply the rows of ``s^T``, V's those of ``p^T``.

The maximum over the keys crosses the warps of a warpgroup. Mosaic has one place in shared memory for such reductions in
a whole program, which two streams would share: here each has its own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_attention import gpu_split
from pallas_kernels.paged_attention.gpu_quantized_tiles import (
    KEYS,
    layout_of_columns,
    numbers_as_bf16,
    over_keys,
    scales_of_rows,
)
from pallas_kernels.paged_attention.gpu_split import Tuning

_LOG2E = math.log2(math.e)
_MAX_GROUP = 32  # query heads a kv head: more leave no room for the ring in shared memory
_LOADING_REGISTERS = 40
HEAD_DIMS = (64, 128)
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.uint8)}


def default_tuning(head_dim: int) -> Tuning:
    """As ``gpu_decode.default_tuning``; the same for every ``head_dim`` that is taken."""
    del head_dim
    return Tuning()


def refusal(head_dim: int, page_size: int, group: int, q_dtype: Any, kv_dtype: Any) -> str | None:
    """Why ``decode_attention`` does not take these shapes; None if it does."""
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {HEAD_DIMS}, those of a quantized cache"
    if page_size % 8 or (KEYS % page_size and page_size % KEYS):
        return f"page_size={page_size} must be a multiple of 8 that divides {KEYS}, or a multiple of {KEYS}"
    if group > _MAX_GROUP:
        return f"{group} query heads a kv head are more than {_MAX_GROUP}, of a quantized cache"
    if q_dtype != jnp.bfloat16 or kv_dtype not in DTYPES.values():
        return f"q is {q_dtype} and kv_pages {kv_dtype}; they must be bfloat16 and int8, or uint8 for the bytes of e4m3"
    return None


def query_rows(group: int) -> int:
    """Columns of the products: a multiple of 8. What those behind the first ``group`` hold reaches no other."""
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
    kv_scales: jax.Array,
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
        q: ``[B, N, H]`` bfloat16; H is one of ``HEAD_DIMS``, at most 32 query heads a kv head. With ``group``
            ``[B, K, query_rows(group), H]``, which spares a copy.
        kv_pages: ``[NP, K, 2, PS, H]`` int8, or uint8 for the bytes of e4m3; PS as of ``gpu_decode``.
        page_table: ``[B, MP]`` int32.
        kv_lens: ``[B]`` int32; 0 gives zeros.
        kv_scales: ``[NP, K, 2, PS]`` bfloat16. Contents of ``kv_pages`` and of this that no row reaches may be
            anything, NaN included.
        group, window, softcap, sinks: as of ``paged_attention``.
        tuning: None takes the defaults; ``block_kv`` is 64.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[B, N, H]``.

    Raises:
        ValueError: shapes that are not taken, with their numbers.
    """
    b, *_, h = q.shape
    t = tuning or default_tuning(h)
    k_heads, page_size = kv_pages.shape[1], kv_pages.shape[3]
    is_in_rows = group is not None
    group = group if group is not None else q.shape[1] // k_heads
    n, q_rows = k_heads * group, query_rows(group)
    if why := refusal(h, page_size, group, q.dtype, kv_pages.dtype):
        raise ValueError(why)
    if t.block_kv != KEYS:
        raise ValueError(f"block_kv={t.block_kv}: a tile of a quantized cache has {KEYS} keys")
    if kv_scales.dtype != jnp.bfloat16 or kv_scales.shape != kv_pages.shape[:-1]:
        raise ValueError(f"kv_scales {kv_scales.dtype}{kv_scales.shape} must be bfloat16{kv_pages.shape[:-1]}")
    plan = gpu_split.make_plan(kv_lens, page_table, page_size, k_heads, t, window)
    if sinks is not None:  # [K, 64], in units of log2
        sinks = jnp.pad(sinks.astype(jnp.float32).reshape(k_heads, group) * _LOG2E, ((0, 0), (0, 64 - group)))
    if is_in_rows and q.shape[2] != q_rows:
        raise ValueError(f"q {q.shape} must have {q_rows} rows for {group} queries a kv head")
    if not is_in_rows:  # XLA writes the padding with what produces q
        q = jnp.pad(q.reshape(b, k_heads, group, h), ((0, 0), (0, 0), (0, q_rows - group), (0, 0)))
    if kv_pages.dtype == jnp.uint8:  # the same bytes: XLA for GPUs copies nothing
        kv_pages = lax.bitcast_convert_type(kv_pages, jnp.float8_e4m3fn)
    out, parts, lse = _attend(
        q, kv_pages, kv_scales, page_table, kv_lens, plan, sinks, group, sm_scale, window, softcap, t, interpret
    )
    return gpu_split.combine(out, parts, lse, plan, sinks, t, interpret).reshape(b, n, h)


def _attend(
    q: jax.Array,  # [B, K, QR, H]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    kv_scales: jax.Array,  # [NP, K, 2, PS]
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
    """One stream: its stretch of tiles. Returns out [B, K, G, H], parts [2 S, 2, GP, H], lse [2 S, QR], as
    ``gpu_decode``."""
    b, k_heads, q_rows, h = q.shape
    page_size = kv_pages.shape[3]
    max_pages = page_table.shape[1]
    streams, per_sm = t.num_streams, t.streams_per_sm
    ring = t.ring * 128 // h
    pages_per_tile, tiles_per_page = max(1, KEYS // page_size), max(1, page_size // KEYS)
    rows = min(page_size, KEYS)  # of a page that a tile has
    part_rows = gpu_split.part_rows(group, h)
    scale = sm_scale * _LOG2E
    is_fp8 = kv_pages.dtype == jnp.float8_e4m3fn
    wgmma_layout, column_layout = plgpu.Layout.WGMMA, layout_of_columns()
    launched = 65536 // (128 * 2 * per_sm) // 8 * 8  # registers of a thread, as many as a block starts with
    registers = min(216, 2 * launched - _LOADING_REGISTERS)

    def kernel(
        q_ref,  # [B, K, QR, H]
        kv_ref,  # [NP, K, 2, PS, H]
        scales_ref,  # [NP, K, 2, PS]
        table_ref,  # [B, MP]
        lens_ref,  # [B]
        plan_ref,  # [S, F]
        *refs,  # with sinks: sinks_ref [K, 64]; then out_ref [B, K, G, H], parts_ref [2 S, 2, GP, H], lse_ref [2 S, QR]
        q_smem,  # [P, QR, H], P streams a multiprocessor
        kv_smem,  # [P, ring, 2, 64, H]
        scale_smem,  # [P, ring, pages, 2 or more, rows]: a page's are 128 bytes or more, as the copy engine demands
        v_smem,  # [P, 64, H] bf16
        p_smem,  # [P, QR, 64] bf16
        o_smem,  # [P, 2, QR, H]
        lse_smem,  # [P, 64], of which QR are used: the copy engine reads from multiples of 128 bytes
        reduced,  # [P, 256] f32
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
            return tile if window is None else tile + lax.div(jnp.maximum(keys - window, 0), jnp.int32(KEYS))

        def num_tiles_of(keys):
            tiles = lax.div(keys + (KEYS - 1), jnp.int32(KEYS))
            return jnp.maximum(tiles if window is None else tiles - tile_of_row(jnp.int32(0), keys), 1)

        @pl.when(warpgroup >= per_sm)
        def _load():
            plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")

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
                    load_pages(entry, head, ids, first + i, num_pages - page)
                    return entry + 1, next_ids

                next_row, _ = place_of(first_item + j + 1)
                next_keys = lens_ref[next_row]
                next_ids = page_ids(next_row, 0 if window is None else page_of(tile_of_row(jnp.int32(0), next_keys)))
                entry, _ = _loop(jnp.where(keys == 0, 0, count), load_tile, (entry, ids))
                return jnp.int32(0), left - count, entry, next_keys, next_ids

            def load_pages(entry, head, ids, tile, num_pages):
                slot = lax.rem(entry, jnp.int32(ring))
                full = kv_full.at[place * ring + slot]
                # The rows of a page that the tile has: all, or those of one of its tiles.
                part = pl.ds(lax.rem(tile, jnp.int32(tiles_per_page)) * rows if tiles_per_page > 1 else 0, rows)

                @pl.when(entry >= ring)
                def _():
                    plgpu.barrier_wait(kv_free.at[place * ring + slot])

                for p in range(pages_per_tile):

                    def copy(p=p):
                        for which in range(2):
                            source = kv_ref.at[ids[p], head, which, part]
                            target = kv_smem.at[place, slot, which, pl.ds(p * rows, rows)]
                            plgpu.copy_gmem_to_smem(source, target, full)
                        target = scale_smem.at[place, slot, p, pl.ds(0, 2)]
                        plgpu.copy_gmem_to_smem(scales_ref.at[ids[p], head, :, part], target, full)

                    if p == 0:
                        copy()
                    else:  # pages behind the last key are not read
                        pl.when(p < num_pages)(copy)

                        @pl.when(p >= num_pages)
                        def _():
                            for _ in range(3):
                                plgpu.barrier_arrive(full)

            first_ids = [plan_ref[stream, gpu_split.FIRST_PAGES + p] for p in range(pages_per_tile)]
            init = (first_tile, num_tiles, jnp.int32(0), first_keys, first_ids)
            _, _, entries, _, _ = _loop(num_items, load_item, init)

            @pl.loop(jnp.maximum(entries - ring, 0), entries)
            def _(entry):  # who waits on a barrier at all must see each of its phases
                plgpu.barrier_wait(kv_free.at[place * ring + lax.rem(entry, jnp.int32(ring))])

        @pl.when(warpgroup < per_sm)
        def _compute():
            plgpu.set_max_registers(registers, action="increase")
            scratch = reduced.at[place]

            def load_q(item):
                row, head = place_of(item)
                plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[place], q_full.at[place])

            def numbers(slot, which):
                """[64, H] of the ring, eight bits each, as the matrix instruction's left operand lies."""
                return plgpu.load(kv_smem.at[place, slot, which], layout=plgpu.Layout.WGMMA_UPCAST_2X)

            def down_rows(x, like):
                """[64] over the columns of [64, QR]."""
                return lax.broadcast_in_dim(x, like.shape, [0])

            def along_rows(x, like):
                """[QR] over the rows of [64 or H, QR]."""
                return lax.broadcast_in_dim(x, like.shape, [1])

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
                    valid = keys - (first + i) * KEYS  # keys of the tile, if less than all
                    slot = lax.rem(entry, jnp.int32(ring))
                    plgpu.barrier_wait(kv_full.at[place * ring + slot])
                    k = numbers_as_bf16(plgpu.layout_cast(numbers(slot, 0), wgmma_layout))

                    def scores(s_ref):
                        plgpu.wgmma(s_ref, k, q_smem.at[place].transpose((1, 0)))
                        v_smem[place] = numbers_as_bf16(numbers(slot, 1))  # while the product is made
                        return s_ref[...]

                    s = pl.run_scoped(scores, plgpu.ACC((KEYS, q_rows), jnp.float32))
                    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=wgmma_layout)
                    if is_fp8:

                        @pl.when(valid < KEYS)
                        def _():  # what lies behind the last key may be NaN, and 0 * NaN is NaN
                            row = plgpu.broadcasted_iota(jnp.int32, (KEYS, h), 0, layout=wgmma_layout)
                            v = plgpu.load(v_smem.at[place], layout=wgmma_layout)
                            v_smem[place] = jnp.where(row < valid, v, jnp.zeros_like(v))

                    k_scale, v_scale = (
                        scales_of_rows(scale_smem.at[place, slot, :, i], wgmma_layout, interpret).astype(jnp.float32)
                        for i in range(2)
                    )
                    if softcap is None:
                        s = s * down_rows(k_scale * scale, s)
                    else:
                        s = jnp.tanh(s * down_rows(k_scale * (sm_scale / softcap), s)) * (softcap * _LOG2E)
                    seen = key < valid
                    if window is not None:
                        seen &= key >= valid - window
                    s = jnp.where(seen, s, -jnp.inf)
                    m_new = jnp.maximum(m, over_keys(s, "max", scratch, interpret))
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - along_rows(m_new, s))
                    norm = norm * along_rows(alpha, s) + p
                    p = jnp.where(seen, p * down_rows(v_scale, p), 0.0)  # a scale may be NaN
                    p_smem.at[place].transpose((1, 0))[...] = p.astype(q.dtype)
                    plgpu.commit_smem()  # also: the copy engine may write where all this was read from
                    plgpu.barrier_arrive(kv_free.at[place * ring + slot])

                    def values(o_ref):
                        plgpu.wgmma(o_ref, v_smem.at[place].transpose((1, 0)), p_smem.at[place].transpose((1, 0)))
                        return o_ref[...]

                    seen_values = pl.run_scoped(values, plgpu.ACC((h, q_rows), jnp.float32))
                    return acc * along_rows(alpha, acc) + seen_values, m_new, norm, entry + 1

                acc = plgpu.layout_cast(jnp.zeros((h, q_rows), jnp.float32), wgmma_layout)
                m = plgpu.layout_cast(jnp.full((q_rows,), -jnp.inf, jnp.float32), column_layout)
                norm = plgpu.layout_cast(jnp.zeros((KEYS, q_rows), jnp.float32), wgmma_layout)
                acc, m, norm, entry = _loop(jnp.where(keys == 0, 0, count), attend_tile, (acc, m, norm, entry))
                pl.when(j + 1 < num_items)(lambda: load_q(item + 1))

                norm_safe = jnp.maximum(over_keys(norm, "add", scratch, interpret), 1e-30)
                is_whole = count == num_tiles_of(keys)
                total = norm_safe
                if sinks_ref:
                    # Where all scores are far below the sink this is inf, and the output 0 as it should be.
                    mine = sinks_ref[0].at[head, pl.ds(0, q_rows)]
                    sink = plgpu.load(mine, layout=column_layout, optimized=False)
                    total = norm_safe + jnp.exp2(sink - m + jnp.where(is_whole, jnp.float32(0), jnp.float32(-1e30)))
                o = acc * along_rows(1.0 / total, acc)
                target = jnp.where(tile > 0, stream, streams + stream)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's output has left o_smem
                high = o.astype(q.dtype)
                o_smem.at[place, 0].transpose((1, 0))[...] = high

                @pl.when(is_whole)
                def _():
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o_smem.at[place, 0, pl.ds(0, group)], out_ref.at[row, head])

                @pl.when(jnp.logical_not(is_whole))
                def _():
                    o_smem.at[place, 1].transpose((1, 0))[...] = (o - high.astype(jnp.float32)).astype(q.dtype)
                    lse_smem[place, pl.ds(0, q_rows)] = m + jnp.log2(norm_safe)
                    plgpu.commit_smem()
                    for x in range(2):
                        plgpu.copy_smem_to_gmem(o_smem.at[place, x, pl.ds(0, part_rows)], parts_ref.at[target, x])
                    plgpu.copy_smem_to_gmem(lse_smem.at[place, pl.ds(0, q_rows)], lse_ref.at[target])

                return jnp.int32(0), left - count, entry, next_keys

            _loop(num_items, attend_item, (first_tile, num_tiles, jnp.int32(0), first_keys))
            plgpu.wait_smem_to_gmem(0)

    tiles_16 = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    tiles_8 = plgpu.TilingTransform((8, h)), plgpu.SwizzleTransform(h)
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
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=dict(
            q_smem=plgpu.SMEM((per_sm, q_rows, h), q.dtype, transforms=tiles_16),
            kv_smem=plgpu.SMEM((per_sm, ring, 2, KEYS, h), kv_pages.dtype, transforms=tiles_8),
            scale_smem=plgpu.SMEM((per_sm, ring, pages_per_tile, max(2, 64 // rows), rows), kv_scales.dtype),
            v_smem=plgpu.SMEM((per_sm, KEYS, h), q.dtype, transforms=tiles_16),
            p_smem=plgpu.SMEM((per_sm, q_rows, KEYS), q.dtype, transforms=tiles_16),
            o_smem=plgpu.SMEM((per_sm, 2, q_rows, h), q.dtype),
            lse_smem=plgpu.SMEM((per_sm, 64), jnp.float32),
            reduced=plgpu.SMEM((per_sm, 256), jnp.float32),
            q_full=plgpu.Barrier(num_barriers=per_sm),
            kv_full=plgpu.Barrier(num_arrivals=3 * pages_per_tile, num_barriers=per_sm * ring),
            kv_free=plgpu.Barrier(num_barriers=per_sm * ring),
        ),
        interpret=interpret,
    )(q, kv_pages, kv_scales, page_table, kv_lens, plan, *([] if sinks is None else [sinks]))
