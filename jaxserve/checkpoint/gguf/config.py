"""From a GGUF header to a ``ModelConfig``: every key of the architecture and every tensor is understood or refused."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf.families import FAMILIES, LAYER_TENSORS, OPTIONAL, TOP_TENSORS, GGUFFamily
from jaxserve.checkpoint.gguf.header import GGUFHeader
from jaxserve.checkpoint.gguf.keys import Keys, is_one_of, shown
from jaxserve.checkpoint.gguf.layout import Piece, layout
from jaxserve.checkpoint.gguf.rope import LOG_MULTIPLIER, ROPE_KEYS, ROPE_TENSORS, read_ropes, score_scale
from jaxserve.config import MLAConfig, ModelConfig, MoEConfig

SIZES = {
    "block_count": "num_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "vocab_size": "vocab_size",
}  # metadata key, after the architecture's name -> integer field of ``ModelConfig``

NORM_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
SCALES = {
    "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "logit_softcap",
    "attention.scale": "attn_scale",
    "embedding_scale": "embed_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",  # divides
}  # metadata key -> float field of ``ModelConfig``; 0 or absent leaves the field's default
SCORINGS = {1: "softmax", 2: "sigmoid", 3: "softmax_topk"}  # expert_gating_func

HEAD_KEYS = {"attention.key_length", "attention.value_length"}
MLA_KEYS = {
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    LOG_MULTIPLIER,
}  # fmt: skip
WINDOW_KEYS = {"attention.sliding_window", "attention.sliding_window_pattern"}
MOE_KEYS = {
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
    "expert_shared_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func", "expert_group_count",
    "expert_group_used_count", "leading_dense_block_count", "nextn_predict_layers",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),  # of a family without experts
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),  # of a family without windows
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # what interleaved q and k rows were once called
    "interleave_moe_layer_step": (1,),
}  # keys whose given values change nothing; any other value is refused by name


def read_family(header: GGUFHeader) -> GGUFFamily:
    """The architecture of a file that holds one whole model."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError("metadata 'general.architecture' is missing")
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {shown(architecture)} is not supported, only {', '.join(FAMILIES)}")
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"general.type={shown(metadata['general.type'])} is not a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"split.count={shown(metadata['split.count'])}: join the parts into one file first")
    return FAMILIES[architecture]


def read_config(family: GGUFFamily, header: GGUFHeader, read_vector: Callable[[str], np.ndarray]) -> ModelConfig:
    """The config of the metadata; a key that is unknown, or that asks for what is not implemented, is refused.

    ``read_vector(name)`` gives the values of a tensor: factors of rotary frequencies are part of the config.
    """
    keys, tensors = Keys(family.architecture, header.metadata), header.tensors
    _check_keys(family, keys)
    embedding = tensors.get(TOP_TENSORS["embed"])
    if embedding is None:
        raise CheckpointError(f"tensor {TOP_TENSORS['embed']!r} is missing")
    defaults = {"vocab_size": embedding.shape[0], "attention.head_count_kv": keys.values.get("attention.head_count")}
    sizes = {name: keys.size(key, defaults.get(key)) for key, name in SIZES.items()}
    if sizes["num_layers"] > len(tensors):  # nothing is made for more layers than there can be
        keys.refuse("block_count", f"cannot be: the file has only {len(tensors)} tensors")
    nextn = keys.size("nextn_predict_layers", 0, least=0)  # layers that draft tokens: not part of the decoder
    sizes["num_layers"] -= nextn
    fields: dict[str, Any] = {**sizes, **family.flags}
    fields |= _optional_flags(family, header) | _scales(family, keys, sizes)
    if family.latent:
        head_dim, fields["mla"] = _mla(keys, sizes)
        fields["num_kv_heads"] = sizes["num_heads"]
        fields.setdefault("attn_scale", head_dim**-0.5 * score_scale(keys))
    else:
        head_dim = _head_dim(keys, sizes)
    windows = _windows(family, keys, sizes["num_layers"])
    if fields.get("ropes") != ():
        fields["ropes"], fields["layer_ropes"] = read_ropes(
            family, keys, header, read_vector, head_dim, sizes["max_position_embeddings"], windows
        )
    fields["moe"], fields["moe_layers"] = _moe(family, keys, sizes, tensors)
    fields["norm_eps"] = keys.number(NORM_EPS[fields.get("norm", "rms")])
    try:
        return ModelConfig(
            family="deepseek_v2" if family.latent and _is_softmax(keys) else family.family,
            head_dim=head_dim,
            tie_word_embeddings=TOP_TENSORS["head"] not in tensors,
            eos_token_ids=_eos_token_ids(header.metadata),
            layer_windows=windows if any(windows) else (),
            **fields,
        )
    except ValueError as e:
        raise CheckpointError(str(e)) from None


