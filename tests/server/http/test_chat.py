"""``/v1/chat/completions`` and ``/tokenize`` against an engine whose answers are known."""

from jaxserve.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_text
from tests.server.http.conftest import Web, web

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
RENDERED = "user:hi;"


async def test_answer_has_openais_shape(site: Web):
    answer = await site.post(CHAT, model="fake", messages=HELLO, max_completion_tokens=5)
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected_text(RENDERED, 5), "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["total_tokens"] == len(RENDERED) + 5


async def test_stream_is_the_answer_in_pieces(site: Web):
    usage = {"include_usage": True}
    first, *chunks, end, last = await site.stream(CHAT, messages=HELLO, max_tokens=20, stream_options=usage)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected_text(RENDERED, 20)
    assert end["choices"][0]["delta"] == {} and end["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 20
    assert {chunk["object"] for chunk in (first, *chunks, end, last)} == {"chat.completion.chunk"}


async def test_without_max_tokens_the_answer_fills_the_model(site: Web):
    assert (await site.post(CHAT, messages=HELLO))["usage"]["total_tokens"] == 400


async def test_choices(site: Web):
    answer = await site.post(CHAT, messages=HELLO, max_tokens=3, n=3)
    expected = [expected_text(RENDERED, 5)[k : k + 3] for k in range(3)]
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected
    streamed = ["", "", ""]
    for chunk in await site.stream(CHAT, messages=HELLO, max_tokens=3, n=3):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == expected


async def test_logprobs(site: Web):
    body = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    text = expected_text(RENDERED, 4)

    def one(c: str, logprob: float) -> dict:
        return {"token": c, "logprob": logprob, "bytes": [ord(c)]}

    expected = [one(c, -0.5) | {"top_logprobs": [one(c, -0.5), one(chr(ord(c) + 1), -1.5)]} for c in text]
    answer = await site.post(CHAT, **body)
    assert answer["choices"][0]["logprobs"] == {"content": expected, "refusal": None}
    chunks = await site.stream(CHAT, **body)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in streamed if part for entry in part["content"]] == expected
    answer = await site.post(CHAT, messages=HELLO, max_tokens=1, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    status, error = await site.refused(CHAT, messages=HELLO, top_logprobs=2)
    assert status == 400 and error["param"] == "top_logprobs"
    status, error = await site.refused(CHAT, messages=HELLO, logprobs=5)
    assert status == 400 and error["param"] == "logprobs" and error["message"].startswith("logprobs: 5: ")


async def prompt_of(site: Web, **body) -> str:
    await site.post(CHAT, max_tokens=1, **body)
    return bytes(site.engine.requests[-1].prompt_token_ids).decode()


async def test_messages(site: Web):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert await prompt_of(site, messages=[{"role": "user", "content": parts}]) == "user:a\nb;"
    # The role by its old name, for a template that does not know the new one.
    developer = [{"role": "developer", "content": "be brief"}, *HELLO]
    assert await prompt_of(site, messages=developer) == "system:be brief;user:hi;"
    for bad in (
        None,
        "hi",
        [],
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "content": "x"}],
    ):
        status, error = await site.refused(CHAT, messages=bad)
        assert (status, error["param"]) == (400, "messages"), error


async def test_a_deeply_nested_message_is_refused(site: Web):
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    status, error = await site.refused(CHAT, messages=[{"role": "user", "content": "a", "more": deep}])
    assert status == 400 and "nested" in error["message"]


async def test_continue_final_message(site: Web):
    messages = [*HELLO, {"role": "assistant", "content": "The answer "}]
    assert await prompt_of(site, messages=messages, continue_final_message=True) == "user:hi;assistant:The answer "
    parts = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "user"}]}]
    assert await prompt_of(site, messages=parts, continue_final_message=True) == "user:hi;assistant:user"
    for body in ({"add_generation_prompt": True}, {"messages": [{"role": "user", "content": None}]}):
        status, _ = await site.refused(CHAT, **{"messages": messages, "continue_final_message": True, **body})
        assert status == 400


def templated(source: str) -> FakeEngine:
    return FakeEngine(tokenizer=byte_tokenizer(source))


async def test_what_reaches_the_template():
    source = (
        "{{ messages[0].role }}{% if add_generation_prompt %}!{% endif %}{{ mood }}{{ reasoning_effort }}"
        "{% for d in documents or [] %}{{ d.text }}{% endfor %}{# developer #}"
    )
    async with web(templated(source)) as site:
        asked = [{"role": "developer", "content": ""}]
        assert await prompt_of(site, messages=asked) == "developer!"  # a template that knows the role
        assert await prompt_of(site, messages=asked, add_generation_prompt=False) == "developer"
        assert await prompt_of(site, messages=asked, chat_template_kwargs={"mood": "glad"}) == "developer!glad"
        assert await prompt_of(site, messages=asked, reasoning_effort="low") == "developer!low"
        assert await prompt_of(site, messages=asked, documents=[{"text": "doc"}]) == "developer!doc"
        for name, value in (
            ("chat_template_kwargs", 5),
            ("chat_template_kwargs", {"tools": 1}),
            ("documents", "text"),
            ("add_generation_prompt", "yes"),
        ):
            assert (await site.refused(CHAT, messages=asked, **{name: value}))[0] == 400


async def test_max_tokens_has_two_names(site: Web):
    status, error = await site.refused(CHAT, messages=HELLO, max_completion_tokens=0)
    assert (status, error["param"]) == (400, "max_completion_tokens")
    status, error = await site.refused(CHAT, messages=HELLO, max_tokens=3, max_completion_tokens=4)
    assert (status, error["param"]) == (400, "max_completion_tokens")
    answer = await site.post(CHAT, messages=HELLO, max_tokens=3, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


async def test_response_format(site: Web):
    await site.post(CHAT, messages=HELLO, max_tokens=1, response_format={"type": "text"})
    for bad in (
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 1}},
    ):
        status, error = await site.refused(CHAT, messages=HELLO, response_format=bad)
        assert status == 400 and error["param"].startswith("response_format")


async def test_tokenize_and_detokenize(site: Web):
    answer = await site.post("/tokenize", prompt="abc", return_token_strs=True)
    assert answer == {"count": 3, "max_model_len": 400, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    answer = await site.post("/tokenize", messages=HELLO)
    assert bytes(answer["tokens"]).decode() == RENDERED
    await site.post(CHAT, messages=HELLO, max_tokens=1)
    assert list(site.engine.requests[-1].prompt_token_ids) == answer["tokens"]
    answer = await site.post("/tokenize", messages=HELLO, continue_final_message=True)
    assert bytes(answer["tokens"]).decode() == "user:hi"
    assert await site.post("/detokenize", tokens=[104, 105, 256]) == {"prompt": "hi<eos>"}
    assert await site.post("/detokenize", tokens=[104, 256], skip_special_tokens=True) == {"prompt": "h"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "foo": 1}, "foo"),
        ("/tokenize", {"prompt": "a" * 4000}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": "ab"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ):
        status, error = await site.refused(path, **body)
        assert (status, error["param"]) == (400, param), error


def test_the_tool_template_is_the_one_for_tools():
    source = {"default": "a", "tool_use": "b"}
    tokenizer = byte_tokenizer()
    both = Tokenizer.from_backend(tokenizer._backend, eos_token_ids=[256], chat_template=source)
    assert (both.chat_template, both.tool_template) == ("a", "b")
    assert tokenizer.tool_template == tokenizer.chat_template
