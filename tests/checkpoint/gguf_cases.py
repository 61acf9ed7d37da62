"""A tiny model of every GGUF architecture: its metadata, the config they mean, and its tensors.

Tensors are made from canonical parameters the way llama.cpp's converter makes them from a Hugging Face model's.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jaxserve.model.params import named_leaves, param_specs
from tests.text.metadata import EOS, gguf_metadata

V, D, F, LAYERS, N, K, H = 266, 32, 48, 2, 4, 2, 8
EPS = float(np.float32(1e-5))
FACTORS = (1.0, 1.5, 4.0, 8.0)
SHORT, LONG = (1.0, 1.25), (2.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Keys follow ``{arch}.``; ``config`` are the fields that differ from ``BASE``'s."""

    arch: str
    keys: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # tensors that are no parameters
    unstacked: bool = False  # one tensor an expert
    joint_kv: bool = False  # k_up and v_up in one tensor, as in older files of DeepSeek

    def model_config(self) -> ModelConfig:
        return ModelConfig(**{**BASE, "family": self.arch, **self.config})

    def arch_keys(self) -> dict[str, Any]:
        eps = "layer_norm_epsilon" if self.config.get("norm") == "layer" else "layer_norm_rms_epsilon"
        keys = {**BASE_KEYS, f"attention.{eps}": 1e-5, **self.keys}
        return {f"{self.arch}.{k}": v for k, v in keys.items() if v is not None}

    def params(self) -> dict[str, np.ndarray]:
        """Random canonical parameters by name."""
        rng = np.random.default_rng(0)
        specs = named_leaves(param_specs(self.model_config()))
        return {name: rng.standard_normal(spec.shape, np.float32) for name, spec in specs}

    def tensors(self, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """GGUF tensors of these parameters."""
        out = dict(self.extra)
        for name, x in params.items():
            if name in TOP:
                out[TOP[name]] = x
            elif self.joint_kv and name.endswith(".k_up"):
                layer = name.split(".")[1]
                heads = np.concatenate([x, params[f"layers.{layer}.v_up"]], axis=1)
                out[f"blk.{layer}.attn_kv_b.weight"] = heads.reshape(-1, heads.shape[-1])
            elif not (self.joint_kv and name.endswith(".v_up")):
                _, layer, parameter = name.split(".")
                stored = split(self, parameter, x)
                out |= {f"blk.{layer}.{tensor}": np.ascontiguousarray(a) for tensor, a in stored.items()}
        return out


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of half-split heads with the pairs put side by side, as llama.cpp's ``permute`` does."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def split(case: Case, parameter: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors (after ``blk.{i}.``) that hold a layer's parameter."""
    if parameter in PLAIN:
        name = PLAIN[parameter]
        if parameter == "mlp_norm" and case.arch in ("gpt-oss", "glm4moe"):
            name = "post_attention_norm.weight"
        return {name: x}
    if parameter in ("q_norm", "k_norm", "sinks"):
        return {f"attn_{parameter}.weight": x.reshape(-1)}
    if parameter == "q_up":
        return {f"attn_q{'_b' if case.model_config().mla.q_lora_rank else ''}.weight": x.reshape(-1, x.shape[-1])}  # type: ignore[union-attr]
    if parameter == "k_up":
        return {"attn_k_b.weight": x.swapaxes(1, 2)}
    if parameter in ("qkv", "qkv_bias"):
        kind = "bias" if parameter == "qkv_bias" else "weight"
        q, k, v = x[:, : N // K], x[:, N // K], x[:, N // K + 1]
        q, k, v = (a.reshape(-1, *x.shape[3:]) for a in (q, k, v))
        if case.arch in ("llama", "smollm3", "granite", "granitemoe"):
            q, k = interleave(q, N), interleave(k, K)
        if case.arch in ("gpt2", "phi3"):
            return {f"attn_qkv.{kind}": np.concatenate([q, k, v])}
        return {f"attn_q.{kind}": q, f"attn_k.{kind}": k, f"attn_v.{kind}": v}
    if parameter in ("gate_up", "gate_up_bias"):
        kind = "bias" if parameter == "gate_up_bias" else "weight"
        if len(x) == 1:
            return {f"ffn_up.{kind}": x[0]}
        if case.arch == "phi3":
            return {"ffn_up.weight": np.concatenate([x[0], x[1]])}
        return {f"ffn_gate.{kind}": x[0], f"ffn_up.{kind}": x[1]}
    if case.unstacked and parameter == "experts_gate_up":
        return {f"ffn_{m}.{e}.weight": x[e, i] for e in range(len(x)) for i, m in enumerate(("gate", "up"))}
    if case.unstacked and parameter == "experts_down":
        return {f"ffn_down.{e}.weight": x[e] for e in range(len(x))}
    if parameter in ("experts_gate_up", "experts_gate_up_bias"):
        kind = "bias" if parameter.endswith("bias") else "weight"
        return {f"ffn_gate_exps.{kind}": x[:, 0], f"ffn_up_exps.{kind}": x[:, 1]}
    if parameter in ("experts_down", "experts_down_bias"):
        return {f"ffn_down_exps.{'bias' if parameter.endswith('bias') else 'weight'}": x}
    if parameter == "shared_gate_up":
        return {"ffn_gate_shexp.weight": x[0], "ffn_up_shexp.weight": x[1]}
    assert parameter == "shared_gate"
    return {"ffn_gate_inp_shexp.weight": x[0]}


TOP = {
    "embed": "token_embd.weight",
    "positions": "position_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "head": "output.weight",
}
PLAIN = {
    "attn_norm": "attn_norm.weight",
    "attn_norm_bias": "attn_norm.bias",
    "attn_out": "attn_output.weight",
    "attn_out_bias": "attn_output.bias",
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "mlp_norm_bias": "ffn_norm.bias",
    "down": "ffn_down.weight",
    "down_bias": "ffn_down.bias",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "correction_bias": "exp_probs_b.bias",
    "shared_down": "ffn_down_shexp.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
    "q_down": "attn_q_a.weight",
    "q_down_norm": "attn_q_a_norm.weight",
    "kv_down": "attn_kv_a_mqa.weight",
    "kv_down_norm": "attn_kv_a_norm.weight",
    "v_up": "attn_v_b.weight",
}

BASE_KEYS: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": 64,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "rope.freq_base": 5000.0,
}
BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_layers": LAYERS,
    "num_heads": N,
    "num_kv_heads": K,
    "head_dim": H,
    "norm_eps": EPS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "ropes": (RopeConfig(theta=5000.0),),
    "eos_token_ids": (gguf_metadata()["tokenizer.ggml.tokens"].index(EOS),),
}


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
