"""config.json of models on the hub: every key that bears on reading them, with the harmless ones that theirs carry.

Grouped by family: a model is its group's base with its own values over it, ``ABSENT`` taking a key out.
"""

from tests.checkpoint.hub_families import (
    ABSENT,
    DEEPSEEK,
    GEMMA,
    GLM,
    GPT2,
    GPT_OSS,
    LLAMA3_ROPE,
    PHI3,
    QWEN2,
    QWEN2_EXPERTS,
    STARCODER2,
    Values,
    common,
    group,
    longrope,
    sizes,
    yarn,
)

CONFIGS: dict[str, Values] = {
    **group(
        common("LlamaForCausalLM", "llama", "4.43.0", attention_bias=False, mlp_bias=False, pretraining_tp=1),
        **{
            "Llama-2-7b-hf": sizes(4096, 11008, 32, 32, 32, 32000, 4096) | {"rope_theta": ABSENT, "mlp_bias": ABSENT},
            "Llama-3.1-8B-Instruct": sizes(4096, 14336, 32, 32, 8, 128256, 131072)
            | {
                "rope_scaling": LLAMA3_ROPE,
                "rope_theta": 500000.0,
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128008, 128009],
            },
            "Llama-3.1-70B": sizes(8192, 28672, 80, 64, 8, 128256, 131072)
            | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001},
            "Llama-3.2-1B": sizes(2048, 8192, 16, 32, 8, 128256, 131072)
            | {
                "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
                "rope_theta": 500000.0,
                "head_dim": 64,
                "tie_word_embeddings": True,
            },
            "SmolLM2-135M": sizes(576, 1536, 30, 9, 3, 49152, 8192)
            | {
                "tie_word_embeddings": True,
                "rope_theta": 100000,
                "is_llama_config": True,
                "rope_interleaved": False,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            },
            "SmolLM2-1.7B-Instruct": sizes(2048, 8192, 24, 32, 32, 49152, 8192)
            | {"tie_word_embeddings": True, "rope_theta": 130000},
        },
    ),
    **group(
        common("MistralForCausalLM", "mistral", "4.36.0", sliding_window=None, rope_scaling=ABSENT),
        **{
            "Mistral-7B-v0.1": sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"sliding_window": 4096},
            "Mistral-7B-Instruct-v0.2": sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"rope_theta": 1000000.0},
            "Mistral-7B-Instruct-v0.3": sizes(4096, 14336, 32, 32, 8, 32768, 32768) | {"rope_theta": 1000000.0},
            "Mistral-Nemo-Instruct-2407": sizes(5120, 14336, 40, 32, 8, 131072, 1024000)
            | {"head_dim": 128, "rope_theta": 1000000.0},
        },
    ),
    **group(
        common("MixtralForCausalLM", "mixtral", "4.36.0", rope_theta=1000000.0, rope_scaling=ABSENT),
        **{
            "Mixtral-8x7B-Instruct-v0.1": sizes(4096, 14336, 32, 32, 8, 32000, 32768)
            | {
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
                "output_router_logits": False,
                "router_aux_loss_coef": 0.02,
                "sliding_window": None,
            },
        },
    ),
    **group(
        common("Qwen2ForCausalLM", "qwen2", "4.43.1", **QWEN2),
        **{
            "Qwen2.5-0.5B": sizes(896, 4864, 24, 14, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 24},
            "Qwen2.5-1.5B-Instruct": sizes(1536, 8960, 28, 12, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 21},
            "Qwen2.5-3B": sizes(2048, 11008, 36, 16, 2, 151936, 32768)
            | {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 36},
            "Qwen2.5-7B-Instruct": sizes(3584, 18944, 28, 28, 4, 152064, 32768) | {"max_window_layers": 28},
            "Qwen2.5-14B": sizes(5120, 13824, 48, 40, 8, 152064, 131072) | {"max_window_layers": 48},
            "Qwen2.5-32B-Instruct": sizes(5120, 27648, 64, 40, 8, 152064, 32768) | {"max_window_layers": 70},
            "Qwen2.5-72B-Instruct": sizes(8192, 29568, 80, 64, 8, 152064, 32768) | {"max_window_layers": 70},
        },
    ),
    **group(
        common("Qwen2MoeForCausalLM", "qwen2_moe", "4.39.0", **(QWEN2 | QWEN2_EXPERTS | {"use_mrope": ABSENT})),
        **{
            "Qwen1.5-MoE-A2.7B": sizes(2048, 5632, 24, 16, 16, 151936, 8192)
            | {
                "max_window_layers": 21,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "sliding_window": 32768,
            },
            "Qwen2-57B-A14B": sizes(3584, 18944, 28, 28, 4, 151936, 131072)
            | {
                "max_window_layers": 28,
                "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480,
                "num_experts": 64,
                "num_experts_per_tok": 8,
            },
        },
    ),
    **group(
        common("Qwen3ForCausalLM", "qwen3", "4.51.0", **(QWEN2 | {"sliding_window": None, "use_mrope": ABSENT})),
        **{
            "Qwen3-8B": sizes(4096, 12288, 36, 32, 8, 151936, 40960)
            | {"head_dim": 128, "attention_bias": False, "max_window_layers": 36, "rope_scaling": None},
        },
    ),
    **group(
        common(
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
            "Qwen3-30B-A3B": sizes(2048, 6144, 48, 32, 4, 151936, 40960)
            | {"moe_intermediate_size": 768, "max_window_layers": 48},
            "Qwen3-235B-A22B": sizes(4096, 12288, 94, 64, 4, 151936, 40960)
            | {"moe_intermediate_size": 1536, "max_window_layers": 94},
        },
    ),
    **group(
        common("SmolLM3ForCausalLM", "smollm3", "4.54.0.dev0", attention_bias=False, mlp_bias=False),
        **{
            "SmolLM3-3B": sizes(2048, 11008, 36, 16, 4, 128256, 65536)
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
    **group(
        common("GemmaForCausalLM", "gemma", "4.38.0", **GEMMA),
        **{
            "gemma-2b": sizes(2048, 16384, 18, 8, 1, 256000, 8192)
            | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None},
            "gemma-7b": sizes(3072, 24576, 28, 16, 16, 256000, 8192) | {"hidden_activation": ABSENT},
        },
    ),
    **group(
        common(
            "Gemma2ForCausalLM", "gemma2", "4.42.4", **GEMMA,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
            cache_implementation="hybrid",
        ),
        **{
            "gemma-2-2b": sizes(2304, 9216, 26, 8, 4, 256000, 8192) | {"query_pre_attn_scalar": 256},
            "gemma-2-9b-it": sizes(3584, 14336, 42, 16, 8, 256000, 8192)
            | {"query_pre_attn_scalar": 256, "sliding_window_size": 4096},
            "gemma-2-27b": sizes(4608, 36864, 46, 32, 16, 256000, 8192)
            | {"query_pre_attn_scalar": 144, "head_dim": 128, "_attn_implementation": "eager"},
        },
    ),
    **group(
        common(
            "Gemma3ForCausalLM", "gemma3_text", "4.55.0.dev0", **(GEMMA | {"hidden_act": ABSENT, "rope_scaling": None}),
            attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=256, sliding_window=512,
            rope_local_base_freq=10000.0,
        ),
        **{
            "gemma-3-1b-it": sizes(1152, 6912, 26, 4, 1, 262144, 32768)
            | {
                "rope_theta": 1000000,
                "sliding_window_pattern": 6,
                "cache_implementation": "hybrid",
                "eos_token_id": [1, 106],
            },
            "gemma-3-270m": sizes(640, 2048, 18, 4, 1, 262144, 32768)
            | {
                "rope_theta": 1000000.0,
                "_sliding_window_pattern": 6,
                "use_bidirectional_attention": False,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            },
        },
    ),
    **group(
        common("Phi3ForCausalLM", "phi3", "4.40.2", **PHI3),
        **{
            "Phi-3-mini-4k-instruct": sizes(3072, 8192, 32, 32, 32, 32064, 4096) | {"sliding_window": 2047},
            "Phi-3-mini-128k-instruct": sizes(3072, 8192, 32, 32, 32, 32064, 131072)
            | {"rope_scaling": longrope(48, "su"), "sliding_window": 262144},
            "Phi-3-medium-128k-instruct": sizes(5120, 17920, 40, 40, 10, 32064, 131072)
            | {"rope_scaling": longrope(64, "su"), "sliding_window": 131072},
            "Phi-3.5-mini-instruct": sizes(3072, 8192, 32, 32, 32, 32064, 131072)
            | {"rope_scaling": longrope(48), "sliding_window": 262144},
            "phi-4": sizes(5120, 17920, 40, 40, 10, 100352, 16384)
            | {
                "eos_token_id": 100265,
                "bos_token_id": 100257,
                "pad_token_id": 100349,
                "rope_theta": 250000,
                "original_max_position_embeddings": 16384,
                "sliding_window": None,
                "auto_map": ABSENT,
            },
            "Phi-4-mini-instruct": sizes(3072, 8192, 32, 24, 8, 200064, 131072)
            | {
                "eos_token_id": 199999,
                "bos_token_id": 199999,
                "pad_token_id": 199999,
                "full_attn_mod": 1,
                "interpolate_factor": 1,
                "lm_head_bias": False,
                "mlp_bias": False,
                "partial_rotary_factor": 0.75,
                "rope_scaling": longrope(48),
                "sliding_window": 262144,
                "tie_word_embeddings": True,
            },
        },
    ),
    **group(
        common(
            "Olmo2ForCausalLM", "olmo2", "4.47.0.dev0", attention_bias=False, rms_norm_eps=1e-6, rope_theta=500000,
            bos_token_id=ABSENT, eos_token_id=100257, pad_token_id=100277,
        ),
        **{
            "OLMo-2-1124-7B": sizes(4096, 11008, 32, 32, 32, 100352, 4096),
            "OLMo-2-1124-13B": sizes(5120, 13824, 40, 40, 40, 100352, 4096),
        },
    ),
    **group(
        common(
            "GraniteForCausalLM", "granite", "4.47.0.dev0", attention_bias=False, mlp_bias=False, attention_dropout=0.1,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, embedding_multiplier=12.0, residual_multiplier=0.22,
            tie_word_embeddings=True,
        ),
        **{
            "granite-3.1-2b-instruct": sizes(2048, 8192, 40, 32, 8, 49155, 131072)
            | {"attention_multiplier": 0.015625, "logits_scaling": 8.0, "rope_theta": 5000000.0},
            "granite-3.1-8b-instruct": sizes(4096, 12800, 40, 32, 8, 49155, 131072)
            | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0, "rope_theta": 10000000.0},
        },
    ),
    **group(
        common("Starcoder2ForCausalLM", "starcoder2", "4.37.0.dev0", **STARCODER2),
        **{
            "starcoder2-3b": sizes(3072, 12288, 30, 24, 2, 49152, 16384) | {"rope_theta": 999999.4420358813},
            "starcoder2-7b": sizes(4608, 18432, 32, 36, 4, 49152, 16384) | {"rope_theta": 1000000},
            "starcoder2-15b": sizes(6144, 24576, 40, 48, 4, 49152, 16384)
            | {"rope_theta": 100000, "tie_word_embeddings": False, "rope_scaling": None},
        },
    ),
    **group(
        GPT2,
        **{
            "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 12},
            "gpt2-medium": {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0}
            | {"predict_special_tokens": True},
            "gpt2-xl": {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
        },
    ),
    **group(
        common("GptOssForCausalLM", "gpt_oss", "4.55.0.dev0", **GPT_OSS),
        **{
            "gpt-oss-20b": sizes(2880, 2880, 24, 64, 8, 201088, 131072)
            | {"num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 12},
            "gpt-oss-120b": sizes(2880, 2880, 36, 64, 8, 201088, 131072)
            | {"num_local_experts": 128, "layer_types": ["sliding_attention", "full_attention"] * 18},
        },
    ),
    **group(
        common("Glm4MoeForCausalLM", "glm4_moe", "4.54.0", **GLM),
        **{
            "GLM-4.5": sizes(5120, 12288, 92, 96, 8, 151552, 131072)
            | {
                "moe_intermediate_size": 1536,
                "n_routed_experts": 160,
                "first_k_dense_replace": 3,
                "routed_scaling_factor": 2.5,
                "use_qk_norm": True,
            },
            "GLM-4.5-Air": sizes(4096, 10944, 46, 96, 8, 151552, 131072)
            | {
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "first_k_dense_replace": 1,
                "routed_scaling_factor": 1.0,
                "use_qk_norm": False,
            },
        },
    ),
    **group(
        common("DeepseekV2ForCausalLM", "deepseek_v2", "4.33.1", **DEEPSEEK, norm_topk_prob=False),
        **{
            "DeepSeek-V2-Lite": sizes(2048, 10944, 27, 16, 16, 102400, 163840)
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
                "rope_scaling": yarn(0.707),
            },
            "DeepSeek-V2": sizes(5120, 12288, 60, 128, 128, 102400, 163840)
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
                "rope_scaling": yarn(0.707),
            },
        },
    ),
    **group(
        common("DeepseekV3ForCausalLM", "deepseek_v3", "4.33.1", **DEEPSEEK, norm_topk_prob=True),
        **{
            "DeepSeek-V3": sizes(7168, 18432, 61, 128, 128, 129280, 163840)
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
                "rope_scaling": yarn(1.0),
            },
            "Moonlight-16B-A3B": sizes(2048, 11264, 27, 16, 16, 163840, 8192)
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
