"""Between the wire and the engine's types, as a server does it; ``client_codec`` is the client's side.

Here and in ``chat.wire`` is every conversion and every check of a message. Messages that need neither (an abort, token
ids, a text) are built and read where they are used.

Sampling fields have the same names on both sides, so they are carried by name: a field added to the .proto and to
``SamplingParams`` needs no line here unless its type needs one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.request import EngineStats, LoadedAdapter, Pooling, Request, TokenEvent
from jaxserve.sampling_params import SamplingParams, StructuredOutputs, sampling_params_from
from jaxserve.server.chat.tools import Answer, ChatFinishReason, ToolPlan
from jaxserve.server.chat.wire import Chat, call_pieces, read_chat
from jaxserve.server.limits import QUICK_BYTES
from jaxserve.server.options import ServerOptions
from jaxserve.server.refusing import Refusing
from jaxserve.server.v1 import inference_pb2 as pb

FINISH_REASONS: dict[ChatFinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "deadline": pb.FINISH_REASON_DEADLINE,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}
FINISH_REASON_NAMES: dict[int, ChatFinishReason] = {value: name for name, value in FINISH_REASONS.items()}

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

Prompt = str | tuple[int, ...] | Chat  # text, token ids, a chat: told apart by their type


# Requests: wire to engine.


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a ``GenerateRequest`` comes to."""

    request: Request
    tools: ToolPlan


def read_prompt(message: pb.GenerateRequest | pb.TokenizeRequest | pb.EmbedRequest) -> Prompt:
    """Raises RequestError when none is set, or for a chat that is none."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "messages" and not isinstance(message, pb.EmbedRequest):
        return read_chat(message.messages)
    if not isinstance(message, pb.TokenizeRequest) and kind == "token_ids":
        return tuple(message.token_ids.ids)
    raise RequestError("prompt", "none is set")


def is_quick(message: pb.GenerateRequest) -> bool:
    """Whether reading it takes less than going to a thread and back."""
    sampling, kind = message.sampling, message.WhichOneof("prompt")
    return kind != "messages" and not sampling.HasField("structured_outputs") and message.ByteSize() <= QUICK_BYTES


def read_embed_options(message: pb.EmbedRequest) -> dict[str, Any]:
    """The keywords of ``EngineCore.make_embedding_request`` that are set."""
    names = ("normalize", "truncate_prompt_tokens", "request_id", "priority", "lora")
    given: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}
    if message.pooling not in (*POOLINGS.values(), pb.POOLING_UNSPECIFIED):
        raise RequestError("pooling", f"{message.pooling} is not a way to pool")
    return given | {"pooling": "mean" if message.pooling == pb.POOLING_MEAN else "last"}


def read_sampling(message: pb.SamplingParams, defaults: Mapping[str, Any], tools: ToolPlan) -> SamplingParams:
    """The fields that are set or that ``tools`` ask for, the model's ``defaults`` for others.

    Raises RequestError with the field's name for a value that is refused.
    """
    given = {field.name: READ_FIELD.get(field.name, _same)(value) for field, value in message.ListFields()}
    if (skips := tools.skips_special_tokens(given.get("skip_special_tokens"))) is not None:
        given["skip_special_tokens"] = skips
    if tools.schema is not None:
        if "structured_outputs" in given:
            raise RequestError("structured_outputs", "set, but tool_choice holds the answer to something already")
        given["structured_outputs"] = {"json": tools.schema}
    return sampling_params_from({**defaults, **given})


def _read_structured(message: pb.StructuredOutputs) -> StructuredOutputs:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise RequestError("structured_outputs", "none of its fields is set")
    value = getattr(message, kind)
    given: dict[str, Any] = {kind: tuple(value.texts) if kind == "choice" else value}
    return StructuredOutputs(**given)


# Answers: engine to wire.


class ChunkWriter:
    """The chunks of one request, in whose answers ``tools`` may be called."""

    def __init__(self, tools: ToolPlan):
        self._tools = tools
        self._answers: dict[int, Answer] = {}  # by choice

    def chunks(self, events: Sequence[TokenEvent]) -> list[pb.GenerateChunk]:
        """One for each choice of the request's next consecutive events."""
        if len(events) == 1:
            return [self._chunk(events)]
        choices: dict[int, list[TokenEvent]] = {}
        for event in events:
            choices.setdefault(event.choice, []).append(event)
        return [self._chunk(of_choice) for of_choice in choices.values()]

    def _chunk(self, events: Sequence[TokenEvent]) -> pb.GenerateChunk:
        chunk = _generate_chunk(events)
        if self._tools.make_parser is None:
            return chunk
        if chunk.choice not in self._answers:
            self._answers[chunk.choice] = Answer(self._tools)
        answer, reason = self._answers[chunk.choice], events[-1].finish_reason
        chunk.text, pieces = call_pieces(answer.add(chunk.text, at_end=reason is not None))
        chunk.tool_calls.extend(pieces)
        if (reason := answer.finish_reason(reason)) is not None:
            chunk.finish_reason = FINISH_REASONS[reason]
        return chunk


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
    info.mesh_replica = engine.parallel_config.replica
    info.load.CopyFrom(load_message(stats))
    if (lora := engine.lora_config) is not None:
        info.max_loras, info.max_lora_rank = lora.max_loras, lora.max_rank


def load_message(stats: EngineStats) -> pb.EngineLoad:
    return pb.EngineLoad(**{f.name: getattr(stats, f.name) for f in pb.EngineLoad.DESCRIPTOR.fields})


def lora_message(adapter: LoadedAdapter) -> pb.Lora:
    return pb.Lora(lora_name=adapter.name, lora_path=adapter.path or "", rank=adapter.rank)


def sampling_message(values: Mapping[str, Any]) -> pb.SamplingParams:
    """The set fields of ``values``; None is unset."""
    known = {f.name for f in fields(SamplingParams)}
    message = pb.SamplingParams()
    for name, value in values.items():
        if name not in known:
            raise RequestError(name, "unknown sampling field")
        if value is None:
            continue
        with Refusing(name):
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


def _same(value: Any) -> Any:
    return value
