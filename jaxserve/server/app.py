"""The server process: bind, health, signals, drain. ``serve`` is what the command line runs."""

import asyncio
import atexit
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]: not in its stubs
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from jaxserve.engine.async_engine import AsyncEngine, EngineFailedError
from jaxserve.engine.core import EngineCore
from jaxserve.request import Request, TokenEvent
from jaxserve.server.binding import ServeError, address, check_can_bind, listening_socket
from jaxserve.server.control import ControlService
from jaxserve.server.http.app import make_app
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.guard import Guard
from jaxserve.server.http.listener import HttpListener
from jaxserve.server.interceptors import LostCallInterceptor, MalformedInterceptor
from jaxserve.server.logs import RequestLog
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.options import ServerOptions
from jaxserve.server.recent import RecentLatencies
from jaxserve.server.security import ApiKeys, TokenInterceptor, grpc_credentials, http_context, warn_if_open
from jaxserve.server.service import InferenceService
from jaxserve.server.trace_context import check_extra
from jaxserve.server.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from jaxserve.server.tracing import RequestTracer

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
BUSY_TIMEOUT_S = 0.5  # for an engine that loads, or whose device hangs: that may take minutes, uninterrupted
STOP_GRACE_S = 0.2  # for unary calls; a health watch never ends by itself
# By default a thread that wants the interpreter gets it after 5 ms: a token would wait while the engine's thread
# prepares its next step.
SWITCH_INTERVAL_S = 2e-4


