"""Stop strings over streamed text."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be completed in a text that arrives in pieces, however it is cut.

    The match is the one that ends first; of several that end together, the longest. So the decision never waits for
    text after a completed stop, and what is emitted contains no stop string (unless ``include``). Text that may still
    become a stop is held back. Each stop runs Knuth-Morris-Pratt: its state is the length of the stop's longest
    prefix that ends the text so far, which is also how much must be held; time is linear in the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        if any(not s for s in stops):
            raise ValueError("every stop must be a non-empty string")
        self._stops = tuple(sorted(stops, key=len, reverse=True))  # longest first: it wins among equal ends
        self._borders = tuple(_borders(s) for s in self._stops)
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self._matched: str | None = None

    def add(self, text: str) -> tuple[str, str | None]:
        """Text now safe to emit, and the matched stop or None. After a match nothing more is emitted."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        whole = self._held + text
        for i, char in enumerate(text, start=len(self._held) + 1):
            for j, stop in enumerate(self._stops):
                state = self._states[j]
                while state and stop[state] != char:
                    state = self._borders[j][state - 1]
                self._states[j] = state = state + (stop[state] == char)
                if state == len(stop):
                    self._held, self._matched = "", stop
                    return whole[: i if self._include else i - len(stop)], stop
        safe_len = len(whole) - max(self._states)
        self._held = whole[safe_len:]
        return whole[:safe_len], None

    def flush(self) -> str:
        """The text has ended without a match: what was held back."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each prefix of ``stop``, the length of its longest proper prefix that is also its suffix."""
    borders, state = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while state and stop[state] != stop[i]:
            state = borders[state - 1]
        state += stop[state] == stop[i]
        borders[i] = state
    return borders
