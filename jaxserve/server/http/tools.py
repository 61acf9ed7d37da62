"""The tools of a chat request: what is offered to the model, and how its answer is read."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.fields import boolean
from jaxserve.server.tool_calls import Arguments, Content, Delta, Parser, Start, make_parser
from jaxserve.server.tool_calls.styles import SPECIAL_MARKS, ListParser, NamedParser


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """What ``tools`` and ``tool_choice`` come to.

    Attributes:
        tools: for the chat template; None where there are none or none may be called.
        make_parser: reads one answer; None where it is text and nothing else.
        keeps_special_tokens: the marks of calls are special tokens, which the text must keep.
        schema: what the answer must be; None: anything.
        parallel: whether there may be more calls than one.
    """

    tools: list[dict[str, Any]] | None = None
    make_parser: Callable[[], Parser] | None = None
    keeps_special_tokens: bool = False
    schema: dict[str, Any] | None = None
    parallel: bool = True


def tool_plan(backend: Backend, tools: Any, tool_choice: Any, parallel_tool_calls: Any) -> ToolPlan:
    """Raises RequestError naming the field."""
    parallel = boolean("parallel_tool_calls", parallel_tool_calls, True)
    names = _tool_names(tools)
    if not names:
        if tool_choice not in (None, "none"):
            raise RequestError("tool_choice", f"{tool_choice!r:.80}, but there are no tools")
        return ToolPlan()
    named = _named(tool_choice, names)
    if tool_choice == "none":
        return ToolPlan()
    style = backend.tool_call_style()
    tokenizer = backend.engine.tokenizer
    if tokenizer is not None and "tools" not in (tokenizer.tool_template or ""):
        raise RequestError("tools", f"the chat template of {backend.engine.model_name} takes no tools")
    if named is not None:
        schema = next(t["function"].get("parameters") or {"type": "object"} for t in tools if _name(t) == named)
        return ToolPlan(tools=tools, make_parser=lambda: NamedParser(named), schema=schema, parallel=parallel)
    if tool_choice == "required":
        return ToolPlan(tools=tools, make_parser=ListParser, schema=_calls_schema(tools, parallel), parallel=parallel)
    if style is None:
        raise RequestError(
            "tools",
            "how this model writes tool calls is not known: start the server with --tool-call-parser, or name a tool "
            "in tool_choice",
        )
    return ToolPlan(
        tools=tools,
        make_parser=lambda: make_parser(style),
        keeps_special_tokens=style in SPECIAL_MARKS,
        parallel=parallel,
    )


def _tool_names(tools: Any) -> list[str]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise RequestError("tools", f"{tools!r:.80} is not a list")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(where, f"{tool!r:.80} is not of type 'function'")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{where}.function", f"{function!r:.80} has no name")
        if not isinstance(function.get("parameters"), (dict, type(None))):
            raise RequestError(f"{where}.function.parameters", f"{function['parameters']!r:.80} is not a JSON schema")
    names = [_name(tool) for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RequestError("tools", f"{names.count(name)} tools are named {name!r:.80}")
    return names


def _name(tool: dict[str, Any]) -> str:
    return tool["function"]["name"]


def _named(choice: Any, names: Sequence[str]) -> str | None:
    """The tool that must be called, if it is one."""
    if choice in (None, "auto", "none", "required"):
        return None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError("tool_choice", f"{choice!r:.80} is not none, auto, required, or a function by its name")
    if name not in names:
        raise RequestError("tool_choice", f"{name!r:.80} is not one of the tools: {', '.join(names)}"[:400])
    return name


def _calls_schema(tools: Sequence[dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """Of a list of at least one call."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": _name(tool)},
                "parameters": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **({} if parallel else {"maxItems": 1})}


class Answer:
    """One choice's text on its way to content and tool calls."""

    def __init__(self, plan: ToolPlan):
        self._parser = plan.make_parser() if plan.make_parser is not None else None
        self._parallel = plan.parallel
        self.num_calls = 0

    def add(self, text: str, at_end: bool) -> list[Delta]:
        if self._parser is None:
            return [Content(text)] if text else []
        deltas = self._parser.feed(text)
        if at_end:
            deltas += self._parser.finish()
        return list(self._allowed(deltas))

    def _allowed(self, deltas: Sequence[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if not isinstance(delta, Content) and delta.index > 0 and not self._parallel:
                continue
            if isinstance(delta, Start):
                self.num_calls += 1
            yield delta


def call_delta(delta: Start | Arguments) -> dict[str, Any]:
    """As an entry of a chunk's ``tool_calls``."""
    if isinstance(delta, Arguments):
        return {"index": delta.index, "function": {"arguments": delta.text}}
    function = {"name": delta.name, "arguments": ""}
    return {"index": delta.index, "id": _call_id(delta), "type": "function", "function": function}


def _call_id(delta: Start) -> str:
    return delta.call_id or f"call_{secrets.token_hex(12)}"


def message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """A whole answer."""
    content = "".join(d.text for d in deltas if isinstance(d, Content))
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, Start):
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": _call_id(delta), "type": "function", "function": function})
        elif isinstance(delta, Arguments):
            calls[delta.index]["function"]["arguments"] += delta.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    return message | {"tool_calls": calls} if calls else message
