"""Hugging Face architectures as data: what a family's config.json may say, and which tensors it has.

Defaults are those of the transformers configuration classes, which leave a default out of config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.checkpoint.hf.tensors import (
    GPT2_TENSORS,
    GPT_OSS_TENSORS,
    LLAMA_TENSORS,
    MIXTRAL_TENSORS,
    MLA_TENSORS,
    MOE_TENSORS,
    OLMO2_TENSORS,
    PHI3_TENSORS,
    POST_NORM_TENSORS,
    STARCODER2_TENSORS,
    Recipes,
)

INV_FREQ = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # old checkpoints: follows from the config
GPT2_MASKS = r"(transformer\.)?h\.\d+\.(attn|crossattention)\.(bias|masked_bias)"  # the causal mask as a buffer


@dataclass(frozen=True, kw_only=True)
class HFFamily:
    """One architecture.

    Attributes:
        architecture: ``architectures`` in config.json.
        model_type: ``model_type`` in config.json, and ``ModelConfig.family``.
        tensors: our parameter -> its recipes.
        prefixes: of tensor names; the one under which the embedding is found.
        ignored: patterns of tensors that say nothing the config does not.
        flags: fields of ``ModelConfig`` that are the same for the whole family.
        defaults: config.json key -> what an absent key means, where that differs from ``DEFAULTS``.
        renamed: the family's own name of a key -> ours.
        checked: keys that are the same for the whole family -> the values that we serve.
        attention_bias: what ``attention_bias`` (or ``bias_key``) puts a bias on, with output projection or without.
        windows: none; "all" layers have ``sliding_window``; "flagged" where ``use_sliding_window`` says so, as "all"
            or from ``max_window_layers`` on; "pattern" by ``layer_types`` or every ``sliding_window_pattern``-th full.
        rope: "none"; "one" for all layers; "two" by layer type (Gemma 3).
        moe: which keys describe the experts.
    """

    architecture: str
    model_type: str
    tensors: Recipes
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = (INV_FREQ,)
    flags: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    checked: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention_bias: Literal["never", "qkv", "qkv_and_out"] = "never"
    bias_key: str = "attention_bias"
    norm_key: str = "rms_norm_eps"
    activation_keys: tuple[str, ...] = ("hidden_act",)
    windows: Literal["none", "all", "flagged", "pattern"] = "none"
    rope: Literal["none", "one", "two"] = "one"
    partial_rotary: bool = False
    moe: Literal["none", "mixtral", "qwen", "deepseek", "gpt_oss"] = "none"


DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "eos_token_id": None,
}
GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "eos_token_id": 1, "hidden_activation": "gelu_pytorch_tanh"}
EXPERTS: dict[str, str] = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
MTP: dict[str, str] = {"num_mtp_layers": "num_nextn_predict_layers"}

FAMILIES: dict[str, HFFamily] = {
    f.architecture: f
    for f in (
        HFFamily(
            architecture="LlamaForCausalLM",
            model_type="llama",
            tensors=LLAMA_TENSORS,
            defaults={"eos_token_id": 2},
            attention_bias="qkv_and_out",
        ),
        HFFamily(
            architecture="MistralForCausalLM",
            model_type="mistral",
            tensors=LLAMA_TENSORS,
            defaults={"eos_token_id": 2, "num_key_value_heads": 8},
            windows="all",
        ),
        HFFamily(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            tensors=LLAMA_TENSORS,
            flags={"qkv_bias": True},
            windows="flagged",
        ),
        HFFamily(
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            tensors=LLAMA_TENSORS,
            flags={"qk_norm": "head"},
            defaults={"head_dim": 128},
            attention_bias="qkv_and_out",
            windows="flagged",
        ),
        HFFamily(
            architecture="SmolLM3ForCausalLM",
            model_type="smollm3",
            tensors=LLAMA_TENSORS,
            defaults={
                "eos_token_id": 128001, "tie_word_embeddings": True, "num_key_value_heads": 4,
                "rope_theta": 2_000_000.0, "sliding_window": None,
            },
            attention_bias="qkv_and_out",
            windows="flagged",
        ),
        HFFamily(
            architecture="GemmaForCausalLM",
            model_type="gemma",
            tensors=LLAMA_TENSORS,
            flags={"norm_offset": 1.0},
            defaults=GEMMA | {"num_key_value_heads": 16, "head_dim": 256},
            checked={"use_bidirectional_attention": (False,)},
            attention_bias="qkv_and_out",
            activation_keys=("hidden_activation", "hidden_act"),
        ),
        HFFamily(
            architecture="Gemma2ForCausalLM",
            model_type="gemma2",
            tensors={**LLAMA_TENSORS, **POST_NORM_TENSORS},
            flags={"norm_offset": 1.0, "post_norm": True},
            defaults=GEMMA
            | {
                "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
                "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window_pattern": 2,
            },
            renamed={"sliding_window_size": "sliding_window"},
            checked={"use_bidirectional_attention": (False,)},
            attention_bias="qkv_and_out",
            activation_keys=("hidden_activation", "hidden_act"),
            windows="pattern",
        ),
        HFFamily(
            architecture="Gemma3ForCausalLM",
            model_type="gemma3_text",
            tensors={**LLAMA_TENSORS, **POST_NORM_TENSORS},
            flags={"norm_offset": 1.0, "post_norm": True, "qk_norm": "head"},
            defaults=GEMMA
            | {
                "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
                "final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window_pattern": 6,
                "rope_theta": 1_000_000.0,
            },
            renamed={"_sliding_window_pattern": "sliding_window_pattern"},
            checked={"use_bidirectional_attention": (False,)},
            attention_bias="qkv_and_out",
            activation_keys=("hidden_activation", "hidden_act"),
            windows="pattern",
            rope="two",
        ),
        HFFamily(
            architecture="Phi3ForCausalLM",
            model_type="phi3",
            tensors={**LLAMA_TENSORS, **PHI3_TENSORS},
            defaults={
                "rms_norm_eps": 1e-5, "eos_token_id": 32000, "sliding_window": None,
                "original_max_position_embeddings": 4096,
            },
            checked={
                "lm_head_bias": (False,), "full_attn_mod": (1,),
                "interpolate_factor": (1,),
            },
            windows="all",
            partial_rotary=True,
        ),
        HFFamily(
            architecture="Olmo2ForCausalLM",
            model_type="olmo2",
            tensors={**LLAMA_TENSORS, **POST_NORM_TENSORS, **OLMO2_TENSORS},
            flags={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
            defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279},
            attention_bias="qkv_and_out",
        ),
        HFFamily(
            architecture="GraniteForCausalLM",
            model_type="granite",
            tensors=LLAMA_TENSORS,
            defaults={"eos_token_id": 2},
            attention_bias="qkv_and_out",
        ),
        HFFamily(
            architecture="Starcoder2ForCausalLM",
            model_type="starcoder2",
            tensors={**LLAMA_TENSORS, **STARCODER2_TENSORS},
            flags={"norm": "layer", "mlp": "plain"},
            defaults={
                "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "eos_token_id": 50256, "use_bias": True,
                "tie_word_embeddings": True, "num_key_value_heads": 2, "sliding_window": None,
            },
            checked={
                "mlp_type": ("default",), "norm_type": ("layer_norm",), "layer_norm_epsilon": (1e-5,),
                "activation_function": ("gelu", "gelu_pytorch_tanh"),  # of an older class; hidden_act is the one used
                "scale_attn_weights": (True,), "attention_softmax_in_fp32": (True,),
                "scale_attention_softmax_in_fp32": (True,),
            },
            attention_bias="qkv_and_out",
            bias_key="use_bias",
            norm_key="norm_epsilon",
            windows="all",
        ),
        HFFamily(
            architecture="GPT2LMHeadModel",
            model_type="gpt2",
            tensors=GPT2_TENSORS,
            prefixes=("transformer.", ""),
            ignored=(GPT2_MASKS,),
            flags={
                "norm": "layer", "mlp": "plain", "mlp_bias": True, "qkv_bias": True, "attn_out_bias": True,
                "learned_positions": True,
            },
            defaults={
                "layer_norm_epsilon": 1e-5, "hidden_act": "gelu_new", "eos_token_id": 50256,
                "tie_word_embeddings": True, "max_position_embeddings": 1024,
            },
            renamed={
                "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
                "n_layer": "num_hidden_layers", "n_inner": "intermediate_size", "activation_function": "hidden_act",
            },
            checked={
                "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
                "reorder_and_upcast_attn": (False, True),
            },
            norm_key="layer_norm_epsilon",
            rope="none",
        ),
        HFFamily(
            architecture="MixtralForCausalLM",
            model_type="mixtral",
            tensors={**LLAMA_TENSORS, **MIXTRAL_TENSORS},
            defaults={
                "rms_norm_eps": 1e-5, "eos_token_id": 2, "num_key_value_heads": 8, "rope_theta": 1_000_000.0,
                "sliding_window": None, "num_experts_per_tok": 2, "num_experts": 8,
            },
            renamed=EXPERTS,
            windows="all",
            moe="mixtral",
        ),
        HFFamily(
            architecture="Qwen2MoeForCausalLM",
            model_type="qwen2_moe",
            tensors={**LLAMA_TENSORS, **MOE_TENSORS},
            defaults={
                "qkv_bias": True, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
                "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
            },
            renamed=EXPERTS,
            attention_bias="qkv",
            bias_key="qkv_bias",
            windows="flagged",
            moe="qwen",
        ),
        HFFamily(
            architecture="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            tensors={**LLAMA_TENSORS, **MOE_TENSORS},
            flags={"qk_norm": "head"},
            defaults={
                "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
                "norm_topk_prob": False,
            },
            renamed=EXPERTS,
            attention_bias="qkv_and_out",
            windows="flagged",
            moe="qwen",
        ),
        HFFamily(
            architecture="GptOssForCausalLM",
            model_type="gpt_oss",
            tensors={**LLAMA_TENSORS, **GPT_OSS_TENSORS},
            flags={"attn_sinks": True, "activation": "swiglu_oai"},
            defaults={
                "rms_norm_eps": 1e-5, "head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128,
                "sliding_window_pattern": 2, "rope_theta": 150_000.0, "attention_bias": True,
                "num_experts_per_tok": 4, "num_experts": 128,
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            },
            renamed=EXPERTS | {"experts_per_token": "num_experts_per_tok"},
            checked={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
            attention_bias="qkv_and_out",
            windows="pattern",
            moe="gpt_oss",
        ),
        HFFamily(
            architecture="Glm4MoeForCausalLM",
            model_type="glm4_moe",
            tensors={**LLAMA_TENSORS, **MOE_TENSORS},
            defaults={
                "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
                "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "num_experts": 128,
                "first_k_dense_replace": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
            },
            renamed=EXPERTS | MTP,
            attention_bias="qkv",
            partial_rotary=True,
            moe="deepseek",
        ),
        HFFamily(
            architecture="DeepseekV2ForCausalLM",
            model_type="deepseek_v2",
            tensors={**LLAMA_TENSORS, **MOE_TENSORS, **MLA_TENSORS},
            defaults={
                "eos_token_id": 2, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 64, "n_shared_experts": 2,
                "moe_intermediate_size": 1407, "first_k_dense_replace": 0, "norm_topk_prob": False,
            },
            renamed=EXPERTS,
            checked={"norm_topk_prob": (False,)},
            moe="deepseek",
        ),
        HFFamily(
            architecture="DeepseekV3ForCausalLM",
            model_type="deepseek_v3",
            tensors={**LLAMA_TENSORS, **MOE_TENSORS, **MLA_TENSORS},
            defaults={
                "eos_token_id": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 256, "n_shared_experts": 1,
                "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
                "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "norm_topk_prob": True,
                "num_nextn_predict_layers": 1,
            },
            renamed=EXPERTS | MTP,
            moe="deepseek",
        ),
    )
}  # fmt: skip

GENERATION_KEYS = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
# Old configs carry every default of generation; generation_config.json is where a model's makers say what they mean.

NEUTRAL: frozenset[str] = frozenset(
    (
        *GENERATION_KEYS,
        "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash",
        "auto_map", "torch_dtype", "dtype", "use_cache", "cache_implementation", "attn_implementation",
        "_attn_implementation", "_attn_implementation_autoset", "initializer_range", "bos_token_id", "pad_token_id",
        "sep_token_id", "decoder_start_token_id", "tokenizer_class", "prefix", "vocab_file", "task_specific_params",
        "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "output_attentions",
        "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
        "chunk_size_feed_forward", "tie_encoder_decoder", "cross_attention_hidden_size", "is_decoder",
        "transformers.js_config", "unsloth_version", "unsloth_fixed",
        # Training.
        "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout",
        "embedding_dropout", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
        "aux_loss_alpha", "seq_aux", "ep_size", "gradient_checkpointing",
        # Heads of other tasks (GPT-2), and a duplicate of what n_positions says.
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "n_ctx", "n_special", "predict_special_tokens", "output_past",
        "sliding_window_size",  # gemma-2-9b has it beside sliding_window, and no code that looks at it
    )
)  # fmt: skip
# keys whose every value leaves the model's outputs as they are

CHECKED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "is_llama_config": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}  # keys that any config may carry -> the values that we serve

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
