"""The ``serve`` command."""

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.loading import open_engine
from jaxserve.cli.options import EngineOptions, Model, flatten_options
from jaxserve.cli.terminal import ProgressDisplay, note
from jaxserve.server.options import DEFAULT_HOST, DEFAULT_PORT, ServerOptions

if TYPE_CHECKING:
    from jaxserve.server.app import Server


@flatten_options
def serve(
    model: Model,
    engine: EngineOptions,
    host: Annotated[str, typer.Option(help="Address to bind; there is no TLS here.")] = DEFAULT_HOST,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one.")] = DEFAULT_PORT,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus; 0 picks a free one. (default: none)")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Written with the gRPC port once it is bound.")] = None,
    weights_from: Annotated[
        list[Path] | None, typer.Option(help="A folder that UpdateWeights may read from; may be repeated.")
    ] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to running requests.")] = 30.0,
    slow_reader_timeout: Annotated[float, typer.Option(help="Seconds a reader may take nothing.")] = 30.0,
) -> None:
    """Serve a model over gRPC. SIGTERM or Ctrl-C lets running requests finish, a second one does not."""
    from jaxserve.checkpoint.resolve import resolve_model
    from jaxserve.server.app import serve as serve_grpc

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    engine.keywords()  # a mistake in the command line is told before anything is bound
    with ProgressDisplay() as progress:  # of a download, if there is one
        resolve_model(model, on_progress=progress)
    options = ServerOptions(
        host=host,
        port=grpc_port,
        metrics_port=metrics_port,
        weight_folders=tuple(weights_from or ()),
        drain_timeout_s=drain_timeout,
        slow_reader_timeout_s=slow_reader_timeout,
    )

    def on_bound(server: "Server") -> None:
        metrics = "" if metrics_port is None else f", metrics on {host}:{server.metrics_port}"
        note(f"listening on {host}:{server.port}{metrics}")
        if port_file is not None:
            unfinished = port_file.with_name(port_file.name + ".tmp")
            unfinished.write_text(f"{server.port}\n", encoding="ascii")
            unfinished.replace(port_file)  # who polls for the file never sees half of it

    def on_ready(server: "Server") -> None:
        note(f"ready on {host}:{server.port}")

    try:
        asyncio.run(serve_grpc(lambda: open_engine(model, engine), options, on_bound=on_bound, on_ready=on_ready))
    finally:
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    note("stopped")
