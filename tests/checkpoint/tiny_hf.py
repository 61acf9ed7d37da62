"""Small Hugging Face folders: one for each way that tensors can lie in our parameters, with the parameters as plain
numpy makes them (reshape, concatenate, stack), to compare with what the reader says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.checkpoint.hf.families import FAMILIES
from jaxserve.config import ModelConfig

V, D, F, LAYERS, N, K, H, E = 19, 12, 10, 2, 6, 2, 4, 3
G = N // K
Arrays = dict[str, np.ndarray]
NAMES = {np.dtype("f8"): "F64", np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype(jnp.bfloat16): "BF16"}
NAMES |= {np.dtype("i4"): "I32", np.dtype("u1"): "U8", np.dtype("bool"): "BOOL", np.dtype("i8"): "I64"}
NAMES |= {np.dtype("i1"): "I8", np.dtype(jnp.float8_e4m3fn): "F8_E4M3"}


def safetensors(tensors: Arrays, metadata: dict[str, str] | None = None, *, pad: int = 0) -> bytes:
    """The file's bytes; ``pad`` spaces after its header."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, x in tensors.items():
        start = len(data)
        data += x.tobytes()
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def write_folder(folder: Path, config: dict[str, Any], tensors: Arrays, *, shards: int = 0) -> Path:
    """A folder with config.json and one file of tensors, or ``shards`` of them and an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: x for i, (name, x) in enumerate(tensors.items()) if i % shards == shard}
        (folder / file).write_bytes(safetensors(part, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Draw:
    """Random tensors, remembered by name."""

    def __init__(self, prefix: str = "model.", dtype: Any = np.float32):
        self.prefix, self.dtype = prefix, dtype
        self.tensors: Arrays = {}
        self._rng = np.random.default_rng(0)

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        x = self._rng.standard_normal(shape, np.float32).astype(self.dtype)
        self.tensors[name if name.startswith("lm_head") else self.prefix + name] = x
        return x


Case = tuple[dict[str, Any], Arrays, Arrays]  # config.json, tensors of the file, our parameters

BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type} | BASE | changes


def read(architecture: str, **changes: Any) -> ModelConfig:
    """Of the small config of that architecture; a change to ... takes the key away."""
    family = FAMILIES[architecture]
    values = config(architecture, family.model_type, hidden_act="silu") | changes
    return read_hf_config({k: v for k, v in values.items() if v is not ...})


def qkv_of(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``[K, G + 2, H, ...]`` of the heads' rows."""
    rest = q.shape[1:]
    parts = (q.reshape(K, G, H, *rest), k.reshape(K, 1, H, *rest), v.reshape(K, 1, H, *rest))
    return np.concatenate(parts, axis=1)


def attention(t: Draw, i: int, *, qkv_bias: bool = False, out_bias: bool = False) -> Arrays:
    at = f"layers.{i}.self_attn."
    q, k, v = (t(f"{at}{x}_proj.weight", heads * H, D) for x, heads in (("q", N), ("k", K), ("v", K)))
    ours = {"qkv": qkv_of(q, k, v), "attn_out": t(f"{at}o_proj.weight", D, N * H)}
    if qkv_bias:
        q, k, v = (t(f"{at}{x}_proj.bias", heads * H) for x, heads in (("q", N), ("k", K), ("v", K)))
        ours["qkv_bias"] = qkv_of(q, k, v)
    if out_bias:
        ours["attn_out_bias"] = t(f"{at}o_proj.bias", D)
    return ours


def mlp(t: Draw, i: int, *, bias: bool = False) -> Arrays:
    at = f"layers.{i}.mlp."
    ours = {
        "gate_up": np.stack([t(f"{at}gate_proj.weight", F, D), t(f"{at}up_proj.weight", F, D)]),
        "down": t(f"{at}down_proj.weight", D, F),
    }
    if bias:
        ours["gate_up_bias"] = np.stack([t(f"{at}gate_proj.bias", F), t(f"{at}up_proj.bias", F)])
        ours["down_bias"] = t(f"{at}down_proj.bias", D)
    return ours


