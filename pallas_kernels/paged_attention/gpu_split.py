"""How paged decode attention is cut into equal stretches of work, and how rows that were cut are put together again.

See ``gpu_decode`` for streams, items and parts.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ without changing the result."""

    num_sms: int = 132
    streams_per_sm: int = 2
    block_kv: int = 64  # tokens of a tile
    ring: int = 4  # tiles of K or of V that a stream has in shared memory, for head_dim 128: twice that for 64
    min_tiles: int = 2  # a stream is not started for less, where the batch is too small for all of them
    launch_early: bool = False  # programmatic dependent launch

    @property
    def num_streams(self) -> int:
        return self.num_sms * self.streams_per_sm


# Fields of a stream's plan.
FIRST_ITEM, FIRST_TILE, NUM_TILES, NUM_ITEMS, FIRST_KEYS, NUM_PARTS, FIRST_PAGES = range(7)


def make_plan(
    kv_lens: jax.Array,
    page_table: jax.Array,
    page_size: int,
    num_kv_heads: int,
    tuning: Tuning,
    window: int | None = None,
) -> jax.Array:
    """The stretch of each stream: ``[S, 6 + pages a tile]`` int32, fields as named above.

    Item ``row * K + head`` has ``max(1, ceil(kv_len / block_kv))`` tiles, less those before the window, and
    ``FIRST_TILE`` counts from the first that is left. ``FIRST_KEYS`` and ``FIRST_PAGES`` repeat
    the first item's length and the page ids of its first tile here, so that a stream can start after one read.
    ``NUM_PARTS`` is for the combining kernel: the parts of the first item, if this stream holds the second of them,
    else 0.
    """
    streams = tuning.num_streams
    skipped = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0) // tuning.block_kv
    tiles = jnp.maximum(-(-kv_lens // tuning.block_kv) - skipped, 1)  # [B], of one head
    start = num_kv_heads * (jnp.cumsum(tiles) - tiles)  # [B], first tile of the row
    total = num_kv_heads * jnp.sum(tiles)
    stretch = jnp.maximum(-(-total // streams), tuning.min_tiles)
    first = jnp.arange(streams, dtype=jnp.int32) * stretch  # [S]
    count = jnp.clip(total - first, 0, stretch)  # [S]

    def locate(tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(row, head, tile within the item) at places of the line."""
        row = jnp.sum(start[None, :] <= tile[:, None], axis=1) - 1  # by comparing: a search would be a loop
        within = tile - start[row]
        return row, within // tiles[row], within % tiles[row]

    row, head, tile = locate(jnp.minimum(first, total - 1))
    last_row, last_head, _ = locate(jnp.minimum(first + count, total) - 1)
    item, item_tiles = row * num_kv_heads + head, tiles[row]
    item_start = first - tile
    is_second = (count > 0) & (tile > 0) & (item_start >= first - stretch)
    last_stream = (item_start + item_tiles - 1) // stretch
    parts = jnp.where(is_second, last_stream - jnp.arange(streams) + 2, 0)
    items = jnp.where(count > 0, last_row * num_kv_heads + last_head - item + 1, 0)
    pages_per_tile = max(1, tuning.block_kv // page_size)
    page = (skipped[row] + tile)[:, None] * tuning.block_kv // page_size + jnp.arange(pages_per_tile)
    pages = page_table[row[:, None], jnp.minimum(page, page_table.shape[1] - 1)]  # [S, pages a tile]
    fields = jnp.stack([item, tile, count, items, kv_lens[row], parts], axis=1)
    return jnp.concatenate([fields, pages], axis=1).astype(jnp.int32)


def _combined_rows(head_dim: int) -> int:
    """Query heads that one program combines: as many as fill the lanes of a warpgroup evenly."""
    return math.lcm(head_dim, 128) // head_dim


def part_rows(group: int, head_dim: int) -> int:
    """GP: rows of a part, its ``group`` query heads rounded up."""
    rows = _combined_rows(head_dim)
    return -(-group // rows) * rows


def combine(
    out: jax.Array,  # [B, K, G, H]
    parts: jax.Array,  # [2 S, 2, GP, H]
    lse: jax.Array,  # [2 S, QR]
    plan: jax.Array,  # [S, F]
    sinks: jax.Array | None,  # [K, 64], in units of log2
    t: Tuning,
    interpret: Any,
) -> jax.Array:  # [B, K, G, H]
    """Writes the split items into ``out``, in place.

    One program: one query head (two of 64, four of 96) of the item whose second part is the stream's.
    """
    group, h = out.shape[2:]
    streams, k_heads = t.num_streams, out.shape[1]
    rows = _combined_rows(h)
    width, blocks = rows * h, parts.shape[2] // rows
    unroll = 8  # parts whose loads are in flight together
    parts = parts.reshape(2 * streams, 2, blocks, width)
    layout = plgpu.Layout.WG_STRIDED((width,), 1)

    def kernel(
        parts_ref,  # [2 S, 2, GP / rows, width]
        lse_ref,  # [2 S, QR]
        plan_ref,  # [S, F]
        *refs,  # with sinks: sinks_ref [K, 64]; then out_ref [B, K, G, H], written where split; o_smem [width]
    ):
        *sinks_ref, out_ref, o_smem = refs
        stream, block = lax.axis_index("stream"), lax.axis_index("block")
        if t.launch_early:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        item, count = plan_ref[stream, FIRST_ITEM], plan_ref[stream, NUM_PARTS]

        @pl.when(count > 0)
        def _():
            lane = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)

            def by_row(values):  # one scalar a row, spread over the lanes of the row
                spread = jnp.full((width,), values[0], jnp.float32)
                for r in range(1, rows):
                    spread = jnp.where(lane >= r * h, values[r], spread)
                return plgpu.layout_cast(spread, layout)

            def body(i, carry):
                acc, m, norm = carry
                loaded = []
                for u in range(unroll):
                    part = i * unroll + u
                    slot = jnp.where(part == 0, streams - 1, jnp.minimum(part, count - 1) - 1) + stream
                    value = [plgpu.load(parts_ref.at[slot, x, block], layout=layout) for x in range(2)]
                    weight = [jnp.where(part < count, lse_ref[slot, block * rows + r], -jnp.inf) for r in range(rows)]
                    loaded.append((value, by_row(weight)))
                m_new = functools.reduce(jnp.maximum, [w for _, w in loaded], m)
                alpha = jnp.exp2(m - m_new)
                acc, norm = acc * alpha, norm * alpha
                for (high, low), weight in loaded:
                    p = jnp.exp2(weight - m_new)
                    acc = acc + (high.astype(jnp.float32) + low.astype(jnp.float32)) * p
                    norm = norm + p
                return acc, m_new, norm

            zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            low = plgpu.layout_cast(jnp.full((width,), -jnp.inf, jnp.float32), layout)
            acc, m, norm = lax.fori_loop(
                jnp.int32(0), lax.div(count + (unroll - 1), jnp.int32(unroll)), body, (zero, low, zero)
            )
            row, head = lax.div(item, jnp.int32(k_heads)), lax.rem(item, jnp.int32(k_heads))
            if sinks_ref:
                norm = norm + jnp.exp2(by_row([sinks_ref[0][head, block * rows + r] for r in range(rows)]) - m)
            o_smem[...] = (acc / norm).astype(out.dtype)
            plgpu.commit_smem()
            for r in range(rows):

                @pl.when(block * rows + r < group)
                def _(r=r):
                    plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(r * h, h)], out_ref.at[row, head, block * rows + r])

            plgpu.wait_smem_to_gmem(0)

    out_ref = jax.new_ref(out)
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(streams, blocks),
        grid_names=("stream", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[plgpu.SMEM((width,), out.dtype)],
        interpret=interpret,
    )(parts, lse, plan, *([] if sinks is None else [sinks]), out_ref)
    return jax.freeze(out_ref)