class Server:
    """gRPC and HTTP before one engine: ``start`` binds and begins to load, ``ready`` waits, ``close`` ends all.

    After ``start``: ``port``, ``http_port`` and ``metrics_port`` (None where there is none) are the bound ports,
    ``engine`` is loading.
    """

    def __init__(self, engine_factory: Callable[[], EngineCore], options: ServerOptions):
        self.options = options
        self.port = options.port
        self.http_port = options.http_port
        self.metrics_port = options.metrics_port
        self._http: HttpListener | None = None
        self._factory = engine_factory
        self._engine: AsyncEngine | None = None
        self._metrics_server: WSGIServer | None = None
        self._tracer: RequestTracer | None = None

    @property
    def engine(self) -> AsyncEngine:
        assert self._engine is not None, "the server was not started"
        return self._engine

    async def start(self) -> None:
        """Binds, serves health (NOT_SERVING), and starts the engine.

        Raises:
            ServeError: a port cannot be bound.
            ValueError: a file of tokens or of TLS cannot be used, or spans are asked for and not installed; names it.
        """
        options = self.options
        if options.otlp_traces_endpoint is not None:
            check_extra()
        keys = None if options.api_keys_file is None else ApiKeys.from_file(options.api_keys_file)
        context, credentials = http_context(options), grpc_credentials(options)
        warn_if_open(options)
        for port in (options.port, options.http_port, options.metrics_port):
            if port is not None:
                check_can_bind(options.host, port)
        self._grpc = grpc.aio.server(
            interceptors=[  # the first is outermost
                LostCallInterceptor(),
                *([] if keys is None else [TokenInterceptor(keys)]),
                MalformedInterceptor(),
            ],
            options=[
                ("grpc.so_reuseport", 0),  # or a second server would take half of the first one's connections
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 20_000),  # finds clients that vanished without a word
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        where = address(options.host, options.port)
        try:
            if credentials is None:
                self.port = self._grpc.add_insecure_port(where)
            else:
                self.port = self._grpc.add_secure_port(where, credentials)
        except RuntimeError as error:
            raise ServeError(f"cannot bind {where}: {error}") from error

        log, recent = RequestLog(), RecentLatencies()
        metrics = ServerMetrics(
            lambda: None if self._engine is None else self._engine.stats(), lambda: self.engine.engine, recent
        )
        if options.metrics_port is not None:
            try:
                self._metrics_server, _ = start_http_server(
                    options.metrics_port,
                    options.host,
                    metrics.registry,
                    certfile=_text(options.tls_cert),
                    keyfile=_text(options.tls_key),
                    client_cafile=_text(options.tls_client_ca),
                    client_auth_required=options.tls_client_ca is not None,
                )
            except OSError as error:
                raise ServeError(f"cannot bind {address(options.host, options.metrics_port)}: {error}") from error
            self.metrics_port = self._metrics_server.server_port
        listening = None if options.http_port is None else listening_socket(options.host, options.http_port)
        if options.otlp_traces_endpoint is not None:
            # Not with the others: it is an extra, and its imports cost a start time and memory.
            from jaxserve.server.tracing import RequestTracer, otlp_exporter

            self._tracer = RequestTracer(otlp_exporter(options.otlp_traces_endpoint), self._model_name)
        tracer = self._tracer

        def observe(request: Request, event: TokenEvent) -> None:
            metrics.observe(request, event)
            if event.index == 0 or event.finish_reason is not None:
                log.observe(request, event)
                if tracer is not None:
                    tracer.observe(request, event)

        # Last of what can fail: its thread cannot be interrupted while it loads.
        self._engine = AsyncEngine(
            self._factory,
            slow_reader_timeout_s=options.slow_reader_timeout_s,
            max_concurrent_requests=options.max_concurrent_requests,
            max_requests_per_client=options.max_requests_per_client,
            step_timeout_s=options.step_timeout_s,
            observer=observe,
            on_failure=None if tracer is None else tracer.observe_failure,
        )
        self._service = InferenceService(self.engine, options)
        if listening is not None:
            backend = Backend(self.engine, options, metrics.registry, recent)
            self._guard = Guard(make_app(backend), options, keys)
            self._http = HttpListener(self._guard, listening, options.max_message_bytes, context)
            self.http_port = self._http.port
            await self._http.start()
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
                await self._idle()
        return finished

    async def close(self) -> bool:
        """Ends calls, engine and metrics. False: the engine thread is busy loading, or hangs, uninterruptibly."""
        await self._health.enter_graceful_shutdown()
        is_busy = self.engine.state in ("loading", "failed")
        ended = await self.engine.close(BUSY_TIMEOUT_S if is_busy else CLOSE_TIMEOUT_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):  # streams learn why they ended
                await self._idle()
        if self._http is not None:
            await self._http.stop(STOP_GRACE_S)
        await self._grpc.stop(STOP_GRACE_S)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        return ended

    def _model_name(self) -> str:
        """What answers call the model."""
        return (*self.options.served_model_names, self.engine.engine.model_name)[0]

    async def _idle(self) -> None:
        """Returns when no request is open."""
        await self._service.idle.wait()
        if self._http is not None:
            await self._guard.idle.wait()

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
    finalizing the interpreter (exit 0). Threads that want the interpreter get it after ``SWITCH_INTERVAL_S``, and the
    garbage collector leaves alone what was made before requests are served.

    Args:
        on_bound: called when the ports are bound (``server.port``, ``server.metrics_port``); the engine loads then.
        on_ready: called when requests are served.

    Raises:
        ServeError: a port cannot be bound.
        EngineFailedError: the engine died, or a step took longer than ``step_timeout_s``; if its thread hangs still,
            the process ends as above, but with 1.
        Exception: whatever the engine's construction raised.
    """
    owns_process = stop is None
    if stop is None:
        stop = asyncio.Event()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    server = Server(engine_factory, options or ServerOptions())
    await server.start()
    status = 0
    try:
        if on_bound is not None:
            on_bound(server)
        if await _first(server.ready(), stop):
            if owns_process:
                _keep_for_good()
            if on_ready is not None:
                on_ready(server)
            await _first(server.engine.wait_stopped(), stop)
            logger.info("draining: at most %g s", server.options.drain_timeout_s)
            if not await server.drain():
                logger.warning("the drain limit of %g s passed: requests were aborted", server.options.drain_timeout_s)
            if server.engine.state == "failed":  # while it drained
                await server.engine.wait_stopped()
    except BaseException:
        status = 1
        raise
    finally:
        if not await server.close() and owns_process:
            atexit.register(_leave, status)


def _keep_for_good() -> None:
    """Takes what is there now out of the garbage collector's sight: programs' traces are hundreds of thousands of
    objects, and going through them stops all streams at once, for 0.15 s with a model of 30 layers."""
    gc.collect()
    gc.freeze()


def _leave(status: int) -> None:
    """Ends the process as it is: finalizing the interpreter under a thread that is inside XLA may crash or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _on_signal(number: int, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)  # asked twice: not even the interpreter's own end, which may wait for the device
    stop.set()
