"""The parameter tree of the decoder, declared once: names, shapes, shardings and initial values all derive from it.

Canonical layout (independent of any mesh), matrices ``[out, in]`` so that every product contracts last axes:

* ``qkv`` ``[K, G + 2, H, D]``: for each kv head its G query heads, then its key head, then its value head, so that
  any split over kv heads keeps one matrix product;
* ``gate_up`` ``[2, F, D]``: gate, then up; split over F. ``[1, F, D]`` where the MLP has no gate;
* experts have a leading E axis and are split over their F, as an MLP is.

Rotary pairs are (i, i + rotary_dim / 2) within a head ("half-split", the Hugging Face convention) unless the config
says interleaved. A parameter that a model does not have is None.

A matrix that ``ModelConfig.quantization`` names is a ``quantized.QuantizedMatrix`` of several arrays instead of one.

A parameter's name is its path in the tree: ``embed``, ``layers.3.qkv``, ``final_norm``, ``layers.3.down.scale``.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.model.array_spec import ArraySpec, is_spec
from jaxserve.model.quantized import quantized_specs, random_leaf


@flax.struct.dataclass
class LayerParams:
    """One layer; for MLA (``MLAConfig``): RQ = q_lora_rank, RK = kv_lora_rank, and head dimensions HN, HR, HV."""

    attn_norm: Any = None  # [D]
    attn_norm_bias: Any = None  # [D]
    qkv: Any = None  # [K, G + 2, H, D]
    qkv_bias: Any = None  # [K, G + 2, H]
    q_norm: Any = None  # [H], or [K, G, H] over all heads at once
    k_norm: Any = None  # [H], or [K, H]
    sinks: Any = None  # [K, G]
    q_down: Any = None  # [RQ, D]
    q_down_norm: Any = None  # [RQ]
    q_up: Any = None  # [N, HN + HR, RQ], or [N, HN + HR, D] without q_down
    kv_down: Any = None  # [RK + HR, D]
    kv_down_norm: Any = None  # [RK]
    k_up: Any = None  # [N, HN, RK]
    v_up: Any = None  # [N, HV, RK]
    attn_out: Any = None  # [D, N * H]; MLA: [D, N * HV]
    attn_out_bias: Any = None  # [D]
    attn_post_norm: Any = None  # [D]
    mlp_norm: Any = None  # [D]
    mlp_norm_bias: Any = None  # [D]
    gate_up: Any = None  # [2, F, D], or [1, F, D]
    gate_up_bias: Any = None  # [2, F], or [1, F]
    down: Any = None  # [D, F]
    down_bias: Any = None  # [D]
    router: Any = None  # [E, D]
    router_bias: Any = None  # [E]
    correction_bias: Any = None  # [E]
    experts_gate_up: Any = None  # [E, 2, F, D]
    experts_gate_up_bias: Any = None  # [E, 2, F]
    experts_down: Any = None  # [E, D, F]
    experts_down_bias: Any = None  # [E, D]
    shared_gate_up: Any = None  # [2, F, D]
    shared_down: Any = None  # [D, F]
    shared_gate: Any = None  # [1, D]
    mlp_post_norm: Any = None  # [D]


@flax.struct.dataclass
class Params:
    embed: Any  # [V, D]
    layers: tuple[LayerParams, ...]  # num_layers of them
    final_norm: Any  # [D]
    head: Any = None  # [V, D]; None where the embedding is tied
    positions: Any = None  # [max_position_embeddings, D], learned
    final_norm_bias: Any = None  # [D]


class ParamSource(Protocol):
    """Where parameters come from: an open checkpoint, or a tree of live arrays (``TreeSource``)."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` (one slice with a start and a stop for each axis) of parameter ``name``, in any dtype."""
        ...


