"""One decoder layer and its parts: pure functions on local shards, every collective in sight.

Shapes are those of one device: K and N count its own heads, F its own columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.cache import pages
from jaxserve.config import ModelConfig
from jaxserve.model.params import LayerParams
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import paged_attention


class StaticContext(NamedTuple):
    """What is fixed when a step is compiled."""

    config: ModelConfig
    num_decode_rows: int  # BD
    attention: Implementation  # of the paged attention kernel


class AttentionContext(NamedTuple):
    """What every layer of a step needs to know of its tokens."""

    cos: jax.Array  # [T, 1, H / 2] f32
    sin: jax.Array  # [T, 1, H / 2] f32
    kv_write_index: jax.Array  # [T]
    page_table: jax.Array  # [B, MP]
    kv_lens: jax.Array  # [B]
    prefill_cu_q_lens: jax.Array  # [BP + 1]


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x`` [..., in] times ``w`` [out, in] transposed, accumulated in f32, in x's dtype."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = lax.dot_general(
        x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32 (Zhang and Sennrich, 2019)."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``[T, 1, H / 2]`` of rotary embedding (Su et al., 2021) at ``positions`` [T]."""
    half = config.head_dim // 2
    inv_freq = config.ropes[0].theta ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [H / 2]
    angle = positions.astype(jnp.float32)[:, None, None] * inv_freq
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of ``x`` [T, heads, H]."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def psum_tensor(x: jax.Array) -> jax.Array:
    """Sum over the tensor axis; nothing where it has one device."""
    return lax.psum(x, "tensor") if lax.axis_size("tensor") > 1 else x


def attention(
    p: LayerParams, kv_pages: jax.Array, x: jax.Array, ctx: AttentionContext, static: StaticContext
) -> tuple[jax.Array, jax.Array]:
    """Attention block of ``x`` [T, D]; returns (its residual update [T, D], the pages with this step's K and V)."""
    k, width, h, d = p.qkv.shape  # [K, G + 2, H, D]
    t, group = x.shape[0], width - 2
    qkv = linear(x, p.qkv.reshape(k * width * h, d)).reshape(t, k, width, h)
    q = apply_rope(qkv[:, :, :group].reshape(t, k * group, h), ctx.cos, ctx.sin)  # [T, N, H]
    key = apply_rope(qkv[:, :, group], ctx.cos, ctx.sin)  # [T, K, H]
    kv = jnp.stack([key, qkv[:, :, group + 1]], axis=2)  # [T, K, 2, H]
    kv_pages = pages.append(kv_pages, kv, ctx.kv_write_index)
    out = paged_attention(
        q,
        kv_pages,
        ctx.page_table,
        ctx.kv_lens,
        ctx.prefill_cu_q_lens,
        num_decode_rows=static.num_decode_rows,
        sm_scale=h**-0.5,
        implementation=static.attention,
    )
    return psum_tensor(linear(out.astype(x.dtype).reshape(t, k * group * h), p.attn_out)), kv_pages


def mlp(p: LayerParams, x: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer, 2020) of ``x`` [T, D]."""
    two, f, d = p.gate_up.shape
    gate, up = jnp.split(linear(x, p.gate_up.reshape(two * f, d)), 2, axis=-1)  # [T, F] each
    return psum_tensor(linear(jax.nn.silu(gate) * up, p.down))


def decoder_layer(
    p: LayerParams, kv_pages: jax.Array, x: jax.Array, ctx: AttentionContext, static: StaticContext
) -> tuple[jax.Array, jax.Array]:
    """One pre-norm layer: ``x`` [T, D] and the layer's pages in, the same out."""
    eps = static.config.norm_eps
    update, kv_pages = attention(p, kv_pages, rms_norm(x, p.attn_norm, eps), ctx, static)
    x = x + update
    return x + mlp(p, rms_norm(x, p.mlp_norm, eps)), kv_pages
