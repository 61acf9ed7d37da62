"""The step loops of one engine as one: which has a request, and whose step is read next."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import jax

from jaxserve.engine.loop import StepLoop
from jaxserve.engine.step_times import StepTimes
from jaxserve.errors import RequestError
from jaxserve.execution.placement import copied_params
from jaxserve.execution.step import StageParams
from jaxserve.request import EngineStats, LoraLoad, PageMap, Request, TokenEvent
from jaxserve.scheduler.routing import Router

# Between two looks at whether a device is done. The next step is on its way to it already, so that it does not wait for
# us: a token comes so much later, and the looks take a few percent of one core.
POLL_S = 1e-4
# After so long without an end ``advance`` returns, so that a request which has come meanwhile reaches a replica that
# has nothing to do: the others' steps may take a hundred times as long.
GIVE_WAY_S = 2e-3
# After so long a step is waited for, whoever else could go on: a device that hangs is then seen from outside as a step
# that does not end (``AsyncEngine``'s ``step_timeout_s``). No step of a working device takes as long.
PATIENCE_S = 5.0

Steps = Generator[jax.Array, float | None, StepTimes]


class _UnderWay(NamedTuple):
    """A step that has dispatched what it could, and waits for its device."""

    step: Steps
    waits_for: jax.Array
    since: float  # time.monotonic()
    slept_s: float  # by ``Replicas`` before


class Replicas:
    """One or several step loops over devices, pages and schedulers of their own. One thread at a time.

    A request goes to one of them (``Router``) and stays there, with all its completions. Their steps run beside each
    other: ``advance`` dispatches one for each that has something to do and none under way, then reads what is ready,
    so that a replica that reads a long prompt holds up no other's tokens. One thread for all: what the host does in a
    step is Python, of which only one thread runs at a time anyhow, and so everything mutable keeps its one owner.

    Attributes:
        loops: in the order of their devices.
    """

    def __init__(self, loops: Sequence[StepLoop]):
        self.loops = tuple(loops)
        self._router = Router([loop.scheduler for loop in self.loops])
        self._under_way: dict[StepLoop, _UnderWay] = {}  # the longest waiting first
        self._slept_s = 0.0
        self._loop_of: dict[str, StepLoop] = {}  # of requests whose last event nobody took

    def add(self, request: Request) -> None:
        """Queues a request. Raises as ``Engine.add_request``."""
        if request.request_id in self._loop_of:
            raise RequestError("request_id", f"{request.request_id!r} is already in use")
        index, num_cached = self._router.choose(request)
        loop = self.loops[index]
        elsewhere = sum(other.scheduler.num_waiting for other in self.loops if other is not loop)
        loop.add(request, num_cached, elsewhere)
        self._loop_of[request.request_id] = loop

    def replica_of(self, request_id: str) -> int | None:
        """The index of the loop that has the request; None if unknown."""
        loop = self._loop_of.get(request_id)
        return None if loop is None else self.loops.index(loop)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once, all its completions, and frees its pages. False if unknown."""
        loop = self._loop_of.get(request_id)
        return loop is not None and loop.abort(request_id)

    def has_unfinished(self) -> bool:
        """Whether there are requests, steps in flight, or events that nobody took."""
        return any(loop.has_unfinished() for loop in self.loops)

    def take_events(self) -> list[TokenEvent]:
        """The events since the last call, a request's in order."""
        events = [event for loop in self.loops for event in loop.take_events()]
        for event in events:
            if event.ends_request:
                del self._loop_of[event.request_id]
        return events

    def advance(
        self, on_dispatch: Callable[[], None] | None = None, on_times: Callable[[StepTimes], None] | None = None
    ) -> None:
        """Steps (``StepLoop.advance``) until one at least has come to its end; ``on_times`` is told of each that has.
        With several loops it returns after a while (``GIVE_WAY_S``) even so. What it raises is the end of all."""
        ended = [
            self._go_on(loop, loop.advance(on_dispatch))
            for loop in self.loops
            if loop not in self._under_way and loop.has_unfinished()
        ]
        while not any(ended) and (ready := self._ready()):
            ended = [self._resume(loop) for loop in ready]
        for times in ended:
            if times is not None and on_times is not None:
                on_times(times)

    def _resume(self, loop: StepLoop) -> StepTimes | None:
        """``_go_on`` with the step that is under way."""
        waiting = self._under_way.pop(loop)
        return self._go_on(loop, waiting.step, self._slept_s - waiting.slept_s)

    def _go_on(self, loop: StepLoop, step: Steps, waited_s: float | None = None) -> StepTimes | None:
        """Runs a step to its end, or to where it waits: None."""
        with loop.runner.compile_counter.watch():
            try:
                waits_for = step.send(waited_s)
            except StopIteration as end:
                return end.value
        self._under_way[loop] = _UnderWay(step, waits_for, time.monotonic(), self._slept_s)
        return None

    def _ready(self) -> list[StepLoop]:
        """Those under way whose devices have what they wait for. It waits until there is one, but no longer than
        ``GIVE_WAY_S``; and the one that must be waited for."""
        if not self._under_way:
            return []
        longest, waits = next(iter(self._under_way.items()))
        start = now = time.monotonic()
        if len(self.loops) == 1 or now - waits.since >= PATIENCE_S:
            return [longest]
        while not (ready := [loop for loop, own in self._under_way.items() if _is_ready(own.waits_for)]):
            if now - start >= GIVE_WAY_S:
                break
            time.sleep(POLL_S)
            self._slept_s -= now
            now = time.monotonic()
            self._slept_s += now
        return ready

    def settle(self) -> None:
        """Ends the steps that are under way, and no other begins; with stages, none is in them afterwards."""
        while self._under_way:
            loop = next(iter(self._under_way))
            self._resume(loop)
        for loop in self.loops:
            loop.finish_stages()

    def update_params(self, params: StageParams) -> None:
        """Other weights from the next step on; what is computed is computed anew.

        Args:
            params: on the mesh of the first; they are copied to the others'.
        """
        self.settle()  # a step is of one set of weights
        first, *others = self.loops
        first.runner.update_params(params)  # which refuses those that do not fit
        for loop in others:
            loop.runner.update_params(copied_params(params, loop.runner.mesh))
        for loop in self.loops:
            loop.forget_computed()

    def watch(self) -> AbstractContextManager[None]:
        """Counts what this thread compiles in the block; not around a step, which counts for itself."""
        return self.loops[0].runner.compile_counter.watch()

    def stats(self, loras: tuple[LoraLoad, ...]) -> EngineStats:
        """Figures of now, ``loras`` among them, summed; of several loops each one's own, too."""
        own = [_stats(loop) for loop in self.loops]
        if len(own) == 1:
            return replace(own[0], loras=loras)
        page_size = self.loops[0].scheduler.cache.page_size
        return replace(summed(own, page_size), loras=loras, replicas=tuple(own))

    def page_map(self) -> PageMap:
        """Who holds which pages; those of a loop are numbered on from those of the one before."""
        maps = [loop.scheduler.page_map() for loop in self.loops]
        if len(maps) == 1:
            return maps[0]
        starts = [sum(m.num_pages for m in maps[:i]) for i in range(len(maps))]
        return PageMap(
            num_pages=sum(m.num_pages for m in maps),
            page_size=maps[0].page_size,
            cached=tuple(start + page for start, m in zip(starts, maps, strict=True) for page in m.cached),
            sequences=tuple(
                replace(sequence, pages=tuple(start + page for page in sequence.pages))
                for start, m in zip(starts, maps, strict=True)
                for sequence in m.sequences
            ),
        )

    def close(self) -> None:
        """Frees the devices' memory; what is under way is dropped."""
        for waiting in self._under_way.values():
            waiting.step.close()
        self._under_way.clear()
        for loop in self.loops:
            loop.close()


def _is_ready(array: jax.Array) -> bool:
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]: not in its stubs


def _stats(loop: StepLoop) -> EngineStats:
    stats: dict[str, Any] = asdict(loop.scheduler.stats())
    stats |= {"num_steps": loop.num_steps, "recompilations_after_ready": loop.runner.compile_counter.count}
    return EngineStats(**{f.name: stats[f.name] for f in fields(EngineStats) if f.name in stats})


def summed(own: Sequence[EngineStats], page_size: int) -> EngineStats:
    """The figures of several engines as those of one; shares are of all their pages together."""
    counts: dict[str, Any] = {
        f.name: sum(getattr(stats, f.name) for stats in own)
        for f in fields(EngineStats)
        if isinstance(getattr(own[0], f.name), int)
    }
    held = counts["num_pages_held"]
    return EngineStats(
        **counts,
        kv_cache_usage=held / counts["num_pages"],
        kv_fragmentation=1 - counts["num_tokens_held"] / (held * page_size) if held else 0.0,
        steps_by_size=tuple(map(sum, zip(*(stats.steps_by_size for stats in own), strict=True))),
    )
