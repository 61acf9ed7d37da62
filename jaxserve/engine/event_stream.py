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
        if self._waiter is not None:
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
        """All pending events, waiting for at least one."""
        while not self.pending:
            if self._error is not None:
                raise self._error
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self.pending = self.pending, []
        return events

    def close(self) -> None:
        """The reader is gone."""
        if self._closed:
            return
        self._closed = True
        self.pending = []
        if self._timer is not None:
            self._timer.cancel()
        if not self._got_last and self._error is None:
            self._drop(self)

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
        self.pending = []
        if not self._got_last:
            self._drop(self)
