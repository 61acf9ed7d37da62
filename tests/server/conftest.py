import asyncio
import socket
import threading
from contextlib import asynccontextmanager, suppress

import pytest

from jaxserve.engine.async_engine import NotServingError
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.options import ServerOptions
from tests.server.fake_engine import FakeEngine, byte_tokenizer

TIMEOUT_S = 60.0  # nothing here takes long; a busy machine may make it so


class Serving:
    """A started server before a fake engine, and a client of it."""

    def __init__(self, server: Server, client: AsyncClient, engine: FakeEngine):
        self.server = server
        self.client = client
        self.engine = engine
        self.target = f"127.0.0.1:{server.port}"
        self.url = f"http://127.0.0.1:{server.http_port}"

    async def is_idle(self) -> bool:
        """Waits until the engine has no live request, and the server's figures say so."""
        is_idle = await asyncio.to_thread(self.engine.idle.wait, TIMEOUT_S)
        with suppress(NotServingError):  # it has failed, or is closed: there are none any more
            await self.server.engine.page_map()  # after the step that gives the last one's end
        return is_idle


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None, *, may_build: threading.Event | None = None, wait_ready: bool = True, **options
):
    """A server on a free port. With ``may_build``, the engine is built once it is set."""
    engine = FakeEngine(tokenizer=byte_tokenizer()) if engine is None else engine

    def build():
        assert may_build is None or may_build.wait(TIMEOUT_S)
        return engine

    server = Server(build, ServerOptions(port=0, **options))
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            if wait_ready:
                await server.ready()
            yield Serving(server, client, engine)
    finally:
        if may_build is not None:
            may_build.set()
        assert await server.close()


def endless_engine(**options) -> FakeEngine:
    """Its requests end by ``max_tokens`` or not at all."""
    return FakeEngine(**({"tokenizer": byte_tokenizer(), "max_model_len": 10**6, "step_delay_s": 0.001} | options))


@pytest.fixture
def taken_port():
    """A port that something else listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
