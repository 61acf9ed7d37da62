"""What the config.json of a family's models on the hub have in common, and how one model's is made of it."""

from typing import Any

ABSENT = object()
Values = dict[str, Any]


def group(base: Values, **models: Values) -> dict[str, Values]:
    merged = {name: {**base, **own} for name, own in models.items()}
    return {name: {k: v for k, v in values.items() if v is not ABSENT} for name, values in merged.items()}


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int) -> Values:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": length,
    }  # fmt: skip


def common(architecture: str, model_type: str, version: str, **values: Any) -> Values:
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


def yarn(mscale: float) -> Values:
    return {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip


def longrope(num_factors: int, kind: str = "longrope") -> Values:  # the numbers themselves are made up
    short = [1.0 + 0.02 * i for i in range(num_factors)]
    return {"type": kind, "short_factor": short, "long_factor": [1.0 + 1.3 * i for i in range(num_factors)]}