def norms(t: Draw, i: int, **names: str) -> Arrays:
    names = names or {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    return {ours: t(f"layers.{i}.{name}.weight", D) for ours, name in names.items()}


POST_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def model(t: Draw, layer: Callable[[int], Arrays], *, tied: bool = False) -> Arrays:
    """Our whole tree, of ``layer(i)`` and what lies around the layers."""
    ours = {"embed": t("embed_tokens.weight", V, D), "final_norm": t("norm.weight", D)}
    if not tied:
        ours["head"] = t("lm_head.weight", V, D)
    for i in range(LAYERS):
        ours |= {f"layers.{i}.{name}": x for name, x in layer(i).items()}
    return ours


def llama(dtype: Any = np.float32) -> Case:
    t = Draw(dtype=dtype)
    ours = model(t, lambda i: norms(t, i) | attention(t, i) | mlp(t, i))
    return config("LlamaForCausalLM", "llama"), t.tensors, ours


def llama_with_biases() -> Case:
    t = Draw()
    layer = lambda i: norms(t, i) | attention(t, i, qkv_bias=True, out_bias=True) | mlp(t, i, bias=True)  # noqa: E731
    ours = model(t, layer, tied=True)
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    return config("LlamaForCausalLM", "llama", **changes), t.tensors, ours


def qwen3() -> Case:
    t = Draw()

    def layer(i: int) -> Arrays:
        at = f"layers.{i}.self_attn."
        own = {"q_norm": t(f"{at}q_norm.weight", H), "k_norm": t(f"{at}k_norm.weight", H)}
        return norms(t, i) | attention(t, i) | mlp(t, i) | own

    ours = model(t, layer)
    return config("Qwen3ForCausalLM", "qwen3"), t.tensors, ours


def gemma2() -> Case:
    t = Draw()
    ours = model(t, lambda i: norms(t, i, **POST_NORMS) | attention(t, i) | mlp(t, i), tied=True)
    changes = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
    return config("Gemma2ForCausalLM", "gemma2", **changes), t.tensors, ours


def olmo2() -> Case:
    t = Draw()
    names = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}

    def layer(i: int) -> Arrays:
        at = f"layers.{i}.self_attn."
        own = {
            "q_norm": t(f"{at}q_norm.weight", N * H).reshape(K, G, H),
            "k_norm": t(f"{at}k_norm.weight", K * H).reshape(K, H),
        }
        return norms(t, i, **names) | attention(t, i) | mlp(t, i) | own

    ours = model(t, layer)
    return config("Olmo2ForCausalLM", "olmo2"), t.tensors, ours


def phi3() -> Case:
    t = Draw()

    def layer(i: int) -> Arrays:
        rows = t(f"layers.{i}.self_attn.qkv_proj.weight", (N + 2 * K) * H, D)
        gate_up = t(f"layers.{i}.mlp.gate_up_proj.weight", 2 * F, D)
        own = {
            "qkv": qkv_of(rows[: N * H], rows[N * H : (N + K) * H], rows[(N + K) * H :]),
            "gate_up": np.stack([gate_up[:F], gate_up[F:]]),
            "attn_out": t(f"layers.{i}.self_attn.o_proj.weight", D, N * H),
            "down": t(f"layers.{i}.mlp.down_proj.weight", D, F),
        }
        return norms(t, i) | own

    ours = model(t, layer)
    return config("Phi3ForCausalLM", "phi3"), t.tensors, ours


def starcoder2() -> Case:
    t = Draw()

    def layer(i: int) -> Arrays:
        at = f"layers.{i}."
        own = {
            "attn_norm_bias": t(f"{at}input_layernorm.bias", D),
            "mlp_norm_bias": t(f"{at}post_attention_layernorm.bias", D),
            "gate_up": t(f"{at}mlp.c_fc.weight", F, D)[None],
            "gate_up_bias": t(f"{at}mlp.c_fc.bias", F)[None],
            "down": t(f"{at}mlp.c_proj.weight", D, F),
            "down_bias": t(f"{at}mlp.c_proj.bias", D),
        }
        return norms(t, i) | attention(t, i, qkv_bias=True, out_bias=True) | own

    ours = model(t, layer, tied=True) | {"final_norm_bias": t("norm.bias", D)}
    return config("Starcoder2ForCausalLM", "starcoder2", tie_word_embeddings=True), t.tensors, ours


