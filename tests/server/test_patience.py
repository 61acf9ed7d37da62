"""A limit on each of many awaits."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.server.patience import Patience


class Clock:
    """The loop's time and timers, as far as they are used."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append((self.now + delay_s, call))
        return asyncio.get_running_loop().call_later(0, lambda: None)  # only its cancel is used

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [call for at, call in self.timers if at <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for call in due:
            call()


def clocked(timeout_s: float) -> tuple[Patience, Clock]:
    patience, clock = Patience(timeout_s), Clock()
    loop: Any = clock
    patience._loop = loop
    return patience, clock


def num_cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_each_block_has_the_whole_time():
    patience, clock = clocked(10.0)
    for _ in range(5):
        with patience:
            clock.advance(9.0)
            await asyncio.sleep(0)
            assert len(clock.timers) == 1
    with pytest.raises(TimeoutError), patience:
        clock.advance(9.0)
        clock.advance(1.0)
        await asyncio.sleep(0)
    assert num_cancelling() == 0
    with patience:
        await asyncio.sleep(0)
    clock.advance(100.0)
    assert num_cancelling() == 0 and not clock.timers


async def test_other_ends_are_not_its_own():
    patience = Patience(30.0)
    with pytest.raises(ZeroDivisionError), patience:
        raise ZeroDivisionError

    async def waits() -> None:
        with patience:
            await asyncio.sleep(30)

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    patience.close()


async def test_a_task_that_others_cancel_too_stays_cancelled():
    patience, clock = clocked(10.0)

    async def waits() -> None:
        with patience:
            clock.advance(10.0)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(30)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(waits())
