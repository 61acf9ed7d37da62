"""Which sequence computes which tokens in the next step, and what becomes of the sampled ones."""

import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxserve.cache.pool import PagePool, extend_digests
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.errors import QueueFullError, RequestError
from jaxserve.request import STEP_TOKEN_BOUNDS, FinishReason, PageMap, Request
from jaxserve.scheduler.batch import ScheduledBatch, ScheduledRow, SlotArrays, choose_bucket, first_chunk
from jaxserve.scheduler.figures import Counts, SchedulerStats, page_map, stats
from jaxserve.scheduler.limits import check_request
from jaxserve.scheduler.load import Load
from jaxserve.scheduler.sequence import NO_SLOT, Sequence
from jaxserve.scheduler.stages import Shares
from jaxserve.scheduler.waiting import WaitingQueue, by_order
from jaxserve.step_io import StepDims


class CommittedToken(NamedTuple):
    """One token that became an output of its sequence."""

    sequence: Sequence
    row: int  # of the step's outputs ([B]) that it came from
    token: int
    index: int  # in the output, from 0
    finish_reason: FinishReason | None  # "stop" or "length" on the last one
    stop_reason: int | None  # the params' stop token id that ended it; None for end-of-sequence

    @property
    def request_id(self) -> str:
        return self.sequence.request_id


