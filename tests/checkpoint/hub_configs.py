"""config.json of models on the hub: every key that bears on reading them, with the harmless ones that theirs carry.

Grouped by family: a model is its group's base with its own values over it, ``ABSENT`` taking a key out.
"""

from typing import Any

ABSENT = object()
Values = dict[str, Any]


def _group(base: Values, **models: Values) -> dict[str, Values]:
    merged = {name: {**base, **own} for name, own in models.items()}
    return {name: {k: v for k, v in values.items() if v is not ABSENT} for name, values in merged.items()}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int) -> Values:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": length,
    }  # fmt: skip


def _common(architecture: str, model_type: str, version: str, **values: Any) -> Values:
    return {
        "architectures": [architecture], "model_type": model_type, "transformers_version": version,
        "torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": False, **values,
    }  # fmt: skip


LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN2 = {
    "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False, "rope_scaling": ABSENT,
}  # fmt: skip
QWEN2_EXPERTS = {
    "decoder_sparse_step": 1, "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
GEMMA = {
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "attention_bias": False, "rope_scaling": ABSENT,
    "tie_word_embeddings": ABSENT,
}  # fmt: skip
PHI3 = {
    "_name_or_path": "Phi-3", "eos_token_id": 32000, "pad_token_id": 32000, "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096,
}  # fmt: skip
STARCODER2 = {
    "activation_function": "gelu", "attention_dropout": 0.1, "attention_softmax_in_fp32": True, "bos_token_id": 0,
    "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5,
    "mlp_type": "default", "norm_epsilon": 1e-5, "norm_type": "layer_norm", "residual_dropout": 0.1,
    "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True,
    "rms_norm_eps": ABSENT, "rope_scaling": ABSENT, "tie_word_embeddings": ABSENT,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip
GPT_OSS = {
    "attention_bias": True, "eos_token_id": 200002, "pad_token_id": 199999, "bos_token_id": ABSENT,
    "experts_per_token": 4, "num_experts_per_tok": 4, "head_dim": 64, "initial_context_length": 4096,
    "output_router_logits": False, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "rope_theta": 150000, "torch_dtype": ABSENT, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
}  # fmt: skip
GLM = {
    "attention_bias": True, "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "bos_token_id": ABSENT,
    "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 1000000, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1,
}  # fmt: skip
DEEPSEEK = {
    "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "kv_lora_rank": 512, "moe_layer_freq": 1,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "pretraining_tp": 1, "seq_aux": True,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000,
}  # fmt: skip


def _yarn(mscale: float) -> Values:
    return {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip


def _longrope(num_factors: int, kind: str = "longrope") -> Values:  # the numbers themselves are made up
    short = [1.0 + 0.02 * i for i in range(num_factors)]
    return {"type": kind, "short_factor": short, "long_factor": [1.0 + 1.3 * i for i in range(num_factors)]}


CONFIGS: dict[str, Values] = {
    **_group(
        _common("LlamaForCausalLM", "llama", "4.43.0", attention_bias=False, mlp_bias=False, pretraining_tp=1),
        **{
            "Llama-2-7b-hf": _sizes(4096, 11008, 32, 32, 32, 32000, 4096) | {"rope_theta": ABSENT, "mlp_bias": ABSENT},
            "Llama-3.1-8B-Instruct": _sizes(4096, 14336, 32, 32, 8, 128256, 131072)
            | {
                "rope_scaling": LLAMA3_ROPE,
                "rope_theta": 500000.0,
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128008, 128009],
            },
            "Llama-3.1-70B": _sizes(8192, 28672, 80, 64, 8, 128256, 131072)
            | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001},
            "Llama-3.2-1B": _sizes(2048, 8192, 16, 32, 8, 128256, 131072)
            | {
                "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
                "rope_theta": 500000.0,
                "head_dim": 64,
                "tie_word_embeddings": True,
            },
            "SmolLM2-135M": _sizes(576, 1536, 30, 9, 3, 49152, 8192)
            | {
                "tie_word_embeddings": True,
                "rope_theta": 100000,
                "is_llama_config": True,
                "rope_interleaved": False,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            },
            "SmolLM2-1.7B-Instruct": _sizes(2048, 8192, 24, 32, 32, 49152, 8192)
            | {"tie_word_embeddings": True, "rope_theta": 130000},
        },
    ),
    **_group(
        _common("MistralForCausalLM", "mistral", "4.36.0", sliding_window=None, rope_scaling=ABSENT),
        **{
            "Mistral-7B-v0.1": _sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"sliding_window": 4096},
            "Mistral-7B-Instruct-v0.2": _sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"rope_theta": 1000000.0},
            "Mistral-7B-Instruct-v0.3": _sizes(4096, 14336, 32, 32, 8, 32768, 32768) | {"rope_theta": 1000000.0},
            "Mistral-Nemo-Instruct-2407": _sizes(5120, 14336, 40, 32, 8, 131072, 1024000)
            | {"head_dim": 128, "rope_theta": 1000000.0},
        },
    ),
    **_group(
        _common("MixtralForCausalLM", "mixtral", "4.36.0", rope_theta=1000000.0, rope_scaling=ABSENT),
        **{
            "Mixtral-8x7B-Instruct-v0.1": _sizes(4096, 14336, 32, 32, 8, 32000, 32768)
            | {
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
                "output_router_logits": False,
                "router_aux_loss_coef": 0.02,
                "sliding_window": None,
            },
        },
    ),
    **_group(
        _common("Qwen2ForCausalLM", "qwen2", "4.43.1", **QWEN2),
        **{
            "Qwen2.5-0.5B": _sizes(896, 4864, 24, 14, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 24},
            "Qwen2.5-1.5B-Instruct": _sizes(1536, 8960, 28, 12, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 21},
            "Qwen2.5-3B": _sizes(2048, 11008, 36, 16, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 36},
            "Qwen2.5-7B-Instruct": _sizes(3584, 18944, 28, 28, 4, 152064, 32768) | {"max_window_layers": 28},
            "Qwen2.5-14B": _sizes(5120, 13824, 48, 40, 8, 152064, 131072) | {"max_window_layers": 48},
            "Qwen2.5-32B-Instruct": _sizes(5120, 27648, 64, 40, 8, 152064, 32768) | {"max_window_layers": 70},
            "Qwen2.5-72B-Instruct": _sizes(8192, 29568, 80, 64, 8, 152064, 32768) | {"max_window_layers": 70},
        },
    ),
    **_group(
        _common("Qwen2MoeForCausalLM", "qwen2_moe", "4.39.0", **(QWEN2 | QWEN2_EXPERTS | {"use_mrope": ABSENT})),
        **{
            "Qwen1.5-MoE-A2.7B": _sizes(2048, 5632, 24, 16, 16, 151936, 8192)
            | {
                "max_window_layers": 21,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "sliding_window": 32768,
            },
            "Qwen2-57B-A14B": _sizes(3584, 18944, 28, 28, 4, 151936, 131072)
            | {
                "max_window_layers": 28,
                "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480,
                "num_experts": 64,
                "num_experts_per_tok": 8,
            },
        },
    ),
    **_group(
        _common("Qwen3ForCausalLM", "qwen3", "4.51.0", **(QWEN2 | {"sliding_window": None, "use_mrope": ABSENT})),
        **{
            "Qwen3-8B": _sizes(4096, 12288, 36, 32, 8, 151936, 40960)
            | {"head_dim": 128, "attention_bias": False, "max_window_layers": 36, "rope_scaling": None},
        },
    ),
    **_group(
        _common(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "4.51.0",
            **(QWEN2 | QWEN2_EXPERTS | {"sliding_window": None, "use_mrope": ABSENT, "norm_topk_prob": True}),
            head_dim=128,
            attention_bias=False,
            mlp_only_layers=[],
            num_experts=128,
            num_experts_per_tok=8,
        ),
        **{
            "Qwen3-30B-A3B": _sizes(2048, 6144, 48, 32, 4, 151936, 40960)
            | {"moe_intermediate_size": 768, "max_window_layers": 48},
            "Qwen3-235B-A22B": _sizes(4096, 12288, 94, 64, 4, 151936, 40960)
            | {"moe_intermediate_size": 1536, "max_window_layers": 94},
        },
    ),
    **_group(
        _common("SmolLM3ForCausalLM", "smollm3", "4.54.0.dev0", attention_bias=False, mlp_bias=False),
        **{
            "SmolLM3-3B": _sizes(2048, 11008, 36, 16, 4, 128256, 65536)
            | {
                "tie_word_embeddings": ABSENT,
                "rope_theta": 5000000.0,
                "rms_norm_eps": 1e-6,
                "layer_types": ["full_attention"] * 36,
                "max_window_layers": 28,
                "no_rope_layer_interval": 4,
                "no_rope_layers": [1, 1, 1, 0] * 9,
                "pretraining_tp": 2,
                "use_sliding_window": False,
                "sliding_window": None,
                "eos_token_id": 128012,
                "bos_token_id": 128000,
                "pad_token_id": 128004,
            },
        },
    ),
    **_group(
        _common("GemmaForCausalLM", "gemma", "4.38.0", **GEMMA),
        **{
            "gemma-2b": _sizes(2048, 16384, 18, 8, 1, 256000, 8192)
            | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None},
            "gemma-7b": _sizes(3072, 24576, 28, 16, 16, 256000, 8192) | {"hidden_activation": ABSENT},
        },
    ),
    **_group(
        _common(
            "Gemma2ForCausalLM", "gemma2", "4.42.4", **GEMMA,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
            cache_implementation="hybrid",
        ),
        **{
            "gemma-2-2b": _sizes(2304, 9216, 26, 8, 4, 256000, 8192) | {"query_pre_attn_scalar": 256},
            "gemma-2-9b-it": _sizes(3584, 14336, 42, 16, 8, 256000, 8192)
            | {"query_pre_attn_scalar": 256, "sliding_window_size": 4096},
            "gemma-2-27b": _sizes(4608, 36864, 46, 32, 16, 256000, 8192)
            | {"query_pre_attn_scalar": 144, "head_dim": 128, "_attn_implementation": "eager"},
        },
    ),
    **_group(
        _common(
            "Gemma3ForCausalLM", "gemma3_text", "4.55.0.dev0", **(GEMMA | {"hidden_act": ABSENT, "rope_scaling": None}),
            attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=256, sliding_window=512,
            rope_local_base_freq=10000.0,
        ),
        **{
            "gemma-3-1b-it": _sizes(1152, 6912, 26, 4, 1, 262144, 32768)
            | {
                "rope_theta": 1000000,
                "sliding_window_pattern": 6,
                "cache_implementation": "hybrid",
                "eos_token_id": [1, 106],
            },
            "gemma-3-270m": _sizes(640, 2048, 18, 4, 1, 262144, 32768)
            | {
                "rope_theta": 1000000.0,
                "_sliding_window_pattern": 6,
                "use_bidirectional_attention": False,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            },
        },
    ),
    **_group(
        _common("Phi3ForCausalLM", "phi3", "4.40.2", **PHI3),
        **{
            "Phi-3-mini-4k-instruct": _sizes(3072, 8192, 32, 32, 32, 32064, 4096) | {"sliding_window": 2047},
            "Phi-3-mini-128k-instruct": _sizes(3072, 8192, 32, 32, 32, 32064, 131072)
            | {"rope_scaling": _longrope(48, "su"), "sliding_window": 262144},
            "Phi-3-medium-128k-instruct": _sizes(5120, 17920, 40, 40, 10, 32064, 131072)
            | {"rope_scaling": _longrope(64, "su"), "sliding_window": 131072},
            "Phi-3.5-mini-instruct": _sizes(3072, 8192, 32, 32, 32, 32064, 131072)
            | {"rope_scaling": _longrope(48), "sliding_window": 262144},
            "phi-4": _sizes(5120, 17920, 40, 40, 10, 100352, 16384)
            | {
                "eos_token_id": 100265,
                "bos_token_id": 100257,
                "pad_token_id": 100349,
                "rope_theta": 250000,
                "original_max_position_embeddings": 16384,
                "sliding_window": None,
                "auto_map": ABSENT,
            },
            "Phi-4-mini-instruct": _sizes(3072, 8192, 32, 24, 8, 200064, 131072)
            | {
                "eos_token_id": 199999,
                "bos_token_id": 199999,
                "pad_token_id": 199999,
                "full_attn_mod": 1,
                "interpolate_factor": 1,
                "lm_head_bias": False,
                "mlp_bias": False,
                "partial_rotary_factor": 0.75,
                "rope_scaling": _longrope(48),
                "sliding_window": 262144,
                "tie_word_embeddings": True,
            },
        },
    ),
    **_group(
        _common(
            "Olmo2ForCausalLM", "olmo2", "4.47.0.dev0", attention_bias=False, rms_norm_eps=1e-6, rope_theta=500000,
            bos_token_id=ABSENT, eos_token_id=100257, pad_token_id=100277,
        ),
        **{
            "OLMo-2-1124-7B": _sizes(4096, 11008, 32, 32, 32, 100352, 4096),
            "OLMo-2-1124-13B": _sizes(5120, 13824, 40, 40, 40, 100352, 4096),
        },
    ),
    **_group(
        _common(
            "GraniteForCausalLM", "granite", "4.47.0.dev0", attention_bias=False, mlp_bias=False, attention_dropout=0.1,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, embedding_multiplier=12.0, residual_multiplier=0.22,
            tie_word_embeddings=True,
        ),
        **{
            "granite-3.1-2b-instruct": _sizes(2048, 8192, 40, 32, 8, 49155, 131072)
            | {"attention_multiplier": 0.015625, "logits_scaling": 8.0, "rope_theta": 5000000.0},
            "granite-3.1-8b-instruct": _sizes(4096, 12800, 40, 32, 8, 49155, 131072)
            | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0, "rope_theta": 10000000.0},
        },
    ),
    **_group(
        _common("Starcoder2ForCausalLM", "starcoder2", "4.37.0.dev0", **STARCODER2),
        **{
            "starcoder2-3b": _sizes(3072, 12288, 30, 24, 2, 49152, 16384) | {"rope_theta": 999999.4420358813},
            "starcoder2-7b": _sizes(4608, 18432, 32, 36, 4, 49152, 16384) | {"rope_theta": 1000000},
            "starcoder2-15b": _sizes(6144, 24576, 40, 48, 4, 49152, 16384)
            | {"rope_theta": 100000, "tie_word_embeddings": False, "rope_scaling": None},
        },
    ),
    **_group(
        GPT2,
        **{
            "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 12},
            "gpt2-medium": {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0}
            | {"predict_special_tokens": True},
            "gpt2-xl": {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
        },
    ),
    **_group(
        _common("GptOssForCausalLM", "gpt_oss", "4.55.0.dev0", **GPT_OSS),
        **{
            "gpt-oss-20b": _sizes(2880, 2880, 24, 64, 8, 201088, 131072)
            | {"num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 12},
            "gpt-oss-120b": _sizes(2880, 2880, 36, 64, 8, 201088, 131072)
            | {"num_local_experts": 128, "layer_types": ["sliding_attention", "full_attention"] * 18},
        },
    ),
    **_group(
        _common("Glm4MoeForCausalLM", "glm4_moe", "4.54.0", **GLM),
        **{
            "GLM-4.5": _sizes(5120, 12288, 92, 96, 8, 151552, 131072)
            | {
                "moe_intermediate_size": 1536,
                "n_routed_experts": 160,
                "first_k_dense_replace": 3,
                "routed_scaling_factor": 2.5,
                "use_qk_norm": True,
            },
            "GLM-4.5-Air": _sizes(4096, 10944, 46, 96, 8, 151552, 131072)
            | {
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "first_k_dense_replace": 1,
                "routed_scaling_factor": 1.0,
                "use_qk_norm": False,
            },
        },
    ),
    **_group(
        _common("DeepseekV2ForCausalLM", "deepseek_v2", "4.33.1", **DEEPSEEK, norm_topk_prob=False),
        **{
            "DeepSeek-V2-Lite": _sizes(2048, 10944, 27, 16, 16, 102400, 163840)
            | {
                "bos_token_id": 100000,
                "eos_token_id": 100001,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 1408,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "q_lora_rank": None,
                "routed_scaling_factor": 1.0,
                "scoring_func": "softmax",
                "rope_scaling": _yarn(0.707),
            },
            "DeepSeek-V2": _sizes(5120, 12288, 60, 128, 128, 102400, 163840)
            | {
                "bos_token_id": 100000,
                "eos_token_id": 100001,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 1536,
                "n_group": 8,
                "topk_group": 3,
                "topk_method": "group_limited_greedy",
                "n_routed_experts": 160,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "q_lora_rank": 1536,
                "routed_scaling_factor": 16.0,
                "scoring_func": "softmax",
                "rope_scaling": _yarn(0.707),
            },
        },
    ),
    **_group(
        _common("DeepseekV3ForCausalLM", "deepseek_v3", "4.33.1", **DEEPSEEK, norm_topk_prob=True),
        **{
            "DeepSeek-V3": _sizes(7168, 18432, 61, 128, 128, 129280, 163840)
            | {
                "bos_token_id": 0,
                "eos_token_id": 1,
                "first_k_dense_replace": 3,
                "moe_intermediate_size": 2048,
                "n_group": 8,
                "topk_group": 4,
                "topk_method": "noaux_tc",
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "num_nextn_predict_layers": 1,
                "q_lora_rank": 1536,
                "routed_scaling_factor": 2.5,
                "scoring_func": "sigmoid",
                "rope_scaling": _yarn(1.0),
            },
            "Moonlight-16B-A3B": _sizes(2048, 11264, 27, 16, 16, 163840, 8192)
            | {
                "bos_token_id": 163584,
                "eos_token_id": 163585,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 1408,
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "noaux_tc",
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "num_nextn_predict_layers": 0,
                "q_lora_rank": None,
                "routed_scaling_factor": 2.446,
                "scoring_func": "sigmoid",
                "rms_norm_eps": 1e-5,  # with 1e-6 inside of attention
                "rope_theta": 50000.0,
                "rope_scaling": ABSENT,
            },
        },
    ),
}  # fmt: skip

MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTIZED: dict[str, Values] = {  # as their makers publish them, and not served
    "gpt-oss-20b": CONFIGS["gpt-oss-20b"] | {"quantization_config": MXFP4},
    "gpt-oss-120b": CONFIGS["gpt-oss-120b"] | {"quantization_config": MXFP4},
    "DeepSeek-V3.1": CONFIGS["DeepSeek-V3"] | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
}
SERVED_QUANTIZED: dict[str, Values] = {  # with the keys that the tools of their makers write
    "DeepSeek-V3": CONFIGS["DeepSeek-V3"] | {"quantization_config": FP8},
    "Qwen2.5-0.5B-Instruct-AWQ": CONFIGS["Qwen2.5-0.5B"]
    | {
        "quantization_config": {
            "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
            "zero_point": True,
        }
    },
    "Qwen2.5-0.5B-Instruct-GPTQ-Int4": CONFIGS["Qwen2.5-0.5B"]
    | {
        "quantization_config": {
            "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
            "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
            "group_size": 128, "max_input_length": None, "model_seqlen": None,
            "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None,
            "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
            "use_exllama": True,
        }
    },
    "Llama-3.1-8B-Instruct-quantized.w8a8": CONFIGS["Llama-3.1-8B-Instruct"]
    | {
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                        "observer": "memoryless", "observer_kwargs": {}, "strategy": "token", "symmetric": True,
                        "type": "int",
                    },
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                        "observer": "mse", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "int-quantized", "global_compression_ratio": 1.2, "ignore": ["lm_head"],
            "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "frozen",
        }
    },
}  # fmt: skip
