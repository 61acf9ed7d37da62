"""Between the wire and the engine's types, in both directions: every conversion and every check of a message.

Messages that need neither (an abort, token ids, a text) are built and read where they are used, and a client passes the
answers about the model and the server on as they came.

Sampling fields have the same names on both sides, so they are carried by name: a field added to the .proto and to
``SamplingParams`` needs no line here unless its type needs one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.request import (
    Embedding,
    EngineStats,
    FinishReason,
    LoadedAdapter,
    Pooling,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from jaxserve.sampling_params import SamplingParams, StructuredOutputs, sampling_params_from
from jaxserve.server.options import ServerOptions
from jaxserve.server.v1 import inference_pb2 as pb

FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "deadline": pb.FINISH_REASON_DEADLINE,
}
FINISH_REASON_NAMES: dict[int, FinishReason] = {value: name for name, value in FINISH_REASONS.items()}

SERVER_STATES: dict[str, pb.ServerState] = {
    "loading": pb.SERVER_STATE_LOADING,
    "ready": pb.SERVER_STATE_READY,
    "draining": pb.SERVER_STATE_DRAINING,
    "failed": pb.SERVER_STATE_FAILED,
    "closed": pb.SERVER_STATE_DRAINING,
}

POOLINGS: dict[Pooling, pb.Pooling] = {"last": pb.POOLING_LAST, "mean": pb.POOLING_MEAN}

READ_FIELD: dict[str, Callable[[Any], Any]] = {
    "stop": tuple,
    "stop_token_ids": tuple,
    "bad_words": tuple,
    "logit_bias": dict,
    "allowed_token_ids": lambda value: tuple(value.ids),
    "structured_outputs": lambda value: _read_structured(value),
}  # sampling field -> its Python value; the others are scalars

Prompt = str | tuple[int, ...] | list[dict[str, str]]  # text, token ids, chat messages: told apart by their type


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """``GenerateChunk`` as a Python client gets it; the .proto describes the fields."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt's tokens from the second on
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None
    choice: int = 0


@dataclass(frozen=True, kw_only=True)
class RequestFailure:
    """What became of one request of a batch; the .proto describes the fields."""

    request_id: str
    code: int  # gRPC's
    message: str
    field: str | None


# Requests: wire to engine.


def read_prompt(message: pb.GenerateRequest | pb.TokenizeRequest | pb.EmbedRequest) -> Prompt:
    """Raises RequestError when none is set."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "messages" and not isinstance(message, pb.EmbedRequest):
        return [{"role": m.role, "content": m.content} for m in message.messages.messages]
    if not isinstance(message, pb.TokenizeRequest) and kind == "token_ids":
        return tuple(message.token_ids.ids)
    raise RequestError("prompt", "none is set")


def read_embed_options(message: pb.EmbedRequest) -> dict[str, Any]:
    """The keywords of ``EngineCore.make_embedding_request`` that are set."""
    names = ("normalize", "truncate_prompt_tokens", "request_id", "priority", "lora")
    given: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}
    if message.pooling not in (*POOLINGS.values(), pb.POOLING_UNSPECIFIED):
        raise RequestError("pooling", f"{message.pooling} is not a way to pool")
    return given | {"pooling": "mean" if message.pooling == pb.POOLING_MEAN else "last"}


def read_sampling(message: pb.SamplingParams, defaults: Mapping[str, Any]) -> SamplingParams:
    """The fields that are set, the model's ``defaults`` for others.

    Raises RequestError with the field's name for a value that is refused.
    """
    given = {field.name: READ_FIELD.get(field.name, _same)(value) for field, value in message.ListFields()}
    return sampling_params_from({**defaults, **given})


def _read_structured(message: pb.StructuredOutputs) -> StructuredOutputs:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise RequestError("structured_outputs", "none of its fields is set")
    value = getattr(message, kind)
    given: dict[str, Any] = {kind: tuple(value.texts) if kind == "choice" else value}
    return StructuredOutputs(**given)


# Requests: client to wire.


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Mapping[str, str]] | None,
    sampling: Mapping[str, Any],
    request_id: str | None,
    priority: int | None,
    lora: str | None,
) -> pb.GenerateRequest:
    """Raises RequestError for an unknown sampling field and for a value that the wire's type cannot hold."""
    given = {"prompt": prompt, "token_ids": token_ids, "messages": messages}
    if sum(value is not None for value in given.values()) != 1:
        raise RequestError("prompt", f"give exactly one of {', '.join(given)}")
    request = pb.GenerateRequest(sampling=sampling_message(sampling))
    with _Refusing("prompt"):
        if prompt is not None:
            request.text = prompt
        elif token_ids is not None:
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()  # an empty prompt is still a prompt, for the server to refuse
        else:
            request.messages.CopyFrom(chat_messages(messages or ()))
    if request_id is not None:
        with _Refusing("request_id"):
            request.request_id = request_id
    if priority is not None:
        with _Refusing("priority"):
            request.priority = priority
    if lora is not None:
        with _Refusing("lora"):
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
            with _Refusing("prompt" if name == "text" else name):
                setattr(request, name, value)
    if token_ids is not None:
        with _Refusing("prompt"):
            request.token_ids.ids.extend(token_ids)
            request.token_ids.SetInParent()
    return request


