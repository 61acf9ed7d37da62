"""The engine's oracle: a decoder without cache, batch, page or jit, in numpy, from the formulas of the papers.

It shares nothing with the engine but the parameter layout. Every token recomputes the whole sequence.
"""

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.model.params import Params


def _rms_norm(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def _rope(x, theta):  # [T, heads, H]: the pair (i, i + H/2) turns by position * theta ** (-2i / H)
    t, _, h = x.shape
    angle = np.arange(t)[:, None] * theta ** (-np.arange(0, h, 2) / h)  # [T, H / 2]
    z = (x[..., : h // 2] + 1j * x[..., h // 2 :]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def oracle_logits(config: ModelConfig, params: Params, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] in float64 after each of ``tokens``."""

    def p(x) -> np.ndarray:
        return np.asarray(x, np.float64)

    h, group = config.head_dim, config.num_heads // config.num_kv_heads
    x = p(params.embed)[tokens]  # [T, D]
    t = len(tokens)
    causal = np.where(np.tri(t, dtype=bool), 0, -np.inf)
    for layer in params.layers:
        y = _rms_norm(x, p(layer.attn_norm), config.norm_eps)
        update = []
        for kv_head in p(layer.qkv):  # [G + 2, H, D]
            heads = np.einsum("td,ghd->tgh", y, kv_head)
            q, k = _rope(heads[:, :group], config.ropes[0].theta), _rope(heads[:, [group]], config.ropes[0].theta)[:, 0]
            scores = np.einsum("tgh,sh->gts", q, k) / np.sqrt(h) + causal
            update.append(np.einsum("gts,sh->tgh", _softmax(scores), heads[:, group + 1]).reshape(t, group * h))
        x = x + np.concatenate(update, axis=1) @ p(layer.attn_out).T
        y = _rms_norm(x, p(layer.mlp_norm), config.norm_eps)
        gate, up = (y @ w.T for w in p(layer.gate_up))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p(layer.down).T
    x = _rms_norm(x, p(params.final_norm), config.norm_eps)
    return x @ p(params.embed if params.head is None else params.head).T


def oracle_greedy(config: ModelConfig, params: Params, prompt: list[int], num_tokens: int) -> list[int]:
    """``num_tokens`` greedy tokens after ``prompt``."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(oracle_logits(config, params, tokens)[-1])))
    return tokens[len(prompt) :]
