"""The step loop: sequences in, token events out; the host's turn in each step and the order of what it dispatches."""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.constraint_io import ConstraintDims
from jaxserve.engine.asides import Asides
from jaxserve.engine.output import NOTHING, RequestOutput
from jaxserve.engine.step_times import SECONDS, StepTimes
from jaxserve.engine.structured import StructuredOutput
from jaxserve.errors import RequestError
from jaxserve.execution.runner import Computed, Runner
from jaxserve.request import FinishReason, Request, TokenEvent
from jaxserve.scheduler.batch import ScheduledBatch, build_inputs, choose_sampling, slot_loads
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.stages import Entered, Stages, Tick
from jaxserve.step_io import StepOutputs
from jaxserve.text.grammar import Filler
from jaxserve.text.tokenizer import Tokenizer

# A host that waits no longer than this for a step is about as slow as the device, or slower: with one step dispatched
# ahead the device has nothing to do while the host reads that and goes on. A step is then a few milliseconds.
SHORT_WAIT_S = 2e-3


class InFlight(NamedTuple):
    """A step that is dispatched to its end."""

    batch: ScheduledBatch
    handle: jax.Array  # of the runner
    asides: Asides | None


# What a step is about to read, before it does; a step that is ended without looking at these waits where it must.
# What is sent back are the seconds that it was waited for, where other things were done, too.
Waits = Generator[jax.Array, float | None]


