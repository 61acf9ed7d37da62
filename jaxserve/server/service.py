"""The Inference service: each call is decoded, run against the AsyncEngine and answered. No engine logic here."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import grpc.aio

from jaxserve import __version__
from jaxserve.engine.async_engine import (
    AsyncEngine,
    DuplicateRequestError,
    EngineFailedError,
    NotServingError,
    RequestEndedError,
)
from jaxserve.engine.event_stream import SlowReaderError
from jaxserve.errors import QueueFullError, RequestError, UnknownLoraError
from jaxserve.request import Request
from jaxserve.server import codec
from jaxserve.server.batch import MissingIdError, run_batch
from jaxserve.server.chat.tools import ToolPlan
from jaxserve.server.chat.wire import Chat
from jaxserve.server.clients import CLIENT_HEADER, address_of_peer, client_name
from jaxserve.server.codec import Asked
from jaxserve.server.limits import limited_deadline, make_request, remaining_deadline
from jaxserve.server.options import ServerOptions
from jaxserve.server.patience import Patience
from jaxserve.server.prompts import UnsupportedByModelError, check_bytes, check_fits, renamed, tokenizer_of
from jaxserve.server.trace_context import trace_context
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc

FIELD_KEY = "jaxserve-field"  # trailing metadata: the request field at fault
ABORT_TIMEOUT_S = 0.2  # a reader that takes nothing may not take its status either


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS),
    (UnsupportedByModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (UnknownLoraError, grpc.StatusCode.NOT_FOUND),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SlowReaderError, grpc.StatusCode.ABORTED),
    (NotServingError, grpc.StatusCode.UNAVAILABLE),
    (EngineFailedError, grpc.StatusCode.UNAVAILABLE),
)  # the first that matches; any other exception is a bug, which grpc logs and answers with UNKNOWN
ANSWERED = tuple(kind for kind, _ in STATUS)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """``idle`` is set while no Generate call is open, its last bytes handed to the transport or its reader too slow."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions):
        self._engine = engine
        self._options = options
        self._started = time.monotonic()
        self._num_open = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self._count_open(context)
        deadline = remaining_deadline(self._options, context.time_remaining())
        finish_reason = None
        started = False
        patience = Patience(self._options.slow_reader_timeout_s)
        try:
            asked = await self._read(request, deadline, self._caller(context))
            writer = codec.ChunkWriter(asked.tools)
            async with aclosing(self._engine.stream_batches(asked.request)) as batches:
                async for events in batches:
                    if not started:  # by themselves: grpc would send them again after a first write given up
                        started = True
                        await context.send_initial_metadata(())
                    for chunk in writer.chunks(events):
                        await _write(context, chunk, patience)
                    finish_reason = events[-1].finish_reason
        except SlowReaderError as error:
            await _abort_unread(context, error)
        except ANSWERED as error:
            await _abort(context, error)
        finally:
            patience.close()
        if finish_reason == "deadline":
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")
        if finish_reason == "abort" and self._engine.state != "ready":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: the request was aborted")

    async def GenerateBatch(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> None:
        self._count_open(context)
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else time.monotonic() + remaining_s

        caller = self._caller(context)

        async def read(message: pb.GenerateRequest) -> Asked:
            limited = limited_deadline(self._options, deadline)
            return await self._read(message, limited, caller)

        patience = Patience(self._options.slow_reader_timeout_s)

        async def write(chunk: pb.BatchChunk) -> None:
            await _write(context, chunk, patience)

        try:
            await context.send_initial_metadata(())
            ends = await run_batch(request_iterator, self._engine, read, write, _failure)
        except SlowReaderError as error:
            await _abort_unread(context, error)
        except MissingIdError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error), ((FIELD_KEY, "request_id"),))
        except ANSWERED as error:
            await _abort(context, error)
        finally:
            patience.close()
        if "deadline" in ends:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")
        if "abort" in ends and self._engine.state != "ready":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down: requests were aborted")

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        self._count_open(context)
        deadline = remaining_deadline(self._options, context.time_remaining())
        try:
            engine_request = await asyncio.to_thread(self._read_embed_request, request, deadline, self._caller(context))
            embedding = await self._engine.embed(engine_request)
        except RequestEndedError as error:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if error.reason == "deadline" else grpc.StatusCode.ABORTED
            await context.abort(code, str(error))
        except ANSWERED as error:
            await _abort(context, error)
        return pb.EmbedResponse(
            request_id=embedding.request_id, values=embedding.values, prompt_tokens=embedding.prompt_len
        )

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        try:
            found = await self._engine.abort(request.request_id)
        except ANSWERED as error:
            await _abort(context, error)
        else:
            if found:
                return pb.AbortResponse()
        message = f"request_id: {request.request_id!r} is neither queued nor running"
        await context.abort(grpc.StatusCode.NOT_FOUND, message, ((FIELD_KEY, "request_id"),))

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        try:
            token_ids = await asyncio.to_thread(self._tokenize, request)
        except ANSWERED as error:
            await _abort(context, error)
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        try:
            text = await asyncio.to_thread(self._detokenize, request)
        except ANSWERED as error:
            await _abort(context, error)
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext) -> pb.ModelInfo:
        try:
            return codec.model_info(self._engine.engine)
        except ANSWERED as error:
            await _abort(context, error)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext) -> pb.ServerInfo:
        stats = self._engine.stats()
        info = codec.server_info(__version__, self._engine.state, time.monotonic() - self._started, self._options)
        if stats is not None:
            codec.add_engine_info(info, self._engine.engine, stats)
        return info

    async def _read(self, message: pb.GenerateRequest, deadline: float | None, caller: Mapping[str, Any]) -> Asked:
        """In a thread, unless it ``is_quick``: it may take long, and the event loop has other streams to serve."""
        if codec.is_quick(message):
            return self._read_request(message, deadline, caller)
        return await asyncio.to_thread(self._read_request, message, deadline, caller)

    def _count_open(self, context: grpc.aio.ServicerContext) -> None:
        self._num_open += 1
        self.idle.clear()
        context.add_done_callback(self._count_closed)  # pyright: ignore[reportArgumentType]: no protocol in its stubs

    def _count_closed(self, ctx: grpc.aio.ServicerContext) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self.idle.set()

    def _caller(self, context: grpc.aio.ServicerContext) -> dict[str, Any]:
        """The fields of a request that say who asks."""
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        address = address_of_peer(context.peer())
        return {
            "client": client_name(self._options, metadata.get("authorization"), metadata.get(CLIENT_HEADER), address),
            "trace_context": trace_context(self._options.otlp_traces_endpoint, metadata.get),
        }

    # These may take long.

    def _read_request(self, message: pb.GenerateRequest, deadline: float | None, caller: Mapping[str, Any]) -> Asked:
        engine, options = self._engine.engine, self._options
        prompt = codec.read_prompt(message)
        tools = prompt.plan(engine, options) if isinstance(prompt, Chat) else ToolPlan()
        params = codec.read_sampling(message.sampling, engine.sampling_defaults, tools)
        if isinstance(prompt, str):
            tokenizer_of(engine, "prompt")
            check_bytes("prompt", prompt, options.max_prompt_bytes)
        elif isinstance(prompt, Chat):
            prompt = prompt.encode(engine, options, tools, cut=params.truncate_prompt_tokens is not None)
        try:
            request = make_request(
                engine,
                options,
                prompt,
                params,
                request_id=message.request_id if message.HasField("request_id") else None,
                priority=message.priority,
                deadline=deadline,
                lora=message.lora if message.HasField("lora") else None,
            )
        except RequestError as error:  # of a schema that ``tools`` brought
            raise renamed(error, {} if tools.schema is None else {"structured_outputs": "tools"}) from error
        return Asked(request=replace(request, **caller), tools=tools)

    def _read_embed_request(
        self, message: pb.EmbedRequest, deadline: float | None, caller: Mapping[str, Any]
    ) -> Request:
        prompt = codec.read_prompt(message)
        assert not isinstance(prompt, Chat)
        if isinstance(prompt, str):
            check_bytes("prompt", prompt, self._options.max_prompt_bytes)
        options = codec.read_embed_options(message)
        request = self._engine.engine.make_embedding_request(prompt, deadline=deadline, **options)
        return replace(request, **caller)

    def _tokenize(self, message: pb.TokenizeRequest) -> list[int]:
        engine = self._engine.engine
        prompt = codec.read_prompt(message)
        if isinstance(prompt, Chat):
            return prompt.encode(engine, self._options, prompt.plan(engine, self._options), cut=False)
        assert isinstance(prompt, str)
        tokenizer = tokenizer_of(engine, "prompt")
        check_bytes("prompt", prompt, self._options.max_prompt_bytes)
        check_fits(engine, tokenizer, "prompt", prompt)
        add_special_tokens = message.add_special_tokens if message.HasField("add_special_tokens") else True
        return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    def _detokenize(self, message: pb.DetokenizeRequest) -> str:
        tokenizer = tokenizer_of(self._engine.engine, "token_ids")
        for i in message.token_ids:
            if not 0 <= i < tokenizer.vocab_size:
                raise RequestError("token_ids", f"{i} is not a token id, the vocabulary has {tokenizer.vocab_size}")
        skip_special_tokens = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        return tokenizer.decode(message.token_ids, skip_special_tokens=skip_special_tokens)


