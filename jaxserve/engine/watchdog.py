"""A limit on how long a step may take: a device that hangs cannot be interrupted, but who waits for it can be told."""

import threading
import time
from collections.abc import Callable

POLLS = 20  # of the limit: how much later than it a hang is noticed, at most


class StepTimeoutError(RuntimeError):
    """A step took longer than its limit."""


class Watchdog:
    """Calls ``on_timeout`` once, from a thread of its own, when a step takes longer than ``limit_s``.

    Whoever runs the steps must stop when ``end`` says so: from then on its state belongs to ``on_timeout``.

    Args:
        limit_s: seconds; 0 is no limit.
    """

    def __init__(self, limit_s: float, on_timeout: Callable[[StepTimeoutError], None]):
        self._limit_s = limit_s
        self._on_timeout = on_timeout
        self._lock = threading.Lock()  # whether a step ended in time is decided once
        self._began: float | None = None
        self._has_fired = False
        self._stop = threading.Event()
        if limit_s:
            threading.Thread(target=self._watch, name="jaxserve-watchdog", daemon=True).start()

    def begin(self) -> None:
        """A step begins."""
        with self._lock:
            self._began = time.monotonic()

    def end(self) -> bool:
        """The step has ended. False: too late, ``on_timeout`` was called."""
        with self._lock:
            self._began = None
            return not self._has_fired

    def stop(self) -> None:
        """Watches no more; any thread, any number of times."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._limit_s / POLLS):
            with self._lock:
                began = self._began
                self._has_fired = began is not None and time.monotonic() - began > self._limit_s
            if self._has_fired:
                self._on_timeout(StepTimeoutError(f"a step took longer than {self._limit_s:g} s"))
                return
