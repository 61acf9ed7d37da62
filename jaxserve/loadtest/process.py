"""A server in a process of its own, so that who measures it does not share its interpreter."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

STOP_TIMEOUT_S = 30.0


class Served(NamedTuple):
    target: str  # gRPC
    url: str  # HTTP
    pid: int
    about: dict[str, Any]  # ``bench.environment`` there: this process leaves the devices to the server


@contextmanager
def server_process(
    model: str, keywords: Mapping[str, Any], platform: str | None = None, **server: Any
) -> Iterator[Served]:
    """Serves ``model`` while the block runs, with the keywords of ``Engine.from_pretrained``.

    Args:
        server: fields of ``ServerOptions``.

    Raises:
        RuntimeError: it could not be started, with the reason.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(model, dict(keywords), platform, server, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            told = ours.recv()
        except EOFError:
            raise RuntimeError(f"the server of {model} ended before it was ready") from None
        if isinstance(told, str):
            raise RuntimeError(told)
        port, http_port, about = told
        assert process.pid is not None
        yield Served(f"127.0.0.1:{port}", f"http://127.0.0.1:{http_port}", process.pid, about)
    finally:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
        process.join(STOP_TIMEOUT_S)
        if process.is_alive():
            process.kill()


def _serve(
    model: str, keywords: dict[str, Any], platform: str | None, server: dict[str, Any], ready: Connection
) -> None:
    import jax

    from jaxserve.bench.environment import environment
    from jaxserve.engine.engine import Engine
    from jaxserve.server.app import serve
    from jaxserve.server.options import ServerOptions

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who measures
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    try:
        asyncio.run(
            serve(
                lambda: Engine.from_pretrained(model, **keywords),
                ServerOptions(port=0, http_port=0, drain_timeout_s=0.0, **server),
                on_ready=lambda server: ready.send((server.port, server.http_port, environment())),
            )
        )
    except Exception as error:  # whatever it is, the one who waits is to be told
        ready.send(f"{type(error).__name__}: {error}")


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has used; None where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
