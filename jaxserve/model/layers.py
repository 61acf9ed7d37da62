"""One decoder layer and its parts: pure functions on local shards, every collective in sight.

Shapes are those of one device: K and N count its own heads, F its own columns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.cache import pages
from jaxserve.config import MLAConfig, ModelConfig
from jaxserve.model import lora as adapters
from jaxserve.model import moe
from jaxserve.model.linear import activate, linear, psum_tensor
from jaxserve.model.lora import Lora
from jaxserve.model.params import LayerParams
from jaxserve.model.rope import apply_rope
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention import paged_attention, query_rows
from pallas_kernels.rope_append import gpu as hopper_rope_append
from pallas_kernels.rope_append import rope_append


class StaticContext(NamedTuple):
    """What is fixed when a step is compiled."""

    config: ModelConfig  # of ``parallel.placed.placed_config``
    num_decode_rows: int  # BD
    attention: Implementation  # of the paged attention kernel
    grouped_matmul: Implementation  # of the experts' product
    rope_append: Implementation  # of norm, rotation and append; "reference" is what XLA makes of ``rotated``


class LayerKind(NamedTuple):
    """What tells the layers of one model apart: layers of one kind are one traced function."""

    window: int | None
    rope: int | None  # index into ``ModelConfig.ropes``
    is_moe: bool


class AttentionContext(NamedTuple):
    """What every layer of a step needs to know of its tokens."""

    ropes: tuple[tuple[jax.Array, jax.Array], ...]  # cos and sin [T, 1, R / 2] of each of ``ModelConfig.ropes``
    kv_write_index: jax.Array  # [T]
    page_table: jax.Array  # [B, MP]
    kv_lens: jax.Array  # [B]
    prefill_cu_q_lens: jax.Array  # [BP + 1]


def layer_kind(config: ModelConfig, layer: int) -> LayerKind:
    return LayerKind(config.window(layer), config.rope(layer), config.is_moe(layer))


def rope_append_needs(config: ModelConfig, tensor: int, cache_dtype: jnp.dtype) -> frozenset[str] | None:
    """The variants that all layers need of the Hopper kernel that norms, rotates and appends, on each of ``tensor``
    devices; None if there is one that it does not take.

    ``cache_dtype`` is that of the pages: what is computed has it too, or they are quantized and not taken.
    """
    if config.mla is not None or config.qk_norm == "full":
        return None
    indices = {config.rope(layer) for layer in range(config.num_layers)}
    ropes = [None if i is None else config.ropes[i] for i in indices]
    return hopper_rope_append.needs(
        k_heads=config.num_kv_heads // tensor,
        group=config.num_heads // config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_dims=[0 if rope is None else rope.rotary_dim or config.head_dim for rope in ropes],
        interleaved=any(rope is not None and rope.interleaved for rope in ropes),
        dtype=cache_dtype,
        kv_dtype=cache_dtype,
    )


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig, eps: float | None = None) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32 (Zhang and Sennrich, 2019), with the model's epsilon unless
    ``eps`` is another."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + (config.norm_eps if eps is None else eps))
    return (y * (weight.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, config: ModelConfig) -> jax.Array:
    """The model's norm of ``x`` [..., D]: RMS, or layer norm (Ba et al., 2016) with a bias."""
    if config.norm == "rms":
        return rms_norm(x, weight, config)
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    y = y * (weight.astype(jnp.float32) + config.norm_offset)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def norm_all_heads(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """RMS norm of ``x`` [T, ...] over all heads of all devices of the tensor axis at once, ``weight`` [...]."""
    x32, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
    size = weight.size * lax.axis_size("tensor")
    mean = psum_tensor(jnp.sum(x32 * x32, axis=axes, keepdims=True)) / size
    y = x32 * lax.rsqrt(mean + config.norm_eps)
    return (y * (weight.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)


def attention(
    p: LayerParams,
    kv_pages: jax.Array,
    x: jax.Array,
    ctx: AttentionContext,
    static: StaticContext,
    kind: LayerKind,
    lora: Lora | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention block of ``x`` [T, D]; returns (its residual update [T, D], the pages with this step's K and V)."""
    config = static.config
    k, width, h, d = p.qkv.shape  # [K, G + 2, H, D]
    t, group = x.shape[0], width - 2
    bias = None if p.qkv_bias is None else p.qkv_bias.reshape(-1)
    qkv = linear(x, p.qkv.reshape(k * width * h, d), bias).reshape(t, k, width, h)
    if lora is not None:
        qkv = qkv + adapters.qkv_update(lora, x)
    in_rows = None  # queries of a kv head, where they lie in rows of their own
    if static.rope_append == "reference":
        q, kv_pages = rotated(p, kv_pages, qkv, ctx, config, kind)
    else:
        # Where all are decode rows, the queries are laid out as attention reads them.
        q_rows = query_rows(group, static.attention) if ctx.prefill_cu_q_lens.shape[0] == 1 else None
        in_rows = None if q_rows is None else group
        q, kv_pages = rope_append(
            qkv,
            None if kind.rope is None else jax.tree.map(lambda x: x[:, 0], ctx.ropes[kind.rope]),
            kv_pages,
            ctx.kv_write_index,
            p.q_norm,
            p.k_norm,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
            q_rows=q_rows,
            implementation=static.rope_append,
        )
    values, scales = pages.values_and_scales(kv_pages)
    out = paged_attention(
        q,
        values,
        ctx.page_table,
        ctx.kv_lens,
        ctx.prefill_cu_q_lens,
        num_decode_rows=static.num_decode_rows,
        sm_scale=h**-0.5 if config.attn_scale is None else config.attn_scale,
        group=in_rows,
        window=kind.window,
        softcap=config.attn_softcap,
        sinks=None if p.sinks is None else p.sinks.reshape(-1),
        kv_scales=scales,
        implementation=static.attention,
    )  # [T, N, H]
    return attention_output(p, out, lora), kv_pages


def rotated(
    p: LayerParams,
    kv_pages: Any,
    qkv: jax.Array,
    ctx: AttentionContext,
    config: ModelConfig,
    kind: LayerKind,
) -> tuple[jax.Array, Any]:
    """Queries [T, N, H] of ``qkv`` [T, K, G + 2, H], normed and turned, and the pages with its keys and values."""
    t, k, width, h = qkv.shape
    group = width - 2
    q, key = qkv[:, :, :group], qkv[:, :, group]  # [T, K, G, H], [T, K, H]
    if config.qk_norm == "head":
        q, key = rms_norm(q, p.q_norm, config), rms_norm(key, p.k_norm, config)
    elif config.qk_norm == "full":
        q, key = norm_all_heads(q, p.q_norm, config), norm_all_heads(key, p.k_norm, config)
    q = q.reshape(t, k * group, h)  # [T, N, H]
    if kind.rope is not None:
        interleaved = config.ropes[kind.rope].interleaved
        q = apply_rope(q, ctx.ropes[kind.rope], interleaved=interleaved)
        key = apply_rope(key, ctx.ropes[kind.rope], interleaved=interleaved)
    kv = jnp.stack([key, qkv[:, :, group + 1]], axis=2)  # [T, K, 2, H]
    return q, pages.append(kv_pages, kv, ctx.kv_write_index)


def attention_output(p: LayerParams, out: jax.Array, lora: Lora | None) -> jax.Array:
    """The heads' outputs [T, N, H] through the output matrix: [T, D]."""
    out = out.reshape(out.shape[0], -1)
    update = linear(out, p.attn_out)
    if lora is not None:
        update = update + adapters.attn_out_update(lora, out)
    update = psum_tensor(update)
    return update if p.attn_out_bias is None else update + p.attn_out_bias


def latent_attention(
    p: LayerParams,
    kv_pages: jax.Array,
    x: jax.Array,
    ctx: AttentionContext,
    static: StaticContext,
    kind: LayerKind,
    lora: Lora | None,
    mla: MLAConfig,
) -> tuple[jax.Array, jax.Array]:
    """As ``attention``, multi-head latent attention (DeepSeek-V2, 2024): queries are taken to the latent's space, so
    that all heads read the one latent a token has, and their outputs back from it."""
    config = static.config
    n, q_dim, _ = p.q_up.shape  # [N, HN + HR, RQ]
    t, rank = x.shape[0], mla.kv_lora_rank
    q_in = x if p.q_down is None else rms_norm(linear(x, p.q_down), p.q_down_norm, config, mla.norm_eps)
    q = linear(q_in, p.q_up.reshape(n * q_dim, -1)).reshape(t, n, q_dim)
    q, q_rope = jnp.split(q, [mla.qk_nope_head_dim], axis=-1)  # [T, N, HN], [T, N, HR]
    latent, key_rope = jnp.split(linear(x, p.kv_down), [rank], axis=-1)  # [T, RK], [T, HR]
    latent, key_rope = rms_norm(latent, p.kv_down_norm, config, mla.norm_eps), key_rope[:, None]
    if kind.rope is not None:
        interleaved = config.ropes[kind.rope].interleaved
        q_rope = apply_rope(q_rope, ctx.ropes[kind.rope], interleaved=interleaved)
        key_rope = apply_rope(key_rope, ctx.ropes[kind.rope], interleaved=interleaved)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    q = jnp.einsum("tnh,nhr->tnr", q, p.k_up, precision=precision)  # [T, N, RK]
    kv = jnp.concatenate([latent, key_rope[:, 0]], axis=-1)[:, None, None]  # [T, 1, 1, RK + HR]
    kv_pages = pages.append(kv_pages, kv, ctx.kv_write_index)
    values, scales = pages.values_and_scales(kv_pages)
    out = paged_attention(
        jnp.concatenate([q, q_rope], axis=-1),
        values,
        ctx.page_table,
        ctx.kv_lens,
        ctx.prefill_cu_q_lens,
        num_decode_rows=static.num_decode_rows,
        sm_scale=q_dim**-0.5 if config.attn_scale is None else config.attn_scale,
        window=kind.window,
        softcap=config.attn_softcap,
        value_dim=rank,
        kv_scales=scales,
        implementation=static.attention,
    )  # [T, N, RK]
    out = jnp.einsum("tnr,nvr->tnv", out, p.v_up, precision=precision)  # [T, N, HV]
    return attention_output(p, out, lora), kv_pages


def mlp(p: LayerParams, x: jax.Array, config: ModelConfig, lora: Lora | None) -> jax.Array:
    """Feed-forward block of ``x`` [T, D]: gated (Shazeer, 2020) or plain."""
    width, f, d = p.gate_up.shape  # [2, F, D], or [1, F, D]
    bias = None if p.gate_up_bias is None else p.gate_up_bias.reshape(-1)
    hidden = linear(x, p.gate_up.reshape(width * f, d), bias).reshape(-1, width, f)  # [T, 2, F]
    if lora is not None:
        hidden = hidden + adapters.gate_up_update(lora, x)
    hidden = activate(hidden, config.activation)  # [T, F]
    update = linear(hidden, p.down)
    if lora is not None:
        update = update + adapters.down_update(lora, hidden)
    update = psum_tensor(update)
    return update if p.down_bias is None else update + p.down_bias


def decoder_layer(
    p: LayerParams,
    kv_pages: jax.Array,
    x: jax.Array,
    ctx: AttentionContext,
    lora: Lora | None,
    static: StaticContext,
    kind: LayerKind,
) -> tuple[jax.Array, jax.Array]:
    """One layer: ``x`` [T, D] and the layer's pages in, the same out."""
    config = static.config

    def add(x: jax.Array, update: jax.Array, post_norm: jax.Array | None) -> jax.Array:
        if post_norm is not None:
            update = norm(update, post_norm, None, config)
        return x + (update if config.residual_scale == 1 else update * config.residual_scale)

    y = norm(x, p.attn_norm, p.attn_norm_bias, config) if config.pre_norm else x
    if config.mla is None:
        update, kv_pages = attention(p, kv_pages, y, ctx, static, kind, lora)
    else:
        update, kv_pages = latent_attention(p, kv_pages, y, ctx, static, kind, lora, config.mla)
    x = add(x, update, p.attn_post_norm)
    y = norm(x, p.mlp_norm, p.mlp_norm_bias, config) if config.pre_norm else x
    update = moe.moe(p, y, config, static.grouped_matmul) if kind.is_moe else mlp(p, y, config, lora)
    return add(x, update, p.mlp_post_norm), kv_pages