def read_layout(family: GGUFFamily, config: ModelConfig, header: GGUFHeader) -> dict[str, tuple[Piece, ...]]:
    """Every parameter's place in the tensors.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen (with both shapes) or unknown.
    """
    tensors, places, expected = header.tensors, {}, set()
    for parameter, pieces in layout(family, config, tensors):
        for piece in pieces:
            if piece.tensor not in tensors:
                raise CheckpointError(f"tensor {piece.tensor!r} is missing, expected shape {piece.tensor_shape}")
            if tensors[piece.tensor].shape != piece.tensor_shape:
                raise CheckpointError(
                    f"tensor {piece.tensor!r} has shape {tensors[piece.tensor].shape}, expected {piece.tensor_shape}"
                )
            expected.add(piece.tensor)
        places[parameter] = pieces
    nextn = header.metadata.get(f"{family.architecture}.nextn_predict_layers", 0)
    unused = tuple(f"blk.{config.num_layers + i}." for i in range(nextn))
    for name, tensor in tensors.items():
        if name not in expected and name not in ROPE_TENSORS and not name.startswith(unused):
            raise CheckpointError(
                f"tensor {name!r} of shape {tensor.shape} is not one of this {family.architecture} model"
            )
    return places


def _check_keys(family: GGUFFamily, keys: Keys) -> None:
    known = {*SIZES, *SCALES, NORM_EPS[family.flags.get("norm", "rms")], *HEAD_KEYS}
    known |= set() if family.flags.get("ropes") == () else ROPE_KEYS
    known |= set() if family.full_every is None else WINDOW_KEYS
    known |= MLA_KEYS if family.latent else set()
    known |= MOE_KEYS if family.moe else set()
    for key, value in keys.values.items():
        if key not in known and not is_one_of(value, NEUTRAL.get(key, ())):
            raise CheckpointError(f"metadata {keys.prefix + key!r}={shown(value)} is not supported")


def _optional_flags(family: GGUFFamily, header: GGUFHeader) -> dict[str, Any]:
    return {flag: OPTIONAL[flag][1] for flag in family.optional if f"blk.0.{OPTIONAL[flag][0]}" in header.tensors}


