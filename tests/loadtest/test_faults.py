"""The load test's clients: that they notice what is wrong. (tests/server/test_load.py: that they find nothing.)"""

from dataclasses import replace

import pytest

from jaxserve.loadtest.faults.known import Known, WrongAnswerError
from jaxserve.loadtest.faults.storm import KINDS, site_of, storm
from tests.server.conftest import endless_engine, serving
from tests.server.fake_engine import expected_text, expected_tokens

PROMPT = (1, 2, 3)
GOOD = Known(PROMPT, {"max_tokens": 9}, tuple(expected_tokens(PROMPT, 9)), expected_text(PROMPT, 9))
WRONG = {
    "another token": replace(GOOD, tokens=(*GOOD.tokens[:-1], 1)),
    "a token more": replace(GOOD, tokens=(*GOOD.tokens, 1), text=GOOD.text + "a"),
    "a token less": replace(GOOD, tokens=GOOD.tokens[:-1], text=GOOD.text[:-1]),
    "another text": replace(GOOD, text=GOOD.text[:-1] + "A"),
}
COMPARE = [
    f"{way} {name}"
    for way, names in {
        "grpc": ("whole", "slow", "batch", "choices", "impatient"),
        "http": ("whole", "slow", "completion", "websocket", "impatient"),
    }.items()
    for name in names
]


async def test_clients_that_compare_notice_wrong_answers():
    async with serving(endless_engine(), http_port=0) as s, site_of(s.target, s.url) as site:
        for name in COMPARE:
            await storm(site, [(name, GOOD)], num_at_once=1)
            for what, known in WRONG.items():
                if (name, what) == ("http completion", "another token"):
                    continue  # it is told no tokens
                with pytest.raises(WrongAnswerError, match=f"1 of 3 clients:\nclient 1, {name}: "):
                    await storm(site, [(name, GOOD), (name, known), (name, GOOD)], num_at_once=3)
        assert await s.is_idle()


async def test_what_should_be_refused_and_is_not_is_noticed():
    async with (
        serving(endless_engine(), http_port=0, max_message_bytes=2**14) as s,
        site_of(s.target, s.url) as site,
    ):
        site.info.max_message_bytes //= 2  # what the clients believe
        for name in ("grpc too_large", "http too_large"):
            with pytest.raises(WrongAnswerError, match=f"client 0, {name}: "):
                await storm(site, [(name, GOOD)], num_at_once=1)


async def test_an_answer_that_does_not_come_is_noticed():
    async with serving(endless_engine(), http_port=0) as s, site_of(s.target, s.url) as site:
        s.engine.may_step.clear()
        try:
            names = [name for name in KINDS if name.endswith((" whole", " embed", " websocket"))]
            with pytest.raises(
                WrongAnswerError, match=f"{len(names)} of {len(names)} clients:\nclient 0, grpc whole: TimeoutError"
            ):
                await storm(site, [(name, GOOD) for name in names], num_at_once=9, timeout_s=0.2)
        finally:
            s.engine.may_step.set()
