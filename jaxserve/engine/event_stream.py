"""The undelivered events of one streamed request, between the engine's deliveries and one reader."""

import asyncio
from collections.abc import Callable

from jaxserve.request import Request, TokenEvent


class SlowReaderError(RuntimeError):
    """The reader took nothing for the limit while events were pending; the request was aborted."""


class EventStream:
    """One request's pending events. Every method runs on ``loop``'s thread.

    ``pending`` holds at most the events of the whole request, so ``max_total_len`` times ``n`` bounds it. It is one
    list and not a queue: a reader takes all of it, so a slow one costs fewer and larger messages instead of a backlog
    of small ones.

    What is pending is given when it is due: ``stream_interval`` tokens of it are there, or the first or last event of a
    choice is, or ``stream_max_delay_s`` have passed.

    ``drop`` is called once if the stream ends (closed, or its reader too slow) before the request's last event came.
    """

    def __init__(
        self,
        request: Request,
        loop: asyncio.AbstractEventLoop,
        slow_reader_timeout_s: float,
        drop: Callable[["EventStream"], None],
    ):
        self.request = request
        self.loop = loop
        self.pending: list[TokenEvent] = []
        self._timeout_s = slow_reader_timeout_s
        self._drop = drop
        self._interval = request.params.stream_interval
        self._max_delay_s = request.params.stream_max_delay_s
        self._is_due = False  # something of ``pending`` that waits for nothing, or its time has come
        self._flush: asyncio.TimerHandle | None = None
        self._got_last = False
        self._closed = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pending_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def at_end(self) -> bool:
        """The request's last event was taken."""
        return self._got_last and not self.pending and self._error is None

    def put(self, event: TokenEvent) -> None:
        """Adds an event; ignored once the stream is closed."""
        self._got_last |= event.ends_request
        if self._closed or self._error is not None:
            return
        if not self.pending:
            self._pending_since = self.loop.time()
        self.pending.append(event)
        if event.index == 0 or event.finish_reason is not None or len(self.pending) >= self._interval:
            self._is_due = True
        elif self._flush is None and not self._is_due:
            self._flush = self.loop.call_later(self._max_delay_s, self._make_due)
        if self._waiter is not None:
            if self._is_due:
                self._wake()
        elif self._timer is None:  # one timer a stream, re-armed when it fires: nothing to cancel at each token
            self._timer = self.loop.call_later(self._timeout_s, self._check_reader)

    def fail(self, error: Exception) -> None:
        """Ends the stream: ``take`` gives what is pending, then raises ``error``."""
        self._got_last = True
        if self._error is None:
            self._error = error
        self._wake()

    async def take(self) -> list[TokenEvent]:
        """All pending events, waiting until some are due."""
        while not self._is_due:
            if self._error is not None:
                if self.pending:
                    break
                raise self._error
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self.pending = self.pending, []
        self._is_due = False
        self._cancel_flush()
        return events

    def close(self) -> None:
        """The reader is gone."""
        if self._closed:
            return
        self._closed = True
        self.pending = []
        self._cancel_flush()
        if self._timer is not None:
            self._timer.cancel()
        if not self._got_last and self._error is None:
            self._drop(self)

    def _make_due(self) -> None:
        self._flush = None
        self._is_due = bool(self.pending)
        self._wake()

    def _cancel_flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_reader(self) -> None:
        self._timer = None
        if not self.pending or self._waiter is not None:
            return
        waited_s = self.loop.time() - self._pending_since
        if waited_s < self._timeout_s:
            self._timer = self.loop.call_later(self._timeout_s - waited_s, self._check_reader)
            return
        self._error = SlowReaderError(
            f"{len(self.pending)} events were not taken for {self._timeout_s:g} s: the request was aborted"
        )
        self.pending, self._is_due = [], False
        if not self._got_last:
            self._drop(self)
