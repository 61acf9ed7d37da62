"""The parameter tree of the decoder, declared once: shapes, shardings and initial values all derive from it.

Canonical layout (independent of any mesh), matrices ``[out, in]`` so that every product contracts last axes:

* ``qkv`` ``[K, G + 2, H, D]``: for each kv head its G query heads, then its key head, then its value head, so that
  any split over kv heads keeps one matrix product;
* ``gate_up`` ``[2, F, D]``: gate, then up; split over F.

Rotary pairs are (i, i + H/2) within a head ("half-split", the Hugging Face convention).
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxserve.config import ModelConfig


class ArraySpec(NamedTuple):
    """Shape and logical axes of one parameter; ``parallel/specs.py`` maps logical axes to mesh axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@flax.struct.dataclass
class LayerParams:
    attn_norm: Any  # [D]
    qkv: Any  # [K, G + 2, H, D]
    attn_out: Any  # [D, N * H]
    mlp_norm: Any  # [D]
    gate_up: Any  # [2, F, D]
    down: Any  # [D, F]


@flax.struct.dataclass
class Params:
    embed: Any  # [V, D]
    layers: tuple[LayerParams, ...]  # num_layers of them
    final_norm: Any  # [D]
    head: Any  # [V, D]; None where the embedding is tied


def param_specs(config: ModelConfig) -> Params:
    """The tree of ``ArraySpec`` for a model."""
    d, f, h, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_kv_heads
    group = config.num_heads // k
    layer = LayerParams(
        attn_norm=ArraySpec((d,), (None,)),
        qkv=ArraySpec((k, group + 2, h, d), ("kv_heads", None, None, None)),
        attn_out=ArraySpec((d, config.num_heads * h), (None, "heads")),
        mlp_norm=ArraySpec((d,), (None,)),
        gate_up=ArraySpec((2, f, d), (None, "ffn", None)),
        down=ArraySpec((d, f), (None, "ffn")),
    )
    vocab = ArraySpec((config.vocab_size, d), ("vocab", None))
    return Params(
        embed=vocab,
        layers=(layer,) * config.num_layers,
        final_norm=ArraySpec((d,), (None,)),
        head=None if config.tie_word_embeddings else vocab,
    )


def is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)


def num_params(config: ModelConfig) -> int:
    """Parameters of a model; a tied embedding counts once."""
    total = 0
    for spec in jax.tree.leaves(param_specs(config), is_leaf=is_spec):
        size = 1
        for n in spec.shape:
            size *= n
        total += size
    return total


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype | type = jnp.float32) -> Params:
    """Random parameters for tests: matrices normal with standard deviation fan_in ** -0.5, norms near 1."""
    specs = param_specs(config)
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)

    def init(key: jax.Array, spec: ArraySpec) -> jax.Array:
        noise = jax.random.normal(key, spec.shape, jnp.float32)
        x = 1 + 0.1 * noise if len(spec.shape) == 1 else noise * spec.shape[-1] ** -0.5
        return x.astype(dtype)

    return jax.tree.unflatten(tree, [init(k, s) for k, s in zip(jax.random.split(key, len(leaves)), leaves)])


def check_params(params: Params, config: ModelConfig) -> None:
    """Raises ValueError naming the first tensor that is missing, extra or of the wrong shape, with both shapes."""
    specs = jax.tree_util.tree_flatten_with_path(param_specs(config), is_leaf=is_spec)[0]
    arrays = jax.tree_util.tree_flatten_with_path(params)[0]
    want = {jax.tree_util.keystr(path): spec.shape for path, spec in specs}
    got = {jax.tree_util.keystr(path): tuple(x.shape) for path, x in arrays}
    for name, shape in want.items():
        if name not in got:
            raise ValueError(f"params{name} is missing, expected shape {shape}")
        if got[name] != shape:
            raise ValueError(f"params{name} has shape {got[name]}, expected {shape}")
    for name in got:
        if name not in want:
            raise ValueError(f"params{name} is not a parameter of this model")
