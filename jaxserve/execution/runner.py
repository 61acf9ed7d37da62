"""The device's owner: parameters, state, and one compiled step for each bucket."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.cache.pages import kv_pages_shape
from jaxserve.config import CacheConfig, ModelConfig
from jaxserve.constraint_io import ConstraintDims, new_slot, slot_buffer_size
from jaxserve.execution.compile_counter import CompileCounter
from jaxserve.execution.constraints import Constraints, constraints_shape, load
from jaxserve.execution.step import (
    DeviceState,
    StageParams,
    make_sampler,
    make_step,
    state_specs,
)
from jaxserve.model.params import named_leaves
from jaxserve.parallel import specs
from jaxserve.step_io import (
    SAMPLINGS,
    Bucket,
    Sampling,
    StepDims,
    StepOutputs,
    buffer_size,
    new_inputs,
    num_elements,
    sampling_shapes,
    unpack_outputs,
)
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import gpu as hopper_attention

Progress = Callable[[str, int, int], None]  # stage of the start-up, done, total


def state_shape(config: ModelConfig, cache: CacheConfig, dims: StepDims, mesh: Mesh, dtype: jnp.dtype) -> DeviceState:
    """``DeviceState`` of sharded ``ShapeDtypeStruct``s."""
    shape = kv_pages_shape(config, cache, mesh.shape["stage"])
    spec = state_specs(config, mesh.shape["stage"])
    return DeviceState(
        kv_pages=tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, s)) for s in spec.kv_pages),
        last_tokens=jax.ShapeDtypeStruct((dims.num_slots,), jnp.int32, sharding=NamedSharding(mesh, spec.last_tokens)),
    )


def lower_step(
    config: ModelConfig, params: StageParams, state: DeviceState, dims: StepDims, bucket: Bucket, mesh: Mesh
) -> jax.stages.Lowered:
    """The step of one bucket, lowered for ``params`` and ``state`` (arrays or shapes), the state donated.

    ``config`` is of ``parallel.placed.placed_config``.
    """
    replicated = NamedSharding(mesh, specs.REPLICATED)
    buffer = jax.ShapeDtypeStruct((buffer_size(bucket, dims),), jnp.int32, sharding=replicated)
    device = mesh.devices.flat[0]
    hopper = hopper_attention.needs(  # of all layers: one that is not taken, and the model runs the reference
        head_dim=config.head_dim,
        page_size=dims.page_size,
        group=config.num_heads // config.num_kv_heads,
        dtype=state.kv_pages[0].dtype,
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
    )
    return jax.jit(step, donate_argnums=(1,)).lower(params, state, buffer)


def lower_sampler(
    config: ModelConfig, dims: StepDims, num_rows: int, mesh: Mesh, asked: Sampling
) -> jax.stages.Lowered:
    """The sampler of ``num_rows`` rows' logits, lowered; last tokens and, if it reads them, constraints donated."""

    def shape(dtype: jnp.dtype | type, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, specs.REPLICATED))

    sampler = jax.jit(make_sampler(mesh, num_rows, dims, asked), donate_argnums=(0, 1))
    return sampler.lower(
        shape(jnp.int32, dims.num_slots),
        held_shape(ConstraintDims.of(dims, config.vocab_size), mesh) if asked == "constrained" else None,
        shape(jnp.float32, num_rows, config.vocab_size),
        shape(jnp.int32, num_elements(sampling_shapes(num_rows, dims))),
    )


def held_shape(dims: ConstraintDims, mesh: Mesh) -> Constraints:
    """``Constraints`` of sharded ``ShapeDtypeStruct``s."""
    sharding = NamedSharding(mesh, specs.REPLICATED)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), constraints_shape(dims))


def lower_load(dims: ConstraintDims, mesh: Mesh) -> jax.stages.Lowered:
    """``constraints.load``, lowered, the constraints donated."""
    held = held_shape(dims, mesh)
    buffer = jax.ShapeDtypeStruct((slot_buffer_size(dims),), jnp.int32, sharding=held.seen.sharding)
    function = jax.jit(
        partial(load, dims=dims), donate_argnums=(0,), out_shardings=jax.tree.map(lambda s: s.sharding, held)
    )
    return function.lower(held, buffer)


# XLA's own choices that are wrong for a step. Slices by address: it would hand a kernel a slice of the packed inputs by
# its address, which is not aligned as the kernel's call demands, instead of copying a few KiB.
GPU_OPTIONS: dict[str, bool | str] = {"xla_gpu_enable_dynamic_slice_fusion": False}


# A graph begins once all of its kernels are in it: after 2 ms, for a model of 32 layers. A step that reads prompts
# takes longer than to launch its kernels one after another: without a graph the device works from the first on.
NO_GRAPH: dict[str, bool | str] = {"xla_gpu_enable_command_buffer": ""}


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh, *, in_graph: bool = True) -> jax.stages.Compiled:
    """Compiles a step or a sampler for its mesh; on GPUs as one graph of kernels, or as launches of each."""
    if mesh.devices.flat[0].platform != "gpu":
        return lowered.compile()
    return lowered.compile(compiler_options=GPU_OPTIONS if in_graph else GPU_OPTIONS | NO_GRAPH)


