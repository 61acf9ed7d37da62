"""Python clients of a running server. gRPC's own errors pass through: ``error.code()``, ``error.details()``.

    with Client("127.0.0.1:50051") as client:
        client.wait_ready(60)
        for chunk in client.generate("Once upon a time", max_tokens=32, temperature=0):
            print(chunk.text, end="", flush=True)

``generate`` takes one of ``prompt``, ``token_ids`` and ``messages``, and any field of ``SamplingParams`` by name; with
``messages`` also ``tools``, ``tool_choice`` and the other fields of a chat (``chat.wire.CHAT_FIELDS``), all of them in
the form that OpenAI's API has for them. What is not given is not sent, so the server's default holds. A value that the
wire cannot carry raises ``RequestError``. Nothing is sent before the first chunk is asked for; leaving the loop early
ends the request on the server. ``chat`` takes the same and returns whole answers.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping, Sequence
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from jaxserve.request import Embedding, Pooling
from jaxserve.server import client_codec as codec
from jaxserve.server.call_end import end_of, own_end
from jaxserve.server.channels import TLS, open_async_channel, open_channel, stubs
from jaxserve.server.chat.answer import AnswerCollector, ChatAnswer
from jaxserve.server.client_codec import Chunk, Messages, RequestFailure
from jaxserve.server.options import DEFAULT_TARGET
from jaxserve.server.v1 import inference_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING


def batch_request(
    request_id: str,
    prompt: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    messages: Messages | None = None,
    priority: int | None = None,
    lora: str | None = None,
    **fields: Any,
) -> pb.GenerateRequest:
    """One request for ``generate_batch``; arguments as of ``generate``."""
    return codec.generate_request(prompt, token_ids, messages, fields, request_id, priority, lora)


class Client:
    """A blocking client. Safe to share between threads.

    Args:
        api_key: the server's token, where it asks for one.
        tls: None is a connection in the clear.
        name: whom this client's requests are for, where the server asks for no token; it is fair among names.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        tls: TLS | None = None,
        name: str | None = None,
    ):
        self._channel = open_channel(target, api_key=api_key, tls=tls, name=name)
        self._stub, self._control, self._watch_health = stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when the server serves requests; TimeoutError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            watch = self._watch_health(health_pb2.HealthCheckRequest(), timeout=remaining_s, wait_for_ready=True)
            try:
                if any(answer.status == SERVING for answer in watch):
                    return
            except grpc.RpcError as error:
                if _code(error) not in _KEEP_WAITING:
                    raise
            finally:
                watch.cancel()
        raise TimeoutError(f"the server is not ready after {timeout_s:g} s")

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Generator[Chunk]:
        """Streams one completion. ``timeout_s`` is the request's deadline, honoured by the server; ``lora`` names a
        loaded adapter."""
        request = codec.generate_request(prompt, token_ids, messages, fields, request_id, priority, lora)
        return self._chunks(request, timeout_s)

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[ChatAnswer]:
        """The whole answers to a conversation, one unless ``n`` asks for more.

        Args:
            tools, tool_choice: functions that the model may call, and whether it must, as in OpenAI's API.
            fields: what else ``generate`` takes.
        """
        collector = AnswerCollector()
        for chunk in self.generate(messages=messages, tools=tools, tool_choice=tool_choice, **fields):
            collector.add(chunk)
        return collector.answers()

    def _chunks(self, request: pb.GenerateRequest, timeout_s: float | None) -> Generator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            for message in call:
                yield codec.read_chunk(message)
        finally:
            call.cancel()

    def embed(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """A prompt as a vector; see ``EmbedRequest`` of the .proto."""
        request = codec.embed_request(
            prompt, token_ids, pooling, normalize, truncate_prompt_tokens, request_id, priority, lora
        )
        return codec.read_embedding(self._stub.Embed(request, timeout=timeout_s))

    def generate_batch(
        self, requests: Iterable[pb.GenerateRequest], *, timeout_s: float | None = None
    ) -> Generator[Chunk | RequestFailure]:
        """Streams many requests (``batch_request``) on one call: their chunks and failures as they come."""
        call = self._stub.GenerateBatch(iter(requests), timeout=timeout_s)
        try:
            for message in call:
                yield codec.read_batch_chunk(message)
        finally:
            call.cancel()

    def get_load(self) -> pb.EngineLoad:
        """The engine's figures."""
        return self._control.GetLoad(pb.GetLoadRequest())

    def drain(self, timeout_s: float | None = None) -> bool:
        """Takes the server out of service; True: what ran has finished."""
        return self._control.Drain(pb.DrainRequest(timeout_s=timeout_s)).finished

    def update_weights(self, path: str) -> None:
        """Serves the weights of a checkpoint on the server's machine."""
        self._control.UpdateWeights(pb.UpdateWeightsRequest(path=path))

    def load_lora(self, name: str, path: str) -> pb.Lora:
        """Has the server load an adapter, of a folder on its machine, for requests that name it."""
        return self._control.LoadLora(pb.LoadLoraRequest(lora_name=name, lora_path=path))

    def unload_lora(self, name: str) -> None:
        """No request may name it any more; NOT_FOUND where it is not loaded."""
        self._control.UnloadLora(pb.UnloadLoraRequest(lora_name=name))

    def list_loras(self) -> list[pb.Lora]:
        """The adapters that requests may name."""
        return list(self._control.ListLoras(pb.ListLorasRequest()).loras)

    def abort(self, request_id: str) -> None:
        """Ends a request; NOT_FOUND when it is neither queued nor running."""
        self._stub.Abort(pb.AbortRequest(request_id=request_id))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool | None = None,
        **fields: Any,
    ) -> list[int]:
        """Token ids of a text or a chat, as ``generate`` would read it; ``fields`` are those of a chat."""
        request = codec.tokenize_request(prompt, messages, add_special_tokens, fields)
        return list(self._stub.Tokenize(request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """Text of token ids."""
        return self._stub.Detokenize(codec.detokenize_request(token_ids, skip_special_tokens)).text

    def model_info(self) -> pb.ModelInfo:
        """What is served."""
        return self._stub.GetModelInfo(pb.GetModelInfoRequest())

    def server_info(self) -> pb.ServerInfo:
        """State, limits and load."""
        return self._stub.GetServerInfo(pb.GetServerInfoRequest())


class AsyncClient:
    """The same on asyncio. Belongs to the event loop it is made in."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        tls: TLS | None = None,
        name: str | None = None,
    ):
        self._channel = open_async_channel(target, api_key=api_key, tls=tls, name=name)
        self._stub, self._control, self._watch_health = stubs(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the server serves requests; TimeoutError after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._watch_until_serving():
                    pass
        except TimeoutError:
            raise TimeoutError(f"the server is not ready after {timeout_s:g} s") from None

    async def _watch_until_serving(self) -> bool:
        watch = self._watch_health(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        try:
            async for answer in watch:
                if answer.status == SERVING:
                    return True
        except grpc.RpcError as error:
            if _code(error) not in _KEEP_WAITING:
                raise
        finally:
            watch.cancel()
        return False

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Chunk]:
        """Streams one completion. ``timeout_s`` is the request's deadline, honoured by the server; ``lora`` names a
        loaded adapter."""
        request = codec.generate_request(prompt, token_ids, messages, fields, request_id, priority, lora)
        return self._chunks(request, timeout_s)

    async def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[ChatAnswer]:
        """The whole answers to a conversation, one unless ``n`` asks for more.

        Args:
            tools, tool_choice: functions that the model may call, and whether it must, as in OpenAI's API.
            fields: what else ``generate`` takes.
        """
        collector = AnswerCollector()
        async for chunk in self.generate(messages=messages, tools=tools, tool_choice=tool_choice, **fields):
            collector.add(chunk)
        return collector.answers()

    async def _chunks(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for message in call:
                yield codec.read_chunk(message)
        finally:
            call.cancel()

    async def embed(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int | None = None,
        lora: str | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """A prompt as a vector; see ``EmbedRequest`` of the .proto."""
        request = codec.embed_request(
            prompt, token_ids, pooling, normalize, truncate_prompt_tokens, request_id, priority, lora
        )
        return codec.read_embedding(await self._stub.Embed(request, timeout=timeout_s))

    async def generate_batch(
        self,
        requests: Iterable[pb.GenerateRequest] | AsyncIterable[pb.GenerateRequest],
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Chunk | RequestFailure]:
        """Streams many requests (``batch_request``) on one call: their chunks and failures as they come."""
        call = self._stub.GenerateBatch(requests, timeout=timeout_s)
        ends: list[grpc.aio.AioRpcError] = []
        call.add_done_callback(lambda ended: ends.append(end_of(ended)))
        try:
            async for message in call:
                yield codec.read_batch_chunk(message)
        except grpc.aio.AioRpcError as error:
            end = await own_end(call, error, ends)
            if end.code() != grpc.StatusCode.OK:
                raise end from None
        finally:
            call.cancel()

    async def get_load(self) -> pb.EngineLoad:
        """The engine's figures."""
        return await self._control.GetLoad(pb.GetLoadRequest())

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Takes the server out of service; True: what ran has finished."""
        return (await self._control.Drain(pb.DrainRequest(timeout_s=timeout_s))).finished

    async def update_weights(self, path: str) -> None:
        """Serves the weights of a checkpoint on the server's machine."""
        await self._control.UpdateWeights(pb.UpdateWeightsRequest(path=path))

    async def load_lora(self, name: str, path: str) -> pb.Lora:
        """Has the server load an adapter, of a folder on its machine, for requests that name it."""
        return await self._control.LoadLora(pb.LoadLoraRequest(lora_name=name, lora_path=path))

    async def unload_lora(self, name: str) -> None:
        """No request may name it any more; NOT_FOUND where it is not loaded."""
        await self._control.UnloadLora(pb.UnloadLoraRequest(lora_name=name))

    async def list_loras(self) -> list[pb.Lora]:
        """The adapters that requests may name."""
        return list((await self._control.ListLoras(pb.ListLorasRequest())).loras)

    async def abort(self, request_id: str) -> None:
        """Ends a request; NOT_FOUND when it is neither queued nor running."""
        await self._stub.Abort(pb.AbortRequest(request_id=request_id))

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool | None = None,
        **fields: Any,
    ) -> list[int]:
        """Token ids of a text or a chat, as ``generate`` would read it; ``fields`` are those of a chat."""
        request = codec.tokenize_request(prompt, messages, add_special_tokens, fields)
        return list((await self._stub.Tokenize(request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None) -> str:
        """Text of token ids."""
        return (await self._stub.Detokenize(codec.detokenize_request(token_ids, skip_special_tokens))).text

    async def model_info(self) -> pb.ModelInfo:
        """What is served."""
        return await self._stub.GetModelInfo(pb.GetModelInfoRequest())

    async def server_info(self) -> pb.ServerInfo:
        """State, limits and load."""
        return await self._stub.GetServerInfo(pb.GetServerInfoRequest())


_KEEP_WAITING = (
    grpc.StatusCode.UNAVAILABLE,  # not bound yet, or gone: it may come back
    grpc.StatusCode.DEADLINE_EXCEEDED,  # the loop's own limit tells
)


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)  # what stubs raise
    return error.code()
