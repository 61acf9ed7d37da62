"""Configs as their makers published them, with every harmless key: each gives the model's published size."""

from typing import Any

import pytest

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.config import ModelConfig
from jaxserve.model.params import num_params


def llama(model_type: str = "llama", architecture: str = "LlamaForCausalLM", **values: Any) -> dict[str, Any]:
    """What most configs of transformers 4 say."""
    common = {
        "architectures": [architecture], "model_type": model_type, "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0", "use_cache": True, "_name_or_path": "somewhere",
    }  # fmt: skip
    return {k: v for k, v in (common | values).items() if v != "absent"}


def shape(layers: int, d: int, f: int, heads: int, kv: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": d, "intermediate_size": f, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": length,
    }  # fmt: skip


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN = {"bos_token_id": 151643, "eos_token_id": 151645, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "max_window_layers": 28, "sliding_window": 131072,
        "attention_bias": "absent"}  # fmt: skip
YARN_V3 = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
DEEPSEEK_V3 = llama(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    **shape(61, 7168, 18432, 128, 128, 129280, 163840),
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    aux_loss_alpha=0.001, ep_size=1, first_k_dense_replace=3, kv_lora_rank=512, moe_intermediate_size=2048,
    moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_experts_per_tok=8, num_nextn_predict_layers=1, pretraining_tp=1, q_lora_rank=1536, qk_nope_head_dim=128,
    qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_scaling=YARN_V3, routed_scaling_factor=2.5, scoring_func="sigmoid",
    seq_aux=True, topk_group=4, topk_method="noaux_tc", v_head_dim=128,
)  # fmt: skip

