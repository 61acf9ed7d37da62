"""What one server allows its clients, whichever way they come."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.options import ServerOptions

# A prompt in a message of so few bytes is read on the event loop: tokenizing it takes less than going to a thread and
# back. Where a grammar is to be compiled, the size of the message says nothing.
QUICK_BYTES = 512


def limited_deadline(options: ServerOptions, deadline: float | None) -> float | None:
    """The client's ``deadline`` (``time.monotonic()`` seconds) or the server's, whichever comes first."""
    if options.request_timeout_s is None:
        return deadline
    limit = time.monotonic() + options.request_timeout_s
    return limit if deadline is None else min(limit, deadline)


def remaining_deadline(options: ServerOptions, remaining_s: float | None) -> float | None:
    """The same of a call that has ``remaining_s`` left."""
    return limited_deadline(options, None if remaining_s is None else time.monotonic() + remaining_s)


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
