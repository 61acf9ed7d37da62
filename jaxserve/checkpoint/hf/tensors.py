"""Where the tensors of Hugging Face architectures go in our tree, as data (``hf.layout`` has the algebra)."""

from collections.abc import Mapping

from jaxserve.checkpoint.hf.layout import Recipe, Source

Recipes = Mapping[str, tuple[Recipe, ...]]  # parameter -> recipes, of which the first whose tensor exists holds

Q, K, V = slice(None, -2), slice(-2, -1), slice(-1, None)  # heads of a group, in axis s of qkv
GATE, UP = slice(0, 1), slice(1, 2)  # in axis u of gate_up


def one(tensor: str, layout: str, beside: tuple[str, ...] = ()) -> tuple[Recipe, ...]:
    """A parameter that one tensor of the layer (or, with a leading "/", of the model) holds."""
    return ((Source(_in_layer(tensor), layout, beside=beside),),)


def qkv(names: str, layout: str, suffix: str) -> tuple[Recipe, ...]:
    """Separate q, k and v; ``names`` has {} for the letter."""
    parts = {"q": Q, "k": K, "v": V}
    return (tuple(Source(_in_layer(names.format(x) + suffix), layout, {"s": s}) for x, s in parts.items()),)


def gate_up(gate: str, up: str, layout: str) -> tuple[Recipe, ...]:
    """Separate gate and up."""
    return ((Source(_in_layer(gate), layout, {"u": GATE}), Source(_in_layer(up), layout, {"u": UP})),)


def _in_layer(tensor: str) -> str:
    return tensor[1:] if tensor.startswith("/") else f"{{p}}layers.{{i}}.{tensor}"


