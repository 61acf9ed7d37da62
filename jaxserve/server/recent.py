"""Latencies of the last requests, for who looks at the engine now: Prometheus has those of all time."""

import time
from collections import deque

from jaxserve.request import Request, TokenEvent

WINDOW = 1000  # values of each kind


class RecentLatencies:
    """``observe`` is an observer of the engine's events."""

    def __init__(self) -> None:
        self._first: deque[float] = deque(maxlen=WINDOW)
        self._between: deque[float] = deque(maxlen=WINDOW)
        self._last_at: dict[tuple[str, int], float] = {}  # unfinished choices with a token, monotonic seconds

    def observe(self, request: Request, event: TokenEvent) -> None:
        choice = (request.request_id, event.choice)
        if event.token_id is not None:
            now = time.monotonic()
            last = self._last_at.get(choice)
            if last is None:
                self._first.append(now - request.arrival)
            else:
                self._between.append(now - last)
            self._last_at[choice] = now
        if event.finish_reason is not None:
            self._last_at.pop(choice, None)

    def percentiles(self) -> dict[str, float | None]:
        """Seconds to the first token and between tokens; None where there was none yet."""
        return {
            f"{name}_p{p}_s": _percentile(values, p)
            for name, values in (("ttft", sorted(self._first)), ("itl", sorted(self._between)))
            for p in (50, 95)
        }


def _percentile(ascending: list[float], p: int) -> float | None:
    return ascending[min(len(ascending) * p // 100, len(ascending) - 1)] if ascending else None
