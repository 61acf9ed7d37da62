"""The tools of a chat request: what is offered to the model, and how its answer is read."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.request import FinishReason
from jaxserve.server.options import ServerOptions
from jaxserve.server.tool_calls import Content, Delta, Parser, Start, detect_style, make_parser
from jaxserve.server.tool_calls.styles import SPECIAL_MARKS, ListParser, NamedParser

ChatFinishReason = FinishReason | Literal["tool_calls"]


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

    def skips_special_tokens(self, asked: bool | None) -> bool | None:
        """The sampling field of that name, where the request has ``asked`` (None: nothing). None: the default."""
        return False if asked is None and self.keeps_special_tokens else asked


def tool_plan(engine: EngineCore, options: ServerOptions, tools: Any, tool_choice: Any, *, parallel: bool) -> ToolPlan:
    """Raises RequestError naming the field."""
    names = _tool_names(tools)
    if not names:
        if tool_choice not in (None, "none"):
            raise RequestError("tool_choice", f"{tool_choice!r:.80}, but there are no tools")
        return ToolPlan()
    named = _named(tool_choice, names)
    if tool_choice == "none":
        return ToolPlan()
    style = _style(engine, options)
    tokenizer = engine.tokenizer
    if tokenizer is not None and "tools" not in (tokenizer.tool_template or ""):
        raise RequestError("tools", f"the chat template of {engine.model_name} takes no tools")
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


def _style(engine: EngineCore, options: ServerOptions) -> str | None:
    """How the model writes tool calls; None: not at all."""
    asked = options.tool_call_parser
    if asked == "none":
        return None
    if asked != "auto":
        return asked
    return detect_style(engine.tokenizer.tool_template if engine.tokenizer is not None else None)


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
    """Of a list of at least one call. RequestError for parameters that are nested too deep to be read."""
    calls = []
    for i, tool in enumerate(tools):
        parameters = tool["function"].get("parameters") or {"type": "object"}
        try:
            parameters = _moved(parameters, f"#/items/anyOf/{i}/properties/parameters")
        except RecursionError:
            raise RequestError(f"tools[{i}].function.parameters", "is nested too deep") from None
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": _name(tool)}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **({} if parallel else {"maxItems": 1})}


def _moved(schema: Any, where: str) -> Any:
    """A JSON schema as a part of another one, ``where`` in that (a JSON pointer): its references to its own root, such
    as ``#/$defs/Place``, go on meaning what they did."""
    if isinstance(schema, list):
        return [_moved(part, where) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for name, value in schema.items():
        if name in ("const", "enum", "default", "examples"):  # values, no schemas
            moved[name] = value
        elif name in ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"):
            # By any name, those of the line above too.
            moved[name] = {k: _moved(v, where) for k, v in value.items()} if isinstance(value, dict) else value
        elif name == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[name] = where + value[1:]
        else:
            moved[name] = _moved(value, where)
    return moved


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

    def finish_reason(self, reason: FinishReason | None) -> ChatFinishReason | None:
        """Of the answer, whose completion ended for ``reason``."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason


def call_id(delta: Start) -> str:
    """The model's, or a new one."""
    return delta.call_id or f"call_{secrets.token_hex(12)}"
