"""The KV pages on the device: a tuple of per-layer arrays, donated every step.

Only this file and the kernels know their layout.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.config import CacheConfig, ModelConfig, ParallelConfig

# One entry for each layer of a stage; global shape [ST, NP, K, 2, PS, H]: keys and values of every kv head. Multi-head
# latent attention has [ST, NP, 1, 1, PS, RK + HR]: the latent is key and value of all heads.
KVPages = tuple[Any, ...]


def kv_pages_shape(config: ModelConfig, cache: CacheConfig, num_stages: int) -> tuple[int, ...]:
    """Shape of one entry of ``KVPages``."""
    if config.mla is not None:
        latent = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        return (num_stages, cache.num_pages, 1, 1, cache.page_size, latent)
    return (num_stages, cache.num_pages, config.num_kv_heads, 2, cache.page_size, config.head_dim)


def append(kv_pages: jax.Array, kv: jax.Array, write_index: jax.Array) -> jax.Array:
    """Writes the step's keys and values into their pages.

    Args:
        kv_pages: ``[NP, K, 2, PS, H]`` (latent: ``[NP, 1, 1, PS, RK + HR]``).
        kv: ``[T, K, 2, H]`` (latent: ``[T, 1, 1, RK + HR]``).
        write_index: ``[T]``, page * PS + offset; ``NP * PS`` and beyond writes nowhere.
    """
    num_pages, heads, parts, page_size, width = kv_pages.shape
    if kv.shape[0] == 1:
        # XLA turns a scatter of one update into a dynamic-update-slice under a select, and copies the whole cache for
        # it. A second update that is dropped keeps the scatter, which is in place.
        nowhere = jnp.full((1,), num_pages * page_size, write_index.dtype)
        kv, write_index = jnp.concatenate([kv, kv]), jnp.concatenate([write_index, nowhere])
    # One update for each row of H, and no row twice, not even among those that are dropped: then XLA for GPUs simply
    # stores, where it would guard every element of 16 bits by an atomic exchange (8,192 tokens: 38 us against 159).
    tokens = jnp.arange(len(write_index), dtype=write_index.dtype)
    write_index = jnp.where(write_index < num_pages * page_size, write_index, num_pages * page_size + tokens)
    page, offset = write_index // page_size, write_index % page_size
    rows = page * (heads * parts * page_size) + offset  # [T], of the first head's first part
    rows = rows[:, None] + page_size * jnp.arange(heads * parts, dtype=rows.dtype)
    flat = kv_pages.reshape(-1, width)
    updates = kv.astype(kv_pages.dtype).reshape(-1, width)
    flat = flat.at[rows.reshape(-1)].set(updates, mode="drop", unique_indices=True)
    return flat.reshape(kv_pages.shape)


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype, parallel: ParallelConfig) -> int:
    """Bytes that one page takes on one device, over the layers of its stage and its own heads."""
    tensor = 1 if config.mla is not None else parallel.tensor  # every device has the whole latent
    return config.kv_bytes_per_token(jnp.dtype(dtype).itemsize) * page_size // (parallel.stage * tensor)
