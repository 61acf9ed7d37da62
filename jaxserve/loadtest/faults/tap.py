"""A way to a server that can be broken: gRPC's own client does not let one reach its connection."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Self


class Tap:
    """Listens on ``port`` and hands on to a server's port, until it is told to do something else.

    Ends all it has opened when the ``async with`` block ends.
    """

    def __init__(self, port: int):
        self._server_port = port
        self._servers: list[asyncio.StreamWriter] = []  # to the server, one for each connection
        self._clients: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_broken = False

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port: int = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_broken = True
        self._listening.close()
        for writer in (*self._servers, *self._clients):
            writer.transport.abort()
        await asyncio.gather(*self._tasks)

    def reset(self) -> None:
        """The server is told that the connection is no more; the client is told nothing of why."""
        self._is_broken = True
        for writer in self._servers:
            reset(writer)

    def half_close(self) -> None:
        """The server reads the end, and could still write."""
        self._is_broken = True
        for writer in self._servers:
            writer.write_eof()

    def inject(self, data: bytes) -> None:
        """The server reads ``data`` between what the client sent and what it sends."""
        for writer in self._servers:
            writer.write(data)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.append(writer)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._servers.append(server_writer)
        if self._is_broken:
            writer.transport.abort()
            server_writer.transport.abort()
        await asyncio.gather(self._pump(reader, server_writer, True), self._pump(server_reader, writer, False))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                if not (to_server and self._is_broken):
                    writer.write(data)
                    await writer.drain()
        writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes a connection by RST: what a process that crashed, or a firewall, sends."""
    sock: socket.socket = writer.get_extra_info("socket")
    with suppress(OSError):  # it is closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
