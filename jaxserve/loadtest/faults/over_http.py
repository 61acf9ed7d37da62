"""HTTP clients, on sockets of their own: a client library would not do most of this. ``KINDS`` names them."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NamedTuple

from websockets.asyncio.client import connect

from jaxserve.loadtest.faults.known import Kind, Known, Site, WrongAnswerError, expect, read, some
from jaxserve.loadtest.faults.tap import reset

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PLAIN, COMPLETIONS, SOCKET = "/generate/stream", "/v1/completions", "/generate/ws"
DEADLINE = "deadline_exceeded"


class Event(NamedTuple):
    choice: int
    token_ids: list[int]
    text: str
    finish_reason: str | None


class ToldError(Exception):
    """The answer is an error; its code."""


@asynccontextmanager
async def connection(site: Site) -> AsyncGenerator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.http_port, limit=2**20)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request. ``length``: what it says that its body has."""
    lines = [f"POST {path} HTTP/1.1", "host: soak", "content-type: application/json", *headers]
    lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def body_of(known: Known, **fields: Any) -> bytes:
    return json.dumps({"prompt": known.token_ids, **known.sampling, **fields}).encode()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body; the body is left unread where its length is not told."""
    head = await reader.readuntil(b"\r\n\r\n")
    told = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
    body = await reader.readexactly(int(told[0].split(b":")[1])) if told else b""
    return int(head.split(b" ", 2)[1]), body


async def events(reader: asyncio.StreamReader) -> AsyncGenerator[Event]:
    """Those of ``/generate/stream``. Raises ToldError, and EOFError where the connection ends before they do."""
    status, body = await answer_of(reader)
    if status != 200:
        event_of(body)
        raise WrongAnswerError(f"HTTP {status}: {body[:200]!r}")
    while line := await reader.readline():
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            yield event_of(line[6:])
    raise EOFError("the connection has ended")


def event_of(text: str | bytes) -> Event:
    event = json.loads(text)
    if "error" in event:
        raise ToldError(event["error"]["code"])
    return Event(event.get("choice", 0), event.get("token_ids", []), event.get("text", ""), event.get("finish_reason"))


async def whole(site: Site, known: Known, r: random.Random) -> str:
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))
        return await read(events(reader), known)


async def impatient(site: Site, known: Known, r: random.Random) -> str:
    """Takes a refusal for an answer, as all do here."""
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))
        try:
            return await read(events(reader), known)
        except ToldError as error:
            return expect(str(error), "queue_full", "not_serving")


async def slow(site: Site, known: Known, r: random.Random) -> str:
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))
        return await read(events(reader), known, pause_s=0.02 * r.random())


async def completion(site: Site, known: Known, r: random.Random) -> str:
    """Not streamed, two on one connection."""
    async with connection(site) as (reader, writer):
        for _ in range(2):
            writer.write(post(COMPLETIONS, body_of(known)))
            status, body = await answer_of(reader)
            if status != 200:
                raise WrongAnswerError(f"HTTP {status}: {body[:200]!r}")
            answer = json.loads(body)
            expect(answer["choices"][0]["text"], known.text)
            expect(answer["usage"]["completion_tokens"], len(known.tokens))
    return "whole"


async def leave(site: Site, known: Known, r: random.Random) -> str:
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))
        if r.random() < 0.3:
            await asyncio.sleep(0.2 * r.random())
            return "left"  # before there was anything to read, mostly
        async with aclosing(events(reader)) as parts:
            return await read(parts, known, leave_after=some(known, r))


async def cut(site: Site, known: Known, r: random.Random) -> str:
    """Leaves by RST."""
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))
        async with aclosing(events(reader)) as parts:
            outcome = await read(parts, known, leave_after=some(known, r))
        reset(writer)
    return outcome


async def half_close(site: Site, known: Known, r: random.Random) -> str:
    """Closes its half once there is a token: to this server, that is leaving."""
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known)))

        async def closing() -> AsyncIterator[Event]:
            is_first = True
            async for event in events(reader):
                yield event
                if is_first:
                    is_first = False
                    writer.write_eof()

        try:
            return await read(closing(), known)
        except (EOFError, ConnectionError):
            return "closed"


async def deadline(site: Site, known: Known, r: random.Random) -> str:
    async with connection(site) as (reader, writer):
        writer.write(post(PLAIN, body_of(known), f"jaxserve-timeout-s: {r.uniform(0.001, 0.2):.4f}"))
        try:
            return await read(events(reader), known)
        except ToldError as error:
            return expect(str(error), DEADLINE)


async def stall(site: Site, known: Known, r: random.Random) -> str:
    """Reads nothing of an answer and leaves in the end: what was sent stands on the way as long."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", site.http_port))
        body = body_of(known, n=4, ignore_eos=True, stream=True, logprobs=5)
        await loop.sock_sendall(sock, post(COMPLETIONS, body))
        await asyncio.sleep(site.info.slow_reader_timeout_s * 2)
    finally:
        sock.close()
    return "left"


