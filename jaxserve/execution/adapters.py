"""Adapters on the mesh: room for ``max_loras`` of them beside the parameters, and how one gets there while serving."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import LoraConfig, ModelConfig
from jaxserve.model.array_spec import ArraySpec, is_spec
from jaxserve.model.lora import Adapter, LayerAdapters, layer_adapter_specs, slot_axis
from jaxserve.model.stage_layers import stage_layers
from jaxserve.parallel import specs
from jaxserve.parallel.placed import ReplicatedHeads, copies_of_kv_heads


@flax.struct.dataclass
class StageAdapters:
    """``LayerAdapters`` as the mesh holds them: layer ``i`` of every stage stacked on a leading ST axis."""

    layers: tuple[LayerAdapters, ...]  # LS entries, leaves [ST, ...]


def stage_adapter_shapes(config: ModelConfig, lora: LoraConfig, num_stages: int) -> StageAdapters:
    """``ArraySpec``s of a ``StageAdapters``; ``config`` is of ``parallel.placed.placed_config``."""
    stages = stage_layers(config, num_stages)
    each = [layer_adapter_specs(config, i, lora) for i in range(config.num_layers)]

    def position(i: int) -> LayerAdapters:
        found: dict[str, ArraySpec] = {}
        for layer in (
            each[own[i]] for own in stages if i < len(own)
        ):  # of different kinds, perhaps: what any of them has
            found |= {f.name: getattr(layer, f.name) for f in fields(layer) if getattr(layer, f.name) is not None}
        return LayerAdapters(
            **{name: s._replace(shape=(num_stages, *s.shape), axes=("stage", *s.axes)) for name, s in found.items()}
        )

    return StageAdapters(tuple(position(i) for i in range(max(map(len, stages)))))


def stage_adapter_specs(shapes: StageAdapters) -> StageAdapters:
    """PartitionSpecs of a ``StageAdapters`` of ``ArraySpec``s."""
    return jax.tree.map(lambda s: specs.param_spec(s.axes), shapes, is_leaf=is_spec)


def adapters_shape(config: ModelConfig, lora: LoraConfig, mesh: Mesh, dtype: jnp.dtype) -> StageAdapters:
    """``StageAdapters`` of sharded ``ShapeDtypeStruct``s."""

    def struct(spec: ArraySpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, specs.param_spec(spec.axes))
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return jax.tree.map(struct, stage_adapter_shapes(config, lora, mesh.shape["stage"]), is_leaf=is_spec)


def one_slot_shape(adapters: StageAdapters) -> StageAdapters:
    """The same with room for one adapter: the shape of ``place_adapter``'s result."""

    def one(name: str, x: Any) -> jax.ShapeDtypeStruct:
        axis = slot_axis(name, x.ndim)
        return jax.ShapeDtypeStruct((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype, sharding=x.sharding)

    return StageAdapters(tuple(_mapped(one, layer) for layer in adapters.layers))


def bytes_a_device(adapters: StageAdapters) -> int:
    """Of arrays or shapes, the part of one device."""
    leaves = jax.tree.leaves(adapters)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def place_adapter(adapter: Adapter, config: ModelConfig, placed: ModelConfig, shapes: StageAdapters) -> StageAdapters:
    """An adapter of ``config``'s model on the mesh, its rank filled up with zeros.

    Args:
        placed: ``parallel.placed.placed_config`` of ``config``.
        shapes: ``one_slot_shape``'s.
    """
    mesh = next(iter(jax.tree.leaves(shapes))).sharding.mesh
    tensor, layers = mesh.shape["tensor"], stage_layers(placed, mesh.shape["stage"])
    heads = ReplicatedHeads(adapter, config, copies_of_kv_heads(config, tensor))

    def place(position: int) -> LayerAdapters:
        stages = [_factors(adapter, heads, own[position], placed) if position < len(own) else {} for own in layers]

        def one(name: str, x: Any) -> jax.Array:
            before = (slice(None),) * (slot_axis(name, x.ndim) - 1)  # axes of a stage's layer before LA
            whole = np.zeros(x.shape, x.dtype)  # of one layer: small beside a matrix of the model
            for stage, factors in enumerate(stages):
                if name in factors:
                    whole[stage][(*before, 0)][(*before, slice(adapter.rank))] = factors[name]
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])

        return _mapped(one, shapes.layers[position])

    return StageAdapters(tuple(place(i) for i in range(len(shapes.layers))))


def write_slot(adapters: StageAdapters, one: StageAdapters, slot: jax.Array) -> StageAdapters:
    """``adapters`` with ``one`` in ``slot`` (i32). Donate the first."""

    def write(old: LayerAdapters, new: LayerAdapters) -> LayerAdapters:
        def field(name: str, x: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(x, getattr(new, name), slot, slot_axis(name, x.ndim))

        return _mapped(field, old)

    return StageAdapters(tuple(map(write, adapters.layers, one.layers)))


def lower_write_slot(adapters: StageAdapters, mesh: Mesh) -> jax.stages.Lowered:
    """``write_slot``, lowered for ``adapters`` (arrays or shapes), which are donated."""
    slot = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    function = jax.jit(write_slot, donate_argnums=(0,), out_shardings=jax.tree.map(lambda x: x.sharding, adapters))
    return function.lower(adapters, one_slot_shape(adapters), slot)


def _factors(adapter: Adapter, heads: ReplicatedHeads, layer: int, placed: ModelConfig) -> dict[str, np.ndarray]:
    """One layer's A and B by the fields of ``LayerAdapters``, without their LA axis: A ``[..., r, in]``, B
    ``[..., r]``."""
    found: dict[str, np.ndarray] = {}
    for parameter, (a, b) in adapter.layers[layer].items():
        if parameter == "qkv":
            k, h = placed.num_kv_heads, placed.head_dim
            group = placed.num_heads // k
            everything = [slice(0, n) for n in (k, group + 2, h, adapter.rank)]
            b = heads.read(f"layers.{layer}.qkv", tuple(everything))  # [K, G + 2, H, r]
            found |= {"qkv_a": a, "q_b": b[:, :group], "kv_b": np.moveaxis(b[:, group:], 1, 0)}
        else:
            single = parameter in ("attn_out", "down")
            found |= {f"{parameter}_a": a[0] if single else a, f"{parameter}_b": b}
    return found


def _mapped(function: Any, layer: LayerAdapters) -> LayerAdapters:
    """``function(name, value)`` of every field that is there."""
    named: Sequence[tuple[str, Any]] = [(f.name, getattr(layer, f.name)) for f in fields(layer)]
    return LayerAdapters(**{name: function(name, x) for name, x in named if x is not None})
