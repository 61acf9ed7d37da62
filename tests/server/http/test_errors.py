"""What is refused, how it is said, and that nothing is left in the engine."""

import asyncio
import threading
from collections.abc import AsyncIterator

import httpx2
import pytest

from jaxserve.server.http.fields import NO_OPS, REFUSED
from tests.server.conftest import TIMEOUT_S, endless_engine
from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tests.server.http.conftest import Web, web

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


async def began(answer: httpx2.Response) -> AsyncIterator[str]:
    """The rest of a streamed answer whose first line has come."""
    lines = answer.aiter_lines()
    assert (await anext(lines)).startswith("data: ")
    return lines


BAD = [
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("temperature", -0.5),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_k", -2),
    ("min_p", 1.5),
    ("seed", -1),
    ("n", 0),
    ("stop", [""]),
    ("stop", {"a": 1}),
    ("stop", 5),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", "ab"),
    ("presence_penalty", 3),
    ("frequency_penalty", [1]),
    ("repetition_penalty", 0),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", [1]),
    ("allowed_token_ids", []),
    ("bad_words", [" "]),
    ("bad_words", "word"),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("truncate_prompt_tokens", 0),
    ("priority", 2**31),
    ("priority", "high"),
    ("stream", "yes"),
    ("temprature", 0.5),
    ("best_of", 2),
    ("suffix", "end"),
    ("use_beam_search", True),
    ("prompt_logprobs", -2),
]


async def test_bad_values_name_their_field(site: Web):
    for name, value in BAD:
        for path, body in ((COMPLETIONS, {"prompt": "abc"}), (CHAT, {"messages": HELLO})):
            status, error = await site.refused(path, **body, **{name: value})
            assert (status, error["type"], error["param"]) == (400, "invalid_request_error", name), (name, value, error)
            assert error["message"].startswith(f"{name}: ") and len(error["message"]) < 600
    assert site.engine.requests == []


async def test_what_changes_nothing_is_taken(site: Web):
    values = dict.fromkeys(NO_OPS, "x") | {"metadata": {"a": "b"}, "store": True}
    neutral = {name: allowed[0] for name, (allowed, _) in REFUSED.items() if allowed}
    nulls = dict.fromkeys([*NO_OPS, *REFUSED, "temperature", "stop", "logit_bias"])
    for body in (values, neutral, nulls):
        await site.post(COMPLETIONS, prompt="abc", max_tokens=1, **body)
        await site.post(CHAT, messages=HELLO, max_tokens=1, **body)
    assert len({r.params for r in site.engine.requests if r.params.logit_bias is None}) == 1


PROMPTS = [None, 3, {}, [], "", [[]], [1, "a"], [None], ["a", []], [True], "\x00" * 401, [[1] * 401]]


async def test_bad_prompts(site: Web):
    for prompt in PROMPTS:
        status, error = await site.refused(COMPLETIONS, prompt=prompt)
        assert (status, error["param"]) == (400, "prompt"), (prompt, error)
    _, error = await site.refused(COMPLETIONS, prompt=[1] * 3000 + [2.5])
    assert error["message"] == "prompt: prompt[3000] is 2.5, no token id as prompt[0] is"


MALFORMED = [
    (b"{", "the body is not JSON: "),
    (b"\xff\xfe", "the body is not JSON"),
    (b"", "the body must be a JSON object"),
    (b"[1]", "the body must be a JSON object"),
    (b"null", "the body must be a JSON object"),
    (b"[" * 100_000, "the body is not JSON"),
    (b'{"prompt":' * 50_000, "the body is not JSON"),
    (b'{"prompt": "\\ud800"}', "prompt: not valid Unicode at character 0"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature: nan is not a finite number"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature: inf is not a finite number"),
]


async def test_malformed_bodies(site: Web):
    for content, message in MALFORMED:
        answer = await site.client.post(COMPLETIONS, content=content, headers=JSON)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(message), answer.text
    answer = await site.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "content-type" in answer.json()["error"]["message"]


