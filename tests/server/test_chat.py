"""Chats with tools over gRPC: what reaches the model, what is answered, what is refused."""

import asyncio
import json
from typing import Any

import grpc
import grpc.aio
import pytest

from jaxserve.errors import RequestError
from jaxserve.request import TokenEvent
from jaxserve.server.chat.answer import ToolCall
from jaxserve.server.client import Client, batch_request
from jaxserve.server.client_codec import Chunk, RequestFailure
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc
from tests.server.conftest import Serving, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer
from tests.server.http.test_tools import HELLO, SCHEMA, TEMPLATE, TOOLS, TWO_CALLS

F, G = TOOLS
NAMED = {"type": "function", "function": {"name": "f"}}


def engine(says: str, template: str = TEMPLATE, step_delay_s: float = 0.0) -> FakeEngine:
    tokenizer = byte_tokenizer(template)
    return FakeEngine(tokenizer=tokenizer, says=says, max_model_len=1000, step_delay_s=step_delay_s)


def prompt_of(s: Serving) -> bytes:
    return bytes(s.engine.requests[-1].prompt_token_ids)


async def refused(s: Serving, **chat) -> tuple[str, str]:
    """Field and message of a chat that the server does not take."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await s.client.chat(**({"messages": HELLO, "tools": TOOLS} | chat))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value
    field = dict(caught.value.trailing_metadata() or ())["jaxserve-field"]
    assert isinstance(field, str) and (caught.value.details() or "").startswith(f"{field}: ")
    return field, caught.value.details() or ""


async def test_calls_are_no_text_and_come_in_pieces():
    async with serving(engine(TWO_CALLS, step_delay_s=0.005)) as s:
        chunks = [c async for c in s.client.generate(messages=HELLO, tools=TOOLS)]
        assert prompt_of(s) == b"hi[f][g]"
        assert "".join(c.text for c in chunks) == "Yes."
        assert bytes(i for c in chunks for i in c.token_ids if i < 256).decode() == TWO_CALLS
        pieces = [piece for c in chunks for piece in c.tool_calls]
        assert len(pieces) > 2 and [p.index for p in pieces] == sorted(p.index for p in pieces)
        first, second = ([p for p in pieces if p.index == i] for i in range(2))
        for name, arguments, own in (("f", '{"x": 1}', first), ("g", "{}", second)):
            assert own[0].name == name and own[0].id
            assert all(p.name is None and p.id is None for p in own[1:])
            assert "".join(p.arguments for p in own) == arguments
        assert first[0].id != second[0].id
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["tool_calls"]


async def test_whole_answers_are_the_same_on_asyncio_and_in_a_thread():
    async with serving(engine(TWO_CALLS)) as s:

        def in_thread():
            with Client(s.target) as client:
                return client.chat(HELLO, tools=TOOLS)

        for (answer,) in (await s.client.chat(HELLO, tools=TOOLS), await asyncio.to_thread(in_thread)):
            assert answer.text == "Yes." and answer.finish_reason == "tool_calls"
            assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", '{"x": 1}'), ("g", "{}")]
            assert len({c.id for c in answer.tool_calls}) == 2
            assert answer.usage is not None and answer.usage.completion_tokens == len(answer.token_ids)


async def test_each_choice_has_its_own_calls():
    async with serving(engine(TWO_CALLS)) as s:
        answers = await s.client.chat(HELLO, tools=TOOLS, n=2, logprobs=0)
        assert [a.choice for a in answers] == [0, 1]
        for answer in answers:
            assert [c.name for c in answer.tool_calls] == ["f", "g"] and answer.finish_reason == "tool_calls"
            assert len(answer.logprobs) == len(answer.token_ids)
        assert len({call.id for answer in answers for call in answer.tool_calls}) == 4


class HaltingEngine(FakeEngine):
    """After its first token no step goes on before ``may_step`` is set."""

    def step(self) -> list[TokenEvent]:
        events = super().step()
        if any(event.index == 0 for event in events):
            self.may_step.clear()
        return events


async def test_a_chunk_of_many_tokens_has_a_piece_a_call():
    halting = HaltingEngine(tokenizer=byte_tokenizer(TEMPLATE), says=TWO_CALLS, max_model_len=1000)
    async with serving(halting) as s:
        asked: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "stream_interval": 500, "stream_max_delay_s": 60.0}
        chunks = s.client.generate(**asked)
        first = await anext(chunks)
        halting.may_step.set()
        [rest] = [c async for c in chunks]
        assert first.text == "Y" and rest.text == "es."
        assert [(p.index, p.name, p.arguments) for p in rest.tool_calls] == [(0, "f", '{"x": 1}'), (1, "g", "{}")]


async def test_calls_of_a_batch():
    async with serving(engine(TWO_CALLS)) as s:
        bad = [{"type": "function", "function": {"name": ""}}]
        requests = [
            batch_request("tools", messages=HELLO, tools=TOOLS),
            batch_request("none", messages=HELLO),
            batch_request("bad", messages=HELLO, tools=bad),
        ]
        told = [c async for c in s.client.generate_batch(requests)]
        (failure,) = [c for c in told if isinstance(c, RequestFailure)]
        assert (failure.request_id, failure.field) == ("bad", "tools[0].name")
        chunks = [c for c in told if isinstance(c, Chunk)]
        with_tools = [c for c in chunks if c.request_id == "tools"]
        assert [p.name for c in with_tools for p in c.tool_calls if p.name] == ["f", "g"]
        without = [c for c in chunks if c.request_id == "none"]
        assert "".join(c.text for c in without) == TWO_CALLS and not any(c.tool_calls for c in without)
        assert without[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("style", "says"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'),
        ("llama3_json", '{"name": "f", "parameters": {"x": 1}}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]'),
        ("pythonic", "[f(x=1)]"),
    ],
)
async def test_every_style_is_read(style, says: str):
    async with serving(engine(says, "{{ messages[-1].content }}{{ tools }}"), tool_call_parser=style) as s:
        (answer,) = await s.client.chat(HELLO, tools=TOOLS)
        (call,) = answer.tool_calls
        assert call.name == "f" and json.loads(call.arguments) == {"x": 1} and answer.text == ""
        # Marks that are special tokens must be in the text, unless the request says otherwise.
        assert s.engine.requests[-1].params.skip_special_tokens is (style in ("hermes", "pythonic"))
        await s.client.chat(HELLO, tools=TOOLS, skip_special_tokens=True)
        assert s.engine.requests[-1].params.skip_special_tokens is True


async def test_a_call_may_be_required_named_or_forbidden():
    says = '[{"name": "g", "parameters": {}}]'
    async with serving(engine(says)) as s:
        (answer,) = await s.client.chat(HELLO, tools=TOOLS, tool_choice="required")
        assert [c.name for c in answer.tool_calls] == ["g"]
        structured = s.engine.requests[-1].params.structured_outputs
        assert structured is not None and structured.json is not None and "minItems" in structured.json

        (answer,) = await s.client.chat(HELLO, tools=TOOLS, tool_choice=NAMED)
        assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", says)]
        structured = s.engine.requests[-1].params.structured_outputs
        assert structured is not None and structured.json is not None and json.loads(structured.json) == SCHEMA

        for choice in ("none", "auto"):
            (answer,) = await s.client.chat(HELLO, tools=TOOLS, tool_choice=choice)
            assert prompt_of(s) == (b"hi" if choice == "none" else b"hi[f][g]")
            assert answer.text == says and not answer.tool_calls and answer.finish_reason == "stop"
            assert s.engine.requests[-1].params.structured_outputs is None


async def test_one_call_at_most_where_asked():
    async with serving(engine(TWO_CALLS)) as s:
        (answer,) = await s.client.chat(HELLO, tools=TOOLS, parallel_tool_calls=False)
        assert [c.name for c in answer.tool_calls] == ["f"]


async def test_an_answer_and_its_results_go_on_as_messages():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }} "
        "{{ c.function.arguments.x }} {{ c.id }}){% endfor %}{{ m.tool_call_id }}{{ m.name }};{% endfor %}"
        "{# tools <tool_call> #}"
    )
    says = '<tool_call>{"name": "f", "arguments": {"x": 7}}</tool_call>'
    async with serving(engine(says, template)) as s:
        (answer,) = await s.client.chat(HELLO, tools=TOOLS)
        (call,) = answer.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "8"}
        await s.client.chat([*HELLO, answer.message, result], tools=TOOLS)
        told = f"user:hi;assistant:(f 7 {call.id});tool:8{call.id}f;"
        assert prompt_of(s).decode() == told
        # Nor does it matter in which of its two forms a client has the arguments.
        own = ToolCall(id=call.id, name="f", arguments='{"x": 7}')
        assert own == call
        as_object = {"id": call.id, "function": {"name": "f", "arguments": {"x": 7}}}
        await s.client.chat([*HELLO, {"role": "assistant", "tool_calls": [as_object]}, result], tools=TOOLS)
        assert prompt_of(s).decode() == told


async def test_what_else_a_chat_may_say_reaches_the_template():
    template = (
        "{{ messages[-1].content }}{{ messages[-1].reasoning_content }}{% if thinks %}T{% endif %}"
        "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    thought = [{"role": "assistant", "content": "hi", "reasoning_content": "r"}]
    async with serving(engine("x", template)) as s:
        cases: list[tuple[dict[str, Any], bytes]] = [
            ({}, b"hirA:"),
            ({"add_generation_prompt": False}, b"hir"),
            ({"chat_template_kwargs": {"thinks": True}}, b"hirTA:"),
            ({"documents": [{"text": "d"}, {"text": "e"}]}, b"hir<d><e>A:"),
            ({"continue_final_message": True}, b"hi"),
        ]
        for chat, prompt in cases:
            await s.client.chat(thought, **chat)
            assert prompt_of(s) == prompt, chat
            assert await s.client.tokenize(messages=thought, **chat) == list(prompt)


async def test_contents_may_be_parts_and_what_is_null_is_unset():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with serving(engine("x", "{{ messages[-1].content }}")) as s:
        for content, prompt in ((parts, b"a\nb"), (parts[:1], b"a")):
            await s.client.chat([{"role": "user", "content": content, "audio": None}])
            assert prompt_of(s) == prompt


async def test_tokenize_reads_tools_as_generate_does():
    async with serving(engine("x")) as s:
        assert bytes(await s.client.tokenize(messages=HELLO, tools=TOOLS)) == b"hi[f][g]"
        assert bytes(await s.client.tokenize(messages=HELLO, tools=TOOLS, tool_choice="none")) == b"hi"
        with pytest.raises(grpc.aio.AioRpcError, match="tool_choice: "):
            await s.client.tokenize(messages=HELLO, tool_choice="required")


async def test_bad_chats_are_refused_by_name():
    def tool(**function):
        return [{"type": "function", "function": function}]

    async with serving(engine("x")) as s:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"tools": tool(name="")}, "tools[0].name"),
            ({"tools": [F, *tool(name="g", parameters="{")]}, "tools[1].parameters"),
            ({"tools": tool(name="f", parameters="[]")}, "tools[0].parameters"),
            ({"tools": tool(name="f", parameters="[" * 10**5)}, "tools[0].parameters"),
            ({"tools": [F, F]}, "tools"),
            ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
            ({"tools": None, "tool_choice": NAMED}, "tool_choice_name"),
            ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice_name"),
            ({"tool_choice": NAMED, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"messages": 1}}, "messages"),
            ({"documents": ["d"]}, "documents[0]"),
            ({"documents": [{"text": "\ud800"}]}, "documents[0].text"),
            ({"chat_template_kwargs": {"a": [1, {"b": "\udc00"}]}}, "chat_template_kwargs.a[1].b"),
            ({"tools": tool(name="f", parameters=r'{"\ud800": 1}')}, r"tools[0].parameters.\ud800"),
            ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
            ({"messages": []}, "messages"),
        ]
        for chat, field in cases:
            assert (await refused(s, **chat))[0] == field, chat
        async with grpc.aio.insecure_channel(s.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user")], tools=[pb.Tool(name="f")])
            chat.tool_choice = 9  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(grpc.aio.AioRpcError, match="tool_choice: 9 is not a choice"):
                await stub.Generate(pb.GenerateRequest(messages=chat)).read()
        assert s.engine.requests == []


async def test_tools_that_nobody_would_read_are_refused():
    async with serving(engine("x", "{{ messages[-1].content }}")) as s:
        field, message = await refused(s)
        assert field == "tools" and "takes no tools" in message
    async with serving(engine("x", "{{ tools }}")) as s:
        field, message = await refused(s)
        assert field == "tools" and "--tool-call-parser" in message


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages: a message has no field 'weight'"),
        ({"messages": "hi"}, "messages: 'hi' is not a list of messages"),
        ({"messages": HELLO[0]}, "messages: {'role': .*} is not a list of messages"),
        ({"messages": ["hi"]}, "messages: 'hi' is not a message"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages: 5 is neither a text nor a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages: .* is not a part of type 'text'",
        ),
        ({"prompt": [5, 6]}, r"prompt: \[5, 6\] is not a text; token ids are given as token_ids"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages: {'content': 'a'} has no role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
        ({"messages": HELLO, "tool_choice": "always"}, "tool_choice"),
        ({"messages": HELLO, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": HELLO, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"prompt": "a", "tools": TOOLS}, "tools"),
        ({"token_ids": [1], "continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_what_the_wire_cannot_hold_is_refused_by_the_client(chat, message):
    async with serving() as s:
        with pytest.raises(RequestError, match=message) as caught:
            s.client.generate(**chat)
        assert caught.value.field == message.partition(":")[0]
