"""From a Hugging Face config.json to a ``ModelConfig``: every key is used, known to change nothing, or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config_keys import MAX_SIZE, ConfigKeys
from jaxserve.checkpoint.hf.families import ACTIVATIONS, CHECKED, DEFAULTS, FAMILIES, NEUTRAL, HFFamily
from jaxserve.checkpoint.hf.rope import FULL, SLIDING, read_rope, read_two_ropes
from jaxserve.checkpoint.hf.scheme import read_scheme
from jaxserve.checkpoint.json_file import shown
from jaxserve.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig

MAX_LAYERS = 512  # trees have an entry for each: a corrupt count must cost nothing
MAX_EXPERTS = 65_536


def read_hf_config(values: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """The ``ModelConfig`` of a config.json, of either style of keys (before and since transformers 5).

    Raises:
        CheckpointError: starting with ``name``; an unknown architecture, rope type or key, a value that is not
            served, a size that is missing or does not fit, each with its key and value.
    """
    try:
        return _read(values)
    except (CheckpointError, ValueError) as e:
        raise CheckpointError(f"{name}: {e}") from None


def family_of(values: Mapping[str, Any]) -> HFFamily:
    """The family that ``architectures`` and ``model_type`` name.

    Raises:
        CheckpointError: they name none that we serve, or two.
    """
    architectures, model_type = values.get("architectures"), values.get("model_type")
    if architectures is None:
        found = [f for f in FAMILIES.values() if f.model_type == model_type]
        if not found:
            known = ", ".join(f.model_type for f in FAMILIES.values())
            raise CheckpointError(f"model_type={shown(model_type)} is not supported, only {known}")
        return found[0]
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CheckpointError(f"architectures={shown(architectures)}: expected a list of one name")
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise CheckpointError(f"architecture {shown(architectures[0])} is not supported, only {', '.join(FAMILIES)}")
    if model_type not in (None, family.model_type):
        raise CheckpointError(
            f"model_type={shown(model_type)} contradicts architecture {family.architecture}, "
            f"which is {family.model_type!r}"
        )
    return family


def _read(values: Mapping[str, Any]) -> ModelConfig:
    family = family_of(values)
    read_scheme(values)  # what it says is in the tensors; refused where we could not serve them
    if values.get("text_config") is not None or values.get("vision_config") is not None:
        raise CheckpointError("text_config or vision_config: a model of text and images is not supported")
    keys = ConfigKeys(values, defaults={**DEFAULTS, **family.defaults}, renamed=family.renamed)
    keys.take("quantization_config")
    hidden = keys.size("hidden_size")
    num_heads = keys.size("num_attention_heads")
    num_layers = keys.size("num_hidden_layers", most=MAX_LAYERS)
    max_position = keys.size("max_position_embeddings")
    fields: dict[str, Any] = {
        "family": family.model_type,
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": keys.size("num_key_value_heads", num_heads),
        "max_position_embeddings": max_position,
        "norm_eps": keys.number(family.norm_key),
        "tie_word_embeddings": keys.flag("tie_word_embeddings"),
        "activation": _activation(keys, family),
    }
    is_gpt2 = family.model_type == "gpt2"
    fields["intermediate_size"] = keys.size("intermediate_size", 4 * hidden if is_gpt2 else None)
    if family.model_type.startswith("deepseek"):
        head_dim = _read_mla(keys, fields, num_heads)
    else:
        head_dim = keys.size("head_dim", _head_dim(hidden, num_heads, "head_dim" in keys))
        fields["head_dim"] = head_dim
    if is_gpt2 and keys.flag("scale_attn_weights", True) is False:
        fields["attn_scale"] = 1.0
    _read_biases(keys, family, fields)
    _read_scales(keys, family, fields)
    kinds = _read_windows(keys, family, fields)
    _read_ropes(keys, family, fields, kinds, head_dim)
    if family.moe != "none":
        _read_experts(keys, family, fields)
    fields["eos_token_ids"] = eos_ids(keys.take("eos_token_id"), fields["vocab_size"])
    for key, allowed in {**CHECKED, **family.checked}.items():
        keys.only(key, *allowed)
    keys.refuse_rest(NEUTRAL)
    return ModelConfig(**{**fields, **family.flags})


def eos_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids of an ``eos_token_id``, which is null, one id or a list of them. An id that the model cannot produce is
    dropped.

    Raises:
        CheckpointError: anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i <= MAX_SIZE for i in ids):
        raise CheckpointError(f"eos_token_id={shown(value)}: expected token ids")
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))


def _head_dim(hidden: int, num_heads: int, is_given: bool) -> int | None:
    if not is_given and hidden % num_heads:
        raise CheckpointError(f"hidden_size={hidden} is not divisible by num_attention_heads={num_heads}")
    return max(1, hidden // num_heads)


def _activation(keys: ConfigKeys, family: HFFamily) -> str:
    given = {key: keys.take(key) for key in family.activation_keys if key in keys}
    if not given:
        key = family.activation_keys[0]
        given = {key: {**DEFAULTS, **family.defaults}[key]}
    names = []
    for key, value in given.items():
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise keys.error(key, value, f"one of {', '.join(ACTIVATIONS)}")
        # The first Gemma's configs say "gelu" and mean the tanh form (transformers corrects it too).
        names.append("gelu_tanh" if family.model_type == "gemma" and value == "gelu" else ACTIVATIONS[value])
    if len(set(names)) > 1:
        raise CheckpointError(f"{' and '.join(f'{k}={shown(v)}' for k, v in given.items())} contradict each other")
    if family.model_type == "gpt_oss" and names[0] != "silu":
        raise keys.error("hidden_act", given["hidden_act"], "'silu', the gate of its clamped form")
    return names[0]


def _read_mla(keys: ConfigKeys, fields: dict[str, Any], num_heads: int) -> int:
    mla = MLAConfig(
        q_lora_rank=keys.optional_size("q_lora_rank"),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=keys.size("qk_nope_head_dim"),
        qk_rope_head_dim=keys.size("qk_rope_head_dim"),
        v_head_dim=keys.size("v_head_dim"),
        # Whatever rms_norm_eps is: transformers and the makers' code leave it at the class's default.
        norm_eps=None if fields["norm_eps"] == 1e-6 else 1e-6,
    )
    keys.only("num_key_value_heads", num_heads)
    keys.only("head_dim", mla.qk_rope_head_dim)
    keys.only("qk_head_dim", mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    fields |= {"mla": mla, "head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim, "num_kv_heads": num_heads}
    return mla.qk_rope_head_dim


def _read_biases(keys: ConfigKeys, family: HFFamily, fields: dict[str, Any]) -> None:
    if family.attention_bias != "never":
        has_bias = keys.flag(family.bias_key)
        fields["qkv_bias"] = has_bias
        fields["attn_out_bias"] = has_bias and family.attention_bias == "qkv_and_out"
    elif not family.flags.get("qkv_bias"):
        keys.only("attention_bias", False)
    if family.model_type == "starcoder2":
        fields["mlp_bias"] = fields["qkv_bias"]
    elif family.model_type in ("llama", "granite", "smollm3"):
        fields["mlp_bias"] = keys.flag("mlp_bias")
    else:
        keys.only("mlp_bias", False)
    if family.model_type == "glm4_moe" and keys.flag("use_qk_norm"):
        fields["qk_norm"] = "head"


def _read_scales(keys: ConfigKeys, family: HFFamily, fields: dict[str, Any]) -> None:
    if family.model_type.startswith("gemma"):
        fields["embed_scale"] = float(fields["hidden_size"]) ** 0.5
    if family.model_type in ("gemma2", "gemma3_text"):
        fields["attn_scale"] = keys.number("query_pre_attn_scalar") ** -0.5
        softcap = keys.optional_number("attn_logit_softcapping")
        if family.model_type == "gemma2":  # Gemma 3 kept the key, but its attention never looks at it
            fields["attn_softcap"] = softcap
        fields["logit_softcap"] = keys.optional_number("final_logit_softcapping")
    if family.model_type == "granite":
        fields["embed_scale"] = keys.number("embedding_multiplier", 1.0)
        fields["attn_scale"] = keys.number("attention_multiplier", 1.0)
        fields["residual_scale"] = keys.number("residual_multiplier", 1.0)
        fields["logit_scale"] = 1.0 / keys.number("logits_scaling", 1.0)


def _read_windows(keys: ConfigKeys, family: HFFamily, fields: dict[str, Any]) -> list[str]:
    """Sets ``layer_windows``; the kind of each layer, "sliding_attention" or "full_attention"."""
    count = fields["num_layers"]
    if family.windows == "none":
        keys.only("sliding_window")
        keys.only("use_sliding_window", False)
        return [FULL] * count
    if family.windows == "flagged" and not keys.flag("use_sliding_window"):
        keys.take("sliding_window")  # of any value, 0 too: it is not used
        window = None
    else:
        window = keys.optional_size("sliding_window")
    if family.windows == "all":
        kinds = [FULL if window is None else SLIDING] * count
    elif family.windows == "flagged":
        kinds = _flagged_kinds(keys, family, window, count)
    else:
        pattern = keys.size("sliding_window_pattern")
        kinds = _layer_types(keys, count) or [SLIDING if (i + 1) % pattern else FULL for i in range(count)]
    if window is None and SLIDING in kinds:
        raise CheckpointError(f"layer_types has {SLIDING!r} but there is no sliding_window")
    if SLIDING in kinds:
        fields["layer_windows"] = tuple(window if kind == SLIDING else None for kind in kinds)
    return kinds


def _flagged_kinds(keys: ConfigKeys, family: HFFamily, window: int | None, count: int) -> list[str]:
    first = keys.size("max_window_layers", least=0)
    if family.model_type == "qwen3_moe":  # transformers gives all its layers the window
        return [FULL if window is None else SLIDING] * count
    slides = {
        "qwen2": lambda i: i >= first,
        "qwen3": lambda i: i >= first,
        "qwen2_moe": lambda i: i % 2 == 0 and i < first,
        "smollm3": lambda i: not _no_rope_layers(keys, count)[i],
    }[family.model_type]
    given = _layer_types(keys, count)
    return given or [SLIDING if window is not None and slides(i) else FULL for i in range(count)]


def _layer_types(keys: ConfigKeys, count: int) -> list[str] | None:
    value = keys.take("layer_types")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        raise keys.error("layer_types", value, f"a list of {count}, as num_hidden_layers says")
    for kind in value:
        if kind not in (SLIDING, FULL):
            raise keys.error("layer_types", value, f"{SLIDING!r} or {FULL!r}, one is {shown(kind)}")
    return value


def _no_rope_layers(keys: ConfigKeys, count: int) -> list[bool]:
    """SmolLM3: whether each layer has a rotary embedding (the name says the opposite)."""
    value = keys.take("no_rope_layers")
    interval = keys.size("no_rope_layer_interval", 4)
    if value is None:
        return [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(value, list) or len(value) < count or not all(type(v) is int and v in (0, 1) for v in value):
        raise keys.error("no_rope_layers", value, f"a list of {count} times 0 or 1")
    return [v == 1 for v in value[:count]]


def _read_ropes(keys: ConfigKeys, family: HFFamily, fields: dict[str, Any], kinds: list[str], head_dim: int) -> None:
    max_position = fields["max_position_embeddings"]
    if family.rope == "none":
        fields["ropes"] = ()
        return
    if family.rope == "two":
        full, sliding = read_two_ropes(keys, head_dim, max_position)
        ropes: tuple[RopeConfig, ...] = (full, sliding)
        fields["layer_ropes"] = tuple(1 if kind == SLIDING else 0 for kind in kinds)
    else:
        rope, score_scale = read_rope(keys, family, head_dim, max_position)
        if family.model_type == "deepseek_v3" and not keys.flag("rope_interleave", True):
            rope = dataclasses.replace(rope, interleaved=False)
        ropes = (rope,)
        if family.model_type == "gpt_oss":
            keys.only("initial_context_length", rope.original_max_position_embeddings)
        if "mla" in fields:
            fields["attn_scale"] = fields["head_dim"] ** -0.5 * score_scale
    if family.model_type == "smollm3":
        fields["layer_ropes"] = tuple(0 if turns else None for turns in _no_rope_layers(keys, fields["num_layers"]))
    fields["ropes"] = ropes


def _read_experts(keys: ConfigKeys, family: HFFamily, fields: dict[str, Any]) -> None:
    count = fields["num_layers"]
    num_experts = keys.size("num_experts", most=MAX_EXPERTS)
    moe: dict[str, Any] = {"num_experts": num_experts, "num_experts_per_tok": keys.size("num_experts_per_tok")}
    if family.moe in ("mixtral", "gpt_oss"):
        moe["intermediate_size"] = fields["intermediate_size"]
    else:
        moe["intermediate_size"] = keys.size("moe_intermediate_size")
        moe["norm_topk_prob"] = keys.flag("norm_topk_prob")
    if family.moe == "mixtral":
        moe["norm_topk_prob"] = True
    elif family.moe == "gpt_oss":
        moe |= {"scoring": "softmax_topk", "router_bias": True, "expert_bias": True}
    elif family.moe == "qwen":
        if family.model_type == "qwen2_moe":
            moe["shared_intermediate_size"] = keys.size("shared_expert_intermediate_size")
            moe["shared_gate"] = True
        step = keys.size("decoder_sparse_step", 1)
        dense = keys.take("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            raise keys.error("mlp_only_layers", dense, "a list of layers")
        fields["moe_layers"] = tuple(i not in dense and (i + 1) % step == 0 for i in range(count))
    else:
        _read_deepseek_experts(keys, family, moe)
        first = keys.size("first_k_dense_replace", least=0)
        fields["moe_layers"] = tuple(i >= first for i in range(count))
        keys.only("moe_layer_freq", 1)
        keys.size("num_nextn_predict_layers", 0, least=0)  # extra layers that only draft: hf.py leaves them out
    _check_experts(moe)
    fields["moe"] = MoEConfig(**moe)


def _read_deepseek_experts(keys: ConfigKeys, family: HFFamily, moe: dict[str, Any]) -> None:
    moe["shared_intermediate_size"] = moe["intermediate_size"] * keys.size("n_shared_experts", 0, least=0)
    moe["routed_scaling_factor"] = keys.number("routed_scaling_factor", 1.0)
    groups = {
        "num_groups": keys.size("n_group", 1, most=MAX_EXPERTS),
        "topk_group": keys.size("topk_group", 1, most=MAX_EXPERTS),
    }
    if family.model_type == "deepseek_v2":
        keys.only("scoring_func", "softmax")
        keys.only("topk_method", "greedy", "group_limited_greedy")
        if keys.take("topk_method") == "group_limited_greedy":
            moe |= groups
    else:
        keys.only("scoring_func", "sigmoid")
        keys.only("topk_method", "noaux_tc")
        moe |= groups | {"scoring": "sigmoid", "correction_bias": True, "group_score": "top2"}


def _check_experts(moe: dict[str, Any]) -> None:
    experts, chosen = moe["num_experts"], moe["num_experts_per_tok"]
    groups, kept = moe.get("num_groups", 1), moe.get("topk_group", 1)
    if experts % groups or kept > groups:
        raise CheckpointError(f"n_group={groups} with topk_group={kept} does not fit {experts} experts")
    if moe.get("group_score") == "top2" and experts // groups < 2:
        raise CheckpointError(f"n_group={groups} of {experts} experts: a group needs at least 2")
    if chosen > experts // groups * kept:
        raise CheckpointError(
            f"num_experts_per_tok={chosen} is more than the {experts // groups * kept} to choose from"
        )
