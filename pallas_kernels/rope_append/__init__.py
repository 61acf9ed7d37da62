"""From the product that makes queries, keys and values to attention: norm and rotation, and the append to the pages."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.rope_append import gpu, reference

_IMPLEMENTATIONS = {"reference": reference.rope_append, "mosaic_gpu": gpu.rope_append}


def rope_append(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array] | None,
    kv_pages: jax.Array,
    write_index: jax.Array,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    *,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    q_rows: int | None = None,
    interleaved: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Norms and turns the queries and keys of a step's tokens, and writes keys and values into their pages.

    Args:
        qkv: ``[T, K, G + 2, H]``: of each token and kv head its G queries, its key and its value.
        tables: cos and sin of each token's position, ``[T, R / 2]`` f32; the pairs of the leading R elements turn (Su
            et al., 2021), the rest stays. None: nothing turns.
        kv_pages: ``[NP, K, 2, PS, H]``. Donated, it is written in place.
        write_index: ``[T]`` int32, ``page * PS + offset``, no two the same; outside of ``0 .. NP * PS - 1`` the token
            is written nowhere.
        q_norm, k_norm: ``[H]``, weights of an RMS norm of each query and key before it turns, rounded to qkv's dtype;
            both or neither.
        norm_eps: added to the mean square.
        norm_offset: added to the norms' weights (1 for Gemma).
        q_rows: rows of queries that each kv head gets in the output, at least G: the others may hold anything.
        interleaved: the pairs are (2i, 2i + 1), which come out in the other order, in place of (i, i + R / 2).
        implementation: of ``pallas_kernels.dispatch``; None is the reference, which runs everywhere.

    Returns:
        The queries ``[T, N, H]``, N = K * G, or ``[T, K, q_rows, H]``; and the pages. Computed in f32.

    Raises:
        ValueError: shapes that do not fit each other, with both numbers.
    """
    t, k_heads, width, h = qkv.shape
    if width < 3:
        raise ValueError(f"qkv {qkv.shape} must be [T, K, G + 2, H] with at least one query a kv head")
    if kv_pages.ndim != 5 or kv_pages.shape[1:3] != (k_heads, 2) or kv_pages.shape[4] != h:
        raise ValueError(f"kv_pages {kv_pages.shape} must be [NP, K={k_heads}, 2, PS, H={h}]")
    if write_index.shape != (t,):
        raise ValueError(f"write_index {write_index.shape} must be [T={t}]")
    if tables is not None and not (
        tables[0].shape == tables[1].shape == (t, tables[0].shape[-1]) and 0 < 2 * tables[0].shape[-1] <= h
    ):
        raise ValueError(f"tables {tables[0].shape} and {tables[1].shape} must be [T={t}, R / 2] with R at most H={h}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"of q_norm and k_norm, only {'k_norm' if q_norm is None else 'q_norm'} is given")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and weight.shape != (h,):
            raise ValueError(f"{name} {weight.shape} must be [H={h}]")
    if q_rows is not None and q_rows < width - 2:
        raise ValueError(f"q_rows={q_rows} must be at least the {width - 2} queries of a kv head")
    return dispatch.choose(_IMPLEMENTATIONS, implementation)(
        qkv,
        tables,
        kv_pages,
        write_index,
        q_norm,
        k_norm,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        q_rows=q_rows,
        interleaved=interleaved,
    )
