"""config.json to ModelConfig: real models' files in the keys of their time, and what is refused by name."""

import dataclasses
import math
from typing import Any

import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from tests.checkpoint.tiny_hf import CASES, config, read

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
STARCODER2_3B = {
    "activation_function": "gelu", "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
    "intermediate_size": 12288, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
    "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
    "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
    "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.37.0.dev0", "use_bias": True,
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 201088,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def test_mistral():
    read = read_hf_config(MISTRAL_7B)
    assert read == ModelConfig(
        family="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, max_position_embeddings=32768, norm_eps=1e-5, eos_token_ids=(2,),
        layer_windows=(4096,) * 32, ropes=(RopeConfig(),),
    )  # fmt: skip
    assert read_hf_config(MISTRAL_7B | {"sliding_window": None}).layer_windows == ()
    absent = {k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"}
    assert read_hf_config(absent) == read  # transformers' default


def test_smollm2():
    """The same model as the GGUF that we test with: SmolLM2-135M."""
    assert read_hf_config(SMOLLM2) == ModelConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_ids=(2,),
        ropes=(RopeConfig(theta=100_000.0),),
    )  # fmt: skip


def test_starcoder2():
    assert read_hf_config(STARCODER2_3B) == ModelConfig(
        family="starcoder2", vocab_size=49152, hidden_size=3072, intermediate_size=12288, num_layers=30,
        num_heads=24, num_kv_heads=2, head_dim=128, max_position_embeddings=16384, tie_word_embeddings=True,
        eos_token_ids=(0,), norm="layer", mlp="plain", activation="gelu_tanh", qkv_bias=True, attn_out_bias=True,
        mlp_bias=True, layer_windows=(4096,) * 30, ropes=(RopeConfig(theta=999999.4420358813),),
    )  # fmt: skip


def test_gemma3():
    read = read_hf_config(GEMMA3_1B)
    assert read.layer_windows == (512, 512, 512, 512, 512, None) * 4 + (512, 512)
    assert read.layer_ropes == (1, 1, 1, 1, 1, 0) * 4 + (1, 1)
    assert read.ropes == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert (read.norm_offset, read.post_norm, read.qk_norm, read.activation) == (1.0, True, "head", "gelu_tanh")
    assert (read.embed_scale, read.attn_scale, read.tie_word_embeddings) == (math.sqrt(1152), 1 / 16, True)
    assert (read.attn_softcap, read.logit_softcap, read.eos_token_ids) == (None, None, (1, 106))
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "torch_dtype", "sliding_window_pattern")
    new = {k: v for k, v in GEMMA3_1B.items() if k not in old} | {
        "dtype": "bfloat16",
        "_sliding_window_pattern": 6,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    scaled = read_hf_config(GEMMA3_1B | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    assert read_hf_config(new) == scaled
    assert scaled.ropes[0] == RopeConfig(theta=1e6, scaling="linear", factor=8.0)


def test_gpt_oss():
    read = read_hf_config(GPT_OSS_20B)
    assert read.layer_windows == (128, None) * 12
    assert read.moe == MoEConfig(
        num_experts=32, num_experts_per_tok=4, intermediate_size=2880, scoring="softmax_topk", router_bias=True,
        expert_bias=True,
    )  # fmt: skip
    yarn = RopeConfig(
        theta=150_000.0, scaling="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False,
        attention_factor=0.1 * math.log(32) + 1,
    )  # fmt: skip
    assert read.ropes == (yarn,)
    assert (read.activation, read.attn_sinks, read.qkv_bias, read.attn_out_bias) == ("swiglu_oai", True, True, True)
    defaults = ("rope_scaling", "rope_theta", "layer_types", "sliding_window", "attention_bias", "head_dim")
    assert read_hf_config({k: v for k, v in GPT_OSS_20B.items() if k not in defaults}) == read


def test_deepseek_v3():
    read = read_hf_config(DEEPSEEK_V3)
    assert read.mla == MLAConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert read.moe == MoEConfig(
        num_experts=256, num_experts_per_tok=8, intermediate_size=2048, shared_intermediate_size=2048,
        scoring="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, num_groups=8, topk_group=4,
        group_score="top2", correction_bias=True,
    )  # fmt: skip
    assert read.moe_layers == (False,) * 3 + (True,) * 58
    rope = read.ropes[0]
    assert (rope.interleaved, rope.rotary_dim, rope.scaling, rope.attention_factor) == (True, 64, "yarn", 1.0)
    assert read.attn_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert read.kv_bytes_per_token(2) == 61 * 576 * 2
    assert not read_hf_config(DEEPSEEK_V3 | {"rope_interleave": False}).ropes[0].interleaved


def test_deepseek_v2_groups():
    small = CASES["deepseek_v2"]()[0]
    assert read_hf_config(small).moe.num_groups == 1  # type: ignore[union-attr]
    grouped = small | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    moe = read_hf_config(grouped).moe
    assert moe is not None
    assert (moe.num_groups, moe.topk_group, moe.group_score, moe.scoring) == (4, 2, "max", "softmax")
    assert moe.shared_intermediate_size == 20 and not moe.correction_bias


def rope_of(**changes: Any) -> RopeConfig:
    return read("LlamaForCausalLM", **changes).ropes[0]


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def test_both_styles_of_rope_keys():
    llama3 = RopeConfig(theta=5e5, scaling="llama3", **LLAMA3)
    assert rope_of(rope_theta=5e5, rope_scaling=LLAMA3 | {"rope_type": "llama3"}) == llama3
    assert rope_of(rope_theta=5e5, rope_scaling=LLAMA3 | {"type": "llama3"}) == llama3
    assert rope_of(rope_parameters=LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}) == llama3
    assert rope_of(rope_theta=5e5, rope_parameters=LLAMA3 | {"rope_type": "llama3"}) == llama3
    assert rope_of() == rope_of(rope_scaling=None, rope_parameters=None) == RopeConfig(theta=10_000.0)


def test_yarn_numbers():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert rope_of(rope_scaling=yarn).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    both = rope_of(rope_scaling=yarn | {"mscale": 0.707, "mscale_all_dim": 0.5})
    assert both.attention_factor == pytest.approx((0.0707 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    given = rope_of(rope_scaling=yarn | {"attention_factor": 0.5, "beta_fast": 8, "beta_slow": 2, "truncate": False})
    assert (given.attention_factor, given.beta_fast, given.beta_slow, given.truncate) == (0.5, 8.0, 2.0, False)
    assert rope_of(rope_scaling=yarn | {"factor": None}).factor == 4.0  # max_position_embeddings is 64
    no_original = {k: v for k, v in yarn.items() if not k.startswith("original")}
    assert rope_of(rope_scaling=no_original).original_max_position_embeddings == 64


def test_phi3_longrope():
    scaling = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4]}
    rope = read("Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=16).ropes[0]
    assert rope == RopeConfig(
        scaling="longrope", short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), original_max_position_embeddings=16,
        factor=4.0, attention_factor=math.sqrt(1 + math.log(4) / math.log(16)),
    )  # fmt: skip
    half = scaling | {"short_factor": [1.0], "long_factor": [2.0]}
    changes = {"rope_scaling": half, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}
    rope = read("Phi3ForCausalLM", **changes).ropes[0]
    assert (rope.rotary_dim, rope.attention_factor) == (2, 1.0)
    inside = half | {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
    assert read("Phi3ForCausalLM", rope_parameters=inside, original_max_position_embeddings=64).ropes[0] == rope


def test_windows_by_flag_and_by_layer():
    flagged = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 3}
    assert read("Qwen2ForCausalLM", **flagged, max_window_layers=1).layer_windows == (None, 8, 8)
    assert read("Qwen2ForCausalLM", **flagged).layer_windows == ()  # 28 layers are full by default
    assert read("Qwen2ForCausalLM", **(flagged | {"use_sliding_window": False})).layer_windows == ()
    assert read("Qwen3ForCausalLM", **flagged, layer_types=["full_attention"] * 3).layer_windows == ()
    assert read("Gemma2ForCausalLM", num_hidden_layers=3, hidden_act="gelu_pytorch_tanh").layer_windows == (
        4096, None, 4096
    )  # fmt: skip
    assert read("Qwen3MoeForCausalLM", **flagged, num_experts=8).layer_windows == (8, 8, 8)


def test_smollm3_layers_without_rope():
    assert read("SmolLM3ForCausalLM", num_hidden_layers=5).layer_ropes == (0, 0, 0, None, 0)
    assert read("SmolLM3ForCausalLM", no_rope_layers=[0, 1, 1]).layer_ropes == (None, 0)
    assert read("SmolLM3ForCausalLM").tie_word_embeddings is False
    assert read("SmolLM3ForCausalLM", tie_word_embeddings=...).tie_word_embeddings is True


def test_granite_scales():
    scales = {"embedding_multiplier": 12, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
    granite = read("GraniteForCausalLM", **scales, logits_scaling=8)
    assert (granite.embed_scale, granite.attn_scale, granite.residual_scale) == (12.0, 0.015625, 0.22)
    assert granite.logit_scale == 1 / 8


def test_gpt2():
    values = {"architectures": ["GPT2LMHeadModel"], "n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 9}
    gpt2 = read_hf_config(values)
    assert (gpt2.hidden_size, gpt2.intermediate_size, gpt2.num_layers, gpt2.num_kv_heads, gpt2.head_dim) == (
        12, 48, 2, 3, 4
    )  # fmt: skip
    assert (gpt2.ropes, gpt2.learned_positions, gpt2.norm, gpt2.mlp, gpt2.activation) == (
        (), True, "layer", "plain", "gelu_tanh"
    )  # fmt: skip
    assert gpt2.tie_word_embeddings and gpt2.max_position_embeddings == 1024 and gpt2.eos_token_ids == ()
    assert read_hf_config(values | {"scale_attn_weights": False}).attn_scale == 1.0
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx=True"):
        read_hf_config(values | {"scale_attn_by_inverse_layer_idx": True})


def test_moe_layers_and_the_names_of_their_keys():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "num_hidden_layers": 4}
    assert read("Qwen3MoeForCausalLM", **moe, decoder_sparse_step=2).moe_layers == (False, True, False, True)
    assert read("Qwen3MoeForCausalLM", **moe, mlp_only_layers=[0, 3]).moe_layers == (False, True, True, False)
    renamed = {("num_local_experts" if k == "num_experts" else k): v for k, v in moe.items()}
    assert read("Qwen3MoeForCausalLM", **renamed) == read("Qwen3MoeForCausalLM", **moe)
    with pytest.raises(CheckpointError, match=r"num_local_experts=4 contradicts num_experts=8"):
        read("Qwen3MoeForCausalLM", **moe, num_local_experts=4)


def test_biases():
    for architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM"):
        biased = read(architecture, attention_bias=True)
        assert biased.qkv_bias and biased.attn_out_bias, architecture
    for architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"):
        assert read(architecture).qkv_bias and not read(architecture).attn_out_bias
    assert not read("Qwen2MoeForCausalLM", qkv_bias=False).qkv_bias
    glm = read("Glm4MoeForCausalLM", attention_bias=True, use_qk_norm=True)
    assert (glm.qkv_bias, glm.attn_out_bias, glm.qk_norm) == (True, False, "head")
    assert glm.ropes[0].rotary_dim == 2  # half of 4, by default
    unbiased = read("Starcoder2ForCausalLM", use_bias=False, hidden_act="gelu")
    assert (unbiased.qkv_bias, unbiased.mlp_bias, unbiased.activation) == (False, False, "gelu")


def test_the_family_may_be_told_by_model_type_alone():
    values = config("LlamaForCausalLM", "llama")
    del values["architectures"]
    assert read_hf_config(values) == read("LlamaForCausalLM")


def test_every_reader_of_a_config_is_pure():
    values = config("LlamaForCausalLM", "llama") | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
    before = repr(values)
    first = read_hf_config(values)
    assert repr(values) == before and read_hf_config(values) == first
    assert dataclasses.asdict(first)["ropes"][0]["factor"] == 8.0


def test_what_transformers_ignores_or_means():
    """Found by random models: keys that say one thing while the class computes another."""
    assert read("Gemma3ForCausalLM", attn_logit_softcapping=50.0).attn_softcap is None  # its attention has no cap
    assert read("Gemma2ForCausalLM", attn_logit_softcapping=50.0).attn_softcap == 50.0
    assert read("Gemma2ForCausalLM", hidden_act=..., hidden_activation="gelu").activation == "gelu"
    assert read("GemmaForCausalLM", hidden_act="gelu").activation == "gelu_tanh"  # of the first only
    latents = read_hf_config(DEEPSEEK_V3 | {"rms_norm_eps": 1e-5})
    assert latents.mla is not None and (latents.norm_eps, latents.mla.norm_eps) == (1e-5, 1e-6)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert rope_of(rope_parameters=dynamic) == RopeConfig(theta=1e4)  # within max_position_embeddings
    odd = {"model_type": "gpt2", "n_embd": 45, "n_head": 5, "n_layer": 2, "vocab_size": 19}
    assert read_hf_config(odd).head_dim == 9  # nothing turns
    assert read_hf_config(odd | {"activation_function": "relu"}).activation == "relu"
