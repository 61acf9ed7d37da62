"""What a user may say of an engine: the keywords that every way to make one has."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypedDict

from jax.sharding import Mesh

from jaxserve.config import CacheDtype, ParallelConfig
from jaxserve.execution.runner import Progress
from jaxserve.multihost.cluster import Cluster
from jaxserve.step_io import Sampling


class EngineOptions(TypedDict, total=False):
    """Keywords of ``Engine``, ``Engine.from_pretrained`` and ``Engine.from_params``; what is left out has its default.

    Items:
        mesh: devices to run on: a ``jax.sharding.Mesh`` with axes ("stage", "tensor"), a ``ParallelConfig``, or
            text such as "stage=2,tensor=2"; None is one device. "replica=2" (of a ``Mesh`` a first axis of that name)
            is the model twice, on so many devices each: what is said below of steps, sequences and pages is then of
            each replica, and ``max_num_waiting`` of all.
        dtype: of weights, activations and KV; "auto" is float32 on CPUs, bfloat16 elsewhere.
        max_model_len: tokens of prompt and output together, at most.
        max_num_seqs: sequences that run at once.
        num_pages, memory_fraction: the KV cache's size, in pages or as a share of the memory; not both.
        page_size: tokens a page.
        kv_cache_dtype: of K and V in the cache: "auto" is ``dtype``; "int8" and "fp8" are rounded, with a scale for
            each head of a token, and hold about twice the tokens of bfloat16 (of GPUs on Hopper only, where heads of 64
            and 128 have kernels).
        prefill_sizes: ascending padded sizes, in tokens, of a step that reads prompts, the tokens of rows that
            decode in it included; the last is the token budget, and more than ``max_num_seqs``.
        decode_sizes: ascending padded sizes, in rows, of a step that reads none, the last ``max_num_seqs``.
        samplings: what requests may ask of sampling, each a sampler more to compile (``step_io.SAMPLINGS``; None is
            everything). ("greedy",) refuses every request that is not greedy.
        max_prefill_rows: sequences at most that have a prompt chunk in one step.
        max_num_waiting: requests that may wait; more are refused with QueueFullError.
        max_loras: LoRA adapters that may be loaded at once; None: as many as ``lora_modules``. 0: nothing is spent
            on them.
        max_lora_rank: their rank at most; each slot takes the memory of such a one.
        lora_modules: adapters to load before the engine is ready, by the name that requests give: folders as `peft`
            saves them.
        prefix_caching: pages of a prompt that another one has computed are shared.
        lookahead: steps dispatched before the last one is read, at most (``SchedulerConfig``); 0 lets only one into
            the stages of a mesh.
        batching, allocation: "static" is for comparison in benchmarks only.
        compilation_cache_dir: where compiled steps are kept for the next start, which then traces none. Sets JAX's
            persistent cache for this process; None leaves the process' own setting. Whoever can write there can run
            code here.
        on_progress: called with (stage, done, total) while loading, compiling and warming up.
        cluster: the processes whose devices the mesh has, each of which calls this with the same model and options
            (``cluster.joined``); followers then run a ``mirror.Follower``, for which a leader with ``lora_modules``
            waits here.
    """

    mesh: Mesh | ParallelConfig | str | None
    dtype: Literal["auto", "float32", "bfloat16"]
    max_model_len: int | None
    max_num_seqs: int | None
    num_pages: int | None
    memory_fraction: float | None
    page_size: int
    kv_cache_dtype: CacheDtype
    prefill_sizes: Sequence[int] | None
    decode_sizes: Sequence[int] | None
    samplings: Sequence[Sampling] | None
    max_prefill_rows: int | None
    max_num_waiting: int
    max_loras: int | None
    max_lora_rank: int
    lora_modules: Mapping[str, str | Path] | None
    prefix_caching: bool
    lookahead: Literal[0, 1, 2]
    batching: Literal["continuous", "static"]
    allocation: Literal["paged", "static"]
    compilation_cache_dir: str | Path | None
    on_progress: Progress | None
    cluster: Cluster | None


def check_names(options: EngineOptions) -> None:
    """Raises TypeError for a keyword that no engine has, with the one that is most like it."""
    known = EngineOptions.__annotations__
    for name in options.keys() - known.keys():
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"an engine has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
