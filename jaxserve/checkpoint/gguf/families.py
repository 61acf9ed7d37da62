"""GGUF architectures as data: what a family is beyond its metadata, and the names of its tensors.

Metadata keys and tensor names mean the same in every architecture (the `gguf` package's ``constants`` lists them), so
the tables here say only what a file does not: flags, defaults, and layouts that differ. Their source is llama.cpp:
its converter (what is stored how) and its graphs (what an absent key means).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """One architecture.

    Attributes:
        architecture: ``general.architecture``, the prefix of its metadata keys.
        family: ``ModelConfig.family``, Hugging Face's name.
        flags: fields of ``ModelConfig`` that hold for every model of the family.
        optional: flags that hold where the first layer has the tensor in ``OPTIONAL``.
        moe: fields of ``MoEConfig``, for families that may have experts. Empty: no experts.
        interleaved_rope: q and k rows are stored with rotary pairs side by side (2i, 2i + 1) and must be put back to
            the half-split order (i, i + H/2).
        window: ``attention.sliding_window`` where the file does not say; None: no window.
        full_every: of layers with a window every n-th sees all keys; 0: none does. None: the family has no windows,
            and the key is refused.
        local_theta: rope theta of layers with a window where the file does not say; None: that of the others.
        local_rope_is_scaled: rope scaling holds in layers with a window too.
        no_rope_every: every n-th layer has no rotary embedding; 0: all have it.
        scaled_embedding: ``embed_scale`` is the square root of the width.
        width_scaled_layers: a model of this many layers scales scores by (hidden_size / num_heads) ** -0.5.
        attn_factor_is_whole: ``rope.scaling.attn_factor`` replaces YaRN's own factor instead of multiplying it.
        yarn_truncate: ``RopeConfig.truncate``.
        expert_ffn_is_ffn: experts are as wide as ``feed_forward_length`` where they have no length of their own.
        latent: multi-head latent attention (``MLAConfig``).
        fused_gate_up: ``ffn_up`` holds gate rows, then up rows.
        tensors: our parameter -> tensor names of a layer, where they differ from ``LAYER_TENSORS``.
    """

    architecture: str
    family: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    moe: Mapping[str, Any] = field(default_factory=dict)
    interleaved_rope: bool = False
    window: int | None = None
    full_every: int | None = None
    local_theta: float | None = None
    local_rope_is_scaled: bool = True
    no_rope_every: int = 0
    scaled_embedding: bool = False
    width_scaled_layers: int | None = None
    attn_factor_is_whole: bool = False
    yarn_truncate: bool = True
    expert_ffn_is_ffn: bool = False
    latent: bool = False
    fused_gate_up: bool = False
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def layer_tensors(self, parameter: str) -> tuple[str, ...]:
        """Names, after ``blk.{i}.``, of the tensors that a layer's parameter is made of."""
        return self.tensors.get(parameter) or LAYER_TENSORS[parameter]


TOP_TENSORS = {
    "embed": "token_embd.weight",
    "positions": "position_embd.weight",
    "final_norm": "output_norm.weight",
    "final_norm_bias": "output_norm.bias",
    "head": "output.weight",  # absent where the embedding is tied
}

LAYER_TENSORS: dict[str, tuple[str, ...]] = {
    "attn_norm": ("attn_norm.weight",),
    "attn_norm_bias": ("attn_norm.bias",),
    "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "q_norm": ("attn_q_norm.weight",),
    "k_norm": ("attn_k_norm.weight",),
    "sinks": ("attn_sinks.weight",),
    "q_down": ("attn_q_a.weight",),
    "q_down_norm": ("attn_q_a_norm.weight",),
    "q_up": ("attn_q_b.weight",),
    "kv_down": ("attn_kv_a_mqa.weight",),
    "kv_down_norm": ("attn_kv_a_norm.weight",),
    "k_up": ("attn_k_b.weight",),
    "v_up": ("attn_v_b.weight",),
    "attn_out": ("attn_output.weight",),
    "attn_out_bias": ("attn_output.bias",),
    "attn_post_norm": ("post_attention_norm.weight",),
    "mlp_norm": ("ffn_norm.weight",),
    "mlp_norm_bias": ("ffn_norm.bias",),
    "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
    "gate_up_bias": ("ffn_gate.bias", "ffn_up.bias"),
    "down": ("ffn_down.weight",),
    "down_bias": ("ffn_down.bias",),
    "router": ("ffn_gate_inp.weight",),
    "router_bias": ("ffn_gate_inp.bias",),
    "correction_bias": ("exp_probs_b.bias",),
    "experts_gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts_gate_up_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "experts_down": ("ffn_down_exps.weight",),
    "experts_down_bias": ("ffn_down_exps.bias",),
    "shared_gate_up": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "shared_down": ("ffn_down_shexp.weight",),
    "shared_gate": ("ffn_gate_inp_shexp.weight",),
    "mlp_post_norm": ("post_ffw_norm.weight",),
}  # our parameter -> tensors after "blk.{i}."; more than one are stacked, gate before up, q before k before v

PLAIN_MLP: dict[str, tuple[str, ...]] = {"gate_up": ("ffn_up.weight",), "gate_up_bias": ("ffn_up.bias",)}
FUSED_QKV: dict[str, tuple[str, ...]] = {"qkv": ("attn_qkv.weight",), "qkv_bias": ("attn_qkv.bias",)}
UNSTACKED_EXPERTS = {
    "ffn_gate_exps.weight": "ffn_gate.{e}.weight",
    "ffn_up_exps.weight": "ffn_up.{e}.weight",
    "ffn_down_exps.weight": "ffn_down.{e}.weight",
}  # Mixtral files made before April 2024 have one tensor an expert

