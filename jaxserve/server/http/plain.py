"""``/generate/stream`` and ``/generate/ws``: tokens as they come, in the least that a browser can read.

Every event is a JSON object: ``{"choice", "index", "token_ids", "text"}``, with ``finish_reason``, ``stop_reason`` and
``usage`` on a choice's last one, or ``{"error": ...}`` as everywhere.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, ValidationError
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from jaxserve.errors import RequestError
from jaxserve.request import Request as EngineRequest
from jaxserve.request import TokenEvent
from jaxserve.server.chat.conversation import encode_conversation
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.completions import by_choice, read_prompts, token_ids_of
from jaxserve.server.http.errors import ANSWERED, INVALID, HTTPError, body_of, error_of, unfinished
from jaxserve.server.http.fields import (
    MESSAGES,
    PROMPT,
    Body,
    optional,
    priority_of,
    prompt_or_messages,
    sampling_params,
)
from jaxserve.server.http.generation import Generation, deadline_of, in_thread, is_small
from jaxserve.server.http.routes import Routes, check_text
from jaxserve.server.http.sse import DONE, STREAMED, EventStream, event
from jaxserve.server.http.structured import constraint_name, constraint_of, is_constrained
from jaxserve.server.limits import make_request

MAX_WAITING_MESSAGES = 4  # of a WebSocket's client, which has to wait for answers


class PlainRequest(Body):
    model_config = ConfigDict(json_schema_extra=prompt_or_messages())

    prompt: Any = optional(PROMPT)
    messages: Any = optional(MESSAGES)


def plain_routes(backend: Backend) -> APIRouter:
    router = Routes(tags=["Plain streams"])

    @router.post("/generate/stream", responses=STREAMED)
    async def generate_stream(body: PlainRequest, http: Request) -> Response:
        """One prompt, or the messages of a chat, as server-sent events that end with `[DONE]`."""
        generation = await _generation(backend, body, http)
        await generation.start(http.receive)
        return EventStream(_sse(backend, generation), backend.options.slow_reader_timeout_s)

    @router.websocket("/generate/ws")
    async def generate_ws(socket: WebSocket) -> None:
        """Each message of the client is a request, or ``{"abort": true}`` to end the one that runs."""
        await socket.accept(subprotocol=socket.scope["state"].get("subprotocol"))
        await _Conversation(backend, socket).run()

    return router


async def _generation(backend: Backend, body: PlainRequest, http: HTTPConnection) -> Generation:
    backend.check_model(body.model)
    if body.stream is False or body.stream_options is not None:
        raise RequestError("stream" if body.stream is False else "stream_options", "tokens are always streamed here")
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt", "give exactly one of prompt, messages")
    deadline = deadline_of(http.headers, backend.options)
    renames = {"structured_outputs": constraint_name(body, None)}
    if body.messages is not None:
        renames["prompt"] = "messages"
    is_quick = body.messages is None and is_small(http) and not is_constrained(body, None)
    request = await in_thread(renames, lambda: _request(backend, body, deadline), is_quick=is_quick)
    return Generation(backend, [request], http)


def _request(backend: Backend, body: PlainRequest, deadline: float | None) -> EngineRequest:
    """In a thread: tokenizes."""
    params = sampling_params(body, backend.engine.sampling_defaults, **constraint_of(body, None, None))
    cut = params.truncate_prompt_tokens is not None
    if body.messages is not None:
        token_ids = encode_conversation(backend.engine, body.messages, backend.options.max_prompt_bytes, cut=cut)
    else:
        prompts = read_prompts(body.prompt)
        if len(prompts) != 1:
            raise RequestError("prompt", f"{len(prompts)} prompts, one stream has 1")
        token_ids = token_ids_of(backend, prompts[0], True, cut=cut)
    return make_request(
        backend.engine,
        backend.options,
        token_ids,
        params,
        request_id=body.request_id or f"gen-{secrets.token_hex(12)}",
        priority=priority_of(body),
        lora=backend.lora_of(body.model),
        deadline=deadline,
    )


def _shown(events: Sequence[TokenEvent], state: str) -> dict[str, Any]:
    """One choice's events. Raises HTTPError where they end it without an answer."""
    first, last = events[0], events[-1]
    if (error := unfinished(last.finish_reason, state)) is not None:
        raise error
    shown: dict[str, Any] = {
        "choice": first.choice,
        "index": first.index,
        "token_ids": [e.token_id for e in events if e.token_id is not None],
        "text": "".join(e.text for e in events),
    }
    if last.finish_reason is not None and last.usage is not None:
        shown |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        shown["usage"] = {
            "prompt_tokens": last.usage.prompt_tokens,
            "completion_tokens": last.usage.completion_tokens,
            "cached_tokens": last.usage.cached_tokens,
        }
    return shown


