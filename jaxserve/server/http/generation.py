"""From engine requests to answers: several requests as one flow of events, and what they amount to."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.requests import HTTPConnection

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.request import FinishReason, Request, TokenEvent, Usage
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.errors import unfinished
from jaxserve.server.http.guard import Receive, until_left
from jaxserve.server.limits import QUICK_BYTES, limited_deadline
from jaxserve.server.options import ServerOptions
from jaxserve.server.prompts import renamed

TIMEOUT_HEADER = "jaxserve-timeout-s"
Piece = tuple[int, list[TokenEvent]]  # which of the requests, and events of it that came together


def deadline_of(headers: Mapping[str, str], options: ServerOptions) -> float | None:
    """``time.monotonic()`` seconds at which the request ends: the header's or the server's limit. RequestError."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return limited_deadline(options, None)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(TIMEOUT_HEADER, f"{text!r:.40} is not a number of seconds more than 0")
    return limited_deadline(options, time.monotonic() + seconds)


class Generation:
    """The requests of one HTTP call, running: an iterator over their pieces. ``aclose`` aborts what is unfinished."""

    def __init__(self, backend: Backend, requests: Sequence[Request], http: HTTPConnection):
        self.engine = backend.async_engine
        self.requests = [
            replace(request, client=http.state.client, trace_context=http.state.trace_context) for request in requests
        ]
        self._pieces = _merged(self.engine, self.requests)
        self._first: Piece | None = None

    async def start(self, receive: Receive) -> None:
        """Returns when the first piece is there: until then a refusal can be answered with a status of its own."""
        try:
            self._first = await until_left(receive, anext(self._pieces))
        except BaseException:
            await self.aclose()
            raise

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Piece:
        if self._first is not None:
            piece, self._first = self._first, None
            return piece
        return await anext(self._pieces)

    async def aclose(self) -> None:
        await self._pieces.aclose()


async def _merged(engine: AsyncEngine, requests: Sequence[Request]) -> AsyncGenerator[Piece]:
    if len(requests) == 1:
        async with aclosing(engine.stream_batches(requests[0])) as batches:
            async for events in batches:
                yield 0, events
        return
    # As many as there are requests: a reader that stops is seen by the engine's streams, as everywhere.
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(requests))

    async def pump(i: int, request: Request) -> None:
        try:
            async with aclosing(engine.stream_batches(request)) as batches:
                async for events in batches:
                    await queue.put((i, events))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
    try:
        num_open = len(requests)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass
class Choice:
    """All of one choice's events."""

    text: str = ""
    events: list[TokenEvent] = field(default_factory=list)  # those with a token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    usage: Usage | None = None


async def collected(generation: Generation, receive: Receive) -> list[list[Choice]]:
    """The choices of each request, whole. Raises what ended one of them early (HTTPError)."""
    choices = [[Choice() for _ in range(request.params.n)] for request in generation.requests]

    async def read() -> None:
        texts: dict[int, list[str]] = {}
        async for i, events in generation:
            for event in events:
                choice = choices[i][event.choice]
                texts.setdefault(id(choice), []).append(event.text)
                if event.token_id is not None:
                    choice.events.append(event)
                if event.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
                    choice.usage = event.usage
                    choice.text = "".join(texts.pop(id(choice)))
                    if (error := unfinished(event.finish_reason, generation.engine.state)) is not None:
                        raise error

    try:
        await until_left(receive, read())
    finally:
        await generation.aclose()
    return choices


class UsageCount:
    """Tokens of one call: a prompt's once, its completions' all."""

    def __init__(self, requests: Sequence[Request], counts_output: bool = True):
        self._prompt = sum(len(request.prompt_token_ids) for request in requests)
        self._cached: dict[int, int] = {}
        self._completion = 0
        self._counts_output = counts_output

    def add(self, request_index: int, events: Sequence[TokenEvent]) -> None:
        if self._counts_output:
            self._completion += sum(event.token_id is not None for event in events)
        for event in events:
            if event.choice == 0:
                self.cached(request_index, event.usage)

    def cached(self, request_index: int, usage: Usage | None) -> None:
        if usage is not None:
            self._cached[request_index] = usage.cached_tokens

    def total(self) -> dict[str, object]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def is_small(http: HTTPConnection) -> bool:
    """Whether the body had ``QUICK_BYTES`` at most, whatever its headers said; no WebSocket's message is."""
    return getattr(http.state, "body_len", QUICK_BYTES + 1) <= QUICK_BYTES


async def in_thread[T](names: Mapping[str, str], make: Callable[[], T], *, is_quick: bool = False) -> T:
    """``make()`` in a thread, as tokenizing may take long, unless it ``is_quick``; the fields of its errors renamed."""
    try:
        return make() if is_quick else await asyncio.to_thread(make)
    except RequestError as error:
        raise renamed(error, {"lora": "model", **names}) from error
