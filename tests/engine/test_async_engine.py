import asyncio
import gc
import threading
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from jaxserve.engine import watchdog
from jaxserve.engine.async_engine import (
    AsyncEngine,
    DuplicateRequestError,
    EngineFailedError,
    NotServingError,
)
from jaxserve.engine.event_stream import SlowReaderError
from jaxserve.errors import QueueFullError
from jaxserve.sampling_params import SamplingParams
from tests.server.fake_engine import FakeEngine, expected_tokens

ENDLESS = SamplingParams()
ENDLESS_LEN = 1_000_000
TIMEOUT_S = 10.0


@asynccontextmanager
async def running(engine: FakeEngine, **options):
    async_engine = AsyncEngine(lambda: engine, **options)
    await async_engine.ready()
    try:
        yield async_engine
    finally:
        assert await async_engine.close(TIMEOUT_S)
        assert engine.closed or async_engine.state == "failed"


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Has the watchdog count as passed what the test puts into the list: on a busy machine a good step may be long."""
    passed_s: list[float] = []
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: sum(passed_s)))
    return passed_s


async def is_idle(engine: FakeEngine) -> bool:
    return await asyncio.to_thread(engine.idle.wait, TIMEOUT_S)


async def tokens_of(stream) -> list[int]:
    return [event.token_id async for event in stream]


def request_of(engine: FakeEngine, prompt=(1, 2, 3), max_tokens: int | None = None, **kwargs):
    return engine.make_request(prompt, SamplingParams(max_tokens=max_tokens), **kwargs)


async def test_streams_interleave_and_are_whole():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        prompts = [[i, i + 1] for i in range(20)]
        streams = [tokens_of(async_engine.stream(request_of(engine, p, max_tokens=5 + p[0]))) for p in prompts]
        assert await asyncio.gather(*streams) == [expected_tokens(p, 5 + p[0]) for p in prompts]
        assert engine.idle.is_set()


async def test_last_event_has_reason_and_usage_and_stats_are_exact_when_idle():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        events = [event async for event in async_engine.stream(request_of(engine, max_tokens=4))]
        assert [event.index for event in events] == [0, 1, 2, 3]
        assert [event.finish_reason for event in events] == [None, None, None, "length"]
        assert events[-1].usage is not None and events[-1].usage.completion_tokens == 4
        stats = async_engine.stats()
        assert stats is not None and (stats.num_running, stats.generation_tokens) == (0, 4)


async def test_not_ready_before_construction_and_construction_runs_on_the_engine_thread():
    may_build, threads = threading.Event(), []

    def build():
        threads.append(threading.current_thread().name)
        assert may_build.wait(TIMEOUT_S)
        return FakeEngine()

    async_engine = AsyncEngine(build)
    assert async_engine.state == "loading" and async_engine.stats() is None
    with pytest.raises(NotServingError, match="loading"):
        _ = async_engine.engine
    with pytest.raises(NotServingError, match="loading"):
        await tokens_of(async_engine.stream(request_of(FakeEngine())))
    may_build.set()
    await async_engine.ready()
    assert async_engine.state == "ready" and threads == ["jaxserve-engine"]
    assert await async_engine.close()


async def test_construction_error_is_raised_by_ready():
    def build():
        raise ValueError("no such model")

    async_engine = AsyncEngine(build)
    with pytest.raises(ValueError, match="no such model"):
        await async_engine.ready()
    assert async_engine.state == "failed"
    with pytest.raises(EngineFailedError, match="no such model"):
        await async_engine.wait_stopped()


async def test_arguments_of_another_kind_are_named():
    engine = FakeEngine()
    with pytest.raises(TypeError, match=r"engine_factory: <.*FakeEngine.*> is no function that builds an engine"):
        AsyncEngine(engine)  # pyright: ignore[reportArgumentType]
    async with running(engine) as async_engine:
        with pytest.raises(TypeError, match=r"request: 'hi' is none of engine.make_request"):
            await tokens_of(async_engine.stream("hi"))  # pyright: ignore[reportArgumentType]


async def test_closed_while_loading():
    may_build = threading.Event()

    def build():
        assert may_build.wait(TIMEOUT_S)
        return FakeEngine()

    async_engine = AsyncEngine(build)
    assert await async_engine.close(0.01) is False
    may_build.set()
    with pytest.raises(NotServingError, match="closed"):
        await async_engine.ready()
    assert await async_engine.close() is True


@pytest.mark.parametrize("how", ["close", "break_and_drop", "cancel"])
async def test_a_dropped_stream_is_aborted(how):
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine))
        await anext(stream)
        assert not engine.idle.is_set()
        if how == "close":
            await stream.aclose()
        elif how == "break_and_drop":
            del stream
            gc.collect()
        else:
            waiting = asyncio.ensure_future(tokens_of(stream))
            await asyncio.sleep(0)  # lets it start
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert await is_idle(engine)


async def test_a_stream_that_is_never_read_adds_nothing():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        async_engine.stream(request_of(engine))
        await tokens_of(async_engine.stream(request_of(engine, max_tokens=1)))
        assert len(engine.requests) == 1


async def test_abort_ends_the_stream_with_a_last_event():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine, request_id="a"))
        first = await anext(stream)
        assert first.token_id == expected_tokens([1, 2, 3], 1)[0]
        assert await async_engine.abort("a") is True
        rest = [event async for event in stream]
        assert rest[-1].finish_reason == "abort" and rest[-1].token_id is None
        tokens = [event.token_id for event in rest[:-1]]
        assert tokens == expected_tokens([1, 2, 3], 1 + len(tokens))[1:]
        assert await async_engine.abort("a") is False
        assert await async_engine.abort("unknown") is False


async def test_queue_full_and_duplicate_id_leave_the_others_alone():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001, max_num_waiting=1)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine, request_id="a"))
        await anext(stream)
        with pytest.raises(QueueFullError):
            await tokens_of(async_engine.stream(request_of(engine, request_id="b")))
        with pytest.raises(DuplicateRequestError, match="'a'"):
            await tokens_of(async_engine.stream(request_of(engine, request_id="a")))
        assert not engine.idle.is_set()
        assert (await anext(stream)).index == 1
        await stream.aclose()


async def test_deadline_ends_the_stream():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        request = request_of(engine, deadline=time.monotonic() + 0.05)
        events = [event async for event in async_engine.stream(request)]
        assert events[-1].finish_reason == "deadline"


async def test_slow_reader_is_aborted_and_its_memory_dropped():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine, slow_reader_timeout_s=0.05) as async_engine:
        stream = async_engine.stream_batches(request_of(engine))
        await anext(stream)
        assert await is_idle(engine)  # nobody reads: the limit passes
        with pytest.raises(SlowReaderError, match=r"0\.05 s"):
            async for _ in stream:
                pass


async def test_slow_reader_of_a_finished_request_is_refused_too():
    engine, ended = FakeEngine(), asyncio.Event()

    def observe(request, event):
        if event.finish_reason is not None:
            ended.set()

    async with running(engine, slow_reader_timeout_s=0.05, observer=observe) as async_engine:
        stream = async_engine.stream_batches(request_of(engine, max_tokens=100))
        await anext(stream)
        await asyncio.wait_for(ended.wait(), TIMEOUT_S)  # all has been delivered
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, passed.set)
        await passed.wait()
        with pytest.raises(SlowReaderError):
            await anext(stream)


async def test_a_reader_slower_than_the_engine_gets_larger_batches_and_all_tokens():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        stream = async_engine.stream_batches(request_of(engine, max_tokens=200))
        batches = [await anext(stream)]
        assert await is_idle(engine)  # all 200 are computed while nothing is taken
        batches += [batch async for batch in stream]
        assert [e.token_id for batch in batches for e in batch] == expected_tokens([1, 2, 3], 200)
        assert len(batches) < 200


async def test_engine_failure_fails_every_stream_and_all_that_follows():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        streams = [async_engine.stream(request_of(engine)) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        stopped = asyncio.ensure_future(async_engine.wait_stopped())
        engine.fail.set()
        for stream in streams:
            with pytest.raises(EngineFailedError, match="the device was lost") as caught:
                async for _ in stream:
                    pass
            assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(EngineFailedError, match="the device was lost"):
            await stopped
        assert async_engine.state == "failed"
        with pytest.raises(NotServingError):
            await tokens_of(async_engine.stream(request_of(engine)))
        with pytest.raises(NotServingError):
            await async_engine.abort("x")
        assert await async_engine.drain(TIMEOUT_S) is True


@pytest.mark.parametrize("how_it_comes_back", ["with events", "with an error"])
async def test_a_step_over_the_limit_fails_all_and_what_comes_of_it_is_not_used(
    how_it_comes_back: str, monkeypatch: pytest.MonkeyPatch
):
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    passed_s = stopped_clock(monkeypatch)
    async with running(engine, step_timeout_s=0.2) as async_engine:
        passed_s.append(0.4)  # idle: no step, no limit
        await asyncio.sleep(0.05)  # in which the watchdog looks some times
        streams = [async_engine.stream(request_of(engine)) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        engine.may_step.clear()
        assert await asyncio.to_thread(engine.hangs.wait, TIMEOUT_S)
        passed_s.append(0.3)
        for stream in streams:
            with pytest.raises(EngineFailedError, match=r"StepTimeoutError: a step took longer than 0\.2 s"):
                async for _ in stream:
                    pass
        assert async_engine.state == "failed"
        with pytest.raises(EngineFailedError, match="longer than"):
            await async_engine.wait_stopped()
        with pytest.raises(NotServingError):
            await tokens_of(async_engine.stream(request_of(engine)))
        assert await async_engine.close(0.01) is False
        if how_it_comes_back == "with an error":
            engine.fail.set()
        engine.may_step.set()
        assert await async_engine.close(TIMEOUT_S) is True and async_engine.state == "failed"


async def test_an_end_from_outside_while_commands_run_leaves_nobody_waiting():
    """As of a process of the cluster that has gone: a thread that listens to it says so at any moment."""

    class Unlucky(FakeEngine):
        def add_request(self, request):
            other = threading.Thread(target=async_engine.fail, args=(RuntimeError("a process is lost"),))
            other.start()
            other.join()
            super().add_request(request)

    engine, may_go_on = Unlucky(), threading.Event()
    async with running(engine) as async_engine:
        holding = async_engine._post(lambda _: may_go_on.wait(TIMEOUT_S))
        being_added, behind = [asyncio.ensure_future(tokens_of(async_engine.stream(request_of(engine)))) for _ in "ab"]
        aborting = asyncio.ensure_future(async_engine.abort("x"))
        while len(async_engine._commands) < 3:
            await asyncio.sleep(0)
        may_go_on.set()
        assert holding.result(TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            for waiting in (being_added, behind, aborting):
                with pytest.raises(NotServingError, match="failed"):
                    await waiting
        with pytest.raises(EngineFailedError, match="a process is lost"):
            await async_engine.wait_stopped()
        assert engine.num_steps == 0, "the device is not to be touched again"


async def test_drain_lets_running_requests_finish_and_takes_no_new_one():
    engine = FakeEngine(step_delay_s=0.001)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine, max_tokens=50))
        tokens = [(await anext(stream)).token_id]
        draining = asyncio.ensure_future(async_engine.drain(TIMEOUT_S))
        await asyncio.sleep(0)  # lets it start
        with pytest.raises(NotServingError, match="draining"):
            await tokens_of(async_engine.stream(request_of(engine)))
        tokens += await tokens_of(stream)
        assert tokens == expected_tokens([1, 2, 3], 50)
        assert await draining is True


async def test_drain_aborts_at_the_limit():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine))
        await anext(stream)
        assert await async_engine.drain(0.05) is False
        assert engine.idle.is_set()
        assert [event async for event in stream][-1].finish_reason == "abort"


async def test_an_idle_engine_has_drained_within_any_limit():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        assert await tokens_of(async_engine.stream(request_of(engine)))
        assert await async_engine.drain(0.0) is True


async def test_close_ends_running_streams():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        stream = async_engine.stream(request_of(engine))
        await anext(stream)
        assert await async_engine.close()
        with pytest.raises(NotServingError, match="closed"):
            await tokens_of(stream)


async def test_an_idle_engine_does_not_step():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        await tokens_of(async_engine.stream(request_of(engine, max_tokens=3)))
        num_steps = engine.num_steps
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, passed.set)
        await passed.wait()
        assert engine.num_steps == num_steps


async def test_one_delivery_a_step_whatever_the_number_of_streams(monkeypatch):
    engine, loop = FakeEngine(), asyncio.get_running_loop()
    async with running(engine) as async_engine:
        deliveries, call_soon = [], loop.call_soon_threadsafe

        def counting(callback, *args, **kwargs):
            if callback == async_engine._deliver:
                deliveries.append(len(args[0]))
            return call_soon(callback, *args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        requests = [request_of(engine, max_tokens=30) for _ in range(8)]
        await asyncio.gather(*(tokens_of(async_engine.stream(request)) for request in requests))
        assert sum(deliveries) == 8 * 30
        assert len(deliveries) <= engine.num_steps


async def test_streams_of_two_event_loops():
    engine = FakeEngine()
    async with running(engine) as async_engine:
        results = {}

        def in_another_loop():
            results["other"] = asyncio.run(tokens_of(async_engine.stream(request_of(engine, [9], max_tokens=40))))

        other = threading.Thread(target=in_another_loop)
        other.start()
        results["here"] = await tokens_of(async_engine.stream(request_of(engine, [4], max_tokens=40)))
        await asyncio.to_thread(other.join, TIMEOUT_S)
        assert results == {"here": expected_tokens([4], 40), "other": expected_tokens([9], 40)}


async def test_a_loop_closed_under_its_stream_frees_the_request():
    engine = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001)
    async with running(engine) as async_engine:
        kept = []  # so that nothing is closed for being dropped

        def leave_a_stream_behind():
            loop = asyncio.new_event_loop()
            stream = async_engine.stream(request_of(engine))
            kept.append(stream)
            loop.run_until_complete(anext(stream))
            loop.close()

        await asyncio.to_thread(leave_a_stream_behind)
        assert await is_idle(engine)
        assert await tokens_of(async_engine.stream(request_of(engine, max_tokens=2))) == expected_tokens([1, 2, 3], 2)


async def test_observer_sees_every_event_of_dropped_streams_too():
    engine, seen, ended = FakeEngine(max_model_len=ENDLESS_LEN, step_delay_s=0.001), [], asyncio.Event()

    def observe(request, event):
        seen.append((request.request_id, event.index, event.finish_reason))
        if event.finish_reason is not None:
            ended.set()

    async with running(engine, observer=observe) as async_engine:
        stream = async_engine.stream(request_of(engine, request_id="a"))
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(ended.wait(), TIMEOUT_S)
    assert [index for _, index, _ in seen] == list(range(len(seen)))
    assert seen[-1][2] == "abort"
