"""What an operator asks of a running server: its load, to drain, other weights; and the client that tries again."""

import asyncio
import threading

import grpc
import grpc.aio
import pytest

from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer

Code = grpc.StatusCode


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_load():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("abc")
        await anext(stream)
        async with asyncio.timeout(TIMEOUT_S):
            while not (load := await s.client.get_load()).num_running:  # a tenth of a second old at most
                await asyncio.sleep(0.01)
        assert (load.num_running, load.num_pages, load.recompilations_after_ready) == (1, 100, 0)
        await stream.aclose()


async def test_drain_lets_running_requests_finish_and_takes_no_more():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("abc", max_tokens=100)
        await anext(stream)
        draining = asyncio.create_task(s.client.drain(30))
        rest = [chunk async for chunk in stream]
        assert rest[-1].finish_reason == "length" and await draining
        error = await refused(anext(s.client.generate("abc")))
        assert error.code() == Code.UNAVAILABLE
        assert await s.client.drain()  # again: nothing is left


async def test_drain_aborts_at_its_limit():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("abc")
        await anext(stream)
        reading = asyncio.create_task(refused(_all(stream)))
        assert not await s.client.drain(0.1)
        assert (await reading).code() == Code.UNAVAILABLE
        error = await refused(s.client.drain(-1))
        assert error.code() == Code.INVALID_ARGUMENT and "timeout_s: -1 is not" in (error.details() or "")


async def _all(stream) -> None:
    async for _ in stream:
        pass


async def test_weights_come_from_allowed_folders_only(tmp_path):
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "new").write_text(folder.name)
    (allowed / "link").symlink_to(other / "new")
    async with serving(weight_folders=(allowed,)) as s:
        await s.client.update_weights(str(allowed / "new"))
        assert s.engine.params == "allowed"
        for path in (other / "new", allowed / "link", allowed / ".." / "other" / "new", "/", ""):
            error = await refused(s.client.update_weights(str(path)))
            assert error.code() == Code.PERMISSION_DENIED, path
        error = await refused(s.client.update_weights(str(allowed / "missing")))
        assert error.code() == Code.INVALID_ARGUMENT and "no checkpoint is there" in (error.details() or "")
        assert dict(error.trailing_metadata() or ())["jaxserve-field"] == "path"
        assert s.engine.params == "allowed"
    async with serving() as s:
        error = await refused(s.client.update_weights(str(allowed / "new")))
        assert error.code() == Code.PERMISSION_DENIED


async def test_while_it_loads():
    may_build = threading.Event()
    async with serving(may_build=may_build, wait_ready=False) as s:
        for call in (s.client.get_load(), s.client.drain(1)):
            assert (await refused(call)).code() == Code.UNAVAILABLE


async def test_the_client_tries_again_while_the_queue_is_full():
    engine = FakeEngine(tokenizer=byte_tokenizer(), max_num_waiting=1, step_delay_s=0.002)
    async with serving(engine) as s:
        first = s.client.generate("abc", max_tokens=30)
        await anext(first)
        reading = asyncio.create_task(_all(first))
        again = [chunk async for chunk in s.client.generate("abc", max_tokens=3)]  # the first ends meanwhile
        assert again[-1].finish_reason == "length"
        await reading
        assert len(engine.requests) == 2


async def test_the_client_does_not_retry_what_was_refused_for_good():
    async with serving() as s:
        asked = []
        make_request = s.engine.make_request
        s.engine.make_request = lambda *a, **k: asked.append(1) or make_request(*a, **k)  # pyright: ignore[reportAttributeAccessIssue]
        error = await refused(anext(s.client.generate(token_ids=[])))
        assert error.code() == Code.INVALID_ARGUMENT and len(asked) == 1


async def test_model_info_tells_the_default_sampling():
    engine = FakeEngine(tokenizer=byte_tokenizer())
    engine.sampling_defaults = {"temperature": 0.6, "top_k": 20}
    async with serving(engine) as s:
        defaults = (await s.client.model_info()).default_sampling
        assert (defaults.temperature, defaults.top_k, defaults.HasField("top_p")) == (0.6, 20, False)
