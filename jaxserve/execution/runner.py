"""The device's owner: parameters, state, and one compiled step for each bucket."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.cache.pages import kv_pages_shape
from jaxserve.config import CacheConfig, ModelConfig
from jaxserve.execution.compile_counter import CompileCounter
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
    config: ModelConfig, dims: StepDims, bucket: Bucket, mesh: Mesh, asked: Sampling
) -> jax.stages.Lowered:
    """The sampler of one bucket's logits, lowered; the last tokens donated."""

    def shape(dtype: jnp.dtype | type, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, specs.REPLICATED))

    sampler = jax.jit(make_sampler(mesh, bucket, dims, asked), donate_argnums=(0,))
    return sampler.lower(
        shape(jnp.int32, dims.num_slots),
        shape(jnp.float32, bucket.num_rows, config.vocab_size),
        shape(jnp.int32, buffer_size(bucket, dims)),
    )


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step or a sampler for its mesh."""
    options: dict[str, bool] = {}
    if mesh.devices.flat[0].platform == "gpu":
        # It would hand a kernel a slice of the packed inputs by its address, which is not aligned as the kernel's call
        # demands, instead of copying a few KiB.
        options["xla_gpu_enable_dynamic_slice_fusion"] = False
    return lowered.compile(compiler_options=options)


class Runner:
    """Owns params and state; runs compiled steps. Every bucket is compiled before the constructor returns, and for each
    one sampler for everything in ``samplings``; no step may ask more than the last of them in ``SAMPLINGS``' order.

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
        self._samplers: dict[tuple[Bucket, Sampling], jax.stages.Compiled] = {}
        self._compile(buckets, on_progress)
        self._state = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._state_shape),
            out_shardings=jax.tree.map(lambda s: s.sharding, self._state_shape),
        )()
        self._warm_up(buckets, on_progress)
        self.compile_counter.count = 0

    def _compile(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        done, lock = 0, threading.Lock()

        def compile_one(bucket: Bucket, asked: Sampling | None) -> None:
            nonlocal done
            if asked is None:
                lowered = lower_step(self.config, self._params, self._state_shape, self.dims, bucket, self.mesh)
                self._compiled[bucket] = compile_step(lowered, self.mesh)
            else:
                lowered = lower_sampler(self.config, self.dims, bucket, self.mesh, asked)
                self._samplers[bucket, asked] = compile_step(lowered, self.mesh)
            with lock:
                done += 1
                if on_progress:
                    on_progress("compile", done, len(jobs))

        # XLA compiles without the interpreter's lock: threads overlap one bucket's compile with the next one's tracing.
        jobs: list[tuple[Bucket, Sampling | None]] = [(b, asked) for asked in (None, *self._samplings) for b in buckets]
        pool = ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1))
        try:
            for future in [pool.submit(compile_one, *job) for job in jobs]:
                future.result()
        finally:  # an error or a Ctrl-C does not wait for compilations that nobody wants any more
            pool.shutdown(wait=False, cancel_futures=True)

    def _warm_up(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        """Runs every bucket on padding once: what the runtime does on a first call is not left to the first user."""
        jobs: list[tuple[Bucket, Sampling]] = [(b, asked) for b in buckets for asked in self._samplings]
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
        state, logits = self._compiled[bucket](self._params, self._state, inputs)
        last_tokens, packed = self._samplers[bucket, asked](state.last_tokens, logits, inputs)
        self._state = state.replace(last_tokens=last_tokens)
        return packed

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
        for x in jax.tree.leaves(self._state):
            x.delete()
        del self._params, self._state, self._compiled, self._samplers