async def _events(backend: Backend, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
    """The events of the answer; an error is the last of them."""
    try:
        async for _, events in generation:
            for of_choice in by_choice(events):
                yield _shown(of_choice, backend.async_engine.state)
    except (*ANSWERED, HTTPError) as error:
        yield body_of(error_of(error))
    finally:
        await generation.aclose()


async def _sse(backend: Backend, generation: Generation) -> AsyncGenerator[bytes]:
    shown: dict[str, Any] = {}
    async for shown in _events(backend, generation):
        yield event(shown)
    if "error" not in shown:
        yield DONE


class _Conversation:
    """One WebSocket: requests one after another, each answered before the next is begun."""

    def __init__(self, backend: Backend, socket: WebSocket):
        self._backend = backend
        self._socket = socket
        self._waiting: asyncio.Queue[str] = asyncio.Queue(MAX_WAITING_MESSAGES)
        self._answering: asyncio.Task[None] | None = None
        self._num_open = 0  # messages that came and are not answered
        self._has_begun = False  # the answer to the oldest of them; a task that is cancelled before says nothing
        self._is_aborted = False  # that one

    async def run(self) -> None:
        """Returns when the client has left."""
        reading = asyncio.create_task(self._read())
        try:
            while not reading.done():
                getting = asyncio.create_task(self._waiting.get())
                await asyncio.wait((getting, reading), return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    getting.cancel()
                    break
                self._answering = asyncio.create_task(self._answer(getting.result()))
                await asyncio.wait((self._answering, reading), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done() and not self._answering.cancelled():
                    self._answering.result()
        except WebSocketDisconnect:
            pass
        except TimeoutError:  # it takes nothing
            self._socket.scope["state"]["connection"].abort()
        finally:
            reading.cancel()
            if self._answering is not None:
                self._answering.cancel()
                await asyncio.wait((self._answering,))

    async def _read(self) -> None:
        """Takes messages until the client leaves. An abort does not wait for its turn."""
        while True:
            try:
                text = await self._socket.receive_text()
            except (WebSocketDisconnect, KeyError):  # KeyError: a binary message
                return
            if _is_abort(text):
                self._abort()
                continue
            self._num_open += 1
            await self._waiting.put(text)

    def _abort(self) -> None:
        """Ends the oldest message's answer, which may not have begun: both may have come at once."""
        if self._num_open == 0 or self._is_aborted:
            return
        self._is_aborted = True
        if self._has_begun:
            assert self._answering is not None
            self._answering.cancel()

    async def _answer(self, text: str) -> None:
        self._has_begun = True
        generation = None
        try:
            if self._is_aborted:
                raise asyncio.CancelledError
            generation = await _generation(self._backend, _parsed(text), self._socket)
            async for shown in _events(self._backend, generation):
                await self._send(shown)
        except (*ANSWERED, HTTPError, RequestValidationError) as error:
            await self._send(body_of(error_of(error)))
        except asyncio.CancelledError:
            if generation is not None:
                await generation.aclose()
            with suppress(WebSocketDisconnect, TimeoutError):
                await self._send({"finish_reason": "abort"})
            raise
        finally:
            self._num_open -= 1
            self._has_begun = self._is_aborted = False

    async def _send(self, data: dict[str, Any]) -> None:
        async with asyncio.timeout(self._backend.options.slow_reader_timeout_s):
            await self._socket.send_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def _is_abort(text: str) -> bool:
    return len(text) < 100 and "".join(text.split()) == '{"abort":true}'


def _parsed(text: str) -> PlainRequest:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPError(INVALID, f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPError(INVALID, "the message must be a JSON object")
    check_text(text)
    try:
        return PlainRequest.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
