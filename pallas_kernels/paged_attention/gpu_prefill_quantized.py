"""How the chunks' kernel (``gpu_prefill``) reads a cache of int8 or fp8 (e4m3) with a scale for each vector.

The warpgroup that loads also turns the numbers into bfloat16, each times its vector's scale and rounded once, between
one ring of shared memory that the copy engine fills and the ring that those which multiply read: they are the bound of
this kernel, and know nothing of it. Both are one warpgroup, so that a place that was read can be filled again without
a barrier between two.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu
from pallas_kernels.paged_attention.gpu_quantized_tiles import numbers_as_bf16, scales_of_rows

_ROWS = 64  # keys that are converted together
# Registers of a thread: those that multiply, and the one that converts.
MULTIPLYING_REGISTERS, CONVERTING_REGISTERS = 208, 88


def scratch(head_dim: int, page_size: int, block_kv: int, raw: int, kv_dtype: Any, scale_dtype: Any) -> dict[str, Any]:
    """Shared memory that ``fill_ring`` needs, by its arguments' names: ``raw`` tiles on their way."""
    rows = min(page_size, _ROWS)
    tiles = plgpu.TilingTransform((8, head_dim)), plgpu.SwizzleTransform(head_dim)
    pages = block_kv // rows
    return dict(
        raw_smem=plgpu.SMEM((raw, 2, block_kv, head_dim), kv_dtype, transforms=tiles),
        # A page's scales of K and V are 128 bytes or more, as the copy engine demands.
        scale_smem=plgpu.SMEM((raw, pages, max(2, 64 // rows), rows), scale_dtype),
        raw_full=plgpu.Barrier(num_arrivals=3 * pages, num_barriers=raw),
    )


def fill_ring(
    kv_ref: Any,  # [NP, K, 2, PS, H]
    scales_ref: Any,  # [NP, K, 2, PS]
    page_id: Callable[[Any], Any],  # of a page of the row, or any id behind its last
    head: Any,
    first_tile: Any,
    num_tiles: Any,  # one behind the last
    row_keys: Any,
    kv_smem: Any,  # [ring, block_kv, H] bf16
    kv_full: Any,  # [ring], of one arrival
    kv_free: Any,  # [ring]
    raw_smem: Any,  # [raw, 2, block_kv, H]
    scale_smem: Any,  # [raw, pages, 2 or more, rows]
    raw_full: Any,  # [raw]
    *,
    page_size: int,
    interpret: Any,
) -> None:
    """Fills the ring with K and V of ``first_tile``, of the next, ...; values behind the row's last key are zeros."""
    raw, (ring, block_kv, _) = raw_smem.shape[0], kv_smem.shape
    rows = min(page_size, _ROWS)  # of a page that a copy has
    pages = block_kv // rows
    layout = plgpu.Layout.WGMMA_UPCAST_2X

    def page_ids(tile):
        first = tile * block_kv
        return [page_id(lax.div(first + p * rows, jnp.int32(page_size))) for p in range(pages)]

    def load(tile, ids):
        """Starts the copies of a tile; pages behind the row's last key are not read."""
        slot = lax.rem(tile - first_tile, jnp.int32(raw))
        full = raw_full.at[slot]
        for p in range(pages):
            key = tile * block_kv + p * rows  # the first

            def copy(p=p, key=key):
                page = ids[p]
                part = pl.ds(0 if rows == page_size else lax.rem(key, jnp.int32(page_size)), rows)
                for which in range(2):
                    target = raw_smem.at[slot, which, pl.ds(p * rows, rows)]
                    plgpu.copy_gmem_to_smem(kv_ref.at[page, head, which, part], target, full)
                plgpu.copy_gmem_to_smem(scales_ref.at[page, head, :, part], scale_smem.at[slot, p, pl.ds(0, 2)], full)

            pl.when(key < row_keys)(copy)

            @pl.when(key >= row_keys)
            def _():
                for _ in range(3):
                    plgpu.barrier_arrive(full)

    def convert(tile, which):
        slot = lax.rem(tile - first_tile, jnp.int32(raw))
        entry = 2 * (tile - first_tile) + which
        target = lax.rem(entry, jnp.int32(ring))

        @pl.when(entry >= ring)
        def _():
            plgpu.barrier_wait(kv_free.at[target])

        for start in range(0, block_kv, _ROWS):
            some = pl.ds(start, _ROWS)
            x = numbers_as_bf16(plgpu.load(raw_smem.at[slot, which, some], layout=layout))
            some_pages = pl.ds(start // rows, _ROWS // rows)
            scale = scales_of_rows(scale_smem.at[slot, some_pages, which], layout, interpret)
            piece = kv_smem.at[target, some]
            piece[...] = x * lax.broadcast_in_dim(scale, x.shape, [0])
            if which == 1:
                clean(piece, row_keys - tile * block_kv - start)
        plgpu.commit_smem()  # also: the copy engine may write where this was read from
        plgpu.barrier_arrive(kv_full.at[target])

    def clean(piece, valid):
        @pl.when(valid < _ROWS)
        def _():  # what lies behind the last key may be NaN, and 0 * NaN is NaN
            x = plgpu.load(piece, layout=layout)
            key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
            piece[...] = jnp.where(key < valid, x, jnp.zeros_like(x))

    first_tiles = [first_tile + i for i in range(raw)]
    for tile, ids in [(tile, page_ids(tile)) for tile in first_tiles]:
        pl.when(tile < num_tiles)(functools.partial(load, tile, ids))

    @pl.loop(first_tile, num_tiles)
    def _(tile):
        ids = page_ids(tile + raw)  # early: a read of device memory takes as long as a whole tile may
        plgpu.barrier_wait(raw_full.at[lax.rem(tile - first_tile, jnp.int32(raw))])
        for which in range(2):
            convert(tile, which)
        pl.when(tile + raw < num_tiles)(lambda: load(tile + raw, ids))
