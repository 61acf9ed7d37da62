"""Limits of a server on its clients, over gRPC and HTTP alike."""

import grpc
import httpx2
import websockets.asyncio.client as ws

from jaxserve.server.client import AsyncClient, batch_request
from jaxserve.server.client_codec import Chunk, RequestFailure
from jaxserve.server.clients import CLIENT_HEADER, address_of_peer
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import expected_text
from tests.server.http.conftest import web
from tests.server.test_service import refused, text_of

COMPLETIONS = "/v1/completions"


async def test_concurrent_requests_are_counted_over_both_ways():
    async with (
        serving(endless_engine(), http_port=0, max_concurrent_requests=2) as s,
        httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S) as http,
    ):
        one, two = s.client.generate("a"), s.client.generate("b")
        await anext(one)
        await anext(two)
        error = await refused(s.client.generate("c"))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "max_concurrent_requests=2" in str(
            error.details()
        )
        for path, body in ((COMPLETIONS, {"prompt": "c"}), ("/generate/stream", {"prompt": "c"})):
            answer = await http.post(path, json=body)
            assert answer.status_code == 429 and "max_concurrent_requests=2" in answer.text
        assert (await refused(s.client.embed("c"))).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        [failure] = [message async for message in s.client.generate_batch([batch_request("d", "c")])]
        assert isinstance(failure, RequestFailure) and "max_concurrent_requests=2" in str(failure)
        await one.aclose()
        await two.aclose()
        assert await s.is_idle()
        batch = [batch_request(name, "a", max_tokens=2) for name in "ef"]
        assert all(isinstance(message, Chunk) for message in [m async for m in s.client.generate_batch(batch)])
        answer = await http.post(COMPLETIONS, json={"prompt": ["a", "b"], "max_tokens": 2})
        assert answer.status_code == 200
        answer = await http.post(COMPLETIONS, json={"prompt": ["a", "b", "c"], "max_tokens": 2})
        assert answer.status_code == 429
        for stream in (True, False):  # what was refused, refused by the engine, or answered is given back
            for body in (
                {"prompt": "a", "max_tokens": 2},
                {"prompt": "a", "temperature": -1},
                {"prompt": ["a"] * 3},
            ):
                for _ in range(3):
                    await http.post(COMPLETIONS, json={"prompt": "a", **body, "stream": stream})
        assert await text_of(s.client.generate("a", max_tokens=2)) == expected_text("a", 2)
        answer = await http.post(COMPLETIONS, json={"prompt": ["a", "b"], "max_tokens": 2})
        assert answer.status_code == 200


async def test_requests_of_one_client_are_counted_over_both_ways():
    async with (
        serving(endless_engine(), http_port=0, max_requests_per_client=1) as s,
        httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S, headers={CLIENT_HEADER: "ann"}) as http,
        AsyncClient(s.target, name="ann") as ann,
        AsyncClient(s.target, name="bob") as bob,
    ):
        one = ann.generate("a")
        await anext(one)
        error = await refused(ann.generate("b"))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "max_requests_per_client=1" in str(error)
        assert (await http.post(COMPLETIONS, json={"prompt": "b"})).status_code == 429
        assert await text_of(bob.generate("a", max_tokens=2)) == expected_text("a", 2)
        assert await text_of(s.client.generate("a", max_tokens=2)) == expected_text("a", 2)
        await one.aclose()
        assert await s.is_idle()
        assert await text_of(ann.generate("a", max_tokens=2)) == expected_text("a", 2)


