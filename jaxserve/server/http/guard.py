"""What stands before every HTTP request: its id, its token, size and pace of its body, the count of open ones."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from email.utils import formatdate
from typing import Any

from jaxserve.server import logs
from jaxserve.server.clients import CLIENT_HEADER, client_name
from jaxserve.server.http.errors import BODY_TOO_SLOW, TOO_LARGE, UNAUTHORIZED, HTTPError, response_of
from jaxserve.server.options import ServerOptions
from jaxserve.server.security import ApiKeys
from jaxserve.server.trace_context import trace_context

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready")  # no token is asked for: two booleans, and a page without content
BEARER_PROTOCOL = "jaxserve.bearer"
REQUEST_ID = b"x-request-id"
_USABLE_ID = re.compile(r"[!-~]{1,128}", re.ASCII)
DISCARD_TIMEOUT_S = 2.0  # for a client that sends too much to come to the end and read the answer


class ClientLeftError(Exception):
    """The client closed its connection: nobody reads an answer."""


class Guard:
    """ASGI middleware around ``app``. ``idle`` is set while no request is open.

    Args:
        keys: of which a request must carry one; None: none is asked for.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], options: ServerOptions, keys: ApiKeys | None
    ):
        self._app = app
        self._options = options
        self._keys = keys
        self._num_open = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["client"] = self._client(scope)
        scope["state"]["trace_context"] = trace_context(
            self._options.otlp_traces_endpoint, lambda name: _header(scope, name.encode()).decode("latin-1")
        )
        if scope["type"] == "websocket":
            await self._connect(scope, receive, send)
            return
        self._num_open += 1
        self.idle.clear()
        try:
            await self._answer(scope, receive, send)
        except ClientLeftError:
            scope["state"]["connection"].abort()  # so that the server is not missed an answer
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self.idle.set()

    def _client(self, scope: Scope) -> str:
        authorization = _header(scope, b"authorization").decode("latin-1")
        protocols = scope.get("subprotocols", [])
        if not authorization and len(protocols) == 2 and protocols[0] == BEARER_PROTOCOL:
            authorization = f"Bearer {protocols[1]}"
        given = _header(scope, CLIENT_HEADER.encode()).decode("latin-1")
        return client_name(self._options, authorization, given, (scope.get("client") or ("",))[0])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = _header(scope, REQUEST_ID).decode("latin-1")
        request_id = given if _USABLE_ID.fullmatch(given) else secrets.token_hex(8)
        scope["state"]["request_id"] = request_id

        started, status = time.perf_counter(), 0

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                date = formatdate(usegmt=True).encode()
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id.encode()), (b"date", date)]
            await send(message)

        try:
            await self._checked(scope, receive, named_send)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,  # 0: the client left before there was one
                "seconds": round(time.perf_counter() - started, 6),
                "client": (scope.get("client") or ("",))[0],
            }
            logs.access.info("%s %s %d", scope["method"], scope["path"], status, extra={logs.FIELDS: fields})

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what may not be asked, or has no usable body; the rest is the application's."""
        try:
            keys = None if scope["path"] in OPEN_PATHS else self._keys
            if keys is not None and not keys.accept(_header(scope, b"authorization")):
                raise HTTPError(UNAUTHORIZED, "a bearer token of this server is needed: authorization")
            body: bytes | None = await self._body(scope, receive)
            scope["state"]["body_len"] = len(body)
        except HTTPError as error:
            response = response_of(error)
            response.headers["connection"] = "close"  # what is left of the body is not read
            await response(scope, receive, send)
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        # HEAD is GET whose answer's body is not sent: uvicorn, which has the scope as it was, sees to that.
        await self._app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, replay, send)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket. A page's script cannot set its headers: it names the token as a second subprotocol instead.

        Without tokens no page of another site is let in: browsers let every page open WebSockets to everywhere.
        """
        protocols = scope.get("subprotocols", [])
        if len(protocols) == 2 and protocols[0] == BEARER_PROTOCOL:
            scope["state"]["subprotocol"] = BEARER_PROTOCOL
        if self._keys is not None:
            named = "subprotocol" in scope["state"] and self._keys.has(protocols[1])
            allowed = named or self._keys.accept(_header(scope, b"authorization"))
        else:
            origin = _header(scope, b"origin")
            allowed = not origin or origin.partition(b"://")[2] == _header(scope, b"host")
        if allowed:
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. HTTPError if it is too large or comes too slowly."""
        limit = self._options.max_message_bytes
        text = _header(scope, b"content-length")
        length = int(text) if text.isdigit() and len(text) < 20 else 0
        pieces: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                more = length <= limit
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    pieces.append(message.get("body", b""))
                    num_bytes += len(pieces[-1])
                    more = message.get("more_body", False) and num_bytes <= limit
        except TimeoutError:
            raise HTTPError(
                BODY_TOO_SLOW, f"the body did not come within {self._options.body_timeout_s:g} s: {num_bytes} bytes did"
            ) from None
        if max(length, num_bytes) <= limit:
            return b"".join(pieces)
        pieces.clear()
        if not _header(scope, b"expect"):  # who waits to be asked for the body has sent none of it
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCARD_TIMEOUT_S):
                    while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                        pass
        sent = f"{length} bytes" if length > limit else f"more than {limit} bytes"
        raise HTTPError(TOO_LARGE, f"the body has {sent}, this server takes at most {limit}")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def until_left[T](receive: Receive, work: Awaitable[T]) -> T:
    """``work``'s result. Raises ClientLeftError, with ``work`` cancelled, when the client closes its connection.

    The body has been read: nothing but the disconnection comes from ``receive``.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            # What else it ends by nobody is there to be told; left alone, it would be logged as a task's.
            await asyncio.gather(working, return_exceptions=True)
