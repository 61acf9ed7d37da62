"""Latencies of the last requests, for who looks at the engine now: Prometheus has those of all time."""

from collections import deque

WINDOW = 1000  # values of each kind


class RecentLatencies:
    """Seconds, the latest last.

    Attributes:
        first: from arrival to first token.
        between: from one token to the next.
    """

    def __init__(self) -> None:
        self.first: deque[float] = deque(maxlen=WINDOW)
        self.between: deque[float] = deque(maxlen=WINDOW)

    def percentiles(self) -> dict[str, float | None]:
        """Seconds to the first token and between tokens; None where there was none yet."""
        return {
            f"{name}_p{p}_s": _percentile(values, p)
            for name, values in (("ttft", sorted(self.first)), ("itl", sorted(self.between)))
            for p in (50, 95)
        }


def _percentile(ascending: list[float], p: int) -> float | None:
    return ascending[min(len(ascending) * p // 100, len(ascending) - 1)] if ascending else None
