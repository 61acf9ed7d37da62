"""The programs of an engine, lowered for the shapes and placements of its arrays, and how they are compiled."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.cache.pages import kv_pages_of, kv_pages_shape
from jaxserve.config import CacheConfig, ModelConfig
from jaxserve.constraint_io import ConstraintDims, slot_buffer_size
from jaxserve.execution.adapters import StageAdapters
from jaxserve.execution.constraints import Constraints, constraints_shape, constraints_specs, load
from jaxserve.execution.hidden import SCORE_ROWS, head_params, make_pooler, make_scorer
from jaxserve.execution.step import DeviceState, StageParams, load_inputs, make_sampler, make_step, state_specs
from jaxserve.execution.vocabulary import Vocabulary
from jaxserve.model import layers
from jaxserve.parallel import specs
from jaxserve.step_io import Bucket, Sampling, StepDims, buffer_size, outputs_shape
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import gpu as hopper_attention

# Rows of a step that decodes, from which on its rotation and append are one kernel. 8B on an H100: 2 to 3 % less time a
# token at 128 and 256 rows, as much at 32, more at 1: one more call to prepare (engine_gpu.md, section 4).
ROPE_APPEND_ROWS = 128


def state_shape(
    config: ModelConfig, cache: CacheConfig, dims: StepDims, buckets: Iterable[Bucket], mesh: Mesh, dtype: jnp.dtype
) -> DeviceState:
    """``DeviceState`` of sharded ``ShapeDtypeStruct``s, for steps of these buckets."""
    shape = kv_pages_shape(config, cache, mesh.shape["stage"])

    def pages(spec: PartitionSpec) -> Any:
        def make(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        return kv_pages_of(shape, dtype, cache, make)

    spec = state_specs(config, mesh.shape["stage"], dims)
    hidden = None
    if dims.hidden_tokens:
        size = (mesh.shape["stage"], dims.hidden_tokens, config.hidden_size)
        hidden = jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec.hidden))
    return DeviceState(
        kv_pages=tuple(pages(s) for s in spec.kv_pages),
        last_tokens=jax.ShapeDtypeStruct((dims.num_slots,), jnp.int32, sharding=NamedSharding(mesh, spec.last_tokens)),
        inputs=jax.ShapeDtypeStruct(
            (mesh.shape["stage"], max(buffer_size(b, dims) for b in buckets)),
            jnp.int32,
            sharding=NamedSharding(mesh, spec.inputs),
        ),
        hidden=hidden,
    )


def lower_step(
    config: ModelConfig,
    params: StageParams,
    state: DeviceState,
    dims: StepDims,
    bucket: Bucket,
    mesh: Mesh,
    adapters: StageAdapters | None = None,
) -> jax.stages.Lowered:
    """The step of one bucket, lowered for ``params``, ``adapters`` and ``state`` (arrays or shapes), the state donated.

    ``config`` is of ``parallel.placed.placed_config``.
    """
    device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
    hopper = hopper_attention.needs(  # of all layers: one that is not taken, and the model runs the reference
        head_dim=config.head_dim,
        page_size=dims.page_size,
        k_heads=config.num_kv_heads // tensor,
        group=config.num_heads // config.num_kv_heads,
        dtype=params.final_norm.dtype,
        kv_dtype=state.kv_pages[0].dtype,
        windows=config.layer_windows,
        softcap=config.attn_softcap,
        sinks=config.attn_sinks,
        value_dim=config.mla and config.mla.kv_lora_rank,
    )
    step = make_step(
        config,
        mesh,
        bucket,
        dims,
        attention=dispatch.best(device, hopper=hopper),
        grouped_matmul=dispatch.best_grouped_matmul(device),
        rope_append=best_rope_append(device, config, tensor, state.kv_pages[0].dtype, bucket),
        params_specs=jax.tree.map(lambda x: x.sharding.spec, params),
        adapter_specs=jax.tree.map(lambda x: x.sharding.spec, adapters),
    )
    return jax.jit(step, donate_argnums=(1,)).lower(params, state, adapters)


def best_rope_append(
    device: Any, config: ModelConfig, tensor: int, cache_dtype: jnp.dtype, bucket: Bucket
) -> dispatch.Implementation:
    """Of norm, rotation and append in a step of one bucket, on each of ``tensor`` devices. The reference is what XLA
    makes of ``layers.rotated``."""
    if bucket.prefill_tokens or bucket.decode_rows < ROPE_APPEND_ROWS:
        return "reference"
    return dispatch.best(device, hopper=layers.rope_append_needs(config, tensor, cache_dtype))


def lower_load_inputs(state: DeviceState, dims: StepDims, bucket: Bucket) -> jax.stages.Lowered:
    """``step.load_inputs`` of one bucket's steps, lowered, the state's inputs donated."""
    size = (state.inputs.shape[0], buffer_size(bucket, dims))
    buffer = jax.ShapeDtypeStruct(size, jnp.int32, sharding=state.inputs.sharding)
    return jax.jit(load_inputs, donate_argnums=(0,)).lower(state.inputs, buffer)


def lower_sampler(
    config: ModelConfig, state: DeviceState, dims: StepDims, num_rows: int, mesh: Mesh, asked: Sampling
) -> jax.stages.Lowered:
    """The sampler of ``num_rows`` rows' logits, lowered; last tokens, packed outputs and, if it reads them, constraints
    donated."""

    def shape(dtype: jnp.dtype | type, *size: int, spec: PartitionSpec = specs.REPLICATED) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

    sampler = jax.jit(make_sampler(config, mesh, num_rows, dims, asked), donate_argnums=(0, 1, 2))
    constraint_dims = ConstraintDims.of(dims, config.vocab_size)
    vocab = Vocabulary(config.vocab_size, mesh.size)
    return sampler.lower(
        state.last_tokens,
        held_shape(constraint_dims, mesh) if asked == "constrained" else None,
        shape(jnp.int32, *outputs_shape(num_rows, dims)),
        shape(jnp.float32, num_rows, vocab.padded_size, spec=specs.LOGITS),
        state.inputs,
        shape(jnp.int32, num_rows, constraint_dims.num_words) if asked == "constrained" else None,
    )


def held_shape(dims: ConstraintDims, mesh: Mesh) -> Constraints:
    """``Constraints`` of sharded ``ShapeDtypeStruct``s."""

    def sharded(s: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(sharded, constraints_shape(dims, mesh.size), constraints_specs())


def lower_load(dims: ConstraintDims, mesh: Mesh) -> jax.stages.Lowered:
    """``constraints.load``, lowered, the constraints donated."""
    held = held_shape(dims, mesh)
    buffer = jax.ShapeDtypeStruct((slot_buffer_size(dims),), jnp.int32, sharding=held.recent.sharding)
    function = jax.jit(
        partial(load, dims=dims), donate_argnums=(0,), out_shardings=jax.tree.map(lambda s: s.sharding, held)
    )
    return function.lower(held, buffer)


def lower_scorer(
    config: ModelConfig, params: StageParams, state: DeviceState, dims: StepDims, mesh: Mesh
) -> jax.stages.Lowered:
    """``hidden.make_scorer``, lowered for ``params`` and ``state`` (arrays or shapes)."""
    fields = jax.ShapeDtypeStruct((2, SCORE_ROWS), jnp.int32, sharding=NamedSharding(mesh, specs.REPLICATED))
    head = head_params(params)
    scorer = jax.jit(make_scorer(config, mesh, dims.max_logprobs, jax.tree.map(lambda x: x.sharding.spec, head)))
    return scorer.lower(head, state.hidden, fields)


def lower_pooler(
    config: ModelConfig, params: StageParams, state: DeviceState, dims: StepDims, mesh: Mesh
) -> jax.stages.Lowered:
    """``hidden.make_pooler``, lowered for ``params`` and ``state`` (arrays or shapes)."""
    rows = jax.ShapeDtypeStruct((dims.hidden_tokens,), jnp.int32, sharding=NamedSharding(mesh, specs.REPLICATED))
    head = head_params(params)
    pooler = jax.jit(make_pooler(config, mesh, dims.num_slots, jax.tree.map(lambda x: x.sharding.spec, head)))
    return pooler.lower(head, state.hidden, rows)


# XLA's own choices that are wrong for a step. Slices by address: it would hand a kernel a slice of the packed inputs by
# its address, which is not aligned as the kernel's call demands, instead of copying a few KiB.
GPU_OPTIONS: dict[str, bool | str] = {"xla_gpu_enable_dynamic_slice_fusion": False}


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step or a sampler for its mesh."""
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    return lowered.compile(compiler_options=GPU_OPTIONS if is_gpu else {})
