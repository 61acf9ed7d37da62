"""GGUF tensors of tiny models, made from canonical parameters the way llama.cpp's converter makes them from a Hugging
Face model's."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.model.params import named_leaves, param_specs
from tests.text.metadata import EOS, gguf_metadata

V, D, F, LAYERS, N, K, H = 266, 32, 48, 2, 4, 2, 8
EPS = float(np.float32(1e-5))


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