def sampling_message(values: Mapping[str, Any]) -> pb.SamplingParams:
    """The set fields of ``values``; None is unset."""
    known = {f.name for f in fields(SamplingParams)}
    message = pb.SamplingParams()
    for name, value in values.items():
        if name not in known:
            raise RequestError(name, "unknown sampling field")
        if value is None:
            continue
        with _Refusing(name):
            if name == "allowed_token_ids":
                message.allowed_token_ids.ids.extend(value)
                message.allowed_token_ids.SetInParent()  # no token allowed is not the same as unset
            elif name == "structured_outputs":
                message.structured_outputs.CopyFrom(_structured_message(value))
            elif name == "logit_bias":
                message.logit_bias.update(value)
            elif name in READ_FIELD:
                getattr(message, name).extend([value] if isinstance(value, str) else value)
            else:
                setattr(message, name, value)
    return message


def _structured_message(value: Any) -> pb.StructuredOutputs:
    structured = SamplingParams(structured_outputs=value).structured_outputs
    assert structured is not None
    value = getattr(structured, structured.kind)
    given: dict[str, Any] = {structured.kind: pb.Texts(texts=value) if structured.kind == "choice" else value}
    return pb.StructuredOutputs(**given)


def chat_messages(messages: Sequence[Mapping[str, str]]) -> pb.ChatMessages:
    with _Refusing("messages"):
        return pb.ChatMessages(messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages])


def tokenize_request(
    prompt: str | None, messages: Sequence[Mapping[str, str]] | None, add_special_tokens: bool | None
) -> pb.TokenizeRequest:
    if (prompt is None) == (messages is None):
        raise RequestError("prompt", "give exactly one of prompt, messages")
    request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
    with _Refusing("prompt"):
        if prompt is not None:
            request.text = prompt
        else:
            request.messages.CopyFrom(chat_messages(messages or ()))
    return request


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool | None) -> pb.DetokenizeRequest:
    with _Refusing("token_ids"):
        return pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)


# Answers: engine to wire.


def generate_chunks(events: Sequence[TokenEvent]) -> list[pb.GenerateChunk]:
    """One chunk for each choice of one request's consecutive events."""
    choices: dict[int, list[TokenEvent]] = {}
    for event in events:
        choices.setdefault(event.choice, []).append(event)
    return [_generate_chunk(of_choice) for of_choice in choices.values()]


