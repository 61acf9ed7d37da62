"""The sampling fields of the gRPC table over HTTP and in Python: each taken as it is set, or refused by its name."""

import json
from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams, StructuredOutputs
from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tests.server.http.conftest import Web, web
from tests.server.test_sampling_wire import REFUSED, TAKEN

WAYS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "completions": ("/v1/completions", {"prompt": "ab"}, False),
    "chats": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, False),
    "plain streams": ("/generate/stream", {"prompt": "ab"}, True),
}  # path, the body's other fields, whether the answer is always streamed
JSON = {"content-type": "application/json"}
NOT_THERE = {"plain streams": {"logprobs", "prompt_logprobs"}}  # unknown fields: streams of tokens and text
# Where a field has OpenAI's meaning, not that of SamplingParams.
OTHERWISE = {
    "completions": {"logprobs": lambda k: {"logprobs": k}},
    "chats": {"logprobs": lambda k: {"logprobs": True, "top_logprobs": k}},
}
ZERO_MAKES_NOTHING = {"completions": {"max_tokens": (0,)}}  # lm-eval asks for a prompt's log-probabilities so


def as_json(value: Any) -> Any:
    if isinstance(value, StructuredOutputs):
        return {value.kind: getattr(value, value.kind)}
    return value


def body_of(way: str, name: str, value: Any) -> dict[str, Any]:
    _, body, _ = WAYS[way]
    named = OTHERWISE.get(way, {}).get(name, lambda v: {name: v})(as_json(value))
    return body | {"max_tokens": 4} | named


