"""The official Python client, unchanged, against known answers; ``tests/cli`` has it against a model in a process."""

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import TIMEOUT_S, endless_engine
from tests.server.fake_engine import expected_text
from tests.server.http.conftest import Web, web
from tests.server.http.test_tools import TOOLS, TWO_CALLS, engine

HELLO: Any = [{"role": "user", "content": "hi"}]
RENDERED = "user:hi;"
OFFERED: Any = TOOLS


def client(site: Web) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.served.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)


async def test_completions(site: Web):
    async with client(site) as ai:
        models = [model.id async for model in ai.models.list()]
        assert models == ["fake"] and (await ai.models.retrieve("fake")).id == "fake"
        answer = await ai.completions.create(
            model="fake", prompt="abc", max_tokens=4, logprobs=1, echo=False, n=2, seed=1, stop=["##"], user="me"
        )
        assert [c.text for c in answer.choices] == [expected_text("abc", 5)[k : k + 4] for k in range(2)]
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.token_logprobs == [-0.5] * 4
        assert answer.usage and answer.usage.total_tokens == 11
        stream = await ai.completions.create(
            model="fake", prompt=[97, 98], max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks if c.choices) == expected_text("ab", 9)
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 9
        more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [200]}
        await ai.completions.create(model="fake", prompt="abc", max_tokens=1, extra_body=more)
        assert site.engine.requests[-1].params.top_k == 5 and site.engine.requests[-1].params.min_p == 0.1


async def test_chats(site: Web):
    async with client(site) as ai:
        answer = await ai.chat.completions.create(
            model="fake", messages=HELLO, max_completion_tokens=4, logprobs=True, top_logprobs=2
        )
        assert answer.choices[0].message.content == expected_text(RENDERED, 4)
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.content and len(logprobs.content[0].top_logprobs) == 2
        text = ""
        stream = await ai.chat.completions.create(model="fake", messages=HELLO, max_tokens=9, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == expected_text(RENDERED, 9)
        # What the client gives back may be sent again as it is.
        history: Any = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]
        assert (await ai.chat.completions.create(model="fake", messages=history, max_tokens=1)).choices


async def test_tools():
    async with web(engine(TWO_CALLS)) as site, client(site) as ai:
        answer = await ai.chat.completions.create(model="fake", messages=HELLO, tools=OFFERED)
        calls: list[Any] = list(answer.choices[0].message.tool_calls or [])
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("f", {"x": 1}), ("g", {})]
        async with ai.chat.completions.stream(model="fake", messages=HELLO, tools=OFFERED) as stream:
            final = await stream.get_final_completion()
        message = final.choices[0].message
        assert message.content == "Yes." and final.choices[0].finish_reason == "tool_calls"
        assert [c.function.arguments for c in message.tool_calls or []] == ['{"x": 1}', "{}"]


async def test_errors_are_the_clients_own():
    async with web(endless_engine(max_num_waiting=1)) as site, client(site) as ai:
        with pytest.raises(openai.BadRequestError) as bad:
            await ai.completions.create(model="fake", prompt="a", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await ai.chat.completions.create(model="gpt", messages=HELLO)
        assert missing.value.code == "model_not_found"
        stream = await ai.completions.create(model="fake", prompt="a", max_tokens=10**5, stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        with pytest.raises(openai.RateLimitError):
            await ai.completions.create(model="fake", prompt="b", max_tokens=1)
        site.engine.fail.set()
        with pytest.raises(openai.APIError, match="the engine failed"):
            async for _ in chunks:
                pass
        with pytest.raises(openai.InternalServerError):
            await ai.completions.create(model="fake", prompt="b", max_tokens=1)


async def test_a_stream_that_is_closed_ends_its_request():
    async with web(endless_engine()) as site, client(site) as ai:
        stream = await ai.chat.completions.create(model="fake", messages=HELLO, max_tokens=10**5, stream=True)
        await anext(aiter(stream))
        await stream.close()
        assert await site.served.is_idle()
