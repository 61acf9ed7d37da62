"""The ``serve`` command."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxserve.cli.loading import open_engine
from jaxserve.cli.options import EngineOptions, Model, flatten_options
from jaxserve.cli.terminal import ProgressDisplay, note
from jaxserve.server.logs import set_up
from jaxserve.server.options import DEFAULT_HOST, DEFAULT_PORT, ServerOptions, ToolCallParser
from jaxserve.server.trace_context import check_extra

LogFormat = Literal["text", "json"]

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.server.app import Server


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What a server has beside its engine."""

    host: Annotated[str, typer.Option(help="Address to bind.")] = DEFAULT_HOST
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one.")] = DEFAULT_PORT
    http_port: Annotated[
        int | None, typer.Option(help="OpenAI-compatible HTTP; 0 picks a free one. (default: none)")
    ] = None
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What HTTP requests may call the model; may be repeated. (default: MODEL)")
    ] = None
    tool_call_parser: Annotated[
        ToolCallParser, typer.Option(help="How the model writes tool calls; auto: as its chat template shows.")
    ] = "auto"
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus; 0 picks a free one. (default: none)")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of the server's certificates, for all ports.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM file: clients need a certificate of it.")] = None
    api_keys_file: Annotated[Path | None, typer.Option(help="Bearer tokens, one a line: clients need one.")] = None
    max_concurrent_requests: Annotated[int | None, typer.Option(help="Open requests, at most.")] = None
    max_requests_per_client: Annotated[int | None, typer.Option(help="Open requests of one client, at most.")] = None
    max_output_tokens: Annotated[int | None, typer.Option(help="Output tokens of any request, at most.")] = None
    max_message_bytes: Annotated[int, typer.Option(help="Larger messages and bodies are refused.")] = (
        ServerOptions.max_message_bytes
    )
    request_timeout: Annotated[float | None, typer.Option(help="Seconds of any request, at most.")] = None
    step_timeout: Annotated[
        float, typer.Option(help="Seconds of one step, after which the device counts as failed; 0: no limit.")
    ] = ServerOptions.step_timeout_s
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="OpenTelemetry collector, http://HOST:4317, for a span of each request. (extra: otel)"
        ),
    ] = None
    log_format: Annotated[LogFormat, typer.Option(help="json: a line for every request, too.")] = "text"
    port_file: Annotated[Path | None, typer.Option(help="Written with the gRPC port once it is bound.")] = None
    weights_from: Annotated[
        list[Path] | None, typer.Option(help="A folder that UpdateWeights may read from; may be repeated.")
    ] = None
    loras_from: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that adapters may be loaded from while serving; may be repeated."),
    ] = None
    drain_timeout: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to running requests.")] = 30.0
    slow_reader_timeout: Annotated[float, typer.Option(help="Seconds a reader may take nothing.")] = 30.0


@flatten_options
def serve(model: Model, engine: EngineOptions, serving: ServingOptions) -> None:
    """Serve a model over gRPC and HTTP. SIGTERM or Ctrl-C lets running requests finish, a second one does not."""
    run_server(model, engine, serving, lambda: open_engine(model, engine))


def run_server(
    model: str,
    engine: EngineOptions,
    serving: ServingOptions,
    open_it: "Callable[[], Engine]",
    on_start: "Callable[[Server], None] | None" = None,
) -> None:
    """Serves the engine that ``open_it`` makes, until it is told to stop.

    Args:
        on_start: called with the server when its ports are bound and the engine loads.
    """
    from jaxserve.checkpoint.resolve import resolve_model
    from jaxserve.server.app import serve as serve_grpc

    set_up(serving.log_format)
    host, port_file = serving.host, serving.port_file
    names = tuple(serving.served_model_name or (served_name(model),))
    for name in engine.keywords().get("lora_modules", ()):  # a mistake is told before anything is bound
        if name in names:
            raise ValueError(f"lora_modules: {name!r} is what HTTP requests call the model")
    options = ServerOptions(
        host=host,
        port=serving.grpc_port,
        http_port=serving.http_port,
        served_model_names=names,
        tool_call_parser=serving.tool_call_parser,
        metrics_port=serving.metrics_port,
        tls_cert=serving.tls_cert,
        tls_key=serving.tls_key,
        tls_client_ca=serving.tls_client_ca,
        api_keys_file=serving.api_keys_file,
        max_concurrent_requests=serving.max_concurrent_requests,
        max_requests_per_client=serving.max_requests_per_client,
        max_output_tokens=serving.max_output_tokens,
        max_message_bytes=serving.max_message_bytes,
        request_timeout_s=serving.request_timeout,
        step_timeout_s=serving.step_timeout,
        otlp_traces_endpoint=serving.otlp_traces_endpoint,
        weight_folders=tuple(serving.weights_from or ()),
        lora_folders=tuple(serving.loras_from or ()),
        drain_timeout_s=serving.drain_timeout,
        slow_reader_timeout_s=serving.slow_reader_timeout,
    )
    if options.otlp_traces_endpoint is not None:
        check_extra()
    with ProgressDisplay() as progress:  # of a download, if there is one
        resolve_model(model, on_progress=progress)

    def on_bound(server: "Server") -> None:
        http = "" if serving.http_port is None else f", http on {host}:{server.http_port}"
        metrics = "" if serving.metrics_port is None else f", metrics on {host}:{server.metrics_port}"
        note(f"listening on {host}:{server.port}{http}{metrics}")
        if port_file is not None:
            unfinished = port_file.with_name(port_file.name + ".tmp")
            unfinished.write_text(f"{server.port}\n", encoding="ascii")
            unfinished.replace(port_file)  # who polls for the file never sees half of it
        if on_start is not None:
            on_start(server)

    def on_ready(server: "Server") -> None:
        note(f"ready on {host}:{server.port}")

    try:
        asyncio.run(serve_grpc(open_it, options, on_bound=on_bound, on_ready=on_ready))
    finally:
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    note("stopped")


def served_name(model: str) -> str:
    """What HTTP requests call the model that was asked for as ``model``: that, or of a path on disk its last part."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