async def post(site: Web, way: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer; NaN and infinity go as Python's json writes them."""
    answer = await site.client.post(WAYS[way][0], content=json.dumps(body), headers=JSON)
    streamed = WAYS[way][2] and answer.status_code == 200
    return answer.status_code, answer.text if streamed else answer.json()


@pytest.mark.parametrize("way", WAYS)
async def test_every_taken_value_arrives_as_it_was_set(way: str):
    async with web() as site:
        for name, values in TAKEN.items():
            for value in values:
                if name in NOT_THERE.get(way, ()):
                    continue
                status, answer = await post(site, way, body_of(way, name, value))
                assert status == 200, (name, value, answer)
                sampling: dict[str, Any] = {"max_tokens": 4} | {name: value}
                assert site.engine.requests[-1].params == SamplingParams(**sampling), (name, value)


@pytest.mark.parametrize("way", WAYS)
async def test_every_refused_value_is_refused_by_name(way: str):
    async with web() as site:
        for name, values in REFUSED.items():
            for value in values:
                if value in ZERO_MAKES_NOTHING.get(way, {}).get(name, ()):
                    continue
                status, answer = await post(site, way, body_of(way, name, value))
                shown = "top_logprobs" if (way, name) == ("chats", "logprobs") else name
                assert (status, answer["error"]["param"]) == (400, shown), (name, value, answer)
        for name in NOT_THERE.get(way, ()):
            status, answer = await post(site, way, body_of(way, name, 1))
            assert (status, answer["error"]["param"]) == (400, name)
        assert site.engine.requests == []


def test_python_refuses_the_same_by_the_same_names():
    for name, values in REFUSED.items():
        for value in values:
            sampling: dict[str, Any] = {"max_tokens": 4} | {name: value}
            with pytest.raises(RequestError) as caught:
                SamplingParams(**sampling)
            assert caught.value.field == name, (name, value)


async def test_prompt_logprobs_are_told_in_vllms_shape():
    async with web() as site:
        # The fake engine's prompt token i has -0.25; the k best are i, i + 1, ... with -0.25, -1.25, ...
        best = {"97": (-0.25, 1, "a"), "98": (-1.25, 2, "b")}
        expected = {i: {"logprob": v, "rank": rank, "decoded_token": text} for i, (v, rank, text) in best.items()}
        for body in ({"prompt": "Xa"}, {"prompt": [88, 97]}, {"prompt": "Xa", "echo": True, "logprobs": 1}):
            answer = await site.post("/v1/completions", **body, n=2, max_tokens=1, prompt_logprobs=2)
            assert [c["prompt_logprobs"] for c in answer["choices"]] == [[None, expected]] * 2
            assert site.engine.requests[-1].params.prompt_logprobs == 2
        echoed = answer["choices"][0]["logprobs"]
        assert echoed["tokens"][:2] == ["X", "a"] and echoed["top_logprobs"][1] == {"a": -0.25}

        answer = await site.post("/v1/completions", prompt="Xa", max_tokens=1, prompt_logprobs=0)
        assert answer["choices"][0]["prompt_logprobs"] == [None, {"97": expected["97"] | {"rank": None}}]
        chat = [{"role": "user", "content": "a"}]
        answer = await site.post("/v1/chat/completions", messages=chat, max_tokens=1, prompt_logprobs=1)
        told = answer["prompt_logprobs"]
        assert told[0] is None and ["".join(t["decoded_token"] for t in e.values()) for e in told[1:]] == list("ser:a;")
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": chat})):
            status, error = await site.refused(path, **body, prompt_logprobs=1, stream=True)
            assert (status, error["param"]) == (400, "prompt_logprobs")
            assert "prompt_logprobs" not in json.dumps(await site.post(path, **body, max_tokens=1))


async def test_token_ids_are_returned_as_vllm_does():
    """Of prompt and output, whole and in pieces; of tokens that are no text, too: parts of calls."""
    says = 'a<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    template = "{{ messages[-1].content }}{# tools <tool_call> #}"
    async with web(FakeEngine(tokenizer=byte_tokenizer(template), says=says)) as site:
        tools = [{"type": "function", "function": {"name": "f"}}]
        for path, body in (
            ("/v1/completions", {"prompt": ["ab", [97, 98]], "n": 2, "max_tokens": 100}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], "n": 2, "tools": tools}),
        ):
            body["return_token_ids"] = True
            answer = await site.post(path, **body)
            output = [*says.encode(), 256]
            assert all(choice["token_ids"] == output for choice in answer["choices"])
            chunks = await site.stream(path, **body)
            streamed: dict[int, list[int]] = {}
            prompts = []
            for chunk in chunks:
                (choice,) = chunk["choices"]
                streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
                prompts += [part["prompt_token_ids"] for part in (chunk, choice) if "prompt_token_ids" in part]
            assert list(streamed.values()) == [output] * len(answer["choices"])
            whole = [part["prompt_token_ids"] for part in (answer, *answer["choices"]) if "prompt_token_ids" in part]
            assert whole == prompts == [[97, 98]] * (4 if path == "/v1/completions" else 1)
            body["return_token_ids"] = False
            assert "token_ids" not in json.dumps(await site.post(path, **body))
            status, error = await site.refused(path, **body | {"return_token_ids": 1})
            assert (status, error["param"]) == (400, "return_token_ids")


async def test_all_log_probabilities_are_given_of_few_tokens():
    async with web(FakeEngine(tokenizer=byte_tokenizer(), max_model_len=2100)) as site:
        most = 1020  # tokens of 257 values
        completion, chat = {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}
        for path, name, body in (
            ("/v1/completions", "logprobs", completion | {"logprobs": -1}),
            ("/v1/chat/completions", "top_logprobs", chat | {"logprobs": True, "top_logprobs": -1}),
        ):
            assert (await site.post(path, **body, max_tokens=most // 2, n=2))["choices"]
            status, error = await site.refused(path, **body, max_tokens=most // 2 + 1, n=2)
            assert (status, error["param"]) == (400, name) and "of 1022 tokens" in error["message"]
        prompts = {"prompt": ["a" * (most // 2)] * 2, "max_tokens": 1}
        assert (await site.post("/v1/completions", **prompts, prompt_logprobs=-1))["choices"]
        prompts["prompt"] = ["a" * most, "a"]
        status, error = await site.refused("/v1/completions", **prompts, prompt_logprobs=-1)
        assert (status, error["param"]) == (400, "prompt_logprobs")
        status, error = await site.refused("/v1/completions", **prompts, logprobs=-1, echo=True)
        assert (status, error["param"]) == (400, "logprobs")
