"""Rotary position embedding (Su et al., 2021) and the ways its frequencies are stretched for longer contexts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """``[R / 2]`` float64: radians that pair ``i`` of ``R = rotary_dim`` dimensions turns by from one position to the
    next. For "longrope" the two lists of factors must have been made one (``parallel.placed.placed_config``)."""
    dim = rope.rotary_dim or head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim  # [R / 2]
    inv = rope.theta**-exponent
    original = rope.original_max_position_embeddings or 0
    match rope.scaling:
        case "none":
            return inv
        case "linear":
            return inv / rope.factor
        case "llama3":
            wavelength = 2 * math.pi / inv
            low, high = rope.low_freq_factor, rope.high_freq_factor
            kept = np.clip((original / wavelength - low) / (high - low), 0, 1)
            return inv * kept + inv / rope.factor * (1 - kept)
        case "yarn":
            first, last = (
                dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                for turns in (rope.beta_fast, rope.beta_slow)
            )
            if rope.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            stretched = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
            return inv * (1 - stretched) + inv / rope.factor * stretched
        case "longrope":
            if rope.short_factor != rope.long_factor:
                raise ValueError("longrope: short_factor or long_factor has not been chosen yet")
            return inv / np.asarray(rope.long_factor, np.float64)


def rope_tables(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``[T, 1, R / 2]`` f32 at ``positions`` [T], times ``attention_factor``."""
    inv = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    angle = positions.astype(jnp.float32)[:, None, None] * inv
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array], *, interleaved: bool = False) -> jax.Array:
    """Turns the pairs of the leading R dimensions of ``x`` [T, heads, H]: (i, i + R / 2), or (2i, 2i + 1) if
    ``interleaved``, which come back in the other order: scores do not see it, as queries and keys are alike."""
    cos, sin = tables
    dim = 2 * cos.shape[-1]
    turning = x[..., :dim].astype(jnp.float32)
    if interleaved:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
    else:
        x1, x2 = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)
