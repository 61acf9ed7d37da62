"""The tiny models that ``make_golden_models.py`` makes: for every family the flags that it has, in small.

Layers are four where they differ, else two; windows and original rope lengths are shorter than the prompt.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Golden:
    """One model: a config class of transformers and its values, and how to fill and test it.

    Attributes:
        dtype: of the stored weights.
        max_model_len: that an engine must be started with: longrope goes by it.
        gains: standard deviation times this, for parameters whose name contains the key (the first that matches).
        matters: changes of ``config.json`` (dotted keys) of which each must change the logits.
        old: what else the config of transformers 4, or the model's makers, said.
    """

    config: str
    values: dict[str, Any]
    dtype: str = "bfloat16"
    prompt_len: int = 37
    max_model_len: int = 64
    max_shard_size: str = "5GB"
    gains: dict[str, float] = field(default_factory=dict)
    matters: tuple[dict[str, Any], ...] = ()
    old: dict[str, Any] = field(default_factory=dict)


def sizes(eps_key: str = "rms_norm_eps", **values: Any) -> dict[str, Any]:
    """Values that most configs share, overridden by ``values``."""
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        eps_key: 0.01,  # large enough to be seen
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return common | values


def rope(theta: float, rope_type: str = "default", **values: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": rope_type, **values}


TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
LLAMA3 = rope(
    500.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN: dict[str, Any] = {"factor": 8.0, "beta_fast": 2.0, "beta_slow": 0.5, "original_max_position_embeddings": 16}
WINDOW: dict[str, Any] = {"sliding_window": 8}
NO_WINDOW: dict[str, Any] = {"sliding_window": 64}


def longrope(num_factors: int, **values: Any) -> dict[str, Any]:
    short = [round(1.0 + 0.15 * i, 3) for i in range(num_factors)]
    long = [round(1.5 + 1.3 * i, 3) for i in range(num_factors)]
    return rope(300.0, "longrope", short_factor=short, long_factor=long, **values)


GOLDENS: dict[str, Golden] = {
    "llama": Golden(
        "LlamaConfig",
        sizes(rope_parameters=rope(10000.0), vocab_size=99, **UNTIED),
        max_shard_size="40KB",
        matters=({"rope_parameters.rope_theta": 300.0},),
    ),
    "llama3_rope": Golden(
        "LlamaConfig",
        sizes(rope_parameters=LLAMA3, head_dim=16, **TIED),
        dtype="float32",
        matters=(
            {"rope_parameters.factor": 4.0},
            {"rope_parameters.low_freq_factor": 2.0},
            {"rope_parameters.high_freq_factor": 8.0},
            {"rope_parameters.original_max_position_embeddings": 64},
        ),
    ),
    "llama_bias_linear": Golden(
        "LlamaConfig",
        sizes(
            rope_parameters=rope(500.0, "linear", factor=4.0),
            attention_bias=True,
            mlp_bias=True,
            num_hidden_layers=2,
            **UNTIED,
        ),
        matters=({"rope_parameters.factor": 1.0},),
    ),
    "qwen2": Golden("Qwen2Config", sizes(num_hidden_layers=2, rope_parameters=rope(10000.0), **TIED)),
    "qwen2_window": Golden(
        "Qwen2Config",
        sizes(
            rope_parameters=rope(1000.0),
            vocab_size=99,
            use_sliding_window=True,
            max_window_layers=2,
            **WINDOW,
            **UNTIED,
        ),
        dtype="float32",
        matters=(NO_WINDOW, {"sliding_window": 9}, {"layer_types": ["sliding_attention"] * 4}),
    ),
    "qwen3": Golden(
        "Qwen3Config",
        sizes(num_hidden_layers=2, rope_parameters=rope(10000.0), head_dim=16, **TIED),
        matters=({"rope_parameters.rope_theta": 300.0},),
    ),
    "qwen3_yarn": Golden(
        "Qwen3Config",
        sizes(rope_parameters=rope(1000.0, "yarn", **YARN), head_dim=16, num_hidden_layers=2, **UNTIED),
        matters=(
            {"rope_parameters.factor": 4.0},
            {"rope_parameters.beta_fast": 1.0},
            {"rope_parameters.beta_slow": 2.0},
            {"rope_parameters.attention_factor": 1.0},
        ),
    ),
    "gemma3": Golden(
        "Gemma3TextConfig",
        sizes(
            rope_parameters={
                "full_attention": rope(3000.0, "linear", factor=8.0),
                "sliding_attention": rope(100.0),
            },
            head_dim=16,
            num_hidden_layers=6,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            **WINDOW,
            **TIED,
        ),
        gains={"embed_tokens": 0.6},
        matters=(
            NO_WINDOW,
            {"sliding_window": 9},
            {"query_pre_attn_scalar": 16},
            {"rope_parameters.full_attention.factor": 1.0},
            {"rope_parameters.full_attention.rope_theta": 100.0},
            {"rope_parameters.sliding_attention.rope_theta": 3000.0},
        ),
        old={"sliding_window_pattern": 3},
    ),
    "phi3_long": Golden(
        "Phi3Config",
        sizes(
            num_hidden_layers=2,
            rope_parameters=longrope(4, partial_rotary_factor=1.0),
            original_max_position_embeddings=16,
            **UNTIED,
        ),
        matters=({"rope_parameters.attention_factor": 1.0},),
    ),
    "phi3_short": Golden(  # so short that the short factors are taken; every layer slides
        "Phi3Config",
        sizes(
            num_hidden_layers=2,
            rope_parameters=longrope(4, partial_rotary_factor=1.0),
            original_max_position_embeddings=64,
            **WINDOW,
            **UNTIED,
        ),
        dtype="float32",
        matters=({"rope_parameters.attention_factor": 1.0}, NO_WINDOW),
    ),
    "phi3_partial": Golden(  # as Phi-4-mini
        "Phi3Config",
        sizes(
            rope_parameters=longrope(6, partial_rotary_factor=0.75),
            original_max_position_embeddings=16,
            hidden_size=64,
            num_hidden_layers=2,
            **TIED,
        ),
        matters=({"rope_parameters.attention_factor": 1.0},),
    ),
    "gpt2": Golden(
        "GPT2Config",
        {
            "vocab_size": 99,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "layer_norm_epsilon": 0.01,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        dtype="float32",
    ),
    "mixtral": Golden(
        "MixtralConfig",
        sizes(
            num_hidden_layers=2,
            rope_parameters=rope(10000.0),
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            **UNTIED,
        ),
        max_shard_size="60KB",
        matters=({"num_experts_per_tok": 3},),
    ),
    "gpt_oss": Golden(
        "GptOssConfig",
        sizes(
            rope_parameters=rope(1000.0, "yarn", truncate=False, **YARN),
            intermediate_size=16,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=3,
            **WINDOW,
            **UNTIED,
        ),
        gains={"gate_up_proj": 4.0, "down_proj": 0.5},
        matters=(
            NO_WINDOW,
            {"swiglu_limit": 100.0},
            {"rope_parameters.truncate": True},
            {"rope_parameters.attention_factor": 1.0},
            {"num_experts_per_tok": 2},
        ),
        old={"swiglu_limit": 7.0, "initial_context_length": 16, "experts_per_token": 3},
    ),
    "deepseek_v3": Golden(
        "DeepseekV3Config",
        sizes(
            rope_parameters=rope(1000.0, "yarn", mscale=1.0, mscale_all_dim=0.6, **YARN),
            num_key_value_heads=4,
            rms_norm_eps=1e-6,  # as its inner norms always have
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=10,
            moe_intermediate_size=8,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            norm_topk_prob=True,
            **UNTIED,
        ),
        matters=(
            {"rope_parameters.mscale": 0.6},
            {"rope_parameters.mscale_all_dim": 1.0},
            {"rope_parameters.factor": 4.0},
            {"rope_interleave": False},
            {"topk_group": 4},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 1.0},
        ),
        old={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "mistral": Golden(
        "MistralConfig",
        sizes(num_hidden_layers=2, rope_parameters=rope(10000.0), head_dim=16, **WINDOW, **UNTIED),
        matters=(NO_WINDOW, {"sliding_window": 9}),
    ),
    "smollm3": Golden(
        "SmolLM3Config",
        sizes(rope_parameters=rope(10000.0), no_rope_layer_interval=3, **TIED),
        matters=({"no_rope_layers": [1, 1, 1, 1]}, {"no_rope_layers": [1, 1, 1, 0]}),
    ),
    "gemma": Golden(
        "GemmaConfig",
        sizes(num_hidden_layers=2, rope_parameters=rope(10000.0), num_key_value_heads=1, head_dim=16, **TIED),
        old={"hidden_act": "gelu", "hidden_activation": None},  # and means the other gelu
    ),
    "gemma2": Golden(
        "Gemma2Config",
        sizes(
            rope_parameters=rope(10000.0),
            head_dim=16,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
            **WINDOW,
            **TIED,
        ),
        dtype="float32",
        gains={"embed_tokens": 0.6},
        matters=(
            NO_WINDOW,
            {"query_pre_attn_scalar": 16},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
        ),
    ),
    "olmo2": Golden("Olmo2Config", sizes(num_hidden_layers=2, rope_parameters=rope(10000.0), **UNTIED)),
    "granite": Golden(
        "GraniteConfig",
        sizes(
            num_hidden_layers=2,
            rope_parameters=rope(10000.0),
            embedding_multiplier=2.0,
            attention_multiplier=0.2,
            residual_multiplier=0.6,
            logits_scaling=1.6,
            **TIED,
        ),
        gains={"embed_tokens": 1.3},
        matters=(
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 8**-0.5},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ),
    ),
    "starcoder2": Golden(
        "Starcoder2Config",
        sizes(num_hidden_layers=2, eps_key="norm_epsilon", rope_parameters=rope(10000.0), **WINDOW, **TIED),
        matters=(NO_WINDOW, {"sliding_window": 9}),
    ),
    "qwen2_moe": Golden(
        "Qwen2MoeConfig",
        sizes(
            rope_parameters=rope(10000.0),
            decoder_sparse_step=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            **UNTIED,
        ),
        matters=({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
    ),
    "qwen2_moe_mlp_only": Golden(
        "Qwen2MoeConfig",
        sizes(
            rope_parameters=rope(10000.0),
            mlp_only_layers=[0, 2],
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            qkv_bias=False,
            **UNTIED,
        ),
        dtype="float32",
        matters=({"norm_topk_prob": False},),
    ),
    "qwen3_moe": Golden(
        "Qwen3MoeConfig",
        sizes(
            num_hidden_layers=2,
            rope_parameters=rope(10000.0),
            head_dim=16,
            moe_intermediate_size=12,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            **UNTIED,
        ),
        matters=({"norm_topk_prob": False},),
    ),
    "glm4_moe": Golden(
        "Glm4MoeConfig",
        sizes(
            num_hidden_layers=2,
            rope_parameters=rope(1000.0, partial_rotary_factor=0.5),
            head_dim=16,
            attention_bias=True,
            use_qk_norm=True,
            moe_intermediate_size=12,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
            **UNTIED,
        ),
        matters=({"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}),
    ),
    "deepseek_v2": Golden(
        "DeepseekV2Config",
        sizes(
            num_hidden_layers=2,
            rope_parameters=rope(1000.0, "yarn", mscale=0.707, mscale_all_dim=0.707, **YARN),
            num_key_value_heads=4,
            rms_norm_eps=1e-6,  # as its inner norms always have
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
            moe_intermediate_size=8,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            topk_method="group_limited_greedy",
            n_group=3,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=3.0,
            norm_topk_prob=False,
            **UNTIED,
        ),
        matters=(
            {"rope_parameters.factor": 4.0},
            {"rope_parameters.mscale_all_dim": 0.3},
            {"topk_group": 3},
            {"topk_method": "greedy"},
            {"routed_scaling_factor": 1.0},
        ),
        old={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
}
