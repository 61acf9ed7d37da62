"""The server process: bind, health, signals, drain. ``serve`` is what the command line runs."""

import asyncio
import atexit
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from wsgiref.simple_server import WSGIServer

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]: not in its stubs
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from jaxserve.engine.async_engine import AsyncEngine, EngineCore, EngineFailedError
from jaxserve.server.control import ControlService
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.options import ServerOptions
from jaxserve.server.service import InferenceService
from jaxserve.server.v1 import inference_pb2, inference_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_NAMES = ("", SERVICE_NAME)  # grpc.health.v1: the server as a whole, and the service
CONTROL_NAME = inference_pb2.DESCRIPTOR.services_by_name["Control"].full_name
REFLECTED = (
    SERVICE_NAME,
    CONTROL_NAME,
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    reflection.SERVICE_NAME,
)

FLUSH_TIMEOUT_S = 2.0  # for readers to take the last chunks when the engine has finished or was told to
CLOSE_TIMEOUT_S = 10.0  # for the step that runs
LOADING_TIMEOUT_S = 0.5  # loading may take minutes and cannot be interrupted
STOP_GRACE_S = 0.2  # for unary calls; a health watch never ends by itself


class ServeError(RuntimeError):
    """The server cannot start: one clear line."""


class Server:
    """One gRPC server before one engine: ``start`` binds and begins to load, ``ready`` waits, ``close`` ends both.

    After ``start``: ``port`` and ``metrics_port`` (None without metrics) are the bound ports, ``engine`` is loading.
    """

    def __init__(self, engine_factory: Callable[[], EngineCore], options: ServerOptions):
        self.options = options
        self.port = options.port
        self.metrics_port = options.metrics_port
        self._factory = engine_factory
        self._engine: AsyncEngine | None = None
        self._metrics_server: WSGIServer | None = None

    @property
    def engine(self) -> AsyncEngine:
        assert self._engine is not None, "the server was not started"
        return self._engine

    async def start(self) -> None:
        """Binds, serves health (NOT_SERVING), and starts the engine. Raises ServeError when a port cannot be bound."""
        options = self.options
        for port in (options.port, options.metrics_port):
            if port is not None:
                _check_can_bind(options.host, port)
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # or a second server would take half of the first one's connections
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 20_000),  # finds clients that vanished without a word
                ("grpc.keepalive_timeout_ms", 10_000),
            ]
        )
        try:
            self.port = self._grpc.add_insecure_port(_address(options.host, options.port))
        except RuntimeError as error:
            raise ServeError(f"cannot bind {_address(options.host, options.port)}: {error}") from error

        metrics = ServerMetrics(lambda: None if self._engine is None else self._engine.stats())
        if options.metrics_port is not None:
            try:
                self._metrics_server, _ = start_http_server(options.metrics_port, options.host, metrics.registry)
            except OSError as error:
                raise ServeError(f"cannot bind {_address(options.host, options.metrics_port)}: {error}") from error
            self.metrics_port = self._metrics_server.server_port
        # Last of what can fail: its thread cannot be interrupted while it loads.
        self._engine = AsyncEngine(
            self._factory, slow_reader_timeout_s=options.slow_reader_timeout_s, observer=metrics.observe
        )
        self._service = InferenceService(self.engine, options)
        self._health = health_aio.HealthServicer()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        inference_pb2_grpc.add_InferenceServicer_to_server(self._service, self._grpc)
        inference_pb2_grpc.add_ControlServicer_to_server(ControlService(self.engine, options, self.drain), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(REFLECTED, self._grpc)
        await self._grpc.start()

    async def ready(self) -> None:
        """Returns when requests are served; raises what the engine's construction raised."""
        await self.engine.ready()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watch = asyncio.create_task(self._watch_engine())

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Health NOT_SERVING, new requests UNAVAILABLE, running ones finish or are aborted at the limit.

        True: all of them finished.
        """
        timeout_s = self.options.drain_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        await self._health.enter_graceful_shutdown()
        finished = await self.engine.drain(timeout_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(deadline - time.monotonic(), FLUSH_TIMEOUT_S)):
                await self._service.idle.wait()
        return finished

    async def close(self) -> bool:
        """Ends calls, engine and metrics. False: the engine thread is busy loading and cannot be interrupted."""
        await self._health.enter_graceful_shutdown()
        ended = await self.engine.close(LOADING_TIMEOUT_S if self.engine.state == "loading" else CLOSE_TIMEOUT_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):  # streams learn why they ended
                await self._service.idle.wait()
        await self._grpc.stop(STOP_GRACE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        return ended

    async def _watch_engine(self) -> None:
        with suppress(EngineFailedError):  # who runs the server learns it from ``engine.wait_stopped``
            await self.engine.wait_stopped()
        await self._health.enter_graceful_shutdown()

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for name in HEALTH_NAMES:
            await self._health.set(name, status)


async def serve(
    engine_factory: Callable[[], EngineCore],
    options: ServerOptions | None = None,
    *,
    stop: asyncio.Event | None = None,
    on_bound: Callable[[Server], None] | None = None,
    on_ready: Callable[[Server], None] | None = None,
) -> None:
    """Serves until ``stop`` is set, then drains. Returns after a clean end.

    Without ``stop`` it is the process's main coroutine: SIGTERM and SIGINT drain, a second one exits at once. When told
    to stop while the engine loads, whose thread cannot be interrupted, it returns, and the process ends without
    finalizing the interpreter (exit 0).

    Args:
        on_bound: called when the ports are bound (``server.port``, ``server.metrics_port``); the engine loads then.
        on_ready: called when requests are served.

    Raises:
        ServeError: a port cannot be bound.
        EngineFailedError: the engine died.
        Exception: whatever the engine's construction raised.
    """
    owns_process = stop is None
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    server = Server(engine_factory, options or ServerOptions())
    await server.start()
    ended = True
    try:
        if on_bound is not None:
            on_bound(server)
        if await _first(server.ready(), stop):
            if on_ready is not None:
                on_ready(server)
            await _first(server.engine.wait_stopped(), stop)
            logger.info("draining: at most %g s", server.options.drain_timeout_s)
            if not await server.drain():
                logger.warning("the drain limit of %g s passed: requests were aborted", server.options.drain_timeout_s)
            if server.engine.state == "failed":  # while it drained
                await server.engine.wait_stopped()
    finally:
        ended = await server.close()
    if owns_process and not ended:
        atexit.register(_leave)


def _leave() -> None:
    """Ends the process as it is: finalizing the interpreter under a thread that is inside XLA may crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _first(work, stop: asyncio.Event) -> bool:
    """Awaits ``work`` until ``stop``. True: it returned first; its exception is raised here."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        stopping.cancel()


def _on_signal(number: int, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)  # asked twice: not even the interpreter's own end, which may wait for the device
    stop.set()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_can_bind(host: str, port: int) -> None:
    """Raises ServeError with the system's reason: grpc itself tells no more than that it failed."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise ServeError(f"cannot listen on {_address(host, port)}: {reason}") from error
