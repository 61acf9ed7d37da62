"""From what a user asks of an engine to its frozen configs: defaults by platform, and pages by memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.cache.pages import page_bytes
from jaxserve.config import (
    PER_LAYER,
    CacheConfig,
    CacheDtype,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from jaxserve.execution.adapters import adapters_shape, bytes_a_device, one_slot_shape
from jaxserve.execution.hidden import score_workspace_bytes
from jaxserve.execution.kept import KeptPrograms
from jaxserve.execution.lowering import compile_step, lower_sampler, lower_step, state_shape
from jaxserve.execution.sampling import LOOKS_AT_ALL
from jaxserve.execution.step import StageParams
from jaxserve.model.params import layer_specs
from jaxserve.parallel.memory import DEFAULT_FRACTION, free_bytes
from jaxserve.parallel.mesh import check_mesh, make_meshes, parallel_config, parse_mesh, split_mesh
from jaxserve.scheduler.batch import all_buckets
from jaxserve.step_io import SAMPLINGS, Sampling, StepDims
from pallas_kernels import dispatch

CACHE_DTYPES = get_args(CacheDtype)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# A compiled step costs seconds on a CPU, and padding costs little there beside reading the weights.
CPU = {
    "max_num_seqs": 8,
    "first_decode_size": 1,
    "growth": 8,
    "prefill_sizes": (64, 256),
    "max_prefill_rows": 4,
    "memory_fraction": 0.1,
    "samplings": ("constrained",),
}
ACCELERATOR = {
    "max_num_seqs": 512,  # 8B on an H100: 10 % more tokens than 256, where requests are many (engine_gpu.md, section 3)
    "first_decode_size": 2,  # two rows take less time than one: XLA makes one kernel of their norms, and two of one's
    "growth": 2,
    "prefill_sizes": (128, 256, 512, 1024, 2048, 4096, 8192),
    "max_prefill_rows": 64,
    "memory_fraction": DEFAULT_FRACTION,
    "samplings": SAMPLINGS,
}
# Of many pages, so that a little more or less free memory does not change the shape of the cache, and with it every
# program that is kept for the next start.
_PAGES_AT_ONCE = 64
_POOL = "pool of pages"  # what is kept of it
DEFAULT_MAX_MODEL_LEN = 8192  # or the model's own limit, where that is less


def resolve_meshes(mesh: Mesh | ParallelConfig | str | None, config: ModelConfig) -> tuple[Mesh, ...]:
    """The replicas' meshes from any of the forms users have; None is one device. Checked against the model."""
    if isinstance(mesh, Mesh):
        meshes = split_mesh(mesh)
        check_mesh(config, parallel_config(meshes[0], len(meshes)))
        return meshes
    parallel = parse_mesh(mesh) if isinstance(mesh, str) else mesh or ParallelConfig()
    check_mesh(config, parallel)
    return make_meshes(parallel)


def check_spans_processes(meshes: Sequence[Mesh]) -> None:
    """Raises ValueError where an engine of several processes cannot use the meshes."""
    parallel = parallel_config(meshes[0], len(meshes))
    if parallel.replica > 1 and jax.process_count() > 1:
        raise ValueError(
            f"mesh {parallel}: replica={parallel.replica} must be 1 with {jax.process_count()} processes: replicas "
            f"share one"
        )
    if parallel.num_devices != jax.device_count():
        raise ValueError(
            f"mesh {parallel} has {parallel.num_devices} devices, the {jax.process_count()} processes have "
            f"{jax.device_count()}: it must take all of them"
        )


def defaults(mesh: Mesh) -> dict:
    """The table of defaults for the mesh's platform."""
    return CPU if _is_cpu(mesh) else ACCELERATOR


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def resolve_dtype(dtype: str, mesh: Mesh) -> jnp.dtype:
    """``"auto"`` is float32 on CPUs, bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[dtype])


def check_cache_dtype(cache_dtype: str, mesh: Mesh) -> None:
    """Raises ValueError where ``kv_cache_dtype`` is none, or one that the mesh's devices have no checked kernel for."""
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype={cache_dtype!r:.40} is not one of {', '.join(CACHE_DTYPES)}")
    device = mesh.devices.flat[0]
    if cache_dtype == "auto" or device.platform != "gpu":
        return
    if not dispatch.is_hopper(device) or f"kv {cache_dtype}" not in dispatch.MOSAIC_GPU_CHECKED:
        raise ValueError(
            f"kv_cache_dtype={cache_dtype!r}: paged attention has no kernel for it that has been right on this GPU; "
            "only 'auto' there"
        )


def default_decode_sizes(max_num_seqs: int, first: int, growth: int) -> tuple[int, ...]:
    """first, first * growth, ... up to and including ``max_num_seqs``."""
    sizes, size = [], first
    while size < max_num_seqs:
        sizes.append(size)
        size *= growth
    return (*sizes, max_num_seqs)