def gpt2(prefix: str = "transformer.") -> Case:
    t = Draw(prefix)
    heads, h = 3, D // 3
    ours = {
        "embed": t("wte.weight", V, D), "positions": t("wpe.weight", 64, D), "final_norm": t("ln_f.weight", D),
        "final_norm_bias": t("ln_f.bias", D),
    }  # fmt: skip
    for i in range(LAYERS):
        at = f"h.{i}."
        weight, bias = t(f"{at}attn.c_attn.weight", D, 3 * D), t(f"{at}attn.c_attn.bias", 3 * D)
        q, k, v = np.split(weight.T, 3)
        layer = {
            "qkv": np.stack([x.reshape(heads, h, D) for x in (q, k, v)], axis=1),
            "qkv_bias": np.stack([x.reshape(heads, h) for x in np.split(bias, 3)], axis=1),
            "attn_out": t(f"{at}attn.c_proj.weight", D, D).T,
            "attn_out_bias": t(f"{at}attn.c_proj.bias", D),
            "gate_up": t(f"{at}mlp.c_fc.weight", D, 4 * D).T[None],
            "gate_up_bias": t(f"{at}mlp.c_fc.bias", 4 * D)[None],
            "down": t(f"{at}mlp.c_proj.weight", 4 * D, D).T,
            "down_bias": t(f"{at}mlp.c_proj.bias", D),
        }
        for name, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            layer |= {name: t(f"{at}{theirs}.weight", D), f"{name}_bias": t(f"{at}{theirs}.bias", D)}
        ours |= {f"layers.{i}.{name}": x for name, x in layer.items()}
        t.tensors[f"{prefix}{at}attn.bias"] = np.tril(np.ones((1, 1, 64, 64), bool))  # ignored, as in the real files
    sizes = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": heads, "n_positions": 64, "n_ctx": 64}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | sizes, t.tensors, ours


def experts(t: Draw, i: int, block: str, gate: str, up: str, down: str, stacked: bool) -> Arrays:
    at = f"layers.{i}.{block}."
    if stacked:
        gate_up, down_rows = t(f"layers.{i}.mlp.experts.gate_up_proj", E, 2 * F, D), f"layers.{i}.mlp.experts.down_proj"
        return {"experts_gate_up": gate_up.reshape(E, 2, F, D), "experts_down": t(down_rows, E, D, F)}
    each = [[t(f"{at}experts.{e}.{x}.weight", F, D) for x in (gate, up)] for e in range(E)]
    return {
        "experts_gate_up": np.array(each),
        "experts_down": np.array([t(f"{at}experts.{e}.{down}.weight", D, F) for e in range(E)]),
    }


def mixtral(stacked: bool = False) -> Case:
    t = Draw()
    block = "mlp" if stacked else "block_sparse_moe"

    def layer(i: int) -> Arrays:
        own = {"router": t(f"layers.{i}.{block}.gate.weight", E, D)}
        return norms(t, i) | attention(t, i) | experts(t, i, block, "w1", "w3", "w2", stacked) | own

    ours = model(t, layer)
    return config("MixtralForCausalLM", "mixtral", num_local_experts=E), t.tensors, ours


def qwen2_moe(stacked: bool = False) -> Case:
    """The first layer is dense, the other has a gated shared expert of another width."""
    t = Draw()

    def layer(i: int) -> Arrays:
        ours = norms(t, i) | attention(t, i, qkv_bias=True)
        if i == 0:
            return ours | mlp(t, i)
        at, fs = f"layers.{i}.mlp.", F + 2
        shared = [t(f"{at}shared_expert.{x}_proj.weight", fs, D) for x in ("gate", "up")]
        own = {
            "router": t(f"{at}gate.weight", E, D),
            "shared_gate_up": np.stack(shared),
            "shared_down": t(f"{at}shared_expert.down_proj.weight", D, fs),
            "shared_gate": t(f"{at}shared_expert_gate.weight", 1, D),
        }
        return ours | experts(t, i, "mlp", "gate_proj", "up_proj", "down_proj", stacked) | own

    ours = model(t, layer)
    changes = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F, "mlp_only_layers": [0]}
    changes["shared_expert_intermediate_size"] = F + 2
    return config("Qwen2MoeForCausalLM", "qwen2_moe", **changes), t.tensors, ours


