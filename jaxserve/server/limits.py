"""What one server allows its clients, whichever way they come."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxserve.engine.async_engine import EngineCore
from jaxserve.request import QueueFullError, Request, RequestError, SamplingParams
from jaxserve.server.options import ServerOptions


class Admission:
    """Counts the requests that are open, and refuses those beyond ``limit`` (None: there is none)."""

    def __init__(self, limit: int | None):
        self._limit = limit
        self.num_open = 0

    def take(self, num_requests: int) -> None:
        """QueueFullError, and nothing taken, where they would be too many."""
        if self._limit is not None and self.num_open + num_requests > self._limit:
            raise QueueFullError(
                f"{self.num_open} requests are open, max_concurrent_requests={self._limit}: "
                f"no room for {num_requests} more"
            )
        self.num_open += num_requests

    def give(self, num_requests: int) -> None:
        self.num_open -= num_requests


def limited_deadline(options: ServerOptions, deadline: float | None) -> float | None:
    """The client's ``deadline`` (``time.monotonic()`` seconds) or the server's, whichever comes first."""
    if options.request_timeout_s is None:
        return deadline
    limit = time.monotonic() + options.request_timeout_s
    return limit if deadline is None else min(limit, deadline)


def make_request(
    engine: EngineCore, options: ServerOptions, prompt: str | Sequence[int], params: SamplingParams, **fields: Any
) -> Request:
    """``EngineCore.make_request`` within the server's ``max_output_tokens``: more is refused, unset is so many."""
    limit = options.max_output_tokens
    if limit is None:
        return engine.make_request(prompt, params, **fields)
    if params.max_tokens is not None and params.max_tokens > limit:
        raise RequestError("max_tokens", f"{params.max_tokens} is more than this server's {limit}")
    if params.min_tokens > limit:
        raise RequestError("min_tokens", f"{params.min_tokens} is more than this server's {limit} output tokens")
    request = engine.make_request(prompt, params, **fields)
    return replace(request, max_total_len=min(request.max_total_len, len(request.prompt_token_ids) + limit))
