"""What is common to all clients: the server, a request whose answer is known, and the comparison."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
import grpc.aio

from jaxserve.server.client import AsyncClient
from jaxserve.server.v1 import inference_pb2 as pb


class WrongAnswerError(AssertionError):
    """The server answered what it should not have."""


@dataclass(frozen=True)
class Known:
    """A request of token ids, the sampling fields that make its answer certain, and this answer."""

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Site:
    """A server and the ways to it.

    Attributes:
        client: retries what the server refuses for now.
        channel: the same server without retries.
        info: the server's limits, which some clients go beyond.
        model: what it serves.
    """

    target: str
    url: str
    client: AsyncClient
    channel: grpc.aio.Channel
    info: pb.ServerInfo
    model: pb.ModelInfo

    @property
    def http_port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def grpc_port(self) -> int:
        return int(self.target.rpartition(":")[2])


# Plays one client to its end. Returns how that was, in a word or two; WrongAnswerError where it was wrong.
Kind = Callable[[Site, Known, random.Random], Awaitable[str]]


class Part(Protocol):
    """What came together of one choice."""

    @property
    def choice(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...


async def read(
    parts: AsyncIterator[Part], known: Known, *, leave_after: int | None = None, pause_s: float = 0.0
) -> str:
    """Reads to the end, or until ``leave_after`` tokens are there, and compares: "whole", "left", "abort", "deadline".

    Choices other than the first, whose seed is the request's, are read and not looked at.

    Args:
        pause_s: to wait after each part.
    """
    tokens: list[int] = []
    text, reason = "", None
    async for part in parts:
        if part.choice:
            continue
        tokens += part.token_ids
        text += part.text
        reason = part.finish_reason
        if leave_after is not None and len(tokens) >= leave_after:
            break
        if pause_s:
            await asyncio.sleep(pause_s)
    told = text.rstrip("\ufffd") if reason in ("abort", "deadline") else text  # a character may have been cut in two
    if tuple(tokens) != known.tokens[: len(tokens)] or not known.text.startswith(told):
        raise WrongAnswerError(f"{tokens} {text!r} is not how {known.tokens} {known.text!r} begins")
    if reason in ("stop", "length"):
        if (len(tokens), text) != (len(known.tokens), known.text):
            raise WrongAnswerError(f"ended by {reason} after {len(tokens)} of {len(known.tokens)} tokens: {text!r}")
        return "whole"
    if reason is None and leave_after is None:
        raise WrongAnswerError(f"ended without a reason after {len(tokens)} of {len(known.tokens)} tokens")
    return reason or "left"


def some(known: Known, r: random.Random) -> int:
    """A number of tokens after which a client leaves."""
    return r.randint(1, max(1, len(known.tokens) - 1))


def expect(found: object, *wanted: object) -> str:
    """The name of ``found``. WrongAnswerError if it is none of ``wanted``."""
    name = found.name if isinstance(found, grpc.StatusCode) else str(found)
    if found not in wanted:
        raise WrongAnswerError(f"{name}, not {' or '.join(map(str, wanted))}")
    return name