def gpt_oss() -> Case:
    t = Draw()

    def layer(i: int) -> Arrays:
        at = f"layers.{i}.mlp."
        gate_up, bias = t(f"{at}experts.gate_up_proj", E, D, 2 * F), t(f"{at}experts.gate_up_proj_bias", E, 2 * F)
        own = {
            "sinks": t(f"layers.{i}.self_attn.sinks", N).reshape(K, G),
            "router": t(f"{at}router.weight", E, D),
            "router_bias": t(f"{at}router.bias", E),
            "experts_gate_up": np.stack([gate_up[..., 0::2], gate_up[..., 1::2]], axis=1).transpose(0, 1, 3, 2),
            "experts_gate_up_bias": np.stack([bias[:, 0::2], bias[:, 1::2]], axis=1),
            "experts_down": t(f"{at}experts.down_proj", E, F, D).transpose(0, 2, 1),
            "experts_down_bias": t(f"{at}experts.down_proj_bias", E, D),
        }
        return norms(t, i) | attention(t, i, qkv_bias=True, out_bias=True) | own

    ours = model(t, layer)
    return config("GptOssForCausalLM", "gpt_oss", num_local_experts=E, num_experts_per_tok=2), t.tensors, ours


def deepseek(version: int) -> Case:
    """The first layer is dense. V2 here has no q_lora_rank; V3 has, a correction bias, and a drafting layer."""
    t = Draw()
    nope, rope, dv, rank, q_rank = 6, 2, 5, 8, 7

    def layer(i: int) -> Arrays:
        at, block = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        kv_up = t(f"{at}kv_b_proj.weight", N * (nope + dv), rank).reshape(N, nope + dv, rank)
        ours = norms(t, i) | {
            "kv_down": t(f"{at}kv_a_proj_with_mqa.weight", rank + rope, D),
            "kv_down_norm": t(f"{at}kv_a_layernorm.weight", rank),
            "k_up": kv_up[:, :nope],
            "v_up": kv_up[:, nope:],
            "attn_out": t(f"{at}o_proj.weight", D, N * dv),
        }
        if version == 2:
            ours["q_up"] = t(f"{at}q_proj.weight", N * (nope + rope), D).reshape(N, nope + rope, D)
        else:
            ours["q_down"] = t(f"{at}q_a_proj.weight", q_rank, D)
            ours["q_down_norm"] = t(f"{at}q_a_layernorm.weight", q_rank)
            ours["q_up"] = t(f"{at}q_b_proj.weight", N * (nope + rope), q_rank).reshape(N, nope + rope, q_rank)
        if i == 0:
            return ours | mlp(t, i)
        ours["router"] = t(f"{block}gate.weight", E, D)
        if version == 3:
            ours["correction_bias"] = t(f"{block}gate.e_score_correction_bias", E)
        shared = [t(f"{block}shared_experts.{x}_proj.weight", 2 * F, D) for x in ("gate", "up")]
        ours["shared_gate_up"] = np.stack(shared)
        ours["shared_down"] = t(f"{block}shared_experts.down_proj.weight", D, 2 * F)
        return ours | experts(t, i, "mlp", "gate_proj", "up_proj", "down_proj", False)

    ours = model(t, layer)
    changes: dict[str, Any] = {
        "q_lora_rank": None if version == 2 else q_rank, "kv_lora_rank": rank, "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope, "v_head_dim": dv, "n_routed_experts": E, "num_experts_per_tok": 2,
        "moe_intermediate_size": F, "n_shared_experts": 2, "first_k_dense_replace": 1, "num_key_value_heads": N,
        "n_group": 1, "topk_group": 1, "head_dim": None,
    }  # fmt: skip
    if version == 3:
        t(f"layers.{LAYERS}.eh_proj.weight", D, 2 * D)
        changes["num_nextn_predict_layers"] = 1
    return config(f"DeepseekV{version}ForCausalLM", f"deepseek_v{version}", **changes), t.tensors, ours


CASES: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "llama in bfloat16": lambda: llama(jnp.bfloat16),
    "llama with biases": llama_with_biases,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "olmo2": olmo2,
    "phi3": phi3,
    "starcoder2": starcoder2,
    "gpt2": gpt2,
    "gpt2 without prefix": lambda: gpt2(""),
    "mixtral": mixtral,
    "mixtral, experts stacked": lambda: mixtral(True),
    "qwen2_moe": qwen2_moe,
    "qwen2_moe, experts stacked": lambda: qwen2_moe(True),
    "gpt_oss": gpt_oss,
    "deepseek_v2": lambda: deepseek(2),
    "deepseek_v3": lambda: deepseek(3),
}
