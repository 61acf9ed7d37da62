"""An engine whose thread stops where a test wants it to, so that the test need not be quicker than it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from jaxserve.request import EngineStats

TIMEOUT_S = 60.0


class Halt:
    """Before the first step at which ``when`` is so of the figures of that moment, ``engine`` waits for ``end``."""

    def __init__(self, engine: Any, when: Callable[[EngineStats], bool]):
        self._is_reached, self._may_go_on = threading.Event(), threading.Event()
        step = engine.step

        def halting() -> Any:
            if not self._may_go_on.is_set() and when(engine.stats()):
                self._is_reached.set()
                assert self._may_go_on.wait(TIMEOUT_S)
            return step()

        engine.step = halting

    async def reached(self) -> None:
        """Waits until the engine waits."""
        assert await asyncio.to_thread(self._is_reached.wait, TIMEOUT_S)

    def end(self) -> None:
        self._may_go_on.set()


def all_replicas_run(stats: EngineStats) -> bool:
    return all(own.num_running for own in stats.replicas)