def _scales(family: GGUFFamily, keys: Keys, sizes: dict[str, int]) -> dict[str, float]:
    scales: dict[str, float] = {}
    if family.scaled_embedding:
        scales["embed_scale"] = sizes["hidden_size"] ** 0.5
    if sizes["num_layers"] == family.width_scaled_layers:
        scales["attn_scale"] = (sizes["hidden_size"] // sizes["num_heads"]) ** -0.5
    for key, name in SCALES.items():
        if value := keys.number(key, 0.0, zero=True):
            scales[name] = 1 / value if name == "logit_scale" else value
    return scales


def _head_dim(keys: Keys, sizes: dict[str, int]) -> int:
    head_dim = keys.size("attention.key_length", sizes["hidden_size"] // sizes["num_heads"])
    if keys.size("attention.value_length", head_dim) != head_dim:
        keys.refuse("attention.value_length", f"differs from the head dimension {head_dim}")
    return head_dim


def _mla(keys: Keys, sizes: dict[str, int]) -> tuple[int, MLAConfig]:
    """Dimensions of a query head, and the rest. Newer files give the size of a latent as that of a key, and of the one
    key head that there is then."""
    rank, rope = keys.size("attention.kv_lora_rank"), keys.size("rope.dimension_count")
    is_absorbed = "attention.key_length_mla" in keys.values
    suffix = "_mla" if is_absorbed else ""
    q_dim, v_dim = keys.size(f"attention.key_length{suffix}"), keys.size(f"attention.value_length{suffix}")
    expected = {"attention.head_count_kv": 1 if is_absorbed else sizes["num_heads"]}
    if is_absorbed:
        expected |= {"attention.key_length": rank + rope, "attention.value_length": rank}
    for key, value in expected.items():
        if keys.size(key, value) != value:
            keys.refuse(key, f"is not {value}")
    if q_dim <= rope:
        keys.refuse(f"attention.key_length{suffix}", f"is not more than rope.dimension_count={rope}")
    return q_dim, MLAConfig(
        q_lora_rank=keys.size("attention.q_lora_rank", 0, least=0) or None,
        kv_lora_rank=rank,
        qk_nope_head_dim=q_dim - rope,
        qk_rope_head_dim=rope,
        v_head_dim=v_dim,
    )


def _is_softmax(keys: Keys) -> bool:
    return keys.values.get("expert_gating_func", 1) in (0, 1)


def _windows(family: GGUFFamily, keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by ``attention.sliding_window_pattern`` (a period, or a flag a layer), else the
    family's period."""
    window = keys.size("attention.sliding_window", family.window or 0, least=0)
    pattern = keys.values.get("attention.sliding_window_pattern", family.full_every)
    if not window or pattern is None:
        return (None,) * num_layers
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool:
        if len(pattern) != num_layers:
            keys.refuse("attention.sliding_window_pattern", f"does not have num_layers={num_layers} entries")
        has_window = pattern.tolist()
    else:
        period = keys.size("attention.sliding_window_pattern", family.full_every, least=0)
        has_window = [not period or i % period < period - 1 for i in range(num_layers)]
    return tuple(window if has else None for has in has_window)


def _moe(
    family: GGUFFamily, keys: Keys, sizes: dict[str, int], tensors: Collection[str]
) -> tuple[MoEConfig | None, tuple[bool, ...]]:
    num_experts = keys.size("expert_count", 0, least=0)
    if not family.moe or not num_experts:
        return None, ()
    values: dict[str, Any] = {"routed_scaling_factor": keys.number("expert_weights_scale", 0.0, zero=True) or 1.0}
    if "expert_weights_norm" in keys.values:
        values["norm_topk_prob"] = keys.flag("expert_weights_norm", False)
    if keys.values.get("expert_gating_func"):
        scoring = keys.values["expert_gating_func"]
        if not isinstance(scoring, int) or scoring not in SCORINGS:
            keys.refuse("expert_gating_func", f"must be one of {', '.join(map(str, SCORINGS))}")
        values["scoring"] = SCORINGS[scoring]
    width = keys.size("expert_feed_forward_length", sizes["intermediate_size"] if family.expert_ffn_is_ffn else None)
    shared = keys.size("expert_shared_feed_forward_length", 0, least=0)
    if not shared:
        shared = width * keys.size("expert_shared_count", 0, least=0)
    groups = keys.size("expert_group_count", 1, least=0) or 1
    dense = keys.size("leading_dense_block_count", 0, least=0)
    if family.latent:
        values["correction_bias"] = f"blk.{dense}.{LAYER_TENSORS['correction_bias'][0]}" in tensors
        if _is_softmax(keys):
            values["group_score"] = "max"
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=keys.size("expert_used_count"),
        intermediate_size=width,
        shared_intermediate_size=shared,
        num_groups=groups,
        topk_group=keys.size("expert_group_used_count", groups, least=0) or groups,
        **{**family.moe, **values},
    )
    if moe.num_experts_per_tok > num_experts:
        keys.refuse("expert_used_count", f"is more than expert_count={num_experts}")
    return moe, tuple(i >= dense for i in range(sizes["num_layers"])) if dense else ()


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    ids = [metadata[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in metadata]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"end-of-sequence ids {shown(ids)} are not integers")
    return tuple(dict.fromkeys(ids))