# name -> config.json; billions of parameters, as published or counted from its tensors; bytes of KV a token in bf16
MODELS: dict[str, tuple[dict[str, Any], float, int]] = {
    "Llama-2-7b-hf": (
        llama(**shape(32, 4096, 11008, 32, 32, 32000, 4096), pretraining_tp=1, torch_dtype="float16",
              attention_bias="absent", attention_dropout="absent"),
        6.738, 524_288,
    ),
    "Llama-3.1-8B": (
        llama(**shape(32, 4096, 14336, 32, 8, 128256, 131072), rope_theta=500000.0, rope_scaling=LLAMA3, mlp_bias=False,
              pretraining_tp=1, bos_token_id=128000, eos_token_id=[128001, 128008, 128009]),
        8.030, 131_072,
    ),
    "Llama-3.2-1B": (
        llama(**shape(16, 2048, 8192, 32, 8, 128256, 131072), head_dim=64, rope_theta=500000.0,
              tie_word_embeddings=True,
              rope_scaling=LLAMA3 | {"factor": 32.0}, mlp_bias=False, pretraining_tp=1),
        1.236, 32_768,
    ),
    "Llama-3-70B": (
        llama(**shape(80, 8192, 28672, 64, 8, 128256, 8192), rope_theta=500000.0, pretraining_tp=1),
        70.55, 327_680,
    ),
    "Mistral-7B-v0.1": (
        llama("mistral", "MistralForCausalLM", **shape(32, 4096, 14336, 32, 8, 32000, 32768), sliding_window=4096,
              attention_bias="absent"),
        7.242, 131_072,
    ),
    "Mistral-Nemo-Base-2407": (
        llama("mistral", "MistralForCausalLM", **shape(40, 5120, 14336, 32, 8, 131072, 128000), head_dim=128,
              sliding_window=None, rope_theta=1e6, attention_bias="absent"),
        12.25, 163_840,
    ),
    "Mixtral-8x7B-v0.1": (
        llama("mixtral", "MixtralForCausalLM", **shape(32, 4096, 14336, 32, 8, 32000, 32768), num_experts_per_tok=2,
              num_local_experts=8, output_router_logits=False, router_aux_loss_coef=0.02, sliding_window=None,
              rope_theta=1e6, attention_bias="absent"),
        46.70, 131_072,
    ),
    "Qwen2.5-7B-Instruct": (
        llama("qwen2", "Qwen2ForCausalLM", **shape(28, 3584, 18944, 28, 4, 152064, 32768), **QWEN), 7.616, 57_344,
    ),
    "Qwen2.5-0.5B": (
        llama("qwen2", "Qwen2ForCausalLM", **shape(24, 896, 4864, 14, 2, 151936, 32768),
              **QWEN | {"max_window_layers": 24, "tie_word_embeddings": True, "sliding_window": 32768},
              use_mrope=False),
        0.494, 12_288,
    ),
    "Qwen1.5-MoE-A2.7B": (
        llama("qwen2_moe", "Qwen2MoeForCausalLM", **shape(24, 2048, 5632, 16, 16, 151936, 8192),
              **QWEN | {"max_window_layers": 21, "sliding_window": 32768}, decoder_sparse_step=1,
              moe_intermediate_size=1408, norm_topk_prob=False, num_experts=60, num_experts_per_tok=4,
              output_router_logits=False, router_aux_loss_coef=0.001, shared_expert_intermediate_size=5632),
        14.32, 196_608,
    ),
    "Qwen3-8B": (
        llama("qwen3", "Qwen3ForCausalLM", **shape(36, 4096, 12288, 32, 8, 151936, 40960), head_dim=128,
              **QWEN | {"max_window_layers": 36, "sliding_window": None, "attention_bias": False}),
        8.191, 147_456,
    ),
    "Qwen3-30B-A3B": (
        llama("qwen3_moe", "Qwen3MoeForCausalLM", **shape(48, 2048, 6144, 32, 4, 151936, 40960), head_dim=128,
              **QWEN | {"max_window_layers": 48, "sliding_window": None, "attention_bias": False},
              decoder_sparse_step=1,
              mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
              num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001),
        30.53, 98_304,
    ),
    "gemma-2-9b": (
        llama("gemma2", "Gemma2ForCausalLM", **shape(42, 3584, 14336, 16, 8, 256000, 8192), head_dim=256,
              attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid",
              hidden_act="absent",
              hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6, sliding_window=4096,
              sliding_window_size=4096, tie_word_embeddings="absent", pad_token_id=0),
        9.242, 344_064,
    ),
    "gemma-3-1b-it": (
        llama("gemma3_text", "Gemma3ForCausalLM", **shape(26, 1152, 6912, 4, 1, 262144, 32768), head_dim=256,
              attn_logit_softcapping=None, final_logit_softcapping=None, cache_implementation="hybrid",
              hidden_act="absent", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6,
              rope_local_base_freq=10000, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
              tie_word_embeddings="absent", pad_token_id=0, eos_token_id=[1, 106]),
        1.000, 26_624,
    ),
    "Phi-3.5-mini-instruct": (
        llama("phi3", "Phi3ForCausalLM", **shape(32, 3072, 8192, 32, 32, 32064, 131072), embd_pdrop=0.0,
              resid_pdrop=0.0,
              original_max_position_embeddings=4096, pad_token_id=32000, sliding_window=262144,
              rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
              auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
        3.821, 393_216,
    ),
    "OLMo-2-1124-7B": (
        llama("olmo2", "Olmo2ForCausalLM", **shape(32, 4096, 11008, 32, 32, 100352, 4096), rope_theta=500000,
              rms_norm_eps=1e-6, pad_token_id=100277, eos_token_id=100257, bos_token_id="absent"),
        7.299, 524_288,
    ),
    "granite-3.1-8b-instruct": (
        llama("granite", "GraniteForCausalLM", **shape(40, 4096, 12800, 32, 8, 49155, 131072),
              attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0, mlp_bias=False,
              residual_multiplier=0.22, rope_theta=10000000.0, tie_word_embeddings=True, attention_dropout=0.1,
              pad_token_id=0),
        8.171, 163_840,
    ),
    "starcoder2-3b": (
        llama("starcoder2", "Starcoder2ForCausalLM", **shape(30, 3072, 12288, 24, 2, 49152, 16384),
              hidden_act="gelu_pytorch_tanh", embedding_dropout=0.1, residual_dropout=0.1, mlp_type="default",
              norm_epsilon=1e-5, norm_type="layer_norm", rope_theta=999999.4420358813, sliding_window=4096,
              use_bias=True,
              activation_function="gelu", rms_norm_eps="absent", attention_bias="absent", tie_word_embeddings="absent"),
        3.030, 30_720,
    ),
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0, 70_272),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_published_configs(name: str):
    values, billions, kv_bytes = MODELS[name]
    config = read_hf_config(values)
    assert isinstance(config, ModelConfig)
    assert num_params(config) / 1e9 == pytest.approx(billions, rel=0.01)
    assert config.kv_bytes_per_token(2) == kv_bytes


def test_weights_that_cannot_be_served_are_refused_by_name():
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with pytest.raises(CheckpointError, match="quantization_config"):
        read_hf_config(DEEPSEEK_V3 | quantized)
