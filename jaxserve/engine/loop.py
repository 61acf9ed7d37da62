"""The step loop: sequences in, token events out; the host's turn in each step and the order of what it dispatches."""

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import jax

from jaxserve.constraint_io import ConstraintDims
from jaxserve.engine.output import RequestOutput
from jaxserve.engine.step_times import StepTimes
from jaxserve.execution.runner import Runner
from jaxserve.request import FinishReason, Request, RequestError, TokenEvent
from jaxserve.scheduler.batch import ScheduledBatch, build_inputs, choose_sampling, slot_loads
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step_io import StepOutputs
from jaxserve.text.tokenizer import Tokenizer


class StepLoop:
    """Runs one engine's scheduler and runner against each other. One thread at a time.

    Attributes:
        scheduler, runner: the loop is the only one that makes them go on.
        in_flight: dispatched steps that are not read yet, oldest first: the batch, and the runner's handle.
        num_steps: dispatched since the start.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None):
        self.scheduler, self.runner = scheduler, runner
        self.in_flight: deque[tuple[ScheduledBatch, jax.Array]] = deque()
        self.num_steps = 0
        self._tokenizer = tokenizer
        self._constraint_dims = ConstraintDims.of(runner.dims, runner.config.vocab_size)
        self._outputs: dict[str, RequestOutput] = {}  # unfinished sequences, by their own request ids
        self._groups: dict[str, dict[int, str]] = {}  # requests of several choices: the unfinished ones' own ids
        self._events: list[TokenEvent] = []

    def add(self, request: Request) -> None:
        """Queues a request. Raises as ``Engine.add_request``."""
        choices = request.choices()
        if request.request_id in self._groups or self.scheduler.get(request.request_id):
            raise RequestError("request_id", f"{request.request_id!r} is already in use")
        for sequence in self.scheduler.add_group(choices):
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
        return self.scheduler.has_unfinished() or bool(self.in_flight) or bool(self._events)

    def take_events(self) -> list[TokenEvent]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def advance(self, on_dispatch: Callable[[], None] | None) -> StepTimes:
        """Schedules and dispatches one step, and reads and commits the one before it (itself at lookahead 0).

        ``on_dispatch`` is called after a dispatch, before what the step before ended is freed.
        """
        clock = [time.perf_counter()]  # at the ends of schedule, build, dispatch, wait, commit
        for request_id in self.scheduler.expire(time.monotonic()):
            self._emit(self._outputs.pop(request_id).on_end("deadline"))
        batch = self.scheduler.schedule()
        clock.append(time.perf_counter())
        if batch is not None:
            buffer, inputs = build_inputs(batch, self.scheduler.slots, self.runner.dims)
            asked = choose_sampling(inputs)
            for load in slot_loads(batch, self._constraint_dims):
                self.runner.load_constraints(load)
            clock.append(time.perf_counter())
            handle = self.runner.sample(self.runner.forward(batch.bucket, buffer), asked)
            self.in_flight.append((batch, handle))
            self.num_steps += 1
            if on_dispatch is not None:
                on_dispatch()
            clock.append(time.perf_counter())
        else:
            clock += clock[-1:] * 2
        if len(self.in_flight) > (self.scheduler.config.lookahead if batch is not None else 0):
            read, handle = self.in_flight.popleft()
            outputs = self.runner.read(handle)
            clock.append(time.perf_counter())
            self._commit(read, outputs)
            clock.append(time.perf_counter())
        else:
            clock += clock[-1:] * 2
        return StepTimes(batch, *(end - start for start, end in pairwise(clock)))

    def _commit(self, batch: ScheduledBatch, outputs: StepOutputs) -> None:
        for token in self.scheduler.commit(batch, outputs.tokens):
            event = self._outputs[token.request_id].on_token(token, outputs)
            if event.finish_reason:
                del self._outputs[token.request_id]
                if not token.finish_reason:  # a stop string, which the scheduler cannot see
                    self.scheduler.finish(token.request_id, "stop")
            self._emit(event)

    def _end(self, own_id: str, reason: FinishReason) -> bool:
        """Ends one sequence; False if unknown."""
        if not self.scheduler.finish(own_id, reason):
            return False
        self._emit(self._outputs.pop(own_id).on_end(reason))
        return True

    def _emit(self, event: TokenEvent) -> None:
        if event.finish_reason and (group := self._groups.get(event.request_id)):
            del group[event.choice]
            event = event._replace(num_open=len(group))
            if not group:
                del self._groups[event.request_id]
        self._events.append(event)