NOT_TEXT = [
    (COMPLETIONS, b'{"prompt": "a", "\\ud800": 1}', "\\ud800: not valid Unicode at character 0"),
    (COMPLETIONS, b'{"prompt": "a", "request_id": "a\\uD800b"}', "request_id: not valid Unicode at character 1"),
    (COMPLETIONS, b'{"prompt": "a", "stop": ["b", "\\udc00\\ud800"]}', "stop[1]: not valid Unicode at character 0"),
    (COMPLETIONS, b'{"prompt": "a", "stream_options": {"a\\udfff": 1}}', "stream_options.a\\udfff: not valid Unicode"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800\\\\"}]}', "messages[0].content: not valid Unicode"),
    ("/tokenize", b'{"prompt": "a", "model": "\\udabc"}', "model: not valid Unicode at character 0"),
    ("/v1/embeddings", b'{"input": ["a", "\\ud800"]}', "input[1]: not valid Unicode at character 0"),
    ("/v1/unload_lora_adapter", b'{"lora_name": "\\ud800"}', "lora_name: not valid Unicode at character 0"),
    (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', "the body is not JSON: not UTF-8 at byte 12"),
    (COMPLETIONS, '{"prompt": "a"}'.encode("utf-16-le"), "the body is not JSON: a zero byte at byte 1"),
]


async def test_what_is_no_text_is_refused_wherever_it_is(site: Web):
    """Half of a surrogate pair, which JSON can spell and no answer could repeat."""
    for path, content, message in NOT_TEXT:
        answer = await site.client.post(path, content=content, headers=JSON)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"].startswith(message), answer.text
    for content in (rb'{"prompt": "\ud83d\ude00"}', rb'{"prompt": "\\ud800"}'):
        answer = await site.client.post(COMPLETIONS, content=content, headers=JSON)
        assert answer.status_code == 200, answer.text


async def test_a_bug_is_answered_in_the_same_shape_and_logged(
    site: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of secrets")

    monkeypatch.setattr(site.engine, "make_request", broken)
    for stream in (False, True):
        status, error = await site.refused(COMPLETIONS, prompt="a", stream=stream)
        assert (status, error["type"], error["code"]) == (500, "server_error", "internal_error")
        assert "secrets" not in error["message"]
    assert "of secrets" in caplog.text
    monkeypatch.undo()
    assert (await site.post(COMPLETIONS, prompt="a", max_tokens=1))["choices"]


async def test_unknown_models_and_paths(site: Web):
    for path, body in ((COMPLETIONS, {"prompt": "abc"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "a"})):
        status, error = await site.refused(path, model="gpt-x", **body)
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    answer = await site.client.get("/v1/models/gpt-x")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    answer = await site.client.get("/v1/nothing")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert answer.json()["error"]["message"] == "GET /v1/nothing: Not Found"
    answer = await site.client.get(COMPLETIONS)
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


async def test_head_is_get_without_the_body(site: Web):
    for path in ("/", "/health", "/v1/models", "/v1/nothing"):
        asked, told = await site.client.get(path), await site.client.head(path)
        assert (told.status_code, told.content) == (asked.status_code, b"")
        names = ("content-type", "content-length")
        assert [told.headers[name] for name in names] == [asked.headers[name] for name in names]


async def test_served_names():
    async with web(served_model_names=("a", "org/b")) as site:
        assert [m["id"] for m in (await site.client.get("/v1/models")).json()["data"]] == ["a", "org/b"]
        assert (await site.client.get("/v1/models/org/b")).json()["root"] == "fake"
        assert (await site.post(COMPLETIONS, prompt="a", max_tokens=1, model="org/b"))["model"] == "org/b"
        assert (await site.post(COMPLETIONS, prompt="a", max_tokens=1))["model"] == "a"
        assert (await site.refused(COMPLETIONS, prompt="a", model="fake"))[0] == 404


async def test_oversize_bodies_are_413():
    async with web(max_message_bytes=1000) as site:
        assert (await site.post(COMPLETIONS, prompt="a", max_tokens=1))["choices"]
        status, error = await site.refused(COMPLETIONS, prompt="a" * 1000)
        assert (status, error["code"]) == (413, "request_too_large") and "1000" in error["message"]

        async def chunks():
            for _ in range(100):
                yield b" " * 100

        answer = await site.client.post(COMPLETIONS, content=chunks(), headers=JSON)
        assert answer.status_code == 413
        assert site.engine.requests[1:] == []


async def test_prompt_bytes_are_limited():
    async with web(max_prompt_bytes=5) as site:
        for path, body in (
            (COMPLETIONS, {"prompt": "a" * 6}),
            (CHAT, {"messages": [{"role": "u", "content": "aaaaaa"}]}),
        ):
            status, error = await site.refused(path, **body)
            assert status == 400 and "6 bytes, this server takes at most 5" in error["message"]


async def test_a_full_queue_is_429():
    async with web(endless_engine(max_num_waiting=1)) as site:
        async with site.client.stream(
            "POST", COMPLETIONS, json={"prompt": "a", "max_tokens": 10**5, "stream": True}
        ) as running:
            _ = await began(running)
            for stream in (False, True):
                answer = await site.client.post(COMPLETIONS, json={"prompt": "b", "stream": stream})
                assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
                assert int(answer.headers["retry-after"]) > 0
                # One of several is refused: all are.
                answer = await site.client.post(COMPLETIONS, json={"prompt": ["b", "c"], "stream": stream})
                assert answer.status_code == 429
        assert await site.served.is_idle()


async def test_loading_draining_and_failed_are_503():
    may_build = threading.Event()
    async with web(may_build=may_build, wait_ready=False) as site:
        assert (await site.client.get("/health")).status_code == 200
        assert (await site.client.get("/ready")).status_code == 503
        assert (await site.client.get("/version")).status_code == 200
        assert "jaxserve:request_success_total" in (await site.client.get("/metrics")).text
        for path, body in (
            (COMPLETIONS, {"prompt": "abc"}),
            (CHAT, {"messages": HELLO}),
            ("/tokenize", {"prompt": "a"}),
        ):
            status, error = await site.refused(path, **body)
            assert (status, error["code"]) == (503, "not_serving") and "loading" in error["message"]
        assert (await site.client.get("/v1/models")).status_code == 503
        may_build.set()
        await site.served.server.ready()
        assert (await site.client.get("/ready")).json() == {"status": "ready"}
        await site.served.server.drain()
        assert (await site.client.get("/ready")).status_code == 503
        assert (await site.client.get("/health")).status_code == 200
        status, error = await site.refused(COMPLETIONS, prompt="a")
        assert status == 503 and "draining" in error["message"]
    async with web(endless_engine()) as site:
        asking = asyncio.ensure_future(site.refused(COMPLETIONS, prompt="a", max_tokens=10**5))
        while not site.engine.requests:
            await asyncio.sleep(0.001)
        site.engine.fail.set()
        status, error = await asking
        assert (status, error["code"]) == (503, "engine_failed")
        assert (await site.client.get("/health")).status_code == 503


async def test_a_running_answer_finishes_while_the_server_drains():
    async with web(endless_engine(), drain_timeout_s=TIMEOUT_S) as site:
        asking = asyncio.ensure_future(site.post(COMPLETIONS, prompt="a", max_tokens=200))
        while not site.engine.requests:
            await asyncio.sleep(0.001)
        assert await site.served.server.drain() is True
        assert (await asking)["usage"]["completion_tokens"] == 200


async def test_what_the_drain_limit_ends_is_503():
    async with web(endless_engine(), drain_timeout_s=0.05) as site:
        asking = asyncio.ensure_future(site.refused(COMPLETIONS, prompt="a", max_tokens=10**5))
        streaming = asyncio.ensure_future(
            site.client.post(COMPLETIONS, json={"prompt": "b", "max_tokens": 10**5, "stream": True})
        )
        while len(site.engine.requests) < 2:
            await asyncio.sleep(0.001)
        assert await site.served.server.drain() is False
        status, error = await asking
        assert (status, error["code"]) == (503, "not_serving")
        assert '"code":"not_serving"' in (await streaming).text and "[DONE]" not in (await streaming).text


async def test_deadline_header():
    async with web(endless_engine()) as site:
        for stream in (False, True):
            answer = await site.client.post(
                COMPLETIONS,
                json={"prompt": "a", "max_tokens": 10**5, "stream": stream},
                headers={"jaxserve-timeout-s": "0.1"},
            )
            assert answer.status_code == (200 if stream else 504)
            assert '"code":"deadline_exceeded"' in answer.text and "[DONE]" not in answer.text
        for text in ("soon", "-1", "nan", "inf", "0"):
            answer = await site.client.post(COMPLETIONS, json={"prompt": "a"}, headers={"jaxserve-timeout-s": text})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "jaxserve-timeout-s"


async def test_request_ids_are_told(site: Web):
    answer = await site.client.get("/health", headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    answer = await site.client.get("/health", headers={"x-request-id": "not one"})
    assert len(answer.headers["x-request-id"]) == 16


async def test_duplicate_request_id():
    async with web(endless_engine()) as site:
        body = {"prompt": "a", "max_tokens": 10**5, "stream": True, "request_id": "x"}
        async with site.client.stream("POST", COMPLETIONS, json=body) as stream:
            _ = await began(stream)
            status, error = await site.refused(COMPLETIONS, prompt="b", request_id="x")
            assert (status, error["code"], error["param"]) == (409, "duplicate_request_id", "request_id")


async def test_a_model_without_tokenizer_or_template():
    async with web(FakeEngine()) as site:
        answer = await site.post(COMPLETIONS, prompt=[97], max_tokens=2, logprobs=0)
        assert [t.startswith("token_id:") for t in answer["choices"][0]["logprobs"]["tokens"]] == [True, True]
        for path, body, field in (
            (COMPLETIONS, {"prompt": "abc"}, "prompt"),
            (COMPLETIONS, {"prompt": [97], "echo": True}, "echo"),
            (CHAT, {"messages": HELLO}, "messages"),
            ("/tokenize", {"prompt": "a"}, "prompt"),
            ("/detokenize", {"tokens": [97]}, "tokens"),
        ):
            status, error = await site.refused(path, **body)
            assert (status, error["code"], error["param"]) == (400, "unsupported_by_model", field)
    async with web(FakeEngine(tokenizer=byte_tokenizer(chat_template=None))) as site:
        status, error = await site.refused(CHAT, messages=HELLO)
        assert (status, error["code"], error["param"]) == (400, "unsupported_by_model", "messages")
