"""Answers with tool calls, in OpenAI's shape."""

from collections.abc import Sequence
from typing import Any

from jaxserve.server.chat.tools import call_id
from jaxserve.server.tool_calls import Arguments, Content, Delta, Start


def call_delta(delta: Start | Arguments) -> dict[str, Any]:
    """As an entry of a chunk's ``tool_calls``."""
    if isinstance(delta, Arguments):
        return {"index": delta.index, "function": {"arguments": delta.text}}
    function = {"name": delta.name, "arguments": ""}
    return {"index": delta.index, "id": call_id(delta), "type": "function", "function": function}


def message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """A whole answer."""
    content = "".join(d.text for d in deltas if isinstance(d, Content))
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, Start):
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": call_id(delta), "type": "function", "function": function})
        elif isinstance(delta, Arguments):
            calls[delta.index]["function"]["arguments"] += delta.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    return message | {"tool_calls": calls} if calls else message
