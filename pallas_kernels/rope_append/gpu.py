"""Rotation of queries and keys, and the append of keys and values, in one kernel on Mosaic GPU (Hopper).

One program has one token with all its heads, and everything in registers: no shared memory, no barrier, no descriptor
that the copy engine would have to fetch. The heads are the rows of what one load takes, so that a token's keys of all
heads, which lie at the same place of each head's part of a page, are one strided store. A pair that turns together lies
in two loads of the same layout: nothing moves between threads but the sums of squares of a norm.
"""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import mosaic, pl, plgpu

mgpu: Any = mosaic

_LANES, _WARPS = 32, 4  # of a warpgroup
_VECTOR = 8  # elements of 16 bits that a thread moves at once, at most
_MAX_ELEMENTS = 256  # of a token that a thread may hold: more than this and registers spill


def needs(
    *,
    k_heads: int,
    group: int,
    head_dim: int,
    rotary_dims: Collection[int],
    interleaved: bool,
    dtype: Any,
    kv_dtype: Any,
) -> frozenset[str] | None:
    """What these shapes need of the kernel, in the words of ``dispatch.MOSAIC_GPU_CHECKED``; None where it does not
    take them. ``rotary_dims`` are those of all layers, 0 where nothing turns; ``interleaved`` if any layer's pairs are.
    """
    refused = [refusal(k_heads, group, head_dim, r, dtype, kv_dtype, interleaved) for r in rotary_dims]
    return None if any(refused) else frozenset({"rope_append", f"rope_append head_dim {head_dim}"})


def refusal(
    k_heads: int, group: int, head_dim: int, rotary_dim: int, dtype: Any, kv_dtype: Any, interleaved: bool
) -> str | None:
    """Why ``rope_append`` does not take these shapes; None if it does. ``rotary_dim`` is 0 without rotation."""
    if dtype != jnp.bfloat16 or kv_dtype != jnp.bfloat16:
        return f"qkv is {dtype} and kv_pages {kv_dtype}; both must be bfloat16"
    if interleaved:
        return "interleaved=True: pairs that lie side by side are not in the Hopper kernel"
    if head_dim % 16 or rotary_dim % 16:
        return f"head_dim={head_dim} and rotary_dim={rotary_dim} must be multiples of 16"
    elements = _token_elements(k_heads, group, head_dim, rotary_dim)
    if elements > _MAX_ELEMENTS:
        return f"{k_heads} kv heads of {group} + 2 vectors are {elements} elements a thread, more than {_MAX_ELEMENTS}"
    return None


def _power_of_2(n: int, limit: int) -> int:
    """The largest power of two that divides ``n``, at most ``limit``."""
    return min(n & -n, limit)


