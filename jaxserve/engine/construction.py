"""From a model and what a user asks for to the parts of a running engine, each built once, in the order of need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.checkpoint.hf.adapter import read_adapter
from jaxserve.config import CacheConfig, CacheDtype, ModelConfig, ParallelConfig, SchedulerConfig
from jaxserve.engine import plan
from jaxserve.engine.door import Door
from jaxserve.engine.loop import StepLoop
from jaxserve.engine.loras import Loras
from jaxserve.engine.mirror import LeadingRunner
from jaxserve.engine.replicas import Replicas
from jaxserve.execution.dummy import DummyWeights, dummy_params
from jaxserve.execution.kept import version_folder
from jaxserve.execution.placement import copied_params, place_params
from jaxserve.execution.runner import Progress, Runner
from jaxserve.execution.step import StageParams
from jaxserve.model.lora import check_adapter
from jaxserve.model.params import Params, ParamSource, TreeSource, check_params, param_specs
from jaxserve.multihost.cluster import Cluster
from jaxserve.parallel.mesh import parallel_config
from jaxserve.parallel.placed import placed_config
from jaxserve.scheduler.batch import all_buckets
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step_io import Sampling
from jaxserve.text.tokenizer import Tokenizer

GivenParams = Params | ParamSource | StageParams | DummyWeights


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine is made of; the configs say what was resolved."""

    parallel_config: ParallelConfig
    scheduler_config: SchedulerConfig
    cache_config: CacheConfig
    dtype: str
    door: Door
    replicas: Replicas
    loras: Loras


