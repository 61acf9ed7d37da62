"""Low-rank adapters (LoRA, Hu et al., 2021) of one base model, several in one step: each token has its own, or none.

An adapter adds ``B A x`` to the product of a matrix with ``x``. Those of all slots lie side by side as one matrix ``A``
of ``LA * LR`` rows and one ``B`` of as many columns: a token's ``A x`` is computed for every slot and kept for its own
one only, so that a step reads each adapter once, whatever tokens use it, gathers nothing, and a token without an
adapter gets exactly 0. That costs the work of ``LA * LR`` rows more a matrix; a step whose tokens have no adapter runs
the program without them.

Axis letters besides the design's: ``LA`` adapter slots, ``LR`` their rank at most.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.config import LoraConfig, ModelConfig
from jaxserve.model.array_spec import ArraySpec
from jaxserve.model.linear import linear

# Matrices that an adapter may change, and how many it sees in each: q, k and v have an A of their own, so have gate and
# up. Experts, router, embedding and head are not among them, nor are the matrices of multi-head latent attention.
PIECES = {"qkv": 3, "attn_out": 1, "gate_up": 2, "down": 1}


@flax.struct.dataclass
class LayerAdapters:
    """One layer's adapters of all slots, scale included; None for matrices that the layer does not have."""

    qkv_a: Any = None  # [3, LA, LR, D], of q, k and v
    q_b: Any = None  # [K, G, H, LA, LR]
    kv_b: Any = None  # [2, K, H, LA, LR]
    attn_out_a: Any = None  # [LA, LR, N * H]
    attn_out_b: Any = None  # [D, LA, LR]
    gate_up_a: Any = None  # [2, LA, LR, D], or [1, ...] where the MLP has no gate
    gate_up_b: Any = None  # [2, F, LA, LR], or [1, ...]
    down_a: Any = None  # [LA, LR, F]
    down_b: Any = None  # [D, LA, LR]


def slot_axis(name: str, ndim: int) -> int:
    """Which axis of a field of ``LayerAdapters`` is LA."""
    return ndim - (3 if name.endswith("_a") else 2)


def layer_adapter_specs(config: ModelConfig, layer: int, lora: LoraConfig) -> LayerAdapters:
    """The ``ArraySpec``s of one layer."""
    d, f, h, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_kv_heads
    group, size = config.num_heads // k, (lora.max_loras, lora.max_rank)
    none = (None, None)
    specs: dict[str, ArraySpec] = {}
    out_dim = config.num_heads * h
    if config.mla is None:
        specs["qkv_a"] = ArraySpec((3, *size, d), (None, *none, None))
        specs["q_b"] = ArraySpec((k, group, h, *size), ("kv_heads", None, None, *none))
        specs["kv_b"] = ArraySpec((2, k, h, *size), (None, "kv_heads", None, *none))
    else:
        out_dim = config.num_heads * config.mla.v_head_dim
    specs["attn_out_a"] = ArraySpec((*size, out_dim), (*none, "heads"))
    specs["attn_out_b"] = ArraySpec((d, *size), (None, *none))
    if not config.is_moe(layer):
        width = 2 if config.mlp == "gated" else 1
        specs["gate_up_a"] = ArraySpec((width, *size, d), (None, *none, None))
        specs["gate_up_b"] = ArraySpec((width, f, *size), (None, "ffn", *none))
        specs["down_a"] = ArraySpec((*size, f), (*none, "ffn"))
        specs["down_b"] = ArraySpec((d, *size), (None, *none))
    return LayerAdapters(**specs)


class Lora(NamedTuple):
    """A layer's adapters, and which of them each token of the step has."""

    layer: LayerAdapters
    chosen: jax.Array  # [T, LA] bool, at most one True a row


def chosen_adapters(adapter_ids: jax.Array, max_loras: int) -> jax.Array:
    """``Lora.chosen`` of ``adapter_ids`` [T] i32, slots, -1 for none."""
    return adapter_ids[:, None] == jnp.arange(max_loras, dtype=adapter_ids.dtype)


def qkv_update(lora: Lora, x: jax.Array) -> jax.Array:
    """What the adapters add to q, k and v of ``x`` [T, D]: [T, K, G + 2, H]."""
    q_b, kv_b = lora.layer.q_b, lora.layer.kv_b
    k, group, h = q_b.shape[:3]
    low = _into_rank(lora, lora.layer.qkv_a, x)  # [T, 3, LA * LR]
    q = linear(low[:, 0], q_b.reshape(k * group * h, -1)).reshape(-1, k, group, h)
    kv = _each(low[:, 1:], kv_b.reshape(2, k * h, -1)).reshape(-1, 2, k, h)
    return jnp.concatenate([q, jnp.moveaxis(kv, 1, 2)], axis=2)


def attn_out_update(lora: Lora, x: jax.Array) -> jax.Array:
    """To the output matrix' product with ``x`` [T, N * H]: [T, D], a part of the sum over the tensor axis."""
    return _single(lora, lora.layer.attn_out_a, lora.layer.attn_out_b, x)