class Runner:
    """Owns params and state; runs compiled steps. Every bucket is compiled before the constructor returns, and for each
    number of rows that they have a sampler for everything in ``samplings``; no step may ask more than the last of them
    in ``SAMPLINGS``' order.

    One thread at a time may use it. ``dispatch`` returns before the device is done; ``read`` waits.

    Attributes:
        compile_counter: at zero when the constructor returns; its owner watches the steps with it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: StageParams,
        cache: CacheConfig,
        dims: StepDims,
        buckets: Sequence[Bucket],
        mesh: Mesh,
        dtype: jnp.dtype,
        samplings: Sequence[Sampling] = ("any",),
        on_progress: Progress | None = None,
    ):
        self.compile_counter = CompileCounter()
        self.config, self.dims, self.mesh = config, dims, mesh
        self._replicated = NamedSharding(mesh, specs.REPLICATED)
        self._params = params
        self._state_shape = state_shape(config, cache, dims, mesh, dtype)
        self._samplings = tuple(samplings)
        self._compiled: dict[Bucket, jax.stages.Compiled] = {}
        self._samplers: dict[tuple[int, Sampling], jax.stages.Compiled] = {}  # by rows
        self._constraint_dims = ConstraintDims.of(dims, config.vocab_size)
        self._compile(buckets, on_progress)
        self._state = _zeros(self._state_shape)
        self._held: Constraints | None = None
        if "constrained" in self._samplings:
            self._held = _zeros(held_shape(self._constraint_dims, mesh))
            self._load = compile_step(lower_load(self._constraint_dims, mesh), mesh)
            self.load_constraints(new_slot(self._constraint_dims)[0])
        self._warm_up(buckets, on_progress)
        self.compile_counter.count = 0

    def _compile(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        done, lock = 0, threading.Lock()

        def compile_one(bucket: Bucket, lowered: jax.stages.Lowered) -> None:
            self._compiled[bucket] = compile_step(lowered, self.mesh, in_graph=not bucket.prefill_tokens)
            count()

        def compile_sampler(num_rows: int, asked: Sampling, lowered: jax.stages.Lowered) -> None:
            self._samplers[num_rows, asked] = compile_step(lowered, self.mesh)
            count()

        def count() -> None:
            nonlocal done
            with lock:
                done += 1
                if on_progress:
                    on_progress("compile", done, len(buckets) + len(samplers))

        # XLA compiles without the interpreter's lock, in threads. Lowering is Python: here, one after another, so that
        # each finds what the ones before have traced and the first compilations begin early.
        rows = sorted({b.num_rows for b in buckets})
        samplers: list[tuple[int, Sampling]] = [(num_rows, asked) for asked in self._samplings for num_rows in rows]
        pool = ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1))
        try:
            futures = []
            for bucket in sorted(buckets, key=lambda b: -b.num_tokens):  # what takes longest first
                lowered = lower_step(self.config, self._params, self._state_shape, self.dims, bucket, self.mesh)
                futures.append(pool.submit(compile_one, bucket, lowered))
            for num_rows, asked in samplers:
                lowered = lower_sampler(self.config, self.dims, num_rows, self.mesh, asked)
                futures.append(pool.submit(compile_sampler, num_rows, asked, lowered))
            for future in futures:
                future.result()
        finally:  # an error or a Ctrl-C does not wait for compilations that nobody wants any more
            pool.shutdown(wait=False, cancel_futures=True)

    def _warm_up(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        """Runs every bucket on padding: what the runtime does on the first calls is not left to the first users. On
        GPUs that is the first two: XLA makes the graph of a step, in 20 ms, when it runs for the second time."""
        jobs: list[tuple[Bucket, Sampling]] = [(b, asked) for b in buckets for asked in self._samplings] * 2
        for i, (bucket, asked) in enumerate(jobs):
            self.read(self.dispatch(bucket, new_inputs(bucket, self.dims)[0], asked))
            if on_progress:
                on_progress("warm-up", i + 1, len(jobs))

    def dispatch(self, bucket: Bucket, buffer: np.ndarray, asked: Sampling) -> jax.Array:
        """Starts a step on ``buffer`` (``step_io.new_inputs``), whose rows ask no more than ``asked`` of sampling.

        Returns a handle for ``read``.
        """
        while asked not in self._samplings:
            asked = SAMPLINGS[SAMPLINGS.index(asked) + 1]
        inputs = jax.device_put(buffer, self._replicated)
        state, logits, fields = self._compiled[bucket](self._params, self._state, inputs)
        held = self._held if asked == "constrained" else None
        last_tokens, held, packed = self._samplers[bucket.num_rows, asked](state.last_tokens, held, logits, fields)
        self._state = state.replace(last_tokens=last_tokens)
        if held is not None:
            self._held = held
        return packed

    def load_constraints(self, buffer: np.ndarray) -> None:
        """A slot's constraints (``constraint_io.pack_slot``), for the steps dispatched from now on."""
        self._held = self._load(self._held, jax.device_put(buffer, self._replicated))

    def read(self, handle: jax.Array) -> StepOutputs:
        """Waits for a dispatched step and copies its outputs to the host."""
        return unpack_outputs(np.asarray(handle), self.dims.max_logprobs)

    def update_params(self, params: StageParams) -> None:
        """Other weights from the next dispatch on; steps dispatched before keep theirs. Nothing is compiled.

        ``params`` are placed as those of the constructor were.
        """
        old, new = dict(named_leaves(self._params)), dict(named_leaves(params))
        for name in (*old, *new):
            facts = [None if x is None else (x.shape, x.dtype.name, x.sharding) for x in (new.get(name), old.get(name))]
            if facts[0] != facts[1]:
                raise ValueError(f"params.{name} is {facts[0]}, the compiled steps take {facts[1]}")
        self._params = params

    def close(self) -> None:
        """Frees the device's memory; the runner cannot be used afterwards."""
        self.compile_counter.close()
        for x in jax.tree.leaves((self._state, self._held)):
            x.delete()
        del self._params, self._state, self._held, self._compiled, self._samplers


def _zeros[T](shapes: T) -> T:
    """Arrays of zeros where a tree has ``ShapeDtypeStruct``s."""
    return jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        out_shardings=jax.tree.map(lambda s: s.sharding, shapes),
    )()
