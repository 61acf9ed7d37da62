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
    page_size = kv_pages.shape[3]
    if kv.shape[0] == 1:
        # XLA turns a scatter of one update into a dynamic-update-slice under a select, and copies the whole cache for
        # it. A second update that is dropped keeps the scatter, which is in place.
        nowhere = jnp.full((1,), kv_pages.shape[0] * page_size, write_index.dtype)
        kv, write_index = jnp.concatenate([kv, kv]), jnp.concatenate([write_index, nowhere])
    page, offset = write_index // page_size, write_index % page_size
    return kv_pages.at[page, :, :, offset].set(kv.astype(kv_pages.dtype), mode="drop")


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype, parallel: ParallelConfig) -> int:
    """Bytes that one page takes on one device, over the layers of its stage and its own heads."""
    tensor = 1 if config.mla is not None else parallel.tensor  # every device has the whole latent
    return config.kv_bytes_per_token(jnp.dtype(dtype).itemsize) * page_size // (parallel.stage * tensor)
