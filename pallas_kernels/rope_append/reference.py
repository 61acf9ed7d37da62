"""Rotation and append in plain jnp: the specification of ``rope_append``, and how it runs on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax


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
) -> tuple[jax.Array, jax.Array]:
    """See ``pallas_kernels.rope_append.rope_append``."""
    t, k_heads, width, h = qkv.shape
    group, (num_pages, _, _, page_size, _) = width - 2, kv_pages.shape
    q, key, value = qkv[:, :, :group], qkv[:, :, group:-1], qkv[:, :, -1]
    if q_norm is not None and k_norm is not None:
        q, key = (_normed(x, w, norm_eps, norm_offset) for x, w in ((q, q_norm), (key, k_norm)))
    if tables is not None:
        q, key = (_turned(x, tables, interleaved) for x in (q, key))
    kv = jnp.stack([key[:, :, 0], value], axis=2).astype(kv_pages.dtype)  # [T, K, 2, H]
    in_pages = (write_index >= 0) & (write_index < num_pages * page_size)
    page = jnp.where(in_pages, write_index // page_size, num_pages)
    kv_pages = kv_pages.at[page, :, :, write_index % page_size].set(kv, mode="drop")
    if q_rows is None:
        return q.reshape(t, k_heads * group, h), kv_pages
    return jnp.pad(q, ((0, 0), (0, 0), (0, q_rows - group), (0, 0))), kv_pages


def _normed(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def _turned(x: jax.Array, tables: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """Pairs of the leading R elements of ``x`` [T, K, rows, H]."""
    cos, sin = (table[:, None, None] for table in tables)  # [T, 1, 1, R / 2]
    half = cos.shape[-1]
    turning = x[..., : 2 * half].astype(jnp.float32)
    first, second = (
        (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    )
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
