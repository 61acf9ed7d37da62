"""The device's owner: parameters, state, and one compiled step for each bucket."""

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
from jaxserve.execution.step import DeviceState, StageParams, make_step, stage_param_specs, state_specs
from jaxserve.model.params import Params, check_params
from jaxserve.parallel import specs
from jaxserve.step_io import Bucket, StepDims, StepOutputs, buffer_size, new_inputs, unpack_outputs
from pallas_kernels import dispatch
from pallas_kernels.paged_attention.gpu import supports as supports_hopper

Progress = Callable[[str, int, int], None]  # stage of the start-up, done, total


def place_params(params: Params, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> StageParams:
    """Canonical ``params`` (numpy or jax arrays) onto the mesh in ``dtype``; V is padded to divide over tensor.

    Raises ValueError naming a tensor that is missing, extra or of the wrong shape.
    """
    check_params(params, config)
    num_stages, tensor = mesh.shape["stage"], mesh.shape["tensor"]
    per_stage = config.num_layers // num_stages

    def pad_vocab(x):
        extra = -x.shape[0] % tensor
        return jnp.pad(x, ((0, extra), (0, 0))) if extra else x

    def stack(*leaves):
        if num_stages == 1:
            return leaves[0][None]
        return np.stack([np.asarray(x) for x in leaves])

    def put(x, spec):
        return jax.device_put(x.astype(dtype) if x.dtype != dtype else x, NamedSharding(mesh, spec))

    spec = stage_param_specs(config, num_stages)
    layers = tuple(
        jax.tree.map(lambda s, *x: put(stack(*x), s), spec.layers[i], *params.layers[i::per_stage])
        for i in range(per_stage)
    )
    return StageParams(
        embed=put(pad_vocab(params.embed), spec.embed),
        layers=layers,
        final_norm=put(params.final_norm, spec.final_norm),
        head=None if params.head is None else put(pad_vocab(params.head), spec.head),
    )


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
    """The step of one bucket, lowered for ``params`` and ``state`` (arrays or shapes), the state donated."""
    replicated = NamedSharding(mesh, specs.REPLICATED)
    buffer = jax.ShapeDtypeStruct((buffer_size(bucket, dims),), jnp.int32, sharding=replicated)
    hopper = supports_hopper(
        head_dim=config.head_dim,
        page_size=dims.page_size,
        group=config.num_heads // config.num_kv_heads,
        dtype=state.kv_pages[0].dtype,
    )
    step = make_step(config, mesh, bucket, dims, dispatch.best(mesh.devices.flat[0], hopper=hopper))
    return jax.jit(step, donate_argnums=(1,)).lower(params, state, buffer)


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step of ``lower_step`` for its mesh."""
    options: dict[str, bool] = {}
    if mesh.devices.flat[0].platform == "gpu":
        # It would hand a kernel a slice of the packed inputs by its address, which is not aligned as the kernel's call
        # demands, instead of copying a few KiB.
        options["xla_gpu_enable_dynamic_slice_fusion"] = False
    return lowered.compile(compiler_options=options)


class Runner:
    """Owns params and state; runs compiled steps. Every bucket is compiled before the constructor returns.

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
        on_progress: Progress | None = None,
    ):
        self.compile_counter = CompileCounter()
        self.config, self.dims, self.mesh = config, dims, mesh
        self._replicated = NamedSharding(mesh, specs.REPLICATED)
        self._params = params
        self._state_shape = state_shape(config, cache, dims, mesh, dtype)
        self._compiled = self._compile(buckets, on_progress)
        self._state = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._state_shape),
            out_shardings=jax.tree.map(lambda s: s.sharding, self._state_shape),
        )()
        self._warm_up(buckets, on_progress)
        self.compile_counter.count = 0

    def _compile(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> dict[Bucket, jax.stages.Compiled]:
        compiled, done, lock = {}, 0, threading.Lock()

        def compile_one(bucket: Bucket) -> None:
            nonlocal done
            lowered = lower_step(self.config, self._params, self._state_shape, self.dims, bucket, self.mesh)
            result = compile_step(lowered, self.mesh)
            with lock:
                compiled[bucket] = result
                done += 1
                if on_progress:
                    on_progress("compile", done, len(buckets))

        # XLA compiles without the interpreter's lock: threads overlap one bucket's compile with the next one's tracing.
        pool = ThreadPoolExecutor(max_workers=4)
        try:
            for future in [pool.submit(compile_one, b) for b in buckets]:
                future.result()
        finally:  # an error or a Ctrl-C does not wait for compilations that nobody wants any more
            pool.shutdown(wait=False, cancel_futures=True)
        return compiled

    def _warm_up(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        """Runs every bucket on padding once: what the runtime does on a first call is not left to the first user."""
        for i, bucket in enumerate(buckets):
            self.read(self.dispatch(bucket, new_inputs(bucket, self.dims)[0]))
            if on_progress:
                on_progress("warm-up", i + 1, len(buckets))

    def dispatch(self, bucket: Bucket, buffer: np.ndarray) -> jax.Array:
        """Starts a step on ``buffer`` (``step_io.new_inputs``); a handle for ``read``."""
        inputs = jax.device_put(buffer, self._replicated)
        self._state, packed = self._compiled[bucket](self._params, self._state, inputs)
        return packed

    def read(self, handle: jax.Array) -> StepOutputs:
        """Waits for a dispatched step and copies its outputs to the host."""
        return unpack_outputs(np.asarray(handle), self.dims.max_logprobs)

    def close(self) -> None:
        """Frees the device's memory; the runner cannot be used afterwards."""
        self.compile_counter.close()
        for x in jax.tree.leaves(self._state):
            x.delete()
        del self._params, self._state, self._compiled
