"""A device without a device, and the engine loop around it: what the scheduler's tests run on.

The fake device sees only ``StepInputs``. A cell of its KV cache remembers which token was written at which position
and after which tokens (a hash of the whole history), and the token it samples is a hash of seed, length and history.
So a request's tokens are known beforehand (``solo_tokens``), and any row that reads a page that is not its own
history, or was not written yet, is found out.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.batch import ScheduledBatch, all_buckets, build_inputs
from jaxserve.scheduler.scheduler import CommittedToken, Scheduler
from jaxserve.scheduler.stages import Entered, Stages
from jaxserve.step_io import Bucket, StepDims, StepInputs, buffer_size

VOCAB_SIZE = 11
EOS_ID = 10
NO_HISTORY = 0


def chain(history: int, token: int) -> int:
    """Hash of a history with one token more."""
    return hash((history, token))


def sample(seed: int, length: int, history: int, suppressed: frozenset[int]) -> int:
    """Token number ``length`` (from 0) of a sequence whose tokens before hash to ``history``."""
    token = (hash((seed, length, history)) >> 7) % VOCAB_SIZE
    while token in suppressed:
        token = (token + 1) % VOCAB_SIZE
    return token


def solo_tokens(request: Request) -> list[int]:
    """The output that the fake device must give for ``request``, alone or in any company."""
    history, outputs = NO_HISTORY, []
    for token in request.prompt_token_ids:
        history = chain(history, token)
    stops = frozenset(request.stop_token_ids)
    while True:
        suppressed = stops if len(outputs) < request.params.min_tokens else frozenset()
        length = len(request.prompt_token_ids) + len(outputs)
        outputs.append(sample(request.seed, length, history, suppressed))
        history = chain(history, outputs[-1])
        if outputs[-1] in stops or length + 1 == request.max_total_len:
            return outputs


def make_request(
    request_id: str,
    prompt: list[int] | tuple[int, ...],
    max_tokens: int,
    *,
    eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    seed: int = 0,
    priority: int = 0,
    arrival: float = 0.0,
    deadline: float | None = None,
    client: str = "",
    **sampling: Any,
) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop_token_ids, seed=seed, **sampling
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=params,
        max_total_len=len(prompt) + max_tokens,
        stop_token_ids=((EOS_ID,) if eos else ()) + stop_token_ids,
        seed=seed,
        priority=priority,
        arrival=arrival,
        deadline=deadline,
        client=client,
    )


def dims_of(cache: CacheConfig, config: SchedulerConfig, **others: int) -> StepDims:
    return StepDims(
        num_slots=config.max_num_seqs,
        max_pages_per_seq=config.max_pages_per_seq(cache.page_size),
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        **others,
    )


class FakeDevice:
    """Runs steps in the order given. ``cells[page * PS + offset]``: (token, position, history up to it)."""

    def __init__(self, dims: StepDims):
        self.dims = dims
        self.cells: list[tuple[int, int, int] | None] = [None] * (dims.num_pages * dims.page_size)
        self.last_tokens: list[int | None] = [None] * dims.num_slots

    def step(self, bucket: Bucket, inputs: StepInputs) -> np.ndarray:
        """Sampled tokens [B]; rows that do not sample, and padding, give -7: nobody may use them."""
        tokens = self.forward(bucket, inputs)
        self.sample(inputs, tokens)
        return tokens

    def sample(self, inputs: StepInputs, tokens: np.ndarray) -> None:
        """``tokens`` [B] of ``forward`` become the last ones of their slots, which later steps read."""
        for b in np.flatnonzero(inputs.does_sample):
            self.last_tokens[inputs.slot_ids[b]] = int(tokens[b])

    def forward(self, bucket: Bucket, inputs: StepInputs) -> np.ndarray:
        """See ``step``. What each stage does in a tick of its own is done at once: the order is the same in each."""
        dims, tokens = self.dims, np.full(bucket.num_rows, -7, np.int32)
        written: dict[int, tuple[int, int, int]] = {}  # visible to other rows only after the step: stricter than a GPU
        used_tokens, used_slots = set(), set()
        for b in range(bucket.num_rows):
            first, last = self._token_range(bucket, inputs, b)
            slot, kv_len = int(inputs.slot_ids[b]), int(inputs.kv_lens[b])
            if slot == dims.num_slots:  # padding
                assert kv_len == 0 and not inputs.does_sample[b] and (b < bucket.decode_rows or first == last)
                continue
            assert slot not in used_slots, "two rows of one slot"
            used_slots.add(slot)
            assert 1 <= last - first <= kv_len <= dims.max_pages_per_seq * dims.page_size
            own: dict[int, tuple[int, int, int]] = {}
            history = NO_HISTORY
            for position in range(kv_len):
                place = int(inputs.page_table[b, position // dims.page_size]) * dims.page_size
                place += position % dims.page_size
                t = first + position - (kv_len - (last - first))
                if t >= first:
                    used_tokens.add(t)
                    token = int(inputs.token_ids[t])
                    if token == -1:
                        assert b < bucket.decode_rows, "only a decode row may ask for the slot's last token"
                        held = self.last_tokens[slot]
                        assert held is not None
                        token = held
                    assert inputs.positions[t] == position and inputs.kv_write_index[t] == place
                    own[place] = (token, position, chain(history, token))
                cell = own.get(place, self.cells[place])
                assert cell is not None, f"row {b} reads a place never written: position {position}"
                assert cell[1:] == (position, chain(history, cell[0])), f"row {b} reads another's history at {position}"
                history = cell[2]
            assert not own.keys() & written.keys(), "two rows write one place"
            written |= own
            assert inputs.sample_index[b] == last - 1
            if inputs.does_sample[b]:
                high, low = inputs.seed[b].view(np.uint32).tolist()
                held_back = frozenset(inputs.stop_ids[b].tolist()) if kv_len < inputs.min_len[b] else frozenset()
                tokens[b] = sample(high << 32 | low, kv_len, history, held_back)
        for t in set(range(bucket.num_tokens)) - used_tokens:
            assert inputs.token_ids[t] == 0 and inputs.positions[t] == 0
            assert inputs.kv_write_index[t] == dims.num_pages * dims.page_size
        for place, cell in written.items():
            self.cells[place] = cell
        return tokens

    @staticmethod
    def _token_range(bucket: Bucket, inputs: StepInputs, b: int) -> tuple[int, int]:
        if b < bucket.decode_rows:
            return b, b + 1
        starts = inputs.prefill_cu_q_lens.tolist()
        assert starts == sorted(starts)
        i = b - bucket.decode_rows
        return starts[i], starts[i + 1]


@dataclass
class FakeEngine:
    """The engine's loop: dispatch step n + 1, then read step n (lookahead 1), step n - 1 (2), or one after the other
    (0). Where there are stages, a step is sampled and dispatched to be read when it leaves them."""

    cache: CacheConfig
    config: SchedulerConfig
    requests: dict[str, Request] = field(default_factory=dict)
    expected: dict[str, list[int]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str | None] = field(default_factory=dict)
    in_flight: deque[tuple[ScheduledBatch, np.ndarray]] = field(default_factory=deque)
    num_steps: int = 0
    num_preempted_in_flight: int = 0

    def __post_init__(self):
        self.dims = dims_of(self.cache, self.config)
        self.scheduler = Scheduler(self.cache, self.config, self.dims, clock=lambda: 0.0)
        self.device = FakeDevice(self.dims)
        self.buckets = set(all_buckets(self.config))
        self.stages = Stages(self.config, self.dims)
        self.tokens: deque[np.ndarray | None] = deque([None] * (self.config.num_stages - 1))  # of the steps in them
        self.busy: list[int] = []  # stages, in each tick

    def add(self, *requests: Request) -> None:
        """One request, or several of one prompt."""
        self.scheduler.add_group(list(requests))
        for request in requests:
            self.requests[request.request_id] = request
            self.expected[request.request_id] = solo_tokens(request)
            self.outputs[request.request_id] = []

    def end(self, request_id: str, reason: str) -> bool:
        """Abort (or end by a stop string) now; no token may come afterwards."""
        ended = self.scheduler.abort(request_id) if reason == "abort" else self.scheduler.finish(request_id, "stop")
        if ended:
            self.reasons[request_id] = reason
        return ended

    def expire(self, now: float) -> None:
        past = {
            request_id
            for request_id, request in self.requests.items()
            if request_id not in self.reasons and request.deadline is not None and request.deadline <= now
        }
        expired = self.scheduler.expire(now)
        assert sorted(expired) == sorted(past)
        self.reasons |= dict.fromkeys(expired, "deadline")

    def step(self) -> ScheduledBatch | None:
        batch = self.scheduler.schedule()
        entering = None
        if batch is not None:
            self.check_batch(batch)
            entering = Entered(batch, *build_inputs(batch, self.scheduler.slots, self.dims), [])
            self.num_steps += 1
        dispatched = self.tick(entering) if entering is not None or self.stages.is_busy else None
        if self.config.lookahead == 0:
            while self.stages.is_busy:
                assert dispatched is None
                dispatched = self.tick(None)
            ready = dispatched
        else:
            may_be_unread = 0
            if dispatched is not None:
                self.in_flight.append(dispatched)
                may_be_unread = 1 if self.config.num_stages > 1 else self.config.lookahead
            ready = self.in_flight.popleft() if len(self.in_flight) > may_be_unread else None
        if ready is not None:
            self.num_preempted_in_flight += sum(row.sequence.status == "waiting" for row in ready[0].rows)
            for committed in self.scheduler.commit(*ready):
                self.take(committed)
        elif batch is None and not self.stages.is_busy and not self.in_flight:
            assert not self.scheduler.has_unfinished(), "nothing to do, but somebody waits"
        return batch

    def tick(self, entering: Entered | None) -> tuple[ScheduledBatch, np.ndarray] | None:
        """What leaves the stages and its sampled tokens."""
        tick = self.stages.tick(entering)
        assert tick.bucket in self.buckets and tick.buffers.shape == (
            self.config.num_stages, buffer_size(tick.bucket, self.dims)
        )  # fmt: skip
        self.busy.append(tick.num_busy)
        if entering is not None:
            wider = replace(entering.batch, bucket=tick.bucket)
            assert (tick.buffers[0] == build_inputs(wider, self.scheduler.slots, self.dims)[0]).all()
        # What a step reads as it enters decides its tokens; they come when it leaves, laid out for another bucket.
        forward = self.device.forward
        self.tokens.appendleft(None if entering is None else forward(entering.batch.bucket, entering.inputs))
        expected, leaving = self.tokens.pop(), tick.leaving
        if leaving is None:
            assert expected is None
            return None
        assert expected is not None and leaving.batch.bucket == tick.bucket
        assert (tick.buffers[-1] == leaving.buffer).all()
        tokens = np.full(tick.bucket.num_rows, -7, np.int32)
        tokens[leaving.inputs.does_sample == 1] = expected[expected != -7]
        self.device.sample(leaving.inputs, tokens)
        self.scheduler.left_stages(leaving.batch)
        return leaving.batch, tokens

    def take(self, committed: CommittedToken) -> None:
        request, outputs = self.requests[committed.request_id], self.outputs[committed.request_id]
        assert committed.request_id not in self.reasons, "a token after the end"
        assert committed.index == len(outputs)
        outputs.append(committed.token)
        expected = self.expected[committed.request_id]
        assert outputs == expected[: len(outputs)], f"{committed.request_id} differs from its solo run"
        if len(outputs) < len(expected):
            assert committed.finish_reason is None
            return
        stopped = committed.token in request.stop_token_ids
        assert committed.finish_reason == ("stop" if stopped else "length")
        assert committed.stop_reason == (committed.token if committed.token in request.params.stop_token_ids else None)
        self.reasons[committed.request_id] = committed.finish_reason

    def drain(self) -> None:
        """Step until all is finished and read; everything must be free then.

        Even one after the other, with each token in a step of its own, the requests take as many steps as they have
        tokens; what preemption computes twice fits in twice that.
        """
        unfinished = (r.max_total_len for request_id, r in self.requests.items() if request_id not in self.reasons)
        max_steps = self.config.num_shares * (2 * sum(unfinished) + 4)
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished() and not self.in_flight and not self.stages.is_busy:
                break
            self.step()
            self.check_state()
        assert not self.scheduler.has_unfinished(), f"unfinished after {max_steps} steps"
        assert not self.in_flight and not self.stages.is_busy
        for request_id, reason in self.reasons.items():
            if reason in ("stop", "length"):
                assert self.outputs[request_id] == self.expected[request_id]
        stats = self.scheduler.stats()
        assert (stats.num_pages_held, stats.num_tokens_held, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
        assert self.scheduler.pool.num_free == self.cache.num_pages and self.scheduler.load.tokens == 0

    def check_batch(self, batch: ScheduledBatch) -> None:
        decode, prefill = batch.rows[: batch.num_decode_rows], batch.rows[batch.num_decode_rows :]
        assert batch.bucket in self.buckets
        assert batch.rows and len(decode) <= batch.bucket.decode_rows
        assert len(prefill) <= min(batch.bucket.prefill_rows, self.config.max_prefill_rows)
        assert sum(row.num_new_tokens for row in prefill) <= batch.bucket.prefill_tokens
        assert len({row.sequence.request_id for row in batch.rows}) == len(batch.rows)
        for row in batch.rows:
            assert row.sequence.status == "running" and row.slot == row.sequence.slot
            assert row.start + row.num_new_tokens < row.sequence.request.max_total_len
        if self.config.num_shares > 1:
            assert not any(row.sequence.request_id in self.in_stages() for row in batch.rows)
            return
        # Whoever decodes is in every step: prompts never stall a stream.
        rows = {row.sequence.request_id for row in decode}
        for sequence in self.scheduler._running:
            if sequence.num_in_flight and sequence.total_len < sequence.request.max_total_len:
                assert sequence.request_id in rows or sequence.request_id in {r.sequence.request_id for r in prefill}

    def in_stages(self) -> set[str]:
        """Whose next token is being computed."""
        return {row.sequence.request_id for batch in self.stages.batches() for row in batch.rows if row.samples}

    def check_state(self) -> None:
        """What must hold between any two operations."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        running, waiting = scheduler._running, list(scheduler._waiting)
        assert len(waiting) == len(scheduler._waiting)
        references = [0] * pool.num_pages
        filled = [0] * pool.num_pages
        for sequence in running:
            assert len(set(sequence.pages)) == len(sequence.pages)
            assert sequence.num_computed <= len(sequence.pages) * pool.page_size
            for index, page in enumerate(sequence.pages):
                references[page] += 1
                tokens = min(max(sequence.num_computed - index * pool.page_size, 0), pool.page_size)
                filled[page] = max(filled[page], tokens)
                assert scheduler.slots.page_table[sequence.slot, index] == page
            assert not scheduler.slots.page_table[sequence.slot, len(sequence.pages) :].any()
        assert references == [pool.refcount(page) for page in range(pool.num_pages)]
        assert pool.num_references == sum(references)

        unused, cached = pool._unused, list(pool._cached)
        held = [page for page, count in enumerate(references) if count]
        assert sorted(unused + cached + held) == list(range(pool.num_pages))
        assert pool.num_free == len(unused) + len(cached) and pool.num_held == len(held)
        assert {page: digest for digest, page in pool._page_of.items()} == pool._digest_of
        assert set(cached) <= set(pool._digest_of) and not set(unused) & set(pool._digest_of)

        slots = [sequence.slot for sequence in running] + scheduler._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs))
        for queue, status in ((running, "running"), (waiting, "waiting")):
            for client in {s.request.client for s in queue}:
                for admitted in (True, False):
                    orders = [s.order for s in queue if (s.request.client, s.admitted_once) == (client, admitted)]
                    assert orders == sorted(orders)
            assert all(s.status == status for s in queue)
        assert all(not s.pages and s.slot == -1 and s.num_computed == s.num_registered == 0 for s in waiting)
        unfinished = {s.request_id for s in running + waiting}
        assert unfinished == set(scheduler._sequences) == set(self.requests) - set(self.reasons)
        assert all(0 <= s.num_in_flight <= self.config.lookahead for s in running + waiting)

        stats = scheduler.stats()
        assert stats.num_tokens_held == sum(filled) and stats.num_pages_held == len(held)
        assert stats.num_pages_cached == len(cached) and 0 <= stats.kv_fragmentation <= 1
        assert 0 <= stats.kv_cache_usage <= 1 and stats.prefix_cache_hits <= stats.prefix_cache_queries
        assert stats.generation_tokens == sum(map(len, self.outputs.values()))
        assert scheduler.load.tokens >= 2 * len(unfinished)