def build_parts(
    model_config: ModelConfig,
    params: GivenParams,
    tokenizer: Tokenizer | None,
    *,
    base_names: Sequence[str],
    mesh: Mesh | ParallelConfig | str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    num_pages: int | None = None,
    memory_fraction: float | None = None,
    page_size: int = 16,
    kv_cache_dtype: CacheDtype = "auto",
    prefill_sizes: Sequence[int] | None = None,
    decode_sizes: Sequence[int] | None = None,
    samplings: Sequence[Sampling] | None = None,
    max_prefill_rows: int | None = None,
    max_num_waiting: int = 1024,
    max_loras: int | None = None,
    max_lora_rank: int = 16,
    lora_modules: Mapping[str, str | Path] | None = None,
    prefix_caching: bool = True,
    lookahead: Literal[0, 1, 2] = 1,
    batching: Literal["continuous", "static"] = "continuous",
    allocation: Literal["paged", "static"] = "paged",
    compilation_cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> EngineParts:
    """All parts of an engine, its parameters placed and every step compiled.

    Args:
        model_config, params, tokenizer: as for ``Engine``.
        base_names: that no adapter may have.
        others: see ``EngineOptions``, which has the same.

    Raises:
        ValueError: an option that does not fit the model or the memory, with both numbers.
    """
    if num_pages is not None and memory_fraction is not None:
        raise ValueError(f"num_pages={num_pages} and memory_fraction={memory_fraction}: give one of them")
    keep_in = None
    if compilation_cache_dir is not None:
        keep_in = version_folder(Path(compilation_cache_dir))
        _keep_compiled(keep_in)
    lora_modules = lora_modules or {}
    meshes = plan.resolve_meshes(mesh, model_config)
    resolved = meshes[0]
    if cluster is not None:
        cluster.begin_building()
        plan.check_spans_processes(meshes)
    jnp_dtype = plan.resolve_dtype(dtype, resolved)
    plan.check_cache_dtype(kv_cache_dtype, resolved)
    parallel = parallel_config(resolved, len(meshes))
    scheduler_config = plan.scheduler_config(
        model_config,
        resolved,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        prefill_sizes=prefill_sizes,
        decode_sizes=decode_sizes,
        max_num_waiting=max_num_waiting,
        lookahead=lookahead,
        batching=batching,
        **({} if max_prefill_rows is None else {"max_prefill_rows": max_prefill_rows}),
    )
    lora = plan.lora_config(max_loras, max_lora_rank, len(lora_modules))
    if lora is not None and (cluster is None or cluster.process.leads):
        for path in lora_modules.values():  # what is wrong is told before the model is placed and compiled
            check_adapter(read_adapter(path, model_config, lora.max_rank), model_config, lora)
    samplings = tuple(plan.defaults(resolved)["samplings"] if samplings is None else samplings)
    placed = placed_config(model_config, parallel.tensor, scheduler_config.max_model_len)
    first = placed_params(params, model_config, placed, resolved, jnp_dtype, on_progress)
    arrays = [first, *(copied_params(first, other) for other in meshes[1:])]
    if num_pages is None:
        num_pages = plan.num_pages_that_fit(
            placed,
            scheduler_config,
            first,
            meshes,
            jnp_dtype,
            page_size,
            memory_fraction,
            samplings,
            lora,
            kv_cache_dtype,
            keep_in if cluster is None else None,
        )
    if cluster is not None:
        num_pages = cluster.minimum(num_pages)
    cache_config = CacheConfig(
        num_pages=num_pages,
        page_size=page_size,
        prefix_caching=prefix_caching,
        allocation=allocation,
        dtype=kv_cache_dtype,
    )
    if num_pages < scheduler_config.max_pages_per_seq(page_size):
        raise ValueError(
            f"num_pages={num_pages} of {page_size} hold {num_pages * page_size} tokens, fewer than max_model_len="
            f"{scheduler_config.max_model_len}"
        )
    dims = plan.step_dims(scheduler_config, cache_config, samplings, lora)
    if cluster is not None:
        keep_in = None  # a program of several processes has only this one's devices: JAX's own cache knows which it is
    leader = cluster if cluster is not None and cluster.process.leads and cluster.process.count > 1 else None
    loops = []
    for own_mesh, own_arrays in zip(meshes, arrays, strict=True):  # a program is compiled for the devices it runs on
        arguments = (
            placed,
            own_arrays,
            cache_config,
            dims,
            all_buckets(scheduler_config),
            own_mesh,
            jnp_dtype,
            samplings,
            on_progress,
            lora,
            keep_in,
        )
        runner = Runner(*arguments) if leader is None else LeadingRunner(leader, *arguments)
        loops.append(StepLoop(Scheduler(cache_config, scheduler_config, dims), runner, tokenizer))
    if cluster is not None:
        cluster.begin_serving()
    loras = Loras(lora, model_config, loops, base_names)
    if cluster is None or cluster.process.leads:  # who follows reads them when the leader does
        for name, path in lora_modules.items():
            loras.add(name, loras.read(path))
    check = loops[0].scheduler.check
    return EngineParts(
        parallel_config=parallel,
        scheduler_config=scheduler_config,
        cache_config=cache_config,
        dtype=jnp_dtype.name,
        door=Door(model_config, scheduler_config.max_model_len, tokenizer, check, samplings),
        replicas=Replicas(loops),
        loras=loras,
    )


def placed_params(
    params: GivenParams,
    config: ModelConfig,
    placed: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    on_progress: Progress | None = None,
) -> StageParams:
    """``params`` of ``config`` on the mesh in ``dtype``, as steps of ``placed`` (``parallel.placed.placed_config``)
    take them.

    Raises:
        ValueError: names the first parameter that is missing, extra or of another shape, with both shapes.
        TypeError: ``params`` are none of ``GivenParams``.
    """

    def on_parameter(stage: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else partial(on_progress, stage)

    match params:
        case StageParams():
            return params
        case DummyWeights(seed=seed):
            return dummy_params(placed, mesh, dtype, seed=seed, on_tensor=on_parameter("dummy weights"))
        case Params():
            source: ParamSource = TreeSource(params, config)
        case source:
            if not callable(getattr(source, "read", None)):
                raise TypeError(
                    f"params: {type(source).__name__} is neither jaxserve.model.params.Params nor an open checkpoint"
                )
            if (other := getattr(source, "config", None)) is not None:  # an open checkpoint
                check_params(param_specs(other), config)
    return place_params(source, config, placed, mesh, dtype, on_parameter=on_parameter("load"))


def _keep_compiled(folder: Path) -> None:
    """Has JAX keep what it compiles in ``folder``, all of it."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
