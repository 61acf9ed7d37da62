"""What the user sees: stdout has only the answer, everything else goes to stderr."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console

SECONDS_BETWEEN_LINES = 2.0


def write_answer(text: str) -> None:
    """``text`` on stdout at once, so that pipes see each token as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line on stderr, in one piece: an engine that loads and a server that binds speak from two threads."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_table(rows: Mapping[str, Any]) -> None:
    """A line on stdout for each name and its value; lists and mappings on one line."""
    width = max(map(len, rows))
    for name, value in rows.items():
        if isinstance(value, Mapping):
            value = [f"{key} {entry}" for key, entry in value.items()]
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        write_answer(f"{name:<{width}}   {value}\n")


class _CursorKept(Console):
    """A console that never hides the cursor: a server that is told twice to stop exits without giving it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class ProgressDisplay:
    """An engine's ``on_progress``: bars on a terminal, a line now and then elsewhere. Called from any one thread."""

    def __init__(self):
        self._bars = None  # rich.progress.Progress, on a terminal
        self._tasks: dict[str, Any] = {}  # stage -> rich's task id
        self._start = time.monotonic()
        self._last_line = (None, 0.0)  # stage and time of the last line printed, where there is no terminal

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=_CursorKept(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` parts of a stage; a total of None is not known."""
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        last_stage, last_time = self._last_line
        now = time.monotonic()
        if stage != last_stage or done == total or now - last_time >= SECONDS_BETWEEN_LINES:
            note(f"{now - self._start:6.1f} s  {stage}" + ("" if total is None else f" {done}/{total}"))
            self._last_line = (stage, now)


class StreamStats:
    """Time to first token, and the rate of the tokens after it, of one stream as its reader saw it.

    Attributes:
        prompt_tokens: set by the reader when the stream tells.
    """

    def __init__(self):
        self.prompt_tokens: int | None = None
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._first_tokens = 0  # tokens that came with the first piece
        self._tokens = 0

    def add(self, num_tokens: int) -> None:
        """``num_tokens`` output tokens arrived now."""
        if not num_tokens:
            return
        self._last = time.perf_counter()
        self._tokens += num_tokens
        if self._first is None:
            self._first, self._first_tokens = self._last, num_tokens

    @property
    def num_tokens(self) -> int:
        return self._tokens

    @property
    def ttft_s(self) -> float | None:
        return None if self._first is None else self._first - self._start

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first piece over the time they took; None where nothing came after it."""
        rest = self._tokens - self._first_tokens
        if self._first is None or not rest:
            return None
        return rest / (self._last - self._first)

    def line(self) -> str:
        """For people: ``TTFT 0.123 s, 45.6 tokens/s, 80 tokens (prompt 20)``."""
        ttft = "no token" if self.ttft_s is None else f"TTFT {self.ttft_s:.3f} s"
        rate = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        prompt = "" if self.prompt_tokens is None else f" (prompt {self.prompt_tokens})"
        return f"{ttft}{rate}, {self._tokens} tokens{prompt}"