class StepLoop:
    """Runs one scheduler and its runner against each other. One thread at a time.

    Attributes:
        scheduler, runner: the loop is the only one that makes them go on.
        stages: steps that have ticks to go until they are sampled.
        in_flight: steps that are dispatched to their ends and not read yet, oldest first.
        num_steps: dispatched since the start.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None):
        self.scheduler, self.runner = scheduler, runner
        self.stages = Stages(scheduler.config, runner.dims)
        self.in_flight: deque[InFlight] = deque()
        self.num_steps = 0
        self._tokenizer = tokenizer
        self._constraint_dims = ConstraintDims.of(runner.dims, runner.config.vocab_size)
        self._outputs: dict[str, RequestOutput] = {}  # unfinished sequences, by their own request ids
        self._groups: dict[str, dict[int, str]] = {}  # requests of several choices: the unfinished ones' own ids
        self._events: list[TokenEvent] = []
        self._filler = Filler()
        self._times = dict.fromkeys(SECONDS, 0.0)  # of the step that runs
        self._lap = time.perf_counter()
        self._last_wait_s = math.inf  # for the last step that was read, or two of them

    def add(self, request: Request, num_cached: int = 0, waiting_elsewhere: int = 0) -> None:
        """Queues a request. Raises as ``Engine.add_request``. The numbers are of ``Scheduler.add_group``."""
        if request.request_id in self._groups or self.scheduler.get(request.request_id):
            raise RequestError("request_id", f"{request.request_id!r} is already in use")
        # First: a thousand choices take tens of milliseconds to make, and every stream waits for them.
        self.scheduler.check_room(request.params.n, waiting_elsewhere)
        choices = request.choices()
        for sequence in self.scheduler.add_group(choices, num_cached, waiting_elsewhere):
            self._outputs[sequence.request_id] = RequestOutput(sequence, self._tokenizer)
        if request.params.n > 1:
            self._groups[request.request_id] = {choice.choice: choice.request_id for choice in choices}

    def abort(self, request_id: str) -> bool:
        """Ends a request at once, all its choices, and frees its pages. False if unknown."""
        own_ids = tuple(self._groups[request_id].values()) if request_id in self._groups else (request_id,)
        ended = [self._end(own_id, "abort") for own_id in own_ids]
        return any(ended)

    def has_unfinished(self) -> bool:
        """Whether there are requests, steps in flight, or events that nobody took."""
        return self.scheduler.has_unfinished() or self.stages.is_busy or bool(self.in_flight) or bool(self._events)

    def take_events(self) -> list[TokenEvent]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def advance(self, on_dispatch: Callable[[], None] | None) -> Generator[jax.Array, float | None, StepTimes]:
        """Schedules and dispatches one step, and reads and commits the one before it (itself at lookahead 0; with 2
        none where the host is slower than the device, or then the one before that).

        It yields what it is about to read: its owner may do other things until that is ready, requests that come and
        go included, and other weights, ``forget_computed`` and another step excepted.

        With stages, what is dispatched is a tick, with or without a step that enters them, and what is read the step
        that left them in the tick before.

        Rows with structured output need the token before to know what may follow. Only the sampler needs that: while
        the device is in the forward pass, the step before is read and the masks are computed.

        ``on_dispatch`` is called after a dispatch, before what the step before ended is freed.
        """
        self._times = dict.fromkeys(SECONDS, 0.0)
        self._lap = time.perf_counter()
        for request_id in self.scheduler.expire(time.monotonic()):
            self._emit(self._outputs.pop(request_id).on_end("deadline"))
        batch = self.scheduler.schedule()
        self._spent("schedule_s")
        tick, may_be_unread = None, 0
        if batch is not None or self.stages.is_busy:
            tick = yield from self._tick(batch, on_dispatch)
            if not self.scheduler.config.lookahead:
                yield from self._finish_stages()
            elif tick.leaving is not None:
                may_be_unread = self._num_ahead()
        num_to_read = max(0, min(len(self.in_flight) - may_be_unread, 1 if tick is None else 2))
        if num_to_read:
            waited_s = self._times["wait_s"]
            for _ in range(num_to_read):
                yield from self._read()
            self._last_wait_s = self._times["wait_s"] - waited_s
        return StepTimes(batch, tick, num_to_read, **self._times)

    def _num_ahead(self) -> int:
        """Steps that may stay unread, of which one has just been dispatched."""
        waits_for_host = self.scheduler.config.lookahead == 2 and self._last_wait_s < SHORT_WAIT_S
        only_decode = all(step.batch.bucket.prefill_tokens == 0 for step in self.in_flight)
        return 2 if waits_for_host and only_decode and not self.stages.is_busy else 1

    def finish_stages(self) -> None:
        """Dispatches the steps in the stages to their ends; no other enters. Not while a step is under way."""
        for _ in self._finish_stages():
            pass

    def _finish_stages(self) -> Waits:
        while self.stages.is_busy:
            yield from self._tick(None, None)

    def close(self) -> None:
        """Frees the device's memory; what is in flight is dropped."""
        self.in_flight.clear()
        self.stages.clear()
        self.runner.close()

    def _spent(self, part: str) -> None:
        """Counts the time since the last call for a part of the step."""
        now = time.perf_counter()
        self._times[part] += now - self._lap
        self._lap = now

    def _tick(
        self, batch: ScheduledBatch | None, on_dispatch: Callable[[], None] | None
    ) -> Generator[jax.Array, float | None, Tick]:
        entering = None
        if batch is not None:
            built = build_inputs(batch, self.scheduler.slots, self.runner.dims)
            entering = Entered(batch, *built, slot_loads(batch, self._constraint_dims))
            self.num_steps += 1
        tick = self.stages.tick(entering)
        self._spent("build_s")
        computed = self.runner.forward(tick.bucket, tick.buffers, has_adapters=tick.has_adapters)
        if tick.leaving is not None:
            yield from self._sample(tick.leaving, computed)
        if on_dispatch is not None:
            on_dispatch()
        self._spent("dispatch_s")
        return tick

    def _sample(self, step: Entered, computed: Computed) -> Waits:
        """Dispatches the end of a step whose logits are ``computed``."""
        batch = step.batch
        asides = allowed = None
        asked = choose_sampling(step.inputs)
        more = [row for row in batch.rows if row.sequence.needs_more]
        if any(row.sequence.request.is_aside for row in more):
            # A new sequence may have the id of one that has ended.
            outputs = [
                self._outputs[row.sequence.request_id] if row.sequence.status != "finished" else None
                for row in batch.rows
            ]
            asides = Asides(batch, outputs, step.inputs)
            asides.dispatch(self.runner)
        for load in step.loads:
            self.runner.load_constraints(load)
        if any(row.samples and row.sequence.request.grammar is not None for row in more):
            asked = "constrained"
            self._spent("dispatch_s")
            while self.in_flight:
                yield from self._read()
            allowed = self._allowed(batch)
            self._spent("masks_s")
        self.in_flight.append(InFlight(batch, self.runner.sample(computed, asked, allowed), asides))
        self.scheduler.left_stages(batch)

    def _allowed(self, batch: ScheduledBatch) -> np.ndarray:
        """[B, W] i32: the tokens that the batch's rows may sample as far as structured output goes. Ends sequences
        that may sample none; their rows, as those of all that have ended, are not looked at any more."""
        allowed = np.full((batch.bucket.num_rows, self._constraint_dims.num_words), -1, np.int32)
        rows: list[tuple[StructuredOutput, int]] = []
        for i, row in enumerate(batch.rows):
            if row.samples and row.sequence.status != "finished":
                structured = self._outputs[row.sequence.request_id].structured
                if structured is not None:
                    rows.append((structured, batch.row_index(i)))
        if rows:
            self._filler.fill([(structured.matcher, row) for structured, row in rows], allowed)
        for structured, row in rows:
            ended = structured.restrict(allowed[row])
            if ended is not None:
                self._end(structured.request_id, *ended)
        return allowed

    def _read(self) -> Waits:
        """Reads and commits the oldest step in flight."""
        waited_s = yield self.in_flight[0].handle
        if waited_s is not None:
            self._times["wait_s"] += waited_s
            self._lap = time.perf_counter()
        step = self.in_flight.popleft()
        outputs = self.runner.read(step.handle)
        in_full = NOTHING if step.asides is None else step.asides.read(self.runner)
        self._spent("wait_s")
        self._commit(step.batch, outputs, in_full)
        self._spent("commit_s")

    def forget_computed(self) -> None:
        """The weights have changed: see ``Scheduler.forget_computed``."""
        self.scheduler.forget_computed()
        for output in self._outputs.values():
            output.forget_scores()

    def _commit(self, batch: ScheduledBatch, outputs: StepOutputs, in_full: Mapping[int, np.ndarray]) -> None:
        requests, events = self._outputs, self._events
        for token in self.scheduler.commit(batch, outputs.tokens):
            own_id = token.sequence.request_id
            event = requests[own_id].on_token(token, outputs, in_full)
            if not event.finish_reason:
                events.append(event)
                continue
            del requests[own_id]
            if not token.finish_reason:  # a stop string or a complete text, which the scheduler cannot see
                self.scheduler.finish(own_id, "stop")
            self._emit(event)

    def _end(self, own_id: str, reason: FinishReason, stop_reason: str | None = None) -> bool:
        """Ends one sequence; False if unknown."""
        if not self.scheduler.finish(own_id, reason):
            return False
        self._emit(self._outputs.pop(own_id).on_end(reason, stop_reason))
        return True

    def _emit(self, event: TokenEvent) -> None:
        if event.finish_reason and (group := self._groups.get(event.request_id)):
            del group[event.choice]
            event = event._replace(num_open=len(group))
            if not group:
                del self._groups[event.request_id]
        self._events.append(event)