def layer_specs(config: ModelConfig, layer: int) -> LayerParams:
    """The ``ArraySpec``s of one layer; None for what it does not have."""
    d, f, h, k, n = (
        config.hidden_size, config.intermediate_size, config.head_dim, config.num_kv_heads, config.num_heads
    )  # fmt: skip
    group, mla, moe = n // k, config.mla, config.moe
    width = 2 if config.mlp == "gated" else 1
    vector = ArraySpec((d,), (None,))
    specs: dict[str, ArraySpec] = {}

    def add(condition: object, **given: ArraySpec) -> None:
        if condition:
            specs.update(given)

    has_norm_bias = config.norm == "layer"
    add(config.pre_norm, attn_norm=vector, mlp_norm=vector)
    add(config.pre_norm and has_norm_bias, attn_norm_bias=vector, mlp_norm_bias=vector)
    add(config.post_norm, attn_post_norm=vector, mlp_post_norm=vector)
    if mla is None:
        add(True, qkv=ArraySpec((k, group + 2, h, d), ("kv_heads", None, None, None)))
        add(config.qkv_bias, qkv_bias=ArraySpec((k, group + 2, h), ("kv_heads", None, None)))
        add(config.qk_norm == "head", q_norm=ArraySpec((h,), (None,)), k_norm=ArraySpec((h,), (None,)))
        add(
            config.qk_norm == "full",
            q_norm=ArraySpec((k, group, h), ("kv_heads", None, None)),
            k_norm=ArraySpec((k, h), ("kv_heads", None)),
        )
        add(config.attn_sinks, sinks=ArraySpec((k, group), ("kv_heads", None)))
        out_dim = n * h
    else:
        q_in, q_dim = mla.q_lora_rank or d, mla.qk_nope_head_dim + mla.qk_rope_head_dim
        rank = mla.kv_lora_rank
        add(
            mla.q_lora_rank,
            q_down=ArraySpec((q_in, d), (None, None)),
            q_down_norm=ArraySpec((q_in,), (None,)),
        )
        add(
            True,
            q_up=ArraySpec((n, q_dim, q_in), ("heads", None, None)),
            kv_down=ArraySpec((rank + mla.qk_rope_head_dim, d), (None, None)),
            kv_down_norm=ArraySpec((rank,), (None,)),
            k_up=ArraySpec((n, mla.qk_nope_head_dim, rank), ("heads", None, None)),
            v_up=ArraySpec((n, mla.v_head_dim, rank), ("heads", None, None)),
        )
        out_dim = n * mla.v_head_dim
    add(True, attn_out=ArraySpec((d, out_dim), (None, "heads")))
    add(config.attn_out_bias, attn_out_bias=vector)
    if moe is None or not config.is_moe(layer):
        add(
            True,
            gate_up=ArraySpec((width, f, d), (None, "ffn", None)),
            down=ArraySpec((d, f), (None, "ffn")),
        )
        add(config.mlp_bias, gate_up_bias=ArraySpec((width, f), (None, "ffn")), down_bias=vector)
    else:
        e, fe, fs = moe.num_experts, moe.intermediate_size, moe.shared_intermediate_size
        per_expert = ArraySpec((e,), (None,))
        add(
            True,
            router=ArraySpec((e, d), (None, None)),
            experts_gate_up=ArraySpec((e, 2, fe, d), (None, None, "ffn", None)),
            experts_down=ArraySpec((e, d, fe), (None, None, "ffn")),
        )
        add(moe.router_bias, router_bias=per_expert)
        add(moe.correction_bias, correction_bias=per_expert)
        add(
            moe.expert_bias,
            experts_gate_up_bias=ArraySpec((e, 2, fe), (None, None, "ffn")),
            experts_down_bias=ArraySpec((e, d), (None, None)),
        )
        add(
            fs,
            shared_gate_up=ArraySpec((2, fs, d), (None, "ffn", None)),
            shared_down=ArraySpec((d, fs), (None, "ffn")),
        )
        add(fs and moe.shared_gate, shared_gate=ArraySpec((1, d), (None, None)))
    return LayerParams(**_with_formats(config, f"layers.{layer}.", specs))


def _with_formats(config: ModelConfig, prefix: str, specs: dict[str, ArraySpec]) -> dict[str, Any]:
    """``specs`` of parameters by name, those of quantized ones in place of their matrices'."""
    formats = {} if config.quantization is None else config.quantization.formats()
    return {
        name: quantized_specs(prefix + name, spec, formats[prefix + name]) if prefix + name in formats else spec
        for name, spec in specs.items()
    }


