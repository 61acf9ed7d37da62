"""Rotary embeddings of a GGUF file: metadata keys, and tensors that hold factors of the frequencies."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf.families import GGUFFamily
from jaxserve.checkpoint.gguf.header import GGUFHeader
from jaxserve.checkpoint.gguf.keys import Keys
from jaxserve.config import RopeConfig

FACTORS = "rope_freqs.weight"  # Llama 3: one factor a frequency, whatever the context
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {FACTORS, LONG_FACTORS, SHORT_FACTORS}

ROPE_KEYS = {
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # of latent attention: 0.1 mscale_all_dim
TYPES = ("none", "linear", "yarn", "longrope")


def read_ropes(
    family: GGUFFamily,
    keys: Keys,
    header: GGUFHeader,
    read_vector: Callable[[str], np.ndarray],
    head_dim: int,
    context_len: int,
    windows: tuple[int | None, ...],
) -> tuple[tuple[RopeConfig, ...], tuple[int | None, ...]]:
    """``ModelConfig.ropes`` and ``layer_ropes``."""
    rope = _read_rope(family, keys, header, read_vector, head_dim, context_len)
    ropes, layer_ropes = (rope,), ()
    theta = keys.number("rope.freq_base_swa", family.local_theta or rope.theta)
    local = dataclasses.replace(rope, theta=theta)
    if not family.local_rope_is_scaled:
        local = RopeConfig(theta=theta, rotary_dim=rope.rotary_dim)
    if any(windows) and local != rope:
        ropes, layer_ropes = (rope, local), tuple(int(window is not None) for window in windows)
    if family.no_rope_every:
        layer_ropes = tuple(None if (i + 1) % family.no_rope_every == 0 else 0 for i in range(len(windows)))
    if not keys.flag("rope.scaling.finetuned", True) and family.architecture.startswith("granite"):
        return (), ()  # Granite's converter says by this key that there are no rotary embeddings
    return ropes, layer_ropes


def _read_rope(
    family: GGUFFamily,
    keys: Keys,
    header: GGUFHeader,
    read_vector: Callable[[str], np.ndarray],
    head_dim: int,
    context_len: int,
) -> RopeConfig:
    """The rope of layers that see all keys."""
    rotary_dim = keys.size("rope.dimension_count", head_dim)
    if rotary_dim != head_dim and (rotary_dim % 2 or rotary_dim > head_dim or family.interleaved_rope):
        what = f"is not {head_dim}," if family.interleaved_rope else f"must be even and at most {head_dim},"
        keys.refuse("rope.dimension_count", f"{what} the head dimension")
    kind = keys.values.get("rope.scaling.type", "linear")  # what llama.cpp takes a lone factor for
    if kind not in TYPES:
        keys.refuse("rope.scaling.type", f"is not supported, only {', '.join(TYPES)} are")
    factor_key = "rope.scaling.factor" if "rope.scaling.factor" in keys.values else "rope.scale_linear"
    factor = keys.number(factor_key, 0.0, zero=True) or 1.0
    original_len = keys.size("rope.scaling.original_context_length", context_len)
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    values: dict[str, Any] = {
        "theta": keys.number("rope.freq_base", 10_000.0),
        "rotary_dim": None if rotary_dim == head_dim else rotary_dim,
        "interleaved": family.latent,  # whose files keep the order of the weights, which is this one
    }

    def factors(name: str) -> tuple[float, ...]:
        if header.tensors[name].shape != (rotary_dim // 2,):
            raise CheckpointError(
                f"tensor {name!r} has shape {header.tensors[name].shape}, expected {(rotary_dim // 2,)}"
            )
        vector = read_vector(name)
        if not (np.isfinite(vector) & (vector > 0)).all():
            raise CheckpointError(f"tensor {name!r} has factors that are not positive numbers")
        return tuple(vector.tolist())

    present = ROPE_TENSORS & header.tensors.keys()
    if kind == "yarn":
        if present:
            raise CheckpointError(f"tensor {min(present)!r} together with rope scaling yarn is not supported")
        return RopeConfig(scaling="yarn", **values, **_yarn(family, keys, factor, original_len, attn_factor))
    for key in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
        if f"rope.scaling.{key}" in keys.values:
            keys.refuse(f"rope.scaling.{key}", "is not supported without rope scaling yarn")
    if present == {LONG_FACTORS, SHORT_FACTORS}:
        if factor != 1:
            keys.refuse(factor_key, f"together with tensor {LONG_FACTORS!r} is not supported")
        if "rope.scaling.attn_factor" not in keys.values and context_len > original_len > 1:
            attn_factor = math.sqrt(1 + math.log(context_len / original_len) / math.log(original_len))
        return RopeConfig(
            scaling="longrope",
            original_max_position_embeddings=original_len,
            attention_factor=attn_factor,
            short_factor=factors(SHORT_FACTORS),
            long_factor=factors(LONG_FACTORS),
            **values,
        )
    if kind == "longrope" or LONG_FACTORS in present or SHORT_FACTORS in present:
        missing = sorted({LONG_FACTORS, SHORT_FACTORS} - present) or [LONG_FACTORS]
        raise CheckpointError(f"tensor {missing[0]!r} is missing, expected shape {(rotary_dim // 2,)}")
    if attn_factor != 1:
        keys.refuse("rope.scaling.attn_factor", "is not supported without rope scaling yarn or longrope")
    if present:  # the same factors for a short and for a long context; a linear factor divides them all
        divisors = tuple(f * (factor if kind == "linear" else 1.0) for f in factors(FACTORS))
        return RopeConfig(
            scaling="longrope",
            original_max_position_embeddings=original_len,
            short_factor=divisors,
            long_factor=divisors,
            **values,
        )
    if kind == "none" or factor == 1:
        return RopeConfig(**values)
    return RopeConfig(scaling="linear", factor=factor, **values)


def _yarn(family: GGUFFamily, keys: Keys, factor: float, original_len: int, attn_factor: float) -> dict[str, Any]:
    if "rope.scaling.original_context_length" not in keys.values:
        raise CheckpointError(f"metadata {keys.prefix}rope.scaling.original_context_length is missing")
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if keys.number(key, 1.0, zero=True) != 1:
            keys.refuse(key, "is not supported, only 1 is")
    own = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    if keys.number(LOG_MULTIPLIER, 0.0, zero=True):  # the factor is on the scores instead: ``score_scale``
        own = 1.0
    whole = family.attn_factor_is_whole and "rope.scaling.attn_factor" in keys.values
    return {
        "factor": factor,
        "original_max_position_embeddings": original_len,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        "truncate": family.yarn_truncate,
        "attention_factor": attn_factor if whole else own * attn_factor,
    }


def score_scale(keys: Keys) -> float:
    """What YaRN multiplies the scores of latent attention by (DeepSeek-V2, whose mscale equals its mscale_all_dim)."""
    factor = keys.number("rope.scaling.factor", 1.0, zero=True)
    if keys.values.get("rope.scaling.type") != "yarn" or factor <= 1:
        return 1.0
    return (1 + keys.number(LOG_MULTIPLIER, 0.0, zero=True) * math.log(factor)) ** 2
