"""The KV pages on the device: a tuple of per-layer arrays, donated every step.

Only this file and the kernels know their layout.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.config import CacheConfig, CacheDtype, ModelConfig, ParallelConfig
from jaxserve.model.stage_layers import layers_per_stage

# One entry for each layer of a stage; global shape [ST, NP, K, 2, PS, H]: keys and values of every kv head. Multi-head
# latent attention has [ST, NP, 1, 1, PS, RK + HR]: the latent is key and value of all heads. With a cache of int8 or
# fp8 an entry is ``QuantizedPages``.
KVPages = tuple[Any, ...]

# By ``CacheConfig.dtype``. An fp8 is kept as its byte: XLA for CPUs makes all of an fp8 array a wider one, to write or
# read a part of it.
NUMBERS = {"int8": jnp.int8, "fp8": jnp.uint8}
LARGEST = {"int8": 127.0, "uint8": 448.0}
SCALE_DTYPE = jnp.dtype(jnp.bfloat16)


@flax.struct.dataclass
class QuantizedPages:
    """One layer's pages of few bits: an element of K or V is its number times its vector's scale."""

    values: Any  # [..., NP, K, 2, PS, H] int8, or u8: an e4m3 each
    scale: Any  # [..., NP, K, 2, PS] bf16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


def kv_pages_shape(config: ModelConfig, cache: CacheConfig, num_stages: int) -> tuple[int, ...]:
    """Shape of one entry of ``KVPages``."""
    if config.mla is not None:
        latent = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        return (num_stages, cache.num_pages, 1, 1, cache.page_size, latent)
    return (num_stages, cache.num_pages, config.num_kv_heads, 2, cache.page_size, config.head_dim)


def kv_pages_of(shape: tuple[int, ...], dtype: jnp.dtype, cache: CacheConfig, make: Any) -> Any:
    """One entry of ``KVPages``, of arrays that ``make(shape, dtype)`` gives; ``dtype`` is that of what is computed."""
    if cache.dtype == "auto":
        return make(shape, dtype)
    return QuantizedPages(make(shape, jnp.dtype(NUMBERS[cache.dtype])), make(shape[:-1], SCALE_DTYPE))


def append(kv_pages: Any, kv: jax.Array, write_index: jax.Array) -> Any:
    """Writes the step's keys and values into their pages.

    Args:
        kv_pages: ``[NP, K, 2, PS, H]`` (latent: ``[NP, 1, 1, PS, RK + HR]``), or ``QuantizedPages`` of that shape.
        kv: ``[T, K, 2, H]`` (latent: ``[T, 1, 1, RK + HR]``).
        write_index: ``[T]``, page * PS + offset; ``NP * PS`` and beyond writes nowhere.
    """
    num_pages, heads, parts, page_size, _ = kv_pages.shape
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

    def write(pages: jax.Array, new: jax.Array) -> jax.Array:
        """``pages`` [NP, K, 2, PS, ...] with ``new`` [T, K, 2, ...] in its places."""
        flat = pages.reshape(-1, *pages.shape[4:])
        updates = new.astype(pages.dtype).reshape(-1, *flat.shape[1:])
        return flat.at[rows.reshape(-1)].set(updates, mode="drop", unique_indices=True).reshape(pages.shape)

    if isinstance(kv_pages, QuantizedPages):
        numbers, scale = rounded(kv, kv_pages.dtype)
        return QuantizedPages(write(kv_pages.values, numbers), write(kv_pages.scale, scale))
    return write(kv_pages, kv)


def rounded(kv: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Numbers of ``dtype`` (int8, or u8 for an e4m3), shaped as ``kv`` [..., H], and the scale [...] bf16 of each
    vector, whose largest element is the largest number; a vector of zeros has scale 1."""
    largest = LARGEST[jnp.dtype(dtype).name]
    kv = kv.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(kv), axis=-1) / largest).astype(SCALE_DTYPE)
    scale = jnp.where(scale > 0, scale, 1)
    # The scale was rounded: what is beyond the largest number by that is cut (an e4m3 would become NaN).
    numbers = jnp.clip(kv / scale.astype(jnp.float32)[..., None], -largest, largest)
    if dtype == jnp.int8:
        return jnp.round(numbers).astype(dtype), scale
    return lax.bitcast_convert_type(numbers.astype(jnp.float8_e4m3fn), dtype), scale


def values_and_scales(kv_pages: Any) -> tuple[jax.Array, jax.Array | None]:
    """What ``pallas_kernels.paged_attention`` takes as ``kv_pages`` and ``kv_scales``."""
    return (kv_pages.values, kv_pages.scale) if isinstance(kv_pages, QuantizedPages) else (kv_pages, None)


def kv_bytes_per_token(config: ModelConfig, itemsize: int, cache_dtype: CacheDtype) -> int:
    """Bytes that one token of context holds over all layers, its scales included, in a cache of ``cache_dtype`` or of
    what is computed, ``itemsize`` bytes an element."""
    if cache_dtype == "auto":
        return config.kv_bytes_per_token(itemsize)
    vectors = config.num_layers * (1 if config.mla is not None else 2 * config.num_kv_heads)
    return config.kv_bytes_per_token(jnp.dtype(NUMBERS[cache_dtype]).itemsize) + vectors * SCALE_DTYPE.itemsize


def page_bytes(
    config: ModelConfig, page_size: int, dtype: jnp.dtype, parallel: ParallelConfig, cache_dtype: CacheDtype = "auto"
) -> int:
    """Bytes that one page takes on one device, for as many layers as the largest stage has and its own heads."""
    tensor = 1 if config.mla is not None else parallel.tensor  # every device has the whole latent
    num_bytes = kv_bytes_per_token(config, jnp.dtype(dtype).itemsize, cache_dtype) * page_size
    return num_bytes // config.num_layers * layers_per_stage(config, parallel.stage) // tensor
