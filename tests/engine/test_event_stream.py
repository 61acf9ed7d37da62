"""When a stream's pending tokens become a message: by number, by time, and at once at both ends of a choice."""

import asyncio
from typing import Any

import pytest

from jaxserve.engine.event_stream import EventStream, SlowReaderError
from jaxserve.request import Request, TokenEvent
from jaxserve.sampling_params import SamplingParams

FOREVER = 60.0


def stream(slow_reader_timeout_s: float = FOREVER, **params: Any) -> EventStream:
    asked = SamplingParams(**params)
    request = Request(request_id="r", prompt_token_ids=(1,), params=asked, max_total_len=100, stop_token_ids=(), seed=0)
    return EventStream(request, asyncio.get_running_loop(), slow_reader_timeout_s, lambda stream: None)


def token(index: int, *, choice: int = 0, ends: bool = False) -> TokenEvent:
    return TokenEvent("r", index, 65, finish_reason="length" if ends else None, choice=choice)


async def is_waiting(taking: asyncio.Task) -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return not taking.done()


async def indices(taking: asyncio.Task) -> list[int]:
    return [event.index for event in await asyncio.wait_for(taking, 5)]


async def test_the_first_and_the_last_wait_for_nothing_and_others_for_each_other():
    events = stream(stream_interval=3, stream_max_delay_s=FOREVER)
    events.put(token(0))
    assert await indices(asyncio.create_task(events.take())) == [0]
    taking = asyncio.create_task(events.take())
    for index in (1, 2):
        events.put(token(index))
        assert await is_waiting(taking)
    events.put(token(3))
    assert await indices(taking) == [1, 2, 3]
    taking = asyncio.create_task(events.take())
    events.put(token(4))
    assert await is_waiting(taking)
    events.put(token(5, ends=True))
    assert await indices(taking) == [4, 5] and events.at_end
    events.close()


async def test_time_makes_a_token_due():
    events = stream(stream_interval=1000, stream_max_delay_s=0.03)
    events.put(token(0))
    assert await indices(asyncio.create_task(events.take())) == [0]
    taking = asyncio.create_task(events.take())
    start = events.loop.time()
    events.put(token(1))
    events.put(token(2))
    assert await is_waiting(taking) or events.loop.time() - start >= 0.029
    assert await indices(taking) == [1, 2] and events.loop.time() - start >= 0.029
    events.put(token(3, ends=True))
    assert await indices(asyncio.create_task(events.take())) == [3] and events.at_end
    events.close()


async def test_every_choice_has_a_first_token():
    events = stream(stream_interval=10, stream_max_delay_s=FOREVER, n=2)
    for choice in (0, 1):
        events.put(token(0, choice=choice))
        assert len(await events.take()) == 1
    events.put(token(1))
    taking = asyncio.create_task(events.take())
    assert await is_waiting(taking)
    events.put(token(1, choice=1, ends=True))  # of one of two: what the other has comes with it
    assert await indices(taking) == [1, 1]
    events.close()


async def test_an_interval_of_one_waits_for_nothing():
    events = stream()
    for index in range(4):
        events.put(token(index))
        assert await indices(asyncio.create_task(events.take())) == [index]
    events.close()


async def test_an_error_gives_what_is_pending_first():
    events = stream(stream_interval=5, stream_max_delay_s=FOREVER)
    events.put(token(0))
    await events.take()
    events.put(token(1))
    taking = asyncio.create_task(events.take())
    assert await is_waiting(taking)
    events.fail(RuntimeError("lost"))
    assert await indices(taking) == [1]
    with pytest.raises(RuntimeError, match="lost"):
        await events.take()


async def test_a_reader_that_waits_for_more_tokens_is_not_slow():
    events = stream(slow_reader_timeout_s=0.02, stream_interval=100, stream_max_delay_s=0.15)
    events.put(token(0))
    await events.take()
    taking = asyncio.create_task(events.take())
    await asyncio.sleep(0)
    events.put(token(1))
    assert await indices(taking) == [1]
    events.put(token(2))  # nobody takes this one
    await asyncio.sleep(0.06)
    with pytest.raises(SlowReaderError):
        await events.take()