OPTIONAL: dict[str, tuple[str, Any]] = {
    "qkv_bias": ("attn_q.bias", True),
    "attn_out_bias": ("attn_output.bias", True),
    "mlp_bias": ("ffn_down.bias", True),
    "qk_norm": ("attn_q_norm.weight", "head"),
}  # flag -> the tensor of layer 0 that sets it, and the value

_BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias")
_GEMMA: dict[str, Any] = {"activation": "gelu_tanh"}  # norms are stored as 1 + w, so norm_offset stays 0
_LAYER_NORMS: dict[str, Any] = {"norm": "layer", "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True}
_NORMED: dict[str, Any] = {"norm_topk_prob": True}

_FAMILIES = (
    # Llama, Mistral (a window is not written by converters, but honoured) and Mixtral.
    GGUFFamily(
        architecture="llama",
        family="llama",
        optional=_BIASES,
        moe=_NORMED,
        interleaved_rope=True,
        full_every=0,
        expert_ffn_is_ffn=True,
    ),
    GGUFFamily(
        architecture="smollm3",
        family="smollm3",
        optional=_BIASES,
        interleaved_rope=True,
        no_rope_every=4,  # the layers without rope are not in the metadata
    ),
    GGUFFamily(architecture="qwen2", family="qwen2", flags={"qkv_bias": True}),
    GGUFFamily(architecture="qwen3", family="qwen3", flags={"qk_norm": "head"}),
    GGUFFamily(
        architecture="qwen2moe",
        family="qwen2_moe",
        flags={"qkv_bias": True},
        moe={"shared_gate": True},  # chosen weights are not normalised: norm_topk_prob is not in the metadata
    ),
    GGUFFamily(architecture="qwen3moe", family="qwen3_moe", flags={"qk_norm": "head"}, moe=_NORMED),
    GGUFFamily(architecture="gemma", family="gemma", flags=_GEMMA, scaled_embedding=True),
    GGUFFamily(
        architecture="gemma2",
        family="gemma2",
        flags=_GEMMA | {"post_norm": True},
        window=4096,
        full_every=2,
        scaled_embedding=True,
        width_scaled_layers=46,  # 27B: query_pre_attn_scalar is not in the metadata
    ),
    GGUFFamily(
        architecture="gemma3",
        family="gemma3_text",
        flags=_GEMMA | {"post_norm": True, "qk_norm": "head"},
        full_every=6,  # neither this pattern nor the local theta is in the metadata of most files
        local_theta=10_000.0,
        local_rope_is_scaled=False,
        scaled_embedding=True,
        width_scaled_layers=62,  # 27B
    ),
    GGUFFamily(
        architecture="phi3",
        family="phi3",
        full_every=0,
        fused_gate_up=True,
        tensors=FUSED_QKV | {"gate_up": ("ffn_up.weight",)},
    ),
    GGUFFamily(architecture="granite", family="granite", optional=_BIASES, interleaved_rope=True),
    GGUFFamily(
        architecture="granitemoe",
        family="granitemoe",
        optional=("qkv_bias", "attn_out_bias"),
        moe=_NORMED,
        interleaved_rope=True,
        expert_ffn_is_ffn=True,
    ),
    GGUFFamily(
        architecture="gpt2",
        family="gpt2",
        flags=_LAYER_NORMS | {"mlp": "plain", "activation": "gelu_tanh", "learned_positions": True, "ropes": ()},
        tensors=FUSED_QKV | PLAIN_MLP,
    ),
    GGUFFamily(
        architecture="starcoder2",
        family="starcoder2",
        flags=_LAYER_NORMS | {"mlp": "plain", "activation": "gelu_tanh"},
        window=4096,  # of all three models; not in the metadata
        full_every=0,
        tensors=PLAIN_MLP,
    ),
    # OLMo-2, and OLMo-3, which has windows in three layers of four and YaRN in the fourth.
    GGUFFamily(
        architecture="olmo2",
        family="olmo2",
        flags={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
        full_every=4,
        local_rope_is_scaled=False,
        attn_factor_is_whole=True,
    ),
    GGUFFamily(
        architecture="gpt-oss",
        family="gpt_oss",
        flags={"qkv_bias": True, "attn_out_bias": True, "attn_sinks": True, "activation": "swiglu_oai"},
        moe={"scoring": "softmax_topk", "router_bias": True, "expert_bias": True},
        full_every=2,
        yarn_truncate=False,
        tensors={"mlp_norm": ("post_attention_norm.weight",)},
    ),
    GGUFFamily(
        architecture="glm4moe",
        family="glm4_moe",
        optional=("qkv_bias", "qk_norm"),
        moe=_NORMED | {"scoring": "sigmoid", "correction_bias": True},
        tensors={"mlp_norm": ("post_attention_norm.weight",)},
    ),
    GGUFFamily(
        architecture="deepseek2",
        family="deepseek_v3",  # or V2, which scores its experts by softmax
        moe={"group_score": "top2"},
        latent=True,
    ),
)

FAMILIES: dict[str, GGUFFamily] = {f.architecture: f for f in _FAMILIES}