def scheduler_config(
    config: ModelConfig,
    mesh: Mesh,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    prefill_sizes: Sequence[int] | None,
    decode_sizes: Sequence[int] | None = None,
    **options,
) -> SchedulerConfig:
    """Limits with the platform's defaults for what is None; ``options`` are the other ``SchedulerConfig`` fields."""
    platform = defaults(mesh)
    if max_model_len is None:
        max_model_len = min(config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} is more than the model's max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    seqs = platform["max_num_seqs"] if max_num_seqs is None else max_num_seqs
    if seqs < 1:
        raise ValueError(f"max_num_seqs={seqs} must be at least 1")
    options.setdefault("max_prefill_rows", platform["max_prefill_rows"])
    sizes: Sequence[int] = platform["prefill_sizes"] if prefill_sizes is None else prefill_sizes
    if (
        prefill_sizes is None and sizes[-1] <= seqs
    ):  # beside the tokens of all that decode a step has room for a prompt's
        sizes = (*sizes, 2 * seqs)
    return SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        prefill_sizes=tuple(sizes),
        decode_sizes=default_decode_sizes(seqs, platform["first_decode_size"], platform["growth"])
        if decode_sizes is None
        else tuple(decode_sizes),
        num_stages=mesh.shape["stage"],
        **options,
    )


def lora_config(max_loras: int | None, max_rank: int, num_given: int) -> LoraConfig | None:
    """The room for adapters, of which ``num_given`` are there from the start; None: none."""
    max_loras = num_given if max_loras is None else max_loras
    if max_loras < 0:
        raise ValueError(f"max_loras={max_loras} must be at least 0")
    if num_given > max_loras:
        raise ValueError(f"lora_modules has {num_given} adapters, max_loras={max_loras}")
    return LoraConfig(max_loras=max_loras, max_rank=max_rank) if max_loras else None


def num_pages_that_fit(
    config: ModelConfig,
    scheduler: SchedulerConfig,
    params: StageParams,
    meshes: Sequence[Mesh],
    dtype: jnp.dtype,
    page_size: int,
    memory_fraction: float | None,
    samplings: Sequence[Sampling],
    lora: LoraConfig | None = None,
    cache_dtype: CacheDtype = "auto",
    keep_in: Path | None = None,
) -> int:
    """Pages of ``cache_dtype`` in ``memory_fraction`` of the memory: on a CPU of the machine's, else of each device's,
    less what is in use (the parameters) and the compiler's figure for the largest step's workspace, and less the room
    for adapters and for one on its way there. Never more than ``max_num_seqs`` full sequences can hold.

    ``meshes`` are the replicas', each of which gets as many; ``params`` are those of the first. ``keep_in``: the
    folder of ``kept.KeptPrograms``; it keeps the workspace and the number of pages, so that the next start asks the
    compiler nothing, and makes a cache of the same shape, whose programs are kept, if that has still room.

    Raises ValueError with the figures where not even one sequence of ``max_model_len`` fits.
    """
    mesh = meshes[0]
    fraction = defaults(mesh)["memory_fraction"] if memory_fraction is None else memory_fraction
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction={fraction} must be in (0, 1]")
    one_sequence = scheduler.max_pages_per_seq(page_size)
    kept, known, workspace = None, {}, 0
    per_page = page_bytes(config, page_size, dtype, parallel_config(mesh), cache_dtype)
    if _is_cpu(mesh):
        room = int(fraction * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (len(meshes) * mesh.size))
    else:
        asked = (config, scheduler, params, mesh, dtype, page_size, samplings, lora, cache_dtype)
        kept = KeptPrograms(keep_in, mesh, asked) if keep_in is not None else None
        known = kept.load_numbers(_POOL) if kept is not None else {}
        workspace = known.get("workspace_bytes") or _workspace_bytes(*asked)
        room = min(free_bytes(d, fraction) for own in meshes for d in own.local_devices) - workspace
    if lora is not None:
        adapters = adapters_shape(config, lora, mesh, dtype)
        room -= bytes_a_device(adapters) + bytes_a_device(one_slot_shape(adapters))
    fit = room // per_page
    if fit < one_sequence:
        raise ValueError(
            f"memory_fraction={fraction} leaves {max(room, 0) / 2**20:.0f} MiB a device for the KV cache: "
            f"{max(fit, 0) * page_size} tokens, fewer than max_model_len={scheduler.max_model_len}"
        )
    # What is free differs by some MB from start to start, which must not change the shape of the cache.
    if "num_pages" in known and abs(fit - known["num_pages"]) <= _PAGES_AT_ONCE:
        return known["num_pages"]
    if fit > 64 * _PAGES_AT_ONCE:
        fit -= fit % _PAGES_AT_ONCE
    num_pages = min(fit, scheduler.max_num_seqs * one_sequence)
    if kept is not None:
        kept.keep_numbers(_POOL, {"workspace_bytes": workspace, "num_pages": num_pages})
    return num_pages


