"""Server-sent events: one response that ends with its reader, at the latest when that takes nothing."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from jaxserve.server.http.guard import Receive, Scope, Send, until_left
from jaxserve.server.patience import Patience

DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, whole or in events.", "content": {"text/event-stream": {}}}
}  # for the OpenAPI document
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # a proxy that buffers would undo the streaming


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends ``events``, and closes them when the client leaves or takes nothing for ``slow_reader_timeout_s``."""

    def __init__(self, events: AsyncGenerator[bytes], slow_reader_timeout_s: float):
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._timeout_s = slow_reader_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_left(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        patience = Patience(self._timeout_s)
        async with aclosing(self._events) as events:
            try:
                start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                await send(start)
                async for data in events:
                    with patience:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                scope["state"]["connection"].abort()  # its buffers are full: it would not read an error either
            finally:
                patience.close()