def gate_up_update(lora: Lora, x: jax.Array) -> jax.Array:
    """To gate and up of ``x`` [T, D]: [T, 2, F], or [T, 1, F] where the MLP has no gate."""
    b = lora.layer.gate_up_b
    return _each(_into_rank(lora, lora.layer.gate_up_a, x), b.reshape(*b.shape[:2], -1))


def down_update(lora: Lora, x: jax.Array) -> jax.Array:
    """To the down matrix' product with ``x`` [T, F]: [T, D], a part of the sum over the tensor axis."""
    return _single(lora, lora.layer.down_a, lora.layer.down_b, x)


def _into_rank(lora: Lora, a: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` [T, in] times ``a`` [P, LA, LR, in], 0 where the adapter is not the token's own: [T, P, LA * LR]."""
    pieces, slots, rank, width = a.shape
    low = linear(x, a.reshape(pieces * slots * rank, width)).reshape(-1, pieces, slots, rank)
    return jnp.where(lora.chosen[:, None, :, None], low, 0).reshape(-1, pieces, slots * rank)


def _single(lora: Lora, a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    return linear(_into_rank(lora, a[None], x)[:, 0], b.reshape(b.shape[0], -1))


def _each(low: jax.Array, b: jax.Array) -> jax.Array:
    """Each piece of ``low`` [T, P, in] times its own ``b`` [P, out, in]: [T, P, out]."""
    precision = lax.Precision.HIGHEST if low.dtype == jnp.float32 else None
    out = lax.dot_general(
        low, b, (((2,), (2,)), ((1,), (0,))), precision=precision, preferred_element_type=low.dtype
    )  # [P, T, out]
    return jnp.moveaxis(out, 0, 1)


Factors = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """One adapter on the host, in the layout of our parameters (``model.params``) and f32.

    Attributes:
        rank: r, columns of every B.
        layers: for each layer of the model, by parameter (``PIECES``) its A ``[P, r, in]``, where q, k and v (gate and
            up) are pieces, and its B ``[..., r]`` with the parameter's axes but the last, the scale included. A
            parameter that is not there is left as it is.
    """

    rank: int
    layers: tuple[Mapping[str, Factors], ...]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A ``ParamSource`` of the Bs, by the names of their parameters: ``layers.3.qkv``."""
        _, layer, parameter = name.split(".")
        return self.layers[int(layer)][parameter][1][index]


def adapter_digest(adapter: Adapter) -> str:
    """Tells two adapters apart, by all that they add to a model: not by the files that they were read from."""
    digest = hashlib.sha256(f"{adapter.rank}".encode())
    for i, layer in enumerate(adapter.layers):
        for parameter, factors in sorted(layer.items()):
            for factor in factors:
                digest.update(f"\0{i} {parameter} {factor.dtype} {factor.shape}\0".encode())
                digest.update(np.ascontiguousarray(factor))
    return digest.hexdigest()[:16]


def check_adapter(adapter: Adapter, config: ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError where ``adapter`` is none for this model: names the layer and matrix, with both shapes."""
    if not 1 <= adapter.rank <= lora.max_rank:
        raise ValueError(f"the adapter's rank {adapter.rank} is not in 1..max_lora_rank={lora.max_rank}")
    if len(adapter.layers) != config.num_layers:
        raise ValueError(f"the adapter has {len(adapter.layers)} layers, the model {config.num_layers}")
    for i, layer in enumerate(adapter.layers):
        wanted = factor_shapes(config, i, adapter.rank)
        for parameter, factors in layer.items():
            if parameter not in wanted:
                raise ValueError(f"layers.{i}.{parameter} cannot have an adapter, only {', '.join(wanted)}")
            for which, given, shape in zip("AB", factors, wanted[parameter], strict=True):
                if given.shape != shape:
                    raise ValueError(f"layers.{i}.{parameter} has {which} of shape {given.shape}, expected {shape}")
                if not np.isfinite(given).all():
                    raise ValueError(f"layers.{i}.{parameter} has {which} with values that are not finite")


def factor_shapes(config: ModelConfig, layer: int, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A and B of each matrix of ``layer`` that an adapter of ``rank`` may change."""
    specs = layer_adapter_specs(config, layer, LoraConfig(max_loras=1, max_rank=rank))
    shapes = {f.name: getattr(specs, f.name).shape for f in fields(specs) if getattr(specs, f.name) is not None}
    found = {}
    for parameter, pieces in PIECES.items():
        if f"{parameter}_a" not in shapes:
            continue
        a = shapes[f"{parameter}_a"]
        if parameter == "qkv":
            k, group, h = shapes["q_b"][:3]
            b = (k, group + 2, h)
        else:
            b = shapes[f"{parameter}_b"][:-2]
        found[parameter] = ((a[0] if pieces > 1 else 1, rank, a[-1]), (*b, rank))
    return found