async def _write(
    context: grpc.aio.ServicerContext, chunk: pb.GenerateChunk | pb.BatchChunk, patience: Patience
) -> None:
    """Raises SlowReaderError: by itself a write waits for as long as the client does not read."""
    try:
        with patience:
            await context.write(chunk)
    except TimeoutError:
        raise SlowReaderError(f"a chunk was not taken for {patience.timeout_s:g} s: the request was aborted") from None


def _failure(request_id: str, error: Exception) -> pb.BatchChunk | None:
    """What a request of a batch ended with, where it was its own doing."""
    if isinstance(error, SlowReaderError):  # the one reader of all of them
        return None
    code = next((code for kind, code in STATUS if isinstance(error, kind)), None)
    if code is None:
        return None
    field = error.field if isinstance(error, RequestError) else ""
    number = code.value[0]
    return pb.BatchChunk(failure=pb.RequestFailure(request_id=request_id, code=number, message=str(error), field=field))


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    code = next(code for kind, code in STATUS if isinstance(error, kind))
    metadata = ((FIELD_KEY, error.field),) if isinstance(error, RequestError) else ()
    await context.abort(code, str(error), metadata)


async def _abort_unread(context: grpc.aio.ServicerContext, error: SlowReaderError) -> NoReturn:
    """As ``_abort``, without waiting for the client to read up to the status, which may be never.

    The status is with the transport by then, behind what was written: whoever reads on later gets all of it.
    """
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await _abort(context, error)
    except TimeoutError:
        raise asyncio.CancelledError from None  # the one end of a handler after which grpc sends nothing more