@functools.cache
def _arrangement(rows: int, columns: int) -> tuple[int, int, int, int]:
    """(elements a thread has of [rows, columns], elements of a vector, lanes along columns, lanes along rows): the
    fewest elements, then the longest vectors. Threads for which nothing is left repeat what others do."""
    found = []
    vector = _VECTOR
    while vector:
        if columns % vector == 0:
            across = _power_of_2(columns // vector, _LANES)
            down = _power_of_2(rows, _LANES // across)
            warps = _power_of_2(rows // down, _WARPS)
            found.append((rows * columns // (across * down * warps), -vector, across, down))
        vector //= 2
    elements, vector, across, down = min(found)
    return elements, -vector, across, down


def _layout(rows: int, columns: int) -> Any:
    """How the threads share an array [rows, columns]: warps along rows, a warp's lanes along columns, then rows."""
    _, vector, across, down = _arrangement(rows, columns)
    warps = _power_of_2(rows // down, _WARPS)

    def shared(dim: int, size: int, all_of: int) -> tuple[Any, ...]:
        return (dim,) if size == all_of else (dim, plgpu.Replicated(all_of // size))

    layout = mgpu.TiledLayout(
        plgpu.Tiling(((warps * down, across * vector), (down, across * vector), (vector,))),
        warp_dims=shared(-5, warps, _WARPS),
        lane_dims=(-3, *shared(-2, across * down, _LANES)),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _parts(head_dim: int, rotary_dim: int) -> list[tuple[int, int]]:
    """(first, size) of what one load takes of a vector: the two halves of what turns, and the rest."""
    half = rotary_dim // 2
    return [p for p in ((0, half), (half, half), (rotary_dim, head_dim - rotary_dim)) if p[1]]


def _rows_are_groups(k_heads: int, group: int, head_dim: int, rotary_dim: int) -> bool:
    """Whether the rows of a load of queries are one kv head's, and not one query of each kv head."""

    def elements(rows: int, times: int) -> int:
        return times * sum(_arrangement(rows, size)[0] for _, size in _parts(head_dim, rotary_dim))

    return elements(group, k_heads) < elements(k_heads, group)


def _token_elements(k_heads: int, group: int, head_dim: int, rotary_dim: int) -> int:
    """Elements that a thread holds of one token."""
    by_group = _rows_are_groups(k_heads, group, head_dim, rotary_dim)
    rows, times = (group, k_heads) if by_group else (k_heads, group)
    parts = [size for _, size in _parts(head_dim, rotary_dim)]
    queries = times * sum(_arrangement(rows, size)[0] for size in parts)
    return queries + sum(_arrangement(k_heads, size)[0] for size in (*parts, head_dim))


@functools.partial(jax.jit, static_argnames=("norm_eps", "norm_offset", "q_rows", "interleaved", "interpret"))
def rope_append(
    qkv: jax.Array,  # [T, K, G + 2, H]
    tables: tuple[jax.Array, jax.Array] | None,  # [T, R / 2]
    kv_pages: jax.Array,  # [NP, K, 2, PS, H]
    write_index: jax.Array,  # [T]
    q_norm: jax.Array | None = None,  # [H]
    k_norm: jax.Array | None = None,  # [H]
    *,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    q_rows: int | None = None,
    interleaved: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See ``pallas_kernels.rope_append.rope_append``."""
    t, k_heads, width, h = qkv.shape
    group, (num_pages, _, _, page_size, _) = width - 2, kv_pages.shape
    half = 0 if tables is None else tables[0].shape[-1]
    if why := refusal(k_heads, group, h, 2 * half, qkv.dtype, kv_pages.dtype, interleaved):
        raise ValueError(why)
    num_slots = num_pages * page_size
    parts = _parts(h, 2 * half)
    by_group = _rows_are_groups(k_heads, group, h, 2 * half)
    has_norm = q_norm is not None
    optional = [*(tables or ()), *((q_norm, k_norm) if has_norm else ())]

    def kernel(
        qkv_ref,  # [T, K, G + 2, H]
        index_ref,  # [T]
        *refs,  # cos_ref, sin_ref [T, R / 2] with rotation; q_norm_ref, k_norm_ref [H] with norms; kv_ref; q_ref
    ):
        # kv_ref [NP, K, 2, PS, H] is written in place; q_ref is [T, K, QR, H], of which the first G rows are written.
        table_refs, norm_refs, (kv_ref, q_ref) = refs[: 2 * bool(half)], refs[-4:-2], refs[-2:]
        token = lax.axis_index("token")
        index = index_ref[token]

        def load(source, rows):
            """``source`` [rows, H] in parts, as they lie."""
            return [
                plgpu.load(source.at[:, pl.ds(first, size)], layout=_layout(rows, size), optimized=False)
                for first, size in parts
            ]

        def spread(ref, first, size, rows):
            """[rows, size] f32 of elements from ``first`` on of a vector, the same in every row."""
            layout = _layout(rows, size)
            line = plgpu.load(ref.at[pl.ds(first, size)], layout=layout.reduce(0), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(line.astype(jnp.float32), (rows, size), [1]), layout)

        def normed(x, norm_ref, rows):
            """As the model's own norm: rounded before it is turned."""
            x = [part.astype(jnp.float32) for part in x]
            squares = functools.reduce(lambda a, b: a + b, [jnp.sum(part * part, axis=1) for part in x])
            factor = lax.rsqrt(squares * (1 / h) + norm_eps)
            return [
                (
                    part
                    * lax.broadcast_in_dim(factor, part.shape, [0])
                    * (spread(norm_ref, first, size, rows) + norm_offset)
                ).astype(qkv.dtype)
                for part, (first, size) in zip(x, parts, strict=True)
            ]

        def turned(x, rows):
            if not half:
                return x
            cos, sin = (spread(ref.at[token], 0, half, rows) for ref in table_refs)
            first, second = (part.astype(jnp.float32) for part in x[:2])
            y = first * cos - second * sin, second * cos + first * sin
            return [*(part.astype(qkv.dtype) for part in y), *x[2:]]

        def store(x, target):
            for part, (first, size) in zip(x, parts, strict=True):
                target.at[:, pl.ds(first, size)][...] = part

        def rows_of(ref, i):
            """Queries [rows, H] number ``i`` of a token's."""
            return ref.at[token, i, pl.ds(0, group)] if by_group else ref.at[token, :, i]

        rows, times = (group, k_heads) if by_group else (k_heads, group)
        # All loads before the first store, so that they are on their way together.
        queries = [load(rows_of(qkv_ref, i), rows) for i in range(times)]
        key = load(qkv_ref.at[token, :, group], k_heads)
        value = plgpu.load(qkv_ref.at[token, :, group + 1], layout=_layout(k_heads, h), optimized=False)
        if has_norm:
            queries = [normed(x, norm_refs[0], rows) for x in queries]
            key = normed(key, norm_refs[1], k_heads)
        for i, x in enumerate(queries):
            store(turned(x, rows), rows_of(q_ref, i))
        key = turned(key, k_heads)

        @pl.when((index >= 0) & (index < num_slots))
        def _():
            page, offset = lax.div(index, jnp.int32(page_size)), lax.rem(index, jnp.int32(page_size))
            store(key, kv_ref.at[page, :, 0, offset])
            kv_ref.at[page, :, 1, offset][...] = value

    pages_ref = jax.new_ref(kv_pages)
    q = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((t, k_heads, q_rows or group, h), qkv.dtype),
        grid=(t,),
        grid_names=("token",),
        # Nothing is shared between threads: the barriers around every store would guard nothing.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(qkv, write_index, *optional, pages_ref)
    q = q if q_rows else q.reshape(t, k_heads * group, h)
    return q, jax.freeze(pages_ref)
