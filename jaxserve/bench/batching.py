"""Continuous against static batching, and a paged against a static cache: one model, one workload, one run.

Both methods are old ones to compare with: continuous batching is Orca's (Yu et al., OSDI 2022), the paged cache
PagedAttention's (Kwon et al., SOSP 2023, arXiv 2309.06180), whose measure of memory is used here.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.bench.environment import command_line, environment
from jaxserve.bench.workload import WorkItem, length_varied
from jaxserve.cache.pages import kv_bytes_per_token
from jaxserve.config import ModelConfig
from jaxserve.engine.engine import Engine
from jaxserve.model.params import Params, ParamSource
from jaxserve.request import EngineStats
from jaxserve.sampling_params import SamplingParams

Progress = Callable[[str, int, int], None]  # stage, done, total
SLOTS_FACTOR = 4  # slots of the allocation pair per slot of the batching pair: memory is to run out before they do
DECIDED_HERE = {"batching", "allocation", "prefix_caching", "max_num_waiting", "memory_fraction"}


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One engine of the comparison; ``mode`` is the side of it that this engine is."""

    comparison: Literal["batching", "allocation"]
    mode: Literal["continuous", "paged", "static"]
    max_num_seqs: int
    num_pages: int

    def engine_options(self) -> dict[str, Any]:
        static = {self.comparison: "static"} if self.mode == "static" else {}
        return static | {"max_num_seqs": self.max_num_seqs, "num_pages": self.num_pages}


@dataclass(frozen=True, kw_only=True)
class BatchingRow:
    """What one mode did with the workload. All requests are there at time 0, in the workload's order.

    Time excludes start-up: the engine has compiled and run every bucket before. Latency is from time 0 to a request's
    last token, its wait in the queue included. Active rows are the sequences that computed something in a step.

    The figures of memory are means or peaks over the ``num_queue_steps`` steps during which requests waited: only then
    can memory be wasted. They are read after each step's dispatch, so they are those the device works with, and are
    None if nobody ever waited. As shares of the capacity, ``num_pages * page_size`` tokens, these four add up to 1:

    * ``kv_utilisation_mean``: tokens whose KV is held (with those that the step writes). This is what the
      PagedAttention paper calls token states.
    * ``kv_reserved_mean``: room that a running sequence holds and will fill later: the paper's reservation.
    * ``kv_internal_fragmentation_mean``: room that a running sequence holds and will never fill.
    * ``kv_unallocated_mean``: pages that nobody holds though requests wait: too few for the next one, or no slot is
      free; the paper's external fragmentation.
    """

    comparison: str
    mode: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    page_size: int
    kv_bytes: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    latency_p50_s: float
    latency_p99_s: float
    num_steps: int
    step_p50_s: float  # between the returns of two steps: tells whether the machine was as fast for every mode
    load_average: float  # of the machine over the last minute, at the end
    active_rows_mean: float
    num_queue_steps: int
    running_mean: float | None  # sequences that run at once
    running_peak: int | None
    kv_utilisation_mean: float | None
    kv_utilisation_peak: float | None
    kv_reserved_mean: float | None
    kv_internal_fragmentation_mean: float | None
    kv_unallocated_mean: float | None
    num_preemptions: int
    recompilations_after_ready: int
    identical_tokens: bool  # every request got the tokens that it got in the run's first mode


