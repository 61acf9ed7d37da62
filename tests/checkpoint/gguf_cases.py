"""A tiny model of every GGUF architecture: its metadata, and the config that they mean."""

import math
from typing import Any

import numpy as np

from jaxserve.config import MLAConfig, MoEConfig, RopeConfig
from tests.checkpoint.gguf_converter import Case, D, F, N

FACTORS = (1.0, 1.5, 4.0, 8.0)
SHORT, LONG = (1.0, 1.25), (2.0, 8.0)


def longrope(short: tuple[float, ...], long: tuple[float, ...], **fields: Any) -> RopeConfig:
    fields = {"theta": 5000.0, "original_max_position_embeddings": 64} | fields
    return RopeConfig(scaling="longrope", short_factor=short, long_factor=long, **fields)


def vector(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, np.float32)


GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "embed_scale": D**0.5}
BIASED: dict[str, Any] = {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True}
PLAIN_LN: dict[str, Any] = {**BIASED, "norm": "layer", "mlp": "plain", "activation": "gelu_tanh"}
MLA: dict[str, Any] = {"num_kv_heads": N, "tie_word_embeddings": False}
MOE_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
YARN = RopeConfig(
    theta=5000.0,
    scaling="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    attention_factor=1.1386294361119891,  # 0.1 ln 4 + 1
)


def moe(**fields: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, **fields})


