"""Structured logs: what a line has, and that there is one for each request."""

import asyncio
import io
import json
import logging

import pytest

from jaxserve.server import logs
from tests.server.conftest import endless_engine
from tests.server.http.conftest import web


@pytest.fixture
def lines():
    """The objects logged since last asked, of a process that logs JSON."""
    names = ("", "jaxserve", logs.requests.name, logs.access.name)
    before = [(logging.getLogger(n).level, logging.getLogger(n).handlers[:]) for n in names]
    stream = io.StringIO()
    logs.set_up("json", stream)

    def take() -> list[dict]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return [json.loads(line) for line in text.splitlines()]

    yield take
    for name, (level, handlers) in zip(names, before):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers = handlers


async def test_requests(lines):
    async with web(endless_engine()) as site:
        headers = {"x-request-id": "mine"}
        body = {"prompt": "abc", "max_tokens": 4, "n": 2, "request_id": "r1"}
        await site.client.post("/v1/completions", json=body, headers=headers)
        await site.client.post("/v1/completions", json={"prompt": "abc", "top_p": 2})
        async with asyncio.timeout(10):
            found = lines()
            while len(found) < 3:
                await asyncio.sleep(0.005)
                found += lines()
    by_logger = {name: [line for line in found if line["logger"] == name] for name in {x["logger"] for x in found}}
    (ended,) = by_logger["jaxserve.requests"]
    assert ended["request_id"] == "r1" and ended["finish_reason"] == "length" and ended["level"] == "INFO"
    assert (ended["prompt_tokens"], ended["completion_tokens"], ended["n"]) == (3, 8, 2)
    assert 0 < ended["ttft_s"] <= ended["e2e_s"]
    good, bad = by_logger["jaxserve.access"]
    assert (good["request_id"], good["method"]) == ("mine", "POST")
    assert (good["path"], good["status"]) == ("/v1/completions", 200)
    assert bad["status"] == 400 and bad["seconds"] > 0
    assert all("abc" not in json.dumps(line) for line in found)  # no texts of anybody's


def test_any_record_becomes_one_line(lines):
    logger = logging.getLogger("jaxserve.somewhere")
    try:
        raise ValueError("no\nluck")
    except ValueError:
        logger.exception("it %s", "failed")
    logger.info("näh")
    failed, told = lines()
    assert failed["message"] == "it failed" and "ValueError: no" in failed["exception"]
    assert (told["message"], told["level"]) == ("näh", "INFO") and told["time"].endswith("+00:00")


def test_text_has_no_line_for_a_request(lines):
    stream = io.StringIO()
    logs.set_up("text", stream)
    logs.access.info("GET / 200")
    logging.getLogger("jaxserve").info("draining")
    assert stream.getvalue() == "INFO: draining\n"