def _generate_chunk(events: Sequence[TokenEvent]) -> pb.GenerateChunk:
    first, last = events[0], events[-1]
    text = "".join(e.text for e in events)
    chunk = pb.GenerateChunk(request_id=first.request_id, index=first.index, text=text, choice=first.choice)
    for event in events:
        if event.token_id is None:
            continue
        chunk.token_ids.append(event.token_id)
        if event.logprob is not None:
            chunk.logprobs.append(_logprobs_message(event.logprob, event.top_logprobs or ()))
    for entry in first.prompt_logprobs or ():
        if entry is not None:
            chunk.prompt_logprobs.append(_logprobs_message(entry.logprob, entry.top, entry.token_id))
    if last.finish_reason is not None:
        chunk.finish_reason = FINISH_REASONS[last.finish_reason]
    if isinstance(last.stop_reason, str):
        chunk.stop_string = last.stop_reason
    elif last.stop_reason is not None:
        chunk.stop_token_id = last.stop_reason
    if last.usage is not None:
        chunk.usage.prompt_tokens = last.usage.prompt_tokens
        chunk.usage.completion_tokens = last.usage.completion_tokens
        chunk.usage.cached_tokens = last.usage.cached_tokens
    return chunk


def _logprobs_message(
    logprob: float, top: Sequence[tuple[int, float]], token_id: int | None = None
) -> pb.TokenLogprobs:
    top_messages = [pb.TopLogprob(token_id=i, logprob=value) for i, value in top]
    return pb.TokenLogprobs(logprob=logprob, top=top_messages, token_id=token_id)


def _read_logprobs(message: pb.TokenLogprobs, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=token_id, logprob=message.logprob, top=tuple((t.token_id, t.logprob) for t in message.top)
    )


def model_info(engine: EngineCore) -> pb.ModelInfo:
    config = engine.model_config
    return pb.ModelInfo(
        model_name=engine.model_name,
        family=config.family,
        dtype=engine.dtype,
        max_model_len=engine.scheduler_config.max_model_len,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eos_token_ids=config.eos_token_ids,
        has_tokenizer=engine.tokenizer is not None,
        has_chat_template=engine.tokenizer is not None and engine.tokenizer.chat_template is not None,
        default_sampling=sampling_message(engine.sampling_defaults),
    )


def server_info(version: str, state: str, uptime_s: float, options: ServerOptions) -> pb.ServerInfo:
    """What is known of a server whether its engine is ready or not."""
    return pb.ServerInfo(
        version=version,
        state=SERVER_STATES[state],
        uptime_s=uptime_s,
        slow_reader_timeout_s=options.slow_reader_timeout_s,
        drain_timeout_s=options.drain_timeout_s,
        max_message_bytes=options.max_message_bytes,
        max_prompt_bytes=options.max_prompt_bytes,
    )


def add_engine_info(info: pb.ServerInfo, engine: EngineCore, stats: EngineStats) -> None:
    """The fields of ``ServerInfo`` that a ready engine fills."""
    info.max_num_seqs = engine.scheduler_config.max_num_seqs
    info.max_num_waiting = engine.scheduler_config.max_num_waiting
    info.page_size = engine.cache_config.page_size
    info.mesh_stage = engine.parallel_config.stage
    info.mesh_tensor = engine.parallel_config.tensor
    info.load.CopyFrom(load_message(stats))
    if (lora := engine.lora_config) is not None:
        info.max_loras, info.max_lora_rank = lora.max_loras, lora.max_rank


def load_message(stats: EngineStats) -> pb.EngineLoad:
    return pb.EngineLoad(**{f.name: getattr(stats, f.name) for f in pb.EngineLoad.DESCRIPTOR.fields})


def lora_message(adapter: LoadedAdapter) -> pb.Lora:
    return pb.Lora(lora_name=adapter.name, lora_path=adapter.path or "", rank=adapter.rank)


# Answers: wire to client.


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


def _same(value: Any) -> Any:
    return value


class _Refusing:
    """Turns protobuf's refusal of a value (type, range, invalid Unicode) into a RequestError that names the field."""

    def __init__(self, field: str):
        self.field = field

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (TypeError, ValueError, KeyError, AttributeError)) and not isinstance(error, RequestError):
            raise RequestError(self.field, str(error)) from error
