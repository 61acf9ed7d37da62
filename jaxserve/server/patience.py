"""A limit on each of many short awaits, without a timer for each."""

import asyncio
from types import TracebackType
from typing import Self


class Patience:
    """``with patience: await ...`` raises TimeoutError where the await takes longer than ``timeout_s``, as
    ``asyncio.timeout`` does; one block at a time.

    A stream writes every token, and hardly ever waits: ``asyncio.timeout`` makes a timer and cancels it each time, in
    2.5 us where this takes 0.6. One timer runs for all blocks, and is set again when it fires.
    ``close`` stops it.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None  # of the block that runs
        self._since = 0.0  # when it began
        self._cancelling = 0  # requests to cancel that it had by then
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None and self._task is None
        self._task, self._since, self._cancelling, self._is_over = task, self._loop.time(), task.cancelling(), False
        if self._timer is None:
            self._timer = self._loop.call_later(self.timeout_s, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        task, self._task = self._task, None
        if not self._is_over or task is None or task.uncancel() > self._cancelling:
            return
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._task is None:  # the next block sets it again
            return
        left_s = self._since + self.timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._is_over = True
            self._task.cancel()
