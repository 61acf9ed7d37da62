"""Tools of a chat: what reaches the template, what is answered, what is refused."""

import json

import pytest

from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tests.server.http.conftest import Web, web

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g"}},
]
TEMPLATE = "{{ messages[-1].content }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{# <tool_call> #}"
TWO_CALLS = 'Yes.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><tool_call>{"name": "g"}</tool_call>'


def engine(says: str, template: str = TEMPLATE) -> FakeEngine:
    return FakeEngine(tokenizer=byte_tokenizer(template), says=says, max_model_len=1000)


async def streamed(site: Web, **body) -> dict:
    """The message that a stream amounts to, as the official client puts it together."""
    message: dict = {"content": "", "tool_calls": []}
    chunks = await site.stream(CHAT, **body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert call["id"] and call["type"] == "function" and call["function"]["name"]
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    message["finish_reason"] = chunks[-1]["choices"][0]["finish_reason"]
    return message


async def test_calls_are_answered_whole_and_in_pieces():
    async with web(engine(TWO_CALLS)) as site:
        answer = await site.post(CHAT, messages=HELLO, tools=TOOLS)
        assert bytes(site.engine.requests[-1].prompt_token_ids) == b"hi[f][g]"
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Yes."
        calls = choice["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [
            {"name": "f", "arguments": '{"x": 1}'},
            {"name": "g", "arguments": "{}"},
        ]
        assert len({call["id"] for call in calls}) == 2 and {call["type"] for call in calls} == {"function"}
        assert await streamed(site, messages=HELLO, tools=TOOLS) == {
            "content": "Yes.",
            "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}, {"name": "g", "arguments": "{}"}],
            "finish_reason": "tool_calls",
        }


async def test_only_calls_leave_no_content():
    async with web(engine('<tool_call>{"name": "g"}</tool_call>')) as site:
        answer = await site.post(CHAT, messages=HELLO, tools=TOOLS)
        assert answer["choices"][0]["message"]["content"] is None


async def test_one_call_at_most_where_asked():
    async with web(engine(TWO_CALLS)) as site:
        answer = await site.post(CHAT, messages=HELLO, tools=TOOLS, parallel_tool_calls=False)
        assert [c["function"]["name"] for c in answer["choices"][0]["message"]["tool_calls"]] == ["f"]
        message = await streamed(site, messages=HELLO, tools=TOOLS, parallel_tool_calls=False)
        assert [c["name"] for c in message["tool_calls"]] == ["f"]


async def test_text_without_tools_is_left_alone():
    async with web(engine(TWO_CALLS)) as site:
        for body in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
            answer = await site.post(CHAT, messages=HELLO, **body)
            assert bytes(site.engine.requests[-1].prompt_token_ids) == b"hi"
            assert answer["choices"][0]["message"]["content"] == TWO_CALLS
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(
    ("style", "says"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("llama3_json", '{"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS]f[ARGS]{}"),
        ("pythonic", "[f()]"),
    ],
)
async def test_the_style_may_be_named(style, says: str):
    async with web(engine(says, "{{ messages[-1].content }}{{ tools }}"), tool_call_parser=style) as site:
        answer = await site.post(CHAT, messages=HELLO, tools=TOOLS)
        assert [c["function"]["name"] for c in answer["choices"][0]["message"]["tool_calls"]] == ["f"]
        # Marks that are special tokens must be in the text.
        assert site.engine.requests[-1].params.skip_special_tokens is (style in ("hermes", "pythonic"))
        await site.post(CHAT, messages=HELLO, tools=TOOLS, skip_special_tokens=True)
        assert site.engine.requests[-1].params.skip_special_tokens is True


async def test_tools_that_nobody_would_read_are_refused():
    async with web(engine("x", "{{ messages[-1].content }}")) as site:  # a template that takes none
        status, error = await site.refused(CHAT, messages=HELLO, tools=TOOLS)
        assert (status, error["param"]) == (400, "tools") and "takes no tools" in error["message"]
    async with web(engine("x", "{{ tools }}")) as site:  # of no known style
        status, error = await site.refused(CHAT, messages=HELLO, tools=TOOLS)
        assert (status, error["param"]) == (400, "tools") and "--tool-call-parser" in error["message"]
    async with web(engine("x"), tool_call_parser="none") as site:
        assert (await site.refused(CHAT, messages=HELLO, tools=TOOLS))[0] == 400
        assert (await site.post(CHAT, messages=HELLO, tools=TOOLS, tool_choice="none"))["choices"]


async def test_bad_tools():
    f = TOOLS[0]
    async with web(engine("x")) as site:
        for tools, choice, param in (
            ("f", None, "tools"),
            ([1], None, "tools[0]"),
            ([f, {"type": "web_search"}], None, "tools[1]"),
            ([{"type": "function", "function": {}}], None, "tools[0].function"),
            ([{"type": "function", "function": {"name": "f", "parameters": 5}}], None, "tools[0].function.parameters"),
            ([f, f], None, "tools"),
            ([f], "always", "tool_choice"),
            ([f], {"type": "function", "function": {"name": "h"}}, "tool_choice"),
            ([f], {"type": "function"}, "tool_choice"),
            (None, "auto", "tool_choice"),
            (None, "required", "tool_choice"),
        ):
            status, error = await site.refused(CHAT, messages=HELLO, tools=tools, tool_choice=choice)
            assert (status, error["param"]) == (400, param), error
        status, error = await site.refused(CHAT, messages=HELLO, tools=[f], parallel_tool_calls=1)
        assert (status, error["param"]) == (400, "parallel_tool_calls")


async def test_a_conversation_with_calls_and_results_is_rendered():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }} "
        "{{ c.function.arguments.x }}){% endfor %};{% endfor %}{# tools <tool_call> #}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 7})}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "8"},
    ]
    async with web(engine("x", template)) as site:
        await site.post(CHAT, messages=messages, tools=TOOLS)
        assert bytes(site.engine.requests[-1].prompt_token_ids) == b"user:hi;assistant:(f 7);tool:8;"
