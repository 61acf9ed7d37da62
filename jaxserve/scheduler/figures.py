"""What the scheduler tells of itself."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from jaxserve.cache.pool import PagePool
from jaxserve.request import STEP_TOKEN_BOUNDS, HeldPages, PageMap
from jaxserve.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Figures of now; the last seven count since the start (``prefix_*`` in tokens).

    ``num_tokens_held``: tokens with KV over the running sequences, a shared page's counted once; so
    ``kv_fragmentation = 1 - num_tokens_held / (num_pages_held * page_size)`` is the share of held memory that holds
    nothing. ``num_tokens_reserved`` is the part of it that its sequences fill if they reach ``max_total_len`` (the last
    token's KV is never computed). Prefix lookups are counted when a sequence is admitted, also when it returns after a
    preemption.
    """

    num_running: int
    num_waiting: int
    num_active_rows: int  # rows of the last scheduled step
    num_idle_rows: int  # static batching: rows whose sequence finished and that wait for the rest
    num_pages: int
    num_pages_held: int
    num_tokens_held: int
    num_tokens_reserved: int
    num_pages_cached: int  # held by nobody, kept for their prefix
    kv_cache_usage: float  # 0..1, pages held / pages
    kv_fragmentation: float  # 0..1
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int  # of requests admitted, each counted once
    generation_tokens: int  # committed
    step_tokens: int  # computed by all steps
    steps_by_size: tuple[int, ...]  # steps of at most STEP_TOKEN_BOUNDS[i] tokens and more than the bound before


@dataclass(slots=True)
class Counts:
    """Since the start, as of ``SchedulerStats``."""

    num_active_rows: int = 0  # of the last step
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    step_tokens: int = 0
    steps_by_size: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))


def page_map(pool: PagePool, sequences: Iterable[Sequence]) -> PageMap:
    """Who of ``sequences`` holds which pages."""
    return PageMap(
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        cached=pool.cached_pages,
        sequences=tuple(
            HeldPages(
                request_id=sequence.request.group_id or sequence.request_id,
                choice=sequence.request.choice,
                num_tokens=len(sequence.tokens),
                num_output_tokens=sequence.num_output_tokens,
                is_running=sequence.status == "running",
                num_preemptions=sequence.num_preemptions,
                pages=tuple(sequence.pages),
            )
            for sequence in sequences
        ),
    )


def stats(
    pool: PagePool, running: Collection[Sequence], num_waiting: int, counts: Counts, num_idle_rows: int
) -> SchedulerStats:
    """The figures of now."""
    held, page_size = pool.num_held, pool.page_size
    # Only full pages are shared, and each holder has counted them.
    counted_again = (pool.num_references - held) * page_size
    tokens_held = sum(sequence.num_computed for sequence in running) - counted_again
    reserved = sum(
        min(len(sequence.pages) * page_size, sequence.request.max_total_len - 1) - sequence.num_computed
        for sequence in running
    )
    return SchedulerStats(
        num_running=len(running),
        num_waiting=num_waiting,
        num_active_rows=counts.num_active_rows,
        num_idle_rows=num_idle_rows,
        num_pages=pool.num_pages,
        num_pages_held=held,
        num_tokens_held=tokens_held,
        num_tokens_reserved=reserved,
        num_pages_cached=pool.num_cached,
        kv_cache_usage=held / pool.num_pages,
        kv_fragmentation=1 - tokens_held / (held * page_size) if held else 0.0,
        prefix_cache_queries=pool.query_tokens,
        prefix_cache_hits=pool.hit_tokens,
        num_preemptions=counts.num_preemptions,
        prompt_tokens=counts.prompt_tokens,
        generation_tokens=counts.generation_tokens,
        step_tokens=counts.step_tokens,
        steps_by_size=tuple(counts.steps_by_size),
    )
