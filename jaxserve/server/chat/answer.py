"""Whole answers of a chat, for a client: what the chunks of one request amount to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.request import TokenLogprobs, Usage
from jaxserve.server.chat.tools import ChatFinishReason
from jaxserve.server.client_codec import Chunk


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the model has made. ``arguments`` is JSON text as the model wrote it: valid if the model's is."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """One choice of a chat, whole. No call is in ``text``; ``token_ids`` and ``logprobs`` are of all its tokens."""

    choice: int
    text: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None
    usage: Usage | None

    @property
    def message(self) -> Mapping[str, Any]:
        """The answer as a message of the conversation that goes on; a tool's result follows it as ``{"role": "tool",
        "tool_call_id": call.id, "content": ...}``."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return message


class AnswerCollector:
    """Gathers the chunks of one request."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Chunk]] = {}  # by choice

    def add(self, chunk: Chunk) -> None:
        self._chunks.setdefault(chunk.choice, []).append(chunk)

    def answers(self) -> list[ChatAnswer]:
        """By their choice."""
        return [_answer(chunks) for _, chunks in sorted(self._chunks.items())]


def _answer(chunks: Sequence[Chunk]) -> ChatAnswer:
    calls: list[ToolCall] = []
    for piece in (piece for chunk in chunks for piece in chunk.tool_calls):
        if piece.index == len(calls):
            calls.append(ToolCall(id=piece.id or "", name=piece.name or "", arguments=""))
        call = calls[piece.index]
        calls[piece.index] = replace(call, arguments=call.arguments + piece.arguments)
    last = chunks[-1]
    return ChatAnswer(
        choice=last.choice,
        text="".join(chunk.text for chunk in chunks),
        tool_calls=tuple(calls),
        token_ids=tuple(i for chunk in chunks for i in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
    )
