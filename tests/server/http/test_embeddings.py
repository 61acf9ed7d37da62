"""``/v1/embeddings``, and log-probabilities of prompts, against an engine whose answers are known."""

import base64
from typing import Any

import numpy as np
import pytest

from tests.server.conftest import endless_engine
from tests.server.fake_engine import embedding_of_prompt
from tests.server.http.conftest import Web, web

EMBEDDINGS, COMPLETIONS = "/v1/embeddings", "/v1/completions"


async def test_vectors(site: Web):
    inputs = [("abc", [b"abc"]), (["abc", "b"], [b"abc", b"b"]), ([97, 98], [b"ab"]), ([[97], [98]], [b"a", b"b"])]
    ways: list[dict[str, Any]] = [{}, {"pooling": "mean"}, {"normalize": False}]
    for given, prompts in inputs:
        for options in ways:
            answer = await site.post(EMBEDDINGS, input=given, **options)
            assert answer["object"] == "list" and [d["index"] for d in answer["data"]] == list(range(len(prompts)))
            for prompt, found in zip(prompts, answer["data"]):
                expected = embedding_of_prompt(prompt, options.get("pooling", "last"), options.get("normalize", True))
                assert found["embedding"] == pytest.approx(expected)
            assert answer["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, prompts)))


async def test_forms_and_options(site: Web):
    (plain,) = (await site.post(EMBEDDINGS, input="abc", user="me"))["data"]
    (coded,) = (await site.post(EMBEDDINGS, input="abc", encoding_format="base64"))["data"]
    assert np.frombuffer(base64.b64decode(coded["embedding"]), "<f4").tolist() == pytest.approx(plain["embedding"])
    await site.post(EMBEDDINGS, input="abc", truncate_prompt_tokens=2, priority=4, dimensions=8)
    assert site.engine.requests[-1].params.truncate_prompt_tokens == 2 and site.engine.requests[-1].priority == 4
    for field, value in (
        ("input", None),
        ("input", []),
        ("input", ""),
        ("input", "a" * 4000),
        ("encoding_format", "hex"),
        ("dimensions", 3),
        ("pooling", "max"),
        ("normalize", 1),
        ("temperature", 1),
        ("priority", "x"),
    ):
        status, error = await site.refused(EMBEDDINGS, **{"input": "abc", field: value})
        assert (status, error["param"]) == (400, field), error


async def test_a_deadline_ends_it():
    async with web(endless_engine(step_delay_s=0.2)) as site:
        answer = await site.client.post(EMBEDDINGS, json={"input": "a"}, headers={"jaxserve-timeout-s": "0.01"})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert await site.served.is_idle()


async def test_log_probabilities_of_a_prompt(site: Web):
    for body in ({}, {"stream": True}, {"max_tokens": 0}):
        body = {"prompt": ["abc", [97]], "echo": True, "logprobs": 1, "max_tokens": 2} | body
        if "stream" in body:
            shown: dict[int, dict] = {}
            for chunk in await site.stream(COMPLETIONS, **body):
                (choice,) = chunk["choices"]
                found = shown.setdefault(choice["index"], {"tokens": [], "token_logprobs": [], "text_offset": []})
                for name, values in found.items():
                    values += (choice["logprobs"] or {name: []})[name]
        else:
            answer = await site.post(COMPLETIONS, **body)
            shown = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
        num_output = body["max_tokens"]
        for index, text in enumerate(("abc", "a")):
            assert shown[index]["tokens"][: len(text)] == list(text)
            assert len(shown[index]["tokens"]) == len(text) + num_output
            values = shown[index]["token_logprobs"]
            assert values[0] is None and all(v < 0 for v in values[1:])
            assert shown[index]["text_offset"] == list(range(len(text) + num_output))
    answer = await site.post(COMPLETIONS, prompt="abc", echo=True, logprobs=1, max_tokens=1, n=2)
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [4, 4]
    status, error = await site.refused(COMPLETIONS, prompt="abc", echo=True, logprobs=1, n=2, stream=True)
    assert (status, error["param"]) == (400, "n")