def param_specs(config: ModelConfig) -> Params:
    """The tree of ``ArraySpec`` for a model."""
    d = config.hidden_size
    vocab, vector = ArraySpec((config.vocab_size, d), ("vocab", None)), ArraySpec((d,), (None,))
    tables = _with_formats(config, "", {"embed": vocab, "head": vocab})
    return Params(
        embed=tables["embed"],
        layers=tuple(layer_specs(config, i) for i in range(config.num_layers)),
        final_norm=vector,
        head=None if config.tie_word_embeddings else tables["head"],
        positions=ArraySpec((config.max_position_embeddings, d), (None, None)) if config.learned_positions else None,
        final_norm_bias=vector if config.norm == "layer" else None,
    )


def layer_fields(config: ModelConfig, layer: int) -> frozenset[str]:
    """Names of the parameters that ``layer`` has."""
    specs = layer_specs(config, layer)
    return frozenset(f.name for f in dataclasses.fields(specs) if getattr(specs, f.name) is not None)


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every parameter of a ``Params`` (of arrays or of specs), in tree order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]:
        yield path_name(path), leaf


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's name from its path in the tree, as ``jax.tree_util`` gives it."""
    keys = (next((getattr(key, a) for a in ("name", "idx", "key") if hasattr(key, a)), key) for key in path)
    return ".".join(map(str, keys))


def key_name(name: str, spec: Any) -> str:
    """The parameter whose random key is that of this one: the arrays of a quantized matrix share one."""
    return name if spec.dtype is None else f"{name.rpartition('.')[0]}.q"


def num_params(config: ModelConfig) -> int:
    """Parameters of a model, each weight one however it is kept; a tied embedding counts once."""
    plain = dataclasses.replace(config, quantization=None)
    return sum(math.prod(spec.shape) for _, spec in named_leaves(param_specs(plain)))


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype | type = jnp.float32) -> Params:
    """Random parameters for tests: matrices normal with standard deviation fan_in ** -0.5, norms near 1, biases and
    sinks near 0; of quantized matrices uniform numbers of about that size."""
    named = list(named_leaves(param_specs(config)))

    def init(key: jax.Array, name: str, spec: ArraySpec) -> jax.Array:
        if spec.dtype is not None:
            return random_leaf(key, name, spec.shape, spec.dtype)
        noise = jax.random.normal(key, spec.shape, jnp.float32)
        if name.endswith("norm"):
            x = 1 - config.norm_offset + 0.1 * noise
        elif name.endswith("bias") or name.endswith("sinks"):
            x = 0.1 * noise
        else:
            x = noise * spec.shape[-1] ** -0.5
        return x.astype(dtype)

    keys = dict(zip((name for name, _ in named), jax.random.split(key, len(named)), strict=True))
    leaves = [init(keys[key_name(name, spec)], name, spec) for name, spec in named]
    return jax.tree.unflatten(jax.tree.structure(param_specs(config), is_leaf=is_spec), leaves)


def check_params(params: Params, config: ModelConfig) -> None:
    """Raises ValueError naming the first tensor that is missing, extra or of the wrong shape, with both shapes."""
    want = {name: spec.shape for name, spec in named_leaves(param_specs(config))}
    got = {name: tuple(x.shape) for name, x in named_leaves(params)}
    for name, shape in want.items():
        if name not in got:
            raise ValueError(f"params.{name} is missing, expected shape {shape}")
        if got[name] != shape:
            raise ValueError(f"params.{name} has shape {got[name]}, expected {shape}")
    for name in got:
        if name not in want:
            raise ValueError(f"params.{name} is not a parameter of this model")


class TreeSource:
    """A tree of live arrays (numpy or jax) as a ``ParamSource``.

    Raises ValueError naming a tensor that is missing, extra or of the wrong shape.
    """

    def __init__(self, params: Params, config: ModelConfig):
        check_params(params, config)
        self._leaves = dict(named_leaves(params))

    @property
    def is_on_devices(self) -> bool:
        """Whether some of it is: reading that computes there."""
        return any(isinstance(leaf, jax.Array) for leaf in self._leaves.values())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._leaves[name][index])

    def array(self, name: str) -> Any:
        """A whole parameter, as it was given."""
        return self._leaves[name]