class Scheduler:
    """Continuous batching over a paged cache, with chunked prefill, prefix reuse and recompute preemption.

    The engine calls ``schedule``, dispatches the step, and ``commit``s its tokens: with lookahead 1 only after the
    next ``schedule`` and dispatch. The scheduler counts on the device running steps in the order of ``schedule``:
    pages and slots are reused at once, since whoever gets them writes in a later step. Every scheduled batch must be
    dispatched and committed, in order. Where the mesh has stages and lookahead is 1, it says with ``left_stages`` when
    the tokens of a batch are sampled: until then their sequences are in no other (``stages``).

    Order: a sequence is better than another when ``(priority, arrival, number)`` is less. Only the head of the waiting
    queue (``WaitingQueue``: fair among clients) is ever admitted; when pages run out the worst running sequence is
    preempted: its pages are freed, it waits again, before all of its priority that never ran, and later recomputes its
    tokens, the generated ones too, as if they were its prompt.

    Everything that is admitted finishes, and so everybody's turn comes: let S be the best unfinished sequence that was
    admitted (finitely many come before any sequence, so that better ones take its place finitely often). If S runs, it
    is a victim only when it runs alone; then all pages that are not its own are free, and it needs no more than
    ``num_pages`` in all (checked by ``add``), so it is never preempted. Its one uncomputed token gets a decode row in
    each step, as there are as many rows as slots; its prompt is first in line for the prefill budget; so each step
    brings it forward. If S waits, it is the head, and nothing worse is admitted before it. The same argument for the
    best running sequence shows that the running set empties, by commits or preemptions (the victims queue behind S), if
    S does not fit earlier; with nothing running every page and slot is free and S is admitted, at the latest when its
    token in flight has been committed.
    """

    def __init__(
        self,
        cache: CacheConfig,
        config: SchedulerConfig,
        dims: StepDims,
        clock: Callable[[], float] = time.monotonic,
    ):
        max_pages_per_seq = config.max_pages_per_seq(cache.page_size)
        for name, value, expected in (
            ("num_slots", dims.num_slots, config.max_num_seqs),
            ("max_pages_per_seq", dims.max_pages_per_seq, max_pages_per_seq),
            ("num_pages", dims.num_pages, cache.num_pages),
            ("page_size", dims.page_size, cache.page_size),
        ):
            if value != expected:
                raise ValueError(f"StepDims.{name}={value} does not agree with the configs' {expected}")
        if cache.allocation == "static" and max_pages_per_seq > cache.num_pages:
            raise ValueError(
                f"static allocation takes {max_pages_per_seq} pages a sequence, num_pages={cache.num_pages}"
            )
        self.cache = cache
        self.config = config
        self.dims = dims
        self.pool = PagePool(cache.num_pages, cache.page_size, cache.prefix_caching)
        self.slots = SlotArrays(dims)
        self.load = Load()
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}  # unfinished
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # best first
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._with_deadline: dict[str, float] = {}
        self._next_number = 0
        # A running sequence soon needs a page more: admitting into the last ones would only preempt again.
        self._watermark = 0 if cache.allocation == "static" else max(1, cache.num_pages // 100)
        self._constrained: list[Sequence] = []  # admitted since the last batch
        self._shares = Shares(config.num_shares) if config.num_shares > 1 else None
        self._static_batch_size = 0
        self._counts = Counts()

    # Requests come and go.

    def add(self, request: Request) -> Sequence:
        """Queue ``request``. RequestError if it can never be served, QueueFullError if too many wait."""
        return self.add_group([request])[0]

    def add_group(self, requests: list[Request], num_cached: int = 0, waiting_elsewhere: int = 0) -> list[Sequence]:
        """Queue requests of one prompt, all or none (errors as of ``add``).

        The first computes the prompt, the others wait until its full pages can be shared.

        Args:
            num_cached: tokens of the prompt that the prefix cache has now, where it was looked up: for ``routing``.
            waiting_elsewhere: requests in queues that share ``max_num_waiting`` with this one's.
        """
        for request in requests:
            self.check(request)
            if request.request_id in self._sequences:
                raise RequestError("request_id", f"{request.request_id!r} is already in use")
        self.check_room(len(requests), waiting_elsewhere)
        first = self._queue(requests[0], None)
        self.load.add(first, num_cached)
        others = [self._queue(request, first) for request in requests[1:]]
        for sequence in others:
            self.load.add(sequence, sequence.prompt_len)
        return [first, *others]

    def check_room(self, num_requests: int, waiting_elsewhere: int = 0) -> None:
        """QueueFullError where so many more cannot wait; ``waiting_elsewhere`` as of ``add_group``."""
        num_waiting = len(self._waiting) + waiting_elsewhere
        if num_waiting + num_requests > self.config.max_num_waiting:
            raise QueueFullError(
                f"{num_waiting} requests are waiting, max_num_waiting={self.config.max_num_waiting}"
                + (f": no room for {num_requests} more" if num_requests > 1 else "")
            )

    def _queue(self, request: Request, shares_with: Sequence | None) -> Sequence:
        sequence = Sequence(request, self._next_number, shares_with)
        self._next_number += 1
        self._sequences[request.request_id] = sequence
        if request.deadline is not None:
            self._with_deadline[request.request_id] = request.deadline
        self._waiting.add(sequence)
        return sequence

    def get(self, request_id: str) -> Sequence | None:
        """The unfinished sequence of ``request_id``."""
        return self._sequences.get(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def unfinished(self) -> tuple[Sequence, ...]:
        """Every sequence that waits or runs, in no order."""
        return tuple(self._sequences.values())

    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def abort(self, request_id: str) -> bool:
        """End a request at any moment; False if it is unknown or finished."""
        return self.finish(request_id, "abort")

    def expire(self, now: float | None = None) -> list[str]:
        """End the requests whose deadline has passed, waiting or running; returns their ids."""
        if not self._with_deadline:
            return []
        now = self._clock() if now is None else now
        expired = [request_id for request_id, deadline in self._with_deadline.items() if deadline <= now]
        for request_id in expired:
            self.finish(request_id, "deadline")
        return expired

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request for a reason that the scheduler cannot see. A token of it still in flight is dropped."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, reason)
        return True

    def check(self, request: Request) -> None:
        """RequestError, with both numbers, if ``request`` could never be served. Reads configs only: any thread."""
        check_request(request, self.cache, self.config, self.dims)

    # The next step.

    def schedule(self) -> ScheduledBatch | None:
        """The next step's rows, or None when there is nothing to compute before a ``commit`` or ``add``."""
        decode: list[ScheduledRow] = []
        prefill: list[ScheduledRow] = []
        in_prompt: list[Sequence] = []
        preemptions = self._counts.num_preemptions
        static = self.config.batching == "static"
        forms_static_batch = static and not self._running
        if forms_static_batch:
            self._static_batch_size = 0

        # Best first; a victim is never better than who needs the page, so no row made here is taken back.
        share = self._shares and self._shares.next(sum(map(_decodes_on, self._running)))
        page_size = self.cache.page_size
        for sequence in tuple(self._running):
            if sequence.status != "running":
                break  # preempted just now, and so were all after it
            start, total_len = sequence.num_computed, len(sequence.tokens) + sequence.num_in_flight
            if total_len - start > 1:
                in_prompt.append(sequence)
            elif start < total_len < sequence.max_total_len and not sequence.in_stages:
                if share is not None and len(decode) == share:
                    continue  # it enters with the next step
                if start >= len(sequence.pages) * page_size and not self._grow(sequence):
                    break
                # As ``_advance``, for all the rows of most steps.
                sequence.num_computed = start + 1
                sequence.num_in_flight += 1
                decode.append(ScheduledRow(sequence, sequence.slot, start, 1, True, sequence.num_preemptions))

        wanted = sum(s.num_uncomputed for s in in_prompt)  # prompt tokens
        budget, max_rows = self.config.prefill_sizes[-1] - len(decode), self.config.max_prefill_rows
        # After a preemption the pages are wanted by those who run, and the victim may have a token in flight.
        if self._counts.num_preemptions == preemptions:
            while forms_static_batch or (not static and wanted < budget and len(in_prompt) < max_rows):
                sequence = self._admit_head()
                if sequence is None:
                    break
                self._static_batch_size += static
                if sequence.num_uncomputed == 1:
                    decode.append(_advance(sequence, 1))
                else:
                    in_prompt.append(sequence)
                    wanted += sequence.num_uncomputed

        num_prefill_tokens = 0
        if in_prompt:
            in_prompt = in_prompt[:max_rows]
            wanted = min(sum(s.num_uncomputed for s in in_prompt), self.config.prefill_sizes[-1] - len(decode))
            budget = first_chunk(self.config.prefill_sizes, wanted, len(decode))
            for sequence in in_prompt:
                num_tokens = min(sequence.num_uncomputed, budget - num_prefill_tokens)
                if num_tokens:
                    prefill.append(_advance(sequence, num_tokens))
                    num_prefill_tokens += num_tokens

        self._counts.num_active_rows = len(decode) + len(prefill)
        if self._shares is not None:
            self._shares.took(len(decode))
            for row in (*decode, *prefill):
                row.sequence.in_stages = row.samples
        if not self._counts.num_active_rows:
            return None
        num_decode_rows = len(decode)
        if static and not num_prefill_tokens:  # rows of finished sequences stay, idle
            num_decode_rows = max(num_decode_rows, self._static_batch_size)
        bucket = choose_bucket(self.config, num_decode_rows, num_prefill_tokens)
        num_tokens = len(decode) + num_prefill_tokens
        self._counts.step_tokens += num_tokens
        self._counts.steps_by_size[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        constrained, self._constrained = tuple(self._constrained), []
        return ScheduledBatch(bucket, (*decode, *prefill), len(decode), constrained)

    def left_stages(self, batch: ScheduledBatch) -> None:
        """The tokens that ``batch`` samples are on the device for whatever is dispatched next."""
        for row in batch.rows:
            if row.samples:
                row.sequence.in_stages = False

    def _admit_head(self) -> Sequence | None:
        """Admit the head of the queue, or None: if it does not fit, nobody behind it is asked, so it cannot starve."""
        if not self._waiting or not self._free_slots:
            return None
        sequence = self._waiting.head(self._running)
        if sequence is None or sequence.num_in_flight or not self._prompt_is_shared(sequence):
            return None
        if self.cache.allocation == "static":
            num_pages = self.dims.max_pages_per_seq
        else:
            num_pages = -(-(len(sequence.tokens) + 1) // self.cache.page_size)
        keep_free = self._watermark if self._running else 0
        # After the first output token all that was wanted of the prompt's hidden states has been given.
        match = not sequence.request.wants_whole_prompt or sequence.num_output_tokens > 0
        found = self.pool.allocate_sequence(
            sequence.tokens, sequence.digests, num_pages, keep_free, match, sequence.request.prefix_root
        )
        if found is None:
            return None
        sequence.pages, num_matched = found
        sequence.num_registered = num_matched
        sequence.num_computed = num_matched * self.cache.page_size
        sequence.slot = self._free_slots.pop()
        self._waiting.admit(sequence, 0 if sequence.admitted_once else sequence.prompt_len - sequence.num_computed)
        sequence.status = "running"
        if not sequence.admitted_once:
            sequence.admitted_once = True
            sequence.num_cached = sequence.num_computed
            sequence.admitted_at = self._clock()
            self._counts.prompt_tokens += sequence.prompt_len
        self.slots.assign(sequence.slot, sequence.request, sequence.pages)
        if sequence.request.is_constrained:
            self._constrained.append(sequence)
        insort(self._running, sequence, key=by_order)
        return sequence

    def _prompt_is_shared(self, sequence: Sequence) -> bool:
        """Whether the sequence that ``sequence`` shares its prompt with has, or will never have, its full pages."""
        first = sequence.shares_with
        if first is None or first.status != "running" or not self.cache.prefix_caching:
            return True
        num_pages = (first.prompt_len - 1) // self.cache.page_size
        if first.num_computed < num_pages * self.cache.page_size:
            return False
        # These are of steps before this one. A page with the prompt's last token may be this step's own.
        self._register_full_pages(first, num_pages)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next token, which has none; False if this took the pages of ``sequence`` itself."""
        while (pages := self.pool.allocate(1)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.slots.add_page(sequence.slot, len(sequence.pages), pages[0])
        sequence.pages += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.status = "waiting"
        sequence.num_preemptions += 1
        self._counts.num_preemptions += 1
        self._waiting.put_back(sequence)

    def forget_computed(self) -> None:
        """The weights have changed: no page holds what they would write, so every known prefix is forgotten and every
        running sequence is preempted, to recompute its tokens. Tokens in flight are committed as usual."""
        for sequence in reversed(tuple(self._running)):
            self._preempt(sequence)
        self.pool.drop_prefix_cache()

    # What came of a step.

    def commit(self, batch: ScheduledBatch, tokens: np.ndarray) -> list[CommittedToken]:
        """Append the sampled ``tokens`` [B] i32 of ``batch``, the oldest one not committed, and end who is done.

        Rows whose sequence has finished since are ignored; a sequence preempted since gets its token.
        """
        committed = []
        sampled = tokens.tolist()
        num_decode = batch.num_decode_rows
        page_size = self.cache.page_size if self.cache.prefix_caching else math.inf
        for i, (sequence, _, _, _, samples, _) in enumerate(batch.rows):
            if sequence.status == "finished":
                continue
            known = sequence.tokens
            if samples:
                row = i if i < num_decode else batch.row_index(i)
                token, index = sampled[row], len(known) - sequence.prompt_len
                known.append(token)
                sequence.num_in_flight -= 1
                if index == 0:
                    self.load.has_first_token(sequence)
                reason, stop_reason = None, None
                if token in sequence.request.stop_token_ids:
                    reason = "stop"
                    stop_reason = token if token in sequence.request.params.stop_token_ids else None
                elif len(known) >= sequence.max_total_len:
                    reason = "length"
                if reason is not None:
                    self._end(sequence, reason)
                committed.append(CommittedToken(sequence, row, token, index, reason, stop_reason))
            if sequence.status == "running" and len(known) >= (sequence.num_registered + 1) * page_size:
                self._register_full_pages(sequence)
        self._counts.generation_tokens += len(committed)
        return committed

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._waiting.end(sequence)
        self.load.remove(sequence)
        if sequence.status == "running":
            self._stop_running(sequence)
        sequence.status = "finished"
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]
        self._with_deadline.pop(sequence.request_id, None)

    def _stop_running(self, sequence: Sequence) -> None:
        """Take slot and pages from a running sequence. What its full pages hold stays findable until evicted."""
        self._register_full_pages(sequence)
        del self._running[bisect_left(self._running, sequence.order, key=by_order)]
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages = []
        sequence.slot = NO_SLOT
        sequence.num_computed = 0
        sequence.num_registered = 0

    def _register_full_pages(self, sequence: Sequence, at_most: int | None = None) -> None:
        """Offer the pages (the first ``at_most``) that are full of known tokens to the prefix index.

        Some may be written by a step still in flight: whoever matches them reads them in a later one.
        """
        first = sequence.num_registered
        last = min(sequence.num_computed, len(sequence.tokens)) // self.cache.page_size
        last = last if at_most is None else min(last, at_most)
        if last <= first or not self.cache.prefix_caching:
            return
        extend_digests(sequence.digests, sequence.tokens, self.cache.page_size, sequence.request.prefix_root)
        self.pool.register_full_pages(sequence.pages[first:last], sequence.digests[first:last])
        sequence.num_registered = last

    # Figures.

    def page_map(self) -> PageMap:
        """Who holds which pages: running sequences first, best first."""
        return page_map(self.pool, (*self._running, *self._waiting))

    def stats(self) -> SchedulerStats:
        num_idle = self._static_batch_size - len(self._running) if self.config.batching == "static" else 0
        return stats(self.pool, self._running, len(self._waiting), self._counts, max(num_idle, 0))


def _advance(sequence: Sequence, num_new_tokens: int) -> ScheduledRow:
    """The row that computes the next ``num_new_tokens`` of ``sequence``, counted as dispatched."""
    start = sequence.num_computed
    samples = num_new_tokens == sequence.num_uncomputed
    sequence.num_computed += num_new_tokens
    sequence.num_in_flight += samples
    return ScheduledRow(sequence, sequence.slot, start, num_new_tokens, samples, sequence.num_preemptions)


def _decodes_on(sequence: Sequence) -> bool:
    """Whether its next row is one token, and not all that it may have are computed or in flight."""
    return sequence.num_uncomputed == 1 and sequence.total_len < sequence.max_total_len