def run(
    model: str,
    *,
    num_requests: int = 40,
    seed: int = 0,
    max_prompt: int = 256,
    max_output: int = 128,
    max_model_len: int | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """``compare`` on a checkpoint and a ``length_varied`` workload; rows with what is needed to repeat them.

    Args:
        max_model_len: what static allocation reserves; None is ``max_prompt + max_output``, the least that serves
            every request.
        options: as for ``compare``.
    """
    from jaxserve.checkpoint.open import open_checkpoint

    workload_options = {"num_requests": num_requests, "seed": seed, "max_prompt": max_prompt, "max_output": max_output}
    set_options = workload_options | ({"max_model_len": max_model_len} if max_model_len is not None else {}) | options
    if max_model_len is None:
        max_model_len = max_prompt + max_output
    if max_prompt + max_output > max_model_len:
        raise ValueError(f"max_prompt={max_prompt} and max_output={max_output} are more than {max_model_len=}")
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        workload = length_varied(**workload_options, vocab_size=config.vocab_size)
        rows = compare(config, checkpoint, workload, max_model_len=max_model_len, on_progress=on_progress, **options)
    about = environment() | {"model": Path(model).name, "command": command_line("batching", model, set_options)}
    return [asdict(row) | workload_options | about for row in rows]


def compare(
    config: ModelConfig,
    params: Params | ParamSource,
    workload: Sequence[WorkItem],
    *,
    max_model_len: int,
    max_num_seqs: int = 8,
    num_pages: int | None = None,
    page_size: int = 16,
    prefill_sizes: Sequence[int] | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> list[BatchingRow]:
    """Runs the workload greedily on four engines, one after the other, and checks that they agree on every token.

    1. continuous and static batching, ``max_num_seqs`` slots, pages enough for all of them at ``max_model_len``. A
       static batch is the next ``max_num_seqs`` requests in their order, and the next one starts when its last
       request has ended. Its prompts are chunked and its rows padded as in continuous batching; nothing is sorted.
    2. paged and static allocation, continuous batching, both with ``num_pages`` pages: the same bytes. Slots are
       ``SLOTS_FACTOR`` times as many, so that memory is the limit. Static allocation holds ``max_model_len`` tokens of
       room for every running sequence.

    Prefix caching is off, and so are end-of-sequence tokens: every request generates its ``num_output_tokens``.

    Args:
        params: canonical ``Params`` or where to read them from; each engine places its own copy, and is closed before
            the next is made.
        num_pages: of the allocation pair; None is what ``max_num_seqs // 4`` sequences of ``max_model_len`` take.
        prefill_sizes: None is 64 only on a CPU, where each size costs seconds of compiling, else the engine's default.
        options: further keywords of ``Engine.from_params``, for all four.

    Raises:
        ValueError: an option that the benchmark decides itself, or that no engine takes.
        RuntimeError: two modes differ in a token of float32 arithmetic. In bfloat16 sums in other shapes may round to
            other argmaxima: rows then say so.
    """
    for name in DECIDED_HERE & options.keys():
        raise ValueError(f"{name}={options[name]}: the benchmark decides it")
    per_sequence = -(-max_model_len // page_size)
    if num_pages is None:
        num_pages = max(1, max_num_seqs // 4) * per_sequence
    if prefill_sizes is None and jax.default_backend() == "cpu":
        prefill_sizes = (64,)
    few_slots = {"comparison": "batching", "max_num_seqs": max_num_seqs, "num_pages": max_num_seqs * per_sequence}
    many_slots = {"comparison": "allocation", "max_num_seqs": SLOTS_FACTOR * max_num_seqs, "num_pages": num_pages}
    modes = [Mode(mode=mode, **few_slots) for mode in ("continuous", "static")]
    modes += [Mode(mode=mode, **many_slots) for mode in ("paged", "static")]
    shared = {"max_model_len": max_model_len, "page_size": page_size, "prefill_sizes": prefill_sizes} | options
    rows: list[BatchingRow] = []
    first_tokens: list[list[int]] | None = None
    for mode in modes:
        stage = f"{mode.comparison} {mode.mode}"
        progress = _within(stage, on_progress) if on_progress else None
        with Engine.from_params(
            config,
            params,
            prefix_caching=False,
            max_num_waiting=len(workload),
            on_progress=progress,
            **mode.engine_options(),
            **shared,
        ) as engine:
            row, tokens = measure(engine, mode, workload, progress)
        first_tokens = first_tokens or tokens
        difference = first_difference(first_tokens, tokens)
        if difference and row.dtype == "float32":
            raise RuntimeError(f"{stage} differs from {modes[0].comparison} {modes[0].mode}: {difference}")
        rows.append(replace(row, identical_tokens=not difference))
    return rows


def _within(stage: str, on_progress: Progress) -> Progress:
    return lambda part, done, total: on_progress(f"{stage}: {part}", done, total)


def measure(
    engine: Engine, mode: Mode, workload: Sequence[WorkItem], on_progress: Progress | None = None
) -> tuple[BatchingRow, list[list[int]]]:
    """One mode's row, and each request's output tokens. ``identical_tokens`` is left to who knows the other modes."""
    requests = [
        engine.make_request(
            item.prompt,
            SamplingParams(temperature=0, max_tokens=item.num_output_tokens, ignore_eos=True),
            request_id=str(i),
        )
        for i, item in enumerate(workload)
    ]
    tokens: list[list[int]] = [[] for _ in workload]
    latencies: list[float] = []
    samples: list[EngineStats] = []
    step_ends: list[float] = []
    start = time.perf_counter()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        events = engine.step(on_dispatch=samples.append)
        step_ends.append(time.perf_counter())
        for event in events:
            assert event.token_id is not None
            tokens[int(event.request_id)].append(event.token_id)
            if event.finish_reason:
                latencies.append(step_ends[-1] - start)
                if on_progress:
                    on_progress("requests", len(latencies), len(workload))
    duration_s = time.perf_counter() - start
    end = engine.stats()
    num_output_tokens = sum(map(len, tokens))
    assert [len(t) for t in tokens] == [item.num_output_tokens for item in workload]
    cache = engine.cache_config
    itemsize = jnp.dtype(engine.dtype).itemsize
    p50, p99 = np.percentile(latencies, (50, 99))
    row = BatchingRow(
        comparison=mode.comparison,
        mode=mode.mode,
        num_requests=len(workload),
        prompt_tokens=sum(len(item.prompt) for item in workload),
        output_tokens=num_output_tokens,
        dtype=engine.dtype,
        max_model_len=engine.scheduler_config.max_model_len,
        max_num_seqs=engine.scheduler_config.max_num_seqs,
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        kv_bytes=cache.num_pages * cache.page_size * kv_bytes_per_token(engine.model_config, itemsize, cache.dtype),
        duration_s=duration_s,
        requests_per_s=len(workload) / duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        latency_p50_s=float(p50),
        latency_p99_s=float(p99),
        num_steps=end.num_steps,
        step_p50_s=float(np.median(np.diff([start, *step_ends]))),
        load_average=os.getloadavg()[0],
        active_rows_mean=sum(s.num_active_rows for s in samples) / len(samples),
        **memory_figures(samples, cache.page_size),
        num_preemptions=end.num_preemptions,
        recompilations_after_ready=end.recompilations_after_ready,
        identical_tokens=True,
    )
    return row, tokens


def memory_figures(samples: Sequence[EngineStats], page_size: int) -> dict[str, Any]:
    """The figures of memory of ``BatchingRow``, from the figures after each dispatch."""
    queued = [s for s in samples if s.num_waiting]
    names = ("kv_utilisation_mean", "kv_reserved_mean", "kv_internal_fragmentation_mean", "kv_unallocated_mean")
    if not queued:
        return dict.fromkeys(("running_mean", "running_peak", "kv_utilisation_peak", *names)) | {"num_queue_steps": 0}
    shares = []
    for s in queued:
        room = s.num_pages_held * page_size
        internal = room - s.num_tokens_held - s.num_tokens_reserved
        unallocated = (s.num_pages - s.num_pages_held) * page_size
        shares.append([s.num_tokens_held, s.num_tokens_reserved, internal, unallocated])
    by_step = np.array(shares) / (queued[0].num_pages * page_size)
    return {
        "num_queue_steps": len(queued),
        "running_mean": sum(s.num_running for s in queued) / len(queued),
        "running_peak": max(s.num_running for s in queued),
        "kv_utilisation_peak": float(by_step[:, 0].max()),
    } | dict(zip(names, by_step.mean(axis=0).tolist(), strict=True))


def first_difference(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str | None:
    """Where two runs' tokens part first, in the workload's order; None if nowhere."""
    for request, (a, b) in enumerate(zip(expected, found, strict=True)):
        for index, pair in enumerate(zip(a, b, strict=True)):
            if pair[0] != pair[1]:
                return f"request {request}, output token {index}: {pair[1]}, not {pair[0]}"
    return None
