"""``/generate/stream`` and ``/generate/ws``."""

import asyncio
import json

import websockets.asyncio.client as ws
from websockets.exceptions import ConnectionClosed

from tests.server.conftest import TIMEOUT_S, endless_engine
from tests.server.fake_engine import expected_text, expected_tokens
from tests.server.http.conftest import Web, web

STREAM = "/generate/stream"
HELLO = [{"role": "user", "content": "hi"}]


def joined(events: list[dict]) -> str:
    return "".join(event["text"] for event in events)


async def test_server_sent_events(site: Web):
    events = await site.stream(STREAM, prompt="abc", max_tokens=9)
    assert joined(events) == expected_text("abc", 9)
    assert [i for event in events for i in event["token_ids"]] == expected_tokens("abc", 9)
    assert events[-1]["finish_reason"] == "length" and events[-1]["usage"]["completion_tokens"] == 9
    assert joined(await site.stream(STREAM, prompt=[97], max_tokens=3)) == expected_text("a", 3)
    assert joined(await site.stream(STREAM, messages=HELLO, max_tokens=3)) == expected_text("user:hi;", 3)
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": HELLO}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "stream": False}, "stream"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "foo": 1}, "foo"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
    ):
        status, error = await site.refused(STREAM, **body)
        assert (status, error["param"]) == (400, param)


def socket(site: Web, **options) -> ws.connect:
    return ws.connect(site.served.url.replace("http", "ws") + "/generate/ws", **options)


async def answer(connection: ws.ClientConnection, **body) -> list[dict]:
    await connection.send(json.dumps(body))
    events = []
    while not events or not events[-1].keys() & {"finish_reason", "error"}:
        events.append(json.loads(await connection.recv()))
    return events


async def test_websocket_answers_one_request_after_another(site: Web):
    async with socket(site) as connection:
        for prompt in ("abc", "b"):
            events = await answer(connection, prompt=prompt, max_tokens=9)
            assert joined(events) == expected_text(prompt, 9)
            assert events[-1]["usage"]["completion_tokens"] == 9
        for prompt in ("c", "d"):  # at once
            await connection.send(json.dumps({"prompt": prompt, "max_tokens": 1}))
        assert [json.loads(await connection.recv())["text"] for _ in range(2)] == [
            expected_text(prompt, 1) for prompt in ("c", "d")
        ]


async def test_websocket_errors_leave_it_open(site: Web):
    async with socket(site) as connection:
        for text, param in (
            ("{", None),
            ("[]", None),
            ("[" * 100_000, None),
            ("{}", "prompt"),
            ('{"prompt": "a", "top_p": 2}', "top_p"),
            ('{"prompt": "a", "foo": 2}', "foo"),
            ('{"prompt": "a", "model": 2}', "model"),
            (r'{"prompt": "a", "request_id": "\ud800"}', "request_id"),
            ('{"prompt": "a", "model": "x"}', "model"),
        ):
            await connection.send(text)
            assert json.loads(await connection.recv())["error"]["param"] == param
        assert joined(await answer(connection, messages=HELLO, max_tokens=2)) == expected_text("user:hi;", 2)


async def test_websocket_abort():
    async with web(endless_engine()) as site, socket(site) as connection:
        await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**5}))
        await connection.recv()
        await connection.send('{"abort": true}')
        while "finish_reason" not in (last := json.loads(await connection.recv())):
            pass
        assert last["finish_reason"] == "abort" and await site.served.is_idle()
        assert joined(await answer(connection, prompt="b", max_tokens=2)) == expected_text("b", 2)


async def test_a_websocket_that_closes_or_sends_too_much_ends_its_request():
    async with web(endless_engine(), max_message_bytes=1000) as site:
        async with socket(site) as connection:
            await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**5}))
            await connection.recv()
        assert await site.served.is_idle()
        async with socket(site) as connection:
            await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**5}))
            await connection.recv()
            await connection.send("x" * 2000)
            try:
                while True:
                    await connection.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd and closed.rcvd.code == 1009
        assert await site.served.is_idle()
        async with socket(site) as connection:
            await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**5}))
            await connection.recv()
            connection.transport.abort()
        assert await site.served.is_idle()


async def test_a_websocket_may_abort_what_it_has_just_asked_for():
    """Both messages are there before the server looks. An abort of nothing is not one of what comes after it."""
    async with web(endless_engine()) as site, socket(site) as connection:
        for fields in ({}, {"structured_outputs": {"regex": "a+"}}):  # which is read in a thread
            await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**6, **fields}))
            await connection.send('{"abort": true}')
            async with asyncio.timeout(TIMEOUT_S):
                while json.loads(await connection.recv()).get("finish_reason") != "abort":
                    pass
            assert await site.served.is_idle()
            await connection.send('{"abort": true}')
            await connection.send(json.dumps({"prompt": "a", "max_tokens": 2}))
            async with asyncio.timeout(TIMEOUT_S):
                while (reason := json.loads(await connection.recv()).get("finish_reason")) is None:
                    pass
            assert reason == "length"


async def test_a_websocket_that_takes_nothing_is_cut():
    engine = endless_engine(text_scale=20_000)
    async with web(engine, slow_reader_timeout_s=0.2) as site, socket(site) as connection:
        await connection.send(json.dumps({"prompt": "a", "max_tokens": 10**5}))
        await connection.recv()
        connection.transport.pause_reading()
        assert await site.served.is_idle()
        connection.transport.abort()
