"""Mixture of experts (Shazeer et al., 2017; DeepSeek-V2 and V3): route, group the tokens by expert, multiply.

Every device of the tensor axis has its own columns of every expert and routes alike.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.config import ModelConfig, MoEConfig
from jaxserve.model.linear import activate, linear, psum_tensor
from jaxserve.model.params import LayerParams
from jaxserve.model.quantized import experts_matmul
from pallas_kernels.dispatch import Implementation


def route(logits: jax.Array, correction_bias: jax.Array | None, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Weights f32 and ids of the ``A`` experts that each token goes to, both ``[T, A]``, from ``logits`` [T, E] f32."""
    t, e = logits.shape
    match moe.scoring:
        case "softmax":
            scores = jax.nn.softmax(logits)
        case "sigmoid":
            scores = jax.nn.sigmoid(logits)
        case "softmax_topk":
            scores = logits
    choice = scores if correction_bias is None else scores + correction_bias.astype(jnp.float32)
    if moe.num_groups > 1:
        groups = choice.reshape(t, moe.num_groups, e // moe.num_groups)
        best = lax.top_k(groups, 2 if moe.group_score == "top2" else 1)[0].sum(axis=-1)  # [T, NG]
        groups_kept = lax.top_k(best, moe.topk_group)[1]  # [T, topk_group]
        kept = jnp.any(groups_kept[:, :, None] == jnp.arange(moe.num_groups), axis=1)  # [T, NG]
        choice = jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(t, e)
    ids = lax.top_k(choice, moe.num_experts_per_tok)[1]  # [T, A]
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if moe.scoring == "softmax_topk":
        weights = jax.nn.softmax(weights)
    if moe.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + 1e-20)
    return weights * moe.routed_scaling_factor, ids


def moe(p: LayerParams, x: jax.Array, config: ModelConfig, implementation: Implementation) -> jax.Array:
    """The experts' block of ``x`` [T, D]."""
    assert config.moe is not None
    (t, d), a = x.shape, config.moe.num_experts_per_tok
    e, width, f, _ = p.experts_gate_up.shape  # [E, 2, F, D]
    router_bias = None if p.router_bias is None else p.router_bias.astype(jnp.float32)
    # In f32: a rounded logit may choose another expert.
    logits = linear(x.astype(jnp.float32), p.router.astype(jnp.float32), router_bias)  # [T, E]
    weights, ids = route(logits, p.correction_bias, config.moe)  # [T, A] both

    order = jnp.argsort(ids.reshape(-1), stable=True)  # [T * A]
    expert = ids.reshape(-1)[order]  # [T * A], ascending
    group_sizes = jnp.sum(expert[None, :] == jnp.arange(e)[:, None], axis=1, dtype=jnp.int32)  # [E]
    gate_up = p.experts_gate_up.reshape(e, width * f, d)
    hidden = experts_matmul(x[order // a], gate_up, group_sizes, implementation).reshape(t * a, width, f)
    if p.experts_gate_up_bias is not None:
        hidden = hidden + p.experts_gate_up_bias[expert]
    hidden = activate(hidden, config.activation)  # [T * A, F]
    out = experts_matmul(hidden, p.experts_down, group_sizes, implementation)  # [T * A, D]
    back = jnp.zeros(t * a, jnp.int32).at[order].set(jnp.arange(t * a, dtype=jnp.int32), unique_indices=True)
    out = out[back].reshape(t, a, d).astype(jnp.float32)
    update = psum_tensor(jnp.sum(out * weights[:, :, None], axis=1).astype(x.dtype))  # [T, D]
    if p.experts_down_bias is not None:
        bias = p.experts_down_bias[ids].astype(jnp.float32)  # [T, A, D]
        update = update + jnp.sum(bias * weights[:, :, None], axis=1).astype(x.dtype)
    if p.shared_gate_up is not None:
        update = update + shared_expert(p, x, config)
    return update


def shared_expert(p: LayerParams, x: jax.Array, config: ModelConfig) -> jax.Array:
    """The expert that every token goes to, scaled by a gate where there is one (Qwen2-MoE)."""
    width, f, d = p.shared_gate_up.shape  # [2, F, D]
    hidden = linear(x, p.shared_gate_up.reshape(width * f, d)).reshape(-1, width, f)
    update = psum_tensor(linear(activate(hidden, config.activation), p.shared_down))
    return update if p.shared_gate is None else update * jax.nn.sigmoid(linear(x, p.shared_gate))
