"""Between the wire and a Python client: its requests, and the answers as it gets them; ``codec`` is the server's side.

Answers about the model and the server are passed on as they came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.request import Embedding, Pooling, TokenLogprobs, Usage
from jaxserve.server.chat.tools import ChatFinishReason
from jaxserve.server.chat.wire import CHAT_FIELDS, ToolCallPiece, chat_messages, read_pieces
from jaxserve.server.codec import FINISH_REASON_NAMES, POOLINGS, sampling_message
from jaxserve.server.refusing import Refusing
from jaxserve.server.v1 import inference_pb2 as pb

Messages = Sequence[Mapping[str, Any]]  # as OpenAI's API has them: {"role": ..., "content": ...}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """``GenerateChunk`` as a Python client gets it; the .proto describes the fields."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    choice: int = 0
    tool_calls: tuple[ToolCallPiece, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RequestFailure:
    """What became of one request of a batch; the .proto describes the fields."""

    request_id: str
    code: int  # gRPC's
    message: str
    field: str | None


# Requests.


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Messages | None,
    fields: Mapping[str, Any],
    request_id: str | None,
    priority: int | None,
    lora: str | None,
) -> pb.GenerateRequest:
    """Raises RequestError for an unknown field and for a value that the wire's type cannot hold.

    Args:
        fields: of ``SamplingParams``, and of a chat (``CHAT_FIELDS``), by name.
    """
    given = {"prompt": prompt, "token_ids": token_ids, "messages": messages}
    if sum(value is not None for value in given.values()) != 1:
        raise RequestError("prompt", f"give exactly one of {', '.join(given)}")
    _check_prompt(prompt)
    sampling, chat = split_fields(fields, messages)
    request = pb.GenerateRequest(sampling=sampling_message(sampling))
    if messages is not None:
        request.messages.CopyFrom(chat_messages(messages, chat))
    with Refusing("prompt"):
        if prompt is not None:
            request.text = prompt
        elif token_ids is not None:
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()  # an empty prompt is still a prompt, for the server to refuse
    if request_id is not None:
        with Refusing("request_id"):
            request.request_id = request_id
    if priority is not None:
        with Refusing("priority"):
            request.priority = priority
    if lora is not None:
        with Refusing("lora"):
            request.lora = lora
    return request


def embed_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    pooling: Pooling | None,
    normalize: bool | None,
    truncate_prompt_tokens: int | None,
    request_id: str | None,
    priority: int | None,
    lora: str | None,
) -> pb.EmbedRequest:
    """Raises RequestError for a value that the wire cannot hold."""
    if (prompt is None) == (token_ids is None):
        raise RequestError("prompt", "give exactly one of prompt, token_ids")
    _check_prompt(prompt)
    if pooling is not None and pooling not in POOLINGS:
        raise RequestError("pooling", f"{pooling!r} is not one of {', '.join(POOLINGS)}")
    request = pb.EmbedRequest()
    given = {"truncate_prompt_tokens": truncate_prompt_tokens, "request_id": request_id, "priority": priority}
    given |= {
        "lora": lora,
        "normalize": normalize,
        "text": prompt,
        "pooling": None if pooling is None else POOLINGS[pooling],
    }
    for name, value in given.items():
        if value is not None:
            with Refusing("prompt" if name == "text" else name):
                setattr(request, name, value)
    if token_ids is not None:
        with Refusing("prompt"):
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()
    return request


def _check_prompt(prompt: Any) -> None:
    """protobuf refuses it, too, without saying what it would take."""
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError("prompt", f"{prompt!r:.80} is not a text; token ids are given as token_ids")


def split_fields(fields: Mapping[str, Any], messages: Messages | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of ``SamplingParams`` and those of a chat. RequestError for one of a chat without ``messages``."""
    chat = {name: value for name, value in fields.items() if name in CHAT_FIELDS and value is not None}
    if messages is None:
        for name in chat:
            raise RequestError(name, "is for messages, not for a prompt")
    return {name: value for name, value in fields.items() if name not in CHAT_FIELDS}, chat


def tokenize_request(
    prompt: str | None, messages: Messages | None, add_special_tokens: bool | None, fields: Mapping[str, Any]
) -> pb.TokenizeRequest:
    """As ``generate_request``; ``fields`` of a chat only."""
    if (prompt is None) == (messages is None):
        raise RequestError("prompt", "give exactly one of prompt, messages")
    _check_prompt(prompt)
    request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
    others, chat = split_fields(fields, messages)
    for name in others:
        raise RequestError(name, "unknown field")
    if prompt is not None:
        with Refusing("prompt"):
            request.text = prompt
    if messages is not None:
        request.messages.CopyFrom(chat_messages(messages, chat))
    return request


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool | None) -> pb.DetokenizeRequest:
    with Refusing("token_ids"):
        return pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)


# Answers.


def _read_logprobs(message: pb.TokenLogprobs, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id, logprob=message.logprob, top=tuple((t.token_id, t.logprob) for t in message.top)
    )


def read_chunk(message: pb.GenerateChunk) -> Chunk:
    stop = message.WhichOneof("stop_reason")
    usage = message.usage
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(_read_logprobs(entry, i) for i, entry in zip(message.token_ids, message.logprobs)),
        prompt_logprobs=tuple(_read_logprobs(entry, entry.token_id) for entry in message.prompt_logprobs),
        finish_reason=FINISH_REASON_NAMES.get(message.finish_reason),
        stop_reason=getattr(message, stop) if stop else None,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
        if message.HasField("usage")
        else None,
        choice=message.choice,
        tool_calls=read_pieces(message.tool_calls),
    )


def read_batch_chunk(message: pb.BatchChunk) -> Chunk | RequestFailure:
    if message.WhichOneof("kind") == "chunk":
        return read_chunk(message.chunk)
    failure = message.failure
    return RequestFailure(
        request_id=failure.request_id, code=failure.code, message=failure.message, field=failure.field or None
    )


def read_embedding(message: pb.EmbedResponse) -> Embedding:
    values = np.array(message.values, np.float32)
    return Embedding(request_id=message.request_id, values=values, prompt_len=message.prompt_tokens)