async def websocket(site: Site, known: Known, r: random.Random) -> str:
    """Two requests, one of which is ended by a message."""
    async with connect(f"ws://127.0.0.1:{site.http_port}{SOCKET}") as socket:

        async def parts(aborts: bool) -> AsyncIterator[Event]:
            event = None
            while event is None or event.finish_reason is None:
                event = event_of(await socket.recv())
                yield event
                if aborts:
                    aborts = False
                    await socket.send('{"abort": true}')

        await socket.send(body_of(known).decode())
        await read(parts(False), known)
        await socket.send(body_of(known).decode())
        return await read(parts(True), known)


async def websocket_leave(site: Site, known: Known, r: random.Random) -> str:
    async with connect(f"ws://127.0.0.1:{site.http_port}{SOCKET}") as socket:
        await socket.send(body_of(known).decode())
        event_of(await socket.recv())
    return "left"


async def no_http(site: Site, known: Known, r: random.Random) -> str:
    return await _refused(
        site, r.choice([b"\x16\x03\x01 hello\r\n\r\n", b"GET /\r\n\r\n", b"GET /" + b"a" * 70_000]), 400
    )


async def malformed(site: Site, known: Known, r: random.Random) -> str:
    return await _refused(
        site, post(COMPLETIONS, r.choice([b'{"prompt": ', b"\xff\xfe", b'{"prompt": "\\ud800"}'])), 400
    )


async def nested(site: Site, known: Known, r: random.Random) -> str:
    depth = min(100_000, site.info.max_message_bytes) // 10
    return await _refused(site, post(COMPLETIONS, b'{"prompt":' * depth), 400)


async def too_large(site: Site, known: Known, r: random.Random) -> str:
    """Some say so, some do not; all send it."""
    size = site.info.max_message_bytes + 1
    if r.random() < 0.5:
        return await _refused(site, post(COMPLETIONS, b"[" * size), 413)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: soak\r\ntransfer-encoding: chunked\r\n\r\n"
    return await _refused(site, head + f"{size:x}\r\n".encode() + b"[" * size + b"\r\n0\r\n\r\n", 413)


async def unfinished(site: Site, known: Known, r: random.Random) -> str:
    """Leaves in the middle of its body."""
    async with connection(site) as (_, writer):
        body = body_of(known)
        writer.write(post(PLAIN, body[: len(body) // 2], length=len(body)))
        await writer.drain()
    return "left"


async def _refused(site: Site, data: bytes, wanted: int) -> str:
    async with connection(site) as (reader, writer):
        writer.write(data)
        status, _ = await answer_of(reader)
        return expect(status, wanted)


KINDS: dict[str, Kind] = {
    f"http {kind.__name__}": kind
    for kind in (
        *(whole, slow, completion, websocket, impatient),
        *(leave, cut, half_close, deadline, stall, websocket_leave),
        *(no_http, malformed, nested, too_large, unfinished),
    )
}
