"""Many requests on one call: every one's tokens, failures by name, and nothing left whatever ends the call."""

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import numpy as np
import pytest

from jaxserve.server.client import AsyncClient, Client, batch_request
from jaxserve.server.client_codec import Chunk, RequestFailure
from jaxserve.server.v1 import inference_pb2 as pb
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import embedding_of_prompt, expected_tokens

Code = grpc.StatusCode


async def collect(stream: AsyncIterator[Chunk | RequestFailure]) -> tuple[dict[str, list[int]], list[RequestFailure]]:
    tokens: dict[str, list[int]] = {}
    failures = []
    async for message in stream:
        if isinstance(message, Chunk):
            tokens.setdefault(message.request_id, []).extend(message.token_ids)
        else:
            failures.append(message)
    return tokens, failures


async def test_every_request_has_its_own_tokens():
    async with serving() as s:
        prompts = {f"r{i}": "abc" * (i + 1) for i in range(12)}
        requests = [batch_request(name, p, max_tokens=5 + len(p)) for name, p in prompts.items()]
        tokens, failures = await collect(s.client.generate_batch(requests))
        assert not failures
        assert tokens == {name: expected_tokens(p, 5 + len(p)) for name, p in prompts.items()}
        assert await s.is_idle()


async def test_requests_may_come_while_others_run():
    async with serving(endless_engine()) as s:
        seen = asyncio.Event()

        async def requests():
            yield batch_request("first", "a", max_tokens=400)
            await seen.wait()  # its tokens come before there is a second request
            yield batch_request("second", "b", max_tokens=3)

        ends = []
        async for message in s.client.generate_batch(requests()):
            assert isinstance(message, Chunk)
            seen.set()
            if message.finish_reason:
                ends.append(message.request_id)
        assert sorted(ends) == ["first", "second"]


async def test_a_failure_is_one_requests_own():
    async with serving() as s:
        requests = [
            batch_request("good", "abc", max_tokens=4),
            batch_request("hot", "abc", temperature=-1.0),
            batch_request("empty", token_ids=[]),
            pb.GenerateRequest(request_id="nothing"),
        ]
        tokens, failures = await collect(s.client.generate_batch(requests))
        assert tokens == {"good": expected_tokens("abc", 4)}
        told = {f.request_id: (f.code, f.field) for f in failures}
        invalid = Code.INVALID_ARGUMENT.value[0]
        assert told == {"hot": (invalid, "temperature"), "empty": (invalid, "prompt"), "nothing": (invalid, "prompt")}
        assert all(f.message.startswith(f"{f.field}: ") for f in failures)


async def test_a_request_without_an_id_ends_the_call():
    async with serving(endless_engine()) as s:
        requests = [batch_request("good", "abc"), pb.GenerateRequest(text="abc")]
        with pytest.raises(grpc.aio.AioRpcError, match="request_id: every request of a batch needs one") as caught:
            await collect(s.client.generate_batch(requests))
        assert caught.value.code() == Code.INVALID_ARGUMENT
        assert await s.is_idle()


async def test_leaving_ends_all():
    async with serving(endless_engine()) as s:
        stream = s.client.generate_batch([batch_request(f"r{i}", "abc") for i in range(5)])
        seen = set()
        async for message in stream:
            seen.add(message.request_id)
            if len(seen) == 5:
                break
        await stream.aclose()
        assert await s.is_idle()


async def test_a_deadline_ends_all():
    async with serving(endless_engine()) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(s.client.generate_batch([batch_request("a", "abc"), batch_request("b", "x")], timeout_s=0.3))
        assert caught.value.code() == Code.DEADLINE_EXCEEDED
        assert await s.is_idle()


@pytest.mark.parametrize("name", [None, "ann"])  # a name goes through an interceptor
async def test_a_call_that_ends_while_requests_are_sent_ends_by_its_own_status(name: str | None):
    async def requests(last: pb.GenerateRequest | None) -> AsyncIterator[pb.GenerateRequest]:
        for i in range(10**6):
            yield batch_request(f"{i}", "abc", max_tokens=1)
            if last is not None and i == 20:
                yield last
            if i % 10 == 0:
                await asyncio.sleep(0)

    nameless = pb.GenerateRequest(text="abc")
    ends = [(None, 0.05, Code.DEADLINE_EXCEEDED), (nameless, None, Code.INVALID_ARGUMENT)]
    async with serving(endless_engine(max_num_waiting=10**6)) as s, AsyncClient(s.target, name=name) as client:
        for last, timeout_s, code in ends * 6:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in client.generate_batch(requests(last), timeout_s=timeout_s):
                    pass
            assert caught.value.code() == code
            if last is not None:
                assert dict(caught.value.trailing_metadata() or ())["jaxserve-field"] == "request_id"


async def test_a_full_queue_refuses_one_and_keeps_the_others():
    engine = endless_engine(max_num_waiting=2)
    async with serving(engine) as s:
        requests = [batch_request(f"r{i}", "abc", max_tokens=50) for i in range(3)]
        may_go_on = threading.Event()  # once all are there: the first two could have ended before
        s.server.engine._post(lambda _: may_go_on.wait(TIMEOUT_S))
        collecting = asyncio.create_task(collect(s.client.generate_batch(requests)))
        async with asyncio.timeout(TIMEOUT_S):
            while len(s.server.engine._commands) < 3:
                await asyncio.sleep(0.001)
        may_go_on.set()
        tokens, failures = await collecting
        assert len(tokens) == 2 and all(len(t) == 50 for t in tokens.values())
        assert [f.code for f in failures] == [Code.RESOURCE_EXHAUSTED.value[0]]


async def test_embeddings():
    async with serving() as s:
        one = await s.client.embed("abc")
        np.testing.assert_allclose(one.values, embedding_of_prompt(b"abc", "last", True), rtol=1e-6)
        assert one.prompt_len == 3
        two = await s.client.embed(token_ids=[5, 7], pooling="mean", normalize=False, request_id="mine")
        np.testing.assert_allclose(two.values, [6.0, 1.0])
        assert (two.request_id, two.prompt_len) == ("mine", 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.client.embed(token_ids=[])
        assert caught.value.code() == Code.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata() or ())["jaxserve-field"] == "prompt"
        blocking = await asyncio.to_thread(_embed, s.target)
        np.testing.assert_allclose(blocking, one.values)
        assert await s.is_idle()


def _embed(target: str) -> np.ndarray:
    with Client(target) as client:
        assert len(list(client.generate_batch([batch_request("x", "ab", max_tokens=2)]))) >= 1
        return client.embed("abc").values


async def test_log_probabilities_of_the_prompt_arrive():
    async with serving() as s:
        chunks = [c async for c in s.client.generate("abc", max_tokens=3, prompt_logprobs=2, n=2)]
        scored = [c for c in chunks if c.prompt_logprobs]
        assert len(scored) == 1 and scored[0].choice == 0 and scored[0].index == 0
        assert [e.token_id for e in scored[0].prompt_logprobs] == [98, 99]
        assert scored[0].prompt_logprobs[0].top == ((98, -0.25), (99, -1.25))
