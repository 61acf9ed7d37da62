"""What a layer's matrices are fed on calibration text: second moments of their inputs, one layer at a time."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import ModelConfig
from jaxserve.model.layers import LayerKind, layer_kind, norm, rms_norm
from jaxserve.model.linear import activate
from jaxserve.model.rope import apply_rope, rope_tables

Layer = Mapping[str, Any]  # parameters by field of ``LayerParams``, f32


class Moments(NamedTuple):
    """Of one matrix' inputs X [tokens, in]."""

    second: Any  # [in, in] f32, the sum of X^T X
    magnitude: Any  # [in] f32, the sum of |X|


def check_calibratable(config: ModelConfig, method: str) -> None:
    """Raises CheckpointError naming what of the model's architecture ``method`` cannot follow."""
    reasons = {
        "latent attention (MLA)": config.mla is not None,
        "experts (MoE)": config.moe is not None,
        "attention sinks": config.attn_sinks,
        "a norm over all heads": config.qk_norm == "full",
        "a rotary embedding whose factors depend on the length (longrope)": any(
            rope.scaling == "longrope" for rope in config.ropes
        ),
        "layers without a norm before them": not config.pre_norm,
    }
    for what, found in reasons.items():
        if found:
            raise CheckpointError(f"quantize={method!r}: the model has {what}, which calibration does not follow")


@partial(jax.jit, static_argnames=("config", "kind"))
def layer_forward(
    p: Layer, x: jax.Array, *, config: ModelConfig, kind: LayerKind
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer over a whole sequence ``x`` [T, D] f32: its output, and the input [T, in] of each matrix by field."""
    t = x.shape[0]
    k, width, h, _ = p["qkv"].shape  # [K, G + 2, H, D]
    group = width - 2
    inputs = {}

    def product(field: str, x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
        inputs[field] = x
        out = jnp.dot(x, w.reshape(-1, w.shape[-1]).T, precision="highest")
        return out if bias is None else out + bias.reshape(-1)

    def add(x: jax.Array, update: jax.Array, post_norm: str) -> jax.Array:
        if p.get(post_norm) is not None:
            update = norm(update, p[post_norm], None, config)
        return x + update * config.residual_scale

    y = norm(x, p["attn_norm"], p.get("attn_norm_bias"), config)
    qkv = product("qkv", y, p["qkv"], p.get("qkv_bias")).reshape(t, k, width, h)
    q, key, value = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    if config.qk_norm == "head":
        q, key = rms_norm(q, p["q_norm"], config), rms_norm(key, p["k_norm"], config)
    if kind.rope is not None:
        rope = config.ropes[kind.rope]
        tables = rope_tables(jnp.arange(t), rope, config.rope_dim)
        q = apply_rope(q.reshape(t, k * group, h), tables, interleaved=rope.interleaved).reshape(t, k, group, h)
        key = apply_rope(key, tables, interleaved=rope.interleaved)
    scale = h**-0.5 if config.attn_scale is None else config.attn_scale
    scores = jnp.einsum("tkgh,skh->kgts", q, key, precision="highest") * scale
    if config.attn_softcap is not None:
        scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
    distance = jnp.arange(t)[:, None] - jnp.arange(t)
    seen = (distance >= 0) & (distance < (t if kind.window is None else kind.window))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skh->tkgh", weights, value, precision="highest").reshape(t, -1)
    x = add(x, product("attn_out", out, p["attn_out"], p.get("attn_out_bias")), "attn_post_norm")
    y = norm(x, p["mlp_norm"], p.get("mlp_norm_bias"), config)
    hidden = product("gate_up", y, p["gate_up"], p.get("gate_up_bias")).reshape(t, *p["gate_up"].shape[:2])
    update = product("down", activate(hidden, config.activation), p["down"], p.get("down_bias"))
    return add(x, update, "mlp_post_norm"), inputs


@jax.jit
def _add_moments(moments: dict[str, Moments], inputs: dict[str, jax.Array]) -> dict[str, Moments]:
    return {
        field: Moments(m.second + jnp.dot(x.T, x, precision="highest"), m.magnitude + jnp.abs(x).sum(0))
        for (field, m), x in ((item, inputs[item[0]]) for item in moments.items())
    }


def layer_moments(p: Layer, sequences: list[Any], *, config: ModelConfig, layer: int) -> dict[str, Moments]:
    """Moments of every matrix of the layer over the hidden states ``sequences`` ([T, D] each) that come to it.

    Raises:
        CheckpointError: an activation is not finite; names the matrix.
    """
    moments = {
        field: Moments(jnp.zeros((n, n)), jnp.zeros(n))
        for field, n in ((f, p[f].shape[-1]) for f in ("qkv", "attn_out", "gate_up", "down"))
    }
    for x in sequences:
        moments = _add_moments(moments, layer_forward(p, x, config=config, kind=layer_kind(config, layer))[1])
    for field in ("qkv", "attn_out", "gate_up", "down"):  # in the order of their causes
        m = moments[field]
        if not jnp.isfinite(m.magnitude).all() or not jnp.isfinite(m.second).all():
            raise CheckpointError(f"layers.{layer}.{field}: its input on the calibration text is not finite")
    return moments
