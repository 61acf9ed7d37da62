"""AWQ (Lin et al., 2024): columns whose inputs are large are scaled up before they are rounded, and the inputs down, in
the operation that makes them: a norm, the up half of a gated MLP, or the values of heads that are not shared."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.quantization.activations import Moments
from jaxserve.quantization.clipping import on_grid
from jaxserve.quantization.rounding import int4_grid

NUM_EXPONENTS = 20  # tried: 0, 1/20, ... 19/20
MAX_ROWS = 256  # of a matrix, evenly spread, that decide its columns' scales: the search's cost is theirs
ACTIVATIONS_LINEAR_IN_UP = frozenset({"silu", "gelu", "gelu_tanh", "relu"})  # of a gated MLP


def scaled_layer(
    p: dict[str, Any], moments: dict[str, Moments], groups: dict[str, int], config: ModelConfig, stored: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A layer ``p`` (f32 numpy by field) that computes the same, with columns scaled so that rounding to int4 in
    ``groups`` changes its matrices' outputs least. Its norms have values of the dtypes ``stored`` by field: what
    they lose by that, the columns' scales make good. And by matrix the scale [in] of its columns."""
    scales: dict[str, np.ndarray] = {}
    p = dict(p)

    def best(field: str) -> np.ndarray:
        w = p[field].reshape(-1, p[field].shape[-1])
        w = w[:: -(-len(w) // MAX_ROWS)]
        return np.asarray(best_scale(jnp.asarray(w), *moments[field], group_size=groups[field]))

    def scale(field: str) -> np.ndarray:
        scales[field] = best(field)
        p[field] = p[field] * scales[field]
        return scales[field]

    if len(p["gate_up"]) == 2 and config.activation in ACTIVATIONS_LINEAR_IN_UP:
        down = scale("down")
        p["gate_up"] = np.stack([p["gate_up"][0], p["gate_up"][1] / down[:, None]])
        if p.get("gate_up_bias") is not None:
            p["gate_up_bias"] = np.stack([p["gate_up_bias"][0], p["gate_up_bias"][1] / down])
    if config.num_kv_heads == config.num_heads:
        out = scale("attn_out").reshape(config.num_heads, -1)  # [N, H]
        p["qkv"] = np.concatenate([p["qkv"][:, :2], p["qkv"][:, 2:] / out[:, None, :, None]], axis=1)
        if p.get("qkv_bias") is not None:
            p["qkv_bias"] = np.concatenate([p["qkv_bias"][:, :2], p["qkv_bias"][:, 2:] / out[:, None]], axis=1)
    for field, name in (("qkv", "attn_norm"), ("gate_up", "mlp_norm")):
        found, norm = best(field), p[name] + config.norm_offset
        p[name] = (norm / found - config.norm_offset).astype(stored[name]).astype(np.float32)
        scaled = p[name] + config.norm_offset
        found = scales[field] = np.divide(norm, scaled, out=found.copy(), where=scaled != 0)
        p[field] = p[field] * found
        if p.get(f"{name}_bias") is not None:
            p[f"{name}_bias"] = p[f"{name}_bias"] / found
    return p, scales


@partial(jax.jit, static_argnames="group_size")
def best_scale(w: jax.Array, second: jax.Array, magnitude: jax.Array, *, group_size: int) -> jax.Array:
    """The scale [in] of the columns of ``w`` [out, in], a power of its inputs' mean size, with which rounding to int4
    changes the outputs least on the inputs of these moments; all 1 where none is better than that."""

    def candidate(exponent: jax.Array) -> jax.Array:
        size = jnp.maximum(magnitude / jnp.maximum(magnitude.mean(), 1e-30), 1e-4) ** exponent
        return size / jnp.sqrt(size.max() * size.min())

    def loss(exponent: jax.Array) -> jax.Array:
        scale = candidate(exponent)
        error = rounded(w * scale, group_size) / scale - w
        return jnp.sum(jnp.dot(error, second, precision="highest") * error)

    exponents = jnp.arange(NUM_EXPONENTS) / NUM_EXPONENTS
    return candidate(exponents[jnp.argmin(jax.lax.map(loss, exponents))])


def rounded(w: jax.Array, group_size: int) -> jax.Array:
    """``w`` [out, in] as its int4 numbers stand for it."""
    grouped = w.reshape(len(w), -1, group_size)
    scale, zero = int4_grid(grouped.min(-1), grouped.max(-1), has_bias=True)
    return on_grid(grouped, scale, zero).reshape(w.shape)
