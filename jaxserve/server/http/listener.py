"""uvicorn on the event loop that is there: a bound socket, connections that can be cut, an end that can be awaited."""

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEADER_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its headers
IDLE_TIMEOUT_S = 75  # a connection between requests
MAX_HEADER_BYTES = 64 * 2**10
POLL_S = 0.002  # while connections end


class HttpListener:
    """One HTTP port. ``start`` serves ``app`` on it, ``stop`` ends it.

    uvicorn's own server is not used: it would take the process's signals, and it ends on a clock of tenths of a second.

    Args:
        app: an ASGI application. ``scope["state"]["connection"].abort()`` cuts the connection of a request.
        max_message_bytes: of one WebSocket message.
        context: TLS; None is none.
    """

    def __init__(self, app: Any, listening: socket.socket, max_message_bytes: int, context: ssl.SSLContext | None):
        self.port: int = listening.getsockname()[1]
        self._socket = listening
        self._context = context
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._config = uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_max_size=max_message_bytes,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=IDLE_TIMEOUT_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            proxy_headers=False,
        )

    async def start(self) -> None:
        self._config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self._config, self._state, {}),
            sock=self._socket,
            backlog=self._config.backlog,
            ssl=self._context,
            ssl_handshake_timeout=None if self._context is None else HEADER_TIMEOUT_S,
        )

    async def stop(self, grace_s: float) -> None:
        """Takes no connection, ends those that rest, cuts the others after ``grace_s``."""
        if self._server is None:
            self._socket.close()
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._state.connections:
                    await asyncio.sleep(POLL_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)
        await self._server.wait_closed()


class _Connection(H11Protocol):
    """Knows its own end: ``abort``, and a limit on how long the headers of a request may take."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]):
        super().__init__(config, server_state, {**app_state, "connection": self})
        self._header_timer: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Drops the connection with what has not been sent."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        in_headers = self.conn.their_state is h11.IDLE
        if not in_headers and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif in_headers and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.abort)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        super().handle_websocket_upgrade(event)
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().connection_lost(exc)
