"""What an answer is held to: the ways of saying it come to one sampling field, or are refused by name."""

import json
from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams, StructuredOutputs
from jaxserve.server.chat.tools import tool_plan
from jaxserve.server.http.chat import ChatRequest
from jaxserve.server.http.structured import constraint_name, constraint_of
from jaxserve.server.options import ServerOptions
from jaxserve.text.grammar import GrammarCompiler
from tests.server.http.conftest import Web, web
from tests.server.http.test_tools import HELLO, TOOLS, engine

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": FORMAT}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_json": json.dumps(SCHEMA)}, {"json": json.dumps(SCHEMA)}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    ({"guided_grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
]


@pytest.mark.parametrize(("fields", "expected"), WAYS)
async def test_the_ways_of_saying_it(site: Web, fields: dict[str, Any], expected: dict):
    (name,) = fields
    body = ChatRequest(messages=HELLO, **fields)
    assert constraint_name(body, body.response_format) == name
    assert constraint_of(body, body.response_format, None) == {"structured_outputs": expected}
    given: dict[str, Any] = {"max_tokens": 1, "structured_outputs": expected}
    for path, prompt in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
        await site.post(path, **prompt, max_tokens=1, **fields)
        assert site.engine.requests[-1].params == SamplingParams(**given)


async def test_what_says_nothing_or_too_much(site: Web):
    for fields, param in (
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": ["a", None]}, "guided_choice"),
        ({"structured_outputs": {"choice": [None]}}, "structured_outputs"),
    ):
        status, error = await site.refused("/v1/chat/completions", messages=HELLO, **fields)
        assert (status, error["param"]) == (400, param), error


async def test_tools_that_must_be_called():
    """The answer is the arguments of the named one, or a list of calls, and is held to that."""
    named = {"type": "function", "function": {"name": "f"}}
    calls = json.dumps([{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {}}])
    for choice, says, expected in (
        (named, '{"x": 1}', [("f", '{"x": 1}')]),
        ("required", calls, [("f", '{"x": 1}'), ("g", "{}")]),
    ):
        async with web(engine(says)) as site:
            body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice}
            answer = await site.post("/v1/chat/completions", **body)
            message = answer["choices"][0]["message"]
            assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == expected
            assert answer["choices"][0]["finish_reason"] == "tool_calls" and message["content"] is None
            held = site.engine.requests[-1].params.structured_outputs
            assert held is not None
            schema = json.loads(held.json)
            if choice == "required":
                assert schema["minItems"] == 1 and "maxItems" not in schema
                assert [c["properties"]["name"]["const"] for c in schema["items"]["anyOf"]] == ["f", "g"]
            else:
                assert schema == TOOLS[0]["function"]["parameters"]


async def test_tools_parameters_may_have_definitions_of_their_own():
    """References of each tool's schema are to its own root, as pydantic writes them; a list of calls has another."""

    def tool(name: str, city: str) -> dict[str, Any]:
        place = {"type": "object", "properties": {"city": {"enum": [city]}}, "required": ["city"]}
        properties = {"where": {"$ref": "#/$defs/Place"}, "enum": {"$ref": "#/$defs/Place"}, "next": {"$ref": "#"}}
        parameters = {"type": "object", "properties": properties, "additionalProperties": False}
        return {"type": "function", "function": {"name": name, "parameters": parameters | {"$defs": {"Place": place}}}}

    fake = engine("x")
    plan = tool_plan(fake, ServerOptions(), [tool("f", "Paris"), tool("g", "Rome")], "required", parallel=True)
    assert fake.tokenizer is not None
    grammar = GrammarCompiler(fake.tokenizer, 257, (256,)).compile(StructuredOutputs(json=plan.schema))

    def takes(calls: list[tuple[str, Any]]) -> bool:
        matcher = grammar.matcher()
        text = json.dumps([{"name": name, "parameters": parameters} for name, parameters in calls])
        return all(matcher.consume(byte) for byte in text.encode()) and matcher.is_accepting

    paris, rome = {"city": "Paris"}, {"city": "Rome"}
    assert takes([("f", {"where": paris, "enum": paris, "next": {"where": paris}}), ("g", {"where": rome})])
    for wrong in ({"where": rome}, {"enum": rome}, {"next": {"where": rome}}):
        assert not takes([("f", wrong)])
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"not": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    with pytest.raises(RequestError, match=r"tools\[0\].function.parameters: is nested too deep"):
        tool_plan(fake, ServerOptions(), tools, "required", parallel=True)