async def test_every_request_is_of_a_client(tmp_path):
    keys_file = tmp_path / "keys"
    keys_file.write_text("key-of-ann\nkey-of-bob\n")

    async def names(*headers: str, **options) -> list[str]:
        """The clients of requests by each way: without a header, then with each of ``headers``."""
        async with serving(http_port=0, **options) as s:
            for name, value in [("x", "y"), *[tuple(header.split(": ")) for header in headers]]:
                is_key = name == "authorization"
                key = value.removeprefix("Bearer ") if is_key else None
                async with (
                    AsyncClient(s.target, api_key=key, name=value if name == CLIENT_HEADER else None) as grpc_client,
                    httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S, headers={name: value}) as http,
                ):
                    if options and not is_key:
                        continue
                    await text_of(grpc_client.generate("a", max_tokens=1))
                    await text_of(grpc_client.generate_batch([batch_request("a", "a", max_tokens=1)]))
                    await grpc_client.embed("a")
                    await http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
                    messages = [{"role": "user", "content": "a"}]
                    await http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
                    await http.post("/v1/embeddings", json={"input": "a"})
                    await http.post("/generate/stream", json={"prompt": "a", "max_tokens": 1})
                    headers_of_socket = {name: value}
                    url = s.url.replace("http", "ws") + "/generate/ws"
                    async with ws.connect(url, additional_headers=headers_of_socket) as socket:
                        await socket.send('{"prompt": "a", "max_tokens": 1}')
                        await socket.recv()
            return [request.client for request in s.engine.requests]

    assert await names(f"{CLIENT_HEADER}: ann") == ["address 127.0.0.1"] * 8 + ["name ann"] * 8
    known = await names("authorization: Bearer key-of-ann", "authorization: Bearer key-of-bob", api_keys_file=keys_file)
    assert len(set(known[:8])) == len(set(known[8:])) == 1 and len(set(known)) == 2 and "key-of" not in str(known)


def test_addresses_of_peers():
    assert address_of_peer("ipv4:10.0.0.1:50") == "10.0.0.1"
    assert address_of_peer("ipv6:%5B::1%5D:50") == address_of_peer("ipv6:[::1]:50") == "::1"
    assert address_of_peer("unix:") == "unix:"


async def test_output_tokens():
    async with web(max_output_tokens=5) as site:
        status, error = await site.refused(COMPLETIONS, prompt="a", max_tokens=6)
        assert (status, error["param"]) == (400, "max_tokens") and "6" in error["message"] and "5" in error["message"]
        status, error = await site.refused(COMPLETIONS, prompt="a", min_tokens=6)
        assert (status, error["param"]) == (400, "min_tokens")
        assert (await site.post(COMPLETIONS, prompt="a", max_tokens=5))["usage"]["completion_tokens"] == 5
        assert (await site.post(COMPLETIONS, prompt="a"))["usage"]["completion_tokens"] == 5
        messages = [{"role": "user", "content": "hi"}]
        status, error = await site.refused("/v1/chat/completions", messages=messages, max_completion_tokens=6)
        assert (status, error["param"]) == (400, "max_completion_tokens")
        answer = await site.post("/v1/chat/completions", messages=messages)
        assert answer["usage"]["completion_tokens"] == 5
        async with AsyncClient(site.served.target) as client:
            assert await text_of(client.generate("abc")) == expected_text("abc", 5)
            assert (await refused(client.generate("abc", max_tokens=6))).code() == grpc.StatusCode.INVALID_ARGUMENT
        prompt = "a" * 397  # of 400: the model's own limit comes first
        assert (await site.post(COMPLETIONS, prompt=prompt))["usage"]["completion_tokens"] == 3


async def test_time_of_a_request():
    async with web(endless_engine(), request_timeout_s=0.1) as site:
        status, error = await site.refused(COMPLETIONS, prompt="a", max_tokens=10**5)
        assert (status, error["code"]) == (504, "deadline_exceeded")
        async with AsyncClient(site.served.target) as client:
            for timeout_s in (None, TIMEOUT_S):
                error = await refused(client.generate("abc", timeout_s=timeout_s))
                assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        headers = {"jaxserve-timeout-s": "60"}
        answer = await site.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 10**5}, headers=headers)
        assert answer.status_code == 504