def shorter(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The first layers of a model as a model."""
    first: dict[str, Any] = {name: getattr(config, name)[:num_layers] for name in PER_LAYER}
    if config.quantization is not None:
        matrices = []
        for those in config.quantization.matrices:
            own = [n for n in those.parameters if not n.startswith("layers.") or int(n.split(".")[1]) < num_layers]
            matrices.append(replace(those, parameters=tuple(own)))
        first["quantization"] = replace(config.quantization, matrices=tuple(matrices))
    return replace(config, num_layers=num_layers, **first)


def probed_layers(config: ModelConfig) -> int:
    """The least number of first layers that have every kind of layer, and two of them at least: what a step needs of
    memory beside parameters and cache hardly depends on how often they are repeated."""
    kinds = [(layer_specs(config, i), config.window(i), config.rope(i)) for i in range(config.num_layers)]
    last_new = next(i for i in reversed(range(config.num_layers)) if kinds[i] not in kinds[:i])
    return min(config.num_layers, max(2, last_new + 1))


def _workspace_bytes(
    config: ModelConfig,
    scheduler: SchedulerConfig,
    params: StageParams,
    mesh: Mesh,
    dtype: jnp.dtype,
    page_size: int,
    samplings: Sequence[Sampling],
    lora: LoraConfig | None,
    cache_dtype: CacheDtype,
) -> int:
    """Memory of the largest step and of its sampler beside parameters and pages, on one device, from the compiler.

    Of a deep model without stages it is that of steps of few layers, and what a layer adds to it times the others: the
    whole step takes as long to compile as everything else together.
    """
    few = CacheConfig(num_pages=16, page_size=page_size, dtype=cache_dtype)
    dims = step_dims(scheduler, few, samplings, lora)
    adapters = None if lora is None else adapters_shape(config, lora, mesh, dtype)
    buckets = all_buckets(scheduler)
    largest = max(buckets, key=lambda b: (b.num_tokens, b.num_rows))
    asked = max(samplings, key=SAMPLINGS.index)

    def lowered_step(num_layers: int) -> jax.stages.Lowered:
        own, own_params, own_adapters = config, params, adapters
        if num_layers < config.num_layers:
            own = shorter(config, num_layers)
            own_params = replace(params, layers=params.layers[:num_layers])
            if adapters is not None:
                own_adapters = replace(adapters, layers=adapters.layers[:num_layers])
        state = state_shape(own, few, dims, buckets, mesh, dtype)
        return lower_step(own, own_params, state, dims, largest, mesh, own_adapters)

    def num_bytes(lowered: jax.stages.Lowered) -> np.ndarray:
        """Of its own while it runs, and of what it gives: the constraints of all slots are among the sampler's outputs,
        the hidden states that stay among the step's."""
        analysis = compile_step(lowered, mesh).memory_analysis()
        return np.array((0, 0) if analysis is None else (analysis.temp_size_in_bytes, analysis.output_size_in_bytes))

    depths = [config.num_layers]
    if scheduler.num_stages == 1 and 4 * (probed := probed_layers(config)) <= config.num_layers:
        depths = [probed, 2 * probed]
    state = state_shape(config, few, dims, buckets, mesh, dtype)
    jobs = [lowered_step(depth) for depth in depths]
    jobs.append(lower_sampler(config, state, dims, largest.num_rows, mesh, asked))
    with ThreadPoolExecutor(len(jobs)) as pool:
        *steps, sampler = pool.map(num_bytes, jobs)
    step = steps[-1]
    if len(steps) == 2:
        step = step + (config.num_layers - depths[1]) * np.maximum(0, steps[1] - steps[0]) // (depths[1] - depths[0])
    # They run one after another, each in the memory that the one before had for itself.
    own = max(step[0], sampler[0], score_workspace_bytes(config.vocab_size) if dims.hidden_tokens else 0)
    return int(own + step[1] + sampler[1])


def step_dims(
    scheduler: SchedulerConfig, cache: CacheConfig, samplings: Sequence[Sampling], lora: LoraConfig | None = None
) -> StepDims:
    """The sizes that all steps of an engine with these configs share. Hidden states are kept where a request may ask
    for log-probabilities, or a next stage for them."""
    keeps_hidden = bool(set(samplings) & set(LOOKS_AT_ALL)) or scheduler.num_stages > 1
    return StepDims(
        num_slots=scheduler.max_num_seqs,
        max_pages_per_seq=scheduler.max_pages_per_seq(cache.page_size),
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        max_loras=0 if lora is None else lora.max_loras,
        hidden_tokens=max(b.num_tokens for b in all_buckets(scheduler)) if keeps_hidden else 0,
    )
