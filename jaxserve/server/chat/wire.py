"""A chat on the wire: its messages and tools, and the calls in its answer.

Outside the wire they are the mappings of OpenAI's API: what chat templates read, and what clients have.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.server.chat.conversation import encode_conversation
from jaxserve.server.chat.tools import ToolPlan, call_id, tool_plan
from jaxserve.server.options import ServerOptions
from jaxserve.server.prompts import check_unicode, renamed
from jaxserve.server.refusing import Refusing
from jaxserve.server.tool_calls import Content, Delta, Start
from jaxserve.server.v1 import inference_pb2 as pb

CHOICES: dict[str, pb.ToolChoice] = {
    "auto": pb.TOOL_CHOICE_AUTO,
    "none": pb.TOOL_CHOICE_NONE,
    "required": pb.TOOL_CHOICE_REQUIRED,
}
CHOICE_NAMES: dict[int, str | None] = {int(value): name for name, value in CHOICES.items()} | {0: None}
OPTIONAL_FIELDS = ("name", "tool_call_id", "reasoning_content")  # of a message, passed on as they are


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What ``ChatMessages`` says; ``plan`` and ``encode`` may take long."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    tool_choice: Any
    choice_field: str  # by which the wire has it
    parallel_tool_calls: bool
    add_generation_prompt: bool | None
    continue_final_message: bool
    documents: list[dict[str, Any]]
    variables: dict[str, Any]

    def plan(self, engine: EngineCore, options: ServerOptions) -> ToolPlan:
        """Raises RequestError naming the field."""
        try:
            return tool_plan(engine, options, self.tools, self.tool_choice, parallel=self.parallel_tool_calls)
        except RequestError as error:
            raise renamed(error, {"tool_choice": self.choice_field}) from error

    def encode(self, engine: EngineCore, options: ServerOptions, plan: ToolPlan, *, cut: bool) -> list[int]:
        """Token ids; ``cut`` as for ``encode_conversation``. Raises RequestError naming the field."""
        return encode_conversation(
            engine,
            self.messages,
            options.max_prompt_bytes,
            cut=cut,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            tools=plan.tools,
            documents=self.documents or None,
            variables=self.variables,
        )


def read_chat(message: pb.ChatMessages) -> Chat:
    """Raises RequestError naming the field whose JSON is none, or a choice of tools that is not known."""
    choice_field = message.WhichOneof("choice") or "tool_choice"
    if choice_field == "tool_choice_name":
        choice: Any = {"type": "function", "function": {"name": message.tool_choice_name}}
    elif message.tool_choice in CHOICE_NAMES:
        choice = CHOICE_NAMES[message.tool_choice]
    else:
        raise RequestError("tool_choice", f"{message.tool_choice} is not a choice")
    has_variables = message.HasField("chat_template_kwargs")
    return Chat(
        messages=[_read_message(m) for m in message.messages],
        tools=[_read_tool(f"tools[{i}]", tool) for i, tool in enumerate(message.tools)],
        tool_choice=choice,
        choice_field=choice_field,
        parallel_tool_calls=message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True,
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else None,
        continue_final_message=message.continue_final_message,
        documents=[_json_object(f"documents[{i}]", text) for i, text in enumerate(message.documents)],
        variables=_json_object("chat_template_kwargs", message.chat_template_kwargs) if has_variables else {},
    )


def _read_message(message: pb.ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    found |= {name: getattr(message, name) for name in OPTIONAL_FIELDS if message.HasField(name)}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return found


def _read_tool(where: str, tool: pb.Tool) -> dict[str, Any]:
    if not tool.name:
        raise RequestError(f"{where}.name", "is empty")
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.HasField("parameters"):
        function["parameters"] = _json_object(f"{where}.parameters", tool.parameters)
    return {"type": "function", "function": function}


def _json_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"{text!r:.80} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(field, f"{text!r:.80} is not an object")
    check_unicode(field, value)
    return value


# Answers.


@dataclass(frozen=True, kw_only=True)
class ToolCallPiece:
    """As a client gets it; the .proto describes the fields."""

    index: int
    id: str | None
    name: str | None
    arguments: str


def call_pieces(deltas: Sequence[Delta]) -> tuple[str, list[pb.ToolCallPiece]]:
    """The text among ``deltas``, and the pieces of calls, one for each call."""
    texts: list[str] = []
    pieces: dict[int, pb.ToolCallPiece] = {}
    for delta in deltas:
        if isinstance(delta, Content):
            texts.append(delta.text)
        elif isinstance(delta, Start):
            pieces[delta.index] = pb.ToolCallPiece(index=delta.index, id=call_id(delta), name=delta.name)
        elif delta.index in pieces:
            pieces[delta.index].arguments += delta.text
        else:
            pieces[delta.index] = pb.ToolCallPiece(index=delta.index, arguments=delta.text)
    return "".join(texts), list(pieces.values())


def read_pieces(messages: Iterable[pb.ToolCallPiece]) -> tuple[ToolCallPiece, ...]:
    return tuple(
        ToolCallPiece(
            index=m.index,
            id=m.id if m.HasField("id") else None,
            name=m.name if m.HasField("name") else None,
            arguments=m.arguments,
        )
        for m in messages
    )


# Requests of a client.


def chat_messages(messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> pb.ChatMessages:
    """``messages`` with the ``fields`` of a chat (``CHAT_FIELDS``) that are set.

    Raises RequestError naming what the wire cannot hold.
    """
    if isinstance(messages, (str, Mapping)):
        raise RequestError("messages", f"{messages!r:.80} is not a list of messages")
    chat = pb.ChatMessages()
    with Refusing("messages"):
        for message in messages:
            chat.messages.append(_message(message))
    for name, value in fields.items():
        with Refusing(name):
            CHAT_FIELDS[name](chat, value)
    return chat


def _message(given: Mapping[str, Any]) -> pb.ChatMessage:
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r:.80} is not a message")
    for name, value in given.items():
        if name not in ("role", "content", "tool_calls", "refusal", *OPTIONAL_FIELDS) and value is not None:
            raise ValueError(f"a message has no field {name!r:.80}")
    if "role" not in given:
        raise ValueError(f"{given!r:.80} has no role")
    message = pb.ChatMessage(role=given["role"], content=_content(given.get("content")))
    for name in OPTIONAL_FIELDS:
        if given.get(name) is not None:
            setattr(message, name, given[name])
    for call in given.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        message.tool_calls.add(id=call.get("id"), name=function["name"], arguments=text)
    if given.get("content") is None and not message.tool_calls:
        raise ValueError("a message without tool_calls has no content")
    return message


def _content(content: Any) -> str | None:
    """One text, as the wire has it: of parts, which OpenAI's API takes, a line each."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{content!r:.80} is neither a text nor a list of parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{part!r:.80} is not a part of type 'text'")
    return "\n".join(part["text"] for part in content)


