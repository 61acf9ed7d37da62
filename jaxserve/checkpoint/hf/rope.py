"""Rotary embeddings of a config.json, in both styles of its keys, as resolved numbers.

Before transformers 5: ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` beside each other; since: all in
``rope_parameters``, for some families one such object for each layer type.
"""

import math
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config_keys import ConfigKeys
from jaxserve.checkpoint.hf.families import HFFamily
from jaxserve.checkpoint.json_file import shown
from jaxserve.config import RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"
SCALINGS: dict[str, str] = {
    "default": "none",
    "dynamic": "none",  # stretches beyond max_position_embeddings only, and no engine serves more than that
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}  # rope_type -> RopeConfig.scaling


def read_rope(keys: ConfigKeys, family: HFFamily, head_dim: int, max_position: int) -> tuple[RopeConfig, float]:
    """The rotary embedding of all layers over ``head_dim`` dimensions, and what yarn's ``mscale_all_dim`` multiplies
    DeepSeek's attention scores with."""
    given, name = _parameters(keys)
    theta = keys.take("rope_theta")
    partial = keys.take("partial_rotary_factor") if family.partial_rotary else None
    original = keys.size("original_max_position_embeddings") if family.model_type == "phi3" else None
    return _rope(
        name,
        given,
        theta,
        head_dim,
        max_position,
        partial=partial,
        allow_partial=family.partial_rotary,
        original=original,
        is_phi3=family.model_type == "phi3",
        mla=family.model_type.startswith("deepseek"),
        theta_given="rope_theta" in keys,
    )


def read_two_ropes(keys: ConfigKeys, head_dim: int, max_position: int) -> tuple[RopeConfig, RopeConfig]:
    """Gemma 3: of full attention, and of sliding attention."""
    given = keys.take("rope_parameters")
    thetas: tuple[Any, Any] = (keys.take("rope_theta"), keys.take("rope_local_base_freq", 10_000.0))
    scaling = _object(keys.take("rope_scaling"), "rope_scaling")
    if given is not None:
        by_type = ConfigKeys(_object(given, "rope_parameters"), "rope_parameters.")
        if scaling:
            raise CheckpointError("rope_scaling and rope_parameters are both given")
        named = {f"rope_parameters.{k}": _object(by_type.take(k), f"rope_parameters.{k}") for k in (FULL, SLIDING)}
        by_type.refuse_rest()
    else:
        named = {"rope_scaling": scaling, "rope_local_base_freq": {}}
    full, sliding = (_rope(*item, theta, head_dim, max_position)[0] for item, theta in zip(named.items(), thetas))
    return full, sliding


def _parameters(keys: ConfigKeys) -> tuple[dict[str, Any], str]:
    """What one of ``rope_scaling`` and ``rope_parameters`` says, and which."""
    scaling = _object(keys.take("rope_scaling"), "rope_scaling")
    if scaling and "rope_parameters" in keys:
        raise CheckpointError("rope_scaling and rope_parameters are both given")
    # A default of the family's stands for an absent rope_parameters, so only where the old key is absent too.
    if scaling:
        return scaling, "rope_scaling"
    return _object(keys.take("rope_parameters"), "rope_parameters"), "rope_parameters"


def _object(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{name}={shown(value)} is not an object")
    return value or {}


def _rope(
    name: str,
    values: dict[str, Any],
    theta: Any,
    head_dim: int,
    max_position: int,
    *,
    partial: Any = None,
    allow_partial: bool = False,
    original: int | None = None,
    is_phi3: bool = False,
    mla: bool = False,
    theta_given: bool = False,
) -> tuple[RopeConfig, float]:
    keys = ConfigKeys(values, f"{name}.", defaults={"rope_theta": theta, "partial_rotary_factor": partial})
    if theta_given and "rope_theta" in keys and values["rope_theta"] != theta:
        raise CheckpointError(f"rope_theta={shown(theta)} contradicts {name}.rope_theta={shown(values['rope_theta'])}")
    kind = keys.take("rope_type")
    old_kind = keys.take("type")
    if kind is not None and old_kind is not None and kind != old_kind:
        raise CheckpointError(f"{name}.rope_type={shown(kind)} contradicts {name}.type={shown(old_kind)}")
    kind = kind if kind is not None else old_kind if old_kind is not None else "default"
    if is_phi3 and kind in ("su", "yarn"):  # what early Phi-3 configs call it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise CheckpointError(f"rope type {shown(kind)} is not supported, only {', '.join(SCALINGS)}")
    share = keys.number("partial_rotary_factor", 1.0) if allow_partial else 1.0
    rotary_dim = int(head_dim * share)
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"partial_rotary_factor={share} of head_dim={head_dim} is not an even size in [2, {head_dim}]"
        )
    fields: dict[str, Any] = {"theta": keys.number("rope_theta"), "scaling": SCALINGS[kind], "interleaved": mla}
    if rotary_dim != head_dim or mla:
        fields["rotary_dim"] = rotary_dim
    if kind in ("llama3", "yarn", "longrope"):
        own = keys.size("original_max_position_embeddings", max_position)
        fields["original_max_position_embeddings"] = original if original is not None else own
    score_scale = 1.0
    if kind in ("linear", "llama3"):
        fields["factor"] = keys.number("factor")
    if kind == "dynamic":
        keys.number("factor")
        keys.take("original_max_position_embeddings")  # it does not look at it
    if kind == "llama3":
        fields |= {k: keys.number(k) for k in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        score_scale = _read_yarn(keys, fields, max_position, mla)
    if kind == "longrope":
        _read_longrope(keys, fields, rotary_dim, max_position)
    keys.refuse_rest()
    return RopeConfig(**fields), score_scale


def _read_yarn(keys: ConfigKeys, fields: dict[str, Any], max_position: int, mla: bool) -> float:
    factor = keys.number("factor", max_position / fields["original_max_position_embeddings"])
    fields |= {
        "factor": factor,
        "beta_fast": keys.number("beta_fast", 32.0),
        "beta_slow": keys.number("beta_slow", 1.0),
        "truncate": keys.flag("truncate", True),
    }
    mscale, mscale_all_dim = (_number_or_zero(keys, key) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        default = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    else:
        default = _mscale(factor, 1.0)
    fields["attention_factor"] = keys.number("attention_factor", default)
    return _mscale(factor, mscale_all_dim) ** 2 if mla and mscale_all_dim else 1.0


def _read_longrope(keys: ConfigKeys, fields: dict[str, Any], rotary_dim: int, max_position: int) -> None:
    original = fields["original_max_position_embeddings"]
    fields |= {key: keys.numbers(key, rotary_dim // 2) for key in ("short_factor", "long_factor")}
    factor = keys.number("factor", max_position / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    fields |= {"factor": factor, "attention_factor": keys.number("attention_factor", default)}


def _number_or_zero(keys: ConfigKeys, key: str) -> float:
    """yarn's mscales may be 0, which is as absent."""
    return 0.0 if keys.take(key) in (None, 0) else keys.number(key)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
