"""One engine behind asyncio: a thread owns the engine, any number of event loops stream from it.

    loop: stream() --commands--> engine thread: add / abort / step --one delivery per step--> loop: _Stream --> reader

The engine thread is the only one that touches the engine and ``_streams`` (whoever ends everything from outside takes
all out of those); a ``_Stream`` is touched only on its own loop's thread. Commands go through a list guarded by one
condition, on which the thread sleeps when it has no work.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxserve.engine.core import EngineCore
from jaxserve.engine.event_stream import EventStream
from jaxserve.engine.output import embedding_of
from jaxserve.engine.watchdog import Watchdog
from jaxserve.errors import QueueFullError, RequestError
from jaxserve.request import Embedding, EngineStats, FinishReason, LoadedAdapter, PageMap, Request, TokenEvent

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed", "closed"]

STATS_INTERVAL_S = 0.1  # the engine counts tokens held row by row: too much for every step, cheap ten times a second
ABORT_TIMEOUT_S = 5.0  # for the step that runs when everything is aborted


Command = tuple[Callable[[EngineCore], Any], Future[Any]]  # and its result


class NotServingError(RuntimeError):
    """The engine is loading, draining, closed or failed: it takes no request."""


class EngineFailedError(RuntimeError):
    """The engine ended by an exception (``__cause__``), or by a step over its limit, while the request was running."""


class RequestEndedError(RuntimeError):
    """A request ended without what it was for; ``reason`` is "abort" or "deadline"."""

    def __init__(self, reason: FinishReason):
        super().__init__(f"the request ended by {reason}")
        self.reason = reason


class DuplicateRequestError(RequestError):
    """A request with this id is queued or running."""


class AsyncEngine:
    """Runs ``engine_factory()`` and then the engine in a thread of its own.

    Args:
        engine_factory: builds the engine. It is called in the engine thread, so a server can answer while it loads.
        slow_reader_timeout_s: a stream whose reader takes nothing for this long while events are pending is aborted,
            and raises ``SlowReaderError``. Pending events are bounded by the request's ``max_total_len`` times ``n``.
        max_concurrent_requests: more than so many that are queued or running are refused with ``QueueFullError``; None:
            as many as the engine's queue takes.
        max_requests_per_client: the same of requests with one ``client``.
        step_timeout_s: a step that takes longer ends everything as if the device had failed; 0 is no limit. Building
            the engine and giving it other weights are no steps.
        observer: called with (request, event) once for every event, on the loop that streams the request.
        on_failure: called there with (request, error) when a request's stream raises what this class says it may.
    """

    def __init__(
        self,
        engine_factory: Callable[[], EngineCore],
        *,
        slow_reader_timeout_s: float = 30.0,
        max_concurrent_requests: int | None = None,
        max_requests_per_client: int | None = None,
        step_timeout_s: float = 0.0,
        observer: Callable[[Request, TokenEvent], None] | None = None,
        on_failure: Callable[[Request, Exception], None] | None = None,
    ):
        if not callable(engine_factory):
            raise TypeError(f"engine_factory: {engine_factory!r:.80} is no function that builds an engine")
        self._factory = engine_factory
        self._slow_reader_timeout_s = slow_reader_timeout_s
        self._max_concurrent_requests = max_concurrent_requests
        self._max_requests_per_client = max_requests_per_client
        self._observer = observer
        self._on_failure = on_failure
        self._wake = threading.Condition()  # guards _state, _commands and _running
        self._state: State = "loading"
        self._has_ended = False
        self._failure: BaseException | None = None  # that it ended by
        self._commands: deque[Command] = deque()
        self._running: Command | None = None  # the one that the engine thread runs, until it is answered
        self._engine: EngineCore | None = None  # set once; used outside its thread only for facts and make_request
        self._stats: EngineStats | None = None
        self._next_stats = 0.0  # engine thread only: when they are taken again
        self._watchdog = Watchdog(step_timeout_s, self._end)
        self._streams: dict[str, EventStream] = {}  # engine thread only; an entry lives as long as the engine's request
        self._idle_waiters: list[Future[None]] = []  # engine thread only
        self._lora_lock = threading.Lock()
        self._ready: Future[None] = _started_future()
        self._stopped: Future[None] = _started_future()
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def engine(self) -> EngineCore:
        """The engine, for its configs, ``tokenizer``, ``make_request`` and ``list_loras``: all else is its thread's."""
        if self._engine is None:
            raise NotServingError(f"the engine is {self._state}")
        return self._engine

    def stats(self) -> EngineStats | None:
        """The engine's figures, at most ``STATS_INTERVAL_S`` old, exact when idle. None until ready. Any thread."""
        return self._stats

    async def ready(self) -> None:
        """Returns when the engine takes requests; raises what its construction raised."""
        await asyncio.wrap_future(self._ready)

    async def wait_stopped(self) -> None:
        """Returns when the engine was closed; raises ``EngineFailedError`` when its thread ended by an exception."""
        await asyncio.wrap_future(self._stopped)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """The events of ``request`` one by one. Closing or dropping the iterator before its end aborts the request.

        Raises ``NotServingError``, ``QueueFullError``, ``DuplicateRequestError``, ``SlowReaderError`` or
        ``EngineFailedError``.
        """
        async with aclosing(self.stream_batches(request)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def stream_batches(self, request: Request) -> AsyncGenerator[list[TokenEvent]]:
        """As ``stream``, but all events that are pending at once: several when the reader is slower than the engine."""
        if not isinstance(request, Request):
            raise TypeError(f"request: {request!r:.80} is none of engine.make_request")
        stream = EventStream(request, asyncio.get_running_loop(), self._slow_reader_timeout_s, self._drop_soon)
        try:
            # Not awaited: a refusal comes through the stream, and the first token waits for one wake-up less.
            self._post(partial(self._add, stream)).add_done_callback(partial(_tell_refusal, stream))
            while not stream.at_end:
                yield await stream.take()
        except Exception as error:
            if self._on_failure is not None:
                self._on_failure(request, error)
            raise
        finally:
            stream.close()

    async def embed(self, request: Request) -> Embedding:
        """The embedding that a request of ``make_embedding_request`` is for. Cancelling aborts it.

        Raises as ``stream``; ``RequestEndedError`` when it was aborted or its deadline passed.
        """
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if event.embedding is not None:
                    return embedding_of(request, event)
                if event.ends_request:
                    break
        assert event.finish_reason is not None
        raise RequestEndedError(event.finish_reason)

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its stream gets a last event. False: no such request is queued or running."""
        return await asyncio.wrap_future(
            self._post(lambda engine: engine.abort(request_id), when=("ready", "draining"))
        )

    async def page_map(self) -> PageMap:
        """``Engine.page_map`` between two steps."""
        return await asyncio.wrap_future(self._post(lambda engine: engine.page_map(), when=("ready", "draining")))

    async def update_params(self, params: Any) -> None:
        """``Engine.update_params`` between two steps; returns when the next step takes the new weights."""
        await asyncio.wrap_future(self._post(lambda engine: engine.update_params(params)))

    async def update_weights(self, name_or_path: str | Path) -> None:
        """``update_params`` with those of a checkpoint, which are read while the engine goes on.

        Raises ValueError (``CheckpointError``) for a checkpoint that cannot be used; the engine keeps what it has.
        """
        params = await asyncio.to_thread(self.engine.load_params, name_or_path)
        await self.update_params(params)

    async def load_lora(self, name: str, path: str | Path) -> LoadedAdapter:
        """``Engine.load_lora``, the adapter read while the engine goes on; one at a time."""
        return await asyncio.to_thread(self._load_lora, name, path)

    def _load_lora(self, name: str, path: str | Path) -> LoadedAdapter:
        with self._lora_lock:  # there is memory for one on its way to its slot
            adapter = self.engine.read_lora(path)
            return self._post(lambda engine: engine.add_lora(name, adapter)).result()

    async def unload_lora(self, name: str) -> None:
        """``Engine.unload_lora`` between two steps."""
        await asyncio.wrap_future(self._post(lambda engine: engine.unload_lora(name)))

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new request, lets the others finish, aborts them after ``timeout_s``. True: all finished."""
        with self._wake:
            if self._state == "ready":
                self._state = "draining"
            if self._state != "draining":
                return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle()
            return True
        except TimeoutError:
            aborting = self._post(self._abort_all, when=("draining",))
            with suppress(TimeoutError):  # a step that hangs must not keep the process
                async with asyncio.timeout(ABORT_TIMEOUT_S):
                    await self._idle()
            return aborting.done() and aborting.exception() is None and aborting.result() == 0  # a limit of 0 s

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Ends the thread and closes the engine. False: the thread is still busy (it cannot be interrupted)."""
        with self._wake:
            if self._state not in ("failed", "closed"):
                self._state = "closed"
            self._wake.notify()
        self._watchdog.stop()
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    # On any thread.

    def fail(self, error: BaseException) -> None:
        """Ends everything as if the engine's thread had ended by ``error``: it may never come back from the device."""
        self._end(error)

    @property
    def _is_over(self) -> bool:
        return self._state in ("closed", "failed")

    def _post(self, command: Callable[[EngineCore], Any], when: Sequence[State] = ("ready",)) -> Future[Any]:
        """Has the engine thread run ``command(engine)``; fails at once unless the state is one of ``when``."""
        future: Future[Any] = _started_future()
        with self._wake:
            if self._state in when:
                self._commands.append((command, future))
                self._wake.notify()
            else:
                future.set_exception(NotServingError(f"the engine is {self._state}"))
        return future

    def _drop_soon(self, stream: EventStream) -> None:
        self._post(partial(self._drop, stream), when=("ready", "draining"))

    async def _idle(self) -> None:
        waiter: Future[None] = _started_future()
        self._post(lambda _: self._idle_waiters.append(waiter), when=("draining",)).add_done_callback(
            lambda posted: _release(waiter) if posted.exception() else None
        )
        await asyncio.wrap_future(waiter)

    # On a stream's loop.

    def _deliver(self, deliveries: list[tuple[EventStream, TokenEvent]]) -> None:
        for stream, event in deliveries:
            stream.put(event)
        if self._observer is not None:
            for stream, event in deliveries:
                self._observer(stream.request, event)

    # On the engine thread.

    def _run(self) -> None:
        try:
            engine = self._factory()
            self._stats = engine.stats()
        except BaseException as error:  # whatever it is, it belongs to the caller of ready()
            self._end(error)
            return
        self._engine = engine
        with self._wake:
            if self._state == "loading":
                self._state = "ready"
                self._ready.set_result(None)
            elif not self._ready.done():
                self._ready.set_exception(NotServingError("the engine was closed while it was loading"))
        failure = None
        try:
            if not self._serve(engine):
                self._dismiss()  # another thread has ended everything; the device is not to be touched again
                return
        except BaseException as error:
            logger.exception("the engine failed")
            failure = error
        self._watchdog.stop()
        self._end(failure)
        engine.close()

    def _serve(self, engine: EngineCore) -> bool:
        """Returns when the engine was closed. False: another thread has ended everything while this one had
        commands or a step, and what they left is not this thread's."""
        while (num_commands := self._next_commands(engine)) is not None:
            if not self._turn(engine, num_commands):
                return False
        return True

    def _turn(self, engine: EngineCore, num_commands: int) -> bool:
        """Runs the commands, then a step if there is one to do. False: see ``_serve``."""
        is_asked = num_commands > 0
        for _ in range(num_commands):  # not those that come meanwhile, which would hold up the step
            self._run_command(engine)
        if self._has_ended:
            return False
        # A command may have left only a last event to give: has_unfinished() need not count that as work.
        events: list[TokenEvent] = []
        if is_asked or engine.has_unfinished():
            self._watchdog.begin()
            try:
                events = engine.step()
            except BaseException:
                if self._watchdog.end() and not self._has_ended:
                    raise
                return False
            if not self._watchdog.end() or self._has_ended:
                return False
        ended = any(event.finish_reason is not None for event in events) or not engine.has_unfinished()
        if ended:  # who has seen a request's last event finds it in the figures
            self._refresh_stats(engine)
        self._publish(engine, events)
        if not ended and time.monotonic() >= self._next_stats:  # what readers wait for goes first
            self._refresh_stats(engine)
        return True

    def _refresh_stats(self, engine: EngineCore) -> None:
        self._stats = engine.stats()
        self._next_stats = time.monotonic() + STATS_INTERVAL_S

    def _next_commands(self, engine: EngineCore) -> int | None:
        """How many commands to run before the next step, sleeping while there is nothing to do. None: the engine was
        closed."""
        with self._wake:
            while not self._commands and not engine.has_unfinished() and not self._is_over:
                while self._idle_waiters:
                    _release(self._idle_waiters.pop())
                self._wake.wait()
            return None if self._is_over else len(self._commands)

    def _run_command(self, engine: EngineCore) -> None:
        """Runs the oldest command, which ``_end`` may answer meanwhile, as it does those behind it."""
        with self._wake:
            if not self._commands:
                return
            self._running = self._commands.popleft()
            command, future = self._running
        try:
            result = command(engine)
        except Exception as error:  # not kept here: who keeps it keeps this frame
            self._answer(future.set_exception, error)
        else:
            self._answer(future.set_result, result)

    def _answer(self, tell: Callable[[Any], None], what: Any) -> None:
        with self._wake:
            is_answered, self._running = self._running is None, None
        if not is_answered:
            tell(what)

    def _publish(self, engine: EngineCore, events: list[TokenEvent]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EventStream, TokenEvent]]] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # ``_end`` has told it
                continue
            if event.ends_request:
                self._streams.pop(event.request_id, None)
            by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._deliver, deliveries)
            except RuntimeError:  # the loop was closed under its streams: nobody will read them
                for stream, _ in deliveries:
                    engine.abort(stream.request.request_id)

    def _add(self, stream: EventStream, engine: EngineCore) -> None:
        request_id = stream.request.request_id
        if request_id in self._streams:
            raise DuplicateRequestError("request_id", f"{request_id!r} is queued or running")
        limit = self._max_concurrent_requests
        if limit is not None and len(self._streams) >= limit:
            raise QueueFullError(
                f"{len(self._streams)} requests are queued or running, max_concurrent_requests={limit}"
            )
        limit, client = self._max_requests_per_client, stream.request.client
        if limit is not None:
            num_open = sum(other.request.client == client for other in self._streams.values())
            if num_open >= limit:
                raise QueueFullError(
                    f"{num_open} requests of this client are queued or running, max_requests_per_client={limit}"
                )
        engine.add_request(stream.request)
        self._streams[request_id] = stream

    def _drop(self, stream: EventStream, engine: EngineCore) -> None:
        if self._streams.get(stream.request.request_id) is stream:  # not a later request of the same id
            engine.abort(stream.request.request_id)

    def _abort_all(self, engine: EngineCore) -> int:
        """The number of requests that were ended."""
        return sum(engine.abort(request_id) for request_id in self._streams)

    def _end(self, failure: BaseException | None) -> None:
        """Leaves nothing waiting: streams, commands and waiters all get an answer. By the engine thread, or by another
        (the watchdog, ``fail``) while that one is in a step. Only the first end counts."""
        with self._wake:
            if self._has_ended:
                return
            self._failure = failure
            self._has_ended = True
            self._state = "closed" if failure is None else "failed"
            commands, self._commands = [*((self._running,) if self._running else ()), *self._commands], deque()
            self._running = None
            if failure is not None and not self._ready.done():
                self._ready.set_exception(failure)
            self._wake.notify()
        for _, future in commands:
            future.set_exception(NotServingError(f"the engine is {self._state}"))
        self._dismiss()
        if failure is None:
            self._stopped.set_result(None)
        else:
            self._stopped.set_exception(_failed(failure))

    def _dismiss(self) -> None:
        """Tells streams and waiters that everything has ended. Again by the engine thread where another one has ended
        it: what a command was adding meanwhile came too late for that one."""
        while self._streams:
            with suppress(KeyError):  # the last one's end was published just now
                _, stream = self._streams.popitem()
                error = NotServingError("the engine was closed") if self._failure is None else _failed(self._failure)
                try:
                    stream.loop.call_soon_threadsafe(stream.fail, error)
                except RuntimeError:
                    logger.debug("a stream's loop was closed before its engine ended")
        while self._idle_waiters:
            with suppress(IndexError):
                _release(self._idle_waiters.pop())


def _release(waiter: Future[None]) -> None:
    with suppress(InvalidStateError):  # of two threads that know of the end
        waiter.set_result(None)


def _tell_refusal(stream: EventStream, added: Future[Any]) -> None:
    """Has ``stream`` raise what kept it from being added; on any thread."""
    error = added.exception()
    if not isinstance(error, Exception):  # None
        return
    try:
        stream.loop.call_soon_threadsafe(stream.fail, error)
    except RuntimeError:
        logger.debug("a stream's loop was closed before its request was refused")


def _failed(cause: BaseException) -> EngineFailedError:
    error = EngineFailedError(f"the engine failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _started_future() -> Future[Any]:
    """A future that a cancelled waiter cannot cancel for the others."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future