def _set_tools(chat: pb.ChatMessages, tools: Sequence[Mapping[str, Any]]) -> None:
    for tool in tools:
        if tool.get("type") != "function":
            raise ValueError(f"{tool!r:.80} is not of type 'function'")
        function = tool["function"]
        for name in function:
            if name not in ("name", "description", "parameters"):
                raise ValueError(f"a tool has no field {name!r:.80}")
        parameters = function.get("parameters")
        text = parameters if isinstance(parameters, str | None) else json.dumps(parameters)
        chat.tools.add(name=function["name"], description=function.get("description"), parameters=text)


def _set_choice(chat: pb.ChatMessages, choice: str | Mapping[str, Any]) -> None:
    if not isinstance(choice, str):
        chat.tool_choice_name = choice["function"]["name"]
    elif choice in CHOICES:
        chat.tool_choice = CHOICES[choice]
    else:
        raise ValueError(f"{choice!r:.80} is not none, auto, required, or a function by its name")


def _set_documents(chat: pb.ChatMessages, documents: Sequence[Mapping[str, Any]]) -> None:
    chat.documents.extend(json.dumps(document) for document in documents)


def _setter(name: str, convert: Callable[[Any], Any]) -> Callable[[pb.ChatMessages, Any], None]:
    return lambda chat, value: setattr(chat, name, convert(value))


CHAT_FIELDS: dict[str, Callable[[pb.ChatMessages, Any], None]] = {
    "tools": _set_tools,
    "tool_choice": _set_choice,
    "parallel_tool_calls": _setter("parallel_tool_calls", lambda value: value),
    "add_generation_prompt": _setter("add_generation_prompt", lambda value: value),
    "continue_final_message": _setter("continue_final_message", lambda value: value),
    "chat_template_kwargs": _setter("chat_template_kwargs", json.dumps),
    "documents": _set_documents,
}  # a client's name of a field of a chat -> what sets it; the names are those of HTTP
