"""Raw connections: clients that leave, stall, or send what is no HTTP. Nothing of them stays in the engine."""

import asyncio
import gc
import json
import os
import socket
import threading
from contextlib import asynccontextmanager

import pytest

from jaxserve.engine.async_engine import EngineFailedError
from jaxserve.server.http import guard, listener
from tests.server.conftest import TIMEOUT_S, endless_engine
from tests.server.fake_engine import expected_text
from tests.server.http.conftest import Web, web

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 10**5, "stream": True}


def request(body: object, path: str = COMPLETIONS, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    fields = {"host": "x", "content_type": "application/json", "content_length": str(len(data)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@asynccontextmanager
async def connected(site: Web, *, sent: bytes = b"", **options):
    """``sent``: what is there before the server, whose loop is this one, sees that there is a connection."""
    sock = socket.create_connection(("127.0.0.1", site.served.server.http_port))
    sock.sendall(sent)
    reader, writer = await asyncio.open_connection(sock=sock, **options)
    try:
        yield reader, writer
    finally:
        writer.close()


async def until_running(site: Web, num_requests: int = 1) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while len(site.engine.requests) < num_requests:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 3])
async def test_a_client_that_leaves_ends_its_requests(stream: bool, num_prompts: int):
    async with web(endless_engine()) as site:
        for how in ("close", "half-close", "reset"):
            before = len(site.engine.requests)
            body = LONG | {"prompt": ["a"] * num_prompts, "stream": stream}
            async with connected(site) as (reader, writer):
                writer.write(request(body))
                await until_running(site, before + num_prompts)
                if stream:
                    assert b"data: " in await reader.readuntil(b"data: ")
                if how == "half-close":
                    writer.write_eof()
                elif how == "reset":
                    writer.transport.abort()
                else:
                    writer.close()
                assert await site.served.is_idle(), how
        await site.post(COMPLETIONS, prompt="a", max_tokens=2)


async def test_a_reader_that_takes_nothing_is_cut(tmp_path):
    async with web(endless_engine(text_scale=20_000), slow_reader_timeout_s=0.2) as site:
        port = site.served.server.http_port
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.to_thread(sock.connect, ("127.0.0.1", port))
            sock.sendall(request(LONG))
            await until_running(site)
            assert await site.served.is_idle()
            listening = site.served.server._http
            assert listening is not None
            async with asyncio.timeout(TIMEOUT_S):
                while listening._state.connections:  # its buffers are not kept either
                    await asyncio.sleep(0.005)
        assert (await site.post(COMPLETIONS, prompt="a", max_tokens=1))["choices"]


async def test_a_reader_that_is_slow_gets_everything():
    async with web(endless_engine(text_scale=2000)) as site:
        async with connected(site, limit=2**24) as (reader, writer):
            writer.write(request(LONG | {"max_tokens": 300}, connection="close"))
            data = b""
            while piece := await reader.read(50_000):
                data += piece
                await asyncio.sleep(0.002)
        chunks = [json.loads(e.split(b"data: ", 1)[1]) for e in _events(data) if b"[DONE]" not in e]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == "".join(c * 2000 for c in expected_text("a", 300))


def _events(data: bytes) -> list[bytes]:
    """The events of a chunked answer."""
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return [event for event in body.split(b"\n\n") if event]


async def test_what_is_no_http_is_400_and_closed(site: Web):
    for data in (b"\x16\x03\x01 hello\r\n\r\n", b"GET /\r\n\r\n", b"GET /" + b"a" * 70_000):
        async with connected(site) as (reader, writer):
            writer.write(data)
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


async def test_headers_and_bodies_have_their_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "HEADER_TIMEOUT_S", 0.1)
    async with web(body_timeout_s=0.1) as site:
        for begun in (b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nhost: x\r\n"):
            async with connected(site) as (reader, writer):
                writer.write(begun)
                assert await reader.read() == b""
        async with connected(site, sent=request({"prompt": "a"})[:-3]) as (reader, writer):
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 408 ") and b"0.1 s" in answer
        # Between requests a connection may rest for longer.
        asked = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        async with connected(site, sent=asked) as (reader, writer):
            assert b"ready" in await reader.readuntil(b"}")
            await asyncio.sleep(0.2)
            writer.write(asked)
            assert b"ready" in await reader.readuntil(b"}")
        assert site.engine.requests == []


async def test_a_huge_content_length_is_refused_before_the_body_comes(site: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "DISCARD_TIMEOUT_S", 0.05)
    for expect in ({}, {"expect": "100-continue"}):
        async with connected(site) as (reader, writer):
            writer.write(request({"prompt": "a"}, content_length="99999999999", **expect))
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            assert b"connection: close" in await reader.read()
    assert site.engine.requests == []


async def test_requests_in_one_packet_are_answered_in_order(site: Web):
    async with connected(site) as (reader, writer):
        writer.write(request({"prompt": "a", "max_tokens": 2}) + request({"prompt": "b", "max_tokens": 2}))
        for prompt in ("a", "b"):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.startswith(b"content-length"))
            answer = json.loads(await reader.readexactly(length))
            assert answer["choices"][0]["text"] == expected_text(prompt, 2)


async def test_what_work_ends_by_after_its_client_has_left_is_not_logged(caplog: pytest.LogCaptureFixture):
    async def receive() -> dict[str, str]:
        await has_begun.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            has_begun.set()
            await asyncio.sleep(TIMEOUT_S)
        finally:
            raise EngineFailedError("the engine failed meanwhile")

    has_begun = asyncio.Event()
    with pytest.raises(guard.ClientLeftError):
        await guard.until_left(receive, work())
    gc.collect()
    assert not caplog.records


async def test_no_file_descriptor_is_left():
    async with web(endless_engine()) as site:
        await site.post(COMPLETIONS, prompt="a", max_tokens=1)

        def num_open() -> int:
            return len(os.listdir("/proc/self/fd"))

        before = num_open()
        for _ in range(20):
            async with connected(site) as (reader, writer):
                writer.write(request(LONG))
                await reader.readuntil(b"data: ")
        assert await site.served.is_idle()
        async with asyncio.timeout(TIMEOUT_S):
            while num_open() > before:
                await asyncio.sleep(0.005)


async def test_only_what_is_small_and_plain_is_read_on_the_event_loop(site: Web, monkeypatch: pytest.MonkeyPatch):
    """Whatever the headers say: a prompt that takes long would hold up every stream."""
    threads: list[bool] = []
    make_request = site.engine.make_request

    def noting(*args, **fields):
        threads.append(threading.current_thread() is not threading.main_thread())
        return make_request(*args, **fields)

    monkeypatch.setattr(site.engine, "make_request", noting)
    for path in (COMPLETIONS, "/generate/stream"):
        for fields in ({}, {"regex": "a+"}, {"pad": True}, {"lie": True}):
            body = {"prompt": "a", "max_tokens": 2}
            if "regex" in fields:
                body["structured_outputs"] = fields
            if fields.keys() & {"pad", "lie"}:
                body["prompt"] = "a" * 390 + "\u00e9"  # six bytes more in JSON
                body["bad_words"] = ["b" * 200]
            data = request(body, path)
            if "lie" in fields:
                head, _, content = data.partition(b"\r\n\r\n")
                head = head.replace(b"content-length: %d" % len(content), b"content-length: 9")
                head += b"\r\ntransfer-encoding: chunked"
                data = head + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
            async with connected(site) as (reader, writer):
                writer.write(data)
                assert (await reader.readline()).startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")), (path, fields)
    assert threads == [False, True, True, True] * 2