CASES: dict[str, Case] = {
    "llama, untied": Case(arch="llama", config={"tie_word_embeddings": False}),
    "llama, biases": Case(arch="llama", config=BIASED),
    "llama 3, factors": Case(
        arch="llama", extra={"rope_freqs.weight": vector(FACTORS)}, config={"ropes": (longrope(FACTORS, FACTORS),)}
    ),
    "llama, factors and a linear factor": Case(
        arch="llama",
        keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        extra={"rope_freqs.weight": vector(FACTORS)},
        config={"ropes": (longrope((2.0, 3.0, 8.0, 16.0), (2.0, 3.0, 8.0, 16.0)),)},
    ),
    "llama, linear": Case(
        arch="llama",
        keys={"rope.scaling.factor": 4.0},
        config={"ropes": (RopeConfig(theta=5000.0, scaling="linear", factor=4.0),)},
    ),
    "llama, linear as it was": Case(
        arch="llama",
        keys={"rope.scale_linear": 4.0},
        config={"ropes": (RopeConfig(theta=5000.0, scaling="linear", factor=4.0),)},
    ),
    "llama, yarn": Case(arch="llama", keys=YARN_KEYS, config={"ropes": (YARN,)}),
    "mistral, window": Case(
        arch="llama",
        keys={"attention.sliding_window": 8, "attention.key_length": 16, "attention.value_length": 16}
        | {"rope.dimension_count": 16},
        config={"layer_windows": (8, 8), "head_dim": 16},
    ),
    "mixtral": Case(
        arch="llama",
        keys={"expert_count": 4, "expert_used_count": 2},
        config={"moe": moe(intermediate_size=F, norm_topk_prob=True)},
    ),
    "mixtral, one tensor an expert": Case(
        arch="llama",
        keys={"expert_count": 4, "expert_used_count": 2},
        config={"moe": moe(intermediate_size=F, norm_topk_prob=True)},
        unstacked=True,
    ),
    "smollm3": Case(
        arch="smollm3", keys={"block_count": 5}, config={"num_layers": 5, "layer_ropes": (0, 0, 0, None, 0)}
    ),
    "qwen2": Case(arch="qwen2", config={"qkv_bias": True, "tie_word_embeddings": False}),
    "qwen3": Case(
        arch="qwen3",
        keys={"attention.key_length": 16, "attention.value_length": 16},
        config={"qk_norm": "head", "head_dim": 16},
    ),
    "qwen2moe": Case(
        arch="qwen2moe",
        keys=MOE_KEYS | {"expert_shared_feed_forward_length": 24},
        config={
            "family": "qwen2_moe",
            "qkv_bias": True,
            "moe": moe(shared_intermediate_size=24, shared_gate=True),
        },
    ),
    "qwen3moe": Case(
        arch="qwen3moe",
        keys=MOE_KEYS,
        config={"family": "qwen3_moe", "qk_norm": "head", "moe": moe(norm_topk_prob=True)},
    ),
    "gemma": Case(arch="gemma", config=GEMMA),
    "gemma2": Case(
        arch="gemma2",
        keys={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        config=GEMMA | {"post_norm": True, "attn_softcap": 50.0, "logit_softcap": 30.0, "layer_windows": (4096, None)},
    ),
    "gemma2, 27B": Case(
        arch="gemma2",
        keys={"block_count": 46, "attention.sliding_window": 8, "attention.key_length": 16}
        | {"attention.value_length": 16},
        config=GEMMA
        | {"post_norm": True, "num_layers": 46, "head_dim": 16, "attn_scale": (D // N) ** -0.5}
        | {"layer_windows": (8, None) * 23},
    ),
    "gemma3": Case(
        arch="gemma3",
        keys={"attention.sliding_window": 8, "block_count": 7}
        | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        config=GEMMA
        | {
            "family": "gemma3_text",
            "post_norm": True,
            "qk_norm": "head",
            "num_layers": 7,
            "layer_windows": (8, 8, 8, 8, 8, None, 8),
            "ropes": (RopeConfig(theta=5000.0, scaling="linear", factor=8.0), RopeConfig(theta=10_000.0)),
            "layer_ropes": (1, 1, 1, 1, 1, 0, 1),
        },
    ),
    "gemma3, all in the metadata": Case(
        arch="gemma3",
        keys={"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]}
        | {"rope.freq_base_swa": 700.0},
        config=GEMMA
        | {
            "family": "gemma3_text",
            "post_norm": True,
            "qk_norm": "head",
            "layer_windows": (None, 8),
            "ropes": (RopeConfig(theta=5000.0), RopeConfig(theta=700.0)),
            "layer_ropes": (0, 1),
        },
    ),
    "phi3": Case(arch="phi3", keys={"attention.sliding_window": 0}, config={"tie_word_embeddings": False}),
    "phi3, longrope": Case(
        arch="phi3",
        keys={"attention.sliding_window": 24, "rope.dimension_count": 4}
        | {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25},
        extra={"rope_factors_long.weight": vector(LONG), "rope_factors_short.weight": vector(SHORT)},
        config={
            "layer_windows": (24, 24),
            "ropes": (longrope(SHORT, LONG, rotary_dim=4, original_max_position_embeddings=16, attention_factor=1.25),),
        },
    ),
    "granite": Case(
        arch="granite",
        keys={"attention.scale": 0.125, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0},
        config={"attn_scale": 0.125, "embed_scale": 12.0, "residual_scale": 0.25, "logit_scale": 0.125},
    ),
    "granite, no rope": Case(
        arch="granite", keys={"rope.scaling.finetuned": False, "logit_scale": 1.0}, config={"ropes": ()}
    ),
    "granitemoe": Case(
        arch="granitemoe",
        keys={"expert_count": 4, "expert_used_count": 2, "expert_shared_feed_forward_length": 24},
        config={"moe": moe(intermediate_size=F, norm_topk_prob=True, shared_intermediate_size=24)},
    ),
    "gpt2": Case(
        arch="gpt2",
        keys={"rope.freq_base": None},
        config=PLAIN_LN | {"learned_positions": True, "ropes": ()},
    ),
    "starcoder2": Case(arch="starcoder2", config=PLAIN_LN | {"layer_windows": (4096, 4096)}),
    "olmo2": Case(
        arch="olmo2",
        config={"pre_norm": False, "post_norm": True, "qk_norm": "full", "tie_word_embeddings": False},
    ),
    "olmo3": Case(
        arch="olmo2",
        keys=YARN_KEYS | {"attention.sliding_window": 8, "block_count": 4, "rope.scaling.attn_factor": 1.25},
        config={
            "pre_norm": False,
            "post_norm": True,
            "qk_norm": "full",
            "num_layers": 4,
            "layer_windows": (8, 8, 8, None),
            "ropes": (
                RopeConfig(
                    theta=5000.0,
                    scaling="yarn",
                    factor=4.0,
                    original_max_position_embeddings=16,
                    attention_factor=1.25,
                ),
                RopeConfig(theta=5000.0),
            ),
            "layer_ropes": (1, 1, 1, 0),
        },
    ),
    "gpt-oss": Case(
        arch="gpt-oss",
        keys=MOE_KEYS | YARN_KEYS | {"attention.sliding_window": 8},
        config={
            "family": "gpt_oss",
            "qkv_bias": True,
            "attn_out_bias": True,
            "attn_sinks": True,
            "activation": "swiglu_oai",
            "tie_word_embeddings": False,
            "layer_windows": (8, None),
            "ropes": (
                RopeConfig(
                    theta=5000.0,
                    scaling="yarn",
                    factor=4.0,
                    original_max_position_embeddings=16,
                    attention_factor=1.1386294361119891,
                    truncate=False,
                ),
            ),
            "moe": moe(scoring="softmax_topk", router_bias=True, expert_bias=True),
        },
    ),
    "glm4moe": Case(
        arch="glm4moe",
        keys=MOE_KEYS
        | {"block_count": 4, "nextn_predict_layers": 1, "leading_dense_block_count": 1, "expert_shared_count": 1}
        | {"expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2}
        | {"rope.dimension_count": 4},
        extra={"blk.3.nextn.eh_proj.weight": np.ones((D, 2 * D), np.float32)},
        config={
            "family": "glm4_moe",
            "num_layers": 3,
            "qkv_bias": True,
            "qk_norm": "head",
            "ropes": (RopeConfig(theta=5000.0, rotary_dim=4),),
            "moe": moe(
                norm_topk_prob=True,
                scoring="sigmoid",
                correction_bias=True,
                shared_intermediate_size=16,
                routed_scaling_factor=2.5,
            ),
            "moe_layers": (False, True, True),
        },
    ),
    "deepseek2, V3": Case(
        arch="deepseek2",
        keys=MOE_KEYS
        | YARN_KEYS
        | {"rope.scaling.yarn_log_multiplier": 0.125, "attention.head_count_kv": 1}
        | {"attention.q_lora_rank": 20, "attention.kv_lora_rank": 12, "rope.dimension_count": 4}
        | {"attention.key_length": 16, "attention.value_length": 12}
        | {"attention.key_length_mla": 14, "attention.value_length_mla": 6}
        | {"expert_shared_count": 1, "leading_dense_block_count": 1, "expert_weights_scale": 2.5}
        | {"expert_weights_norm": True, "expert_gating_func": 2}
        | {"expert_group_count": 2, "expert_group_used_count": 1},
        config=MLA
        | {
            "family": "deepseek_v3",
            "head_dim": 14,
            "mla": MLAConfig(q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=6),
            "attn_scale": 14**-0.5 * (1 + 0.125 * math.log(4)) ** 2,
            "ropes": (
                RopeConfig(
                    theta=5000.0,
                    rotary_dim=4,
                    interleaved=True,
                    scaling="yarn",
                    factor=4.0,
                    original_max_position_embeddings=16,
                ),
            ),
            "moe": moe(
                scoring="sigmoid",
                norm_topk_prob=True,
                correction_bias=True,
                shared_intermediate_size=16,
                routed_scaling_factor=2.5,
                num_groups=2,
                topk_group=1,
                group_score="top2",
            ),
            "moe_layers": (False, True),
        },
    ),
    "deepseek2, V2 Lite as it was": Case(
        arch="deepseek2",
        keys=MOE_KEYS
        | {"attention.kv_lora_rank": 12, "rope.dimension_count": 4, "attention.head_count_kv": N}
        | {"attention.key_length": 14, "attention.value_length": 6, "expert_shared_count": 2},
        config=MLA
        | {
            "family": "deepseek_v2",
            "head_dim": 14,
            "mla": MLAConfig(q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=6),
            "attn_scale": 14**-0.5,
            "ropes": (RopeConfig(theta=5000.0, rotary_dim=4, interleaved=True),),
            "moe": moe(shared_intermediate_size=32, group_score="max"),
        },
        joint_kv=True,
    ),
}