LLAMA_TENSORS: Recipes = {
    "embed": one("/{p}embed_tokens.weight", "v d"),
    "final_norm": one("/{p}norm.weight", "d"),
    "head": one("/lm_head.weight", "v d"),
    "attn_norm": one("input_layernorm.weight", "d"),
    "qkv": qkv("self_attn.{}_proj", "(k s h) d", ".weight"),
    "qkv_bias": qkv("self_attn.{}_proj", "(k s h)", ".bias"),
    "q_norm": one("self_attn.q_norm.weight", "h"),
    "k_norm": one("self_attn.k_norm.weight", "h"),
    "attn_out": one("self_attn.o_proj.weight", "d o"),
    "attn_out_bias": one("self_attn.o_proj.bias", "d"),
    "mlp_norm": one("post_attention_layernorm.weight", "d"),
    "gate_up": gate_up("mlp.gate_proj.weight", "mlp.up_proj.weight", "f d"),
    "gate_up_bias": gate_up("mlp.gate_proj.bias", "mlp.up_proj.bias", "f"),
    "down": one("mlp.down_proj.weight", "d f"),
    "down_bias": one("mlp.down_proj.bias", "d"),
}
POST_NORM_TENSORS: Recipes = {
    "attn_post_norm": one("post_attention_layernorm.weight", "d"),
    "mlp_norm": one("pre_feedforward_layernorm.weight", "d"),
    "mlp_post_norm": one("post_feedforward_layernorm.weight", "d"),
}
PHI3_TENSORS: Recipes = {
    "qkv": (tuple(Source(_in_layer("self_attn.qkv_proj.weight"), "(k s h) d", {"s": s}) for s in (Q, K, V)),),
    "gate_up": one("mlp.gate_up_proj.weight", "(u f) d"),
}
OLMO2_TENSORS: Recipes = {
    "q_norm": one("self_attn.q_norm.weight", "(k g h)"),
    "k_norm": one("self_attn.k_norm.weight", "(k h)"),
}
STARCODER2_TENSORS: Recipes = {
    "final_norm_bias": one("/{p}norm.bias", "d"),
    "attn_norm_bias": one("input_layernorm.bias", "d"),
    "mlp_norm_bias": one("post_attention_layernorm.bias", "d"),
    "gate_up": one("mlp.c_fc.weight", "f d"),
    "gate_up_bias": one("mlp.c_fc.bias", "f"),
    "down": one("mlp.c_proj.weight", "d f"),
    "down_bias": one("mlp.c_proj.bias", "d"),
}
GPT2_TENSORS: Recipes = {  # Conv1D keeps its matrices [in, out]
    "embed": one("/{p}wte.weight", "v d"),
    "positions": one("/{p}wpe.weight", "p d"),
    "final_norm": one("/{p}ln_f.weight", "d"),
    "final_norm_bias": one("/{p}ln_f.bias", "d"),
    "head": one("/lm_head.weight", "v d"),
    "attn_norm": one("/{p}h.{i}.ln_1.weight", "d"),
    "attn_norm_bias": one("/{p}h.{i}.ln_1.bias", "d"),
    "qkv": one("/{p}h.{i}.attn.c_attn.weight", "d (s k h)"),
    "qkv_bias": one("/{p}h.{i}.attn.c_attn.bias", "(s k h)"),
    "attn_out": one("/{p}h.{i}.attn.c_proj.weight", "o d"),
    "attn_out_bias": one("/{p}h.{i}.attn.c_proj.bias", "d"),
    "mlp_norm": one("/{p}h.{i}.ln_2.weight", "d"),
    "mlp_norm_bias": one("/{p}h.{i}.ln_2.bias", "d"),
    "gate_up": one("/{p}h.{i}.mlp.c_fc.weight", "d f"),
    "gate_up_bias": one("/{p}h.{i}.mlp.c_fc.bias", "f"),
    "down": one("/{p}h.{i}.mlp.c_proj.weight", "f d"),
    "down_bias": one("/{p}h.{i}.mlp.c_proj.bias", "d"),
}
MOE_TENSORS: Recipes = {
    "router": one("mlp.gate.weight", "e d"),
    "correction_bias": one("mlp.gate.e_score_correction_bias", "e"),
    "experts_gate_up": (
        *gate_up("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "f d"),
        *one("mlp.experts.gate_up_proj", "e (u f) d"),
    ),
    "experts_down": (*one("mlp.experts.{e}.down_proj.weight", "d f"), *one("mlp.experts.down_proj", "e d f")),
    "shared_gate_up": (
        *gate_up("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "f d"),
        *gate_up("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", "f d"),
    ),
    "shared_down": (
        *one("mlp.shared_experts.down_proj.weight", "d f"),
        *one("mlp.shared_expert.down_proj.weight", "d f"),
    ),
    "shared_gate": one("mlp.shared_expert_gate.weight", "x d"),
}
MIXTRAL_TENSORS: Recipes = {
    "router": (*one("block_sparse_moe.gate.weight", "e d"), *one("mlp.gate.weight", "e d")),
    "experts_gate_up": (
        *gate_up("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight", "f d"),
        *one("mlp.experts.gate_up_proj", "e (u f) d"),
    ),
    "experts_down": (
        *one("block_sparse_moe.experts.{e}.w2.weight", "d f"),
        *one("mlp.experts.down_proj", "e d f"),
    ),
}
GPT_OSS_TENSORS: Recipes = {  # matrices [in, out], gate and up side by side
    "sinks": one("self_attn.sinks", "(k g)"),
    "router": one("mlp.router.weight", "e d"),
    "router_bias": one("mlp.router.bias", "e"),
    "experts_gate_up": one("mlp.experts.gate_up_proj", "e d (f u)"),
    "experts_gate_up_bias": one("mlp.experts.gate_up_proj_bias", "e (f u)"),
    "experts_down": one("mlp.experts.down_proj", "e f d"),
    "experts_down_bias": one("mlp.experts.down_proj_bias", "e d"),
}
MLA_TENSORS: Recipes = {
    "q_down": one("self_attn.q_a_proj.weight", "q d"),
    "q_down_norm": one("self_attn.q_a_layernorm.weight", "q"),
    "q_up": (*one("self_attn.q_b_proj.weight", "(n w) q"), *one("self_attn.q_proj.weight", "(n w) q")),
    "kv_down": one("self_attn.kv_a_proj_with_mqa.weight", "r d"),
    "kv_down_norm": one("self_attn.kv_a_layernorm.weight", "r"),
    "k_up": one("self_attn.kv_b_proj.weight", "(n w) r", ("k_up", "v_up")),
    "v_up": one("self_attn.kv_b_proj.weight", "(n w) r", ("k_up", "v_up")),
}
