"""A scheduler that is called step by step, for cases that can be followed on paper."""

from typing import Literal

import numpy as np

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.batch import ScheduledBatch
from jaxserve.scheduler.scheduler import CommittedToken, Scheduler
from tests.scheduler.fake_engine import dims_of

ANY = 1  # a token that ends nothing


def make_scheduler(
    num_pages: int = 16,
    page_size: int = 4,
    *,
    max_num_seqs: int = 4,
    prefill_sizes: tuple[int, ...] = (8, 16),
    prefix_caching: bool = False,
    allocation: Literal["paged", "static"] = "paged",
    **config,
) -> Scheduler:
    cache = CacheConfig(num_pages=num_pages, page_size=page_size, prefix_caching=prefix_caching, allocation=allocation)
    config = {"max_model_len": 64, "decode_sizes": (1, max_num_seqs) if max_num_seqs > 1 else (1,)} | config
    scheduler_config = SchedulerConfig(max_num_seqs=max_num_seqs, prefill_sizes=prefill_sizes, **config)
    return Scheduler(cache, scheduler_config, dims_of(cache, scheduler_config, max_stop_ids=2), clock=lambda: 100.0)


def next_batch(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def shape(batch: ScheduledBatch) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.request_id, row.start, row.num_new_tokens, row.samples) for row in batch.rows]


def commit(scheduler: Scheduler, batch: ScheduledBatch, *tokens: int) -> list[CommittedToken]:
    """Commit ``tokens`` for the rows of ``batch``, or ANY for all of them."""
    packed = np.full(batch.bucket.num_rows, 999, np.int32)
    for i in range(len(batch.rows)):
        packed[batch.row_index(i)] = tokens[i] if tokens else ANY
    return scheduler.commit(batch, packed)
