"""The step: one pure function from (params, state, inputs) to (state, logits), under one ``shard_map``.

A second one goes from logits to tokens, so that what the rows ask of sampling is no part of the large program.

On a mesh with stages one call is a tick (``scheduler.stages``): every stage has a step of its own, and the logits are
those of the step in the last one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.cache.pages import KVPages
from jaxserve.config import ModelConfig
from jaxserve.execution import constraints, sampling
from jaxserve.execution.adapters import StageAdapters
from jaxserve.execution.constraints import Constraints
from jaxserve.execution.vocabulary import Vocabulary
from jaxserve.model import decoder, layers
from jaxserve.model.array_spec import ArraySpec, is_spec
from jaxserve.model.layers import AttentionContext, StaticContext
from jaxserve.model.lora import Lora, chosen_adapters
from jaxserve.model.params import LayerParams, Params, param_specs
from jaxserve.model.quantized import QuantizedMatrix, check_split
from jaxserve.model.rope import rope_tables
from jaxserve.model.stage_layers import layers_per_stage, stage_layers
from jaxserve.parallel import specs
from jaxserve.step_io import (
    FLOAT_FIELDS,
    Bucket,
    Sampling,
    StepDims,
    StepInputs,
    input_shapes,
    sampling_shapes,
)
from pallas_kernels.dispatch import Implementation


@flax.struct.dataclass
class DeviceState:
    """What lives on the device between steps; donated by every step."""

    kv_pages: KVPages  # LS entries [ST, NP, K, 2, PS, H], or of a quantized cache ``QuantizedPages``
    last_tokens: Any  # [R] i32, last sampled token of each slot
    inputs: Any  # [ST, NI] i32, of each stage's step: as many as the largest has, the others use the first of them
    hidden: Any = None  # [ST, TH, D], what each stage's layers made of its last step's tokens; None: it is not kept


@flax.struct.dataclass
class StageParams:
    """``Params`` as the mesh holds them: layer ``i`` of every stage stacked on a leading ST axis, V padded.

    Where layers that stand at the same place in their stages are of different kinds, or a stage has none there, the
    entry has what any of them has, zeros for the others.
    """

    embed: Any  # [V, D], as the head shared out over all devices
    layers: tuple[LayerParams, ...]  # LS entries, leaves [ST, ...]
    final_norm: Any  # [D]
    head: Any  # [V, D]; None where tied
    positions: Any  # [max_position_embeddings, D]; None unless learned
    final_norm_bias: Any  # [D]; None for RMS


def stage_param_shapes(config: ModelConfig, num_stages: int, tensor: int) -> StageParams:
    """``ArraySpec``s of a ``StageParams``: global shapes, V padded to a multiple of the devices.

    Raises:
        ValueError: the mesh would cut a group of a quantized matrix, or two stages have one in different formats at
            the same place; names the parameter.
    """
    tree: Params = param_specs(config)
    stages, num_devices = stage_layers(config, num_stages), num_stages * tensor

    def padded(table: Any) -> Any:
        def pad(spec: ArraySpec) -> ArraySpec:
            if spec.axes[0] != "vocab":
                return spec
            return spec._replace(shape=(-(-spec.shape[0] // num_devices) * num_devices, *spec.shape[1:]))

        return jax.tree.map(pad, table, is_leaf=is_spec)

    def staged(spec: ArraySpec) -> ArraySpec:
        return spec._replace(shape=(num_stages, *spec.shape), axes=("stage", *spec.axes))

    def position(i: int) -> LayerParams:
        found: dict[str, Any] = {}
        found_in: dict[str, int] = {}
        for number in (own[i] for own in stages if i < len(own)):
            layer = tree.layers[number]
            for name in (f.name for f in dataclasses.fields(layer) if getattr(layer, f.name) is not None):
                value = getattr(layer, name)
                if isinstance(value, QuantizedMatrix):
                    check_split(f"layers.{number}.{name}", value, tensor)
                first, first_number = found.setdefault(name, value), found_in.setdefault(name, number)
                formats = [getattr(x, "format", None) for x in (first, value)]
                if formats[0] != formats[1]:
                    raise ValueError(
                        f"stage={num_stages} puts params.layers.{number}.{name} where another stage has layer "
                        f"{first_number}'s, which is quantized otherwise: {formats[1]} and {formats[0]}"
                    )
        return LayerParams(**jax.tree.map(staged, found, is_leaf=is_spec))

    return StageParams(
        embed=padded(tree.embed),
        layers=tuple(position(i) for i in range(max(map(len, stages)))),
        final_norm=tree.final_norm,
        head=padded(tree.head),
        positions=tree.positions,
        final_norm_bias=tree.final_norm_bias,
    )


def stage_param_specs(config: ModelConfig, num_stages: int) -> StageParams:
    """PartitionSpecs of a ``StageParams``."""
    shapes = stage_param_shapes(config, num_stages, tensor=1)
    return jax.tree.map(lambda s: specs.param_spec(s.axes), shapes, is_leaf=is_spec)


def state_specs(config: ModelConfig, num_stages: int, dims: StepDims) -> DeviceState:
    """PartitionSpecs of a ``DeviceState``."""
    kv_pages = (specs.kv_pages_spec(config),) * layers_per_stage(config, num_stages)
    hidden = specs.HIDDEN if dims.hidden_tokens else None
    return DeviceState(kv_pages=kv_pages, last_tokens=specs.REPLICATED, inputs=specs.REPLICATED, hidden=hidden)


def load_inputs(inputs: jax.Array, buffer: jax.Array) -> jax.Array:
    """``DeviceState.inputs`` with a tick's own in front: of each stage's step ``step_io.new_inputs``' int32 buffer.

    A program of its own for the address: a step that found its inputs where they happened to be copied would have its
    CUDA graph updated each time, which takes the host longer than launching it.
    """
    return lax.dynamic_update_slice(inputs, buffer, (0, 0))


def unpack(buffer: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> StepInputs:
    """``StepInputs`` of device arrays from the front of ``buffer``; fields that ``shapes`` leaves out are None."""
    fields, start = dict.fromkeys(StepInputs._fields), 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        x = lax.slice_in_dim(buffer, start, start + size).reshape(shape)
        fields[name] = lax.bitcast_convert_type(x, jnp.float32) if name in FLOAT_FIELDS else x
        start += size
    return StepInputs(**fields)


def make_step(
    config: ModelConfig,
    mesh: Mesh,
    bucket: Bucket,
    dims: StepDims,
    *,
    attention: Implementation,
    grouped_matmul: Implementation,
    rope_append: Implementation,
    params_specs: StageParams | None = None,
    adapter_specs: StageAdapters | None = None,
) -> Callable[..., tuple[DeviceState, jax.Array]]:
    """``step(params, state, adapters) -> (state, logits [B, V] f32)`` for one bucket, of the inputs that ``state``
    holds; the logits are those of the last stage's step, shared over the vocabulary, whose padding is -inf.

    ``config`` is of ``parallel.placed.placed_config``, ``params_specs`` the PartitionSpecs of the parameters as they
    were placed; None: those of ``stage_param_specs``. ``adapters`` are a ``StageAdapters`` of ``adapter_specs``, or
    both are None: no token of the steps has one.

    Raises:
        ValueError: the state of several stages has no room for the step's activations.
    """
    num_stages = mesh.shape["stage"]
    if num_stages > 1 and dims.hidden_tokens < bucket.num_tokens:
        raise ValueError(
            f"hidden_tokens={dims.hidden_tokens} is less than the {bucket.num_tokens} tokens of a step that "
            f"stage={num_stages} carries on from tick to tick"
        )
    static = StaticContext(config, bucket.decode_rows, attention, grouped_matmul, rope_append)

    def step(params: StageParams, state: DeviceState, adapters: StageAdapters | None) -> tuple[DeviceState, jax.Array]:
        own = state.inputs.reshape(-1) if num_stages == 1 else state.inputs[lax.axis_index("stage")]
        inputs = unpack(own, input_shapes(bucket, dims))
        # Every stage has a part of the vocabulary: it looks up the first one's tokens, and gives logits of the last's.
        entering = inputs if num_stages == 1 else unpack(state.inputs[0], input_shapes(bucket, dims))
        stage = jax.tree.map(lambda x: x[0], params.layers)
        kv_pages = jax.tree.map(lambda x: x[0], state.kv_pages)
        bd = bucket.decode_rows
        on_device = state.last_tokens.at[entering.slot_ids[:bd]].get(mode="fill", fill_value=0)  # [BD]
        given, rest = jnp.split(entering.token_ids, [bd])  # places that nobody decodes in may have a prompt's tokens
        # Concatenated, not `.at[:bd].set`: that hoists an empty constant, on which XLA's Shardy pass crashes (0.11.2).
        token_ids = jnp.concatenate([jnp.where(given < 0, on_device, given), rest])  # [T]

        ctx = AttentionContext(
            tuple(rope_tables(inputs.positions, rope, config.rope_dim) for rope in config.ropes),
            inputs.kv_write_index,
            inputs.page_table,
            inputs.kv_lens,
            inputs.prefill_cu_q_lens,
        )
        loras: tuple[Lora | None, ...] = (None,) * len(stage)
        if adapters is not None:
            chosen = chosen_adapters(inputs.adapter_ids, dims.max_loras)
            loras = tuple(Lora(layer, chosen) for layer in jax.tree.map(lambda x: x[0], adapters.layers))
        x = decoder.embed(params.embed, token_ids, params.final_norm.dtype)  # [T, D]
        if config.embed_scale != 1:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        if params.positions is not None:
            x = x + params.positions[inputs.positions]
        hidden = state.hidden
        if hidden is not None:
            x = decoder.from_stage_before(x, hidden[0])
        x, kv_pages = decoder.stage_layers(stage, kv_pages, x, ctx, loras, static)
        if hidden is not None:
            hidden = lax.dynamic_update_slice(hidden, x[None].astype(hidden.dtype), (0, 0, 0))
        x = decoder.from_last_stage(x[inputs.sample_index])  # [B, D]
        x = layers.norm(x, params.final_norm, params.final_norm_bias, config)
        head = params.embed if params.head is None else params.head
        logits = decoder.logits(head, x, config)  # [B, VL] f32

        kv_pages = jax.tree.map(lambda x: x[None], kv_pages)
        state = dataclasses.replace(state, kv_pages=kv_pages, hidden=hidden)
        return state, logits

    state = state_specs(config, num_stages, dims)
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(params_specs or stage_param_specs(config, num_stages), state, adapter_specs),
        out_specs=(state, specs.LOGITS),
        check_vma=False,
    )


def pack_outputs(tokens: jax.Array, chosen: jax.Array, top_ids: jax.Array, top: jax.Array) -> jax.Array:
    """[B, 2 + 2 * KL] i32 for ``step_io.unpack_outputs``, of [B] i32, [B] f32, [B, KL] i32 and [B, KL] f32."""

    def bits(v: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(v, jnp.int32)

    return jnp.concatenate([tokens[:, None], bits(chosen)[:, None], top_ids, bits(top)], axis=1)


def make_sampler(
    config: ModelConfig, mesh: Mesh, num_rows: int, dims: StepDims, asked: Sampling
) -> Callable[..., tuple[jax.Array, Constraints | None, jax.Array]]:
    """``sampler(last_tokens [R], held, packed [B, 2 + 2 * KL] i32, logits [B, V], inputs [ST, NI], allowed [B, W]) ->
    (last_tokens, held, packed)``, the inputs those of the tick that made the logits.

    Where ``asked`` is "constrained", ``held`` are the slots' constraints and ``allowed`` has a bit for each token that
    the row may sample as far as its structured output goes; else both are None. ``packed`` is for
    ``step_io.unpack_outputs``; the one that is given is only memory to be written over. Logits
    and what ``held`` has of each token are shared over the vocabulary: the devices exchange a few numbers a row.
    """
    vocab = Vocabulary(config.vocab_size, mesh.size)

    def sampler(
        last_tokens: jax.Array,
        held: Constraints | None,
        packed: jax.Array,
        logits: jax.Array,
        buffer: jax.Array,
        allowed: jax.Array | None,
    ) -> tuple[jax.Array, Constraints | None, jax.Array]:
        inputs = unpack(buffer.reshape(-1) if len(buffer) == 1 else buffer[-1], sampling_shapes(num_rows, dims))
        changed = logits if held is None else constraints.constrain(logits, held, inputs, vocab)
        changed = changed if allowed is None else constraints.allow(changed, allowed, vocab)
        tokens = sampling.sample(changed, inputs, asked, vocab)  # [B]
        if held is not None:
            held = constraints.record(held, tokens, inputs, vocab)
        chosen, top_ids, top = sampling.top_logprobs(
            logits, tokens, inputs.num_logprobs, dims.max_logprobs, asked, vocab
        )
        slots = jnp.where(inputs.does_sample == 1, inputs.slot_ids, dims.num_slots)  # [B]
        last_tokens = last_tokens.at[slots].set(tokens, mode="drop")
        # All of it is written over, which XLA sees. (As an argument that nothing reads it would need ``keep_unused``,
        # with which JAX 0.11 never frees the program.)
        packed = lax.dynamic_update_slice(packed, pack_outputs(tokens, chosen, top_ids, top), (0, 0))
        return last_tokens, held, packed

    held_specs = constraints.constraints_specs() if asked == "constrained" else None
    return jax.shard_map(
        sampler,
        mesh=mesh,
        in_specs=(P(), held_specs, P(), specs.LOGITS, P(), P()),
        out_specs=(P(), held_specs, P()),
        check_vma=False,
    )
